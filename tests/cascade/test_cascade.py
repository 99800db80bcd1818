"""Chaining, keyed noise, each stage's inputs, streaming."""

from __future__ import annotations

import runpy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diff_dalle import Cascade
from diff_dalle.cascade import drawing
from diff_dalle.cascade.cut import describe_cut
from diff_dalle.errors import UsageError
from diff_dalle.models.generator import Cond, Generator
from diff_dalle.sampling_io.config import SampleConfig
from diff_dalle.sampling_io.previews import iterate
from diff_dalle.sampling_io.prompts import Prompt

TINY = runpy.run_path(str(Path(__file__).parents[1] / "programs" / "tiny_cascade.py"))
PROMPTS = ["a red circle", "파란 별 위의 빨간 원", "a star", "a large blue square", "x"]
STEPS = 3


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize("aug_level", [0.0, 0.3])
def test_a_chained_run_equals_a_run_stage_by_stage(
    cascade: Cascade, folder: Path, aug_level: float
) -> None:
    """Bit for bit: a stage hands on its uint8 picture and shares no noise with another."""
    options: dict[str, Any] = {"seed": 3, "steps": STEPS, "batch_size": 2}
    chained = cascade.sample(PROMPTS[:3], aug_level=aug_level, **options)
    pictures = None
    for name, together in zip(("base.pt", "up32.pt", "up64.pt"), chained.stages, strict=True):
        alone = Cascade.load(str(folder / name))
        level = 0.0 if pictures is None else aug_level
        drawn = alone.sample(PROMPTS[:3], low_res=pictures, aug_level=level, **options)
        pictures = drawn.stages[0]
        np.testing.assert_array_equal(pictures, together)
    assert chained.images[0].size == (64, 64)


def test_neither_batch_size_nor_ranks_decide_what_is_drawn(guided: Cascade) -> None:
    options: dict[str, Any] = {"seed": 5, "steps": STEPS, "guidance_scale": 2.0}
    one_by_one = guided.sample(PROMPTS, batch_size=1, **options).stages
    for batch_size in (2, 5):
        batched = guided.sample(PROMPTS, batch_size=batch_size, **options).stages
        for alone, together in zip(one_by_one, batched, strict=True):
            assert largest_difference(alone, together) <= 1
    cfg = SampleConfig(seed=5, steps=[str(STEPS)], guidance_scale=["2.0"])
    plan = guided.plan(cfg)
    share = guided.draw(plan, [1, 3], [PROMPTS[1], PROMPTS[3]])  # rank 1 of 2
    assert largest_difference(share.stages[2], one_by_one[2][[1, 3]]) <= 1


def test_seed_index_and_prompt_each_change_every_stage(cascade: Cascade) -> None:
    def draw(prompt: str, *, seed: int = 0, index: int = 0) -> list[np.ndarray]:
        plan = cascade.plan(SampleConfig(seed=seed, timestep_respacing=[str(STEPS)]))
        return cascade.draw(plan, [index], [prompt]).stages

    reference = draw("a red circle")
    for same, other in zip(reference, draw("a red circle"), strict=True):
        np.testing.assert_array_equal(same, other)
    for changed in (draw("a star"), draw("a red circle", seed=1), draw("a red circle", index=1)):
        for picture, other in zip(reference, changed, strict=True):
            assert largest_difference(picture, other) > 10


