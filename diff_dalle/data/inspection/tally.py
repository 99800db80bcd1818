"""Counts over all samples of an inspection; 16 bytes a sample are kept, for the duplicates."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable

import numpy as np

from diff_dalle.data.dataset import Dataset
from diff_dalle.data.inspection.findings import (
    CaptionFindings,
    ImageFindings,
    Part,
    Problem,
    SampleFindings,
    ShardFindings,
    SpeedFindings,
)
from diff_dalle.data.inspection.look import Sight
from diff_dalle.data.inspection.picture import BARS, WHITE, Header

SIDES = ("< 64", "64-255", "256-511", "512-1023", ">= 1024")
RATIOS = (
    "portrait, over 1:2",
    "portrait, 3:4 to 1:2",
    "up to 4:3",
    "landscape, 4:3 to 2:1",
    "landscape, over 2:1",
)
CAPTION_COUNTS = ("1", "2-5", "6-10", "> 10")
PERCENTILES = (50, 90, 99, 100)
NO_CAPTION, EMPTY_CAPTION, TOO_SMALL = "no caption", "empty caption", "too small"

_SIDE_EDGES = (64, 256, 512, 1024)
_COUNT_EDGES = (2, 6, 11)
_EXAMPLES = 5


class Tally:
    """Takes sights one by one and says at the end what they amount to."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._problems = _Problems()
        self._sides: Counter[str] = Counter()
        self._ratios: Counter[str] = Counter()
        self._formats: Counter[str] = Counter()
        self._colours: Counter[str] = Counter()
        self._borders: Counter[str] = Counter()
        self._per_sample: Counter[str] = Counter()
        self._lengths: Counter[int] = Counter()
        self._images = array("Q")
        self._captions = array("Q")
        self._area_kept = 0.0
        self._bytes = 0
        self._read_seconds = 0.0
        self._decode_seconds = 0.0

    def add(self, sight: Sight) -> None:
        """Count one more sample."""
        self._seen["read"] += 1
        self._seen["usable"] += not sight.problems
        self._seen["txt"] += sight.has_text
        self._seen["json"] += sight.has_json
        for reason in sight.problems:
            self._problems.add(reason, sight.shard, sight.key)
        if sight.header is not None:
            self._add_header(sight.header)
        if sight.image_digest is not None:
            self._images.append(sight.image_digest)
        if sight.decoded:
            self._seen["decoded"] += 1
            self._borders[sight.border] += 1
        if sight.caption_digest is not None:
            self._captions.append(sight.caption_digest)
            self._lengths.update(sight.lengths)
            self._per_sample[CAPTION_COUNTS[bisect_right(_COUNT_EDGES, len(sight.lengths))]] += 1
        if sight.cost is not None:
            self._seen["timed"] += 1
            self._bytes += sight.cost.size
            self._read_seconds += sight.cost.read
            self._decode_seconds += sight.cost.decode

    def samples(self, total: int) -> SampleFindings:
        """What was found of ``total`` samples, of which some were read."""
        read = self._seen["read"]
        return SampleFindings(
            total=total,
            read=read,
            usable=_part(self._seen["usable"], read),
            without_txt=_part(read - self._seen["txt"], read),
            without_json=_part(read - self._seen["json"], read),
            without_caption=_part(self._problems.count(NO_CAPTION), read),
            problems=self._problems.found(read),
        )

    def images(self) -> ImageFindings:
        """What was found of the images."""
        opened, decoded = self._sides.total(), self._seen["decoded"]
        return ImageFindings(
            opened=opened,
            shorter_side=_parts(self._sides, SIDES),
            aspect_ratio=_parts(self._ratios, RATIOS),
            area_kept=self._area_kept / opened if opened else None,
            formats=_parts(self._formats),
            colours=_parts(self._colours),
            decoded=decoded,
            too_small=_part(self._problems.count(TOO_SMALL), decoded),
            white_border=_part(self._borders[WHITE], decoded),
            bars=_part(self._borders[BARS], decoded),
            duplicates=_repeated(self._images),
        )

    def captions(self, text_length: int, vocab_size: int, tokenizer: str) -> CaptionFindings:
        """What was found of the captions, measured by a tokenizer."""
        total = self._lengths.total()
        cut = sum(n for length, n in self._lengths.items() if length > text_length)
        return CaptionFindings(
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            samples=len(self._captions),
            empty=_part(self._problems.count(EMPTY_CAPTION), self._seen["read"]),
            duplicates=_repeated(self._captions),
            per_sample=_parts(self._per_sample, CAPTION_COUNTS),
            total=total,
            lengths=percentiles(self._lengths),
            cut=_part(cut, total),
        )

    def speed(self) -> SpeedFindings:
        """How fast one worker could read and decode."""
        seconds = self._read_seconds + self._decode_seconds
        if not seconds:
            return SpeedFindings(samples_per_second=0, megabytes_per_second=0, decode_share=0)
        return SpeedFindings(
            samples_per_second=self._seen["timed"] / seconds,
            megabytes_per_second=self._bytes / seconds / 1e6,
            decode_share=self._decode_seconds / seconds,
        )

    def _add_header(self, header: Header) -> None:
        self._sides[SIDES[bisect_right(_SIDE_EDGES, header.shorter)]] += 1
        self._ratios[ratio_of(header.width, header.height)] += 1
        self._formats[header.kind] += 1
        self._colours[header.colour] += 1
        self._area_kept += header.shorter / max(header.width, header.height)


