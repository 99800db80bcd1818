"""The stages of a cascade: loaded from checkpoints, and refused where they do not fit together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.errors import UsageError
from diff_dalle.loading import LoadedClassifier, LoadedGenerator, load_classifier, load_generator
from diff_dalle.models.generator import Cond
from diff_dalle.sampling_io.config import per_stage, split_paths
from diff_dalle.sampling_io.find import expand_paths
from diff_dalle.training.checkpoint_file import read_header, read_kind

StrPath = str | os.PathLike[str]
NO_CLASSIFIER = "none"
_OLD_SHARE = 0.1  # of an average, from which on its samples look untrained


@dataclass(frozen=True)
class Guide:
    """A noised CLIP that guides one stage, and the file it came from."""

    path: str
    loaded: LoadedClassifier

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that it sees."""
        return self.loaded.run.image_size

    @property
    def text_length(self) -> int:
        """Tokens of a caption that it reads."""
        return self.loaded.run.clip.text_length

    @property
    def device(self) -> torch.device:
        """Where its weights are at the moment."""
        return next(self.loaded.clip.parameters()).device

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions as it reads them: tokens int64 [B,L] and their mask, on its device."""
        tokens, mask = self.loaded.tokenizer.encode(texts, self.text_length)
        return tokens.to(self.device), mask.to(self.device)


@dataclass(frozen=True)
class Stage:
    """One generator, the file it came from, and the noised CLIP that may guide it.

    Attributes:
        path: the file.
        loaded: the generator.
        guide: the CLIP, on the same device.
        device: where both sample; with off-loading they wait on the CPU.
    """

    path: str
    loaded: LoadedGenerator
    guide: Guide | None = None
    device: torch.device = torch.device("cpu")

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that it makes."""
        return self.loaded.run.image_size

    @property
    def small_size(self) -> int:
        """Side in pixels of the pictures that it enlarges; 0 for a base model."""
        return self.loaded.run.generator.small_size

    @property
    def downsampling(self) -> int:
        """What sides of its pictures, and of tiles of them, must be multiples of, in pixels."""
        return self.loaded.run.unet.downsampling

    @property
    def reads_text(self) -> bool:
        """Whether its generator takes captions."""
        return self.loaded.run.generator.cond_text

    @property
    def text_length(self) -> int:
        """Tokens of a caption that its generator reads."""
        return self.loaded.run.text.text_length

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What turns captions into its tokens; None where it reads none."""
        return self.loaded.tokenizer if self.reads_text else None

    def read(self, texts: Sequence[str]) -> Cond:
        """Captions as its generator reads them, on its device; nothing where it reads none."""
        if self.tokenizer is None:
            return Cond()
        tokens, mask = self.tokenizer.encode(texts, self.text_length)  # [B,L] each
        return Cond(tokens=tokens.to(self.device), mask=mask.to(self.device))

    @property
    def modules(self) -> list[nn.Module]:
        """The networks that take part in its turn."""
        clips = [] if self.guide is None else [self.guide.loaded.clip]
        return [self.loaded.generator, *clips]

    def notes(self) -> list[str]:
        """What the user should know of the checkpoint."""
        rate, step = self.loaded.checkpoint.ema_rate, self.loaded.checkpoint.step
        if rate is None or rate**step < _OLD_SHARE:
            return []
        return [
            f"{self.path} averages over more steps than its run has: {rate**step:.0%} of it are "
            f"the weights that the run began with; model{step:06d}.pt beside it has none of them"
        ]

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the stage's files."""
        return {
            "image_size": self.image_size,
            "small_size": self.small_size,
            "checkpoint": _describe(self.path, self.loaded),
            "classifier": self.guide and _describe(self.guide.path, self.guide.loaded),
        }


def as_paths(value: StrPath | Sequence[StrPath]) -> list[str]:
    """One path or several, as texts."""
    values = [value] if isinstance(value, str | os.PathLike) else value
    return [os.fspath(path) for path in values]


