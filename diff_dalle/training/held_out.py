"""Held-out evaluations: the best weights kept, and the moment to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from diff_dalle.data.batch import Batch
from diff_dalle.distributed import World, broadcast_object
from diff_dalle.training.checkpoint_file import read_header, save_weights
from diff_dalle.training.ema import EMA
from diff_dalle.training.resume import RunRecord
from diff_dalle.training.run_log import Bad
from diff_dalle.training.tasks import Task

SCORE = "val_loss"
BEST_FILE = "best.pt"


class HeldOut:
    """Evaluates a task on held-out data, and remembers how good it has been.

    Args:
        task: what is trained.
        ema: its averaged weights; those of the first rate are evaluated too.
        batches: opens this rank's held-out batches, the same ones at every call.
    """

    def __init__(self, task: Task, ema: EMA, batches: Callable[[], Iterable[Batch]]) -> None:
        self._task = task
        self._ema = ema
        self._batches = batches
        self._best = math.inf
        self._since_best = 0
        self._improved = False
        self.bad: list[Bad] = []

    def evaluate(self) -> dict[str, float]:
        """The task's measurements, and those of the averaged weights as ``ema_…`` (a collective).

        The score is `SCORE` of the weights as they are.
        """
        batches: list[Batch] = []
        values = self._task.evaluate(self._opened(batches))
        score = values.get(SCORE, math.nan)
        self._improved = score < self._best
        self._since_best = 0 if self._improved else self._since_best + 1
        self._best = score if self._improved else self._best
        if self._ema.rates:
            with self._ema.applied(self._ema.rates[0]):
                averaged = self._task.evaluate(batches)
            values |= {f"ema_{name}": value for name, value in averaged.items()}
        return values

    def _opened(self, kept: list[Batch]) -> Iterator[Batch]:
        """The batches, which go into ``kept`` as well; broken samples are noted."""
        for batch in self._batches():
            self.bad += batch.bad
            kept.append(batch)
            yield batch

    def take_bad(self) -> list[Bad]:
        """This rank's broken samples that were not yet taken."""
        taken, self.bad = self.bad, []
        return taken

    def keep_best(self, folder: Path, step: int, record: RunRecord, world: World) -> None:
        """Write ``best.pt``, the weights as they are, if the last evaluation was the best."""
        if self._improved and self._task.keeps_best and world.is_main:
            save_weights(
                folder / BEST_FILE,
                kind=record.kind,
                config=record.config,
                tokenizer_json=record.tokenizer_json,
                step=step,
                ema_rate=None,
                state_dict=self._task.model.state_dict(),
                score=self._best,
            )

    def recall(self, folder: Path, record: RunRecord, world: World) -> None:
        """Let no worse weights replace ``best.pt`` of the same run (a collective).

        It may know of a better score than the state that the run goes on from: the run was
        interrupted after it, or goes on from weights alone.
        """
        score = math.inf
        if world.is_main and self._task.keeps_best and (folder / BEST_FILE).exists():
            header = read_header(folder / BEST_FILE)
            same = not record.changed(header.config, sorted(record.shaping & record.config.keys()))
            score = header.score if same and header.score is not None else math.inf
        self._best = min(self._best, broadcast_object(score, world))

    @property
    def finished(self) -> bool:
        """Whether as many evaluations as the task allows have brought nothing better."""
        return 0 < self._task.stop_early <= self._since_best

    def state_dict(self) -> dict[str, Any]:
        """The best score and how many evaluations ago it was."""
        return {"best": self._best, "since_best": self._since_best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._best, self._since_best = state["best"], state["since_best"]
