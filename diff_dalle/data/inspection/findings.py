"""What an inspection has found, as plain values: the fields of ``inspection.json``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """Some of many.

    Attributes:
        count: how many.
        share: of the whole that the field names, 0 … 1; 0 of nothing.
    """

    count: int
    share: float

    @property
    def percent(self) -> str:
        """The share for people.

        >>> Part(3, 0.375).percent, Part(1, 1e-5).percent
        ('37.5 %', '< 0.1 %')
        """
        return "< 0.1 %" if 0 < self.share < 0.0005 else f"{100 * self.share:.1f} %"


@dataclass(frozen=True)
class Problem(Part):
    """What is wrong with some samples or shards.

    Attributes:
        examples: the first five, ``shard`` and ``key`` each (no key for a whole shard).
    """

    examples: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class ShardFindings:
    """The tar files; shares are of ``count``."""

    count: int
    bytes: int
    faults: dict[str, Problem]  # by `Summary.fault`


@dataclass(frozen=True, kw_only=True)
class SampleFindings:
    """The samples; shares are of ``read``.

    Attributes:
        total: in all shards.
        read: of them in this inspection.
        usable: a run with captions can train on them.
        without_txt: no ``.txt`` member.
        without_json: no ``.json`` member.
        without_caption: no caption in either.
        problems: by the reason of `BadSample`; one sample may have two.
    """

    total: int
    read: int
    usable: Part
    without_txt: Part
    without_json: Part
    without_caption: Part
    problems: dict[str, Problem]


@dataclass(frozen=True, kw_only=True)
class ImageFindings:
    """The image files.

    Attributes:
        opened: files whose header can be read: what the shares of sides, ratios, formats and
            colours are of.
        shorter_side: by pixels.
        aspect_ratio: by form, EXIF orientation applied.
        area_kept: mean share of the picture that the centre square keeps; None of nothing.
        formats: JPEG, PNG or WEBP.
        colours: see `picture.COLOURS`.
        decoded: files whose pixels can be had: what the shares of the small and of borders are of.
        too_small: the shorter side is below ``--image_size``.
        white_border: see `picture.border_of`.
        bars: likewise, not counted if white.
        duplicates: files whose bytes an earlier sample has too; share of those with any bytes.
    """

    opened: int
    shorter_side: dict[str, Part]
    aspect_ratio: dict[str, Part]
    area_kept: float | None
    formats: dict[str, Part]
    colours: dict[str, Part]
    decoded: int
    too_small: Part
    white_border: Part
    bars: Part
    duplicates: Part


@dataclass(frozen=True, kw_only=True)
class CaptionFindings:
    """The captions.

    Attributes:
        tokenizer: its file, or how it was made.
        vocab_size: entries of its vocabulary.
        samples: that have a caption: what the shares of duplicates and ``per_sample`` are of.
        empty: samples whose caption is empty; share of the samples read.
        duplicates: samples whose first caption an earlier one has too, letter for letter.
        per_sample: by how many different captions a sample has.
        total: different captions of each sample, summed: what ``cut`` is a share of.
        lengths: tokens, start and end included, within which 50, 90, 99 and 100 % of the
            captions stay; empty without captions.
        cut: captions that need more than ``--text_length`` tokens.
    """

    tokenizer: str
    vocab_size: int
    samples: int
    empty: Part
    duplicates: Part
    per_sample: dict[str, Part]
    total: int
    lengths: dict[str, int]
    cut: Part


@dataclass(frozen=True, kw_only=True)
class SpeedFindings:
    """What one worker reads and decodes; its inspection costs extra. 0 where nothing was.

    Attributes:
        samples_per_second: of usable images.
        megabytes_per_second: 10⁶ bytes of their members.
        decode_share: of the time, 0 … 1; the rest is reading.
    """

    samples_per_second: float
    megabytes_per_second: float
    decode_share: float


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that an inspection has found.

    Attributes:
        data_dir: what was inspected.
        image_size: pixels of the square that images were judged by.
        text_length: tokens that captions were judged by.
    """

    data_dir: list[str]
    image_size: int
    text_length: int
    shards: ShardFindings
    samples: SampleFindings
    images: ImageFindings
    captions: CaptionFindings
    speed: SpeedFindings

    def as_json(self) -> dict[str, Any]:
        """Nested dictionaries and lists of plain values."""
        return dataclasses.asdict(self)
