"""Noise schedules: how much noise each diffusion step holds.

Steps count from 0 here (the papers count from 1), so step 0 is the least noisy one. All tables
are float64 on the CPU, shape [T] with T the number of steps. Symbols: docs/notation.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diff_dalle.diffusion.predictions import PREDICTIONS
from diff_dalle.diffusion.spacing import choose_steps
from diff_dalle.knobs import AUTO, knob, require, require_choice


def betas_linear(num_steps: int) -> Tensor:
    """Variances that grow linearly, 1e-4 to 0.02 at 1000 steps (Ho et al. 2020, section 4).

    Other step counts scale both ends by 1000 / num_steps, so that the whole process adds about
    the same noise. Float64 [T]. Needs more than 20 steps: at 20 the
    last variance is 1 and nothing of the image is left.
    """
    scale = 1000 / num_steps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64)


def betas_cosine(num_steps: int) -> Tensor:
    """Variances whose alpha_bar follows a squared cosine (Nichol and Dhariwal 2021, eq. 17).

    Clipped at 0.999, as the paper does, against a singularity at the last step. Float64 [T].
    """
    time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2  # [T+1]
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def betas_flow(num_steps: int) -> Tensor:
    """Variances whose signal and noise are as 1 - s to s, s = 1/T, 2/T, ..., 1 (Liu et al. 2022).

    That is the straight path of rectified flow, made variance preserving: alpha_bar is
    (1 - s)^2 / ((1 - s)^2 + s^2). The last step holds noise alone, so its variance is 1.
    Float64 [T].
    """
    s = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    return betas_of((1 - s) ** 2 / ((1 - s) ** 2 + s**2))


def shifted(betas: Tensor, factor: float) -> Tensor:
    """Variances whose log-SNR is lower by 2 log(factor) at every step (Hoogeboom et al. 2023).

    A picture of ``factor`` times the side length keeps as much of its content under so much more
    noise (section 3.1). For the flow schedule it is Esser et al. 2024, eq. 23. Float64 [T].
    """
    odds = torch.cumprod(1 - betas, 0).reciprocal() - 1  # noise to signal, 1 / SNR
    return betas_of(1 / (1 + factor**2 * odds))


def zero_terminal(betas: Tensor) -> Tensor:
    """Variances after which nothing of the image is left (Lin et al. 2024, algorithm 1).

    The root of alpha_bar is moved and scaled so that the last one is 0 and the first one stays.
    Float64 [T], T at least 2.
    """
    signal = torch.cumprod(1 - betas, 0).sqrt()
    return betas_of(((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2)


def betas_of(alpha_bar: Tensor) -> Tensor:
    """The variance that each step adds, float64 [T], for shares of the image left after it."""
    return 1 - alpha_bar / _shift_right(alpha_bar, 1.0)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "linear": betas_linear,
    "cosine": betas_cosine,
    "flow": betas_flow,
}


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The noise process a network is trained for. A checkpoint is bound to it."""

    noise_schedule: str = knob(
        AUTO, "linear, cosine or flow; auto: cosine up to 64 pixels, else linear"
    )
    # Hoogeboom et al. 2023: image_size / 64 for a schedule that is right at 64 pixels.
    schedule_shift: float = knob(
        1.0, "more noise for larger pictures: divides the signal-to-noise ratio by its square"
    )
    # Lin et al. 2024: else training's last step hints at the mean colour, and sampling's does not.
    zero_terminal_snr: bool = knob(False, "scale the schedule so that its last step is noise alone")
    diffusion_steps: int = knob(1000, "steps of the process that the network is trained for")
    rescale_timesteps: bool = knob(False, "tell the network a time in 0..1000 at any step count")

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the wrong field."""
        require_choice("noise_schedule", self.noise_schedule, [AUTO, *SCHEDULES])
        least = {"cosine": 1, "flow": 1}.get(self.noise_schedule, 21)
        require(
            self.diffusion_steps >= least,
            "diffusion_steps",
            self.diffusion_steps,
            f"be at least {least} with --noise_schedule {self.noise_schedule}",
        )
        single = self.zero_terminal_snr and self.diffusion_steps == 1
        must = "be at least 2 with --zero_terminal_snr"
        require(not single, "diffusion_steps", self.diffusion_steps, must)
        # Far beyond any ratio of two sizes, and still no step without any signal or any noise.
        fits = 1e-3 <= self.schedule_shift <= 1e3
        require(fits, "schedule_shift", self.schedule_shift, "lie between 0.001 and 1000")

    def resolve(self, image_size: int) -> str:
        """The schedule's name: cosine for ``auto`` up to 64 pixels a side, linear above."""
        if self.noise_schedule != AUTO:
            return self.noise_schedule
        return "cosine" if image_size <= 64 else "linear"

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing of the image is left at the last step."""
        return self.zero_terminal_snr or self.noise_schedule == "flow"


@dataclass(frozen=True, kw_only=True)
class ProcessConfig(NoiseConfig):
    """The noise process of a network that takes noise away, and what that network predicts."""

    prediction: str = knob("eps", "what the network predicts: eps, x0, v, edm or flow")
    # Karras et al. 2022, table 1: images in [-1, 1] of natural scenes.
    sigma_data: float = knob(0.5, "with --prediction edm: standard deviation of the images")
    predict_xstart: bool = knob(False, "the older spelling of --prediction x0")
    sigma_small: bool = knob(
        False, "without --learn_sigma: the smaller fixed variance at every step count"
    )

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the wrong field."""
        super().__post_init__()
        require_choice("prediction", self.prediction, [*PREDICTIONS])
        fits = 0 < self.sigma_data < math.inf
        require(fits, "sigma_data", self.sigma_data, "be above 0 and finite")
        require(
            not self.predict_xstart or self.prediction in ("eps", "x0"),
            "prediction",
            self.prediction,
            "be x0 (or left out) when --predict_xstart is True",
        )
        hopeless = self.ends_in_noise and self.resolved_prediction == "eps"
        must = "be x0, v, edm or flow: with --zero_terminal_snr or --noise_schedule flow the last "
        must += "step is noise alone, and to name it says nothing of the image"
        require(not hopeless, "prediction", self.prediction, must)

    @property
    def resolved_prediction(self) -> str:
        """What the network predicts, whichever way it was asked for."""
        return "x0" if self.predict_xstart else self.prediction