def load_stages(
    paths: Sequence[str],
    classifiers: Sequence[str],
    devices: Sequence[torch.device],
    *,
    offload: bool = False,
) -> list[Stage]:
    """The stages from the smallest picture to the largest, each with its noised CLIP.

    Args:
        paths: checkpoint files in that order, or a folder that holds them (any order).
        classifiers: one entry a stage (``none`` for no CLIP); or one file or folder, each CLIP
            of which guides the stage of its own size; or nothing.
        devices: where the weights go, one device a stage or one for all.
        offload: they wait on the CPU instead.
    Raises:
        UsageError: nothing to load, a file that is no checkpoint or of the wrong kind, stages
            out of order, sizes that do not fit, or another number of devices than of stages.
    """
    files = expand_paths(paths, "generator", read_kind, "model_path")
    if not files:
        raise UsageError("--model_path is missing: name checkpoints or a folder that holds them")
    named = split_paths(paths, lambda path: Path(path).exists())
    if any(Path(path).is_dir() for path in named):  # a folder names its files in no order
        files.sort(key=lambda path: read_header(path).config["image_size"])
    places = per_stage(devices, len(files), "device")
    stages = [
        Stage(path, load_generator(path, "cpu" if offload else device), device=device)
        for path, device in zip(files, places, strict=True)
    ]
    for stage in stages:
        if stage.reads_text and stage.loaded.tokenizer is None:
            raise UsageError(f"--model_path {stage.path} reads captions but has no tokenizer")
    for before, after in zip(stages, stages[1:], strict=False):
        _check_pair(before, after)
    guides = _load_guides(classifiers, stages)
    for stage, guide in zip(stages, guides, strict=True):
        if guide is not None and not offload:
            guide.loaded.clip.to(stage.device)
    return [replace(stage, guide=guide) for stage, guide in zip(stages, guides, strict=True)]


def _check_pair(before: Stage, after: Stage) -> None:
    """Raise a `UsageError` unless ``after`` enlarges what ``before`` makes."""
    if after.image_size <= before.image_size:
        raise UsageError(
            f"--model_path: {after.path} makes {after.image_size} px, but {before.path} before it "
            f"makes {before.image_size} px: name each size once, from the smallest to the largest"
        )
    if after.small_size != before.image_size:
        reads = f"enlarges {after.small_size} px" if after.small_size else "is a base model"
        raise UsageError(
            f"--model_path: {after.path} {reads}, but {before.path} before it makes "
            f"{before.image_size} px: name an upsampler with --small_size {before.image_size}"
        )


def _load_guides(classifiers: Sequence[str], stages: Sequence[Stage]) -> list[Guide | None]:
    """One CLIP, or none, a stage; on the CPU."""
    entries = split_paths(classifiers, lambda path: Path(path).exists())
    if not entries or entries == [NO_CLASSIFIER]:
        return [None] * len(stages)
    if len(entries) == 1:
        return _spread(entries[0], stages)
    guides: list[Guide | None] = []
    for entry, stage in zip(
        per_stage(entries, len(stages), "classifier_path"), stages, strict=True
    ):
        guides += [None] if entry == NO_CLASSIFIER else _spread(entry, [stage])
    return guides


def _spread(entry: str, stages: Sequence[Stage]) -> list[Guide | None]:
    """Each CLIP of a file or folder beside the stage of its own size."""
    guides: dict[int, Guide] = {}
    for path in expand_paths([entry], "classifier", read_kind, "classifier_path"):
        guide = Guide(path, load_classifier(path))
        if guide.image_size in guides:
            raise UsageError(
                f"--classifier_path {entry} holds two CLIPs of {guide.image_size} px, "
                f"{guides[guide.image_size].path} and {path}: name one of them"
            )
        guides[guide.image_size] = guide
    found = [guides.get(stage.image_size) for stage in stages]
    if not any(found):
        raise UsageError(
            f"--classifier_path {entry} sees {_sizes(guides)} px, but the stages make "
            f"{_sizes(stage.image_size for stage in stages)} px: name a CLIP of a stage's size"
        )
    return found


def _sizes(sizes: Iterable[int]) -> str:
    return ", ".join(str(size) for size in sizes)


def _describe(path: str, loaded: LoadedGenerator | LoadedClassifier) -> dict[str, Any]:
    checkpoint = loaded.checkpoint
    return {"path": path, "sha256": checkpoint.sha256, "step": checkpoint.step}
