"""One sample of a dataset: what a run would make of it, seen in worker processes.

Notation: S pixels, the side of the squares of a run.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from diff_dalle.data.batch import BadSample
from diff_dalle.data.dataset import Dataset, Raw
from diff_dalle.data.images import Pixels, decode
from diff_dalle.data.inspection.picture import Header, border_of, read_header
from diff_dalle.data.order import Integers
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.data.workers import load

TILE = 128  # pixels of a picture that is shown
_CHUNK = 64  # samples that a worker is given at a time


class Cost(NamedTuple):
    """What it took to read and decode one sample, as a run does."""

    size: int  # bytes of its members
    read: float  # seconds
    decode: float  # seconds


class Shown(NamedTuple):
    """A sample for the contact sheet: uint8 [3,T,T] with T ≤ `TILE`, and its first caption."""

    pixels: Pixels
    caption: str


class Sight(NamedTuple):
    """What is known of one sample after a look; small, since it travels between processes.

    Attributes:
        shard: path of the shard, bytes that are not UTF-8 escaped.
        key: name of the sample; "" where its shard's index cannot be read.
        problems: the reasons of `BadSample` for which a run with captions would leave it out.
        has_text: it has a ``.txt`` member.
        has_json: it has a ``.json`` member.
        header: None without an image that can be opened.
        image_digest: 64-bit hash of the image's bytes; None if there are none.
        decoded: the image could be decoded, at a smaller size than S if it is smaller.
        border: see `picture.border_of`; "" too where it was not decoded.
        caption_digest: 64-bit hash of the first caption; None without one.
        lengths: tokens of each different caption, start and end included.
        cost: None where the image could not be decoded at S.
        shown: None for samples that are not on the contact sheet.
    """

    shard: str
    key: str
    problems: tuple[str, ...]
    has_text: bool
    has_json: bool
    header: Header | None = None
    image_digest: int | None = None
    decoded: bool = False
    border: str = ""
    caption_digest: int | None = None
    lengths: tuple[int, ...] = ()
    cost: Cost | None = None
    shown: Shown | None = None


def look_at(
    dataset: Dataset,
    samples: Integers,
    *,
    image_size: int,
    tokenizer: Tokenizer,
    shown: frozenset[int],
    num_workers: int,
) -> Iterator[Sight]:
    """Look at some samples, in the order given.

    Args:
        dataset: where they are.
        samples: their numbers, int64 [N].
        image_size: S.
        tokenizer: measures the captions.
        shown: numbers of the samples whose pictures are wanted.
        num_workers: processes that look; 0: in this one.
    """
    looks = _Looks(dataset, tokenizer, image_size, shown)
    starts = range(0, len(samples), _CHUNK)
    chunks = [samples[start : start + _CHUNK].tolist() for start in starts]
    for sights in load(looks, chunks, num_workers):
        yield from sights


def digest(data: bytes) -> int:
    """A 64-bit hash, the same everywhere: 10⁸ different texts share one with odds of 1 : 3700."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class _Looks(torch.utils.data.Dataset[list[Sight]]):
    """The map-style dataset that a `DataLoader` asks for whole chunks."""

    def __init__(
        self, dataset: Dataset, tokenizer: Tokenizer, image_size: int, shown: frozenset[int]
    ) -> None:
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._image_size = image_size
        self._shown = shown

    def __getitems__(self, samples: Sequence[int]) -> list[Sight]:
        return [self._look(int(sample)) for sample in samples]

    def _look(self, sample: int) -> Sight:
        path = self._dataset.shard_of(sample).path
        sight = Sight(os.fsencode(path).decode(errors="backslashreplace"), "", (), False, False)
        started = time.perf_counter()
        try:
            _, entry = self._dataset.entry(sample)
            has_text, has_json = entry.text is not None, entry.json is not None
            sight = sight._replace(key=entry.key, has_text=has_text, has_json=has_json)
            raw = self._dataset.read(sample)
        except BadSample as reason:
            return sight._replace(problems=(str(reason),))
        seconds = time.perf_counter() - started
        sight, caption = self._with_captions(sight, raw)
        sight = self._with_image(sight, raw, seconds)
        if sight.decoded and sample in self._shown:
            assert sight.header is not None
            tile = decode(raw.image, min(TILE, sight.header.shorter))
            sight = sight._replace(shown=Shown(tile, caption))
        return sight

    def _with_captions(self, sight: Sight, raw: Raw) -> tuple[Sight, str]:
        """The sight with its captions, and the first of them."""
        try:
            captions = self._dataset.captions_of(raw)
        except BadSample as reason:
            return _with_problem(sight, reason), ""
        different = list(dict.fromkeys([captions.first, *captions.choices]))
        sight = sight._replace(
            # JSON may hold lone surrogates.
            caption_digest=digest(captions.first.encode("utf-8", "surrogatepass")),
            lengths=tuple(self._tokenizer.lengths(different)),
        )
        return sight, captions.first

    def _with_image(self, sight: Sight, raw: Raw, read_seconds: float) -> Sight:
        header = read_header(raw.image)
        if raw.image:
            sight = sight._replace(header=header, image_digest=digest(raw.image))
        # A small picture may be broken as well: it is decoded at the size that it has.
        size = self._image_size if header is None else min(self._image_size, header.shorter)
        started = time.perf_counter()
        try:
            pixels = decode(raw.image, size)
        except BadSample as reason:
            return _with_problem(sight, reason)
        seconds = time.perf_counter() - started
        sight = sight._replace(decoded=True, border=border_of(pixels))
        if size < self._image_size:
            return _with_problem(sight, BadSample("too small"))
        members = sum(len(member) for member in raw if member is not None)
        return sight._replace(cost=Cost(members, read_seconds, seconds))


def _with_problem(sight: Sight, reason: BadSample) -> Sight:
    return sight._replace(problems=(*sight.problems, str(reason)))
