"""What a network may be asked to predict. One function a prediction, one line in `PREDICTIONS`.

Given x_t every prediction is an affine function of the clean image, so one table a prediction
says everything: what the network should answer, what its answer says of the image, how x_t is
scaled before the network sees it. With it a prediction works on every schedule, with every sampler
and with a learned variance. Symbols: docs/notation.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The relation of a prediction p to x_0, eps and x_t, one number a step: float64 [T] each.

    Attributes:
        target_x_0: p = target_x_0 * x_0 + target_eps * eps.
        target_eps: see ``target_x_0``.
        keep: x_0 = (keep * x_t + gain * p) / divisor.
        gain: see ``keep``.
        divisor: see ``keep``; 0 where p says nothing of x_0.
        scale: the network sees scale * x_t; None: x_t itself.
    """

    target_x_0: Tensor
    target_eps: Tensor
    keep: Tensor
    gain: Tensor
    divisor: Tensor
    scale: Tensor | None = None


def eps(signal: Tensor, sigma: Tensor, sigma_data: float) -> Prediction:
    """The noise: x_0 = (x_t - sigma eps) / signal (Ho et al. 2020, eq. 4)."""
    none, one = torch.zeros_like(signal), torch.ones_like(signal)
    return Prediction(target_x_0=none, target_eps=one, keep=one, gain=-sigma, divisor=signal)


def x0(signal: Tensor, sigma: Tensor, sigma_data: float) -> Prediction:
    """The image itself (Salimans and Ho 2022, section 4)."""
    none, one = torch.zeros_like(signal), torch.ones_like(signal)
    return Prediction(target_x_0=one, target_eps=none, keep=none, gain=one, divisor=one)


def v(signal: Tensor, sigma: Tensor, sigma_data: float) -> Prediction:
    """v = signal eps - sigma x_0, so x_0 = signal x_t - sigma v (Salimans and Ho 2022)."""
    one = torch.ones_like(signal)
    return Prediction(target_x_0=-sigma, target_eps=signal, keep=signal, gain=-sigma, divisor=one)


def edm(signal: Tensor, sigma: Tensor, sigma_data: float) -> Prediction:
    """F of D = c_skip x + c_out F(c_in x) (Karras et al. 2022, eq. 7 and table 1).

    There x = x_0 + s eps: here that is x_t / signal, with s = sigma / signal. Multiplied out with
    root^2 = sigma^2 + sigma_data^2 signal^2, nothing divides by signal, which may be 0: c_in x is
    x_t / root, c_skip x is sigma_data^2 signal x_t / root^2, c_out is sigma sigma_data / root.
    """
    root = torch.sqrt(sigma**2 + (sigma_data * signal) ** 2)
    return Prediction(
        target_x_0=sigma / (root * sigma_data),
        target_eps=-sigma_data * signal / root,
        keep=sigma_data**2 * signal / root**2,
        gain=sigma * sigma_data / root,
        divisor=torch.ones_like(signal),
        scale=1 / root,
    )


def flow(signal: Tensor, sigma: Tensor, sigma_data: float) -> Prediction:
    """u = eps - x_0, the velocity of a straight path (Liu et al. 2022; Esser et al. 2024).

    The network sees the point (1 - s) x_0 + s eps of that path, which is x_t / (signal + sigma)
    at s = sigma / (signal + sigma); from there x_0 is s u away.
    """
    one, both = torch.ones_like(signal), signal + sigma
    return Prediction(
        target_x_0=-one, target_eps=one, keep=one, gain=-sigma, divisor=both, scale=1 / both
    )


PREDICTIONS: dict[str, Callable[[Tensor, Tensor, float], Prediction]] = {
    "eps": eps,
    "x0": x0,
    "v": v,
    "edm": edm,
    "flow": flow,
}
"""By name: (signal, sigma, the data's standard deviation) -> tables."""
