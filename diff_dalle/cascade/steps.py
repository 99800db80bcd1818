"""Which sampler draws a stage and which steps it visits, from the flags that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diff_dalle.cascade.stages import Stage
from diff_dalle.diffusion.defaults import (
    BEST_SPACING,
    FAST_SAMPLER,
    check_sampler,
    default_steps,
)
from diff_dalle.diffusion.spacing import names_count
from diff_dalle.knobs import AUTO, require
from diff_dalle.sampling_io.config import SampleConfig, per_stage


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A stage's sampler and its steps.

    Attributes:
        sampler: a name of `SAMPLERS`.
        timestep_respacing: see `space_timesteps`.
        step_spacing: a name of `SPACINGS`.
    """

    sampler: str
    timestep_respacing: str
    step_spacing: str


def choose_steps_of(stages: Sequence[Stage], cfg: SampleConfig) -> list[Steps]:
    """One choice a stage; see `SampleConfig` for what each flag means beside the others.

    Raises:
        UsageError: a sampler that there is not, or two flags that contradict each other.
    """
    count = len(stages)
    samplers = per_stage(cfg.sampler, count, "sampler")
    spacings = per_stage(cfg.step_spacing, count, "step_spacing")
    specs = per_stage(cfg.resolved_respacing, count, "steps" if cfg.steps else "timestep_respacing")
    varied = [cfg.variation is not None, *[False] * (count - 1)]
    choices = zip(stages, samplers, specs, spacings, varied, strict=True)
    return [
        _resolve(stage, cfg, sampler, spec, spacing, varied)
        for stage, sampler, spec, spacing, varied in choices
    ]


def _resolve(
    stage: Stage, cfg: SampleConfig, sampler: str, spec: str, spacing: str, varied: bool
) -> Steps:
    """One stage's; ``varied``: its noise comes from inverting DDIM, which then draws."""
    by_older_flags = sampler == AUTO and (cfg.use_ddim or cfg.timestep_respacing != [AUTO])
    if sampler == AUTO:
        sampler = "ddim" if cfg.use_ddim or varied else "ddpm" if by_older_flags else FAST_SAMPLER
    check_sampler(sampler)
    clash = cfg.use_ddim and sampler != "ddim"
    require(not clash, "sampler", sampler, "be ddim or left out beside --use_ddim True")
    fits = not varied or sampler == "ddim"
    require(fits, "sampler", sampler, "be ddim or left out for the first stage of --variation")
    if spec == AUTO:
        diffusion = stage.loaded.diffusion
        spec = str(
            default_steps(
                sampler,
                image_size=stage.image_size,
                upsampler=stage.small_size > 0,
                num_steps=diffusion.num_steps,
            )
        )
    if spacing == AUTO:
        free = names_count(spec) and not by_older_flags
        spacing = BEST_SPACING[sampler] if free else "uniform"
    return Steps(sampler=sampler, timestep_respacing=spec, step_spacing=spacing)
