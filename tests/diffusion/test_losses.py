"""Losses against torch's distributions, their definitions, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.losses import (
    LossConfig,
    LossTerms,
    discretized_gaussian_log_likelihood,
    image_error,
    loss_weight,
    normal_kl,
    training_losses,
    vb_terms_bpd,
)
from diff_dalle.diffusion.predictions import PREDICTIONS
from diff_dalle.diffusion.schedule import Schedule
from diff_dalle.errors import UsageError

T = torch.tensor([0, 1, 400, 998])


def process(
    prediction: str = "eps", variance: str = "learned_range", steps: int = 1000
) -> GaussianDiffusion:
    schedule = Schedule.make("cosine", steps)
    return GaussianDiffusion(schedule, prediction=prediction, variance=variance)


def images(seed: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, channels, 2, 2, generator=generator, dtype=torch.float64)


def losses(d: GaussianDiffusion, output: Tensor, cfg: LossConfig, t: Tensor = T) -> LossTerms:
    x_0, noise = images(10).clamp(-1, 1), images(11)
    return training_losses(d, output, x_0, d.add_noise(x_0, t, noise), t, noise, cfg)


def test_kl_is_that_of_torch() -> None:
    a, b, c, d = (images(i) for i in range(4))
    wanted = kl_divergence(Normal(a, (b / 2).exp()), Normal(c, (d / 2).exp()))
    torch.testing.assert_close(normal_kl(a, b, c, d), wanted)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, -1.0), (0.7, -4.0), (-1.2, -2.0)])
def test_the_256_levels_share_all_probability(mean: float, log_std: float) -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_probability = discretized_gaussian_log_likelihood(
        levels, torch.full_like(levels, mean), torch.full_like(levels, log_std)
    )
    assert float(log_probability.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_level_probabilities_are_those_of_a_gaussian() -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, std = torch.full_like(levels, 0.1), torch.full_like(levels, 0.3)
    found = discretized_gaussian_log_likelihood(levels, mean, std.log()).exp()
    normal = Normal(mean, std)
    wanted = normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)
    wanted[0], wanted[-1] = normal.cdf(levels + 1 / 255)[0], 1 - normal.cdf(levels - 1 / 255)[-1]
    # The field's cumulative distribution is approximate, off by 3e-4 at most.
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=2e-4)


def test_improbable_levels_stay_finite() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    mean, log_std = torch.tensor([1.0, 1.0, -1.0]), torch.full((3,), -8.0)
    value = discretized_gaussian_log_likelihood(x, mean, log_std)
    assert torch.allclose(value, torch.tensor(1e-12).log())
    assert torch.isfinite(torch.autograd.grad(value.sum(), x)[0]).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_squared_error_of_the_target(prediction: str, variance: str) -> None:
    d = process(prediction, variance)
    output = images(1, 6 if variance == "learned_range" else 3)
    x_0, noise = images(10).clamp(-1, 1), images(11)
    a = d.alpha_bar[T].reshape(-1, 1, 1, 1)
    v, root = a.sqrt() * noise - (1 - a).sqrt() * x_0, (1 - a + a / 4).sqrt()
    edm = (2 * (1 - a).sqrt() * x_0 - a.sqrt() * noise / 2) / root
    target = {"eps": noise, "x0": x_0, "v": v, "edm": edm, "flow": noise - x_0}[prediction]
    terms = losses(d, output, LossConfig())
    assert terms.mse is not None
    torch.testing.assert_close(terms.mse, ((output[:, :3] - target) ** 2).mean((1, 2, 3)))
    if variance == "fixed_small":
        assert terms.vb is None and torch.equal(terms.loss, terms.mse)
    else:
        assert terms.vb is not None and torch.equal(terms.loss, terms.mse + terms.vb)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_variational_terms_are_zero_only_for_the_true_posterior(prediction: str) -> None:
    """The lower end of the range is q's own variance; the target gives q's own mean."""
    d, x_0, noise = process(prediction), images(10).clamp(-1, 1), images(11)
    x_t, target = d.add_noise(x_0, T, noise), d.target(x_0, T, noise)
    exact = torch.cat([target, torch.full_like(noise, -1.0)], dim=1)
    found = vb_terms_bpd(d, exact, x_0, x_t, T)
    assert found[1:].abs().max() < 1e-9 and found[0] > 0
    wrong = torch.cat([target + 0.1, torch.zeros_like(noise)], dim=1)
    assert (vb_terms_bpd(d, wrong, x_0, x_t, T) > found).all()


def test_bits_per_dimension_of_the_whole_bound() -> None:
    """KL in bits a dimension, from torch, for t > 0; a level's log-probability at t = 0."""
    d, x_0, noise, output = process(), images(10).clamp(-1, 1), images(11), images(1, 6)
    x_t = d.add_noise(x_0, T, noise)
    q, p = d.q_posterior(x_0, x_t, T), d.posterior(output, x_t, T, clip=False)
    std_q, std_p = (q.log_var / 2).exp(), (p.log_var / 2).exp()
    kl = kl_divergence(Normal(q.mean, std_q), Normal(p.mean, std_p)).mean((1, 2, 3)) / math.log(2)
    found = vb_terms_bpd(d, output, x_0, x_t, T)
    torch.testing.assert_close(found[1:], kl[1:])
    levels = discretized_gaussian_log_likelihood(x_0, p.mean, p.log_var / 2)
    torch.testing.assert_close(found[0], -levels[0].mean() / math.log(2))


