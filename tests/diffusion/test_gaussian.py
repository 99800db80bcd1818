"""The forward process, what is predicted, and the posterior's variance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.predictions import PREDICTIONS
from diff_dalle.diffusion.schedule import Schedule

SCHEDULE = Schedule.make("cosine", 1000)
T = torch.tensor([0, 1, 400, 998])


def process(prediction: str = "eps", variance: str = "fixed_small") -> GaussianDiffusion:
    return GaussianDiffusion(SCHEDULE, prediction=prediction, variance=variance)


def images(seed: int, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, channels, 2, 2, generator=generator, dtype=torch.float64).to(dtype)


def test_add_noise_keeps_unit_variance_and_the_right_share_of_the_image() -> None:
    d, x_0, eps = process(), images(0), images(1)
    a = SCHEDULE.alpha_bar[T].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(d.add_noise(x_0, T, eps), a**0.5 * x_0 + (1 - a) ** 0.5 * eps)


def test_the_noise_is_found_back() -> None:
    d, x_0, eps = process(), images(0), images(1)
    x_t = d.add_noise(x_0, T, eps)
    torch.testing.assert_close(d.eps_from_x0(x_0, x_t, T), eps, rtol=1e-8, atol=1e-8)


def test_velocity_is_the_derivative_of_x_t_by_the_angle() -> None:
    """Salimans and Ho 2022: with alpha = cos(phi), sigma = sin(phi), v = d x_t / d phi."""
    d, x_0, eps = process("v"), images(0), images(1)
    phi = torch.acos(SCHEDULE.alpha_bar[T].sqrt()).reshape(-1, 1, 1, 1)
    h = 1e-6
    ahead = torch.cos(phi + h) * x_0 + torch.sin(phi + h) * eps
    behind = torch.cos(phi - h) * x_0 + torch.sin(phi - h) * eps
    torch.testing.assert_close(d.target(x_0, T, eps), (ahead - behind) / (2 * h), rtol=0, atol=1e-6)


def test_flow_is_the_derivative_along_the_straight_path_that_the_network_sees() -> None:
    """Liu et al. 2022, eq. 1: the state is (1 - s) x_0 + s eps, its velocity by s is eps - x_0."""
    d, x_0, eps = process("flow"), images(0), images(1)
    ratio = (1 / SCHEDULE.alpha_bar[T] - 1).sqrt().reshape(-1, 1, 1, 1)  # s / (1 - s)
    s = ratio / (1 + ratio)
    shown = d.model_input(d.add_noise(x_0, T, eps), T)
    torch.testing.assert_close(shown, (1 - s) * x_0 + s * eps)
    torch.testing.assert_close(d.target(x_0, T, eps), eps - x_0, rtol=0, atol=1e-12)


def test_the_edm_network_sees_and_answers_what_was_published() -> None:
    """Karras et al. 2022, table 1, at noise levels of their own: sigma = sqrt(1/alpha_bar - 1)."""
    d, x_0, eps = process("edm"), images(0), images(1)
    sigma = (1 / SCHEDULE.alpha_bar[T] - 1).sqrt().reshape(-1, 1, 1, 1)
    x = x_0 + sigma * eps
    c_skip, c_in = 0.25 / (sigma**2 + 0.25), 1 / (sigma**2 + 0.25).sqrt()
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    x_t = d.add_noise(x_0, T, eps)
    torch.testing.assert_close(d.model_input(x_t, T), c_in * x)
    torch.testing.assert_close(d.target(x_0, T, eps), (x_0 - c_skip * x) / c_out)
    answer = images(2)
    wanted = c_skip * x + c_out * answer
    torch.testing.assert_close(d.predict_x0(answer, x_t, T), wanted, rtol=1e-9, atol=1e-9)


def test_edm_numbers() -> None:
    """By hand at alpha_bar 0.5: sigma 1, c_skip 1/5, c_out 1/sqrt(5), c_in twice that."""
    schedule = Schedule.from_betas(torch.tensor([0.5]))
    d = GaussianDiffusion(schedule, prediction="edm", variance="fixed_small")
    x_t, t = torch.full((1, 1, 1, 1), 0.5**0.5, dtype=torch.float64), torch.tensor([0])
    assert float(d.model_input(x_t, t)) == pytest.approx(2 / 5**0.5, rel=1e-12)
    assert float(d.predict_x0(torch.ones_like(x_t), x_t, t)) == pytest.approx(
        0.2 + 5**-0.5, rel=1e-12
    )


def test_edm_of_data_as_wide_as_the_noise_is_the_velocity_backwards() -> None:
    d = GaussianDiffusion(SCHEDULE, prediction="edm", sigma_data=1.0)
    x_0, eps = images(0), images(1)
    torch.testing.assert_close(d.target(x_0, T, eps), -process("v").target(x_0, T, eps))
    torch.testing.assert_close(d.model_input(x_0, T), x_0)  # of unit variance as it is


@pytest.mark.parametrize("prediction", ["edm", "flow"])
def test_the_input_has_the_size_that_networks_like(prediction: str) -> None:
    """Of images with standard deviation 0.5: 1 for edm at every step, between for flow."""
    d, a = process(prediction), SCHEDULE.alpha_bar
    size = (a * 0.25 + 1 - a).sqrt()  # of x_t
    steps = torch.arange(1000)
    shown = d.model_input(size.reshape(-1, 1, 1, 1), steps).flatten()
    if prediction == "edm":
        torch.testing.assert_close(shown, torch.ones_like(shown))
    else:
        assert 0.4 < float(shown.min()) and float(shown.max()) <= 1


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_other_networks_see_x_t_itself(prediction: str) -> None:
    x_t = images(0)
    assert process(prediction).model_input(x_t, T) is x_t


def test_fewer_steps_keep_the_prediction() -> None:
    d = GaussianDiffusion(SCHEDULE, prediction="edm", sigma_data=0.3)
    short, x_t = d.respace("25"), images(0)
    t = torch.tensor([0, 1, 12, 24])
    base = short.schedule.timestep_map[t]
    assert torch.equal(short.model_input(x_t, t), d.model_input(x_t, base))


@pytest.mark.parametrize("clip", [True, False])
def test_predictions_give_the_same_posterior(clip: bool) -> None:
    x_t, guess = images(0), images(1)
    eps = process().eps_from_x0(guess, x_t, T)
    processes = [process(p) for p in PREDICTIONS]
    found = [d.posterior(d.target(guess, T, eps), x_t, T, clip=clip) for d in processes]
    for other in found[1:]:
        torch.testing.assert_close(other.mean, found[0].mean, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(other.x_0, found[0].x_0, rtol=1e-8, atol=1e-8)
        assert torch.equal(other.log_var, found[0].log_var)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_hits_its_target_finds_the_image(prediction: str) -> None:
    d, x_0, eps = process(prediction), images(0), images(1)
    x_t = d.add_noise(x_0, T, eps)
    found = d.predict_x0(d.target(x_0, T, eps), x_t, T)
    torch.testing.assert_close(found, x_0, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("logit", "variance"), [(1.0, "fixed_large"), (-1.0, "fixed_small")])
def test_learned_range_ends_at_the_fixed_variances(logit: float, variance: str) -> None:
    x_t, output = images(0), images(1)
    both = torch.cat([output, torch.full_like(output, logit)], dim=1)
    learned = process(variance="learned_range").posterior(both, x_t, T)
    fixed = process(variance=variance).posterior(output, x_t, T)
    assert learned.log_var.shape == fixed.log_var.shape == x_t.shape
    # At t = 0 beta is the learned range's upper end; the fixed one borrows the posterior's.
    torch.testing.assert_close(learned.log_var[1:], fixed.log_var[1:])
    wanted = SCHEDULE.betas[0].log() if logit == 1 else SCHEDULE.posterior_variance[1].log()
    torch.testing.assert_close(learned.log_var[0], wanted.expand(3, 2, 2))
    assert torch.equal(learned.mean, fixed.mean)


def test_learned_range_lies_between_on_a_logarithmic_scale() -> None:
    x_t = images(0)
    d = process(variance="learned_range")
    half = d.log_variance(torch.cat([x_t, torch.zeros_like(x_t)], 1), x_t, T)
    ends = SCHEDULE.betas.log() + SCHEDULE.posterior_log_variance
    torch.testing.assert_close(half[:, 0, 0, 0], ends[T] / 2)


def test_clip_may_be_a_function() -> None:
    d, x_t, output = process("x0"), images(0), images(1)
    halved = d.posterior(output, x_t, T, clip=lambda x_0: x_0 / 2)
    assert torch.equal(halved.x_0, output / 2)
    assert torch.equal(halved.mean, d.q_posterior(output / 2, x_t, T).mean)
    assert d.posterior(output, x_t, T).x_0.abs().max() == 1
    assert torch.equal(d.posterior(output, x_t, T, clip=False).x_0, output)


@pytest.mark.parametrize(("variance", "channels"), [("learned_range", 3), ("fixed_small", 6)])
def test_a_wrong_number_of_channels_is_refused(variance: str, channels: int) -> None:
    with pytest.raises(ValueError, match="channels"):
        process(variance=variance).posterior(images(0, channels), images(1), T)


@pytest.mark.parametrize("wrong", [{"prediction": "x1"}, {"variance": "learned"}])
def test_an_unknown_kind_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GaussianDiffusion(SCHEDULE, **wrong)


def test_the_network_is_told_the_base_step() -> None:
    short = process().respace("ddim25")
    assert short.num_steps == 25
    assert short.model_time(torch.tensor([0, 1, 24])).tolist() == [0, 40, 960]


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned_range"])
def test_fewer_steps_keep_the_kind_of_variance(variance: str) -> None:
    assert process(variance=variance).respace("25").variance == variance


def test_rescaled_time_runs_to_1000_at_any_step_count() -> None:
    d = GaussianDiffusion(Schedule.make("cosine", 4000), rescale_timesteps=True)
    time = d.model_time(torch.tensor([0, 2000, 3999]))
    assert time.dtype == torch.float32 and time.tolist() == [0.0, 500.0, 999.75]
    short = d.respace("2")
    assert short.model_time(torch.tensor([1])).tolist() == [999.75]


def test_nearest_step() -> None:
    d = process()
    every = torch.arange(1000)
    assert torch.equal(d.nearest_step(d.alpha_bar), every)
    assert torch.equal(d.nearest_step(d.alpha_bar.float()), every)
    assert d.nearest_step(torch.tensor([1.0, 0.0])).tolist() == [0, 999]
    short = d.respace("100")
    nearest = short.nearest_step(d.alpha_bar)
    gaps = (short.schedule.log_snr[:, None] - SCHEDULE.log_snr[None, :]).abs()
    assert torch.equal(nearest, gaps.argmin(dim=0))


def test_nearest_step_of_a_process_that_ends_in_noise() -> None:
    d = GaussianDiffusion(
        Schedule.make("linear", 1000, zero_terminal_snr=True),
        prediction="v",
        variance="fixed_small",
    )
    for table in (d.alpha_bar, d.alpha_bar.float()):
        assert torch.equal(d.nearest_step(table), torch.arange(1000))
    assert d.nearest_step(torch.tensor([1.0, 1e-12, 0.0])).tolist() == [0, 998, 999]


def test_noise_alone_gives_the_mean_that_the_network_says() -> None:
    """At alpha_bar 0 nothing of x_t is kept, and every learned variance lies in its range."""
    schedule = Schedule.make("flow", 10)
    t, x_t, answer = torch.full((4,), 9), images(0), images(1)
    for prediction, x_0 in {
        "x0": answer,
        "v": -answer,
        "edm": 0.5 * answer,
        "flow": x_t - answer,
    }.items():
        d = GaussianDiffusion(schedule, prediction=prediction)
        p = d.posterior(torch.cat([answer, answer], 1), x_t, t, clip=False)
        torch.testing.assert_close(p.x_0, x_0)
        torch.testing.assert_close(p.mean, schedule.alpha_bar[8].sqrt() * x_0)
        ends = (1 - schedule.alpha_bar[8]).log()  # and log beta, 0
        torch.testing.assert_close(p.log_var, (1 - answer) / 2 * ends)


def test_noise_that_says_nothing_of_the_image_is_no_prediction() -> None:
    with pytest.raises(ValueError, match="prediction is 'eps': the last step holds noise alone"):
        GaussianDiffusion(Schedule.make("flow", 10))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_coefficients_are_float32_at_least(given: torch.dtype, kept: torch.dtype) -> None:
    d = process()
    coefficient = d.at("sigma", T, images(0, dtype=given))
    assert coefficient.dtype == kept and coefficient.shape == (4, 1, 1, 1)
    # Rounded once, from float64: not the root of a rounded difference.
    assert torch.equal(coefficient.flatten(), (1 - SCHEDULE.alpha_bar).sqrt()[T].to(kept))


def test_half_precision_outputs_still_step_in_float32() -> None:
    d = process(variance="learned_range")
    p = d.posterior(images(0, 6, torch.float16), images(1, dtype=torch.float32), T)
    assert p.mean.dtype == p.log_var.dtype == p.x_0.dtype == torch.float32


def test_tables_are_kept_by_device_and_instance() -> None:
    first, second = process(), process()
    here = first.at("signal", T, images(0))
    meta = first.at("signal", T.to("meta"), images(0).to("meta"))
    assert meta.device.type == "meta" and here.device.type == "cpu"
    assert first._lookup("signal", here.device, here.dtype) is first._lookup(
        "signal", here.device, here.dtype
    )
    assert not second._on_device


def test_tables_first_used_in_inference_mode_serve_training() -> None:
    d, x_t = process(), images(0, dtype=torch.float32)
    output = images(1, dtype=torch.float32).requires_grad_(True)
    with torch.inference_mode():
        d.posterior(output, x_t, T)
    d.posterior(output, x_t, T).mean.sum().backward()
    assert output.grad is not None
