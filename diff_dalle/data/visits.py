"""From positions in an order to the arrays of a batch: read, decode, vary, tokenise.

Runs inside the worker processes. What a visit draws (caption, flip, crop) is a function of
(run seed, epoch, shard, key), so it is the same in any batch, worker and rank.

Notation: B batch, S pixels, L tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diff_dalle.data.batch import BadSample, Batch
from diff_dalle.data.caption_fields import Captions
from diff_dalle.data.dataset import Dataset
from diff_dalle.data.images import Crop
from diff_dalle.data.order import Need, Slot
from diff_dalle.keyed_noise import key_of, uniform

# Training draws its noise from the same seeds, with streams that count from 0.
_STREAM = 1_000_000
_CAPTION, _FLIP, _CROP, _TOP, _LEFT, _DRAWS = range(6)


class CaptionEncoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids, int64 [B,L], and the mask of real tokens, bool [B,L]."""


class VisitOrder(Protocol):
    """What is visited at each position; None is padding."""

    def slot(self, position: int) -> Slot | None:
        """The sample and epoch at a position ≥ 0."""


class BlockOrder(Protocol):
    """An order that stays within some shards for a while."""

    def block(self, position: int) -> Hashable:
        """Another one as soon as other shards are read."""

    def needs(self, position: int) -> list[Need]:
        """The shards of a position's block from there on, and of the next, soonest first."""


class Arrays(NamedTuple):
    """A `Batch` as numpy arrays, which travel between processes without shared memory.

    Containers often grant 64 MB of shared memory, less than a few batches at 1024 pixels.
    """

    image: NDArray[np.uint8]
    tokens: NDArray[np.int64] | None
    mask: NDArray[np.bool_] | None
    valid: NDArray[np.bool_]
    seed: NDArray[np.int64]
    keys: list[str]
    bad: list[tuple[str, str, str]]

    def to_batch(self) -> Batch:
        """The same memory as tensors."""
        return Batch(
            image=torch.from_numpy(self.image),
            tokens=None if self.tokens is None else torch.from_numpy(self.tokens),
            mask=None if self.mask is None else torch.from_numpy(self.mask),
            valid=torch.from_numpy(self.valid),
            seed=torch.from_numpy(self.seed),
            keys=self.keys,
            bad=self.bad,
        )


class Visits(torch.utils.data.Dataset[Arrays]):
    """The map-style dataset that a `torch.utils.data.DataLoader` asks for whole batches."""

    def __init__(
        self,
        dataset: Dataset,
        order: VisitOrder,
        *,
        tokenizer: CaptionEncoder | None,
        text_length: int,
        training: bool,
        blocks: BlockOrder | None = None,
    ) -> None:
        """Visits of a dataset in an order.

        Args:
            dataset: where the samples come from.
            order: what is visited at each position.
            tokenizer: None for a run without text.
            text_length: L.
            training: vary each visit as ``dataset.cfg`` asks and draw one of the captions;
                else the centre square and the first caption.
            blocks: by which remote shards are fetched ahead; None fetches them at their first use.
        """
        self._dataset = dataset
        self._order = order
        self._tokenizer = tokenizer
        self._text_length = text_length
        self._training = training
        self._blocks = blocks
        self._block: Hashable = None

    def __getitems__(self, positions: Sequence[int]) -> Arrays:
        """The batch at some positions; broken samples keep their rows."""
        size, count = self._dataset.image_size, len(positions)
        slots = [self._order.slot(position) for position in positions]
        self._look_ahead(positions)
        named = [self._name(slot) for slot in slots]
        keys = [key for key, _, _ in named]
        seed = np.array([seed for _, seed, _ in named], dtype=np.int64)
        draws = uniform(torch.from_numpy(seed), (_DRAWS,), _STREAM).tolist()  # [B][_DRAWS]
        image = np.zeros((count, 3, size, size), dtype=np.uint8)
        valid = np.zeros(count, dtype=np.bool_)
        captions, bad = [""] * count, []
        for row, (slot, (key, _, reason)) in enumerate(zip(slots, named, strict=True)):
            if slot is None:
                continue
            try:
                if reason is not None:
                    raise reason
                captions[row] = self._visit(slot.sample, draws[row], image[row])
                valid[row] = True
            except BadSample as problem:
                bad.append((self._dataset.shard_of(slot.sample).path, key, str(problem)))
        tokens, mask = self._tokenise(captions)
        return Arrays(image, tokens, mask, valid, seed, keys, bad)

    def _look_ahead(self, positions: Sequence[int]) -> None:
        """Have the shards fetched that are read from now on, where a new block begins."""
        if self._blocks is None:
            return
        block = self._blocks.block(positions[-1])
        if block != self._block:
            self._block = block
            begin = next(p for p in positions if self._blocks.block(p) == block)
            self._dataset.expect(self._blocks.needs(begin))

    def _name(self, slot: Slot | None) -> tuple[str, int, BadSample | None]:
        """Key and seed of a visit, or why they are not known; "" and 0 then and for padding."""
        if slot is None:
            return "", 0, None
        try:
            shard, entry = self._dataset.entry(slot.sample)
        except BadSample as reason:
            return "", 0, reason
        # The shard's name counts: many writers number the samples of every shard from 0.
        return entry.key, key_of(self._dataset.seed, slot.epoch, shard.name, entry.key), None

    def _visit(self, sample: int, draws: list[float], image: NDArray[np.uint8]) -> str:
        """Fill in the image [3,S,S] and return the caption, "" without text."""
        cfg = self._dataset.cfg
        crop = Crop(draws[_CROP], draws[_TOP], draws[_LEFT])
        image[:], captions = self._dataset.visit(
            sample,
            with_text=self._tokenizer is not None,
            crop=crop if self._training and cfg.random_crop else None,
            flip=self._training and cfg.random_flip and draws[_FLIP] < 0.5,
        )
        if captions is None:
            return ""
        if not self._training:
            return captions.first
        return _drawn(captions, draws[_CAPTION], cfg.first_caption_prob)

    def _tokenise(
        self, captions: list[str]
    ) -> tuple[NDArray[np.int64] | None, NDArray[np.bool_] | None]:
        if self._tokenizer is None:
            return None, None
        tokens, mask = self._tokenizer.encode(captions, self._text_length)
        return tokens.numpy(), mask.numpy()


def _drawn(captions: Captions, u: float, first: float) -> str:
    """The first caption for a share ``first`` of the draws ``u`` in (0, 1), else any of them."""
    if u < first:
        return captions.first
    among = captions.choices
    return among[int((u - first) / (1 - first) * len(among))]
