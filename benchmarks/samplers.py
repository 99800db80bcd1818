"""How far samplers stay from known densities, by evaluations of the network.

python benchmarks/samplers.py [--samples 8000]

The data are a mixture of two Gaussians in one dimension, whose noised scores are exact, so all
that is measured is the sampler and its steps. Errors are Wasserstein-1 times 1000: of samples
that start at the quantiles of x_T from the quantiles of x_0. Samplers that draw noise are left
with about 10 by chance at 8000 samples. Heun's method asks twice a step but at the last, so it is
given half as many steps. The last table holds the default against the ancestors' samplers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import machine
from torch import Tensor

from diff_dalle import keyed_noise
from diff_dalle.diffusion.defaults import BEST_SPACING, FAST_SAMPLER
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.samplers import SAMPLERS
from diff_dalle.diffusion.schedule import SCHEDULES, Schedule
from diff_dalle.diffusion.spacing import SPACINGS

EVALUATIONS = (6, 12, 20, 50, 100, 250)
WEIGHTS, MEANS = torch.tensor([0.35, 0.65]).double(), torch.tensor([-0.6, 0.5]).double()
STDS = {"broad": torch.tensor([0.15, 0.2]).double(), "sharp": torch.tensor([0.02, 0.03]).double()}


def network(alpha_bar: Tensor, stds: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean of x_0 given x_t, told the base step."""

    def model(x_t: Tensor, time: Tensor) -> Tensor:
        a = alpha_bar[time].reshape(-1, 1, 1, 1, 1)
        variance = a * stds**2 + 1 - a
        off = x_t[..., None] - a.sqrt() * MEANS
        share = (WEIGHTS.log() - off**2 / (2 * variance) - variance.log() / 2).softmax(-1)
        return (share * (MEANS + a.sqrt() * stds**2 / variance * off)).sum(-1)

    return model


def quantiles(count: int, alpha_bar: Tensor, stds: Tensor) -> Tensor:
    """``count`` x_t that share the probability evenly, rising, by bisection."""
    u = (torch.arange(count).double() + 0.5) / count
    std = (alpha_bar * stds**2 + 1 - alpha_bar).sqrt()
    low, high = torch.full_like(u, -10), torch.full_like(u, 10)
    for _ in range(60):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle[:, None] - alpha_bar.sqrt() * MEANS) / std) @ WEIGHTS < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def noise(step: int, x: Tensor) -> Tensor:
    return keyed_noise.normal(torch.arange(len(x)), tuple(x.shape[1:]), stream=step).to(x.dtype)


def error(name: str, schedule: Schedule, steps: int, spacing: str, stds: Tensor, n: int) -> float:
    diffusion = GaussianDiffusion(
        schedule.respace(str(steps), spacing), prediction="x0", variance="fixed_small"
    )
    x_T = quantiles(n, diffusion.alpha_bar[-1], stds).reshape(-1, 1, 1, 1)
    model = network(schedule.alpha_bar, stds)
    x_0 = SAMPLERS[name](model, x_T, diffusion, noise=noise, clip=False)
    exact = quantiles(n, torch.ones((), dtype=torch.float64), stds)
    return float((x_0.flatten().sort().values - exact).abs().mean())


def compare_default(samples: int) -> None:
    """The default against what the ancestors take, a line a density."""
    arms = [(FAST_SAMPLER, BEST_SPACING[FAST_SAMPLER], 20), ("ddim", "uniform", 100)]
    arms.append(("ddpm", "uniform", 250))
    print(f"\n| schedule, data | {' | '.join(f'{a} {n}, {s}' for a, s, n in arms)} |")
    print("|---" * (len(arms) + 1) + "|")
    for schedule in SCHEDULES:
        base = Schedule.make(schedule, 1000)
        for data, stds in STDS.items():
            row = [error(name, base, n, spacing, stds, samples) for name, spacing, n in arms]
            print(f"| {schedule}, {data} |", " | ".join(f"{1000 * e:.2f}" for e in row), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8000)
    samples = parser.parse_args().samples
    print(machine("torch"))
    for schedule in SCHEDULES:
        base = Schedule.make(schedule, 1000)
        for data, stds in STDS.items():
            print(f"\n{schedule} schedule, {data} data\n")
            print("| sampler | spacing |", " | ".join(map(str, EVALUATIONS)), "|")
            print("|---" * (len(EVALUATIONS) + 2) + "|")
            for name in SAMPLERS:
                for spacing in SPACINGS:
                    steps = [(n + 1) // 2 if name == "heun" else n for n in EVALUATIONS]
                    row = [error(name, base, n, spacing, stds, samples) for n in steps]
                    numbers = " | ".join(f"{1000 * value:.1f}" for value in row)
                    print(f"| {name} | {spacing} | {numbers} |", flush=True)
    compare_default(samples)


if __name__ == "__main__":
    main()
