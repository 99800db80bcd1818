"""Guidance: directions, algebra, and what the networks are told."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff_dalle.diffusion.clip_guidance import clip_gradient, similarity, time_of_other_process
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.guidance import Model, classifier_free, rescaled, shift_mean, shift_score
from diff_dalle.diffusion.predictions import PREDICTIONS
from diff_dalle.diffusion.samplers.contract import flow_step
from diff_dalle.diffusion.schedule import Schedule

LINEAR = GaussianDiffusion(Schedule.make("linear", 1000))
COSINE = GaussianDiffusion(Schedule.make("cosine", 1000), variance="fixed_large")
T = torch.tensor([0, 300, 900])


def images(seed: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, channels, 4, 4, generator=generator, dtype=torch.float64)


class Encoder(nn.Module):
    """A small noised image encoder that remembers the time it was told."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 48, generator=generator, dtype=torch.float64))
        self.times: list[Tensor] = []

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        self.times.append(time)
        return F.normalize(torch.tanh(x_t.flatten(1)) @ self.weight.T, dim=-1)  # [B,E]


def guide_of(encoder: Encoder, scale: float = 1.0) -> tuple[Callable, Tensor]:
    text = F.normalize(torch.arange(15, dtype=torch.float64).reshape(3, 5).sin(), dim=-1)
    told = COSINE.respace("10").model_time
    return clip_gradient(encoder, similarity(text, 1.0), scale, told), text


def test_the_gradient_points_uphill() -> None:
    encoder, x = Encoder(), images(0)
    guide, text = guide_of(encoder)
    t = torch.tensor([0, 4, 9])
    before = (encoder(x, t) * text).sum(-1)
    after = (encoder(x + 0.05 * guide(x, t), t) * text).sum(-1)
    assert (after > before).all()


