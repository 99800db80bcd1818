"""How each stage is guided: the flags of both kinds of guidance, checked against the stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from diff_dalle.cascade.stages import Stage
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.strength import (
    EVERYWHERE,
    check_schedule,
    parse_interval,
    step_scales,
)
from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.config import SampleConfig, numbers, per_stage

Value = TypeVar("Value", str, float)


@dataclass(frozen=True, kw_only=True)
class FreeGuidance:
    """Classifier-free guidance of one stage; the fields are those of `StageSettings`."""

    guidance_scale: float
    guidance_interval: str
    guidance_schedule: str
    guidance_rescale: float


@dataclass(frozen=True, kw_only=True)
class ClassifierGuidance:
    """A noised CLIP's guidance of one stage; the fields carry the names of the flags.

    Attributes:
        classifier_scale: strength of the gradient; 0 is none.
        classifier_interval: noise levels at which there is guidance, see `parse_interval`.
        classifier_schedule: how the strength varies over the steps, a name of `SCHEDULES`.
    """

    classifier_scale: float
    classifier_interval: str
    classifier_schedule: str

    def scales(self, diffusion: GaussianDiffusion) -> Tensor:
        """The strength at each step of the respaced process, [T]."""
        return step_scales(
            diffusion,
            self.classifier_scale,
            unguided=0.0,
            interval=self.classifier_interval,
            schedule=self.classifier_schedule,
        )


def choose_free_guidance(stages: Sequence[Stage], cfg: SampleConfig) -> list[FreeGuidance]:
    """Classifier-free guidance, one entry a stage.

    Raises:
        UsageError: a value out of range, or one that no guided stage reads.
    """
    scales = per_stage(numbers(cfg.guidance_scale, "guidance_scale"), len(stages), "guidance_scale")
    guided = [scale != 1 for scale in scales]
    off = "--guidance_scale is 1"
    rescale = numbers(cfg.guidance_rescale, "guidance_rescale")
    intervals = _spread("guidance_interval", cfg.guidance_interval, EVERYWHERE, guided, off)
    schedules = _spread("guidance_schedule", cfg.guidance_schedule, "constant", guided, off)
    rescales = _spread("guidance_rescale", rescale, 0.0, guided, off)
    _check(cfg.guidance_interval, parse_interval, "guidance_interval")
    _check(cfg.guidance_schedule, check_schedule, "guidance_schedule")
    if any(text.strip() for text in cfg.negative_prompts) and not any(guided):
        raise UsageError(
            "--negative_prompts are read by classifier-free guidance alone: give --guidance_scale "
            "other than 1"
        )
    return [
        FreeGuidance(
            guidance_scale=scales[n],
            guidance_interval=intervals[n],
            guidance_schedule=schedules[n],
            guidance_rescale=rescales[n],
        )
        for n in range(len(stages))
    ]


def choose_classifier_guidance(
    stages: Sequence[Stage], cfg: SampleConfig
) -> list[ClassifierGuidance]:
    """Guidance by noised CLIPs, one entry a stage; scale 0 where there is none.

    Raises:
        UsageError: a value out of range, or one that no guided stage reads.
    """
    name = "classifier_scale"
    scales = per_stage(numbers(cfg.classifier_scale, name), len(stages), name)
    one_for_all = len(cfg.classifier_scale) == 1 and any(stage.guide for stage in stages)
    for scale, stage in zip(scales, stages, strict=True):
        if scale not in (0, 1) and not stage.guide and not one_for_all:
            raise UsageError(
                f"--classifier_scale is {scale:g}, but there is no CLIP for the stage of "
                f"{stage.image_size} px: name one with --classifier_path, or give 1"
            )
    scales = [scale if s.guide else 0.0 for scale, s in zip(scales, stages, strict=True)]
    guided = [scale != 0 for scale in scales]
    off = "no CLIP guides it (--classifier_path, --classifier_scale)"
    intervals = _spread("classifier_interval", cfg.classifier_interval, EVERYWHERE, guided, off)
    schedules = _spread("classifier_schedule", cfg.classifier_schedule, "constant", guided, off)
    _check(cfg.classifier_interval, parse_interval, "classifier_interval")
    _check(cfg.classifier_schedule, check_schedule, "classifier_schedule")
    if cfg.contrast != "none" and not any(guided):
        raise UsageError(
            f"--contrast is {cfg.contrast}, but no CLIP guides any stage: name one with "
            "--classifier_path, with --classifier_scale other than 0"
        )
    return [
        ClassifierGuidance(
            classifier_scale=scales[n],
            classifier_interval=intervals[n],
            classifier_schedule=schedules[n],
        )
        for n in range(len(stages))
    ]


def _check(texts: Sequence[str], check: Callable[[str, str], object], name: str) -> None:
    for text in texts:
        check(text, name)


def _spread(
    name: str, values: Sequence[Value], default: Value, guided: Sequence[bool], off: str
) -> list[Value]:
    """One value a stage, the default where nothing is guided.

    One value for all is for the stages that are guided; one of several must not be in vain.
    """
    spread = per_stage(values, len(guided), name)
    one_for_all = len(values) == 1 and any(guided)
    for number, (value, reads) in enumerate(zip(spread, guided, strict=True), start=1):
        if value != default and not reads and not one_for_all:
            raise UsageError(
                f"--{name} is {value}, but stage {number} would not read it, since {off}: give "
                f"{default} there"
            )
    return [value if reads else default for value, reads in zip(spread, guided, strict=True)]
