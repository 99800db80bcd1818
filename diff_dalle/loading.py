"""From a checkpoint file to a model that is ready to sample: no flag repeats the training's.

A checkpoint carries its run's configuration and tokenizer. What a user states all the same is
compared with the checkpoint of the stage whose ``image_size`` it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from diff_dalle.config import (
    ClassifierRun,
    GeneratorRun,
    from_flat,
    make_diffusion,
    shaping_fields,
    to_flat,
)
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.schedule import ProcessConfig
from diff_dalle.errors import UsageError
from diff_dalle.models.clip import NoisyCLIP
from diff_dalle.models.generator import Generator
from diff_dalle.training.checkpoint_file import Checkpoint, load_weights


@dataclass(frozen=True)
class LoadedGenerator:
    """One stage of a cascade, in evaluation mode; the checkpoint is without its weights.

    Autocast keeps its casts of weights from step to step only where they require a gradient, so
    they do; sampling runs without.
    """

    generator: Generator
    diffusion: GaussianDiffusion
    tokenizer: Tokenizer | None
    run: GeneratorRun
    checkpoint: Checkpoint


@dataclass(frozen=True)
class LoadedClassifier:
    """A noised CLIP, frozen, in evaluation mode; the checkpoint is without its weights."""

    clip: NoisyCLIP
    diffusion: GaussianDiffusion
    tokenizer: Tokenizer
    run: ClassifierRun
    checkpoint: Checkpoint


def load_generator(path: str, device: torch.device | str = "cpu") -> LoadedGenerator:
    """The generator of a checkpoint.

    Raises:
        UsageError: the file is no checkpoint, is damaged, or holds a CLIP.
    """
    checkpoint = _read(path, GeneratorRun.kind, hint="give it as --classifier_path")
    run = from_flat(GeneratorRun, checkpoint.config)
    generator = Generator(run.generator, run.unet, run.text)
    _fill(generator, checkpoint, path)
    return LoadedGenerator(
        generator=generator.to(device).eval(),
        diffusion=make_diffusion(run),
        tokenizer=_tokenizer(checkpoint),
        run=run,
        checkpoint=replace(checkpoint, state_dict={}),
    )


def load_classifier(path: str, device: torch.device | str = "cpu") -> LoadedClassifier:
    """The noised CLIP of a checkpoint.

    Raises:
        UsageError: the file is no checkpoint, is damaged, or holds a generator.
    """
    checkpoint = _read(path, ClassifierRun.kind, hint="give it as --model_path")
    tokenizer = _tokenizer(checkpoint)
    if tokenizer is None:
        raise UsageError(f"{path} carries no tokenizer: it is damaged, train the CLIP again")
    run = from_flat(ClassifierRun, checkpoint.config)
    clip = NoisyCLIP(run.clip)
    _fill(clip, checkpoint, path)
    return LoadedClassifier(
        clip=clip.to(device).eval().requires_grad_(False),
        diffusion=make_diffusion(run),
        tokenizer=tokenizer,
        run=run,
        checkpoint=replace(checkpoint, state_dict={}),
    )


def check_stated(
    stated: Mapping[str, Any], stages: Sequence[LoadedGenerator | LoadedClassifier]
) -> None:
    """Refuse architecture flags that contradict the checkpoint they describe.

    Args:
        stated: the flags that the user typed.
        stages: all loaded models; a flag speaks of those with the stated ``image_size`` (or,
            where no ``image_size`` is stated, of the first). The noise process is a generator's:
            a CLIP has one of its own.
    Raises:
        UsageError: one flag differs, showing both values.
    """
    if not stages:
        return
    size = stated.get("image_size", stages[0].run.image_size)
    made = [stage.run.image_size for stage in stages if isinstance(stage, LoadedGenerator)]
    if size not in made:
        sizes = ", ".join(map(str, made))
        raise UsageError(f"--image_size is {size}, but the checkpoints make {sizes}")
    for stage in stages:
        if stage.run.image_size == size:
            _compare(stated, stage)


def _compare(stated: Mapping[str, Any], stage: LoadedGenerator | LoadedClassifier) -> None:
    known = to_flat(stage.run)
    shaping = shaping_fields() & known.keys()
    if isinstance(stage, LoadedClassifier):
        shaping -= {field.name for field in fields(ProcessConfig)}
    overlaid = {name: value for name, value in stated.items() if name in shaping}
    run_class: type[Any] = type(stage.run)
    given = to_flat(from_flat(run_class, {**known, **overlaid}))
    for name in sorted(shaping):
        if given[name] != known[name]:
            raise UsageError(
                f"--{name} is {given[name]}, but the {stage.run.kind} of "
                f"{stage.run.image_size} px was trained with {known[name]}: leave the flag out"
            )


def _read(path: str, kind: str, *, hint: str) -> Checkpoint:
    """The checkpoint in a file, if it is of that kind; else the error says the ``hint``."""
    checkpoint = load_weights(path)
    if checkpoint.kind != kind:
        raise UsageError(f"{path} holds a {checkpoint.kind}, not a {kind}: {hint}")
    return checkpoint


def _fill(module: torch.nn.Module, checkpoint: Checkpoint, path: str) -> None:
    try:
        module.load_state_dict(checkpoint.state_dict)
    except RuntimeError as problem:
        reason = str(problem).splitlines()[1].strip()
        raise UsageError(f"{path} does not fit its own configuration: {reason}") from problem


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    if checkpoint.tokenizer_json is None:
        return None
    return Tokenizer.from_json(checkpoint.tokenizer_json)
