"""Samplers of training steps against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diff_dalle import keyed_noise
from diff_dalle.diffusion import timesteps
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.schedule import Schedule
from diff_dalle.diffusion.timesteps import (
    TIMESTEP_SAMPLERS,
    LossSecondMomentSampler,
    TimestepConfig,
    TimestepSampler,
    UniformSampler,
    make_timestep_sampler,
)
from diff_dalle.errors import UsageError

DIFFUSION = GaussianDiffusion(Schedule.make("cosine", 1000))
LOG_SNR = DIFFUSION.schedule.log_snr


def stratified(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return ((torch.arange(count, dtype=torch.float64) + 0.5) / count).to(dtype)


def warmed_up(num_steps: int = 50) -> LossSecondMomentSampler:
    sampler = LossSecondMomentSampler(num_steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        order = torch.randperm(num_steps, generator=generator)
        sampler.update(order, torch.rand(num_steps, generator=generator) * (order + 1))
    return sampler


@pytest.fixture(params=TIMESTEP_SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> TimestepSampler:
    made = make_timestep_sampler(TimestepConfig(schedule_sampler=request.param), DIFFUSION)
    if isinstance(made, LossSecondMomentSampler):
        for _ in range(10):
            made.update(torch.arange(1000), torch.linspace(0.1, 2.0, 1000))
    return made


def test_frequencies_are_the_probabilities(sampler: TimestepSampler) -> None:
    count = 400_000
    t, weights = sampler.sample(stratified(count))
    assert t.dtype == torch.int64 and weights.dtype == torch.float32
    assert t.shape == weights.shape == (count,)
    frequencies = torch.bincount(t, minlength=1000).double() / count
    assert float(sampler.probabilities().sum()) == pytest.approx(1)
    assert (frequencies - sampler.probabilities()).abs().max() < 2 / count


def test_the_ends_of_the_unit_interval_are_safe(sampler: TimestepSampler) -> None:
    r = torch.tensor([2.0**-24, 1 - 2.0**-24, 1.0])
    t, weights = sampler.sample(r)
    assert int(t.min()) >= 0 and int(t.max()) <= 999 and torch.isfinite(weights).all()


def test_keyed_noise_decides_the_step(sampler: TimestepSampler) -> None:
    keys = torch.tensor([5, 6, 7, 5])
    t, _ = sampler.sample(keyed_noise.uniform(keys, (), stream=0))
    alone, _ = sampler.sample(keyed_noise.uniform(keys[1:2], (), stream=0))
    assert t[0] == t[3] and t[1] == alone[0]


def test_uniform() -> None:
    t, weights = UniformSampler(4).sample(torch.tensor([0.01, 0.26, 0.5, 0.99]))
    assert t.tolist() == [0, 1, 2, 3] and weights.tolist() == [1, 1, 1, 1]


def test_second_moment_is_its_definition() -> None:
    """Nichol and Dhariwal 2021, eq. 18, over the last ten losses, with a uniform 0.001."""
    num_steps = 50
    seen: list[list[float]] = [[] for _ in range(num_steps)]
    sampler, generator = LossSecondMomentSampler(num_steps), torch.Generator().manual_seed(1)
    for _ in range(60):  # batches with repeated steps, in order
        t = torch.randint(num_steps, (40,), generator=generator)
        losses = torch.rand(40, generator=generator) * (t + 1)
        sampler.update(t, losses)
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            seen[step].append(loss)
    assert min(map(len, seen)) > 10
    root = torch.tensor([(sum(x**2 for x in s[-10:]) / 10) ** 0.5 for s in seen])
    wanted = 0.999 * root / root.sum() + 0.001 / num_steps
    torch.testing.assert_close(sampler.probabilities().float(), wanted)


def test_second_moment_is_uniform_until_every_step_has_ten_losses() -> None:
    sampler = LossSecondMomentSampler(3)
    for step, times in ((0, 12), (1, 10), (2, 9)):
        sampler.update(torch.full((times,), step), torch.full((times,), 1.0 + step))
    t, weights = sampler.sample(stratified(300))
    assert torch.bincount(t).tolist() == [100, 100, 100] and (weights == 1).all()
    sampler.update(torch.tensor([2]), torch.tensor([3.0]))
    assert sampler.probabilities()[2] > 0.49


def test_second_moment_leaves_the_expected_loss_alone() -> None:
    sampler, losses = warmed_up(), torch.rand(50, dtype=torch.float64)
    t, weights = sampler.sample(stratified(500_000))
    assert float((weights * losses[t]).mean()) == pytest.approx(float(losses.mean()), rel=1e-3)
    assert (weights.max() / weights.min()) > 5


def test_a_step_begins_where_its_share_of_the_unit_interval_does() -> None:
    r = torch.tensor([0.0, 0.25, 0.5, 0.75])
    assert LossSecondMomentSampler(4).sample(r)[0].tolist() == [0, 1, 2, 3]
    assert UniformSampler(4).sample(r)[0].tolist() == [0, 1, 2, 3]


def test_losses_that_are_not_finite_are_left_out() -> None:
    sampler = warmed_up()
    before = sampler.probabilities()
    sampler.update(torch.tensor([3, 4]), torch.tensor([float("nan"), float("inf")]))
    assert torch.equal(sampler.probabilities(), before)


def test_losses_of_zero_give_uniform_steps() -> None:
    sampler = LossSecondMomentSampler(2)
    sampler.update(torch.tensor([0, 1] * 10), torch.zeros(20))
    assert sampler.probabilities().tolist() == [0.5, 0.5]


def test_second_moment_goes_on_from_its_state() -> None:
    old, new = warmed_up(), LossSecondMomentSampler(50)
    new.load_state_dict(old.state_dict())
    for sampler in (old, new):
        sampler.update(torch.tensor([7, 7, 8]), torch.tensor([1.0, 2.0, 30.0]))
    assert torch.equal(old.probabilities(), new.probabilities())
    partly = LossSecondMomentSampler(50)
    partly.update(torch.tensor([1]), torch.tensor([2.0]))
    new.load_state_dict(partly.state_dict())
    assert new.state_dict()["counts"].sum() == 1
    with pytest.raises(ValueError, match="losses are"):
        LossSecondMomentSampler(49).load_state_dict(old.state_dict())


def by_log_snr() -> TimestepSampler:
    cfg = TimestepConfig(schedule_sampler="logsnr-normal", logsnr_uniform=0.0)
    return make_timestep_sampler(cfg, DIFFUSION)


def test_log_snr_is_normally_distributed() -> None:
    sampler = by_log_snr()
    t, weights = sampler.sample(stratified(400_000))
    drawn = LOG_SNR[t]
    assert float(drawn.mean()) == pytest.approx(-2.2, abs=0.02)
    assert float(drawn.std()) == pytest.approx(1.6, abs=0.02)
    for z in (-2.0, -1.0, -0.3, 0.0, 0.5, 1.5):
        wanted = float(torch.special.ndtr(torch.tensor(z)))
        assert float((drawn < -2.2 + 1.6 * z).double().mean()) == pytest.approx(wanted, abs=0.004)
    assert (weights == 1).all()


def test_log_snr_probabilities_are_density_times_width() -> None:
    p = by_log_snr().probabilities()
    density = torch.exp(-0.5 * ((LOG_SNR[1:-1] + 2.2) / 1.6) ** 2)
    width = (LOG_SNR[:-2] - LOG_SNR[2:]) / 2
    wanted = density * width
    torch.testing.assert_close(p[1:-1] / p[500], wanted / wanted[499], rtol=1e-9, atol=1e-30)


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_the_share_of_noise_is_logit_normal(schedule: str) -> None:
    """Esser et al. 2024, section 3.1, on the straight path's s whatever the schedule."""
    process = GaussianDiffusion(Schedule.make(schedule, 1000), prediction="flow")
    cfg = TimestepConfig(
        schedule_sampler="logit-normal", logit_mean=0.5, logit_std=0.8, logit_uniform=0.0
    )
    t, weights = make_timestep_sampler(cfg, process).sample(stratified(400_000))
    signal, sigma = process.alpha_bar.sqrt(), (1 - process.alpha_bar).sqrt()
    s = (sigma / (signal + sigma))[t]
    for share in (0.2, 0.4, 0.5, 0.7, 0.9):
        z = (math.log(share / (1 - share)) - 0.5) / 0.8
        wanted = float(torch.special.ndtr(torch.tensor(z)))
        assert float((s < share).double().mean()) == pytest.approx(wanted, abs=0.004)
    assert (weights == 1).all()


