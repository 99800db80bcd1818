"""The contract of every sampler: one suite over the registry, a new one is covered when named.

Their accuracy is tested in test_exact_mixture.py, their single steps in test_published_numbers.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diff_dalle import keyed_noise
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.predictions import PREDICTIONS
from diff_dalle.diffusion.samplers import SAMPLERS, ddim_step, ddpm_step, invert_ddim, sample_ddim
from diff_dalle.diffusion.samplers.contract import flow_step
from diff_dalle.diffusion.schedule import Schedule

BASE = GaussianDiffusion(Schedule.make("cosine", 1000))
SHORT = BASE.respace("10")
KEYS = torch.tensor([3, 1, 4])


class Network(nn.Module):
    """[B,3,H,W] -> [B,6,H,W], with a parameter; remembers what it was told."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=dtype))
        self.times: list[Tensor] = []

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        self.times.append(time)
        level = torch.cos(time.to(x_t.dtype) / 1000).reshape(-1, 1, 1, 1)
        eps = self.gain * x_t * level + 0.1 * x_t.roll(1, dims=-1)
        return torch.cat([eps, torch.sin(3 * x_t)], dim=1)


def keyed(keys: Tensor, dtype: torch.dtype = torch.float64) -> Callable[[int, Tensor], Tensor]:
    return lambda step, x: keyed_noise.normal(keys, tuple(x.shape[1:]), stream=step + 1).to(dtype)


def start(keys: Tensor = KEYS, dtype: torch.dtype = torch.float64) -> Tensor:
    return keyed_noise.normal(keys, (3, 4, 4), stream=0).to(dtype)


@pytest.fixture(params=SAMPLERS)
def sample(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return SAMPLERS[request.param]


def test_result_is_like_the_noise(sample: Callable[..., Tensor]) -> None:
    x_T = start()
    kept = x_T.clone()
    x_0 = sample(Network(), x_T, SHORT, noise=keyed(KEYS))
    assert x_0.shape == x_T.shape and x_0.dtype == x_T.dtype
    assert not x_0.requires_grad and torch.isfinite(x_0).all()
    assert torch.equal(x_T, kept)


def test_the_network_is_told_base_steps(sample: Callable[..., Tensor]) -> None:
    network = Network()
    sample(network, start(), SHORT, noise=keyed(KEYS))
    told = [time.tolist() for time in network.times]
    assert told[0] == [999] * 3 and told[-1] == [0] * 3
    assert {time[0] for time in told} <= set(SHORT.schedule.timestep_map.tolist())


def test_the_network_is_told_rescaled_time(sample: Callable[..., Tensor]) -> None:
    network = Network()
    four_thousand = GaussianDiffusion(Schedule.make("cosine", 4000), rescale_timesteps=True)
    sample(network, start(), four_thousand.respace("5"), noise=keyed(KEYS))
    assert network.times[0].tolist() == [999.75] * 3


def test_noise_is_asked_for_by_step_and_never_at_step_0(sample: Callable[..., Tensor]) -> None:
    asked: list[int] = []

    def noise(step: int, x: Tensor) -> Tensor:
        asked.append(step)
        return torch.zeros_like(x)

    sample(Network(), start(), SHORT, noise=noise)
    assert 0 not in asked and len(set(asked)) == len(asked)
    assert set(asked) <= set(range(1, 10))


def test_same_noise_same_images(sample: Callable[..., Tensor]) -> None:
    a, b = (sample(Network(), start(), SHORT, noise=keyed(KEYS)) for _ in range(2))
    assert torch.equal(a, b)


def test_an_image_does_not_depend_on_its_neighbours(sample: Callable[..., Tensor]) -> None:
    together = sample(Network(), start(), SHORT, noise=keyed(KEYS))
    alone = sample(Network(), start(KEYS[1:2]), SHORT, noise=keyed(KEYS[1:2]))
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-12)


