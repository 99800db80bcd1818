"""Training losses, one number a sample.

They take the network's output, not the network, so that wrappers (DDP, autocast) stay outside.
All arithmetic is float32 at least. Symbols: docs/notation.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import Clip, GaussianDiffusion
from diff_dalle.knobs import knob, require, require_choice

UNIFORM = "uniform"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised."""

    use_kl: bool = knob(False, "minimise the variational bound alone, in bits, times the steps")
    rescale_learned_sigmas: bool = knob(False, "scale the variance's loss by the steps / 1000")
    loss_weighting: str = knob(
        UNIFORM, "weight of the squared error at each noise level: uniform, min-snr or sigmoid"
    )
    min_snr_gamma: float = knob(5.0, "min-snr: signal-to-noise ratio above which x_0 gains nothing")
    sigmoid_bias: float = knob(2.0, "sigmoid: log-SNR at which an error of eps weighs one half")

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the wrong field."""
        require_choice("loss_weighting", self.loss_weighting, [UNIFORM, *WEIGHTINGS])
        weighted = self.loss_weighting != UNIFORM
        must = "be uniform with --use_kl: the bound has weights of its own"
        require(not (self.use_kl and weighted), "loss_weighting", self.loss_weighting, must)
        require(self.min_snr_gamma > 0, "min_snr_gamma", self.min_snr_gamma, "be above 0")
        finite = math.isfinite(self.sigmoid_bias)
        require(finite, "sigmoid_bias", self.sigmoid_bias, "be finite")


def min_snr(log_snr: Tensor, cfg: LossConfig) -> Tensor:
    """min(SNR, gamma) (Hang et al. 2023)."""
    return log_snr.exp().clamp(max=cfg.min_snr_gamma)


def sigmoid(log_snr: Tensor, cfg: LossConfig) -> Tensor:
    """SNR sigmoid(bias - log SNR) (Kingma and Gao 2023; Hoogeboom et al. 2024).

    Theirs is a density over log-SNR. Here it weighs the steps that training visits: how many of
    them a range of log-SNR has is the schedule's and the timestep sampler's to say.
    """
    return log_snr.exp() * torch.sigmoid(cfg.sigmoid_bias - log_snr)


WEIGHTINGS: dict[str, Callable[[Tensor, LossConfig], Tensor]] = {
    "min-snr": min_snr,
    "sigmoid": sigmoid,
}
"""By name: (log-SNR, knobs) -> the weight of a squared error of x_0, elementwise."""


@dataclass(frozen=True)
class LossTerms:
    """Per-sample losses.

    Attributes:
        loss: [B], what to minimise.
        mse: [B], the squared error of the prediction, before its weight; None where it has no
            part in the loss (``use_kl``).
        vb: [B], the variational term's share of it; None where it has none (fixed variance).
    """

    loss: Tensor
    mse: Tensor | None
    vb: Tensor | None


def training_losses(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    cfg: LossConfig,
) -> LossTerms:
    """The loss of a network that saw ``x_t`` and answered ``model_output``.

    Squared error of the prediction (Ho et al. 2020, eq. 14), times its `loss_weight`, and, where
    the variance is learned, the variational term, which trains the variance alone: it sees a
    detached mean (Nichol and Dhariwal 2021, eq. 16). ``cfg.use_kl`` gives the variational bound
    in place of both.

    Args:
        diffusion: the process.
        model_output: [B,2C,H,W] with learned variance, else [B,C,H,W]; any float type.
        x_0: [B,C,H,W] clean images.
        x_t: [B,C,H,W] what the network saw.
        t: int64 [B].
        noise: [B,C,H,W], the noise that the network is asked for; ``x_t`` may hold more.
        cfg: which terms, and their scale.
    """
    model_output = model_output.to(torch.promote_types(model_output.dtype, torch.float32))
    if cfg.use_kl:
        vb = vb_terms_bpd(diffusion, model_output, x_0, x_t, t) * diffusion.num_steps
        return LossTerms(vb, None, vb)

    prediction, logits = diffusion.split_output(model_output, x_t)
    mse = _mean_per_sample((diffusion.target(x_0, t, noise) - prediction) ** 2)
    weighted = mse
    if cfg.loss_weighting != UNIFORM:
        weighted = mse * loss_weight(diffusion, mse, t, cfg)
    if logits is None:
        return LossTerms(weighted, mse, None)

    frozen = torch.cat([prediction.detach(), logits], dim=1)  # [B,2C,H,W]
    vb = vb_terms_bpd(diffusion, frozen, x_0, x_t, t)
    if cfg.rescale_learned_sigmas:
        vb = vb * (diffusion.num_steps / 1000)
    return LossTerms(weighted + vb, mse, vb)


def loss_weight(diffusion: GaussianDiffusion, like: Tensor, t: Tensor, cfg: LossConfig) -> Tensor:
    """Weight of a squared error of the prediction, for a weighting other than uniform.

    Weightings are stated for x_0. Given x_t, x_0 is affine in the prediction, so an error of it
    is that of x_0 divided by a slope: sigma / signal for eps, sigma for v, c_out for edm, s for
    flow. The weight of the prediction's squared error is that of x_0 times the slope squared,
    which gives the published weights of eps and v (Hang et al. 2023).

    Args:
        diffusion: the process.
        like: [B]; the weights have its type and device.
        t: int64 [B].
        cfg: which weighting, and its knobs.
    Returns:
        [B].
    """
    slope = diffusion.at("x_0_per_prediction", t, like)
    return WEIGHTINGS[cfg.loss_weighting](diffusion.at("log_snr", t, like), cfg) * slope**2


def image_error(
    diffusion: GaussianDiffusion, model_output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """Squared error of the image that samplers would read from the output, clipped, [B].

    In the same unit whatever is predicted and however it is weighted.
    """
    model_output = model_output.to(torch.promote_types(model_output.dtype, torch.float32))
    found = diffusion.predict_x0(model_output, x_t, t, clip=True)
    return _mean_per_sample((found - x_0) ** 2)


def vb_terms_bpd(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    clip: Clip = False,
) -> Tensor:
    """One term of the variational bound, bits per dimension, [B] (Ho et al. 2020, eq. 5).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x_0 | x_1) at t = 0.
    ``clip`` is what happens to the estimate of x_0, see `gaussian.Clip`.
    """
    true = diffusion.q_posterior(x_0, x_t, t)
    model = diffusion.posterior(model_output, x_t, t, clip=clip)
    kl = normal_kl(true.mean, true.log_var, model.mean, model.log_var)  # [B,C,H,W]
    nll = -discretized_gaussian_log_likelihood(x_0, model.mean, 0.5 * model.log_var)
    nats = torch.where(t == 0, _mean_per_sample(nll), _mean_per_sample(kl))  # [B]
    return nats / math.log(2)


def normal_kl(mean_1: Tensor, log_var_1: Tensor, mean_2: Tensor, log_var_2: Tensor) -> Tensor:
    """KL(N_1 || N_2) of independent Gaussians, in nats, elementwise."""
    return 0.5 * (
        log_var_2
        - log_var_1
        + torch.exp(log_var_1 - log_var_2)
        + (mean_1 - mean_2) ** 2 * torch.exp(-log_var_2)
        - 1
    )


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of an 8-bit image under a Gaussian (Ho et al. 2020, eq. 13).

    Args:
        x: images whose 256 levels are mapped to [-1, 1]; the two end levels take the tails.
        mean: like ``x``.
        log_std: like ``x``, logarithm of the standard deviation.
    Returns:
        Like ``x``, in nats.
    """
    half_level = 1 / 255
    scale = torch.exp(-log_std)
    cdf_above = _normal_cdf(scale * (x - mean + half_level))
    cdf_below = _normal_cdf(scale * (x - mean - half_level))
    inside = torch.where(x < -0.999, cdf_above, cdf_above - cdf_below)
    return torch.where(x > 0.999, 1 - cdf_below, inside).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation that the field's bits per dimension are measured with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean_per_sample(x: Tensor) -> Tensor:
    """Mean over all but the first axis, [B]."""
    return x.flatten(1).mean(dim=1)
