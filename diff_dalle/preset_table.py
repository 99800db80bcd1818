"""models_hparams.md: what each preset is made of and what it costs, computed, not typed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from diff_dalle.config import (
    ClassifierRun,
    GeneratorRun,
    make_classifier,
    make_generator,
    parse_run,
)
from diff_dalle.diffusion.losses import LossConfig
from diff_dalle.diffusion.schedule import ProcessConfig
from diff_dalle.diffusion.timesteps import TimestepConfig
from diff_dalle.image_cost import (
    CASCADES,
    cost_table,
    generator_inputs,
)
from diff_dalle.models.clip import CLIPConfig
from diff_dalle.models.cost import count_parameters, forward_flops, training_bytes
from diff_dalle.models.generator import Cond, GeneratorConfig
from diff_dalle.models.text import TextEncoderConfig
from diff_dalle.models.unet_config import UNetConfig
from diff_dalle.presets import PRESETS

VOCABULARY = 32_768  # tokens that every text encoder is counted with
_MODEL = (UNetConfig, TextEncoderConfig, GeneratorConfig, CLIPConfig)
_DIFFUSION = (ProcessConfig, LossConfig, TimestepConfig)


@dataclasses.dataclass(frozen=True)
class PresetRow:
    """One preset's cost.

    Attributes:
        name: of the preset.
        parameters: all of them, with a vocabulary of `VOCABULARY` tokens.
        gflops: of one forward pass on one training image (or crop), 2 a multiply-add.
        gibibytes: estimate of the memory of one fp32 training step of one microbatch.
        flags: as typed, in three groups: MODEL, DIFFUSION, TRAIN.
    """

    name: str
    parameters: int
    gflops: float
    gibibytes: float
    flags: tuple[str, str, str]


def preset_row(name: str) -> PresetRow:
    """Count a preset on the meta device, where nothing is computed."""
    kind, flags = PRESETS[name]
    vocabulary = ["--vocab_size", str(VOCABULARY)]
    one: tuple[Tensor | Cond, ...]
    many: tuple[Tensor | Cond, ...]
    with torch.device("meta"):
        if kind == GeneratorRun.kind:
            run = parse_run(GeneratorRun, ["--preset", name, *vocabulary])
            module: torch.nn.Module = make_generator(run)
            size = run.task.crop_size or run.image_size
            one, many = (generator_inputs(run, batch=n, size=size) for n in (1, _at_once(run)))
        else:
            clip_run = parse_run(ClassifierRun, ["--preset", name, *vocabulary])
            module = make_classifier(clip_run)
            one, many = (_clip_inputs(clip_run, n) for n in (1, _at_once(clip_run)))
    groups = {"model": set(_names(_MODEL)), "diffusion": set(_names(_DIFFUSION))}
    train = flags.keys() - groups["model"] - groups["diffusion"]
    return PresetRow(
        name=name,
        parameters=count_parameters(module),
        gflops=forward_flops(module, *one) / 1e9,
        gibibytes=training_bytes(module, *many) / 2**30,
        flags=(
            _typed(flags, groups["model"]),
            _typed(flags, groups["diffusion"]),
            _typed(flags, train),
        ),
    )


def preset_table() -> str:
    """The text of models_hparams.md."""
    rows = [preset_row(name) for name in PRESETS]
    lines = [
        "# Presets",
        "",
        "Printed by `python scripts/print_presets.py > models_hparams.md`. Parameters are counted "
        f"with a vocabulary of {VOCABULARY:,} tokens; GFLOPs are of one forward pass on one "
        "training image or crop (2 a multiply-add); memory is an estimate for one fp32 training "
        "step of one microbatch with AdamW and one average (half of the activations in bf16). "
        "No weights are published yet: every checkpoint is *none*.",
        "",
        "| preset | parameters | forward GFLOPs | training memory, GiB | checkpoint |",
        "|---|---:|---:|---:|---|",
    ]
    for row in rows:
        costs = f"{row.parameters:,} | {row.gflops:,.2f} | {row.gibibytes:,.1f}"
        lines.append(f"| `{row.name}` | {costs} | none |")
    large = sum(row.parameters for row in rows if row.name.startswith("diff-dalle-"))
    lines += ["", f"The four `diff-dalle-*` presets add up to {large:,} parameters.", ""]
    lines += _cascade_lines()
    for row in rows:
        lines += [f"## {row.name}", "", "```"]
        names = ("MODEL_FLAGS", "DIFFUSION_FLAGS", "TRAIN_FLAGS")
        lines += [f'{title}="{text}"' for title, text in zip(names, row.flags, strict=True)]
        lines += ["```", ""]
    return "\n".join(lines)


def _at_once(run: GeneratorRun | ClassifierRun) -> int:
    return run.train.batch_size if run.train.microbatch < 1 else run.train.microbatch


def _cascade_lines() -> list[str]:
    """The section on what an image costs."""
    lines = [
        "## What an image costs",
        "",
        "Counted for whole pictures in the default number of steps, the base model's guided (two "
        "evaluations each), the upsamplers' not. A caption is encoded once a stage, which the last "
        "column includes; a noised CLIP would come on top.",
        "",
    ]
    for name in CASCADES:
        lines += [*cost_table(name, VOCABULARY), ""]
    return lines


def _clip_inputs(run: ClassifierRun, batch: int) -> tuple[Tensor, ...]:
    tokens = torch.zeros(batch, run.clip.text_length, dtype=torch.int64)
    image = torch.zeros(batch, 3, run.image_size, run.image_size)
    return image, torch.zeros(batch), tokens, tokens == 0


def _names(sections: Iterable[type]) -> list[str]:
    return [field.name for section in sections for field in dataclasses.fields(section)]


def _typed(flags: dict[str, object], names: Iterable[str]) -> str:
    wanted = set(names)
    shown = {name: "''" if value == "" else value for name, value in flags.items()}
    return " ".join(f"--{name} {value}" for name, value in shown.items() if name in wanted)