def shard_findings(dataset: Dataset) -> ShardFindings:
    """What the indices say of the shards of a dataset."""
    problems = _Problems()
    for path, _, fault in dataset.bad:
        problems.add(fault, os.fsencode(path).decode(errors="backslashreplace"))
    return ShardFindings(
        count=len(dataset.shards),
        bytes=sum(shard.summary.size for shard in dataset.shards),
        faults=problems.found(len(dataset.shards)),
    )


def ratio_of(width: int, height: int) -> str:
    """One of `RATIOS`; a picture of exactly 4:3 or 2:1 belongs to the squarer kind.

    >>> ratio_of(400, 300), ratio_of(300, 601)
    ('up to 4:3', 'portrait, over 1:2')
    """
    shorter, longer = sorted((width, height))
    away = (3 * longer > 4 * shorter) + (longer > 2 * shorter)
    return RATIOS[2 + away if width > height else 2 - away]


def percentiles(lengths: Counter[int]) -> dict[str, int]:
    """The least length within which so many per cent stay, for each of `PERCENTILES`.

    >>> percentiles(Counter({4: 90, 7: 9, 100: 1}))
    {'50': 4, '90': 4, '99': 7, '100': 100}
    """
    found: dict[str, int] = {}
    total, within = lengths.total(), 0
    for length, count in sorted(lengths.items()):
        within += count
        for percent in PERCENTILES:
            if 100 * within >= percent * total:
                found.setdefault(str(percent), length)
    return found


class _Problems:
    """Reasons, how often each was met, and where first."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[dict[str, str]]] = {}

    def add(self, reason: str, shard: str, key: str | None = None) -> None:
        self._counts[reason] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append({"shard": shard} if key is None else {"shard": shard, "key": key})

    def count(self, reason: str) -> int:
        return self._counts[reason]

    def found(self, total: int) -> dict[str, Problem]:
        """The most frequent first."""
        return {
            reason: Problem(count, count / total, self._examples[reason])
            for reason, count in self._counts.most_common()
        }


def _part(count: int, total: int) -> Part:
    return Part(count, count / total if total else 0.0)


def _parts(counts: Counter[str], names: Iterable[str] | None = None) -> dict[str, Part]:
    """Each of some names, or the names that were met, the most frequent first."""
    total = counts.total()
    if names is None:
        names = [name for name, _ in counts.most_common()]
    return {name: _part(counts[name], total) for name in names}


def _repeated(digests: array[int]) -> Part:
    different = len(np.unique(np.frombuffer(digests, dtype=np.uint64))) if digests else 0
    return _part(len(digests) - different, len(digests))
