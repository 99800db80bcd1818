"""Independent checks: whole samples by the schedulers of diffusers, from the same network.

Both sides take the same steps of the same process and hear the same answers. Where diffusers
keeps another convention the test says which and translates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diff_dalle import keyed_noise
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.samplers import SAMPLERS
from diff_dalle.diffusion.schedule import Schedule

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install it")

# They make arrays of the float64 tables in a way that numpy warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LINEAR = Schedule.make("linear", 1000)
KEYS = torch.arange(4)


def slowing_steps() -> list[int]:
    """Steps whose ways in log-SNR get shorter towards the image.

    On such ours extrapolate as published; elsewhere they follow the line no further than it was
    measured.
    """
    half = LINEAR.log_snr / 2
    levels = -5.0 + 6.8 * torch.linspace(0, 1, 15, dtype=torch.float64) ** 0.8
    kept = sorted(int((half - level).abs().argmin()) for level in levels)
    h = LINEAR.keep(kept).h[1:]
    assert (h[:-1] <= h[1:]).all()
    return kept


def network(x_t: Tensor, base_step: Tensor | int) -> Tensor:
    """A smooth made-up eps: [B,3,H,W] at base steps."""
    time = torch.as_tensor(base_step, dtype=x_t.dtype).reshape(-1, 1, 1, 1)
    return (0.6 + 0.3 * torch.cos(time / 300)) * x_t + 0.2 * torch.sin(2 * x_t.roll(1, -1))


def noise(step: int, x: Tensor) -> Tensor:
    return keyed_noise.normal(KEYS, tuple(x.shape[1:]), stream=step + 1).to(x.dtype)


def start() -> Tensor:
    return keyed_noise.normal(KEYS, (3, 4, 4), stream=0).double()


def ours(name: str, kept: list[int]) -> Tensor:
    diffusion = GaussianDiffusion(LINEAR.keep(kept), variance="fixed_small")
    return SAMPLERS[name](network, start(), diffusion, noise=noise, clip=False)


def scheduler(kind: str, **config: Any) -> Any:
    betas = np.asarray(LINEAR.betas)
    made = getattr(diffusers, kind)(trained_betas=betas, num_train_timesteps=1000, **config)
    # Their tables are float32 from the start; what they round is not what is compared here.
    made.alphas = 1 - LINEAR.betas
    made.alphas_cumprod = LINEAR.alpha_bar.clone()
    return made


def theirs(
    made: Any, x: Tensor, answer: Callable[[Tensor, Any], Tensor] = network, **options: Any
) -> Tensor:
    for time in made.timesteps:
        scaled = made.scale_model_input(x, time)
        x = made.step(answer(scaled, time), time, x, **options).prev_sample
    return x


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted.double(), rtol=1e-5, atol=1e-5)


def keyed_draws(monkeypatch: pytest.MonkeyPatch, module: Any, kept: list[int]) -> None:
    """Their noise is drawn inside, once a step from the noisiest; ours depends on the step."""
    steps = iter(range(len(kept) - 1, -1, -1))

    def draw(shape: tuple[int, ...], **_: object) -> Tensor:
        return noise(next(steps), torch.empty(shape, dtype=torch.float64))

    monkeypatch.setattr(module, "randn_tensor", draw)


def test_ddpm(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.schedulers import scheduling_ddpm

    kept = LINEAR.respace("20").timestep_map.tolist()
    keyed_draws(monkeypatch, scheduling_ddpm, kept)
    made = scheduler("DDPMScheduler", clip_sample=False, variance_type="fixed_small")
    made.set_timesteps(timesteps=kept[::-1])
    close(ours("ddpm", kept), theirs(made, start()))


def test_ddim() -> None:
    """Theirs reaches back by a fixed stride, as "ddim25" does."""
    made = scheduler("DDIMScheduler", clip_sample=False, timestep_spacing="leading")
    made.set_timesteps(25)
    kept = LINEAR.respace("ddim25").timestep_map.tolist()
    assert made.timesteps.tolist() == kept[::-1]
    close(ours("ddim", kept), theirs(made, start()))


@pytest.mark.parametrize(
    ("name", "algorithm"), [("dpmpp_2m", "dpmsolver++"), ("dpmpp_2m_sde", "sde-dpmsolver++")]
)
def test_dpm_solver(name: str, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs goes to sigma 0 at the end, where it is of first order too."""
    from diffusers.schedulers import scheduling_dpmsolver_multistep as module

    kept = slowing_steps()
    keyed_draws(monkeypatch, module, kept)
    made = scheduler(
        "DPMSolverMultistepScheduler",
        algorithm_type=algorithm,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    made.set_timesteps(timesteps=kept[::-1])
    made.sigmas = sigmas(kept)
    close(ours(name, kept), theirs(made, start()))


def sigmas(kept: list[int]) -> Tensor:
    """sqrt((1 - alpha_bar) / alpha_bar) from the noisiest to 0, in float64 as ours."""
    a = LINEAR.alpha_bar[kept].flip(0)
    return torch.cat([((1 - a) / a).sqrt(), a.new_zeros(1)])


def test_unipc() -> None:
    """Theirs takes no list of steps: it is put there, with the levels of noise."""
    kept = slowing_steps()
    made = scheduler(
        "UniPCMultistepScheduler", solver_order=2, solver_type="bh2", final_sigmas_type="zero"
    )
    made.set_timesteps(len(kept))
    made.timesteps, made.sigmas = torch.tensor(kept[::-1]), sigmas(kept)
    close(ours("unipc", kept), theirs(made, start()))


def test_heun() -> None:
    """Theirs walks x / sqrt(alpha_bar) and asks again at the next level before it steps there.

    Every step is shorter than h = log 2, beyond which ours takes the end's estimate alone.
    """
    kept = [step for step in LINEAR.respace("40", "logsnr").timestep_map.tolist() if step > 8]
    assert LINEAR.keep(kept).h[1:].max() < 0.69
    made = scheduler("HeunDiscreteScheduler")
    made.set_timesteps(timesteps=kept[::-1])
    levels = sigmas(kept)
    made.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
    signal = float(LINEAR.alpha_bar[-1].sqrt())
    found = theirs(made, start() / signal)
    close(ours("heun", kept), found)
