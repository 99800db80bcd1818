"""Comparisons on a noisy machine: contestants take turns, and ratios are of one round."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version

ROUNDS = 15


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """A contestant: does the work and returns the seconds that it took."""

    def contestant() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return contestant


def interleaved(
    contestants: Mapping[str, Callable[[], float]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, after one round that does not count.

    The order turns round by round, so that no contestant always comes first.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = contestants[name]()
            if turn:
                seconds[name].append(taken)
    return seconds


def speedup(baseline: list[float], ours: list[float]) -> tuple[float, float]:
    """Median of the rounds' ratios baseline / ours, and its lower 95 % bound.

    The bound is an order statistic: whatever the distribution, the median lies below it in at
    most 5 % of such measurements.
    """
    ratios = sorted(b / o for b, o in zip(baseline, ours, strict=True))
    n = len(ratios)
    below = [sum(math.comb(n, k) for k in range(j + 1)) / 2**n for j in range(n)]
    rank = sum(share <= 0.05 for share in below)
    if rank == 0:
        raise ValueError(f"{n} rounds are too few for a 95 % bound: take 5 or more")
    return statistics.median(ratios), ratios[rank - 1]


def machine(*packages: str) -> str:
    """Processor, Python and the versions of packages, for the record."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    cores = f"{len(names)} x {names[0]}" if names else platform.machine()
    return f"{cores}; Python {platform.python_version()}, {versions}"
