"""What a run edits, and what that means for each picture and stage.

N pictures, B of a batch, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diff_dalle.cascade.init_images import Given, ImageLike, read_given
from diff_dalle.cascade.stages import Stage
from diff_dalle.errors import UsageError
from diff_dalle.keyed_noise import key_of
from diff_dalle.sampling_io.config import PerStage, SampleConfig, as_texts, numbers, per_stage
from diff_dalle.sampling_io.prompts import Count, Prompt, read_entries
from diff_dalle.sampling_io.sizes import Size, spell
from diff_dalle.training.editing import Between, StageEdit


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """What `Cascade.sample` is to edit; the fields carry the names of the flags.

    Attributes:
        init_images: pictures to start from, one for all prompts or one each: paths, PIL images
            or arrays uint8 [H,W,3]; a path may also be a folder, shards or an npz.
        masks: of the pictures' sizes, one for all or one each: white is drawn anew, black stays,
            grey blends. Paths, PIL images or arrays, uint8 or bool [H,W].
        strength: share of the steps, above 0, that are taken from the noised picture on; 1 is
            from noise. One value is the first stage's, and the others draw after their small
            picture alone; or one a stage.
        variation: share of fresh noise, 0 to 1, beside the noise that DDIM's inversion finds in
            the picture; for a base model. None: no variation.
        interpolate_to: captions where the frames end, one for all prompts or one each.
        interpolate_seed: seed of the noise where the frames end; None: the noise stays.
        frames: pictures for each prompt, from it to its end; 2 or more, or 0 for no frames.
    """

    init_images: ImageLike | Sequence[ImageLike] = ()
    masks: ImageLike | Sequence[ImageLike] = ()
    strength: PerStage = 1.0
    variation: float | None = None
    interpolate_to: str | Sequence[str] = ()
    interpolate_seed: int | None = None
    frames: int = 0

    def read(self, sizes: Sequence[Size]) -> Given | None:
        """The pictures and masks, for stages of those (H, W); see `read_given`."""
        return read_given(self.init_images, self.masks, sizes)

    def configure(self, cfg: SampleConfig) -> SampleConfig:
        """The flags with these ones, pictures apart."""
        ends = self.interpolate_to
        return replace(
            cfg,
            strength=as_texts(self.strength),
            variation=self.variation,
            interpolate_to=[ends] if isinstance(ends, str) else list(ends),
            interpolate_seed=self.interpolate_seed,
            frames=self.frames,
        )


@dataclass(frozen=True)
class Seeds:
    """Where the noise of pictures comes from.

    Attributes:
        seed: of all pictures, told apart by their numbers.
        each: of single pictures, in order: each is drawn as the first picture of its own seed.
            Empty for none.
    """

    seed: int
    each: tuple[int, ...] = ()

    def of(self, number: int) -> tuple[int, int]:
        """A seed, and the number of a picture with it."""
        return (self.each[number], 0) if self.each else (self.seed, number)


@dataclass(frozen=True, kw_only=True, eq=False)
class Edits:
    """What N pictures start from, keep and go to. Picture i is frame i % frames of its prompt.

    Attributes:
        given: the pictures to edit, repeated in order; None for none.
        ends: captions where frames end, repeated in order; none: the captions stay.
        seed: of the noise where frames end; None: the noise stays.
        frames: pictures of one prompt.
    """

    given: Given | None = None
    ends: Sequence[Prompt] = ()
    seed: int | None = None
    frames: int = 1

    def keys(self, seeds: Seeds, indices: Sequence[int], candidate: int, size: int) -> Tensor:
        """Keys of the noise of a stage of ``size`` pixels, int64 [B]; frames share theirs."""
        named = [seeds.of(index // self.frames) for index in indices]
        return torch.tensor([key_of(*name, candidate, size) for name in named], dtype=torch.int64)

    def share(self, indices: Sequence[int]) -> Tensor:
        """How far along its way each picture lies, float64 [B] in [0, 1]."""
        along = torch.tensor([index % self.frames for index in indices], dtype=torch.float64)
        return along / max(self.frames - 1, 1)

    def entries(self, indices: Sequence[int], count: int) -> list[int]:
        """Which of ``count`` things, one a prompt and repeated in order, each picture has."""
        return [index // self.frames % count for index in indices]

    def end_texts(self, indices: Sequence[int]) -> list[str]:
        """The caption where each picture's frames end; none where captions stay."""
        if not self.ends:
            return []
        return [self.ends[number].text for number in self.entries(indices, len(self.ends))]

    def around(self, texts: Sequence[str], indices: Sequence[int]) -> list[list[str]]:
        """The captions that B pictures lie between: their own, and those where their frames end.

        A frame at either end lies at that one alone. Where captions stay there is one list.
        """
        ends = self.end_texts(indices)
        if not ends:
            return [list(texts)]
        ways = list(zip(texts, ends, self.share(indices).tolist(), strict=True))
        return [
            [here if share < 1 else there for here, there, share in ways],
            [there if share > 0 else here for here, there, share in ways],
        ]

    def of_stage(
        self, stage: Stage, size: Size, indices: Sequence[int], candidate: int
    ) -> StageEdit:
        """What one stage starts from and keeps for the pictures of a batch, of (H, W)."""
        between = self._between(stage, indices, candidate)
        if self.given is None or size > self.given.size:
            return StageEdit(between=between)
        numbers = self.entries(indices, len(self.given))
        picture, drawn = self.given.at(size, numbers, stage.device)
        return StageEdit(picture=picture, drawn=drawn, between=between)

    def _between(self, stage: Stage, indices: Sequence[int], candidate: int) -> Between | None:
        if self.frames == 1:
            return None
        keys = None
        if self.seed is not None:
            keys = self.keys(Seeds(self.seed), indices, candidate, stage.image_size)
            keys = keys.to(stage.device)
        texts = self.end_texts(indices)
        cond = stage.read(texts) if texts and stage.reads_text else None
        return Between(share=self.share(indices), keys=keys, cond=cond)

    def features(
        self,
        encode: Callable[[Sequence[str]], Tensor],
        texts: Sequence[str],
        indices: Sequence[int],
    ) -> Tensor:
        """A CLIP's unit features [B,E] of captions on their way, on a straight line."""
        here, ends = encode(texts), self.end_texts(indices)
        if not ends:
            return here
        share = self.share(indices).to(here.dtype).to(here.device)[:, None]  # [B,1]
        line = F.normalize(torch.lerp(here, encode(ends), share), dim=-1)
        return torch.where(share == 0, here, line)

    def notes(self) -> list[str]:
        """What the user should know."""
        return [] if self.given is None else self.given.notes()

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the run."""
        told: dict[str, Any] = {} if self.given is None else self.given.describe()
        if self.frames > 1:
            told |= {"frames": self.frames, "interpolate_seed": self.seed}
            told |= {"interpolate_to": [end.text for end in self.ends]}
        return told

    def describe_picture(self, index: int) -> dict[str, Any]:
        """What a manifest says of one picture."""
        told: dict[str, Any] = {}
        if self.given is not None:
            (told["init_image"],) = self.entries([index], len(self.given))
        if self.frames > 1:
            told |= {"frame": index % self.frames, "share": float(self.share([index]))}
        return told


NO_EDITS = Edits()


def make_edits(cfg: SampleConfig, given: Given | None, count: Count) -> Edits:
    """What the flags ask to be edited.

    Args:
        cfg: the flags.
        given: the pictures, if any.
        count: of the prompts, before they repeat.
    Raises:
        UsageError: another number of ends than of prompts.
    """
    ends = read_entries("interpolate_to", cfg.interpolate_to, count)
    frames = cfg.frames if cfg.interpolates else 1
    ends = ends[: cfg.num_samples or None]  # the others are of prompts that are not drawn
    return Edits(given=given, ends=ends, seed=cfg.interpolate_seed, frames=frames)


def fit_prompts(
    prompts: Sequence[Prompt], count: Count, given: Given | None
) -> tuple[list[Prompt], Count]:
    """One prompt a picture where several are given: one prompt serves them all.

    Args:
        prompts: those that are read.
        count: of all of them.
        given: the pictures.
    Returns:
        The same of both, or one prompt repeated.
    Raises:
        UsageError: another number of pictures than of prompts, and neither is one.
    """
    pictures = 1 if given is None else given.count
    if pictures == 1:
        return list(prompts), count
    if count.fits(Count.of(pictures)):
        return list(prompts), Count.of(pictures)
    if count != Count.of(1):
        raise UsageError(
            f"--init_images holds {pictures} pictures for {count} prompts: give one each, or "
            "one of either for all"
        )
    return list(prompts) * pictures, Count.of(pictures)


@dataclass(frozen=True, kw_only=True)
class StageEditing:
    """How far one stage leaves its picture; the fields are those of `StageSettings`."""

    strength: float
    variation: float | None


def choose_editing(
    stages: Sequence[Stage], cfg: SampleConfig, sizes: Sequence[Size], edits: Edits
) -> list[StageEditing]:
    """How far each stage leaves its picture.

    Args:
        stages: the cascade.
        cfg: the flags.
        sizes: of the stages' pictures.
        edits: what `make_edits` made of the flags.

    Raises:
        UsageError: a value out of range, or one that contradicts others or that nothing reads.
    """
    values = numbers(cfg.strength, "strength")
    for value in values:
        if not 0 < value <= 1:
            raise UsageError(
                f"--strength is {value:g}: it must lie above 0, and be 1 (from noise) or less"
            )
    later = [1.0] * (len(stages) - 1)
    one = len(values) == 1
    strengths = [*values, *later] if one else per_stage(values, len(stages), "strength")
    if cfg.variation is not None:
        _check_variation(stages[0], cfg, strengths[0])
    _check_given(sizes, cfg, strengths, edits)
    if edits.ends and not any(stage.reads_text or stage.guide for stage in stages):
        raise UsageError(
            "--interpolate_to is read by no model here: none was trained with captions, leave it "
            "out"
        )
    if edits.frames > 1 and cfg.rerank > 1:
        raise UsageError(
            f"--rerank is {cfg.rerank}: frames would come from different candidates, give 1"
        )
    variations = [cfg.variation, *(None for _ in later)]
    return [
        StageEditing(strength=strength, variation=variation)
        for strength, variation in zip(strengths, variations, strict=True)
    ]


def _check_variation(first: Stage, cfg: SampleConfig, strength: float) -> None:
    if first.small_size:
        raise UsageError(
            f"--variation inverts a base model, but {first.path} is an upsampler: put a base "
            "model before it, or use --strength"
        )
    if strength != 1:
        raise UsageError(
            f"--strength is {strength:g} beside --variation, which starts from all of the noise: "
            "give one of them"
        )
    if cfg.ddim_eta:
        raise UsageError(
            f"--ddim_eta is {cfg.ddim_eta:g} beside --variation, which inverts DDIM without "
            "noise: give 0"
        )


def _check_given(
    sizes: Sequence[Size], cfg: SampleConfig, strengths: Sequence[float], edits: Edits
) -> None:
    """Refuse editing without pictures, and pictures that nothing reads."""
    given, started = edits.given, any(strength != 1 for strength in strengths)
    if given is None:
        for flag, asked in (("strength", started), ("variation", cfg.variation is not None)):
            if asked:
                raise UsageError(f"--{flag} starts from a picture: name it with --init_images")
        return
    if given.masks is None and not started and cfg.variation is None:
        raise UsageError(
            "--init_images is read by --masks, --strength below 1 or --variation: give one of them"
        )
    for size, strength in zip(sizes, strengths, strict=True):
        if strength != 1 and size > given.size:
            raise UsageError(
                f"--strength is {strength:g} for the stage of {spell(size)} px, but the smallest "
                f"picture of --init_images holds {spell(given.size)} px: give 1 for that stage"
            )
