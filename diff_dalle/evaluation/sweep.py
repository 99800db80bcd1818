"""What a noised CLIP's guidance does to alignment: several strengths, the same captions and seeds.

Every strength draws from the same noise, so differences are paired: picture by picture with
strength 0. A caption counts once, by its mean over seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diff_dalle.evaluation.alignment import VERDICT, Truth, average_shares, right, shapes_detector
from diff_dalle.evaluation.intervals import Interval, mean_over_captions, paired_difference
from diff_dalle.sampling_io.store import Pictures

Draw = Callable[[float, int], Pictures]
"""(strength, seed) -> the pictures of all captions, uint8 [N,H,W,3]."""
Table = dict[str, NDArray[np.floating]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one strength gave.

    Attributes:
        scale: the strength.
        alignment: mean share of background, colour and shape that are right.
        shares: of each attribute.
        gain: alignment less that of strength 0, paired; None without strength 0.
        gain_all: the same for the share of pictures that are right in all three.
    """

    scale: float
    alignment: Interval
    shares: dict[str, Interval]
    gain: Interval | None
    gain_all: Interval | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepReport:
    """One row a strength, weakest first."""

    captions: int
    seeds: list[int]
    rows: list[Row]

    @property
    def best(self) -> Row | None:
        """The positive strength with the highest alignment."""
        positive = [row for row in self.rows if row.scale > 0]
        return max(positive, key=lambda row: row.alignment.mean, default=None)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        best = self.best
        return {**dataclasses.asdict(self), "best_scale": best.scale if best else None}

    def table(self) -> str:
        """The report as a Markdown table."""
        names = [*VERDICT, "all"]
        seeds = " ".join(map(str, self.seeds))
        lines = [
            f"{self.captions} captions, seeds {seeds}; mean over captions [95 % interval]",
            "",
            f"| scale | alignment | gain over 0 | {' | '.join(names)} |",
            "| --- " * (len(names) + 3) + "|",
        ]
        for row in self.rows:
            shares = " | ".join(f"{row.shares[name].mean:.3f}" for name in names)
            gain = "" if row.gain is None or row.scale == 0 else str(row.gain)
            lines.append(f"| {row.scale:g} | {row.alignment} | {gain} | {shares} |")
        return "\n".join(lines)


def sweep(
    draw: Draw, truths: Sequence[Truth], scales: Sequence[float], seeds: Sequence[int]
) -> SweepReport:
    """Draws and scores every strength with every seed.

    Where 0 and a positive strength are asked for, the negated best one is tried as well: an
    uphill gradient that is negated must lower alignment.
    """
    detector = shapes_detector()

    def tables(scale: float) -> list[Table]:
        return [right(detector.detect_all(draw(scale, seed)), truths) for seed in seeds]

    found = {scale: tables(scale) for scale in dict.fromkeys(scales)}
    best = SweepReport(captions=len(truths), seeds=list(seeds), rows=_rows(found)).best
    if best is not None and 0 in found and -best.scale not in found:
        found[-best.scale] = tables(-best.scale)
    return SweepReport(captions=len(truths), seeds=list(seeds), rows=_rows(found))


def _rows(found: dict[float, list[Table]]) -> list[Row]:
    zero = found.get(0)
    return [
        Row(
            scale=scale,
            alignment=mean_over_captions(_alignment(tables)),
            shares=average_shares(tables),
            gain=None if zero is None else paired_difference(_alignment(tables), _alignment(zero)),
            gain_all=None if zero is None else paired_difference(_all(tables), _all(zero)),
        )
        for scale, tables in sorted(found.items())
    ]


def _alignment(tables: Sequence[Table]) -> NDArray[np.floating]:
    """Mean over background, colour and shape, [captions, seeds]."""
    return np.stack([np.mean([t[name] for name in VERDICT], axis=0) for t in tables], axis=1)


def _all(tables: Sequence[Table]) -> NDArray[np.floating]:
    return np.stack([table["all"] for table in tables], axis=1)