@dataclass(frozen=True, eq=False)
class Schedule:
    """The constants of one noise process, whole or respaced.

    Attributes:
        betas: float64 [T], variance added by each step.
        alpha_bar: float64 [T], share of the image's variance that is left after each step.
        timestep_map: int64 [T], the step of the base process that each step stands for.
        base_steps: number of steps of the base process, the one the network was trained for.
    """

    betas: Tensor
    alpha_bar: Tensor
    timestep_map: Tensor
    base_steps: int

    @classmethod
    def make(
        cls, name: str, num_steps: int, *, shift: float = 1.0, zero_terminal_snr: bool = False
    ) -> Schedule:
        """The schedule called ``name`` in `SCHEDULES`, perhaps `shifted` and `zero_terminal`."""
        betas = SCHEDULES[name](num_steps)
        if shift != 1:
            betas = shifted(betas, shift)
        return cls.from_betas(zero_terminal(betas) if zero_terminal_snr else betas)

    @classmethod
    def from_betas(cls, betas: Tensor) -> Schedule:
        """A base process from its variances, each in (0, 1); the last one may be 1.

        A `ValueError` otherwise.
        """
        betas = betas.to("cpu", torch.float64)
        valid = betas.ndim == 1 and len(betas) > 0
        if not valid or not ((betas > 0).all() and (betas[:-1] < 1).all() and betas[-1] <= 1):
            raise ValueError("betas must be a vector of numbers in (0, 1), the last one in (0, 1]")
        return cls(betas, torch.cumprod(1 - betas, 0), torch.arange(len(betas)), len(betas))

    def respace(self, spec: str, spacing: str = "uniform") -> Schedule:
        """The process that visits only the steps of `spacing.choose_steps`."""
        return self.keep(choose_steps(self.alpha_bar, spec, spacing))

    def keep(self, steps: Sequence[int]) -> Schedule:
        """The process that visits only ``steps``, rising (Nichol and Dhariwal 2021, eq. 19).

        ``alpha_bar`` at the kept steps is unchanged; the variances follow from it.
        """
        kept = torch.tensor(steps)
        alpha_bar = self.alpha_bar[kept]
        return Schedule(betas_of(alpha_bar), alpha_bar, self.timestep_map[kept], self.base_steps)

    @cached_property
    def alpha_bar_prev(self) -> Tensor:
        """alpha_bar one step towards the image; 1 before step 0. Float64 [T]."""
        return _shift_right(self.alpha_bar, 1.0)

    @cached_property
    def alpha_bar_next(self) -> Tensor:
        """alpha_bar one step towards the noise; 0 after the last step. Float64 [T]."""
        return torch.cat([self.alpha_bar[1:], self.alpha_bar.new_zeros(1)])

    @cached_property
    def log_snr(self) -> Tensor:
        """log(alpha_bar / (1 - alpha_bar)), which falls with every step. Float64 [T].

        Minus infinity at a last step that is noise alone.
        """
        return torch.logit(self.alpha_bar)

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0); 0 at step 0 (Ho et al. 2020, eq. 7). Float64 [T]."""
        return self.betas * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """Its logarithm, with step 1's value at step 0, where the variance is 0. Float64 [T]."""
        if len(self.betas) == 1:  # one step alone: any finite value serves, it is never drawn from
            return self.betas.log()
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @cached_property
    def large_log_variance(self) -> Tensor:
        """Log of beta, the upper fixed variance, with the posterior's at step 0. Float64 [T]."""
        return torch.cat([self.posterior_log_variance[:1], self.betas[1:].log()])

    @cached_property
    def posterior_coef_x_0(self) -> Tensor:
        """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
        return self.betas * self.alpha_bar_prev.sqrt() / (1 - self.alpha_bar)

    @cached_property
    def posterior_coef_x_t(self) -> Tensor:
        """Weight of x_t in the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
        return (1 - self.alpha_bar_prev) * (1 - self.betas).sqrt() / (1 - self.alpha_bar)

    @cached_property
    def h(self) -> Tensor:
        """Half log-SNR that the step from t to t - 1 gains; infinite at step 0. Float64 [T].

        Also infinite at a last step without any signal. Lu et al. 2022 call it h.
        """
        return (torch.logit(self.alpha_bar_prev) - self.log_snr) / 2

    @cached_property
    def reach(self) -> Tensor:
        """How far a gradient g moves x_0: (1 - alpha_bar) / sqrt(alpha_bar) g. Float64 [T]."""
        return (1 - self.alpha_bar) / self.alpha_bar.sqrt()

    @cached_property
    def bounded_reach(self) -> Tensor:
        """At most what moves DDIM's x_{t-1} as far as DDPM's, by Sigma g. Float64 [T].

        With eta 0 DDIM hands on a share of x_0's way: sqrt(alpha_bar_prev) (1 - e^-h). The
        bound is met where h is above 0.5 (0.28 near the image): in many steps all is as published.
        Other samplers weigh x_0 more: q(x_{t-1} | x_t, x_0) by 1 + e^-h times as much.
        """
        share = self.alpha_bar_prev.sqrt() * -torch.expm1(-self.h)
        variance = torch.cat([self.betas[:1], self.posterior_variance[1:]])
        return torch.minimum(self.reach, variance / share)


def _shift_right(table: Tensor, first: float) -> Tensor:
    """[first, table[0], ..., table[T-2]]."""
    return torch.cat([table.new_tensor([first]), table[:-1]])
