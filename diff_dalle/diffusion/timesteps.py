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
from diff_dalle.errors import UsageError
from diff_dalle.knobs import knob, require, require_choice

UNIFORM_SHARES = {"logsnr-normal": "logsnr_uniform", "logit-normal": "logit_uniform"}
"""By sampler: the knob for the share of steps drawn uniformly, without which some have none."""


@dataclass(frozen=True, kw_only=True)
class TimestepConfig:
    """How often training visits each noise level."""

    schedule_sampler: str = knob(
        "uniform", "uniform, loss-second-moment, logsnr-normal or logit-normal"
    )
    # From the first tiny base model of the demo scenes, see docs/decisions.md. EDM's are 2.4 and
    # 2.4, on the image's side: its ln sigma has mean -1.2 and deviation 1.2.
    logsnr_mean: float = knob(-2.2, "logsnr-normal: mean of the log signal-to-noise ratio")
    logsnr_std: float = knob(1.6, "logsnr-normal: its standard deviation")
    logsnr_uniform: float = knob(0.1, "logsnr-normal: share of steps drawn uniformly instead")
    # Esser et al. 2024: 0 and 1 did best in their comparison.
    logit_mean: float = knob(0.0, "logit-normal: mean of log(sigma / signal)")
    logit_std: float = knob(1.0, "logit-normal: its standard deviation")
    logit_uniform: float = knob(0.1, "logit-normal: share of steps drawn uniformly instead")

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the wrong field."""
        require_choice("schedule_sampler", self.schedule_sampler, list(TIMESTEP_SAMPLERS))
        for name in ("logsnr_std", "logit_std"):
            require(getattr(self, name) > 0, name, getattr(self, name), "be above 0")
        for name in UNIFORM_SHARES.values():
            share = getattr(self, name)
            require(0 <= share <= 1, name, share, "be from 0 to 1")


class TimestepSampler(Protocol):
    """What training needs from a sampler of steps."""

    def probabilities(self) -> Tensor:
        """Float64 [T] on the CPU, sum 1."""
        ...

    def sample(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Steps int64 [B] and loss weights float32 [B] for uniform ``r`` [B] in (0, 1)."""
        ...


class UniformSampler:
    """Every step equally often, weight 1 (Ho et al. 2020, algorithm 1)."""

    def __init__(self, num_steps: int) -> None:
        """``num_steps`` is T."""
        self.num_steps = num_steps

    def probabilities(self) -> Tensor:
        """Float64 [T]."""
        return torch.full((self.num_steps,), 1 / self.num_steps, dtype=torch.float64)

    def sample(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """See `TimestepSampler.sample`."""
        t = (r * self.num_steps).long().clamp(max=self.num_steps - 1)
        return t, torch.ones_like(r, dtype=torch.float32)


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

    def sample(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """See `TimestepSampler.sample`."""
        probabilities = self.probabilities()
        t = _step_at(_cumulative(probabilities, r), r)
        weights = (1 / (len(probabilities) * probabilities)).float().to(r.device)  # [T]
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


class NormalSampler:
    """Steps whose noise level is normally distributed, weight 1: the choice is the weighting.

    p_t is proportional to N(level_t; mean, std) |d level_t| for a measure of noise level that
    rises or falls with the step. A uniform share keeps every step trained: a network asked at
    noise levels it never met ruins the sample.
    """

    def __init__(
        self, level: Tensor, *, mean: float, std: float, uniform: float, name: str, what: str
    ) -> None:
        """``level`` is float64 [T], monotone, infinite at most at steps that hold noise alone.

        Those have density 0. A `UsageError` where the density is 0 at every step; it calls the
        level ``what`` and the knobs --``name``_mean and --``name``_std.
        """
        finite = torch.isfinite(level)
        inside = level[finite]
        if not len(inside):
            raise UsageError(
                f"--schedule_sampler {name}-normal finds noise alone at every step of the process: "
                "give more --diffusion_steps"
            )
        edges = torch.cat([inside[:1], (inside[1:] + inside[:-1]) / 2, inside[-1:]])
        density = torch.zeros_like(level)
        density[finite] = torch.exp(-0.5 * ((inside - mean) / std) ** 2) * edges.diff().abs()
        low, high = sorted((float(inside[0]), float(inside[-1])))
        reach = f"or in reach of --{name}_std {std:g}"
        must = f"lie within the schedule's {what} ({low:.1f} to {high:.1f}), {reach}"
        require(bool(density.sum() > 0), f"{name}_mean", mean, must)
        self._probabilities = (1 - uniform) * density / density.sum() + uniform / len(level)
        self._on_device: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def probabilities(self) -> Tensor:
        """Float64 [T]."""
        return self._probabilities

    def sample(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """See `TimestepSampler.sample`."""
        key = (r.device, r.dtype)
        if key not in self._on_device:
            self._on_device[key] = _cumulative(self._probabilities, r)
        return _step_at(self._on_device[key], r), torch.ones_like(r, dtype=torch.float32)


def _second_moment(cfg: TimestepConfig, diffusion: GaussianDiffusion) -> TimestepSampler:
    return LossSecondMomentSampler(diffusion.num_steps)


def _uniform(cfg: TimestepConfig, diffusion: GaussianDiffusion) -> TimestepSampler:
    return UniformSampler(diffusion.num_steps)


def _logsnr_normal(cfg: TimestepConfig, diffusion: GaussianDiffusion) -> TimestepSampler:
    """The log-SNR is normal, as -2 ln sigma is in Karras et al. 2022, table 1."""
    return NormalSampler(
        diffusion.schedule.log_snr,
        mean=cfg.logsnr_mean,
        std=cfg.logsnr_std,
        uniform=cfg.logsnr_uniform,
        name="logsnr",
        what="log-SNR",
    )


def _logit_normal(cfg: TimestepConfig, diffusion: GaussianDiffusion) -> TimestepSampler:
    """s of the straight path is logit-normal (Esser et al. 2024, section 3.1).

    s is sigma / (signal + sigma), so log(s / (1 - s)) is minus half the log-SNR, on any schedule.
    """
    return NormalSampler(
        -0.5 * diffusion.schedule.log_snr,
        mean=cfg.logit_mean,
        std=cfg.logit_std,
        uniform=cfg.logit_uniform,
        name="logit",
        what="logit of sigma / (signal + sigma)",
    )


TIMESTEP_SAMPLERS: dict[str, Callable[[TimestepConfig, GaussianDiffusion], TimestepSampler]] = {
    "uniform": _uniform,
    "loss-second-moment": _second_moment,
    "logsnr-normal": _logsnr_normal,
    "logit-normal": _logit_normal,
}


def make_timestep_sampler(cfg: TimestepConfig, diffusion: GaussianDiffusion) -> TimestepSampler:
    """The sampler that ``cfg.schedule_sampler`` names."""
    return TIMESTEP_SAMPLERS[cfg.schedule_sampler](cfg, diffusion)


def _cumulative(probabilities: Tensor, r: Tensor) -> Tensor:
    """The cumulative distribution [T], of the dtype and on the device of ``r``."""
    return probabilities.cumsum(0).to(r.dtype).to(r.device)


def _step_at(cumulative: Tensor, r: Tensor) -> Tensor:
    """The step whose share of (0, 1) holds ``r``; int64 [B]."""
    return torch.searchsorted(cumulative, r, right=True).clamp(max=len(cumulative) - 1)
