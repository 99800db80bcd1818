"""The generator's loss and its gradients, against sums written out by hand."""

from typing import Any

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
    sample,
    tiny_generator,
)
from torch import Tensor

from diff_dalle.data.batch import Batch
from diff_dalle.diffusion.losses import LossConfig, training_losses
from diff_dalle.diffusion.timesteps import TimestepConfig
from diff_dalle.errors import UsageError
from diff_dalle.models.generator import Cond, Generator, GeneratorConfig
from diff_dalle.models.low_res import downsample, gaussian_blur
from diff_dalle.models.text import TextEncoderConfig
from diff_dalle.models.unet_config import UNetConfig
from diff_dalle.training import draws
from diff_dalle.training import generator_task as task_module
from diff_dalle.training.generator_task import GeneratorTask, GeneratorTaskConfig, random_crop
from diff_dalle.training.metrics import Meter
from diff_dalle.training.stage import StageSettings, sample_stage
from diff_dalle.training.tasks import StepContext

CPU = torch.device("cpu")
PLAIN = GeneratorTaskConfig(cond_drop_prob=0.0)


def gradients(task: GeneratorTask, batch: Batch, loss_scale: float = 1.0) -> dict[str, Tensor]:
    task.model.zero_grad()
    context = StepContext(
        valid_total=batch.valid.sum().double().clamp(min=1),
        loss_scale=loss_scale,
        meter=Meter(CPU),
    )
    task.forward_backward(batch, context)
    return {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}


