"""Which steps of a process sampling visits: how many, and how they are spread.

Steps count from 0, the least noisy one, and are returned in rising order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from diff_dalle.errors import UsageError
from diff_dalle.knobs import nearest, require_choice

NAMED_STEPS = {
    "fast27": "10,10,3,2,2",
    "smart27": "7,4,2,1,2,4,7",
    "smart50": "10,6,4,3,2,2,3,4,6,10",
    "smart100": "1,1,1,1,2,2,2,2,2,2,3,3,4,4,5,5,6,7,7,8,9,10,13",
    "smart185": "1,1,2,2,2,3,3,3,4,5,6,7,8,9,10,11,12,13,14,15,16,18,20",
    "super27": "1,1,1,1,1,1,1,2,5,13",
    "super40": "2,2,2,2,2,2,3,4,6,15",
    "super100": "4,4,6,6,8,8,10,10,14,30",
}
"""The lists of steps that DeepFloyd's IF publishes. They are section counts."""

UNIFORM = "uniform"
# Half log-SNR where the linear schedule of 1000 steps ends: 0.6 % of the picture is left. The
# cosine schedule goes on to -9.9, where a grid would spend a quarter of its steps on next to
# nothing.
LEAST_HALF_LOG_SNR = -5.1
# As far on the other side, where noise is below one level of an 8-bit picture. The cosine schedule
# begins just before, at 5.05. The flow schedule of 1000 steps begins at 6.9: such ones are walked
# from where the linear schedule begins, or a grid would spend steps on noise that nobody sees.
MOST_HALF_LOG_SNR, LINEAR_BEGIN = 5.1, 4.6
RHO = 7  # Karras et al. 2022, section 3


def choose_steps(alpha_bar: Tensor, spec: str, spacing: str = UNIFORM) -> list[int]:
    """The steps that a respacing keeps.

    Args:
        alpha_bar: [T] of the process to choose from, falling.
        spec: as for `space_timesteps`.
        spacing: how a count is spread, one of `SPACINGS`; whatever else ``spec`` says goes with
            "uniform" alone. One step is the last, but with "uniform" see `space_timesteps`.
    Raises:
        UsageError: the text means nothing, or so many steps do not exist.
    """
    require_choice("step_spacing", spacing, list(SPACINGS))
    if spacing != UNIFORM and not names_count(spec):
        raise UsageError(
            f"--step_spacing is {spacing!r}, but --timestep_respacing {spec!r} names its steps "
            "itself: give a count, or --step_spacing uniform"
        )
    even = space_timesteps(len(alpha_bar), spec)  # refuses what does not exist
    if spacing == UNIFORM:
        return even
    return _distinct(_UNEVEN[spacing](alpha_bar.double(), int(spec)), len(alpha_bar))


def names_count(spec: str) -> bool:
    """Whether a spec is a plain count, which any spacing can spread."""
    return spec.strip().isdecimal()


def space_timesteps(num_steps: int, spec: str) -> list[int]:
    """The steps of a spec, counts spread evenly.

    Args:
        num_steps: steps of the process to choose from.
        spec: ``""`` for all; ``"250"`` for 250 evenly spaced ones, both ends included;
            ``"10,15,20"`` for so many in each of three equal sections; ``"ddim25"`` for 25 at a
            fixed integer stride from step 0 (Song et al. 2021); a name of `NAMED_STEPS`. A count
            of 1 is its section's first step, as in guided-diffusion: ``"1"`` is step 0 alone, and
            sampling would take pure noise for the least noisy image.
    Raises:
        UsageError: the text means nothing, or so many steps do not exist.
    """
    if spec == "":
        return list(range(num_steps))
    counts = NAMED_STEPS.get(spec, spec).removeprefix("ddim").split(",")
    if not all(count.strip().isdecimal() for count in counts):
        must = "be a count (250), counts (10,15,20), ddimN (ddim25) or a list's name (smart50)"
        raise _spec_error(spec, must + nearest(spec, NAMED_STEPS))
    if spec.startswith("ddim"):
        return _stride(num_steps, spec)
    return _sections(num_steps, [int(count) for count in counts], spec)


