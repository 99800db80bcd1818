"""One stage that edits: exact where the answer is known, plain sampling where nothing is asked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loop_tiny import LENGTH, SIZE, tiny_generator
from torch import Tensor, nn

from diff_dalle.diffusion.gaussian import GaussianDiffusion
from diff_dalle.diffusion.samplers import SAMPLERS, invert_ddim
from diff_dalle.diffusion.schedule import Schedule
from diff_dalle.models.generator import Cond, GeneratorConfig
from diff_dalle.training import stage
from diff_dalle.training.editing import Between, StageEdit
from diff_dalle.training.stage import StageSettings, from_uint8, sample_stage, shrink

KEYS = torch.tensor([11, 22, 33])
PROCESS = GaussianDiffusion(Schedule.make("cosine", 1000), prediction="v")
PICTURE = torch.randint(
    0, 256, (3, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
)
SMOOTH = torch.linspace(60, 200, SIZE).to(torch.uint8).expand(3, 3, SIZE, SIZE)
LEFT = torch.zeros(3, 1, SIZE, SIZE)
LEFT[..., SIZE // 2 :] = 1  # the right half is drawn


@pytest.fixture(scope="module")
def generator() -> nn.Module:
    return tiny_generator(awake=True)


def captions(*numbers: int, length: int = LENGTH) -> Cond:
    tokens = torch.tensor(numbers)[:, None].expand(-1, LENGTH)
    mask = (torch.arange(LENGTH) < length).expand(len(numbers), -1)
    return Cond(tokens=tokens, mask=mask)


def draw(
    generator: nn.Module,
    edit: StageEdit | None = None,
    *,
    keys: Tensor = KEYS,
    cond: Cond | None = None,
    guide: object = None,
    **settings: object,
) -> Tensor:
    settings = {"timestep_respacing": "5"} | settings
    return sample_stage(
        generator,
        PROCESS,
        captions(3, 4, 5) if cond is None else cond,
        keys,
        image_size=SIZE,
        settings=StageSettings(**settings),
        guide=guide,
        edit=StageEdit() if edit is None else edit,
    )


def distance(one: Tensor, other: Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("threshold", ["static", "dynamic"])
def test_what_is_known_comes_back_bit_for_bit(
    generator: nn.Module, sampler: str, threshold: str
) -> None:
    """Under classifier-free guidance and a gradient, from noise and from the picture."""
    edit = StageEdit(picture=from_uint8(PICTURE), drawn=LEFT)
    for strength in (1.0, 0.6):
        picture = draw(
            generator,
            edit,
            sampler=sampler,
            threshold=threshold,
            strength=strength,
            guidance_scale=3.0,
            guide=lambda x_t, t: torch.full_like(x_t, 3.0),
        )
        half = SIZE // 2
        assert torch.equal(picture[..., :half], PICTURE[..., :half])
        assert distance(picture[..., half:], PICTURE[..., half:]) > 20


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_1_is_plain_sampling(generator: nn.Module, sampler: str) -> None:
    """Bit for bit, and so is a mask that is drawn everywhere."""
    plain = draw(generator, sampler=sampler)
    picture = from_uint8(PICTURE)
    assert torch.equal(plain, draw(generator, StageEdit(picture=picture), sampler=sampler))
    everywhere = StageEdit(picture=picture, drawn=torch.ones_like(LEFT))
    assert torch.equal(plain, draw(generator, everywhere, sampler=sampler))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_picture_fades_with_strength(generator: nn.Module, sampler: str) -> None:
    """A tiny strength gives it back but for its step's noise, sigma = 0.006 or 0.8 grey levels."""
    edit = StageEdit(picture=from_uint8(PICTURE))
    found = [
        draw(generator, edit, sampler=sampler, strength=strength, timestep_respacing="20")
        for strength in (0.01, 0.3, 0.6)
    ]
    assert distance(found[0], PICTURE) <= 6
    away = [float((one.double() - PICTURE).abs().mean()) for one in found]
    assert 2 * away[0] < away[1] and 1.1 * away[1] < away[2], away