def test_the_loss_is_that_of_the_paper() -> None:
    """Ho et al. 2020, algorithm 1, written out with public pieces."""
    model = tiny_generator(awake=True, dtype=torch.float64)
    batch = batch_of(range(6))
    means = logged(generator_task(model, PLAIN), batch)

    diffusion = process()
    x_0 = batch.image.double() / 127.5 - 1
    t = (draws.timestep(batch.seed) * STEPS).long()
    eps = draws.noise(batch.seed, (3, SIZE, SIZE)).double()
    alpha_bar = diffusion.alpha_bar[t][:, None, None, None]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    output = model(x_t, t, Cond(tokens=batch.tokens, mask=batch.mask))
    mse = ((output[:, :3] - eps) ** 2).flatten(1).mean(1)
    terms = training_losses(diffusion, output, x_0, x_t, t, eps, LossConfig())
    assert means["mse"] == pytest.approx(mse.mean().item(), rel=1e-12)
    assert means["loss"] == pytest.approx(terms.loss.mean().item(), rel=1e-12)
    for quartile in range(4):
        inside = t * 4 // STEPS == quartile
        if inside.any():
            expected = terms.loss[inside].mean().item()
            assert means[f"loss_q{quartile}"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", ["uniform", "logsnr-normal"])
@pytest.mark.parametrize("microbatch", [1, 2, 4, 7])
def test_microbatches_never_change_the_gradient(microbatch: int, loss: str) -> None:
    model = tiny_generator(small_size=8, awake=True, dtype=torch.float64)
    cfg = GeneratorTaskConfig(gaussian_blur=True, cond_drop_prob=0.5)
    chosen = TimestepConfig(schedule_sampler=loss)
    batch = batch_of(range(7), bad=[2])
    whole = gradients(generator_task(model, cfg, timesteps=chosen), batch)
    pieces = gradients(generator_task(model, cfg, timesteps=chosen, microbatch=microbatch), batch)
    assert len(whole) == len(list(model.parameters()))  # every parameter has one, as DDP needs
    for name, gradient in whole.items():
        assert torch.allclose(pieces[name], gradient, rtol=1e-9, atol=1e-14), name


def test_a_broken_sample_weighs_nothing() -> None:
    model = tiny_generator(awake=True, dtype=torch.float64)
    task = generator_task(model, PLAIN)
    without = gradients(task, batch_of([0, 1, 3]))
    with_broken = gradients(task, batch_of([0, 1, 2, 3], bad=[2]))
    for name, gradient in without.items():
        assert torch.allclose(with_broken[name], gradient, rtol=1e-9, atol=1e-14), name
    nothing = gradients(task, batch_of([0, 1], bad=[0, 1]))
    assert not any(gradient.any() for gradient in nothing.values())


def test_the_loss_scale_multiplies_every_gradient() -> None:
    task = generator_task(tiny_generator(awake=True, dtype=torch.float64), PLAIN, microbatch=2)
    batch = batch_of(range(4))
    once, scaled = gradients(task, batch), gradients(task, batch, loss_scale=64.0)
    for name, gradient in once.items():
        assert torch.allclose(scaled[name], 64 * gradient, rtol=1e-12, atol=0), name


def spied(cfg: GeneratorTaskConfig, batch: Batch, **model: object) -> Cond:
    spy = Spy(GeneratorConfig(**model))
    gradients(generator_task(spy, cfg), batch)
    return spy.asked[0][2]


def test_an_upsampler_is_told_the_noise_it_gets() -> None:
    batch = batch_of(range(64))
    cond = spied(GeneratorTaskConfig(aug_level_max=0.4), batch, small_size=8)
    assert cond.low_res is not None and cond.aug_level is not None
    assert 0 <= float(cond.aug_level.min()) and 0.3 < float(cond.aug_level.max()) < 0.4
    clean = downsample(batch.image.float() / 127.5 - 1, 8)
    level = cond.aug_level[:, None, None, None]
    noise = (cond.low_res - (1 - level**2).sqrt() * clean) / level
    assert abs(float(noise.std()) - 1) < 0.05 and abs(float(noise.mean())) < 0.05


def test_without_blur_and_noise_the_input_is_the_shrunken_picture() -> None:
    batch = batch_of(range(4))
    clean = downsample(batch.image.float() / 127.5 - 1, 8)
    cond = spied(GeneratorTaskConfig(aug_level_max=0.0), batch, small_size=8)
    assert cond.low_res is not None and torch.equal(cond.low_res, clean)


def test_about_half_of_the_inputs_are_blurred() -> None:
    batch = batch_of(range(64))
    cfg = GeneratorTaskConfig(aug_level_max=0.0, gaussian_blur=True)
    cond = spied(cfg, batch, small_size=8)
    clean = downsample(batch.image.float() / 127.5 - 1, 8)
    assert cond.low_res is not None
    changed = (cond.low_res != clean).flatten(1).any(1)
    assert torch.equal(changed, draws.blur_sigma(batch.seed, 0.5, (0.4, 0.6)) > 0)
    assert 16 < int(changed.sum()) < 48


def test_a_wide_blur_is_as_wide_as_it_says() -> None:
    batch = batch_of(range(2))
    cfg = GeneratorTaskConfig(
        aug_level_max=0.0, gaussian_blur=True, blur_prob=1.0, blur_sigma=(2.0, 2.0)
    )
    cond = spied(cfg, batch, small_size=8)
    clean = downsample(batch.image.float() / 127.5 - 1, 8)
    expected = gaussian_blur(clean, torch.full((2,), 2.0), radius=2)
    assert cond.low_res is not None and torch.equal(cond.low_res, expected)


def test_an_evaluation_neither_blurs_nor_drops() -> None:
    batch = batch_of(range(64))
    cfg = GeneratorTaskConfig(aug_level_max=0.0, gaussian_blur=True, cond_drop_prob=0.5)
    spy = Spy(GeneratorConfig(small_size=8))
    generator_task(spy, cfg).evaluate([batch])
    clean = downsample(batch.image.float() / 127.5 - 1, 8)
    for _, _, cond in spy.asked:
        assert cond.low_res is not None and torch.equal(cond.low_res, clean)
        assert cond.drop is not None and not cond.drop.any()


def test_captions_are_dropped_as_often_as_asked() -> None:
    batch = batch_of(range(64))
    cond = spied(GeneratorTaskConfig(cond_drop_prob=0.25), batch)
    assert cond.drop is not None
    assert torch.equal(cond.drop, draws.caption_drop(batch.seed, 0.25))


def test_training_without_captions() -> None:
    model = tiny_generator(cond_text=False)
    batch = batch_of(range(3), text=False)
    task = generator_task(model)
    assert "loss" in logged(task, batch)
    values = task.evaluate(held_out(text=False))
    assert "val_loss" in values and "val_caption_gain" not in values
    assert task.preview_from == "data"


def test_a_crop_is_the_same_part_of_both_pictures() -> None:
    x_0 = torch.stack([sample(i)["image"] for i in range(5)]).float()
    low_res = downsample(x_0, 8)
    seed = torch.stack([sample(i)["seed"] for i in range(5)])
    high, low = random_crop(x_0, low_res, seed, 6)
    assert high.shape == (5, 3, 6, 6) and low.shape == (5, 3, 3, 3)
    assert torch.allclose(downsample(high, 3), low, atol=1e-4)
    assert len({tuple(corner.flatten().tolist()) for corner in high[:, 0, :1, :1]}) > 1


def test_an_upsampler_trains_on_crops_and_a_base_stage_ignores_them() -> None:
    cfg = GeneratorTaskConfig(crop_size=8)
    upsampler, base = Spy(GeneratorConfig(small_size=4)), Spy(GeneratorConfig())
    gradients(generator_task(upsampler, cfg), batch_of(range(3)))
    gradients(generator_task(base, cfg), batch_of(range(3)))
    x_t, _, cond = upsampler.asked[0]
    assert x_t.shape == (3, 3, 8, 8)
    assert cond.low_res is not None and cond.low_res.shape == (3, 3, 2, 2)
    assert base.asked[0][0].shape == (3, 3, SIZE, SIZE)
    assert gradients(generator_task(tiny_generator(small_size=4), cfg), batch_of(range(3)))


@pytest.mark.parametrize("size", [6, 32])
def test_a_crop_that_does_not_fit_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"--crop_size is {size}"):
        generator_task(tiny_generator(small_size=4), GeneratorTaskConfig(crop_size=size))


