"""Findings as aligned plain text for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from diff_dalle.data.inspection.findings import Findings, Part, Problem


class Row(NamedTuple):
    """One line of the table; texts that are empty leave their column blank."""

    label: str = ""
    number: str = ""
    share: str = ""
    note: str = ""


def table(findings: Findings, advice: Sequence[str]) -> str:
    """All findings, then what to do about them, without colours or trailing blanks."""
    rows = [
        *_shard_rows(findings),
        *_sample_rows(findings),
        *_image_rows(findings),
        *_caption_rows(findings),
        *_speed_rows(findings),
    ]
    wide, right, shares = (max(len(row[column]) for row in rows) for column in range(3))
    lines = [
        f"{row.label:<{wide}}  {row.number:>{right}}  {row.share:>{shares}}  {row.note}".rstrip()
        for row in rows
    ]
    to_do = [f"- {line}" for line in advice] or ["- nothing"]
    return "\n".join([*lines, "", "to do", *to_do])


def _shard_rows(findings: Findings) -> Iterator[Row]:
    shards = findings.shards
    yield Row("shards", f"{shards.count:,}", note=f"{shards.bytes / 1e6:,.1f} MB")
    yield from _problem_rows(shards.faults)


def _sample_rows(findings: Findings) -> Iterator[Row]:
    samples = findings.samples
    yield Row()
    yield Row("samples", f"{samples.total:,}")
    yield _row("read", Part(samples.read, samples.read / samples.total))
    yield _row("usable", samples.usable)
    yield _row("without .txt", samples.without_txt)
    yield _row("without .json", samples.without_json)
    yield _row("without a caption", samples.without_caption)
    yield Row("problems", note="" if samples.problems else "none")
    yield from _problem_rows(samples.problems)


def _image_rows(findings: Findings) -> Iterator[Row]:
    images = findings.images
    yield Row()
    yield Row("images", f"{images.opened:,}", note="whose header can be read")
    yield _row("copies of an earlier one", images.duplicates)
    yield Row("shorter side in pixels")
    yield from _rows(images.shorter_side)
    yield _row(f"smaller than {findings.image_size}", images.too_small)
    kept = "" if images.area_kept is None else f"the square keeps {100 * images.area_kept:.1f} %"
    yield Row("width to height", note=kept)
    yield from _rows(images.aspect_ratio)
    yield Row("format")
    yield from _rows(images.formats)
    yield Row("colour")
    yield from _rows(images.colours)
    yield Row("border of the square")
    yield _row("white on all sides", images.white_border)
    yield _row("one colour on two sides", images.bars)


def _caption_rows(findings: Findings) -> Iterator[Row]:
    captions = findings.captions
    yield Row()
    note = f"tokenizer: {captions.tokenizer}, {captions.vocab_size:,} tokens"
    yield Row("captions", f"{captions.total:,}", note=note)
    yield _row("empty", captions.empty)
    yield _row("first ones that repeat", captions.duplicates)
    yield Row("captions of a sample")
    yield from _rows(captions.per_sample)
    yield Row("length in tokens")
    for percent, length in captions.lengths.items():
        yield Row(f"  {percent} % within", f"{length:,}")
    yield _row(f"cut at {findings.text_length}", captions.cut)


def _speed_rows(findings: Findings) -> Iterator[Row]:
    speed = findings.speed
    yield Row()
    yield Row("speed of one worker", note=f"{100 * speed.decode_share:.0f} % of it decoding")
    yield Row("  samples/s", f"{speed.samples_per_second:,.0f}")
    yield Row("  MB/s", f"{speed.megabytes_per_second:,.1f}")


def _problem_rows(problems: Mapping[str, Problem]) -> Iterator[Row]:
    for reason, problem in problems.items():
        places = [" ".join(example.values()) for example in problem.examples]
        yield _row(reason, problem)._replace(note=places[0])
        yield from (Row(note=place) for place in places[1:])


def _rows(parts: Mapping[str, Part]) -> Iterator[Row]:
    return (_row(name, part) for name, part in parts.items())


def _row(label: str, part: Part) -> Row:
    return Row(f"  {label}", f"{part.count:,}", part.percent)
