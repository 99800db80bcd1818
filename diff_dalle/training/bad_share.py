"""The moment when too much of the data is unusable to train on."""

from __future__ import annotations

from collections import deque

from diff_dalle.errors import UsageError

WINDOW = 1000  # samples of all ranks


class BadShare:
    """Watches the share of unusable samples among the last `WINDOW` ones of all ranks.

    A few bad pictures are skipped and counted. Many at once mean that a disk is gone or that
    the data are other ones than was thought: training on would waste the hours.
    """

    def __init__(self, limit: float) -> None:
        """Bear a share of up to ``limit``, in [0, 1]."""
        self._limit = limit
        self._steps: deque[tuple[int, int]] = deque()  # (samples, bad) of each step
        self._samples = 0
        self._bad = 0

    def add(self, samples: int, bad: int) -> None:
        """Count a step of all ranks together."""
        self._steps.append((samples, bad))
        self._samples += samples
        self._bad += bad
        while self._samples - self._steps[0][0] >= WINDOW:
            old_samples, old_bad = self._steps.popleft()
            self._samples -= old_samples
            self._bad -= old_bad

    @property
    def exceeded(self) -> bool:
        """Whether the limit is passed; not judged before `WINDOW` samples were seen."""
        return self._samples >= WINDOW and self._bad > self._limit * self._samples

    def error(self) -> UsageError:
        """What to tell the user of a run that was saved and stops."""
        return UsageError(
            f"{self._bad} of the last {self._samples} samples could not be used, more than "
            f"--max_bad_share {self._limit:g}: bad_samples.jsonl says which and why; mend the data "
            "and give the same command again, the run goes on from here"
        )
