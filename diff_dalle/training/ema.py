"""Exponential moving averages of a model's weights, several rates at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diff_dalle.errors import UsageError

_StateDict = dict[str, Tensor]


class EMA:
    """ema ← rate · ema + (1 − rate) · weights, in fp32, for every rate.

    There is no warm-up, as in guided-diffusion: the average starts at the weights. Buffers
    are not averaged; a state dict carries their present value.
    """

    def __init__(self, module: nn.Module, rates: Sequence[float]) -> None:
        """Start an average for each rate, in [0, 1), at the module's present weights."""
        self.module = module
        self.rates = tuple(float(rate) for rate in rates)
        self._averages: dict[float, _StateDict] = {}
        self.restart()

    @property
    def names(self) -> list[str]:
        """The rates as they stand in file names, such as ``0.9999``."""
        return [str(rate) for rate in self.rates]

    @torch.no_grad()
    def restart(self) -> None:
        """Set every average to the module's present weights."""
        self._averages = {
            rate: {name: p.detach().to(_wide(p), copy=True) for name, p in self._weights()}
            for rate in self.rates
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the module's present weights."""
        weights = [p.to(_wide(p)) for _, p in self._weights()]
        for rate, average in self._averages.items():
            torch._foreach_lerp_(list(average.values()), weights, 1.0 - rate)

    def state_dicts(self) -> dict[str, _StateDict]:
        """For every rate's name, a state dict that the module's ``load_state_dict`` takes.

        The tensors are the live ones, not copies.
        """
        present = self.module.state_dict()
        return {str(rate): {**present, **average} for rate, average in self._averages.items()}

    def load_state_dicts(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore the averages from what `state_dicts` gave.

        Raises:
            UsageError: the rates differ from this object's.
        """
        if {float(name) for name in states} != set(self.rates):
            raise UsageError(
                f"--ema_rate is {','.join(self.names)}, but the checkpoint has "
                f"{','.join(states)}: give the same rates"
            )
        for name, state in states.items():
            for key, average in self._averages[float(name)].items():
                average.copy_(state[key])

    @contextmanager
    def applied(self, rate: float) -> Iterator[nn.Module]:
        """The module with the averaged weights inside, for an evaluation or a preview."""
        average = self._averages[rate]
        kept = {name: p.detach().clone() for name, p in self._weights()}
        try:
            self._put(average)
            yield self.module
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: _StateDict) -> None:
        for name, p in self._weights():
            p.copy_(values[name])

    def _weights(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter under every name that the state dict has for it."""
        return list(self.module.named_parameters(remove_duplicate=False))


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
