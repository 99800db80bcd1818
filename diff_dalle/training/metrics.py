"""What a run measures between two log lines: means over samples, norms and pace.

Sums stay on the device and cross the ranks only when a line is logged, so measuring costs no
synchronisation a step. B batch, T steps of the noise process.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from diff_dalle.distributed import World, all_reduce_sum_

QUARTILES = 4


class Meter:
    """Weighted means of named quantities over samples, microbatches, steps and ranks.

    Every rank must add the same names between two calls of `means`, in any order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}  # name -> float64 [2]: weighted sum, sum of weights

    def add(self, name: str, values: Tensor | float, weights: Tensor | None = None) -> None:
        """Count values of shape [B] (or one number), each with its weight [B], default 1.

        A value that is not finite counts nothing: its step was skipped, and is counted there.
        """
        numbers = torch.as_tensor(values, device=self._device).detach().double().reshape(-1)
        if weights is None:
            weights = torch.ones_like(numbers)
        counted = numbers.isfinite()
        weights = torch.where(counted, weights.to(numbers), 0.0)
        numbers = torch.where(counted, numbers, 0.0)  # 0 times NaN would be NaN
        pair = torch.stack([(numbers * weights).sum(), weights.sum()])  # [2]
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def add_by_quartile(
        self, name: str, values: Tensor, t: Tensor, num_steps: int, weights: Tensor
    ) -> None:
        """Count values [B] under ``name`` and under ``name_q0`` (least noise) … ``name_q3``.

        Args:
            name: the quantity.
            values: [B].
            t: int64 [B] in [0, num_steps).
            num_steps: T.
            weights: [B].
        """
        self.add(name, values, weights)
        quartile = t * QUARTILES // num_steps  # [B]
        for number in range(QUARTILES):
            self.add(f"{name}_q{number}", values, weights * (quartile == number))

    def means(self, world: World) -> dict[str, float]:
        """The means over all ranks since the last call; names without a sample are left out.

        A collective: every rank calls it at the same step.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        table = torch.stack([self._sums[name] for name in names])  # [N,2]
        self._sums = {}
        all_reduce_sum_(table, world)
        rows = zip(names, table.tolist(), strict=True)
        return {name: total / weight for name, (total, weight) in rows if weight > 0}


class Pace:
    """Images a second, the share of time spent waiting for data, and seconds to the end.

    Evaluations, checkpoints and previews count for the last alone.
    """

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._steps = 0
        self._seconds = 0.0  # of all steps
        self._first_batch: float | None = None  # seconds; told once
        self._forget()

    def _forget(self) -> None:
        self._samples, self._busy, self._waiting = 0, 0.0, 0.0

    def stepped(self, samples: int, *, waiting: float, working: float) -> None:
        """A step over ``samples`` samples of all ranks ended; both times in seconds."""
        if self._steps == 0:
            self._first_batch = waiting
        self._samples += samples
        self._waiting += waiting
        self._busy += waiting + working
        self._seconds += waiting + working
        self._steps += 1

    @property
    def seconds_per_step(self) -> float:
        """The mean over all steps so far."""
        return self._seconds / max(self._steps, 1)

    def measure(self, steps_left: int) -> dict[str, float]:
        """``img_per_sec`` and ``data_wait_share`` since the last call, ``eta`` in seconds.

        The first call also has ``time_to_first_batch``, seconds, which count as waiting too.
        """
        busy = max(self._busy, 1e-9)
        elapsed = time.perf_counter() - self._begun
        values = {
            "img_per_sec": self._samples / busy,
            "data_wait_share": self._waiting / busy,
            "eta": steps_left * elapsed / max(self._steps, 1),
        }
        if self._first_batch is not None:
            values["time_to_first_batch"] = self._first_batch
            self._first_batch = None
        self._forget()
        return values


def norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all numbers of all tensors taken together."""
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors])
    return float(torch.linalg.vector_norm(torch.stack([n.double() for n in norms])))
