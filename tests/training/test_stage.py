"""One stage, sampled: known answers with a network that knows the picture."""

import dataclasses

import pytest
import torch
from loop_tiny import LENGTH, SIZE, process, tiny_generator
from torch import Tensor, nn

from diff_dalle.diffusion.samplers import SAMPLERS
from diff_dalle.errors import UsageError
from diff_dalle.models.generator import Cond, GeneratorConfig
from diff_dalle.training import stage
from diff_dalle.training.stage import (
    StageSettings,
    from_uint8,
    sample_stage,
    to_uint8,
)

KEYS = torch.tensor([11, 22, 33])


class Oracle(nn.Module):
    """Answers with a picture (prediction x0) that its condition decides; counts its calls."""

    def __init__(self, cfg: GeneratorConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.unused = nn.Parameter(torch.zeros(()))
        self.encoded = 0
        self.batches: list[int] = []
        self.seen: list[Cond] = []

    def encode(self, cond: Cond) -> Cond:
        self.encoded += 1
        if not self.cfg.cond_text:
            return cond
        assert cond.tokens is not None
        return dataclasses.replace(cond, text=cond.tokens[:, :, None].float())

    def remember(self, cond: Cond) -> Cond:
        return cond

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.batches.append(len(x_t))
        self.seen.append(cond)
        if cond.low_res is not None:
            return nn.functional.interpolate(cond.low_res, x_t.shape[2:])
        if cond.text is None:
            return torch.full_like(x_t, 0.5)
        value = cond.text[:, 0, 0] / 10  # [B]
        if cond.drop is not None:
            value = torch.where(cond.drop, torch.zeros_like(value), value)
        return value[:, None, None, None].expand_as(x_t)


def oracle(**cfg: object) -> Oracle:
    return Oracle(GeneratorConfig(learn_sigma=False, **cfg))


def captions(*numbers: int) -> Cond:
    tokens = torch.tensor(numbers)[:, None].expand(-1, LENGTH)
    return Cond(tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool))