def test_a_crop_fits_the_scale_and_the_network_at_once() -> None:
    """From 8 to 24 px with feature maps of a quarter: 8 px would be two and two thirds below."""
    stage = GeneratorConfig(cond_text=False, small_size=8)
    unet = UNetConfig(image_size=24, num_channels=64, num_res_blocks=1, channel_mult=(1, 1, 1))
    with torch.device("meta"):
        model = Generator(stage, unet, TextEncoderConfig())
    with pytest.raises(UsageError, match="--crop_size is 8: it must be a multiple of 12"):
        generator_task(model, GeneratorTaskConfig(crop_size=8))
    generator_task(model, GeneratorTaskConfig(crop_size=12))


@pytest.mark.parametrize(
    "wrong",
    [
        {"cond_drop_prob": 1.5},
        {"blur_sigma": (0.6, 0.4)},
        {"blur_sigma": (0.6, 50.0)},
        {"aug_level_max": -0.1},
        {"noise_offset": -0.1},
        {"input_perturbation": -0.1},
    ],
)
def test_wrong_knobs_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong))} is"):
        GeneratorTaskConfig(**wrong)


def test_a_loss_aware_sampler_learns_the_same_from_any_microbatches() -> None:
    timesteps = TimestepConfig(schedule_sampler="loss-second-moment")

    def memory(microbatch: int) -> dict[str, Tensor]:
        model = tiny_generator(awake=True, dtype=torch.float64)
        task = generator_task(model, PLAIN, timesteps=timesteps, microbatch=microbatch)
        for first in (0, 8):
            gradients(task, batch_of(range(first, first + 8), bad=[1]))
        state: dict[str, Tensor] = task.state_dict()["timestep_sampler"]
        return state

    whole, pieces = memory(-1), memory(3)
    assert int(whole["counts"].sum()) == 15  # the broken sample teaches nothing
    assert torch.equal(whole["counts"], pieces["counts"])
    assert torch.allclose(whole["losses"], pieces["losses"], rtol=1e-12)

    resumed = generator_task(tiny_generator(), PLAIN, timesteps=timesteps)
    resumed.load_state_dict({"timestep_sampler": whole})
    assert torch.equal(resumed.state_dict()["timestep_sampler"]["losses"], whole["losses"])


