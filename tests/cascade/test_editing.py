"""Editing through the whole cascade: what is known stays, what is not asked for is plain."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diff_dalle import Cascade
from diff_dalle.cascade import Edit
from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.config import SampleConfig

TINY = runpy.run_path(str(Path(__file__).parents[1] / "programs" / "tiny_cascade.py"))
PROMPTS = ["a red circle", "파란 별 위의 빨간 원"]
FEW: dict[str, Any] = {"steps": 2, "seed": 3}
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
OTHER = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
MASK = np.zeros((64, 64), np.uint8)
MASK[33:50, 20:64] = 255


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


def boxes(pixels: np.ndarray, size: int) -> np.ndarray:
    """[64,64,...] -> [size,size,box,...]: what each small pixel stands for."""
    k = 64 // size
    rows = pixels.reshape(size, k, size, k, *pixels.shape[2:]).swapaxes(1, 2)
    return rows.reshape(size, size, k * k, *pixels.shape[2:])


def test_the_known_part_is_the_picture_at_every_stage(guided: Cascade) -> None:
    """A small pixel is drawn anew if any of it is; the others are the picture's, shrunk."""
    edit = Edit(init_images=[PICTURE, OTHER], masks=MASK, strength=[0.5, 1, 0.5])
    for options in ({}, {"guidance_scale": 2, "classifier_scale": 30, "sampler": "ddpm"}):
        drawn = guided.sample(PROMPTS, edit=edit, **FEW, **options).stages
        for stage in drawn:
            size = stage.shape[1]
            known = boxes(MASK, size).max(2) == 0
            assert 0.5 < known.mean() < 0.9
            for picture, given in zip(stage, (PICTURE, OTHER), strict=True):
                small = np.round(boxes(given, size).astype(float).mean(2))
                assert largest_difference(picture[known], small[known]) <= (size < 64)
                assert largest_difference(picture[~known], small[~known]) > 30