def test_the_variance_is_trained_without_moving_the_mean() -> None:
    output = images(1, 6).requires_grad_(True)
    terms = losses(process(), output, LossConfig())
    assert terms.mse is not None and terms.vb is not None
    (vb,) = torch.autograd.grad(terms.vb.sum(), output, retain_graph=True)
    assert torch.equal(vb[:, :3], torch.zeros_like(vb[:, :3]))
    assert (vb[1:, 3:].abs() > 0).all()
    (mse,) = torch.autograd.grad(terms.mse.sum(), output, retain_graph=True)
    (whole,) = torch.autograd.grad(terms.loss.sum(), output)
    assert torch.equal(whole, mse + vb) and (mse[:, :3].abs() > 0).all()


def test_the_bound_alone_trains_the_mean_too() -> None:
    output = images(1, 6).requires_grad_(True)
    terms = losses(process(), output, LossConfig(use_kl=True))
    assert terms.mse is None
    (gradient,) = torch.autograd.grad(terms.loss.sum(), output)
    assert (gradient[1:].abs() > 0).all()


@pytest.mark.parametrize("steps", [250, 1000, 4000])
def test_rescaling_is_by_steps_over_1000(steps: int) -> None:
    d, output, t = process(steps=steps), images(1, 6), torch.tensor([0, 1, 100, 249])
    plain = losses(d, output, LossConfig(), t)
    rescaled = losses(d, output, LossConfig(rescale_learned_sigmas=True), t)
    assert plain.vb is not None and rescaled.vb is not None and rescaled.mse is not None
    torch.testing.assert_close(rescaled.vb, plain.vb * steps / 1000)
    torch.testing.assert_close(rescaled.loss, rescaled.mse + rescaled.vb)


def test_kl_is_summed_over_the_steps() -> None:
    d, output, x_0, noise = process(), images(1, 6), images(10).clamp(-1, 1), images(11)
    found = losses(d, output, LossConfig(use_kl=True)).loss
    one = vb_terms_bpd(d, output, x_0, d.add_noise(x_0, T, noise), T)
    torch.testing.assert_close(found, 1000 * one)


def test_kl_works_with_a_fixed_variance() -> None:
    terms = losses(process(variance="fixed_large"), images(1), LossConfig(use_kl=True))
    assert terms.loss.shape == (4,) and torch.isfinite(terms.loss).all()


def weights(d: GaussianDiffusion, t: Tensor, **knobs: Any) -> Tensor:
    return loss_weight(d, torch.zeros(len(t), dtype=torch.float64), t, LossConfig(**knobs))


