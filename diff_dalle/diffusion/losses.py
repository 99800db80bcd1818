"""Training losses, one number a sample.

They take the network's output, not the network, so that wrappers (DDP, autocast) stay outside.
All arithmetic is float32 at least. Symbols: docs/notation.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.knobs import knob


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised."""

    use_kl: bool = knob(False, "minimise the variational bound alone, in bits, times the steps")
    rescale_learned_sigmas: bool = knob(False, "scale the variance's loss by the steps / 1000")


@dataclass(frozen=True)
class LossTerms:
    """Per-sample losses.

    Attributes:
        loss: [B], what to minimise.
        mse: [B], the squared error's share of it; None where it has none (``use_kl``).
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

    Squared error of the prediction (Ho et al. 2020, eq. 14) and, where the variance is learned,
    the variational term, which trains the variance alone: it sees a detached mean (Nichol and
    Dhariwal 2021, eq. 16). ``cfg.use_kl`` gives the variational bound in place of both.

    Args:
        diffusion: the process.
        model_output: [B,2C,H,W] with learned variance, else [B,C,H,W]; any float type.
        x_0: [B,C,H,W] clean images.
        x_t: [B,C,H,W] what the network saw.
        t: int64 [B].
        noise: [B,C,H,W], the noise in ``x_t``.
        cfg: which terms, and their scale.
    """
    model_output = model_output.to(torch.promote_types(model_output.dtype, torch.float32))
    if cfg.use_kl:
        vb = vb_terms_bpd(diffusion, model_output, x_0, x_t, t) * diffusion.num_steps
        return LossTerms(vb, None, vb)

    prediction, logits = diffusion.split_output(model_output, x_t)
    mse = _mean_per_sample((diffusion.target(x_0, t, noise) - prediction) ** 2)
    if logits is None:
        return LossTerms(mse, mse, None)

    frozen = torch.cat([prediction.detach(), logits], dim=1)  # [B,2C,H,W]
    vb = vb_terms_bpd(diffusion, frozen, x_0, x_t, t)
    if cfg.rescale_learned_sigmas:
        vb = vb * (diffusion.num_steps / 1000)
    return LossTerms(mse + vb, mse, vb)


def vb_terms_bpd(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
) -> Tensor:
    """One term of the variational bound, bits per dimension, [B] (Ho et al. 2020, eq. 5).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x_0 | x_1) at t = 0.
    """
    true = diffusion.q_posterior(x_0, x_t, t)
    model = diffusion.posterior(model_output, x_t, t, clip=False)
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
