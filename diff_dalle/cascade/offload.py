"""Off-loading: the weights of a stage wait on the CPU and come to its device for its turn."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from types import TracebackType

import torch
from torch import Tensor, nn

from diff_dalle.cascade.stages import Stage


class Visit:
    """Modules whose weights are on a device until `end`.

    Copies visit and the waiting weights are never written to, so what comes back is the same bit
    for bit, and nothing has to be sent back.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        """Come. Where the device has no room for all of them, none has moved."""
        tensors = chain.from_iterable((*m.parameters(), *m.buffers()) for m in modules)
        self._waiting = [(tensor, tensor.data) for tensor in tensors]
        self._device = device
        copies = [_copy(data, device) for _, data in self._waiting]
        for (tensor, _), copy in zip(self._waiting, copies, strict=True):
            tensor.data = copy

    def end(self) -> None:
        """Leave, and give the memory back to the device."""
        for tensor, data in self._waiting:
            tensor.data = data
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class Residence:
    """Which stage is on which device; a context that spans a call.

    Without off-loading every stage stays where it samples. With it a stage comes when its turn
    begins and stays until another one needs its device, or the outermost call ends: one that has
    its device to itself is moved once a call, whatever the number of batches. Calls from several
    threads at once would take each other's weights away.
    """

    def __init__(self, *, offload: bool) -> None:
        self.offload = offload
        self._calls = 0
        self._guests: dict[torch.device, tuple[Stage, Visit]] = {}

    def __enter__(self) -> None:
        self._calls += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._calls -= 1
        if self._calls == 0:
            for device in list(self._guests):
                self._dismiss(device)

    def bring(self, stage: Stage) -> None:
        """Have a stage and its noised CLIP on the stage's device."""
        if not self.offload or self._is_here(stage):
            return
        self._dismiss(stage.device)
        self._guests[stage.device] = (stage, Visit(stage.modules, stage.device))

    def _is_here(self, stage: Stage) -> bool:
        return stage.device in self._guests and self._guests[stage.device][0] is stage

    def _dismiss(self, device: torch.device) -> None:
        if device in self._guests:
            self._guests.pop(device)[1].end()


def _copy(data: Tensor, device: torch.device) -> Tensor:
    """The same numbers on a device."""
    return data.to(device)
