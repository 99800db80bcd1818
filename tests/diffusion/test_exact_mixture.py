"""Samplers against data whose noised densities are known in closed form.

The data are a mixture of two Gaussians in one dimension, so the score of every noised marginal,
the posterior of the component and every quantile are exact. A sampler must reach the exact
density as its steps grow, at its known order. Distances are Wasserstein-1: the mean absolute
difference of sorted samples and exact quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diff_dalle import keyed_noise
from diff_dalle.diffusion.defaults import BEST_SPACING, FAST_SAMPLER, default_steps
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.guidance import classifier_free
from diff_dalle.diffusion.predictions import PREDICTIONS
from diff_dalle.diffusion.samplers import SAMPLERS, invert_ddim, sample_ddim, sample_ddpm
from diff_dalle.diffusion.schedule import SCHEDULES, Schedule

BASE = Schedule.make("linear", 8000)
WEIGHTS = torch.tensor([0.35, 0.65], dtype=torch.float64)
MEANS = torch.tensor([-0.6, 0.5], dtype=torch.float64)
STDS = torch.tensor([0.15, 0.2], dtype=torch.float64)
BOTH = (0, 1)
# Of the error in the step size; a new sampler: at least 1. UniPC-2 has 3 with its corrector (Zhao
# et al. 2023, theorem 3.1); that of the SDE is of the mean and of the variance.
ORDERS = {"ddpm": 1, "ddim": 1, "dpmpp_2m": 2, "dpmpp_2m_sde": 2, "heun": 2, "unipc": 3}
COUNT = 8_000


def process(spec: str, prediction: str = "eps") -> GaussianDiffusion:
    return GaussianDiffusion(BASE.respace(spec), prediction=prediction, variance="fixed_small")


def even_schedule(steps: int) -> Schedule:
    """A process of equal steps in log-SNR, nearly without noise at step 0."""
    alpha_bar = torch.sigmoid(2 * torch.linspace(9, -5, steps, dtype=torch.float64))
    return schedule_of(alpha_bar)


def schedule_of(alpha_bar: Tensor) -> Schedule:
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return Schedule(betas, alpha_bar, torch.arange(len(betas)), len(betas))


def log_joint(x: Tensor, alpha_bar: Tensor, components: tuple[int, ...] = BOTH) -> Tensor:
    """log p(x_t, component), one column a component, [..., K]."""
    k = list(components)
    a = alpha_bar[..., None]
    variance = a * STDS[k] ** 2 + 1 - a
    normal = -0.5 * (x[..., None] - a.sqrt() * MEANS[k]) ** 2 / variance - 0.5 * variance.log()
    return normal + WEIGHTS[k].log()


def score(x: Tensor, alpha_bar: Tensor, components: tuple[int, ...] = BOTH) -> Tensor:
    """Gradient of log p(x_t), or of log p(x_t | component)."""
    k = list(components)
    a = alpha_bar[..., None]
    each = -(x[..., None] - a.sqrt() * MEANS[k]) / (a * STDS[k] ** 2 + 1 - a)
    return (log_joint(x, alpha_bar, components).softmax(-1) * each).sum(-1)


def clean_image(x: Tensor, alpha_bar: Tensor, components: tuple[int, ...] = BOTH) -> Tensor:
    """The mean of x_0 given x_t, where no signal is left too."""
    k = list(components)
    a = alpha_bar[..., None]
    gain = a.sqrt() * STDS[k] ** 2 / (a * STDS[k] ** 2 + 1 - a)
    each = MEANS[k] + gain * (x[..., None] - a.sqrt() * MEANS[k])
    return (log_joint(x, alpha_bar, components).softmax(-1) * each).sum(-1)


def network(prediction: str = "eps", components: tuple[int, ...] = BOTH) -> Callable:
    """A perfect network: shown its input and told the base step, it answers exactly."""

    def model(shown: Tensor, time: Tensor) -> Tensor:
        a = BASE.alpha_bar[time].reshape(-1, 1, 1, 1)
        signal, sigma = a.sqrt().clamp(min=1e-150), (1 - a).sqrt()  # 0 / 0 at pure noise
        c_skip, c_out, c_in = preconditioning(sigma / signal)
        x_t = {"edm": shown / c_in * signal, "flow": shown * (signal + sigma)}.get(
            prediction, shown
        )
        eps, x_0 = -sigma * score(x_t, a, components), clean_image(x_t, a, components)
        return {
            "eps": eps,
            "x0": x_0,
            "v": signal * eps - sigma * x_0,
            "edm": (x_0 - c_skip * x_t / signal) / c_out,
            "flow": eps - x_0,
        }[prediction]

    return model


def preconditioning(sigma: Tensor, data: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in as Karras et al. 2022, table 1, has them."""
    both = sigma**2 + data**2
    return data**2 / both, sigma * data / both.sqrt(), 1 / both.sqrt()


