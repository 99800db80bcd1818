"""The Gaussian diffusion process: adding noise, and one step of taking it away.

Every function takes a step index ``t`` for each sample, int64 [B], counted in this process (which
may be respaced). Images are [B,C,H,W] in [-1, 1]. Symbols: docs/notation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diff_dalle.diffusion.predictions import PREDICTIONS, Prediction
from diff_dalle.diffusion.schedule import Schedule

VARIANCES = ("learned_range", "fixed_small", "fixed_large")

Clip = bool | Callable[[Tensor], Tensor]
"""What happens to an estimate of x_0: nothing, a clamp to [-1, 1], or a function of it."""


@dataclass(frozen=True)
class Posterior:
    """A Gaussian over x_{t-1}, and the estimate of the clean image that it rests on.

    Attributes:
        mean: [B,C,H,W].
        log_var: [B,C,H,W], natural logarithm of the variance.
        x_0: [B,C,H,W].
    """

    mean: Tensor
    log_var: Tensor
    x_0: Tensor


class GaussianDiffusion:
    """A noise process together with what its network predicts.

    Attributes:
        schedule: the tables.
        prediction: what the network predicts, a name of `predictions.PREDICTIONS`.
        variance: "learned_range" (the network outputs 2C channels, the second half of which
            places the log-variance between the two fixed ones), "fixed_small", "fixed_large".
        rescale_timesteps: whether the network is told a time in 0..1000 at any step count.
        sigma_data: standard deviation of the images, read by the prediction "edm" alone.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        prediction: str = "eps",
        variance: str = "learned_range",
        rescale_timesteps: bool = False,
        sigma_data: float = 0.5,
    ) -> None:
        """See the attributes.

        A `ValueError` for an unknown ``prediction`` or ``variance``, and for the prediction "eps"
        where the last step holds noise alone: there it says nothing of the image.
        """
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {prediction!r}: it must be one of {[*PREDICTIONS]}")
        if variance not in VARIANCES:
            raise ValueError(f"variance is {variance!r}: it must be one of {VARIANCES}")
        self.schedule = schedule
        self.prediction = prediction
        self.variance = variance
        self.rescale_timesteps = rescale_timesteps
        self.sigma_data = sigma_data
        self._tables = _tables(schedule)
        signal, sigma = self._tables["signal"], self._tables["sigma"]
        predicted = PREDICTIONS[prediction](signal, sigma, sigma_data)
        if (predicted.divisor == 0).any():
            raise ValueError(f"prediction is {prediction!r}: the last step holds noise alone")
        self._tables |= _prediction_tables(predicted)
        self._on_device: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def num_steps(self) -> int:
        """T, the number of steps."""
        return len(self.schedule.betas)

    @property
    def alpha_bar(self) -> Tensor:
        """Float64 [T] on the CPU."""
        return self.schedule.alpha_bar

    def respace(self, spec: str, spacing: str = "uniform") -> GaussianDiffusion:
        """The same process over fewer steps, see `spacing.choose_steps`."""
        return self._over(self.schedule.respace(spec, spacing))

    def keep(self, steps: Sequence[int]) -> GaussianDiffusion:
        """The same process over ``steps``, rising."""
        return self._over(self.schedule.keep(steps))

    def _over(self, schedule: Schedule) -> GaussianDiffusion:
        return GaussianDiffusion(
            schedule,
            prediction=self.prediction,
            variance=self.variance,
            rescale_timesteps=self.rescale_timesteps,
            sigma_data=self.sigma_data,
        )

    # Time

    def model_time(self, t: Tensor) -> Tensor:
        """What the network is told: the base step, int64 [B], or float32 [B] in 0..1000."""
        base = self._lookup("timestep_map", t.device, torch.int64)[t]
        return base.float() * (1000 / self.schedule.base_steps) if self.rescale_timesteps else base

    def nearest_step(self, alpha_bar: Tensor) -> Tensor:
        """The steps whose noise level lies nearest, in log-SNR.

        With it a network trained on another schedule is asked at the right level, see
        `clip_guidance.time_of_other_process`.

        Args:
            alpha_bar: [B] in [0, 1].
        Returns:
            int64 [B] on the device of ``alpha_bar``; the least or most noisy step for levels
            that this process does not reach.
        """
        dtype = torch.promote_types(alpha_bar.dtype, torch.float32)
        # Noise alone lies far from every other step, but not infinitely: differences are taken.
        farthest = torch.finfo(dtype).min / 4
        table = self._lookup("log_snr", alpha_bar.device, dtype).clamp(min=farthest)  # [T], falling
        wanted = torch.logit(alpha_bar.to(dtype)).clamp(table[-1], table[0])  # [B]
        return (wanted[:, None] - table[None, :]).abs().argmin(dim=1)

    # The forward process and what is predicted

    def add_noise(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020, eq. 4)."""
        return self.at("signal", t, x_0) * x_0 + self.at("sigma", t, x_0) * eps

    def eps_from_x0(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """`add_noise` solved for eps."""
        return (x_t - self.at("signal", t, x_t) * x_0) / self.at("sigma", t, x_t)

    def model_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network is shown of x_t: scaled for "edm" and "flow", else x_t itself.

        For the generator alone: a guide is shown x_t, which is what it was trained on.
        """
        if "input_scale" not in self._tables:
            return x_t
        return self.at("input_scale", t, x_t) * x_t

    def target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should output for `add_noise` (x_0, t, eps)."""
        return self.at("target_x_0", t, x_0) * x_0 + self.at("target_eps", t, x_0) * eps

    # The backward process

    def split_output(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction [B,C,H,W] and, with learned variance, its fraction logits [B,C,H,W]."""
        channels = x_t.shape[1]
        wanted = channels * (2 if self.variance == "learned_range" else 1)
        if model_output.shape != (x_t.shape[0], wanted, *x_t.shape[2:]):
            raise ValueError(
                f"the network's output is {tuple(model_output.shape)}: variance {self.variance} "
                f"and x_t {tuple(x_t.shape)} need {wanted} channels of the same size"
            )
        if self.variance != "learned_range":
            return model_output, None
        return model_output[:, :channels], model_output[:, channels:]

    def predict_x0(
        self, model_output: Tensor, x_t: Tensor, t: Tensor, *, clip: Clip = False
    ) -> Tensor:
        """The network's estimate of the clean image; arguments as of `posterior`."""
        prediction, _ = self.split_output(model_output, x_t)
        kept = self.at("keep", t, x_t) * x_t
        x_0 = (kept + self.at("gain", t, x_t) * prediction) / self.at("divisor", t, x_t)
        return apply_clip(x_0, clip)

    def posterior(
        self, model_output: Tensor, x_t: Tensor, t: Tensor, *, clip: Clip = True
    ) -> Posterior:
        """p(x_{t-1} | x_t): the true posterior of the estimated x_0, with the model's variance.

        Args:
            model_output: [B,2C,H,W] with learned variance, else [B,C,H,W].
            x_t: [B,C,H,W].
            t: int64 [B].
            clip: see `Clip`; True clamps the estimate of x_0 to [-1, 1].
        """
        x_0 = self.predict_x0(model_output, x_t, t, clip=clip)
        mean = self.q_posterior(x_0, x_t, t).mean
        return Posterior(mean, self.log_variance(model_output, x_t, t), x_0)

    def log_variance(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Log-variance of p(x_{t-1} | x_t), [B,C,H,W].

        Learned: f log beta + (1 - f) log beta_tilde with f = (upsilon + 1) / 2 for a network output
        upsilon that is meant to lie in [-1, 1] (Nichol and Dhariwal 2021, eq. 15, where it is v).
        """
        _, logits = self.split_output(model_output, x_t)
        if logits is None:
            table = "log_small" if self.variance == "fixed_small" else "log_large"
            return self.at(table, t, x_t).expand_as(x_t)
        fraction = (logits + 1) / 2
        log_beta, log_small = self.at("log_beta", t, x_t), self.at("log_small", t, x_t)
        return fraction * log_beta + (1 - fraction) * log_small

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Posterior:
        """q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eqs. 6 and 7).

        ``log_var`` is finite at t = 0 too, where the variance is 0: step 1's stands in.
        """
        mean = self.at("coef_x_0", t, x_t) * x_0 + self.at("coef_x_t", t, x_t) * x_t
        return Posterior(mean, self.at("log_small", t, x_t).expand_as(x_t), x_0)

    # Tables

    def at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """Entries ``t`` of a table, [B,1,1,1], to multiply with an ``x`` [B,C,H,W].

        Float64 for a float64 ``x``, else float32. The names are those of `_tables`.
        """
        table = self._lookup(name, x.device, torch.promote_types(x.dtype, torch.float32))
        return per_sample(table[t], x)

    def _lookup(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (name, device, dtype)
        if key not in self._on_device:
            # The type first: some accelerators hold no float64.
            self._on_device[key] = self._tables[name].to(dtype).to(device)
        return self._on_device[key]


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Values [B] as [B,1,1,1], to multiply with an ``x`` [B,C,H,W] of any rank."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def apply_clip(x_0: Tensor, clip: Clip) -> Tensor:
    """An estimate of x_0 as ``clip`` wants it."""
    if callable(clip):
        return clip(x_0)
    return x_0.clamp(-1, 1) if clip else x_0


def _tables(schedule: Schedule) -> dict[str, Tensor]:
    """Every table that is looked up by step, each [T].

    Roots and differences are taken here, in float64: 1 - alpha_bar in float32 would lose the
    last steps' noise to rounding.
    """
    prev, here, after = schedule.alpha_bar_prev, schedule.alpha_bar, schedule.alpha_bar_next
    return {
        "timestep_map": schedule.timestep_map,
        "log_snr": schedule.log_snr,
        "signal": here.sqrt(),
        "signal_prev": prev.sqrt(),
        "signal_next": after.sqrt(),
        "sigma": (1 - here).sqrt(),
        "sigma_prev": (1 - prev).sqrt(),
        "sigma_next": (1 - after).sqrt(),
        "posterior_std": schedule.posterior_variance.sqrt(),
        "log_beta": schedule.betas.log(),
        "log_small": schedule.posterior_log_variance,
        "log_large": schedule.large_log_variance,
        "coef_x_0": schedule.posterior_coef_x_0,
        "coef_x_t": schedule.posterior_coef_x_t,
        "bounded_reach": schedule.bounded_reach,
    }


def _prediction_tables(predicted: Prediction) -> dict[str, Tensor]:
    """What turns predictions into images and back, and the share of an error that gets there."""
    tables = {
        "target_x_0": predicted.target_x_0,
        "target_eps": predicted.target_eps,
        "keep": predicted.keep,
        "gain": predicted.gain,
        "divisor": predicted.divisor,
        "x_0_per_prediction": predicted.gain / predicted.divisor,
    }
    return tables if predicted.scale is None else {**tables, "input_scale": predicted.scale}