@pytest.mark.parametrize("name", ["logsnr-normal", "logit-normal"])
def test_a_step_of_noise_alone_has_the_uniform_share(name: str) -> None:
    process = GaussianDiffusion(Schedule.make("flow", 100), prediction="flow")
    p = make_timestep_sampler(TimestepConfig(schedule_sampler=name), process).probabilities()
    assert float(p.sum()) == pytest.approx(1) and float(p[-1]) == pytest.approx(0.001)
    assert (p > 0.00099).all()


@pytest.mark.parametrize("mean", [-90.0, 80.0, math.inf])
def test_a_density_beyond_the_schedule_is_refused(mean: float) -> None:
    cfg = TimestepConfig(schedule_sampler="logsnr-normal", logsnr_mean=mean, logsnr_std=0.5)
    with pytest.raises(UsageError, match=r"--logsnr_mean is .* log-SNR \(-19.8 to 10.1\)"):
        make_timestep_sampler(cfg, DIFFUSION)


@pytest.mark.parametrize("name", ["logsnr-normal", "logit-normal"])
def test_a_process_of_noise_alone_has_no_density(name: str) -> None:
    process = GaussianDiffusion(Schedule.make("flow", 1), prediction="flow")
    with pytest.raises(UsageError, match=f"--schedule_sampler {name} finds noise alone"):
        make_timestep_sampler(TimestepConfig(schedule_sampler=name), process)