def test_a_white_mask_is_plain_sampling(cascade: Cascade) -> None:
    """Bit for bit; a mask alone leaves every stage to start from noise."""
    white = Edit(init_images=PICTURE, masks=np.ones((64, 64), bool))
    plain = cascade.sample(PROMPTS, **FEW).stages
    for one, other in zip(cascade.sample(PROMPTS, edit=white, **FEW).stages, plain, strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_strength_is_the_first_stages(cascade: Cascade, folder: Path) -> None:
    """The others enlarge what it drew, from noise."""
    edited = cascade.sample(PROMPTS, edit=Edit(init_images=PICTURE, strength=0.5), **FEW)
    assert largest_difference(edited.stages[0], cascade.sample(PROMPTS, **FEW).stages[0]) > 10
    upsampler = Cascade.load(str(folder / "up32.pt"))
    enlarged = upsampler.sample(PROMPTS, low_res=edited.stages[0], **FEW)
    np.testing.assert_array_equal(enlarged.stages[0], edited.stages[1])


def test_strength_is_counted_in_steps(cascade: Cascade) -> None:
    edit = Edit(init_images=PICTURE, strength=[0.5, 1, 0.3])
    cfg = edit.configure(SampleConfig(steps=["10"]))
    request = cascade._ready(PROMPTS, cfg, None, edit)[0]
    plan = cascade.plan(cfg, edits=request.edits)
    assert [stage.steps for stage in plan.stages] == [5, 10, 3]
    assert [stage.evaluations for stage in plan.stages] == [5, 10, 3]


def test_a_variation_inverts_and_draws_with_ddim(cascade: Cascade) -> None:
    edit = Edit(init_images=PICTURE, variation=1.0)
    cfg = edit.configure(SampleConfig(steps=["4"], guidance_scale=["2"]))
    _, plan = cascade._ready(PROMPTS, cfg, None, edit)
    assert [stage.settings.sampler for stage in plan.stages] == ["ddim", "unipc", "unipc"]
    assert [stage.settings.variation for stage in plan.stages] == [1.0, None, None]
    assert [stage.evaluations for stage in plan.stages] == [16, 8, 8]
    fresh = cascade.sample(PROMPTS, edit=edit, **FEW)
    plain = cascade.sample(PROMPTS, sampler=["ddim", "unipc", "unipc"], **FEW)
    for one, other in zip(fresh.stages, plain.stages, strict=True):
        np.testing.assert_array_equal(one, other)
    near = cascade.sample(PROMPTS, edit=Edit(init_images=PICTURE, variation=0.3), **FEW)
    assert largest_difference(near.stages[0], plain.stages[0]) > 10


def test_frames_lead_from_each_prompt_to_its_end(guided: Cascade) -> None:
    """Both ends bit for bit, in every stage, under both kinds of guidance."""
    ends = ["a star", "x"]
    options = {**FEW, "guidance_scale": 2, "classifier_scale": 20, "batch_size": 1}
    way = Edit(interpolate_to=ends, interpolate_seed=9, frames=3)
    frames = guided.sample(PROMPTS, edit=way, **options).stages
    first = guided.sample(PROMPTS, **options).stages
    last = guided.sample(ends, **{**options, "seed": 9}).stages
    for drawn, start, end in zip(frames, first, last, strict=True):
        assert len(drawn) == 6
        np.testing.assert_array_equal(drawn[[0, 3]], start)
        assert largest_difference(drawn[[2, 5]], end) <= 1
        for middle, around in ((1, (0, 2)), (4, (3, 5))):
            assert min(largest_difference(drawn[middle], drawn[n]) for n in around) > 5


def test_frames_at_the_ends_have_the_contrast_sets_of_plain_pictures(
    guided_base: Cascade, tmp_path: Path
) -> None:
    """A set with both ends: each frame at an end is told from the other end."""
    captions = tmp_path / "captions.txt"
    captions.write_text("a red circle\na star\n")
    options: dict[str, Any] = {"contrast": str(captions), "classifier_scale": 500, "batch_size": 1}
    way = Edit(interpolate_to="a star", frames=2)
    frames = guided_base.sample("a red circle", edit=way, **FEW, **options).stages[0]
    for frame, prompt in zip(frames, ("a red circle", "a star"), strict=True):
        plain = guided_base.sample(prompt, edit=Edit(), **FEW, **options).stages[0][0]
        assert largest_difference(frame, plain) <= 1
        free = guided_base.sample(prompt, steps=2, seed=3, classifier_scale=0).stages[0][0]
        assert largest_difference(free, plain) > 1
    with pytest.raises(UsageError, match="tell the frames of prompt 0 from"):
        guided_base.sample("a red circle", edit=Edit(interpolate_to="a star", frames=3), **options)


def test_the_noise_stays_without_a_seed_and_the_prompt_without_an_end(cascade: Cascade) -> None:
    alike = cascade.sample("a", edit=Edit(interpolate_to="a", frames=3), **FEW).stages[0]
    assert largest_difference(alike[0], alike[1]) <= 1
    noises = cascade.sample("a", edit=Edit(interpolate_seed=3, frames=2), **FEW).stages[0]
    np.testing.assert_array_equal(noises[0], noises[1])  # FEW's seed
    moved = cascade.sample("a", edit=Edit(interpolate_seed=4, frames=2), **FEW).stages[0]
    assert largest_difference(moved[0], moved[1]) > 10


def test_the_way_from_a_noise_to_itself_is_none(cascade: Cascade) -> None:
    """With an end of the same seed: frames of one caption are one picture."""
    edit = Edit(interpolate_seed=3, frames=3)
    for stage in cascade.sample(PROMPTS[:1], edit=edit, **FEW).stages:
        assert largest_difference(stage[:1], stage) <= 1


def test_frames_do_not_depend_on_the_batch(cascade: Cascade) -> None:
    edit = Edit(
        init_images=[PICTURE, OTHER],
        masks=[MASK, MASK.T],
        strength=0.5,
        interpolate_to="a star",
        interpolate_seed=1,
        frames=2,
    )
    options = {**FEW, "negative_prompts": ["", "dark"], "guidance_scale": 2}
    together = cascade.sample(PROMPTS, edit=edit, batch_size=4, **options).stages
    alone = cascade.sample(PROMPTS, edit=edit, batch_size=1, **options).stages
    for one, other in zip(together, alone, strict=True):
        assert largest_difference(one, other) <= 1
    edited = ((PICTURE, MASK), (PICTURE, MASK), (OTHER, MASK.T), (OTHER, MASK.T))
    for frame, (given, mask) in zip(together[2], edited, strict=True):
        np.testing.assert_array_equal(frame[mask == 0], given[mask == 0])


def test_frames_from_small_pictures(folder: Path) -> None:
    """Each prompt's small picture goes with all of its frames."""
    small = np.random.default_rng(2).integers(0, 256, (2, 16, 16, 3), np.uint8)
    upsampler = Cascade.load(str(folder / "up32.pt"))
    way = Edit(interpolate_to="a star", frames=2)
    frames = upsampler.sample(PROMPTS, low_res=small, edit=way, batch_size=2, **FEW)
    plain = upsampler.sample(PROMPTS, low_res=small, batch_size=2, **FEW)
    assert frames.low_res is not None
    np.testing.assert_array_equal(frames.low_res, small.repeat(2, 0))
    assert largest_difference(frames.stages[0][[0, 2]], plain.stages[0]) <= 1


def test_one_small_picture_serves_several_given_ones(folder: Path) -> None:
    """In the stream too, whose frames share what their prompt was given."""
    small = np.random.default_rng(2).integers(0, 256, (1, 16, 16, 3), np.uint8)
    upsampler = Cascade.load(str(folder / "up32.pt"))
    edit = Edit(init_images=[PICTURE, OTHER], strength=0.5, interpolate_seed=4, frames=2)
    drawn = upsampler.sample("a star", low_res=small, edit=edit, **FEW)
    assert drawn.low_res is not None and len(drawn.stages[0]) == 4
    np.testing.assert_array_equal(drawn.low_res, small.repeat(4, 0))
    *_, last = upsampler.stream("a star", low_res=small, edit=edit, **FEW)
    shown = np.stack([np.asarray(image) for image in last.images])
    np.testing.assert_array_equal(shown, drawn.stages[0])


def test_frames_do_not_copy_small_pictures(folder: Path) -> None:
    """They may be an npz on the disk, larger than memory."""
    small = np.zeros((2, 16, 16, 3), np.uint8)
    upsampler = Cascade.load(str(folder / "up32.pt"))
    way = Edit(interpolate_to="a star", frames=100)
    request, _ = upsampler._ready(PROMPTS, way.configure(SampleConfig()), small, way)
    assert request.low_res is small and len(request.prompts) == 200
    assert request.edits.entries([0, 99, 100, 199, 200], 2) == [0, 0, 1, 1, 0]


def test_a_stage_larger_than_the_picture_follows_its_small_picture(cascade: Cascade) -> None:
    """And says so; the stages that the picture reaches keep it."""
    edit = Edit(init_images=PICTURE[:40, :40], masks=np.zeros((40, 40), np.uint8))
    with pytest.warns(UserWarning, match="holds 32 px, so stages from 64 px on follow"):
        drawn = cascade.sample(["a"], edit=edit, **FEW).stages
    expected = edit.read([(16, 16), (32, 32)])
    assert expected is not None
    np.testing.assert_array_equal(drawn[1], expected.pictures)
    small, _ = expected.at((16, 16), [0], torch.device("cpu"))
    assert largest_difference(drawn[0], ((small + 1) * 127.5).permute(0, 2, 3, 1).numpy()) <= 0


def test_the_stream_edits_too(cascade: Cascade) -> None:
    edit = Edit(init_images=PICTURE, masks=MASK, strength=0.5)
    last = list(cascade.stream(PROMPTS, edit=edit, **FEW))[-1]
    expected = cascade.sample(PROMPTS, edit=edit, **FEW)
    np.testing.assert_array_equal(np.asarray(last.images[1]), expected.images[1])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"init_images": PICTURE, "strength": 1.2}, "--strength is 1.2: it must lie above 0"),
        ({"init_images": PICTURE, "strength": 0}, "--strength is 0: "),
        ({"init_images": PICTURE, "strength": [0.5, 1]}, "--strength has 2 entries for 3 stages"),
        ({"strength": 0.5}, "--strength starts from a picture: name it with --init_images"),
        ({"variation": 0.5}, "--variation starts from a picture"),
        ({"init_images": PICTURE, "variation": 1.5}, "--variation is 1.5"),
        ({"init_images": PICTURE, "variation": 0.5, "strength": 0.5}, "beside --variation"),
        ({"init_images": PICTURE}, "--init_images is read by --masks, --strength"),
        ({"masks": MASK}, "--masks belong to pictures"),
        ({"init_images": PICTURE, "masks": MASK[:32]}, "is 64x32 px, but .*64x64 px: give a mask"),
        ({"init_images": PICTURE, "masks": [MASK] * 2}, "--masks holds 2 for 1 pictures"),
        ({"init_images": [PICTURE] * 3, "strength": 0.5}, "3 pictures for 2 prompts"),
        ({"init_images": PICTURE[:15], "strength": 0.5}, "64x15 px, but the first stage makes 16"),
        ({"init_images": PICTURE[:40, :40], "strength": [1, 1, 0.5]}, "holds 32 px: give 1 for"),
        ({"init_images": PICTURE / 255.0, "strength": 0.5}, "array 0 is float64: give uint8"),
        ({"init_images": "gone.png", "strength": 0.5}, "gone.png cannot be read"),
        ({"init_images": __file__, "strength": 0.5}, "cannot be used .not an image"),
        ({"interpolate_to": "x"}, "--frames is 0: it must be 2 or more"),
        ({"interpolate_seed": 1, "frames": 1}, "--frames is 1: it must be 2 or more"),
        ({"frames": 3}, "--frames is 3, but there is no end"),
        ({"interpolate_to": ["x"] * 3, "frames": 2}, "--interpolate_to has 3 entries for 2"),
    ],
)
def test_edits_that_do_not_fit_are_refused(
    cascade: Cascade, edit: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        cascade.sample(PROMPTS, edit=Edit(**edit), **FEW)
    assert "\n" not in str(error.value)


def test_what_contradicts_an_edit_is_refused(guided: Cascade, folder: Path, tmp_path: Path) -> None:
    varied = Edit(init_images=PICTURE, variation=0.5)
    with pytest.raises(UsageError, match="--sampler is 'heun': it must be ddim or left out"):
        guided.sample(PROMPTS, edit=varied, sampler="heun")
    with pytest.raises(UsageError, match="--ddim_eta is 0.5 beside --variation"):
        guided.sample(PROMPTS, edit=varied, sampler="ddim", ddim_eta=0.5)
    with pytest.raises(UsageError, match="--rerank is 2: frames"):
        guided.sample(PROMPTS, edit=Edit(interpolate_seed=1, frames=2), rerank=2)
    wordless = TINY["write_generator"](tmp_path / "a.pt", image_size=16, cond_text=False)
    with pytest.raises(UsageError, match="--interpolate_to is read by no model here"):
        Cascade.load(wordless).sample(PROMPTS, edit=Edit(interpolate_to="x", frames=2), **FEW)
    upsampler = Cascade.load(str(folder / "up32.pt"))
    with pytest.raises(UsageError, match="--variation inverts a base model, but .*up32.pt"):
        small = np.zeros((2, 16, 16, 3), np.uint8)
        upsampler.sample(PROMPTS, edit=varied, low_res=small)