def test_min_snr_weights_of_the_linear_schedule() -> None:
    """With gamma 5 eps is weighed down below step 130 alone: Hang et al. 2023."""
    d, steps = GaussianDiffusion(Schedule.make("linear", 1000)), torch.arange(1000)
    found = weights(d, steps, loss_weighting="min-snr")
    assert float(found[100]) == pytest.approx(0.58570851, abs=5e-9)
    assert float(found[129]) < 1 - 1e-6
    torch.testing.assert_close(found[130:], torch.ones(870, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_of_every_prediction(gamma: float) -> None:
    """eps, x_0 and v as published; F and u by their place in D and in the straight path."""
    a = process().alpha_bar[T]
    snr, sigma = a / (1 - a), (1 / a - 1).sqrt()
    least = snr.clamp(max=gamma)
    c_out, s = sigma * 0.5 / (sigma**2 + 0.25).sqrt(), sigma / (1 + sigma)
    wanted = {
        "eps": least / snr,
        "x0": least,
        "v": least / (snr + 1),
        "edm": least * c_out**2,
        "flow": least * s**2,
    }
    for prediction in PREDICTIONS:
        found = weights(process(prediction), T, loss_weighting="min-snr", min_snr_gamma=gamma)
        torch.testing.assert_close(found, wanted[prediction])


def test_sigmoid_weights() -> None:
    """Kingma and Gao 2023: sigmoid(b - log SNR) for eps, one half where the log-SNR is b."""
    d, steps = GaussianDiffusion(Schedule.make("linear", 1000)), torch.arange(1000)
    found = weights(d, steps, loss_weighting="sigmoid", sigmoid_bias=-1.0)
    torch.testing.assert_close(found, torch.sigmoid(-1 - d.schedule.log_snr))
    a_half = Schedule.from_betas(torch.tensor([0.5], dtype=torch.float64))  # log-SNR 0
    for prediction, wanted in {"eps": 0.5, "x0": 0.5, "v": 0.25, "edm": 0.1, "flow": 0.125}.items():
        d = GaussianDiffusion(a_half, prediction=prediction)
        found = weights(d, torch.tensor([0]), loss_weighting="sigmoid", sigmoid_bias=0.0)
        assert float(found) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("weighting", ["min-snr", "sigmoid"])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_a_weight_is_for_the_squared_error_alone(weighting: str, variance: str) -> None:
    """What is logged stays comparable, and the variational term keeps its own scale."""
    d = process("v", variance)
    output, cfg = images(1, 6 if d.variance == "learned_range" else 3), LossConfig()
    plain, found = losses(d, output, cfg), losses(d, output, LossConfig(loss_weighting=weighting))
    assert found.mse is not None and plain.mse is not None and torch.equal(found.mse, plain.mse)
    weighted = plain.mse * weights(d, T, loss_weighting=weighting)
    assert not torch.allclose(weighted, plain.mse)
    if plain.vb is None or found.vb is None:
        torch.testing.assert_close(found.loss, weighted)
    else:
        assert torch.equal(found.vb, plain.vb)
        torch.testing.assert_close(found.loss, weighted + plain.vb)


@pytest.mark.parametrize("weighting", ["min-snr", "sigmoid"])
@pytest.mark.parametrize("prediction", ["x0", "v", "edm", "flow"])
def test_weights_are_finite_where_only_noise_is_left(weighting: str, prediction: str) -> None:
    d = GaussianDiffusion(Schedule.make("flow", 10), prediction=prediction)
    found = weights(d, torch.arange(10), loss_weighting=weighting)
    assert torch.isfinite(found).all() and (found[:-1] > 0).all() and found[-1] == 0


def test_the_error_of_the_image_is_the_same_for_every_prediction() -> None:
    x_0, noise, guess = images(10).clamp(-1, 1), images(11), images(12)
    wanted = ((guess.clamp(-1, 1) - x_0) ** 2).mean((1, 2, 3))
    for prediction in PREDICTIONS:
        d = process(prediction, "fixed_small")
        x_t = d.add_noise(x_0, T, noise)
        output = d.target(guess, T, d.eps_from_x0(guess, x_t, T))
        torch.testing.assert_close(image_error(d, output, x_0, x_t, T), wanted)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("loss_weighting", {"loss_weighting": "snr"}),
        ("loss_weighting", {"loss_weighting": "min-snr", "use_kl": True}),
        ("min_snr_gamma", {"min_snr_gamma": 0.0}),
        ("sigmoid_bias", {"sigmoid_bias": float("nan")}),
    ],
)
def test_a_wrong_knob_is_named(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--{field} is "):
        LossConfig(**values)


def test_half_precision_outputs_are_scored_in_float32() -> None:
    d, x_0, noise = process(), images(10).clamp(-1, 1).float(), images(11).float()
    x_t, output = d.add_noise(x_0, T, noise), images(1, 6).half()
    half = training_losses(d, output, x_0, x_t, T, noise, LossConfig())
    full = training_losses(d, output.float(), x_0, x_t, T, noise, LossConfig())
    assert half.loss.dtype == torch.float32 and torch.equal(half.loss, full.loss)
