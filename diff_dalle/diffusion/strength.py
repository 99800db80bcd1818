"""How strong guidance is at each step: a scale, an interval of noise levels, a schedule.

The same three shape both kinds of guidance, see `guidance.classifier_free` and
`clip_guidance.clip_gradient`. T is the number of steps of the process at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.errors import UsageError
from diff_dalle.knobs import nearest

EVERYWHERE = "all"

ScaleAt = Callable[[Tensor], Tensor]
"""Steps, or what a network is told of them, [B] -> scales, float64 [B] on the CPU."""


def _constant(noisiness: Tensor) -> Tensor:
    """1 at every step: Ho and Salimans 2022."""
    return torch.ones_like(noisiness)


def _linear(noisiness: Tensor) -> Tensor:
    """2 (1 - tau): nearly 0 where noise is total, nearly 2 at the image (Wang et al. 2024)."""
    return 2 * (1 - noisiness)


def _cosine(noisiness: Tensor) -> Tensor:
    """1 + cos(pi tau): as linear, but flat at both ends (Wang et al. 2024)."""
    return 1 + torch.cos(math.pi * noisiness)


SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}
"""From tau = (t + 1/2) / T, float64 [T] in (0, 1), to factors [T] whose mean is 1."""


def step_scales(
    diffusion: GaussianDiffusion, scale: float, *, unguided: float, interval: str, schedule: str
) -> Tensor:
    """The scale of guidance at each step.

    Inside the interval it is unguided + (scale - unguided) c(tau), with c the schedule; outside
    it is ``unguided``. Every schedule has mean 1 over all steps, so that the same scale means
    as much guidance in sum (Wang et al. 2024). The interval does not move the schedule.

    Args:
        diffusion: the process, respaced to the steps that are to be taken.
        scale: of the constant schedule.
        unguided: the scale that means no guidance: 1 for classifier-free guidance, 0 for a
            gradient.
        interval: as `parse_interval` reads it; levels are sqrt((1 - alpha_bar) / alpha_bar).
        schedule: a name of `SCHEDULES`.
    Returns:
        float64 [T] on the CPU.
    """
    steps = diffusion.num_steps
    tau = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    scales = unguided + (scale - unguided) * SCHEDULES[schedule](tau)
    low, high = parse_interval(interval)
    levels = ((1 - diffusion.alpha_bar) / diffusion.alpha_bar).sqrt()
    return torch.where((levels > low) & (levels <= high), scales, unguided)


def scale_at_time(diffusion: GaussianDiffusion, scales: Tensor) -> ScaleAt:
    """Look scales up by what a network is told of a step, `GaussianDiffusion.model_time`.

    Args:
        diffusion: the process that ``scales`` [T] are of.
        scales: from `step_scales`. A time between two steps has the scale of the nearest.
    """
    times = diffusion.model_time(torch.arange(diffusion.num_steps))  # [T]
    at_step = scale_at_step(scales)
    if _is_constant(scales):
        return at_step
    return lambda time: at_step((times[None] - time.cpu()[:, None]).abs().argmin(dim=1))


def scale_at_step(scales: Tensor) -> ScaleAt:
    """Look scales [T] up by the step."""
    if _is_constant(scales):  # a look-up would wait for the device at every step
        return everywhere(float(scales[0]))
    return lambda t: scales[t.cpu()]


def everywhere(scale: float) -> ScaleAt:
    """One scale for all steps."""
    return lambda t: torch.full((len(t),), scale, dtype=torch.float64)


def _is_constant(scales: Tensor) -> bool:
    return bool((scales == scales[0]).all())


def parse_interval(text: str, flag: str = "guidance_interval") -> tuple[float, float]:
    """The noise levels between which there is guidance: LOW < sigma <= HIGH.

    >>> parse_interval("0.3,inf")
    (0.3, inf)

    Args:
        text: ``LOW,HIGH``, or ``all``.
        flag: what an error calls it.
    Raises:
        UsageError: no two numbers, a negative one, or LOW not below HIGH.
    """
    if text == EVERYWHERE:
        return 0.0, math.inf
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 <= low < high:
        raise UsageError(
            f"--{flag} is {text!r}: give noise levels LOW,HIGH with 0 <= LOW < HIGH "
            f"(0.3,5 or 0.3,inf), or {EVERYWHERE}"
        )
    return low, high


def check_schedule(name: str, flag: str = "guidance_schedule") -> None:
    """Raise a `UsageError` unless ``name`` is one of `SCHEDULES`."""
    if name not in SCHEDULES:
        hint = nearest(name, SCHEDULES)
        raise UsageError(f"--{flag} is {name!r}: it must be one of {', '.join(SCHEDULES)}{hint}")