def test_the_callback_hears_of_every_step(sample: Callable[..., Tensor]) -> None:
    heard: list[tuple[int, Tensor]] = []
    x_0 = sample(
        Network(),
        start(),
        SHORT,
        noise=keyed(KEYS),
        callback=lambda step, estimate: heard.append((step, estimate)),
    )
    assert [step for step, _ in heard] == list(range(1, 11))
    assert all(estimate.abs().max() <= 1 for _, estimate in heard)
    # The last step goes to x_0 itself.
    torch.testing.assert_close(heard[-1][1], x_0)


def test_clip_is_respected(sample: Callable[..., Tensor]) -> None:
    seen: list[float] = []

    def halve(x_0: Tensor) -> Tensor:
        seen.append(float(x_0.abs().max()))
        return x_0.clamp(-0.5, 0.5)

    halved = sample(Network(), start(), SHORT, noise=keyed(KEYS), clip=halve)
    assert len(seen) >= 10 and halved.abs().max() <= 0.5
    free = sample(Network(), start(), SHORT, noise=keyed(KEYS), clip=False)
    clipped = sample(Network(), start(), SHORT, noise=keyed(KEYS))
    assert clipped.abs().max() <= 1 and not torch.equal(free, clipped)


def test_the_guide_sees_steps_of_the_sampled_process(sample: Callable[..., Tensor]) -> None:
    """Asked wherever the network is, in the same order."""
    network, steps = Network(), []

    def guide(x_t: Tensor, t: Tensor) -> Tensor:
        steps.append(t)
        return torch.full_like(x_t, 3.0)

    guided = sample(network, start(), SHORT, noise=keyed(KEYS), guide=guide, clip=False)
    plain = sample(Network(), start(), SHORT, noise=keyed(KEYS), clip=False)
    assert list(dict.fromkeys(int(t[0]) for t in steps)) == list(reversed(range(10)))
    base = SHORT.schedule.timestep_map
    assert [base[t].tolist() for t in steps] == [time.tolist() for time in network.times]
    assert steps[0].dtype == torch.int64
    assert (guided - plain).mean() > 0  # a constant upward gradient makes images brighter


def test_the_network_sees_scaled_images_and_the_guide_x_t_itself(
    sample: Callable[..., Tensor],
) -> None:
    d, shown, guided = GaussianDiffusion(SHORT.schedule, prediction="flow"), [], []

    def network(x: Tensor, time: Tensor) -> Tensor:
        shown.append(x)
        return Network()(x, time)

    def guide(x_t: Tensor, t: Tensor) -> Tensor:
        guided.append(x_t)
        return torch.zeros_like(x_t)

    sample(network, start(), d, noise=keyed(KEYS), guide=guide)
    assert torch.equal(guided[0], start())
    torch.testing.assert_close(shown[0], start() / (d._tables["signal"] + d._tables["sigma"])[-1])


def test_a_zero_gradient_changes_nothing(sample: Callable[..., Tensor]) -> None:
    guided = sample(
        Network(), start(), SHORT, noise=keyed(KEYS), guide=lambda x_t, t: torch.zeros_like(x_t)
    )
    plain = sample(Network(), start(), SHORT, noise=keyed(KEYS))
    torch.testing.assert_close(guided, plain, rtol=0, atol=1e-9)


