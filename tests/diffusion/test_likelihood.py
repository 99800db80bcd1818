"""The variational bound against data whose entropy is known in closed form.

For data N(MEAN, STD^2) a perfect network knows E[x_0 | x_t] and, with learned variance, the
variance of p(x_{t-1} | x_t) too. Given both, every step is exact at any number of steps, so the
terms of all steps but the last add up to the mutual information of x_0 and the least noisy x_t,
plus KL(q(x_T) || N(0, 1)). A fixed variance s^2 in place of the true v costs
(v / s^2 - 1 - log(v / s^2)) / 2 nats a step. Expectations over x_0 and the noise are Gauss-Hermite
sums, exact for these quadratic terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diff_dalle import keyed_noise
from diff_dalle.diffusion import losses
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.likelihood import Bound, prior_bpd, variational_bound
from diff_dalle.diffusion.losses import discretized_gaussian_log_likelihood
from diff_dalle.diffusion.schedule import Schedule

MEAN, STD = 0.1, 0.15
BITS = 1 / math.log(2)
PER_LEVEL = math.log2(127.5)  # 8-bit levels are 1 / 127.5 apart


def true_variance(schedule: Schedule) -> Tensor:
    """Variance of p(x_{t-1} | x_t) of the Gaussian data, [T]."""
    a, b = schedule.alpha_bar, schedule.posterior_coef_x_0
    return schedule.posterior_variance + b**2 * STD**2 * (1 - a) / (a * STD**2 + 1 - a)


def network(base: Schedule, diffusion: GaussianDiffusion) -> Callable[[Tensor, Tensor], Tensor]:
    """Perfect for the Gaussian data; told the base step."""
    schedule = diffusion.schedule
    low, high = schedule.posterior_log_variance, schedule.betas.log()
    fraction = (true_variance(schedule).log() - low) / (high - low)  # [T]

    def model(x_t: Tensor, time: Tensor) -> Tensor:
        a = base.alpha_bar[time].reshape(-1, 1, 1, 1)
        eps = (1 - a).sqrt() * (x_t - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)
        x_0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * x_0
        mean = {"eps": eps, "x0": x_0, "v": v}[diffusion.prediction]
        if diffusion.variance != "learned_range":
            return mean
        t = torch.searchsorted(schedule.timestep_map, time)
        return torch.cat([mean, (2 * fraction[t] - 1).reshape(-1, 1, 1, 1).expand_as(mean)], 1)

    return model


def hermite(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes of x_0 and of eps, [N,1,1,1] each, and weights [N] for expectations over both."""
    nodes, weights = (torch.tensor(x) for x in np.polynomial.hermite_e.hermegauss(count))
    x_0 = (MEAN + STD * nodes).repeat_interleave(count).reshape(-1, 1, 1, 1)
    product = torch.outer(weights, weights).flatten() / weights.sum() ** 2
    return x_0, nodes.repeat(count).reshape(-1, 1, 1, 1), product


def expected(base: Schedule, diffusion: GaussianDiffusion, nodes: int = 4) -> tuple[Tensor, float]:
    """Expectations of the terms [T] and of the prior, in bits."""
    x_0, eps, weights = hermite(nodes)
    model = network(base, diffusion)
    bound = variational_bound(model, x_0, diffusion, noise=lambda *_: eps, clip=False)
    return weights @ bound.vb, float(weights @ bound.prior_bpd)


def information(schedule: Schedule) -> float:
    """Mutual information of x_0 and the least noisy x_t, in bits."""
    first = schedule.alpha_bar[0]
    return 0.5 * float(torch.log1p(first / (1 - first) * STD**2)) * BITS


def mismatch(schedule: Schedule) -> float:
    """KL(q(x_T) || N(0, 1)) over all data, in bits: what no network takes away."""
    last = schedule.alpha_bar[-1]
    x_T = Normal(last.sqrt() * MEAN, (last * STD**2 + 1 - last).sqrt())
    return float(kl_divergence(x_T, Normal(0.0, 1.0))) * BITS


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("spec", ["", "10", "ddim25", "7,3"])
def test_a_perfect_network_needs_the_exact_bits_at_any_steps(prediction: str, spec: str) -> None:
    base = Schedule.make("linear", 100)
    diffusion = GaussianDiffusion(base.respace(spec), prediction=prediction)
    vb, prior = expected(base, diffusion)
    wanted = information(diffusion.schedule) + mismatch(diffusion.schedule)
    assert float(vb[1:].sum()) + prior == pytest.approx(wanted, abs=1e-9)


