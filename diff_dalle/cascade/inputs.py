"""What a run is to draw: a prompt for each picture and, for an upsampler alone, small pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from diff_dalle.cascade.contrast import read_contrast
from diff_dalle.cascade.edits import NO_EDITS, Edits, fit_prompts, make_edits
from diff_dalle.cascade.init_images import Given
from diff_dalle.cascade.result import to_pictures
from diff_dalle.cascade.shard_inputs import open_shards
from diff_dalle.data.batch import BadSample
from diff_dalle.data.images import decode
from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.config import SampleConfig
from diff_dalle.sampling_io.outputs import manifest_beside
from diff_dalle.sampling_io.prompts import (
    Count,
    Prompt,
    read_entries,
    read_prompts,
    repeat_prompts,
)
from diff_dalle.sampling_io.sizes import Size
from diff_dalle.sampling_io.store import Pictures, map_pictures
from diff_dalle.training.stage import shrink

_CHUNK = 16  # pictures shrunk at once: floats take four times the memory


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What the cascade needs, as far as it decides how inputs are read.

    Attributes:
        reads_text: whether captions matter.
        small: (h, w) of what the first stage enlarges; None for a base model.
        size: (H, W) of what the first stage makes.
    """

    reads_text: bool
    small: Size | None
    size: Size


@dataclass(frozen=True, kw_only=True)
class Request:
    """Picture i is to be drawn for ``prompts[i]``.

    Where frames go from a prompt to another, each frame is a picture.

    Attributes:
        prompts: N prompts.
        negative_prompts: N prompts to lead away from, blank for none; or no entry at all.
        contrast: the captions of ``--contrast``, each text once; empty for no set.
        low_res: uint8 [M,h,w,3], or None; `Edits.entries` says which of them each picture has.
        notes: lines to tell the user, such as what was skipped.
        edits: what the pictures start from, keep and go to.
    """

    prompts: list[Prompt]
    negative_prompts: list[Prompt]
    contrast: list[Prompt]
    low_res: Pictures | None
    notes: list[str]
    edits: Edits = NO_EDITS

    @classmethod
    def make(
        cls,
        prompts: Sequence[Prompt],
        negative_prompts: Sequence[Prompt],
        contrast: str,
        low_res: Pictures | None,
        edits: Edits,
        notes: Sequence[str] = (),
    ) -> Request:
        """The request in which each prompt comes as often as it has frames.

        Args:
            prompts: P prompts.
            negative_prompts: one for all, or one a prompt, repeated in order; or no entry at all.
            contrast: what to make the contrast set of, see `read_contrast`.
            low_res: as in `Request`.
            edits: what the pictures start from, keep and go to.
            notes: lines to tell the user.
        Raises:
            UsageError: as `read_contrast`.
        """
        pictures = [prompt for prompt in prompts for _ in range(edits.frames)]
        negative: list[Prompt] = []
        if negative_prompts:
            entries = edits.entries(range(len(pictures)), len(negative_prompts))
            negative = [negative_prompts[entry] for entry in entries]
        return cls(
            prompts=pictures,
            negative_prompts=negative,
            contrast=read_contrast(contrast, pictures, edits),
            low_res=low_res,
            notes=[*notes, *edits.notes()],
            edits=edits,
        )

    @property
    def texts(self) -> list[str]:
        """The text of each prompt."""
        return [prompt.text for prompt in self.prompts]

    @property
    def negative_texts(self) -> list[str]:
        """The text of each negative prompt."""
        return [prompt.text for prompt in self.negative_prompts]

    @property
    def contrast_texts(self) -> list[str]:
        """The captions of the contrast set."""
        return [caption.text for caption in self.contrast]