class Reader(Spy):
    """Predicts the picture that the caption tells (see `loop_tiny.sample`)."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.tokens is not None and cond.drop is not None
        level = (cond.tokens[:, 1] - 3) * 16 / 127.5 - 1  # [B]
        level = torch.where(cond.drop, torch.zeros_like(level), level)
        return level[:, None, None, None].to(x_t) * torch.ones_like(x_t) + 0 * self.weight


def test_matched_captions_beat_shuffled_ones_where_captions_are_read() -> None:
    reader = Reader(GeneratorConfig(learn_sigma=False))
    x_0_process = process("x0", learn_sigma=False)
    task = generator_task(reader, diffusion=x_0_process)
    values = task.evaluate(held_out(samples=16))
    assert values["val_caption_wins"] == 1.0
    assert values["val_loss"] < 0.03 < values["val_loss_shuffled"]
    assert values["val_caption_gain"] > 0.1

    deaf = Spy(GeneratorConfig(learn_sigma=False))
    values = generator_task(deaf).evaluate(held_out(samples=16))
    assert values["val_caption_gain"] == 0 and values["val_caption_wins"] == 0


def test_an_evaluation_is_the_same_every_time_and_changes_nothing() -> None:
    model = tiny_generator(dropout=0.3, small_size=8, awake=True).train()
    task = generator_task(model)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = task.evaluate(held_out())
    assert torch.equal(torch.get_rng_state(), state) and model.training
    torch.manual_seed(4)
    assert task.evaluate(held_out()) == first
    assert {"val_loss", *(f"val_loss_q{q}" for q in range(4))} <= first.keys()
    assert all(p.grad is None for p in model.parameters())


def test_an_evaluation_weighs_every_sample_once() -> None:
    task = generator_task(tiny_generator(awake=True, dtype=torch.float64))
    whole = task.evaluate([batch_of(range(6))])
    pieces = task.evaluate([batch_of([0, 1, 2, 3]), batch_of([4, 5, 90, 91], bad=[90, 91])])
    assert pieces["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-12)


def test_previews_are_drawn_as_sampling_is_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[StageSettings] = []

    def spy(*args: Any, settings: StageSettings, **options: Any) -> Tensor:
        seen.append(settings)
        return sample_stage(*args, settings=settings, **options)

    monkeypatch.setattr(task_module, "sample_stage", spy)
    generator_task(tiny_generator(awake=True)).preview(batch_of(range(1)), torch.tensor([1]), "x")
    (settings,) = seen
    assert (settings.sampler, settings.step_spacing) == ("unipc", "logsnr")
    assert settings.timestep_respacing == str(min(20, STEPS))


def test_previews_show_what_an_upsampler_was_given() -> None:
    task = generator_task(tiny_generator(small_size=8, awake=True))
    batch = batch_of(range(2))
    rows = task.preview(batch, torch.tensor([1, 2]), "model")
    assert list(rows) == ["input", "model"]
    assert all(row.shape == (2, 3, SIZE, SIZE) for row in rows.values())
    small = downsample(batch.image.float() / 127.5 - 1, 8)
    expected = ((small + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(rows["input"][:, :, ::2, ::2], expected)
    assert task.preview_from == "data"
    base = generator_task(tiny_generator(awake=True))
    assert list(base.preview(batch, torch.tensor([1, 2]), "x")) == ["x"]
    assert base.preview_from == "prompts"
