"""How many bits a dimension a generator needs for held-out pictures: sums, intervals, table.

Notation: N pictures, T steps of the (respaced) process.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diff_dalle.diffusion.likelihood import Bound
from diff_dalle.errors import UsageError
from diff_dalle.evaluation.intervals import Interval, mean_over_captions

LEAST = 2  # pictures, for an interval
Floats = NDArray[np.float64]
Bad = tuple[str, str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one batch of one rank measured on its n usable pictures.

    Attributes:
        places: int64 [n], numbers of the pictures in the order of the whole measurement.
        total_bpd: float64 [n].
        prior_bpd: float64 [n].
        terms: ``vb``, ``xstart_mse`` and ``mse``, each the sum over the n pictures, float64 [T];
            step 0 comes first.
        bad: (shard, key, reason) of the pictures that cannot be used.
    """

    places: NDArray[np.int64]
    total_bpd: Floats
    prior_bpd: Floats
    terms: dict[str, Floats]
    bad: list[Bad]

    @classmethod
    def of(
        cls, bound: Bound, valid: NDArray[np.bool_], places: NDArray[np.int64], bad: list[Bad]
    ) -> Part:
        """The rows of a bound that are ``valid`` [B]; the others are padding or broken."""
        columns = {"vb": bound.vb, "xstart_mse": bound.xstart_mse, "mse": bound.mse}
        return cls(
            places=places[valid],
            total_bpd=bound.total_bpd.numpy()[valid],
            prior_bpd=bound.prior_bpd.numpy()[valid],
            terms={name: table.numpy()[valid].sum(axis=0) for name, table in columns.items()},
            bad=bad,
        )


class Tally:
    """The parts of all batches and ranks, added up."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._terms: dict[str, Floats] = {}

    def add(self, part: Part) -> None:
        """Count one more part.

        Raises:
            UsageError: the bound of a picture is no number.
        """
        broken = int((~np.isfinite(part.total_bpd)).sum())
        if broken:
            raise UsageError(
                f"the bound of {broken} of {len(part.places)} pictures is not finite: try "
                "--precision fp32, or an earlier checkpoint"
            )
        for name, values in part.terms.items():
            self._terms[name] = self._terms[name] + values if name in self._terms else values
        self._parts.append(dataclasses.replace(part, terms={}))

    @property
    def count(self) -> int:
        """How many pictures were measured."""
        return sum(len(part.places) for part in self._parts)

    @property
    def mean(self) -> float:
        """Bits per dimension of all pictures so far; NaN before the first."""
        return sum(float(part.total_bpd.sum()) for part in self._parts) / (self.count or np.nan)

    def report(self) -> NllReport:
        """What was measured, pictures in the order of the data.

        Raises:
            UsageError: fewer than two usable pictures.
        """
        bad = [row for part in self._parts for row in part.bad]
        if self.count < LEAST:
            reasons = ", ".join(sorted({reason for _, _, reason in bad}))
            raise UsageError(
                f"--data_dir gave {self.count} usable pictures ({reasons or 'no more are there'}): "
                f"{LEAST} are the least, 1000 are good"
            )
        places, total, prior = (
            np.concatenate([getattr(part, name) for part in self._parts])
            for name in ("places", "total_bpd", "prior_bpd")
        )
        order = places.argsort()
        return NllReport(
            total_bpd=total[order],
            prior_bpd=prior[order],
            terms={name: values / self.count for name, values in self._terms.items()},
            bad=sorted(bad),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NllReport:
    """The variational bound on N pictures, in bits per dimension.

    Attributes:
        total_bpd: float64 [N], the bound on each picture.
        prior_bpd: float64 [N], its share of the prior.
        terms: ``vb``, ``xstart_mse`` and ``mse``, each a mean over pictures, float64 [T]; step 0
            comes first.
        bad: (shard, key, reason) of pictures that could not be used.
    """

    total_bpd: Floats
    prior_bpd: Floats
    terms: dict[str, Floats]
    bad: list[Bad]

    def to_json(self) -> dict[str, Any]:
        """The totals as JSON holds them, with normal 95 % intervals over pictures."""
        intervals = {
            "total_bpd": self.total_bpd,
            "vb_bpd": self.total_bpd - self.prior_bpd,
            "prior_bpd": self.prior_bpd,
        }
        vb = self.terms["vb"]
        return {
            "count": len(self.total_bpd),
            "num_steps": len(vb),
            **{name: dataclasses.asdict(_interval(x)) for name, x in intervals.items()},
            "decoder_bpd": float(vb[0]),
            "mse": float(self.terms["mse"].mean()),
            "xstart_mse": float(self.terms["xstart_mse"].mean()),
            "bad": self.bad,
        }

    def arrays(self, timestep_map: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The terms by step, the noisiest first as guided-diffusion writes them, and by picture.

        Args:
            timestep_map: int64 [T], the base process's step that each step stands for.
        """
        terms = {"t": timestep_map, **self.terms}
        pictures = {"total_bpd": self.total_bpd, "prior_bpd": self.prior_bpd}
        return {**{name: values[::-1] for name, values in terms.items()}, **pictures}

    def table(self) -> str:
        """The report as a Markdown table, and what was left out of it."""
        vb, last = self.terms["vb"], len(self.terms["vb"]) - 1
        rows = [
            ("the whole bound", str(_interval(self.total_bpd))),
            ("x_0 given x_1 (step 0)", f"{vb[0]:.4f}"),
            (f"the other steps (1 to {last})", f"{vb[1:].sum():.4f}"),
            ("prior", f"{self.prior_bpd.mean():.4f}"),
        ]
        heading = f"{len(self.total_bpd)} pictures, {len(vb)} steps"
        lines = [f"| {heading} | bits per dimension [95 % interval] |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in rows]
        reasons = Counter(reason for _, _, reason in self.bad)
        if reasons:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            lines += ["", f"left out: {counts}"]
        return "\n".join(lines)


def _interval(values: Floats) -> Interval:
    return mean_over_captions(values)  # here a picture is what a caption is there: the unit