def test_no_two_pictures_share_noise(guided: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys differ by seed, index, candidate and stage, and come back for the same four."""
    seen: list[int] = []
    plain = drawing.sample_stage

    def spy(generator: Any, diffusion: Any, cond: Any, keys: Any, **options: Any) -> Any:
        seen.extend(keys.tolist())
        return plain(generator, diffusion, cond, keys, **options)

    monkeypatch.setattr(drawing, "sample_stage", spy)
    for seed in (0, 1):
        guided.sample(PROMPTS[:2], seed=seed, steps=1, rerank=2)
    assert len(seen) == len(set(seen)) == 2 * (2 * 2 + 2 + 2)
    first = list(seen)
    seen.clear()
    for seed in (0, 1):
        guided.sample(PROMPTS[1:3], seed=seed, steps=1, rerank=2, batch_size=1)
    assert set(seen) == set(first)


def test_an_upsampler_reads_text_and_small_picture(folder: Path) -> None:
    upsampler = Cascade.load(str(folder / "up32.pt"))
    small = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    one = upsampler.sample(["a red circle"] * 2, steps=STEPS, low_res=small).stages[0]
    text = upsampler.sample(["a star"] * 2, steps=STEPS, low_res=small).stages[0]
    other = upsampler.sample(["a red circle"] * 2, steps=STEPS, low_res=255 - small).stages[0]
    assert largest_difference(one, text) > 5 and largest_difference(one, other) > 5
    # Larger pictures are scaled down by averaging; enlarged ones come back exactly.
    large = small.repeat(4, axis=1).repeat(4, axis=2)
    same = upsampler.sample(["a red circle"] * 2, steps=STEPS, low_res=large).stages[0]
    np.testing.assert_array_equal(same, one)


def test_each_checkpoint_reads_tokens_of_its_own_tokenizer(
    guided: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Generator, torch.Tensor]] = []
    encode = Generator.encode

    def spy(self: Generator, cond: Cond) -> Cond:
        if cond.tokens is not None and cond.text is None:
            seen.append((self, cond.tokens))
        return encode(self, cond)

    monkeypatch.setattr(Generator, "encode", spy)
    guided.sample(PROMPTS[:1], steps=1)
    assert len(seen) == 3
    for stage, (generator, tokens) in zip(guided.stages, seen, strict=True):
        assert generator is stage.loaded.generator and stage.tokenizer is not None
        assert torch.equal(tokens, stage.tokenizer.encode(PROMPTS[:1], 32)[0])
    assert not torch.equal(seen[0][1], seen[2][1])


def test_cut_prompts_are_warned_about_once_for_each_reader(
    guided: Cascade, folder: Path, recwarn: pytest.WarningsRecorder
) -> None:
    Cascade.load(str(folder / "base.pt")).sample(["short", "long " * 60], steps=1)
    assert [str(one.message).split(":")[0] for one in recwarn] == ["prompt 1"]
    # Three generators and the CLIP have tokenizers of their own, which count differently.
    assert len(describe_cut(guided.stages, [Prompt("red circle " * 20, "p")])) > 1
    assert describe_cut(guided.stages, [Prompt("short", "p")]) == []


def test_one_prompt_needs_no_list(guided: Cascade) -> None:
    one, listed = (guided.sample(prompts, steps=1).stages[2] for prompts in ("ab", ["ab"]))
    np.testing.assert_array_equal(one, listed)


def test_a_cascade_without_captions(tmp_path: Path) -> None:
    path = TINY["write_generator"](tmp_path / "base.pt", image_size=16, cond_text=False)
    cascade = Cascade.load(str(path))
    assert not cascade.reads_text
    one, other = (cascade.sample([p], steps=STEPS).stages[0] for p in ("a", ""))
    np.testing.assert_array_equal(one, other)
    with pytest.raises(UsageError, match="--guidance_scale is 3, but .* without captions"):
        cascade.sample([""], guidance_scale=3)


def test_a_noise_level_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "up.pt"
    TINY["write_generator"](path, image_size=32, small_size=16, aug_level_cond=False)
    small = np.zeros((1, 16, 16, 3), np.uint8)
    with pytest.raises(UsageError, match="cannot be told a noise level"):
        Cascade.load(str(path)).sample(["a"], aug_level=0.1, low_res=small)


def test_the_stream_shows_every_step_and_ends_with_the_pictures(guided: Cascade) -> None:
    options: dict[str, Any] = {"seed": 7, "steps": [4, 2, 3], "guidance_scale": 2}
    previews = list(guided.stream(PROMPTS[:2], **options))
    steps = [(preview.stage, preview.step, preview.steps) for preview in previews]
    expected = [(s, n + 1, count) for s, count in enumerate((4, 2, 3)) for n in range(count)]
    assert steps == expected
    result = guided.sample(PROMPTS[:2], **options)
    for preview in previews:
        assert len(preview.images) == 2 and preview.images[0].size == (16 << preview.stage,) * 2
        if preview.step == preview.steps:
            shown = np.stack([np.asarray(image) for image in preview.images])
            np.testing.assert_array_equal(shown, result.stages[preview.stage])
    np.testing.assert_array_equal(np.asarray(previews[-1].images[1]), result.images[1])


def test_the_stream_ends_with_the_chosen_candidates(guided: Cascade) -> None:
    options: dict[str, Any] = {"seed": 7, "steps": 3, "rerank": 3}
    result = guided.sample(PROMPTS, **options)
    assert set(result.candidates) != {2}  # others than the last one are chosen, too
    previews = list(guided.stream(PROMPTS, **options))
    assert len(previews) == 3 * 3 + 3 + 3  # a stage with candidates, and two without
    last = {preview.stage: preview for preview in previews if preview.step == preview.steps}
    for number, pictures in enumerate(result.stages):
        shown = np.stack([np.asarray(image) for image in last[number].images])
        assert largest_difference(shown, pictures) <= 1


def test_a_clip_guides_where_the_caller_has_switched_gradients_off(guided_base: Cascade) -> None:
    options: dict[str, Any] = {"steps": 2, "classifier_scale": 20.0}
    expected = guided_base.sample(PROMPTS[:2], **options).stages[0]
    for switch in (torch.inference_mode, torch.no_grad):
        with switch():
            drawn = guided_base.sample(PROMPTS[:2], **options).stages[0]
        np.testing.assert_array_equal(drawn, expected)


def test_a_stream_that_nobody_reads_stops(cascade: Cascade) -> None:
    threads = threading.active_count()
    stream: Iterator[Any] = cascade.stream(PROMPTS[:1], steps=20)
    next(stream)
    assert threading.active_count() == threads + 1
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


def test_an_error_reaches_the_reader() -> None:
    def work(emit: Any) -> None:
        emit(1)
        raise ValueError("broken")

    items = iterate(work)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_a_seed_of_its_own_makes_a_picture_the_first_of_that_seed(cascade: Cascade) -> None:
    seeds = [7, 3, 7]
    together = cascade.sample(PROMPTS[:3], seeds=seeds, steps=2, batch_size=2).stages
    for number, seed in enumerate(seeds):
        alone = cascade.sample(PROMPTS[number], seed=seed, steps=2).stages
        for one, other in zip(alone, together, strict=True):
            assert np.abs(one[0].astype(int) - other[number]).max() <= 1
    with pytest.raises(UsageError, match="--seeds has 2 entries for 3 pictures: give one each"):
        cascade.sample(PROMPTS[:3], seeds=[1, 2])
