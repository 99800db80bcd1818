"""Guidance by a noised CLIP, alone and with classifier-free guidance, and reranking."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diff_dalle import Cascade
from diff_dalle.cascade.drawing import Drawing
from diff_dalle.diffusion.samplers import SAMPLERS
from diff_dalle.sampling_io.config import SampleConfig
from diff_dalle.training.stage import from_uint8

TINY = runpy.run_path(str(Path(__file__).parents[1] / "programs" / "tiny_cascade.py"))
PROMPTS = ["a red circle", "파란 별 위의 빨간 원", "a star", "a large blue square", "x"]
STEPS = 3


def files(folder: Path, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


def similarity(cascade: Cascade, pictures: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Cosines [N] of the first stage's CLIP at its step 0, computed apart from the cascade."""
    guide = cascade.stages[0].guide
    assert guide is not None
    clip, tokenizer = guide.loaded.clip, guide.loaded.tokenizer
    with torch.no_grad():
        images = from_uint8(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        features = clip.encode_image(images, torch.zeros(len(images), dtype=torch.int64))
        return torch.cosine_similarity(
            features, clip.encode_text(*tokenizer.encode(prompts, 32))
        ).numpy()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_gradient_points_uphill(folder: Path, tmp_path: Path, sampler: str) -> None:
    """A CLIP that sees no timestep has one landscape for all steps; samples climb it."""
    clip = TINY["write_clip"](tmp_path / "clip.pt", image_size=16, noised=False)
    cascade = Cascade.load(str(folder / "base.pt"), str(clip))
    options: dict[str, Any] = {"steps": 20, "batch_size": 5, "sampler": sampler}
    down, flat, up = (
        similarity(
            cascade,
            cascade.sample(PROMPTS, classifier_scale=30 * sign, **options).stages[0],
            PROMPTS,
        ).mean()
        for sign in (-1, 0, 1)
    )
    assert down + 0.004 < flat < up - 0.004


def test_scale_0_is_no_guidance(guided: Cascade, cascade: Cascade) -> None:
    off = guided.sample(PROMPTS[:2], steps=STEPS, classifier_scale=0).stages
    for one, other in zip(off, cascade.sample(PROMPTS[:2], steps=STEPS).stages, strict=True):
        np.testing.assert_array_equal(one, other)


def test_both_kinds_of_guidance_work_together(guided_base: Cascade) -> None:
    drawn = [
        guided_base.sample(PROMPTS[:3], steps=12, classifier_scale=c, guidance_scale=g).stages[0]
        for c, g in ((0, 1), (100, 1), (0, 3), (100, 3))
    ]
    for number, one in enumerate(drawn):
        for other in drawn[:number]:
            assert largest_difference(one, other) > 3
    means = [similarity(guided_base, pictures, PROMPTS[:3]).mean() for pictures in drawn]
    assert means[3] > means[2] + 0.005  # the CLIP still pulls under classifier-free guidance


def test_the_clip_is_asked_at_its_own_nearest_noise_level(
    guided_base: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CLIP of 1000 linear steps beside a generator of 20 cosine steps, respaced to 5."""
    guide = guided_base.stages[0].guide
    assert guide is not None
    asked: list[int] = []
    encode = guide.loaded.clip.encode_image

    def spy(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(int(t[0]))
        return encode(x_t, t)

    monkeypatch.setattr(guide.loaded.clip, "encode_image", spy)
    guided_base.sample(PROMPTS[:1], steps=5)
    assert len(asked) == 5

    def log_snr(alpha_bar: torch.Tensor) -> torch.Tensor:
        return torch.log(alpha_bar / (1 - alpha_bar))

    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    clip_levels = log_snr(torch.cumprod(1 - beta, 0))
    kept = guided_base.stages[0].loaded.diffusion.respace("5", "logsnr").alpha_bar
    nearest = [int((clip_levels - level).abs().argmin()) for level in log_snr(kept)]
    assert asked == nearest[::-1] and len(set(asked)) == 5


def test_guidance_weighs_the_clips_own_logit_scale(
    guided_base: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = guided_base.stages[0].guide
    assert guide is not None
    weak = guided_base.sample(PROMPTS[:1], steps=STEPS, classifier_scale=1).stages[0]
    halved = guide.loaded.clip.logit_scale.data - np.log(2)
    monkeypatch.setattr(guide.loaded.clip.logit_scale, "data", halved)
    strong = guided_base.sample(PROMPTS[:1], steps=STEPS, classifier_scale=2).stages[0]
    assert largest_difference(weak, strong) <= 1


def test_rerank_keeps_the_candidate_that_the_clip_likes_best(
    guided: Cascade, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[np.ndarray] = []
    compare = Drawing._similarity

    def spy(self: Drawing, number: int, picture: torch.Tensor) -> torch.Tensor:
        tried.append(picture.permute(0, 2, 3, 1).numpy())
        return compare(self, number, picture)

    monkeypatch.setattr(Drawing, "_similarity", spy)
    options: dict[str, Any] = {"steps": STEPS, "classifier_scale": 0, "batch_size": 5}
    result = guided.sample(PROMPTS, rerank=3, **options)
    scores = np.stack([similarity(guided, pictures, PROMPTS) for pictures in tried])  # [3,5]
    assert result.candidates == scores.argmax(0).tolist() and len(set(result.candidates)) > 1
    for number, candidate in enumerate(result.candidates):
        np.testing.assert_array_equal(result.stages[0][number], tried[candidate][number])
    # The first candidate is the picture without reranking, and later stages enlarge the best.
    plain = guided.sample(PROMPTS, **options)
    np.testing.assert_array_equal(tried[0], plain.stages[0])
    upsampler = Cascade.load(str(folder / "up32.pt"))
    enlarged = upsampler.sample(PROMPTS, steps=STEPS, batch_size=5, low_res=result.stages[0])
    np.testing.assert_array_equal(enlarged.stages[0], result.stages[1])


def test_rerank_at_a_later_stage_keeps_the_smaller_picture_too(
    folder: Path, tmp_path: Path
) -> None:
    clip = TINY["write_clip"](tmp_path / "clip.pt", image_size=32)
    cascade = Cascade.load(str(folder), ["none", str(clip), "none"])
    cfg = SampleConfig(rerank=4, timestep_respacing=["2"])
    assert cascade.plan(cfg).rerank_stage == 1
    assert cascade.plan(cfg).steps == 4 * (2 + 2) + 2
    result = cascade.sample(PROMPTS, steps=2, rerank=4, batch_size=5)
    first = cascade.sample(PROMPTS, steps=2, batch_size=5)
    kept_first = np.array(result.candidates) == 0
    assert not kept_first.all()
    same = [
        np.array_equal(one, other)
        for one, other in zip(result.stages[0], first.stages[0], strict=True)
    ]
    assert same == kept_first.tolist()
    upsampler = Cascade.load(str(folder / "up64.pt"))
    enlarged = upsampler.sample(PROMPTS, steps=2, batch_size=5, low_res=result.stages[1])
    np.testing.assert_array_equal(enlarged.stages[0], result.stages[2])