def test_the_gradient_is_that_of_the_scaled_similarity() -> None:
    encoder, x, t = Encoder(), images(0), torch.tensor([0, 4, 9])
    guide, text = guide_of(encoder, scale=7.0)
    found, step = guide(x, t), torch.zeros_like(x)
    step[:, 1, 2, 3] = 1e-6
    rise = ((encoder(x + step, t) - encoder(x - step, t)) * text).sum(-1) * 7 / 2e-6
    torch.testing.assert_close(found[:, 1, 2, 3], rise, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(guide_of(encoder, scale=-7.0)[0](x, t), -found)


def test_guides_work_where_gradients_are_off_and_leave_the_encoder_alone() -> None:
    encoder, x = Encoder(), images(0)
    guide, _ = guide_of(encoder)
    with torch.no_grad():
        gradient = guide(x, torch.tensor([0, 4, 9]))
    assert gradient.shape == x.shape and gradient.abs().max() > 0
    assert not gradient.requires_grad and not x.requires_grad
    assert encoder.weight.grad is None
    assert encoder.times[-1].tolist() == [0, 444, 999]  # the base process's steps


def test_one_samples_gradient_does_not_depend_on_its_neighbours() -> None:
    encoder, x, t = Encoder(), images(0), torch.tensor([0, 4, 9])
    guide, text = guide_of(encoder)
    told = COSINE.respace("10").model_time
    alone = clip_gradient(encoder, similarity(text[1:2], 1.0), 1.0, told)
    torch.testing.assert_close(alone(x[1:2], t[1:2])[0], guide(x, t)[1])


def test_mean_shift() -> None:
    p = COSINE.posterior(images(0), images(1), T)
    gradient = images(2)
    shifted = shift_mean(p, gradient)
    torch.testing.assert_close(shifted.mean - p.mean, p.log_var.exp() * gradient)
    assert shifted.x_0 is p.x_0 and shifted.log_var is p.log_var


def test_score_shift() -> None:
    """As published, since these steps are small enough for its bound."""
    x_t, gradient, t = images(1), images(2), torch.tensor([100, 300, 900])
    x_0 = COSINE.posterior(images(0), x_t, t).x_0
    shifted = shift_score(COSINE, x_0, t, gradient)
    moved = COSINE.eps_from_x0(shifted, x_t, t) - COSINE.eps_from_x0(x_0, x_t, t)
    sigma = (1 - COSINE.alpha_bar[t]).sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(moved, -sigma * gradient, rtol=1e-6, atol=1e-9)


def test_both_shifts_lead_the_same_way() -> None:
    """For small steps the mean moves equally: beta / sqrt(alpha) g against Sigma g."""
    x_t, gradient, t = images(1), images(2), torch.full((3,), 300)
    p = COSINE.posterior(images(0), x_t, t, clip=False)
    by_mean = shift_mean(p, gradient).mean - p.mean
    led = shift_score(COSINE, p.x_0, t, gradient)
    by_score = COSINE.q_posterior(led, x_t, t).mean - p.mean
    torch.testing.assert_close(by_mean, by_score, rtol=0.01, atol=1e-9)


@pytest.mark.parametrize("steps", ["", "250", "20", "3"])
def test_a_bounded_shift_leads_no_further_than_ancestral_sampling(steps: str) -> None:
    """The deterministic step, worked out at two x_0, against the posterior's variance."""
    short = COSINE.respace(steps)
    t = torch.arange(1, short.num_steps)
    still = torch.zeros(len(t), 1, 1, 1, dtype=torch.float64)
    one = torch.ones_like(still)
    led = flow_step(short, shift_score(short, still, t, one), still, t)
    variance = short.schedule.posterior_variance[1:].reshape(-1, 1, 1, 1)
    assert (led <= variance * (1 + 1e-9)).all()
    reach = short.schedule.reach[1:].reshape(-1, 1, 1, 1)
    published = flow_step(short, reach, still, t)
    torch.testing.assert_close(led, torch.minimum(published, variance))
    steep = (short.schedule.h[1:] > 0.5).reshape(-1, 1, 1, 1)
    assert (led < published * (1 - 1e-9))[steep].all() or steps == ""


def test_many_steps_are_shifted_as_published() -> None:
    schedule = COSINE.schedule
    fine = schedule.h < 0.28
    assert fine.sum() > 950
    assert torch.equal(schedule.bounded_reach[fine], schedule.reach[fine])


def cond(x: Tensor, time: Tensor) -> Tensor:
    return torch.cat([x.sin(), x + time.reshape(-1, 1, 1, 1)], dim=1)


def uncond(x: Tensor, time: Tensor) -> Tensor:
    return torch.cat([x.cos(), x - time.reshape(-1, 1, 1, 1)], dim=1)


def side_by_side(cond: Model, uncond: Model) -> Model:
    """One model for a batch whose first half is told the caption."""

    def both(x: Tensor, time: Tensor) -> Tensor:
        half = len(x) // 2
        return torch.cat([cond(x[:half], time[:half]), uncond(x[half:], time[half:])])

    return both


def test_classifier_free_scales() -> None:
    x = images(0)
    c, u, both = cond(x, T), uncond(x, T), side_by_side(cond, uncond)
    one = classifier_free(both, 1.0, True)(x, T)
    torch.testing.assert_close(one, c)
    zero = classifier_free(both, 0.0, True)(x, T)
    assert torch.equal(zero[:, :3], u[:, :3]) and torch.equal(zero[:, 3:], c[:, 3:])
    three = classifier_free(both, 3.0, True)(x, T)
    torch.testing.assert_close(three[:, :3], 3 * c[:, :3] - 2 * u[:, :3])
    assert torch.equal(three[:, 3:], c[:, 3:])  # the variance is the conditional model's
    all_channels = classifier_free(both, 3.0, False)(x, T)
    torch.testing.assert_close(all_channels, 3 * c - 2 * u)


def test_rescaling_gives_the_standard_deviation_back() -> None:
    """Lin et al. 2024, section 3.4, in numpy."""
    guided, wanted = images(0) * 4 + 1, images(1) * 0.7
    for phi in (0.0, 0.3, 1.0):
        found = rescaled(guided, wanted, phi)
        for n in range(3):
            x, x_c = guided[n].numpy(), wanted[n].numpy()
            taken_back = x * x_c.std() / x.std()
            np.testing.assert_allclose(found[n].numpy(), phi * taken_back + (1 - phi) * x)
    torch.testing.assert_close(rescaled(guided, wanted, 1.0).std((1, 2, 3)), wanted.std((1, 2, 3)))
    flat = torch.ones_like(guided)
    assert torch.equal(rescaled(flat, wanted, 1.0), flat)


def test_guided_predictions_are_rescaled_and_variances_are_not() -> None:
    x = images(0)
    c, both = cond(x, T), side_by_side(cond, uncond)
    plain = classifier_free(both, 3.0, True)(x, T)
    found = classifier_free(both, 3.0, True, rescale=0.7)(x, T)
    torch.testing.assert_close(found[:, :3], rescaled(plain[:, :3], c[:, :3], 0.7))
    assert torch.equal(found[:, 3:], c[:, 3:]) and not torch.allclose(found[:, :3], plain[:, :3])


def test_each_sample_of_a_batch_has_the_scale_of_its_time() -> None:
    """Both branches are asked as soon as one sample needs them."""
    x, both = images(0), side_by_side(cond, uncond)
    scales = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    found = classifier_free(both, lambda time: scales, True, model_cond=cond)(x, T)
    for n, scale in enumerate(scales.tolist()):
        torch.testing.assert_close(found[n], classifier_free(both, scale, True)(x, T)[n])


def test_scales_stay_precise_beside_half_precision() -> None:
    x = images(0).to(torch.bfloat16)
    both = side_by_side(cond, uncond)
    found = classifier_free(both, 1.337, False)(x, T)
    c, u = cond(x, T).double(), uncond(x, T).double()
    torch.testing.assert_close(found.double(), u + 1.337 * (c - u), rtol=0.005, atol=0.05)
    assert found.dtype == torch.float32


def constant(output: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, time: output


def test_classifier_free_guidance_commutes_with_the_prediction() -> None:
    """Extrapolating any prediction is the same guidance."""
    x_t, c, u = images(0), images(1), images(2)
    for prediction in PREDICTIONS:
        d = GaussianDiffusion(COSINE.schedule, prediction=prediction, variance="fixed_small")
        answers = [d.target(x_0, T, d.eps_from_x0(x_0, x_t, T)) for x_0 in (c, u)]
        model = classifier_free(side_by_side(*map(constant, answers)), 4.0, False)
        found = d.predict_x0(model(x_t, T), x_t, T)
        torch.testing.assert_close(found, 4 * c - 3 * u, rtol=1e-7, atol=1e-7)


def test_a_clip_of_the_same_process_is_told_the_base_step() -> None:
    sampled = LINEAR.respace("250")
    t = torch.arange(250)
    assert torch.equal(time_of_other_process(sampled, LINEAR)(t), sampled.model_time(t))


def test_a_clip_of_another_schedule_is_asked_at_the_same_noise_level() -> None:
    sampled, t = LINEAR.respace("25"), torch.arange(25)
    steps = time_of_other_process(sampled, COSINE)(t)
    assert torch.equal(steps, COSINE.nearest_step(sampled.alpha_bar))
    # Nowhere more than half a step off, where the cosine schedule reaches that level at all.
    log_snr, wanted = COSINE.schedule.log_snr, sampled.schedule.log_snr
    inside = (wanted < log_snr[1]) & (wanted > log_snr[-2])
    gaps = (log_snr[steps] - wanted).abs()[inside]
    neighbours = (log_snr[steps[inside] + 1] - log_snr[steps[inside] - 1]).abs()
    assert inside.sum() > 20 and (gaps < neighbours).all()
    assert not torch.equal(steps, sampled.model_time(t))


def test_another_process_that_rescales_its_time_is_told_it_rescaled() -> None:
    other = GaussianDiffusion(Schedule.make("cosine", 4000), rescale_timesteps=True)
    times = time_of_other_process(COSINE, other)(torch.tensor([500]))
    assert times.dtype == torch.float32 and float(times[0]) == pytest.approx(500, abs=1)