def read_request(cfg: SampleConfig, reader: Reader, given: Given | None = None) -> Request:
    """Everything that the flags ask to be drawn.

    Of more than ``--num_samples`` prompts, pictures and all that comes with them the first ones
    are taken. Counts must fit each other as if all were read; of shards, which are read no
    further, they must be able to.

    Args:
        cfg: the flags.
        reader: how inputs are read.
        given: the pictures of ``--init_images``.
    Raises:
        UsageError: nothing to draw, unreadable inputs, or another number of prompts than of
            small or given pictures, or of negative prompts or ends than of prompts.
    """
    prompts, count, notes = _read_prompts(cfg)
    small = None if cfg.low_res is None else _read_low_res(cfg, reader)
    if small is not None:
        notes += small.notes
        if prompts and not count.fits(small.count):
            raise UsageError(
                f"--low_res {cfg.low_res} holds {small.count} pictures, but there are {count} "
                "prompts: give one prompt a picture"
            )
        count = count.narrowed(small.count) if prompts else small.count
        prompts = prompts or small.captions
    if not prompts:
        if reader.reads_text:
            raise UsageError("--prompts is missing: type captions in quotes, or give --data_dir")
        count = Count.of(1) if small is None else small.count
        prompts = [Prompt("", "no prompt")] * count.least
    prompts, count = fit_prompts(prompts, count, given)
    edits = make_edits(cfg, given, count)
    negative = read_entries("negative_prompts", cfg.negative_prompts, count)
    low_res = None if small is None else small.pictures[: cfg.num_samples or None]
    prompts = repeat_prompts(prompts, cfg.num_samples)
    _check_seeds(cfg, len(prompts))
    return Request.make(prompts, negative, cfg.contrast, low_res, edits, notes)