def sampled(model: nn.Module, cond: Cond, keys: Tensor = KEYS, **settings: object) -> Tensor:
    return sample_stage(
        model,
        process("x0", learn_sigma=False),
        cond,
        keys,
        image_size=SIZE,
        settings=StageSettings(**settings),
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_network_gives_its_picture(sampler: str) -> None:
    model = oracle()
    picture = sampled(model, captions(1, 2, 3), sampler=sampler, timestep_respacing="5")
    expected = to_uint8(torch.tensor([0.1, 0.2, 0.3]))[:, None, None, None]
    assert picture.dtype == torch.uint8
    assert torch.equal(picture, expected.expand(3, 3, SIZE, SIZE))
    assert model.encoded == 1 and model.batches == [3] * (9 if sampler == "heun" else 5)


def test_guidance_extrapolates_from_the_null_caption_in_one_batch() -> None:
    model = oracle()
    picture = sampled(model, captions(1, 2, 3), guidance_scale=3.0, timestep_respacing="4")
    expected = to_uint8(torch.tensor([0.3, 0.6, 0.9]))[:, None, None, None]
    assert torch.equal(picture, expected.expand_as(picture))
    assert model.encoded == 1 and model.batches == [6] * 4
    assert model.seen[0].drop is not None
    assert model.seen[0].drop.tolist() == [False] * 3 + [True] * 3


def test_a_step_without_guidance_asks_about_one_branch_alone() -> None:
    """Guided is the second half, nearer the image."""
    model = oracle()
    alpha_bar = process("x0", learn_sigma=False).respace("4").alpha_bar
    levels = ((1 - alpha_bar) / alpha_bar).sqrt().tolist()
    sampled(
        model,
        captions(1, 2, 3),
        guidance_scale=3.0,
        guidance_interval=f"0,{levels[1] * 1.001}",
        timestep_respacing="4",
    )
    assert model.batches == [3, 3, 6, 6]
    assert model.seen[0].drop is None and model.seen[2].drop is not None


def led_away(model: Oracle, negative: Cond) -> Tensor:
    return sample_stage(
        model,
        process("x0", learn_sigma=False),
        captions(1, 2, 3),
        KEYS,
        image_size=SIZE,
        settings=StageSettings(timestep_respacing="4", guidance_scale=3.0),
        negative=negative,
    )


def test_negative_prompts_take_the_null_captions_place_picture_by_picture() -> None:
    """x_n + 3 (x_c - x_n), where the picture of the null caption is 0."""
    negative = dataclasses.replace(captions(4, 2, 9), drop=torch.tensor([False, False, True]))
    model = oracle()
    expected = [0.4 + 3 * (0.1 - 0.4), 0.2, 0 + 3 * 0.3]
    picture = led_away(model, negative)
    assert torch.equal(
        picture, to_uint8(torch.tensor(expected))[:, None, None, None].expand_as(picture)
    )
    assert model.encoded == 2 and model.batches == [6] * 4  # once each; one batch
    without = dataclasses.replace(negative, drop=None)
    assert led_away(oracle(), without)[2].float().mean() < picture[2].float().mean()


def test_guidance_without_captions_is_refused() -> None:
    with pytest.raises(UsageError, match="--guidance_scale is 2"):
        sampled(oracle(cond_text=False), Cond(), guidance_scale=2.0)


def test_clipping_is_a_choice() -> None:
    clipped = sampled(oracle(), captions(9, 9, 9), guidance_scale=3.0, sampler="ddim")
    assert int(clipped.min()) == 255
    mean = sampled(oracle(), captions(9, 9, 9), threshold="none", sampler="ddim")
    assert torch.equal(mean, to_uint8(torch.full_like(mean, 0.9, dtype=torch.float32)))


def test_the_low_resolution_input_is_noised_to_the_level_that_is_told() -> None:
    low_res = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cond = Cond(low_res=low_res)
    model = oracle(cond_text=False, small_size=4)
    picture = sampled(model, cond, aug_level=0.0)
    large = nn.functional.interpolate(low_res, (SIZE, SIZE))
    assert torch.equal(picture, to_uint8(large))

    sampled(model, cond, aug_level=0.6)
    told = model.seen[-1]
    assert told.aug_level is not None and told.low_res is not None
    assert torch.allclose(told.aug_level, torch.full((3,), 0.6))
    noise = (told.low_res - 0.8 * low_res) / 0.6
    assert 0.8 < float(noise.std()) < 1.2 and abs(float(noise.mean())) < 0.3
    first = model.seen[-1].low_res
    sampled(model, cond, aug_level=0.6)
    again = model.seen[-1].low_res
    assert first is not None and again is not None and torch.equal(first, again)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_depends_on_its_key_and_not_on_its_batch(sampler: str) -> None:
    model = tiny_generator(awake=True)
    diffusion = process()
    settings = StageSettings(timestep_respacing="6", sampler=sampler, guidance_scale=2.0)

    def draw(numbers: list[int]) -> Tensor:
        cond = captions(*[3 + n for n in numbers])
        return sample_stage(
            model, diffusion, cond, KEYS[numbers], image_size=SIZE, settings=settings
        )

    together, alone = draw([0, 1, 2]), draw([2])
    assert (together[2:].int() - alone.int()).abs().max() <= 1
    assert (together[0].int() - together[1].int()).abs().max() > 1
    assert torch.equal(draw([2]), alone)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_gradient_of_a_guide_is_followed(sampler: str) -> None:
    model = tiny_generator(awake=True)
    settings = StageSettings(timestep_respacing="6", sampler=sampler)
    asked = []

    def brighter(x_t: Tensor, t: Tensor) -> Tensor:
        asked.append(int(t[0]))
        return torch.full_like(x_t, 3.0)

    def draw(guide: object) -> float:
        picture = sample_stage(
            model,
            process(),
            captions(3, 4, 5),
            KEYS,
            image_size=SIZE,
            settings=settings,
            guide=guide,
        )
        return float(picture.double().mean())

    assert draw(brighter) > draw(None) + 1
    assert list(dict.fromkeys(asked)) == [5, 4, 3, 2, 1, 0]  # steps of the respaced process


def test_the_models_mode_is_put_back_and_dropout_is_off() -> None:
    model = tiny_generator(dropout=0.5, awake=True).train()
    settings = StageSettings(timestep_respacing="3")

    def draw() -> Tensor:
        return sample_stage(
            model, process(), captions(3, 4, 5), KEYS, image_size=SIZE, settings=settings
        )

    assert torch.equal(draw(), draw())
    assert model.training and all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_sampler_comes_from_the_registry(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def gray(model: object, x_T: Tensor, diffusion: object, *, eta: float, **_: object) -> Tensor:
        asked.append(eta)
        return torch.zeros_like(x_T)

    monkeypatch.setitem(stage.SAMPLERS, sampler, gray)
    picture = sampled(oracle(), captions(9, 9, 9), sampler=sampler, ddim_eta=0.5)
    assert asked == [0.5] and torch.equal(picture, torch.full_like(picture, 128))


def test_every_step_is_reported() -> None:
    steps = []
    sample_stage(
        oracle(),
        process("x0", learn_sigma=False),
        captions(1, 2, 3),
        KEYS,
        image_size=SIZE,
        settings=StageSettings(timestep_respacing="4"),
        callback=lambda step, x_0: steps.append((step, tuple(x_0.shape))),
    )
    assert steps == [(i, (3, 3, SIZE, SIZE)) for i in (1, 2, 3, 4)]


def test_uint8_goes_there_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert to_uint8(torch.tensor([-3.0, -1.0, 1.0, 3.0])).tolist() == [0, 0, 255, 255]