def test_the_other_density_names_its_own_knob() -> None:
    cfg = TimestepConfig(schedule_sampler="logit-normal", logit_mean=90.0)
    with pytest.raises(UsageError, match=r"--logit_mean is 90.0.* \(-5.0 to 9.9\).*--logit_std 1"):
        make_timestep_sampler(cfg, DIFFUSION)


def test_a_density_is_summed_once_for_each_device_and_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler, r = by_log_snr(), stratified(100)
    first, _ = sampler.sample(r)
    sampler.sample(r.float())

    def never(probabilities: Tensor, r: Tensor) -> Tensor:
        raise AssertionError("copied again")

    monkeypatch.setattr(timesteps, "_cumulative", never)
    again, _ = sampler.sample(r)
    assert torch.equal(first, again)
    sampler.sample(r.float())
    with pytest.raises(AssertionError, match="copied again"):
        sampler.sample(r.to("meta"))


def test_a_uniform_share_trains_every_step() -> None:
    pure = by_log_snr().probabilities()
    cfg = TimestepConfig(schedule_sampler="logsnr-normal", logsnr_uniform=0.2)
    mixed = make_timestep_sampler(cfg, DIFFUSION).probabilities()
    torch.testing.assert_close(mixed, 0.8 * pure + 0.2 / 1000)
    assert pure.min() < 1e-8 and mixed.min() >= 0.2 / 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule_sampler", "lognormal"),
        ("logsnr_std", 0.0),
        ("logsnr_uniform", 1.5),
        ("logit_std", 0.0),
        ("logit_uniform", -0.1),
    ],
)
def test_a_wrong_knob_is_named(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"--{field} is "):
        TimestepConfig(**{field: value})
