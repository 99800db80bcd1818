"""Pictures of other sizes and shapes, and in tiles, through all stages."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diff_dalle import Cascade, keyed_noise
from diff_dalle.cascade import Edit
from diff_dalle.cascade.drawing import Drawing
from diff_dalle.cascade.offload import Residence
from diff_dalle.cascade.sizing import choose_sizes
from diff_dalle.cascade.turns import Turns
from diff_dalle.errors import UsageError
from diff_dalle.models.generator import Cond, Generator
from diff_dalle.sampling_io.config import SampleConfig
from diff_dalle.sampling_io.sizes import parse_size, spell

TINY = runpy.run_path(str(Path(__file__).parents[1] / "programs" / "tiny_cascade.py"))
PROMPTS = ["a red circle", "a star"]
pytestmark = pytest.mark.filterwarnings("ignore:stage . is drawn in tiles")
OPTIONS: dict[str, Any] = {"steps": 2, "seed": 3}


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


def small(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


# Multiples of 16, so that means of a small pixel's 16 are whole and round alike when turned.
GIVEN = np.random.default_rng(4).integers(0, 16, (36, 48, 3), np.uint8) * 16
HOLE = np.zeros((36, 48), np.uint8)
HOLE[21:30, 7:40] = 255
EDITS = {
    "none": lambda turn: None,
    "mask and strength": lambda turn: Edit(
        init_images=turn(GIVEN), masks=turn(HOLE), strength=[0.5, 1, 0.5]
    ),
    "variation": lambda turn: Edit(init_images=turn(GIVEN), variation=0.3),
    "frames": lambda turn: Edit(interpolate_to="a blue star", interpolate_seed=5, frames=2),
}


@pytest.mark.parametrize("edit", EDITS)
def test_turned_stages_draw_turned_pictures(
    cascade: Cascade, folder: Path, monkeypatch: pytest.MonkeyPatch, edit: str
) -> None:
    """48 x 32 px and 32 x 48 px: rows and columns are never mixed up, by any stage."""
    options = {**OPTIONS, "guidance_scale": 2.0, "aug_level": 0.3}
    given = EDITS[edit](lambda pixels: pixels)
    upright = cascade.sample(PROMPTS, size="48x32", edit=given, **options).stages
    assert [part.shape[1:3] for part in upright] == [(8, 12), (16, 24), (32, 48)]
    other, normal = Cascade.load(str(folder)), keyed_noise.normal
    for part in other.stages:
        for module in part.loaded.generator.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.transpose(2, 3).clone()

    def turned(keys: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
        return normal(keys, (shape[0], shape[2], shape[1]), stream).transpose(2, 3)

    monkeypatch.setattr(keyed_noise, "normal", turned)
    given = EDITS[edit](lambda pixels: pixels.swapaxes(0, 1))
    lying = other.sample(PROMPTS, size="32x48", edit=given, **options).stages
    for one, two in zip(upright, lying, strict=True):
        assert largest_difference(one, two.transpose(0, 2, 1, 3)) <= 2
        assert one.std() > 10


def test_the_trained_size_is_the_default(cascade: Cascade) -> None:
    default = cascade.sample(PROMPTS[:1], steps=1).stages
    for size in (64, "auto"):
        for one, two in zip(
            default, cascade.sample(PROMPTS[:1], size=size, steps=1).stages, strict=True
        ):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("asked", "nearest"), [("100x64", "104x64"), ("3x200", "8x200"), ("83x62", "80x64")]
)
def test_a_size_that_does_not_fit_names_the_nearest(
    cascade: Cascade, asked: str, nearest: str
) -> None:
    """A base model that halves once, enlarged four times: multiples of 8."""
    wrong = f"--size is {asked}: .* multiples of 8 .*; the nearest is {nearest}$"
    with pytest.raises(UsageError, match=wrong):
        cascade.sample(PROMPTS, size=asked)
    cascade.plan(SampleConfig(size=nearest))


def test_every_stages_own_multiple_counts(folder: Path, tmp_path: Path) -> None:
    """An upsampler 16 -> 32 px that halves three times needs multiples of 8 of its own."""
    deep = TINY["write_generator"](
        tmp_path / "deep.pt", image_size=32, small_size=16, channel_mult=(1, 1, 1, 1)
    )
    stages = Cascade.load([str(folder / "base.pt"), str(deep)]).stages
    assert choose_sizes(stages, "40x16") == [(8, 20), (16, 40)]
    with pytest.raises(UsageError, match="multiples of 8 .* nearest is 40x16"):
        choose_sizes(stages, "36x12")
    assert choose_sizes(stages[1:], "40x8") == [(8, 40)]
    with pytest.raises(UsageError, match="multiples of 4 .* nearest is 36x12"):
        choose_sizes(Cascade.load(str(folder)).stages[:2], "35x13")


@pytest.mark.parametrize("text", ["", "big", "0x64", "64x", "64x64x3", "-8", "6.5"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--size is .* such as 320x192"):
        SampleConfig(size=text)


def test_sizes_are_spelled_width_first() -> None:
    assert parse_size(" 320X192 ", "size") == (192, 320) and parse_size("7", "size") == (7, 7)
    assert spell((192, 320)) == "320x192" and spell((7, 7)) == "7"


def test_an_upsampler_enlarges_other_shapes(folder: Path) -> None:
    """Larger pictures of the shape are scaled down; another shape is refused."""
    upsampler = Cascade.load(str(folder / "up32.pt"))
    given = small(2, 12, 20)
    result = upsampler.sample(PROMPTS, low_res=given, size="40x24", **OPTIONS)
    assert result.stages[0].shape == (2, 24, 40, 3)
    assert result.low_res is not None and result.consistency[0] is not None
    np.testing.assert_array_equal(result.low_res, given)
    large = given.repeat(2, axis=1).repeat(2, axis=2)
    again = upsampler.sample(PROMPTS, low_res=large, size="40x24", **OPTIONS)
    np.testing.assert_array_equal(again.stages[0], result.stages[0])
    wrong = r"--low_res holds uint8 \(2, 20, 12, 3\), .* \(N, 12, 20, 3\)"
    with pytest.raises(UsageError, match=wrong):
        upsampler.sample(PROMPTS, low_res=small(2, 20, 12), size="40x24")


def test_a_clip_guides_its_own_size_alone_and_chooses_among_any(guided: Cascade) -> None:
    """It reads noised pictures, which cannot be resized; finished ones can."""
    wrong = "--size makes a stage 24x16 px, but .*clip.pt guides pictures of 16 px alone"
    with pytest.raises(UsageError, match=wrong):
        guided.sample(PROMPTS, size="96x64")
    options = {**OPTIONS, "classifier_scale": 0, "size": "96x64"}
    chosen = guided.sample(PROMPTS, rerank=3, **options)
    assert chosen.stages[2].shape == (2, 64, 96, 3)
    # It is shown the middle: a candidate that it likes there is kept.
    clip = guided.stages[0].guide
    assert clip is not None
    plan = guided.plan(
        SampleConfig(seed=3, steps=["2"], rerank=3, size="96x64", classifier_scale=["0"])
    )
    scores = []
    for candidate in range(3):
        pictures = one_candidate(guided, plan, candidate)
        middle = pictures[:, :, :, 4:20].float() / 127.5 - 1
        tokens, mask = clip.loaded.tokenizer.encode(PROMPTS, clip.text_length)
        with torch.no_grad():
            image = clip.loaded.clip.encode_image(middle, torch.zeros(2))
            scores.append((image * clip.loaded.clip.encode_text(tokens, mask)).sum(1))
    assert chosen.candidates == torch.stack(scores).argmax(0).tolist()


def one_candidate(cascade: Cascade, plan: Any, candidate: int) -> Tensor:
    drawing = Drawing(
        turns=Turns(cascade.stages, Residence(offload=False)),
        plan=plan,
        precisions=cascade._precisions,
        indices=range(2),
        prompts=PROMPTS,
    )
    return drawing._stage(0, None, candidate=candidate)


def test_the_stream_has_every_stages_shape(cascade: Cascade) -> None:
    options: dict[str, Any] = {**OPTIONS, "size": "48x32", "tile_size": 32, "tile_overlap": 16}
    previews = list(cascade.stream(PROMPTS, **options))
    assert [preview.images[0].size for preview in previews[::2]] == [(12, 8), (24, 16), (48, 32)]
    last = np.stack([np.asarray(image) for image in previews[-1].images])
    np.testing.assert_array_equal(last, cascade.sample(PROMPTS, **options).stages[2])


class Shapes:
    """What the generators of a cascade are shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, ...]] = []
        forward = Generator.forward

        def spy(model: Generator, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            self.seen.append(tuple(x_t.shape))
            return forward(model, x_t, t, cond)

        monkeypatch.setattr(Generator, "forward", spy)


def test_upsamplers_are_asked_in_tiles(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value is for those whose pictures are larger; neither batch decides what is drawn."""
    shapes = Shapes(monkeypatch)
    own: dict[str, Any] = {"steps": 1, "guidance_scale": 2, "size": "32x64"}
    options: dict[str, Any] = {**own, "tile_size": 32, "tile_overlap": 8}
    tiled = cascade.sample(PROMPTS, tile_batch=5, **options).stages
    # 32 x 64 px in 3 tiles of two pictures, with and without caption: 12, 5 at a time.
    assert [shape[0] for shape in shapes.seen] == [4, 4, 5, 5, 2]
    assert [shape[2:] for shape in shapes.seen] == [(16, 8), (32, 16), *[(32, 32)] * 3]
    whole = cascade.sample(PROMPTS, **own).stages
    np.testing.assert_array_equal(tiled[1], whole[1])
    assert 1 < largest_difference(tiled[2], whole[2])
    one_by_one = cascade.sample(PROMPTS, batch_size=1, **options).stages
    assert largest_difference(tiled[2], one_by_one[2]) <= 1
    plan = cascade.plan(SampleConfig(steps=["2"], tile_size=["32"]))
    assert plan.describe_cost().endswith("32 px 2 (2 steps), 64 px 2 (2 steps), each of 9 tiles")
    (note,) = plan.notes()
    assert note.startswith("stage 3 is drawn in tiles of 32 px that share 8: its norms and att")


def test_a_quarter_is_shared_where_nothing_is_said(cascade: Cascade) -> None:
    settings = cascade.plan(SampleConfig(tile_size=["0", "20", "32"])).stages
    found = [(p.settings.tile_size, p.settings.tile_overlap) for p in settings]
    assert found == [(0, 0), (20, 6), (32, 8)]
    settings = cascade.plan(SampleConfig(tile_size=["0", "2", "4"])).stages
    assert [part.settings.tile_overlap for part in settings] == [0, 0, 2]  # units of 2 px
    settings = cascade.plan(SampleConfig(tile_size=["0", "0", "0"])).stages
    assert [part.settings.tile_size for part in settings] == [0, 0, 0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tile_size": [16, 0, 32]}, "--tile_size is 16, but .*base.pt is a base model"),
        ({"tile_size": 31}, "--tile_size is 31: it must be a multiple of 2, by .*up32.pt"),
        ({"tile_size": 32.5}, "--tile_size is '32.5': it must be whole pixels"),
        ({"tile_size": -32}, "--tile_size is '-32': it must be whole pixels"),
        ({"tile_size": 32, "tile_overlap": 32}, "--tile_overlap is 32: .*less than .*32"),
        ({"tile_size": 32, "tile_overlap": 7}, "--tile_overlap is 7: it must be a multiple of 2"),
        ({"tile_size": 64}, "--tile_size is 64: no upsampler here makes a larger picture .*64 px"),
        ({"tile_size": [0, 32]}, "--tile_size has 2 entries for 3 stages"),
        ({"tile_overlap": 8}, "--tile_overlap is .*stand beside --tile_size"),
        ({"tile_batch": 2}, "--tile_batch is 2: it must stand beside --tile_size"),
        ({"tile_size": 32, "tile_batch": 0}, "--tile_batch is 0"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(
    cascade: Cascade, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        cascade.sample(PROMPTS, **flags)


def test_a_network_that_is_told_places_takes_no_tiles(folder: Path, tmp_path: Path) -> None:
    """Every tile would claim to be the whole picture."""
    path = TINY["write_generator"](
        tmp_path / "up.pt", image_size=32, small_size=16, attention_positions=True
    )
    upsampler = Cascade.load(str(path))
    with pytest.raises(UsageError, match="--tile_size is 16, but .*attention_positions"):
        upsampler.sample(PROMPTS, low_res=small(2, 16, 16), tile_size=16)
    Cascade.load(str(folder / "up32.pt")).sample(
        PROMPTS, low_res=small(2, 16, 16), tile_size=16, steps=1
    )
