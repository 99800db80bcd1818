"""Grids of samples at fixed noise, from the weights as they are and from their averages.

A row is one set of weights, a column one caption; the captions stand in a text beside the
picture. The ranks share the columns.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diff_dalle.data.batch import Batch
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.distributed import World, all_gather_objects
from diff_dalle.errors import UsageError
from diff_dalle.keyed_noise import key_of
from diff_dalle.knobs import AUTO, AutoInt, knob, require
from diff_dalle.training.ema import EMA
from diff_dalle.training.files import write_whole
from diff_dalle.training.tasks import Task


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """What the preview grids of a run show, and when they are made."""

    sample_interval: int = knob(0, "steps between two preview grids; 0: with each checkpoint")
    num_preview: AutoInt = knob(
        AUTO, "samples of a preview grid; auto: as many as fill 2048 pixels, at most 8; 0: none"
    )
    validation_prompts: str | None = knob(
        None, "file of prompts to preview, one a line; an upsampler takes captions of the data"
    )

    def __post_init__(self) -> None:
        steps, number = self.sample_interval, self.num_preview
        require(steps >= 0, "sample_interval", steps, "be 0 or more")
        require(number == AUTO or int(number) >= 0, "num_preview", number, "be 0 or more")

    def resolved_num_preview(self, image_size: int) -> int:
        """How many samples a preview grid shows."""
        if self.num_preview != AUTO:
            return int(self.num_preview)
        return max(1, min(8, 2048 // image_size))


@dataclass(frozen=True, kw_only=True)
class Previews:
    """This rank's columns of the preview grids of a run.

    Attributes:
        task: what samples.
        interval: steps between two grids.
        batch: captions and pictures of this rank's n samples, on the device; n may be 0.
        keys: int64 [n], keys of their noise.
        captions: n texts.
    """

    task: Task
    interval: int
    batch: Batch
    keys: Tensor
    captions: list[str]

    def write(self, step: int, ema: EMA, folder: Path, world: World) -> np.ndarray | None:
        """Write ``samples_{step}.png`` and its ``.txt`` (a collective).

        Returns:
            The grid, uint8 [H,W,3], on rank 0; None on the others and where there is none.
        """
        rows = self._rows(ema) if len(self.batch) else {}
        everyone = all_gather_objects((rows, self.captions), world)
        parts = [part for part, _ in everyone if part]
        if not (world.is_main and parts):
            return None
        pictures = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        grid = np.concatenate([np.concatenate(list(row), axis=1) for row in pictures.values()])
        name = f"samples_{step:06d}"
        picture = io.BytesIO()
        Image.fromarray(grid).save(picture, "PNG")
        write_whole(folder / f"{name}.png", picture.getvalue())
        captions = [caption for _, part in everyone for caption in part]
        lines = [f"rows: {', '.join(pictures)}"]
        lines += [f"column {i}: {caption}" for i, caption in enumerate(captions, 1)]
        text = "\n".join(lines) + "\n"
        write_whole(folder / f"{name}.txt", text.encode("utf-8", "surrogatepass"))
        return grid

    def _rows(self, ema: EMA) -> dict[str, np.ndarray]:
        """This rank's pictures, uint8 [n,H,W,3] a row."""
        rows = self.task.preview(self.batch, self.keys, "model")
        for name, rate in zip(ema.names, ema.rates, strict=True):
            with ema.applied(rate):
                rows |= self.task.preview(self.batch, self.keys, f"ema_{name}")
        return {name: _hwc(pictures) for name, pictures in rows.items()}


def plan_previews(
    task: Task,
    batch: Batch,
    *,
    interval: int,
    number: int,
    prompts: list[str],
    tokenizer: Tokenizer | None,
    seed: int,
    world: World,
) -> Previews:
    """Choose what to preview, the same at every step.

    Args:
        task: what samples.
        batch: this rank's part of a batch of data: captions and pictures to choose from.
        interval: steps between two grids.
        number: samples of all ranks together, rounded up to equal shares of the ranks.
        prompts: captions in place of the data's, where captions alone decide; may be empty.
        tokenizer: None for a run without captions.
        seed: of the noise.
        world: the ranks.
    """
    share = -(-number // world.size)
    first = world.rank * share
    if prompts and tokenizer is not None and batch.tokens is not None:
        captions = prompts[first : first + share]
        tokens, mask = tokenizer.encode(captions, batch.tokens.shape[1])
        chosen = _select(batch, torch.arange(len(captions)) % len(batch))
        chosen = replace(chosen, tokens=tokens, mask=mask)
    else:
        chosen = _select(batch, batch.valid.nonzero()[:share, 0])
        captions = _captions(chosen, tokenizer)
    keys = [key_of(seed, "preview", first + i) for i in range(len(captions))]
    return Previews(
        task=task,
        interval=interval,
        batch=chosen.to(world.device),
        keys=torch.tensor(keys, dtype=torch.int64, device=world.device),
        captions=captions,
    )


def read_prompts(path: str) -> list[str]:
    """The lines of a file that are not blank.

    Raises:
        UsageError: there is no such file, or no such line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as problem:
        raise UsageError(
            f"--validation_prompts {path} cannot be read: {problem.strerror}"
        ) from problem
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UsageError(f"--validation_prompts {path} holds no prompt: write one a line")
    return prompts


def _select(batch: Batch, index: Tensor) -> Batch:
    """The samples at ``index``, int64 [n]."""
    return replace(
        batch,
        image=batch.image[index],
        tokens=None if batch.tokens is None else batch.tokens[index],
        mask=None if batch.mask is None else batch.mask[index],
        valid=batch.valid[index],
        seed=batch.seed[index],
        keys=[batch.keys[i] for i in index.tolist()],
    )


def _captions(batch: Batch, tokenizer: Tokenizer | None) -> list[str]:
    """The captions as the model reads them, cut ones included; keys where there are none."""
    if batch.tokens is None or tokenizer is None:
        return list(batch.keys)
    return [tokenizer.decode(row) for row in batch.tokens]


def _hwc(pictures: Tensor) -> np.ndarray:
    """uint8 [n,3,H,W] -> [n,H,W,3] on the CPU."""
    return pictures.permute(0, 2, 3, 1).cpu().numpy()
