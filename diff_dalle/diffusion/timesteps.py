"""How often each diffusion step is trained.

A sampler turns uniform numbers into steps through its inverse cumulative distribution, so keyed
noise decides what a sample meets. Weights keep the expected loss that of uniform steps, except
where a sampler is meant to be a weighting itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.knobs import knob, require, require_choice


@dataclass(frozen=True, kw_only=True)
class TimestepConfig:
    """How often training visits each noise level."""

    schedule_sampler: str = knob("uniform", "uniform, loss-second-moment or logsnr-normal")
    logsnr_mean: float = knob(-2.2, "logsnr-normal: mean of the log signal-to-noise ratio")
    logsnr_std: float = knob(1.6, "logsnr-normal: its standard deviation")
    logsnr_uniform: float = knob(0.1, "logsnr-normal: share of steps drawn uniformly instead")

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the wrong field."""
        require_choice("schedule_sampler", self.schedule_sampler, list(TIMESTEP_SAMPLERS))
        require(self.logsnr_std > 0, "logsnr_std", self.logsnr_std, "be above 0")
        require(
            0 <= self.logsnr_uniform <= 1, "logsnr_uniform", self.logsnr_uniform, "be from 0 to 1"
        )


class TimestepSampler(Protocol):
    """What training needs from a sampler of steps."""

    def probabilities(self) -> Tensor:
        """Float64 [T] on the CPU, sum 1."""
        ...

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Steps int64 [B] and loss weights float32 [B] for uniform ``u`` [B] in (0, 1)."""
        ...


class UniformSampler:
    """Every step equally often, weight 1 (Ho et al. 2020, algorithm 1)."""

    def __init__(self, num_steps: int) -> None:
        """``num_steps`` is T."""
        self.num_steps = num_steps

    def probabilities(self) -> Tensor:
        """Float64 [T]."""
        return torch.full((self.num_steps,), 1 / self.num_steps, dtype=torch.float64)

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """See `TimestepSampler.sample`."""
        t = (u * self.num_steps).long().clamp(max=self.num_steps - 1)
        return t, torch.ones_like(u, dtype=torch.float32)


class LossSecondMomentSampler:
    """Steps in proportion to the root mean square of their last losses.

    Nichol and Dhariwal 2021, eq. 18: p_t is proportional to sqrt(E[L_t^2]) over the last ten
    losses of step t, with a uniform share of 0.001; weights 1 / (T p_t) keep the loss unbiased.
    Uniform until every step has ten losses.
    """

    history = 10
    uniform = 0.001

    def __init__(self, num_steps: int) -> None:
        """``num_steps`` is T."""
        self._losses: list[deque[float]] = [deque(maxlen=self.history) for _ in range(num_steps)]

    def probabilities(self) -> Tensor:
        """Float64 [T]."""
        num_steps = len(self._losses)
        even = torch.full((num_steps,), 1 / num_steps, dtype=torch.float64)
        if any(len(losses) < self.history for losses in self._losses):
            return even
        losses = torch.tensor([list(losses) for losses in self._losses], dtype=torch.float64)
        root_mean_square = losses.square().mean(dim=1).sqrt()  # [T]
        total = root_mean_square.sum()
        if total == 0:
            return even
        return (1 - self.uniform) * root_mean_square / total + self.uniform * even

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """See `TimestepSampler.sample`."""
        probabilities = self.probabilities()
        t = _step_at(_cumulative(probabilities, u), u)
        weights = (1 / (len(probabilities) * probabilities)).float().to(u.device)  # [T]
        return t, weights[t]

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember losses.

        Every rank must be given the same values, those of all ranks, so that all keep the same
        distribution. Losses that are not finite (a skipped fp16 step) are left out.

        Args:
            t: int64 [N].
            losses: [N], per-sample losses before weighting.
        """
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):
                self._losses[step].append(loss)

    def state_dict(self) -> dict[str, Tensor]:
        """``losses`` float64 [T, history], oldest first, zero-padded; ``counts`` int64 [T]."""
        padded = [list(row) + [0.0] * (self.history - len(row)) for row in self._losses]
        return {
            "losses": torch.tensor(padded, dtype=torch.float64),
            "counts": torch.tensor([len(row) for row in self._losses]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`; a `ValueError` where the shapes differ."""
        wanted = (len(self._losses), self.history)
        if tuple(state["losses"].shape) != wanted:
            raise ValueError(f"losses are {tuple(state['losses'].shape)}, not {wanted}")
        rows = zip(state["losses"].tolist(), state["counts"].tolist(), strict=True)
        self._losses = [deque(row[:count], maxlen=self.history) for row, count in rows]


class LogSNRNormalSampler:
    """Steps whose log-SNR is normally distributed, weight 1: the choice is the weighting.

    p_t is proportional to N(log-SNR_t; mean, std) |d log-SNR_t|, the discrete form of a
    log-normal noise level (Karras et al. 2022, table 1, noise distribution). A uniform share
    keeps every step trained: a network asked at noise levels it never met ruins the sample.
    """

    def __init__(self, log_snr: Tensor, *, mean: float, std: float, uniform: float = 0.0) -> None:
        """``log_snr`` is float64 [T], falling.

        A `UsageError` where the density is 0 at every step of it.
        """
        edges = torch.cat([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])
        width = edges[:-1] - edges[1:]  # [T]
        density = torch.exp(-0.5 * ((log_snr - mean) / std) ** 2) * width
        ends = f"{float(log_snr[-1]):.1f} to {float(log_snr[0]):.1f}"
        must = f"lie within the schedule's log-SNR ({ends}), or in reach of --logsnr_std {std:g}"
        require(bool(density.sum() > 0), "logsnr_mean", mean, must)
        self._probabilities = (1 - uniform) * density / density.sum() + uniform / len(log_snr)
        self._on_device: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def probabilities(self) -> Tensor:
        """Float64 [T]."""
        return self._probabilities

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """See `TimestepSampler.sample`."""
        key = (u.device, u.dtype)
        if key not in self._on_device:
            self._on_device[key] = _cumulative(self._probabilities, u)
        return _step_at(self._on_device[key], u), torch.ones_like(u, dtype=torch.float32)


def _second_moment(cfg: TimestepConfig, diffusion: GaussianDiffusion) -> TimestepSampler:
    return LossSecondMomentSampler(diffusion.num_steps)


def _uniform(cfg: TimestepConfig, diffusion: GaussianDiffusion) -> TimestepSampler:
    return UniformSampler(diffusion.num_steps)


def _logsnr_normal(cfg: TimestepConfig, diffusion: GaussianDiffusion) -> TimestepSampler:
    return LogSNRNormalSampler(
        diffusion.schedule.log_snr,
        mean=cfg.logsnr_mean,
        std=cfg.logsnr_std,
        uniform=cfg.logsnr_uniform,
    )


TIMESTEP_SAMPLERS: dict[str, Callable[[TimestepConfig, GaussianDiffusion], TimestepSampler]] = {
    "uniform": _uniform,
    "loss-second-moment": _second_moment,
    "logsnr-normal": _logsnr_normal,
}


def make_timestep_sampler(cfg: TimestepConfig, diffusion: GaussianDiffusion) -> TimestepSampler:
    """The sampler that ``cfg.schedule_sampler`` names."""
    return TIMESTEP_SAMPLERS[cfg.schedule_sampler](cfg, diffusion)


def _cumulative(probabilities: Tensor, u: Tensor) -> Tensor:
    """The cumulative distribution [T], of the dtype and on the device of ``u``."""
    return probabilities.cumsum(0).to(u.dtype).to(u.device)


def _step_at(cumulative: Tensor, u: Tensor) -> Tensor:
    """The step whose share of (0, 1) holds ``u``; int64 [B]."""
    return torch.searchsorted(cumulative, u, right=True).clamp(max=len(cumulative) - 1)
