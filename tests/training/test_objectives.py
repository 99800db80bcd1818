"""What a generator is shown, asked for and judged by, whatever its objective."""

from __future__ import annotations

import pytest
import torch
from loop_tiny import (
    SIZE,
    STEPS,
    Spy,
    batch_of,
    generator_task,
    held_out,
    logged,
    process,
    tiny_generator,
)
from torch import Tensor

from diff_dalle.data.batch import Batch
from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.losses import LossConfig
from diff_dalle.models.generator import Cond, GeneratorConfig
from diff_dalle.training import draws
from diff_dalle.training.generator_task import GeneratorTaskConfig

PLAIN = GeneratorTaskConfig(cond_drop_prob=0.0)


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_the_network_is_shown_its_input_and_the_loss_knows_x_t(prediction: str) -> None:
    diffusion, batch = process(prediction), batch_of(range(6))
    spy = Spy(GeneratorConfig())
    means = logged(generator_task(spy, PLAIN, diffusion=diffusion), batch)
    x_0 = batch.image.float() / 127.5 - 1
    t = (draws.timestep(batch.seed) * STEPS).long()
    eps = draws.noise(batch.seed, (3, SIZE, SIZE))
    a = diffusion.alpha_bar[t].float()[:, None, None, None]
    x_t, both = a.sqrt() * x_0 + (1 - a).sqrt() * eps, a.sqrt() + (1 - a).sqrt()
    torch.testing.assert_close(spy.asked[0][0], x_t / both if prediction == "flow" else x_t)
    target = eps - x_0 if prediction == "flow" else a.sqrt() * eps - (1 - a).sqrt() * x_0
    assert means["mse"] == pytest.approx(float((target**2).mean()), rel=1e-5)


def seen_and_asked(cfg: GeneratorTaskConfig) -> tuple[Tensor, Tensor, Batch]:
    """The noise in what the network saw, and the noise it was to find, each [B,3,H,W]."""
    diffusion, batch = process(learn_sigma=False), batch_of(range(6))
    spy, asked = Spy(GeneratorConfig(learn_sigma=False)), []
    original = diffusion.target
    diffusion.target = lambda x_0, t, eps: (asked.append(eps), original(x_0, t, eps))[1]
    logged(generator_task(spy, cfg, diffusion=diffusion), batch)
    t = (draws.timestep(batch.seed) * STEPS).long()
    x_t, x_0 = spy.asked[0][0], batch.image.float() / 127.5 - 1
    return diffusion.eps_from_x0(x_0, x_t, t), asked[0], batch


def test_a_noise_offset_moves_whole_channels_of_what_is_seen_and_asked() -> None:
    seen, asked, batch = seen_and_asked(GeneratorTaskConfig(cond_drop_prob=0.0, noise_offset=0.1))
    torch.testing.assert_close(seen, asked, rtol=1e-4, atol=1e-4)
    added = asked - draws.noise(batch.seed, (3, SIZE, SIZE))
    wanted = (0.1 * draws.noise_offset(batch.seed, 3)).expand_as(added)
    torch.testing.assert_close(added, wanted, rtol=1e-4, atol=1e-6)


def test_input_perturbation_is_seen_and_not_asked_for() -> None:
    """Ning et al. 2023, algorithm 1."""
    cfg = GeneratorTaskConfig(cond_drop_prob=0.0, input_perturbation=0.2)
    seen, asked, batch = seen_and_asked(cfg)
    shape = (3, SIZE, SIZE)
    assert torch.equal(asked, draws.noise(batch.seed, shape))
    wanted = asked + 0.2 * draws.perturbation(batch.seed, shape)
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-4)


def test_held_out_losses_are_of_plain_noise() -> None:
    model = tiny_generator(awake=True)
    plain = generator_task(model, PLAIN).evaluate(held_out())
    cfg = GeneratorTaskConfig(cond_drop_prob=0.0, noise_offset=0.5, input_perturbation=0.5)
    assert generator_task(model, cfg).evaluate(held_out()) == plain


class Grey(Spy):
    """Says, in the words of its process, that the image is grey: x_0 = 0."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        super().__init__(GeneratorConfig(learn_sigma=False))
        self._diffusion = diffusion

    def forward(self, shown: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x_t = shown / self._diffusion.model_input(torch.ones_like(shown), t)
        grey = torch.zeros_like(x_t)
        return self._diffusion.target(grey, t, self._diffusion.eps_from_x0(grey, x_t, t))


def test_the_held_out_error_of_the_image_is_in_one_unit() -> None:
    """Networks that say the same of the image in other words have the same error of it."""
    found = {}
    for prediction in ("x0", "flow"):
        diffusion = process(prediction, learn_sigma=False)
        task = generator_task(Grey(diffusion), diffusion=diffusion)
        found[prediction] = task.evaluate(held_out())
    grey = float(((next(held_out()).image.float() / 127.5 - 1) ** 2).mean())
    for values in found.values():
        assert values["val_x_0_mse"] == pytest.approx(grey, rel=1e-3)
        assert values["val_x_0_mse_q3"] == pytest.approx(grey, rel=1e-3)
    assert found["x0"]["val_loss"] != pytest.approx(found["flow"]["val_loss"], rel=0.1)


def test_a_weighting_changes_what_is_minimised_and_not_the_error_that_is_logged() -> None:
    diffusion, batch = process("x0", learn_sigma=False), batch_of(range(6))
    cfg = LossConfig(loss_weighting="min-snr", min_snr_gamma=2.0)
    plain, weighted = (
        generator_task(Spy(GeneratorConfig(learn_sigma=False)), PLAIN, diffusion=diffusion, loss=c)
        for c in (LossConfig(), cfg)
    )
    assert logged(weighted, batch)["mse"] == logged(plain, batch)["mse"]
    t = (draws.timestep(batch.seed) * STEPS).long()
    error = ((batch.image.float() / 127.5 - 1) ** 2).mean((1, 2, 3))
    wanted = float((diffusion.schedule.log_snr[t].exp().clamp(max=2) * error).mean())
    assert logged(weighted, batch)["loss"] == pytest.approx(wanted, rel=1e-5)
    assert weighted.evaluate(held_out())["val_loss"] != plain.evaluate(held_out())["val_loss"]
