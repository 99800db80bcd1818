"""95 % intervals for shares and for differences that are paired over captions."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval: ``low <= mean <= high``."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: int, trials: int) -> Interval:
    """A share with the score interval of Wilson (1927), which stays inside [0, 1].

    >>> print(wilson(250, 256))
    0.977 [0.950, 0.989]
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes of {trials} trials")
    share = successes / trials
    centre = share + _Z**2 / (2 * trials)
    spread = _Z * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    scale = 1 + _Z**2 / trials
    low, high = (centre - spread) / scale, (centre + spread) / scale
    # Rounding must not push a share of 0 or 1 out of its own interval.
    return Interval(share, max(0.0, min(low, share)), min(1.0, max(high, share)))


def mean_over_captions(values: NDArray[np.floating] | NDArray[np.bool_]) -> Interval:
    """The mean of values [captions] or [captions, seeds] with its normal 95 % interval.

    The pictures of one caption are not independent, so a caption counts once, by its mean over
    seeds. Apply it to differences between two settings on the same captions and seeds for a
    paired interval.
    """
    per_caption = np.asarray(values, dtype=np.float64)
    if per_caption.ndim == 2:
        per_caption = per_caption.mean(axis=1)
    if per_caption.ndim != 1 or len(per_caption) < 2:
        raise ValueError(f"values {np.shape(values)} must be [captions >= 2] or [captions, seeds]")
    mean = float(per_caption.mean())
    error = float(per_caption.std(ddof=1)) / math.sqrt(len(per_caption))
    return Interval(mean, mean - _Z * error, mean + _Z * error)


def paired_difference(
    first: NDArray[np.bool_] | NDArray[np.floating],
    second: NDArray[np.bool_] | NDArray[np.floating],
) -> Interval:
    """The mean of ``first - second``, both [captions] or [captions, seeds], paired by position."""
    if np.shape(first) != np.shape(second):
        raise ValueError(f"shapes {np.shape(first)} and {np.shape(second)} differ")
    return mean_over_captions(np.asarray(first, np.float64) - np.asarray(second, np.float64))