def test_a_process_of_one_step(sample: Callable[..., Tensor]) -> None:
    x_0 = sample(Network(), start(), BASE.respace("1"), noise=keyed(KEYS))
    assert torch.isfinite(x_0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_thousand_float32_steps_stay_close_to_float64(
    sample: Callable[..., Tensor], prediction: str
) -> None:
    found = []
    d = GaussianDiffusion(BASE.schedule, prediction=prediction)
    for dtype in (torch.float32, torch.float64):
        network, x_T = Network(dtype), start(dtype=dtype)
        found.append(sample(network, x_T, d, noise=keyed(KEYS, dtype)).double())
    assert (found[0] - found[1]).abs().max() < 1 / 255


def test_half_precision_networks_are_stepped_in_float32(sample: Callable[..., Tensor]) -> None:
    def network(x_t: Tensor, time: Tensor) -> Tensor:
        return torch.cat([x_t, x_t], dim=1).bfloat16()

    noise = keyed(KEYS, torch.float32)
    assert sample(network, start(dtype=torch.float32), SHORT, noise=noise).dtype == torch.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_network_is_asked_once_a_step_but_by_heun(name: str) -> None:
    network = Network()
    SAMPLERS[name](network, start(), SHORT, noise=keyed(KEYS))
    assert len(network.times) == (19 if name == "heun" else 10)


def test_only_ancestral_and_sde_samplers_draw() -> None:
    asked: dict[str, list[int]] = {name: [] for name in SAMPLERS}
    for name, sampler in SAMPLERS.items():

        def noise(step: int, x: Tensor, name: str = name) -> Tensor:
            asked[name].append(step)
            return torch.zeros_like(x)

        sampler(Network(), start(), SHORT, noise=noise)
    assert {name for name in SAMPLERS if asked[name]} == {"ddpm", "dpmpp_2m_sde"}
    assert asked["dpmpp_2m_sde"] == list(range(9, 0, -1))


def test_a_step_that_grows_extrapolates_no_further_than_the_last() -> None:
    """Steps 5, 4, 0: the second is many times the first in log-SNR."""
    kept = GaussianDiffusion(
        SHORT.schedule.keep([0, 4, 5]), prediction="x0", variance="fixed_small"
    )
    assert kept.schedule.h[1] > 2 * kept.schedule.h[2]
    estimates = iter([0.2, 0.3, 0.4])
    seen: list[Tensor] = []

    def network(x_t: Tensor, time: Tensor) -> Tensor:
        seen.append(x_t)
        return torch.full_like(x_t, next(estimates))

    SAMPLERS["dpmpp_2m"](network, start(), kept, noise=keyed(KEYS))
    t = torch.ones(3, dtype=torch.int64)
    wanted = flow_step(kept, torch.full_like(seen[1], 0.35), seen[1], t)
    torch.testing.assert_close(seen[2], wanted)


def test_ddpm_step_adds_no_noise_at_step_0_only() -> None:
    x_t, z, t = start(), torch.ones(3, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 9])
    output = Network()(x_t, t)
    with_noise, _ = ddpm_step(SHORT, output, x_t, t, z)
    without, _ = ddpm_step(SHORT, output, x_t, t, torch.zeros_like(z))
    wanted = (0.5 * SHORT.log_variance(output, x_t, t)).exp()
    wanted[0] = 0
    torch.testing.assert_close(with_noise - without, wanted)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_noise_is_the_published_sigma(eta: float) -> None:
    """Song et al. 2021, eq. 16, in its published form."""
    a, prev = SHORT.schedule.alpha_bar, SHORT.schedule.alpha_bar_prev
    sigma = eta * ((1 - prev) / (1 - a)).sqrt() * (1 - a / prev).sqrt()
    x_t, z, t = start(), torch.ones(3, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 9])
    output = Network()(x_t, t)
    with_noise, _ = ddim_step(SHORT, output, x_t, t, z, eta=eta)
    without, _ = ddim_step(SHORT, output, x_t, t, torch.zeros_like(z), eta=eta)
    wanted = sigma[t].reshape(-1, 1, 1, 1).expand_as(z)
    torch.testing.assert_close(with_noise - without, wanted)


def test_deterministic_ddim_draws_nothing() -> None:
    def noise(step: int, x: Tensor) -> Tensor:
        raise AssertionError("asked for noise")

    sample_ddim(Network(), start(), SHORT, noise=noise)


def test_inversion_reports_its_steps() -> None:
    network, heard = Network(), []
    x_T = invert_ddim(
        network, start().clamp(-1, 1), SHORT, callback=lambda step, x_0: heard.append(step)
    )
    assert heard == list(range(1, 11)) and x_T.shape == (3, 3, 4, 4)
    told = [int(time[0]) for time in network.times]
    kept = SHORT.schedule.timestep_map.tolist()
    assert told == [kept[0], *kept[:-1]]