def request_texts(
    prompts: str | Sequence[str],
    cfg: SampleConfig,
    low_res: Pictures | None,
    given: Given | None = None,
) -> Request:
    """The same for prompts that a program gives.

    Args:
        prompts: N captions.
        cfg: what is read of it: negative prompts, the contrast set, ends of frames.
        low_res: uint8 [N,h,w,3], or None.
        given: the pictures to edit.
    Raises:
        UsageError: no prompt, or another number of pictures, of negative prompts, ends or seeds.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise UsageError("there is no prompt to draw: give at least one")
    if low_res is not None and len(low_res) != len(texts):
        raise UsageError(
            f"--low_res holds {len(low_res)} pictures for {len(texts)} prompts: give one each"
        )
    named = [Prompt(text, f"prompt {n}") for n, text in enumerate(texts)]
    named, count = fit_prompts(named, Count.of(len(named)), given)
    negative = read_entries("negative_prompts", cfg.negative_prompts, count)
    edits = make_edits(cfg, given, count)
    _check_seeds(cfg, len(named))
    return Request.make(named, negative, cfg.contrast, low_res, edits)


def _check_seeds(cfg: SampleConfig, count: int) -> None:
    if len(cfg.seeds) not in (0, count):
        raise UsageError(
            f"--seeds has {len(cfg.seeds)} entries for {count} "
            f"{'picture' if count == 1 else 'pictures'}: give one each, or --seed for all"
        )


def check_small_pictures(low_res: Pictures, small: Size, path: str) -> None:
    """Raise a `UsageError` unless ``low_res`` is uint8 [N,h,w,3] of that size, or of its multiple.

    Args:
        low_res: the pictures to enlarge.
        small: (h, w) in pixels of what the first stage enlarges; larger pictures of that shape,
            by whatever factor, will do.
        path: the first stage's file.
    """
    h, w = small
    pictures = low_res.ndim == 4 and low_res.shape[3] == 3 and low_res.dtype == np.uint8
    shaped = pictures and low_res.shape[1] * w == low_res.shape[2] * h and low_res.shape[1] >= h
    if not shaped:
        raise UsageError(
            f"--low_res holds {low_res.dtype} {low_res.shape}, but {path} enlarges uint8 pictures "
            f"(N, {h}, {w}, 3): give such or larger ones of that shape, or another --size"
        )


def shrunk_to(low_res: Pictures, small: Size, device: torch.device) -> Pictures:
    """What an upsampler enlarges of uint8 [N,H,W,3]: larger pictures are shrunk as in training.

    Args:
        low_res: N ≥ 1 pictures, as `check_small_pictures` passes them.
        small: (h, w) in pixels.
        device: where that is computed.
    """
    chunks = [low_res[start : start + _CHUNK] for start in range(0, len(low_res), _CHUNK)]
    images = (torch.from_numpy(chunk).to(device).permute(0, 3, 1, 2) for chunk in chunks)
    return np.concatenate([to_pictures(shrink(chunk, small)) for chunk in images])


def _read_prompts(cfg: SampleConfig) -> tuple[list[Prompt], Count, list[str]]:
    """The prompts, how many there are with those that are not read, and notes."""
    unread, notes = 0, []

    def shard_prompts(path: str) -> list[Prompt]:
        """The first caption of every sample that has one, as far as they are to be drawn."""
        nonlocal unread
        dataset = open_shards(path, "data_dir", with_text=True)
        captions = islice(dataset.first_captions(), cfg.num_samples or None)
        found = [Prompt(text, f"{path} sample {key}") for key, text in captions]
        left = len(dataset) - len(found)
        if cfg.num_samples and len(found) == cfg.num_samples:
            unread += left
        elif left:
            notes.append(f"--data_dir {path}: skipped {left} samples without a usable caption")
        return found

    prompts = read_prompts(cfg.prompts, cfg.data_dir, shard_prompts)
    return prompts, Count(len(prompts), len(prompts) + unread), notes


@dataclass(frozen=True, kw_only=True)
class _Small:
    """What ``--low_res`` holds.

    Attributes:
        pictures: uint8 [M,h,w,3], those that are read.
        captions: M prompts, or none.
        count: of all pictures.
        notes: lines to tell the user.
    """

    pictures: Pictures
    captions: list[Prompt]
    count: Count
    notes: Sequence[str] = ()


def _read_low_res(cfg: SampleConfig, reader: Reader) -> _Small:
    assert cfg.low_res is not None
    if Path(cfg.low_res).is_file() and not cfg.low_res.endswith(".tar"):
        try:
            pictures = map_pictures(cfg.low_res)
        except (OSError, ValueError) as problem:
            raise UsageError(
                f"--low_res {cfg.low_res} is no npz of pictures ({problem}): give what sample.py "
                "wrote, or shards"
            ) from problem
        if not len(pictures):
            raise UsageError(f"--low_res {cfg.low_res} holds no picture: give one or more")
        captions = _captions_beside(Path(cfg.low_res), len(pictures))
        return _Small(pictures=pictures, captions=captions, count=Count.of(len(pictures)))
    return _shard_pictures(cfg.low_res, reader, cfg.num_samples)


def _captions_beside(npz: Path, count: int) -> list[Prompt]:
    """The captions that sampling wrote beside an npz file, if they are there and fit."""
    manifest = manifest_beside(npz)
    path = npz.with_suffix(".txt")
    if manifest is not None:  # as they were typed: a line of the .txt may hold escapes
        texts = [image["prompt"] for image in manifest["images"]]
    elif path.is_file():
        try:
            texts = path.read_text(encoding="utf-8").split("\n")[:-1]
        except UnicodeDecodeError as problem:
            raise UsageError(f"{path} is no UTF-8: give the captions with --data_dir") from problem
    else:
        return []
    if len(texts) != count:
        return []
    return [Prompt(text, f"{npz} picture {n}") for n, text in enumerate(texts)]


def _shard_pictures(path: str, reader: Reader, limit: int) -> _Small:
    """The first ``limit`` usable samples (0: all), scaled down as in training."""
    dataset = open_shards(path, "low_res", with_text=reader.reads_text)
    pictures: list[Pictures] = []
    prompts: list[Prompt] = []
    bad: Counter[str] = Counter()
    for sample in range(len(dataset)):
        if limit and len(pictures) == limit:
            break
        try:
            raw = dataset.read(sample)
            text = dataset.captions_of(raw).first if reader.reads_text else ""
            pictures.append(_small_picture(raw.image, reader))
        except BadSample as problem:
            bad[str(problem)] += 1
            continue
        prompts.append(Prompt(text, f"{path} sample {dataset.entry(sample)[1].key}"))
    if not pictures:
        raise UsageError(f"--low_res {path} holds no usable picture: {dict(bad)}")
    notes = [
        f"--low_res {path}: skipped {count} samples ({reason})" for reason, count in bad.items()
    ]
    return _Small(
        pictures=np.stack(pictures),
        captions=prompts if reader.reads_text else [],
        count=Count(len(pictures), len(dataset) - bad.total()),
        notes=notes,
    )


def _small_picture(data: bytes, reader: Reader) -> Pictures:
    """Uint8 [h,w,3]: decoded at the stage's size and averaged down, as its training saw it."""
    assert reader.small is not None
    try:
        picture = torch.from_numpy(decode(data, reader.size))  # [3,H,W]
    except BadSample as problem:
        if str(problem) != "too small":
            raise
        return decode(data, reader.small).transpose(1, 2, 0)
    return to_pictures(shrink(picture[None], reader.small))[0]