def component_and_all(x_t: Tensor, time: Tensor) -> Tensor:
    """Exact eps of component 0 for the first half of the batch, of the mixture for the second."""
    (x_c, x_u), (time_c, time_u) = x_t.chunk(2), time.chunk(2)
    return torch.cat([network("eps", (0,))(x_c, time_c), network()(x_u, time_u)])


def gradient(diffusion: GaussianDiffusion, component: int, scale: float) -> Callable:
    """scale times the exact gradient of log p(component | x_t)."""

    def guide(x_t: Tensor, t: Tensor) -> Tensor:
        a = diffusion.alpha_bar[t].reshape(-1, 1, 1, 1)
        return scale * (score(x_t, a, (component,)) - score(x_t, a))

    return guide


def quantiles(u: Tensor, alpha_bar: float = 1.0, components: tuple[int, ...] = BOTH) -> Tensor:
    """The x with P(x_t < x) = u, by bisection."""
    k = list(components)
    a = torch.tensor(alpha_bar, dtype=torch.float64)
    std = (a * STDS[k] ** 2 + 1 - a).sqrt()
    low, high = torch.full_like(u, -10), torch.full_like(u, 10)
    for _ in range(60):
        middle = (low + high) / 2
        cdf = torch.special.ndtr((middle[:, None] - a.sqrt() * MEANS[k]) / std)
        below = (cdf * WEIGHTS[k] / WEIGHTS[k].sum()).sum(1) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def stratified(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def noise(step: int, x: Tensor) -> Tensor:
    return keyed_noise.normal(torch.arange(len(x)), tuple(x.shape[1:]), stream=step).to(x.dtype)


def distance(samples: Tensor, components: tuple[int, ...] = BOTH) -> float:
    """Wasserstein-1 from the exact density of x_0."""
    exact = quantiles(stratified(len(samples)), components=components)
    return float((samples.flatten().sort().values - exact).abs().mean())


def draw(
    sampler: str, model: Callable, diffusion: GaussianDiffusion, guide: Callable | None = None
) -> Tensor:
    x_T = quantiles(stratified(COUNT), float(diffusion.alpha_bar[-1])).reshape(-1, 1, 1, 1)
    return SAMPLERS[sampler](model, x_T, diffusion, noise=noise, guide=guide, clip=False)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_density_becomes_exact(name: str) -> None:
    coarse, middle, fine = (distance(draw(name, network(), process(n))) for n in ("8", "32", "128"))
    assert coarse > 2 * middle > 4 * fine
    assert fine < 0.02


def test_the_density_becomes_exact_with_the_larger_variance() -> None:
    """Both fixed variances have one limit."""
    errors = []
    for spec in ("8", "32", "128"):
        large = GaussianDiffusion(BASE.respace(spec), variance="fixed_large")
        errors.append(distance(draw("ddpm", network(), large)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02


@pytest.mark.parametrize("spec", ["12", "50"])
def test_the_smaller_variance_suits_sharp_data_and_few_steps(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given its noised self an image is nearly a point, so beta adds noise that nothing removes."""
    monkeypatch.setitem(globals(), "STDS", torch.full((2,), 0.02, dtype=torch.float64))
    small, large = (
        distance(draw("ddpm", network(), GaussianDiffusion(BASE.respace(spec), variance=variance)))
        for variance in ("fixed_small", "fixed_large")
    )
    assert small < 0.7 * large


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_by_the_exact_classifier_gives_the_component(name: str) -> None:
    """score(x) + gradient of log p(component | x) is the component's own score (Bayes)."""
    diffusion = process("128")
    guided = draw(name, network(), diffusion, gradient(diffusion, 0, 1.0))
    assert distance(guided, (0,)) < 0.025
    downhill = draw(name, network(), diffusion, gradient(diffusion, 0, -1.0))
    assert distance(downhill, (0,)) > 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_both_guidances_add_up(name: str) -> None:
    """Half of the way classifier-free and half by gradient is the whole way to the component."""
    diffusion = process("128")
    half = classifier_free(component_and_all, 0.5, learned_variance=False)
    assert distance(draw(name, half, diffusion, gradient(diffusion, 0, 0.5)), (0,)) < 0.025
    assert distance(draw(name, half, diffusion), (0,)) > 0.05


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "ddpm"])
@pytest.mark.parametrize("scales", [(0.0, 1.0), (0.5, 0.5), (2.0, -1.0)])
def test_both_guidances_are_the_same_thing_but_for_ddpm(
    name: str, scales: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps of h < 0.28; where the gradient is bounded it can only be weaker."""
    monkeypatch.setitem(globals(), "BASE", even_schedule(60))
    diffusion = process("")
    free, by_gradient = scales
    model = classifier_free(component_and_all, free, learned_variance=False)
    guided = draw(name, model, diffusion, gradient(diffusion, 0, by_gradient))
    component = draw(name, network("eps", (0,)), diffusion)
    torch.testing.assert_close(guided, component, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_predictions_are_interchangeable(name: str) -> None:
    found = {p: draw(name, network(p), process("10", p)) for p in PREDICTIONS}
    for other in found.values():
        torch.testing.assert_close(other, found["eps"], rtol=0, atol=1e-9)


ENDS_IN_NOISE = {
    "flow": Schedule.make("flow", 8000),
    "shifted": Schedule.make("flow", 8000, shift=2.0),
    "zero terminal": Schedule.make("linear", 8000, zero_terminal_snr=True),
}


@pytest.mark.parametrize("schedule", ENDS_IN_NOISE)
@pytest.mark.parametrize("name", SAMPLERS)
def test_pure_noise_becomes_the_density(
    name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a last step of noise alone, where eps says nothing of the image."""
    monkeypatch.setitem(globals(), "BASE", ENDS_IN_NOISE[schedule])
    found = {p: draw(name, network(p), process("64", p)) for p in ("x0", "v", "edm", "flow")}
    assert distance(found["x0"]) < 0.05
    for other in found.values():
        torch.testing.assert_close(other, found["x0"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_alone_is_not_guided(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where x_t says nothing the exact gradient is 0, and the component is still reached."""
    monkeypatch.setitem(globals(), "BASE", ENDS_IN_NOISE["zero terminal"])
    diffusion = process("128", "v")
    guided = draw(name, network("v"), diffusion, gradient(diffusion, 0, 1.0))
    assert distance(guided, (0,)) < 0.025


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_a_process_may_end_without_any_signal(
    name: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """alpha_bar shifted and scaled to end at exactly 0 (Lin et al. 2024)."""
    monkeypatch.setitem(globals(), "COUNT", 1000)
    usual = Schedule.make("linear", 1000)
    root = usual.alpha_bar.sqrt()
    ending = schedule_of(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)
    errors = []
    for schedule in (usual, ending):
        monkeypatch.setitem(globals(), "BASE", schedule)
        short = schedule.respace("24", BEST_SPACING[name])
        diffusion = GaussianDiffusion(short, prediction=prediction, variance="fixed_small")
        plain = draw(name, network(prediction), diffusion)
        guided = draw(name, network(prediction), diffusion, gradient(diffusion, 0, 1.0))
        errors.append((distance(plain), distance(guided, (0,))))
    assert short.alpha_bar[-1] == 0 and short.log_snr[-1] == -math.inf
    for found, known in zip(errors[1], errors[0], strict=True):
        assert found < 1.5 * known + 0.01


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_twenty_default_evaluations_beat_many_of_the_older_samplers(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "BASE", Schedule.make(schedule, 1000))
    steps = default_steps(FAST_SAMPLER, image_size=64, upsampler=False, num_steps=1000)
    short = BASE.respace(str(steps), BEST_SPACING[FAST_SAMPLER])
    # eps would say nothing of the picture where the flow schedule ends.
    model, asked = network("v"), list[int]()

    def counting(x_t: Tensor, time: Tensor) -> Tensor:
        asked.append(int(time[0]))
        return model(x_t, time)

    diffusion = GaussianDiffusion(short, prediction="v", variance="fixed_small")
    fast = distance(draw(FAST_SAMPLER, counting, diffusion))
    assert len(asked) == 20
    assert fast <= distance(draw("ddim", model, process("100", "v")))
    assert fast <= distance(draw("ddpm", model, process("250", "v")))


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "ddpm"])
def test_a_gradient_that_does_not_fade_with_the_picture_leads_as_in_ddpm(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CLIP's does not: at the first step of the cosine schedule x_0 moved by 20,000 of it."""
    monkeypatch.setitem(globals(), "BASE", Schedule.make("cosine", 1000))
    monkeypatch.setitem(globals(), "COUNT", 1000)
    diffusion = process("20")

    def constant(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x_t, 0.5)

    def led(name: str) -> float:
        pair = (draw(name, network(), diffusion, guide) for guide in (constant, None))
        return float(next(pair).mean() - next(pair).mean())

    # Noise forgets what a gradient did long ago: without it the way is longer, not by orders.
    assert led("ddpm") < led(name) < 3 * led("ddpm")


def gaussian_error(name: str, spec: str, mean: float = 0.5, std: float = 0.3) -> float:
    """Error of the mean plus error of the standard deviation of samples of N(mean, std^2).

    With Gaussian data every sampler is an affine map of x_T and of the noise of each step. One
    batch finds its coefficients: row 0 sees zeros, row i + 1 a one in place of variable i.
    """
    diffusion = process(spec)
    steps = diffusion.num_steps

    def model(x_t: Tensor, time: Tensor) -> Tensor:
        a = BASE.alpha_bar[time].reshape(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * std**2 + 1 - a)

    def unit_noise(step: int, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        z[step + 1] = 1  # steps T-1 ... 1 draw, so rows 2 ... T
        return z

    x_T = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64)
    x_T[1] = 1
    x_0 = SAMPLERS[name](model, x_T, diffusion, noise=unit_noise, clip=False).flatten()
    coefficients = x_0[1:] - x_0[0]
    a_T = float(diffusion.alpha_bar[-1])
    start_mean, start_variance = math.sqrt(a_T) * mean, a_T * std**2 + 1 - a_T
    variance = coefficients[0] ** 2 * start_variance + (coefficients[1:] ** 2).sum()
    found_mean = float(x_0[0] + coefficients[0] * start_mean)
    return abs(found_mean - mean) + abs(math.sqrt(float(variance)) - std)


@pytest.mark.parametrize("name", SAMPLERS)
def test_order_of_convergence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for steps in (200, 400):
        monkeypatch.setitem(globals(), "BASE", even_schedule(steps))
        errors.append(gaussian_error(name, ""))
    order = math.log(errors[0] / errors[1], 2)
    assert order > ORDERS.get(name, 1) - 0.1
    assert order < ORDERS.get(name, 9) + 0.1


def ddim_of_quantiles(spec: str) -> tuple[Tensor, Tensor]:
    """What DDIM makes of x_T at 99 quantiles, and the exact x_0: the flow keeps quantiles."""
    u, diffusion = stratified(99), process(spec)
    x_T = quantiles(u, float(diffusion.alpha_bar[-1])).reshape(-1, 1, 1, 1)
    return sample_ddim(network(), x_T, diffusion, noise=noise, clip=False).flatten(), quantiles(u)


def test_ddim_follows_the_probability_flow_at_first_order() -> None:
    errors = []
    for spec in ("50", "100", "200", "400"):
        found, exact = ddim_of_quantiles(spec)
        errors.append(float((found - exact).abs().mean()))
    ratios = [a / b for a, b in zip(errors[:-1], errors[1:], strict=True)]
    assert all(1.8 < ratio < 2.2 for ratio in ratios), errors


def test_inversion_finds_the_noise_at_first_order_and_ddim_returns() -> None:
    u, to_noise, and_back = stratified(99), [], []
    x_0 = quantiles(u).reshape(-1, 1, 1, 1)
    for spec in ("50", "100", "200", "400"):
        diffusion = process(spec)
        x_T = invert_ddim(network(), x_0, diffusion, clip=False)
        exact = quantiles(u, float(diffusion.alpha_bar[-1])).reshape(-1, 1, 1, 1)
        to_noise.append(float((x_T - exact).abs().mean()))
        again = sample_ddim(network(), x_T, diffusion, noise=noise, clip=False)
        and_back.append(float((again - x_0).abs().mean()))
    for errors in (to_noise, and_back):
        ratios = [a / b for a, b in zip(errors[:-1], errors[1:], strict=True)]
        assert all(1.8 < ratio < 2.2 for ratio in ratios), errors
    assert and_back[-1] < 0.01


def test_ddim_with_eta_1_is_ancestral_sampling() -> None:
    """With the posterior's variance both draw from the same Gaussian (Song et al. 2021, eq. 16)."""
    diffusion = process("20")
    x_T = stratified(50).reshape(-1, 1, 1, 1) - 0.5
    ddim = sample_ddim(network(), x_T, diffusion, noise=noise, clip=False, eta=1.0)
    ddpm = sample_ddpm(network(), x_T, diffusion, noise=noise, clip=False)
    torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-10)
