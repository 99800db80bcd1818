"""What one image of a cascade costs, stage by stage, counted and not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diff_dalle.config import GeneratorRun, make_generator, parse_run
from diff_dalle.diffusion.defaults import FAST_SAMPLER, default_steps
from diff_dalle.models.cost import count_parameters, forward_flops
from diff_dalle.models.generator import Cond, Generator

CASCADES = {
    name: tuple(f"{name}-{size}" for size in (64, 256, 1024))
    for name in ("tiny", "base", "diff-dalle")
}
"""By name, the presets of a cascade from the smallest picture to the largest."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage's share of an image.

    Attributes:
        preset: of the stage.
        parameters: all of them.
        evaluation: operations of the U-Net on one whole image, 2 a multiply-add.
        evaluations: of the U-Net, an image.
        text: operations of the text encoder, which reads a caption once an image.
    """

    preset: str
    parameters: int
    evaluation: int
    evaluations: int
    text: int

    @property
    def total(self) -> int:
        """Operations an image."""
        return self.evaluation * self.evaluations + self.text


def cascade_cost(presets: Sequence[str], vocabulary: int) -> list[StageCost]:
    """What an image costs in the default number of steps, its stages in order.

    A base model is guided without a classifier, so a step asks it with and without the caption;
    upsamplers are not guided.

    Args:
        presets: of a base model and of upsamplers.
        vocabulary: tokens that every text encoder is counted with.
    """
    return [stage_cost(preset, vocabulary) for preset in presets]


def stage_cost(preset: str, vocabulary: int) -> StageCost:
    """Count one stage on the meta device, where nothing is computed.

    An evaluation is counted as if it read the text: sampling keeps the text's keys and values
    from one evaluation to the next, which saves the tiny base model 4 %, larger ones 1 %.
    """
    with torch.device("meta"):
        run = parse_run(GeneratorRun, ["--preset", preset, "--vocab_size", str(vocabulary)])
        generator = make_generator(run)
    inputs = generator_inputs(run, batch=1, size=run.image_size)
    whole = forward_flops(generator, *inputs)
    text = _text_flops(generator, inputs[2])
    upsampler = bool(run.generator.small_size)
    steps = default_steps(
        FAST_SAMPLER,
        image_size=run.image_size,
        upsampler=upsampler,
        num_steps=run.process.diffusion_steps,
    )
    return StageCost(
        preset=preset,
        parameters=count_parameters(generator),
        evaluation=whole - text,
        evaluations=steps if upsampler else 2 * steps,
        text=text,
    )


def generator_inputs(run: GeneratorRun, *, batch: int, size: int) -> tuple[Tensor, Tensor, Cond]:
    """Arguments of a run's generator on the meta device: ``size`` pixels of a picture."""
    with torch.device("meta"):
        cond, small = Cond(), run.generator.small_size
        if run.generator.cond_text:
            tokens = torch.zeros(batch, run.text.text_length, dtype=torch.int64)
            cond = Cond(tokens=tokens, mask=tokens == 0)
        if small:
            low = size * small // run.image_size
            cond = replace(cond, low_res=torch.zeros(batch, 3, low, low))
        return torch.zeros(batch, 3, size, size), torch.zeros(batch), cond


def cost_table(name: str, vocabulary: int) -> list[str]:
    """The lines of a Markdown table: every stage of `CASCADES`' entry, then the whole."""
    costs = cascade_cost(CASCADES[name], vocabulary)
    lines = [
        "| stage | parameters | GFLOP an evaluation | evaluations | TFLOP an image |",
        "|---|---:|---:|---:|---:|",
    ]
    for cost in costs:
        lines.append(
            f"| `{cost.preset}` | {cost.parameters:,} | {cost.evaluation / 1e9:,.1f} "
            f"| {cost.evaluations} | {cost.total / 1e12:,.2f} |"
        )
    parameters = sum(cost.parameters for cost in costs)
    total = sum(cost.total for cost in costs) / 1e12
    return [*lines, f"| the `{name}` cascade | {parameters:,} | | | **{total:,.2f}** |"]


def _text_flops(generator: Generator, cond: Cond) -> int:
    if generator.text_encoder is None:
        return 0
    return forward_flops(generator.text_encoder, cond.tokens, cond.mask)