def bits_beyond_entropy(base: Schedule) -> float:
    """The whole bound, less the entropy of the data and the prior's mismatch."""
    vb, prior = expected(base, GaussianDiffusion(base), nodes=40)
    entropy = math.log2(STD * math.sqrt(2 * math.pi * math.e)) + PER_LEVEL
    return float(vb.sum()) + prior - mismatch(base) - entropy


def test_the_whole_bound_is_the_entropy_in_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deviation s of x_0 given x_1, 0.043, is wider than a level, d = 2/255.

    So a level's probability is density times d, but for the density's curvature: a factor of
    1 + (d / s)^2 (z^2 - 1) / 24 for a standard normal z, which costs (d / s)^4 / 576 nats. The
    field's approximate cumulative distribution moves a level's probability by less than 1 %,
    up and down: far less remains of it in the mean.
    """
    base = Schedule.make("linear", 50)
    assert bits_beyond_entropy(base) == pytest.approx(0, abs=1e-3)
    monkeypatch.setattr(losses, "_normal_cdf", torch.special.ndtr)
    curvature = (2 / 255) ** 4 / float(true_variance(base)[0]) ** 2 / 576 * BITS
    assert bits_beyond_entropy(base) == pytest.approx(curvature, rel=0.02)


def geometric(steps: int) -> Schedule:
    """Noise levels evenly spaced in log-SNR between fixed ends."""
    alpha_bar = torch.linspace(8.0, -8.0, steps, dtype=torch.float64).sigmoid()
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return Schedule.from_betas(1 - alpha_bar / before)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_fixed_variance_costs_what_theory_says_and_nothing_in_the_limit(variance: str) -> None:
    gaps = []
    for steps in (25, 100, 400):
        base = geometric(steps)
        diffusion = GaussianDiffusion(base, variance=variance)
        vb, prior = expected(base, diffusion, nodes=3)
        gaps.append(float(vb[1:].sum()) + prior - information(base) - mismatch(base))
        used = base.posterior_variance if variance == "fixed_small" else base.betas
        ratio = (true_variance(base) / used)[1:]
        assert gaps[-1] == pytest.approx(float((ratio - 1 - ratio.log()).sum()) / 2 * BITS)
    # First order in the step h of the log-SNR y: the cost a step is (h g)^2 / 4 with
    # g = sigmoid(y + log STD^2) for the smaller variance, g - sigmoid(y) for the larger.
    y = torch.linspace(-8.0, 8.0, 20_001, dtype=torch.float64)
    g = torch.sigmoid(y + 2 * math.log(STD)) - (variance == "fixed_large") * torch.sigmoid(y)
    limit = 16 / 4 * float(torch.trapezoid(g**2, y)) * BITS
    assert gaps[-1] * 400 == pytest.approx(limit, rel=0.02)
    assert gaps[0] > 3.5 * gaps[1] > 12 * gaps[2] > 0


def test_the_bound_of_8_bit_data_is_their_entropy() -> None:
    """Data on the 256 levels, x_0 estimated as their exact posterior mean.

    The deviation of x_0 given x_1 (0.0206 at 125 steps) is 2.6 levels, so that nothing tells
    levels from a continuum: curvature costs 5e-5 bits (see above), the approximate cumulative
    distribution as little. A bound below the entropy cannot be.
    """
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    density = torch.softmax(-0.5 * ((levels - MEAN) / 0.03) ** 2, 0)
    levels, density = levels[density > 1e-9], density[density > 1e-9]
    schedule = Schedule.make("linear", 125)
    diffusion = GaussianDiffusion(schedule, prediction="x0")
    low, high = schedule.posterior_log_variance, schedule.betas.log()

    def model(x_t: Tensor, time: Tensor) -> Tensor:
        t, a = time, schedule.alpha_bar[time][:, None]
        distance = (x_t.flatten(1) - a.sqrt() * levels) ** 2 / (2 * (1 - a))
        weights = torch.softmax(density.log() - distance, 1)  # [B, levels]
        mean = weights @ levels
        spread = (weights * (levels - mean[:, None]) ** 2).sum(1)
        v = schedule.posterior_variance[t] + schedule.posterior_coef_x_0[t] ** 2 * spread
        logits = 2 * (v.log() - low[t]) / (high - low)[t] - 1
        return torch.stack([mean, logits], 1)[..., None, None]

    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    x_0 = levels.repeat_interleave(12).reshape(-1, 1, 1, 1)
    eps = torch.tensor(nodes).repeat(len(levels)).reshape(-1, 1, 1, 1)
    weight = torch.outer(density, torch.tensor(weights / weights.sum())).flatten()
    bound = variational_bound(model, x_0, diffusion, noise=lambda *_: eps, clip=False)
    entropy = -float((density * density.log2()).sum()) / float(density.sum())
    assert entropy < float(weight @ bound.total_bpd) < entropy + 2e-4


# Against an implementation of its own


def picture(seed: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, channels, 2, 2, generator=generator, dtype=torch.float64) * 2 - 1


def noise(step: int, x: Tensor) -> Tensor:
    return keyed_noise.normal(torch.arange(len(x)), tuple(x.shape[1:]), step).to(x.dtype)


def some_network(x_t: Tensor, time: Tensor) -> Tensor:
    """Smooth and wrong, with a variance beside it."""
    told = time.reshape(-1, 1, 1, 1) / 50
    return torch.cat([torch.tanh(2 * x_t + told), torch.sin(3 * x_t - told)], 1)


def by_definition(
    model: Callable, x_0: Tensor, base: Schedule, kept: list[int], *, clip: bool, learned: bool
) -> dict[str, Tensor]:
    """The terms from Bayes' rule and torch's distributions, for a network that predicts eps."""
    found: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
    alpha_bar = [float(base.alpha_bar[step]) for step in kept]
    previous = [1.0, *alpha_bar[:-1]]
    beta = [1 - here / before for here, before in zip(alpha_bar, previous, strict=True)]

    def posterior(x: Tensor, x_t: Tensor, t: int) -> tuple[Tensor, float]:
        """Mean and precision of x_{t-1}: q(x_t | x_{t-1}) q(x_{t-1} | x_0), completed."""
        precision = (1 - beta[t]) / beta[t] + 1 / (1 - previous[t])
        pull = (1 - beta[t]) ** 0.5 * x_t / beta[t] + previous[t] ** 0.5 * x / (1 - previous[t])
        return pull / precision, precision

    for t, step in enumerate(kept):
        eps = noise(step, x_0)
        x_t = alpha_bar[t] ** 0.5 * x_0 + (1 - alpha_bar[t]) ** 0.5 * eps
        output = model(x_t, torch.full((len(x_0),), step))
        estimate = (x_t - (1 - alpha_bar[t]) ** 0.5 * output[:, :3]) / alpha_bar[t] ** 0.5
        estimate = estimate.clip(-1, 1) if clip else estimate
        smallest = -math.log(posterior(x_0, x_t, max(t, 1))[1])
        largest = math.log(beta[t]) if learned or t > 0 else smallest
        share = (output[:, 3:] + 1) / 2 if learned else torch.ones_like(x_0)
        std = (0.5 * (share * largest + (1 - share) * smallest)).exp()
        if t == 0:
            vb = -discretized_gaussian_log_likelihood(x_0, estimate, std.log())
        else:
            true, precision = posterior(x_0, x_t, t)
            mine, _ = posterior(estimate, x_t, t)
            q = Normal(true, torch.full_like(true, precision**-0.5))
            vb = kl_divergence(q, Normal(mine, std))
        implied = (x_t - alpha_bar[t] ** 0.5 * estimate) / (1 - alpha_bar[t]) ** 0.5
        found["vb"].append(vb.mean((1, 2, 3)) * BITS)
        found["xstart_mse"].append(((estimate - x_0) ** 2).mean((1, 2, 3)))
        found["mse"].append(((implied - eps) ** 2).mean((1, 2, 3)))
    q_T = Normal(alpha_bar[-1] ** 0.5 * x_0, (1 - alpha_bar[-1]) ** 0.5)
    prior = kl_divergence(q_T, Normal(0.0, 1.0)).mean((1, 2, 3)) * BITS
    return {name: torch.stack(rows, 1) for name, rows in found.items()} | {"prior_bpd": prior}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("spec", ["", "9"])
def test_every_term_is_that_of_the_definition(clip: bool, learned: bool, spec: str) -> None:
    base, x_0 = Schedule.make("cosine", 30), picture(0)
    variance = "learned_range" if learned else "fixed_large"
    diffusion = GaussianDiffusion(base, variance=variance).respace(spec)
    kept = diffusion.schedule.timestep_map.tolist()
    wanted = by_definition(some_network, x_0, base, kept, clip=clip, learned=learned)

    def model(x_t: Tensor, time: Tensor) -> Tensor:
        return some_network(x_t, time)[:, : None if learned else 3]

    found = variational_bound(model, x_0, diffusion, noise=noise, clip=clip)
    for name, values in wanted.items():
        torch.testing.assert_close(getattr(found, name), values, rtol=1e-9, atol=1e-12)
    total = wanted["vb"].sum(1) + wanted["prior_bpd"]
    torch.testing.assert_close(found.total_bpd, total, rtol=1e-9, atol=0)


def whole(model: Callable, x_0: Tensor) -> Bound:
    diffusion = GaussianDiffusion(Schedule.make("cosine", 30))
    return variational_bound(model, x_0, diffusion, noise=noise)


def test_a_network_that_knows_the_noise_beats_one_that_knows_nothing() -> None:
    base = Schedule.make("cosine", 30)
    x_0 = (MEAN + STD * noise(99, picture(0))).clamp(-1, 1)
    good = network(base, GaussianDiffusion(base))
    knowing = whole(good, x_0).total_bpd
    untrained = whole(lambda x_t, _: torch.zeros(3, 6, 2, 2, dtype=x_t.dtype), x_0).total_bpd
    assert (untrained > knowing + 1).all()


def test_single_precision_is_enough_and_half_precision_outputs_are_scored_in_it() -> None:
    x_0 = picture(0)
    single = whole(some_network, x_0.float())
    assert single.vb.dtype == torch.float64
    torch.testing.assert_close(
        single.total_bpd, whole(some_network, x_0).total_bpd, rtol=1e-4, atol=0
    )
    half = whole(lambda x_t, time: some_network(x_t, time).bfloat16(), x_0.float())
    rounded = whole(lambda x_t, time: some_network(x_t, time).bfloat16().float(), x_0.float())
    assert torch.equal(half.vb, rounded.vb) and not torch.equal(half.vb, single.vb)


def test_rows_do_not_meet_and_every_step_is_told() -> None:
    x_0, told = picture(0), []
    diffusion = GaussianDiffusion(Schedule.make("cosine", 30)).respace("4")
    all_rows = variational_bound(
        some_network, x_0, diffusion, noise=noise, callback=lambda: told.append(1)
    )
    first = variational_bound(some_network, x_0[:1], diffusion, noise=noise)
    torch.testing.assert_close(all_rows.vb[:1], first.vb, rtol=1e-12, atol=0)
    assert len(told) == 4 and all_rows.vb.shape == all_rows.mse.shape == (3, 4)


def test_the_prior_sees_the_noisiest_step_only() -> None:
    x_0 = picture(0)
    whole_process = GaussianDiffusion(Schedule.make("linear", 100))
    torch.testing.assert_close(
        prior_bpd(whole_process.respace("5"), x_0), prior_bpd(whole_process, x_0)
    )
    last = whole_process.alpha_bar[-1]
    q_T = Normal(last.sqrt() * x_0, (1 - last).sqrt())
    wanted = kl_divergence(q_T, Normal(0.0, 1.0)).mean((1, 2, 3)) * BITS
    torch.testing.assert_close(prior_bpd(whole_process, x_0), wanted)
    assert (wanted > 1e-6).all()