class GaussianPixels(nn.Module):
    """Knows that pixels are independent and normal, of standard deviation 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = GeneratorConfig(learn_sigma=False)
        self.unused = nn.Parameter(torch.zeros(()))

    def encode(self, cond: Cond) -> Cond:
        return cond

    def remember(self, cond: Cond) -> Cond:
        return cond

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        a = PROCESS.alpha_bar[t].float().reshape(-1, 1, 1, 1)
        x_0 = a.sqrt() * 0.25 / (a * 0.25 + 1 - a) * x_t
        return (a.sqrt() * x_t - x_0) / (1 - a).sqrt()  # v


FIXED = GaussianDiffusion(PROCESS.schedule, prediction="v", variance="fixed_small")


def varied(share: float | None, steps: int, *, drawn: Tensor | None = None) -> Tensor:
    return sample_stage(
        GaussianPixels(),
        FIXED,
        captions(3, 4, 5),
        KEYS,
        image_size=SIZE,
        settings=StageSettings(
            sampler="ddim",
            variation=share,
            timestep_respacing=str(steps),
            step_spacing="logsnr",
            threshold="none",
        ),
        edit=StageEdit(picture=from_uint8(SMOOTH), drawn=drawn),
    )


def test_variation_0_gives_the_picture_back() -> None:
    """Up to the error of inversion, which is of first order in the steps."""
    errors = [float((varied(0.0, n).double() - SMOOTH).abs().max()) for n in (20, 80, 320)]
    assert errors[0] > 3 * errors[1] and errors[2] <= 1, errors


def test_variation_goes_from_the_picture_to_a_fresh_one() -> None:
    """The picture's share of what is drawn is cos(share pi / 2): this network is linear."""
    plain, returned = varied(None, 80).double(), varied(0.0, 80).double()
    for share in (0.3, 0.6, 1.0):
        kept, fresh = (f(share * math.pi / 2) for f in (math.cos, math.sin))
        expected = 127.5 + kept * (returned - 127.5) + fresh * (plain - 127.5)
        inside = (plain > 0) & (plain < 255) & (expected > 0) & (expected < 255)
        assert float((varied(share, 80) - expected)[inside].abs().max()) < 1.5 + 1e-6
    assert torch.equal(varied(1.0, 80), plain.to(torch.uint8))


def test_what_is_known_stays_known_under_variation(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the noise that is found is that of the whole picture."""
    half, noises = SIZE // 2, []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        noises.append(invert_ddim(*args, **kwargs))
        return noises[-1]

    monkeypatch.setattr(stage, "invert_ddim", spy)
    found = varied(0.5, 20, drawn=LEFT)
    assert torch.equal(found[..., :half], SMOOTH[..., :half])
    assert torch.equal(found[..., half:], varied(0.5, 20)[..., half:])
    assert torch.equal(noises[0], noises[1])


def between(share: list[float], *, cond: Cond | None, keys: Tensor) -> StageEdit:
    return StageEdit(
        between=Between(keys=keys, share=torch.tensor(share, dtype=torch.float64), cond=cond)
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_way_begins_and_ends_at_the_plain_pictures(generator: nn.Module, sampler: str) -> None:
    """Bit for bit, between captions of 2 and of 4 tokens and between noises."""
    here, there = captions(3, 3, 3, length=2), captions(9, 9, 9)
    keys, ends = torch.full((3,), 11), torch.full((3,), 77)
    edit = between([0.0, 0.5, 1.0], cond=there, keys=ends)
    options = {"sampler": sampler, "guidance_scale": 2.0}
    frames = draw(generator, edit, keys=keys, cond=here, **options)
    start = draw(generator, keys=keys, cond=here, **options)
    end = draw(generator, keys=ends, cond=there, **options)
    assert torch.equal(frames[0], start[0]) and torch.equal(frames[2], end[2])
    assert min(distance(frames[1], frames[0]), distance(frames[1], frames[2])) > 3


def test_a_caption_between_two_is_between_their_features(generator: nn.Module) -> None:
    here, there = captions(3, 3, 3, length=2), captions(9, 9, 9)
    way = between([0.0, 0.25, 1.0], cond=there, keys=KEYS).encode(generator, here)
    one, other = (generator.encode(cond).text for cond in (here, there))
    assert way.text is not None and way.mask is not None
    torch.testing.assert_close(way.text[1], 0.75 * one[1] + 0.25 * other[1])
    assert way.mask.sum(1).tolist() == [2, LENGTH, LENGTH]
    back = between([0.0, 0.25, 1.0], cond=here, keys=KEYS).encode(generator, there)
    assert back.mask is not None and back.mask.sum(1).tolist() == [LENGTH, LENGTH, 2]
    assert torch.equal(way.text[0], one[0]) and torch.equal(way.text[2], other[2])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_edit_depends_on_its_key_and_not_on_its_batch(
    generator: nn.Module, sampler: str
) -> None:
    variation = {"variation": 0.4} if sampler == "ddim" else {}

    def edited(rows: slice) -> Tensor:
        edit = StageEdit(
            picture=from_uint8(PICTURE[rows]),
            drawn=LEFT[rows],
            between=Between(
                keys=KEYS[rows] + 100, share=torch.tensor([0.2, 0.5, 0.9]).double()[rows]
            ),
        )
        cond = Cond(tokens=captions(3, 4, 5).tokens[rows], mask=captions(3, 4, 5).mask[rows])
        options = {"sampler": sampler, "strength": 1.0 if variation else 0.8}
        return draw(generator, edit, keys=KEYS[rows], cond=cond, **options, **variation)

    together, alone = edited(slice(0, 3)), edited(slice(2, 3))
    assert distance(together[2:], alone) <= 1
    assert torch.equal(edited(slice(2, 3)), alone)


def test_pictures_shrink_as_in_training() -> None:
    small = shrink(PICTURE, (SIZE // 2, SIZE // 2))
    boxes = PICTURE.double().reshape(3, 3, SIZE // 2, 2, SIZE // 2, 2).mean((3, 5))
    assert small.dtype == torch.uint8 and float((small - boxes).abs().max()) <= 0.5 + 1e-4
    assert shrink(PICTURE, (SIZE, SIZE)) is PICTURE