def _stride(num_steps: int, spec: str) -> list[int]:
    """Steps 0, s, 2s, ... for the integer stride s that gives the wanted number of them."""
    by_count = {len(range(0, num_steps, s)): s for s in range(num_steps, 0, -1)}
    wanted = spec.removeprefix("ddim")
    if "," in wanted or int(wanted) not in by_count:
        near = sorted(by_count, key=lambda n: abs(n - int(wanted.split(",")[0])))[:2]
        choices = " or ".join(f"ddim{n}" for n in sorted(near))
        raise _spec_error(
            spec, f"be a count that an integer stride over {num_steps} steps gives, as {choices}"
        )
    return list(range(0, num_steps, by_count[int(wanted)]))


def _sections(num_steps: int, counts: list[int], spec: str) -> list[int]:
    """``counts[i]`` evenly spaced steps in section i, both its ends included; 1 is its first."""
    size, extra = divmod(num_steps, len(counts))
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        length = size + (1 if i < extra else 0)
        if count > length:
            raise _spec_error(spec, f"ask for at most {length} steps in section {i + 1}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # A running sum, not a product: the field's checkpoints were sampled at these steps.
        positions = itertools.accumulate(itertools.repeat(stride, max(count - 1, 0)), initial=0.0)
        kept += [start + round(position) for position in positions][:count]
        start += length
    if not kept:
        raise _spec_error(spec, "keep at least one step")
    return kept


def _spec_error(spec: str, must: str) -> UsageError:
    return UsageError(f"--timestep_respacing is {spec!r}: it must {must} (--steps is the same)")


# Spacings: (alpha_bar float64 [T], count) -> steps in order, perhaps some of them twice


def _quadratic(alpha_bar: Tensor, count: int) -> list[int]:
    """Steps that grow as i^2: denser near the image (Song et al. 2021, appendix D.2)."""
    last = len(alpha_bar) - 1
    if count == 1:
        return [last]
    return [round(last * (i / (count - 1)) ** 2) for i in range(count)]


def _karras(alpha_bar: Tensor, count: int) -> list[int]:
    """Even in sigma^(1/7), sigma = sqrt((1 - alpha_bar) / alpha_bar) (Karras et al., eq. 5)."""

    def even(first: float, last: float, count: int) -> Tensor:
        start, end = math.exp(-first / RHO), math.exp(-last / RHO)
        return -RHO * torch.linspace(start, end, count, dtype=torch.float64).log()

    return _by_noise(alpha_bar, count, even)


def _logsnr(alpha_bar: Tensor, count: int) -> list[int]:
    """Even in log-SNR (Lu et al. 2022, section 5.3)."""

    def even(first: float, last: float, count: int) -> Tensor:
        return torch.linspace(first, last, count, dtype=torch.float64)

    return _by_noise(alpha_bar, count, even)


def _by_noise(
    alpha_bar: Tensor, count: int, levels: Callable[[float, float, int], Tensor]
) -> list[int]:
    """The steps nearest to ``levels`` of half log-SNR, from step 0 to the last step.

    A process that goes on beyond `LEAST_HALF_LOG_SNR` takes its last step and then those levels;
    one that begins beyond `MOST_HALF_LOG_SNR` takes no step before `LINEAR_BEGIN`.
    """
    last = len(alpha_bar) - 1
    if count == 1:
        return [last]
    table = torch.logit(alpha_bar) / 2  # [T], falling; -inf where no signal is left
    beyond = float(table[-1]) < LEAST_HALF_LOG_SNR
    begin, end = float(table[0]), max(float(table[-1]), LEAST_HALF_LOG_SNR)
    if begin > MOST_HALF_LOG_SNR:
        begin = LINEAR_BEGIN
    wanted = levels(begin, end, count - 1 if beyond else count)
    steps = (wanted[:, None] - table[None, :]).abs().argmin(dim=1).tolist()
    return [*steps, last] if beyond else steps


def _distinct(steps: list[int], num_steps: int) -> list[int]:
    """Strictly rising, each moved no further than that takes."""
    rising = list(itertools.accumulate(steps, lambda before, step: max(before + 1, step)))
    spare = num_steps - len(steps)
    return [min(step, spare + i) for i, step in enumerate(rising)]


_UNEVEN: dict[str, Callable[[Tensor, int], list[int]]] = {
    "quadratic": _quadratic,
    "karras": _karras,
    "logsnr": _logsnr,
}

SPACINGS = (UNIFORM, *_UNEVEN)
"""How a count of steps may be spread."""
