"""The cascade: loading and refusing, chaining, keyed noise, guidance, reranking, streaming."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diff_dalle import Cascade
from diff_dalle.cascade.drawing import Drawing
from diff_dalle.errors import UsageError
from diff_dalle.models.generator import Cond, Generator
from diff_dalle.sampling_io.config import SampleConfig, per_stage
from diff_dalle.sampling_io.previews import iterate
from diff_dalle.training.stage import from_uint8

TINY = runpy.run_path(str(Path(__file__).parent / "programs" / "tiny_cascade.py"))
PROMPTS = ["a red circle", "파란 별 위의 빨간 원", "a star", "a large blue square", "x"]
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["write_cascade"](tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="module")
def cascade(folder: Path) -> Cascade:
    return Cascade.load(str(folder))


@pytest.fixture(scope="module")
def guided(folder: Path) -> Cascade:
    """A cascade whose first stage has a noised CLIP beside it."""
    return Cascade.load(str(folder), str(folder / "clip.pt"))


def files(folder: Path, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


# Loading


def test_a_folder_is_ordered_by_size(cascade: Cascade, folder: Path) -> None:
    assert cascade.sizes == [16, 32, 64]
    assert [Path(stage.path).name for stage in cascade.stages] == ["base.pt", "up32.pt", "up64.pt"]
    assert cascade.models[0].checkpoint.step == 7


def test_a_comma_list_and_a_list_are_the_same(folder: Path) -> None:
    paths = files(folder, "base.pt", "up32.pt")
    assert Cascade.load(",".join(paths)).sizes == Cascade.load(paths).sizes == [16, 32]


def test_a_folder_of_runs_gives_the_newest_ema_of_each(folder: Path, tmp_path: Path) -> None:
    for name in ("model000003.pt", "ema_0.99_000002.pt", "ema_0.9_000003.pt", "ema_0.99_000003.pt"):
        TINY["write_generator"](tmp_path / "base" / name, image_size=16)
    (tmp_path / "base" / "opt000003.pt").write_bytes(b"no weights")
    TINY["write_generator"](tmp_path / "up" / "model000001.pt", image_size=32, small_size=16)
    TINY["write_clip"](tmp_path / "clip" / "model000009.pt", image_size=16)
    TINY["write_clip"](tmp_path / "clip" / "best.pt", image_size=16)
    cascade = Cascade.load(str(tmp_path), str(tmp_path))
    names = [Path(stage.path).name for stage in cascade.stages]
    assert names == ["ema_0.99_000003.pt", "model000001.pt"]
    guide = cascade.stages[0].guide
    assert guide is not None and Path(guide.path).name == "best.pt"


def test_one_clip_guides_the_stage_of_its_size(guided: Cascade, folder: Path) -> None:
    assert [stage.guide is not None for stage in guided.stages] == [True, False, False]
    paths = files(folder, "base.pt", "up32.pt")
    by_stage = Cascade.load(paths, [str(folder / "clip.pt"), "none"])
    assert [stage.guide is not None for stage in by_stage.stages] == [True, False]
    assert Cascade.load(paths, "none").stages[0].guide is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["clip.pt"], "clip.pt holds a classifier"),
        (["up32.pt", "base.pt"], r"base.pt makes 16 px, but .*up32.pt before it makes 32 px"),
        (["base.pt", "base.pt"], "from the smallest to the largest"),
        (["base.pt", "up64.pt"], r"up64.pt enlarges 32 px, but .* makes 16 px.*--small_size 16"),
        (["base.pt", "second.pt"], r"second.pt is a base model, but .*base.pt before it"),
        (["noise.pt"], "noise.pt is no checkpoint"),
        (["missing.pt"], "missing.pt does not exist"),
        (["empty"], "empty holds no checkpoint of a generator"),
        ([], "--model_path is missing"),
    ],
)
def test_what_makes_no_cascade_is_refused_in_one_line(
    folder: Path, tmp_path: Path, names: list[str], message: str
) -> None:
    TINY["write_generator"](tmp_path / "second.pt", image_size=32)
    (tmp_path / "noise.pt").write_bytes(b"weights?")
    (tmp_path / "empty").mkdir()
    paths = [str(folder / n if (folder / n).exists() else tmp_path / n) for n in names]
    with pytest.raises(UsageError, match=message) as error:
        Cascade.load(paths)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("classifiers", "message"),
    [
        (["base.pt"], "base.pt holds a generator"),
        (["clip.pt", "clip.pt"], "2 entries for 3 stages"),
        (["none", "clip.pt", "none"], r"sees 16 px, but the stages make 32 px"),
        (["clip64.pt"], None),
        (["clip8.pt"], r"sees 8 px, but the stages make 16, 32, 64 px"),
        (["missing.pt"], "--classifier_path .*missing.pt does not exist"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, classifiers: list[str], message: str | None
) -> None:
    for size in (8, 64):
        TINY["write_clip"](tmp_path / f"clip{size}.pt", image_size=size)
    known = {"none": "none"} | {n: str(folder / n) for n in ("base.pt", "clip.pt")}
    paths = [known.get(name, str(tmp_path / name)) for name in classifiers]
    if message is None:
        assert Cascade.load(str(folder), paths).stages[2].guide is not None
        return
    with pytest.raises(UsageError, match=message):
        Cascade.load(str(folder), paths)


def test_two_clips_of_one_size_are_not_chosen_between(folder: Path, tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        TINY["write_clip"](tmp_path / name, image_size=16)
    with pytest.raises(UsageError, match="two CLIPs of 16 px"):
        Cascade.load(str(folder), str(tmp_path))


def test_a_cpu_samples_in_fp32_and_says_so(folder: Path) -> None:
    cascade = Cascade.load(files(folder, "base.pt"), precision="fp16")
    assert cascade.precision == "fp32" and "fp32" in cascade.notes[0]
    assert Cascade.load(files(folder, "base.pt")).notes == []


def test_the_package_does_not_import_torch() -> None:
    code = "import diff_dalle, sys; assert 'torch' not in sys.modules; diff_dalle.__version__"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
    with pytest.raises(AttributeError):
        __import__("diff_dalle").nothing  # noqa: B018


# Plans


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": [1, 2]}, "--guidance_scale has 2 entries for 3 stages"),
        ({"guidance_scale": "strong"}, "--guidance_scale is 'strong'"),
        ({"guidance_scale": "nan"}, "be a number"),
        ({"steps": "ddim19"}, "ddim19"),
        ({"steps": [3, 3, 400]}, "400"),
        ({"aug_level": 2}, "--aug_level"),
        ({"rerank": 2}, "--rerank is 2: name the CLIP"),
        ({"rerank": 0}, "--rerank"),
        ({"ddim_eta": 1.5}, "--ddim_eta"),
        ({"batch_size": 0}, "--batch_size"),
        ({"low_res": np.zeros((5, 16, 16, 3), np.uint8)}, "--low_res is for an upsampler"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    cascade: Cascade, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        cascade.sample(PROMPTS, **settings)


def test_no_prompt_is_refused(cascade: Cascade) -> None:
    with pytest.raises(UsageError, match="no prompt"):
        cascade.sample([])


@pytest.mark.parametrize(
    ("low_res", "message"),
    [
        (None, "is an upsampler of 16 px pictures"),
        (np.zeros((5, 8, 8, 3), np.uint8), r"holds uint8 \(5, 8, 8, 3\)"),
        (np.zeros((5, 16, 32, 3), np.uint8), "holds uint8"),
        (np.zeros((5, 16, 16, 3), np.float32), "holds float32"),
        (np.zeros((4, 16, 16, 3), np.uint8), "4 pictures for 5 prompts"),
    ],
)
def test_an_upsampler_needs_small_pictures_that_fit(
    folder: Path, low_res: np.ndarray | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Cascade.load(str(folder / "up32.pt")).sample(PROMPTS, steps=2, low_res=low_res)


def test_default_steps_are_many_for_the_base_and_few_above(cascade: Cascade) -> None:
    plan = cascade.plan(SampleConfig())
    assert [stage.steps for stage in plan.stages] == [20, 20, 20]  # all that the models have
    plan = cascade.plan(SampleConfig(timestep_respacing=["10", "ddim5", "1,2"]))
    assert [stage.steps for stage in plan.stages] == [10, 5, 3] and plan.steps == 18


def test_values_for_stages() -> None:
    assert per_stage([1, 2, 3], 3, "x") == [1, 2, 3] and per_stage([1], 3, "x") == [1, 1, 1]
    config = SampleConfig(steps=["20", "12", "6"])
    assert config.resolved_respacing == ["20", "12", "6"]
    with pytest.raises(UsageError, match="--steps"):
        SampleConfig(steps=["20"], timestep_respacing=["10"])
    assert SampleConfig(use_fp16=True).resolved_precision == "fp16"
    with pytest.raises(UsageError, match="--precision"):
        SampleConfig(use_fp16=True, precision="bf16")


# Chaining and keyed noise


@pytest.mark.parametrize("aug_level", [0.0, 0.3])
def test_a_chained_run_equals_a_run_stage_by_stage(
    cascade: Cascade, folder: Path, aug_level: float
) -> None:
    """Bit for bit: a stage hands on its uint8 picture and shares no noise with another."""
    options: dict[str, Any] = {"seed": 3, "steps": STEPS, "batch_size": 2, "aug_level": aug_level}
    chained = cascade.sample(PROMPTS[:3], **options)
    pictures = None
    for name, together in zip(("base.pt", "up32.pt", "up64.pt"), chained.stages, strict=True):
        alone = Cascade.load(str(folder / name))
        pictures = alone.sample(PROMPTS[:3], low_res=pictures, **options).stages[0]
        np.testing.assert_array_equal(pictures, together)
    assert chained.images[0].size == (64, 64)


def test_neither_batch_size_nor_ranks_decide_what_is_drawn(guided: Cascade) -> None:
    options: dict[str, Any] = {"seed": 5, "steps": STEPS, "guidance_scale": 2.0}
    one_by_one = guided.sample(PROMPTS, batch_size=1, **options).stages
    for batch_size in (2, 5):
        batched = guided.sample(PROMPTS, batch_size=batch_size, **options).stages
        for alone, together in zip(one_by_one, batched, strict=True):
            assert largest_difference(alone, together) <= 1
    cfg = SampleConfig(seed=5, timestep_respacing=[str(STEPS)], guidance_scale=["2.0"])
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
        assert torch.equal(tokens, stage.tokenizer.encode(PROMPTS[:1], 16)[0])
    assert not torch.equal(seen[0][1], seen[2][1])
    assert len(guided.text_readers()) == 4  # three generators and the CLIP


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


# Guidance


def similarity(cascade: Cascade, pictures: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Cosines [N] of the first stage's CLIP at its step 0, computed apart from the cascade."""
    guide = cascade.stages[0].guide
    assert guide is not None
    clip, tokenizer = guide.loaded.clip, guide.loaded.tokenizer
    with torch.no_grad():
        images = from_uint8(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        features = clip.encode_image(images, torch.zeros(len(images), dtype=torch.int64))
        return torch.cosine_similarity(
            features, clip.encode_text(*tokenizer.encode(prompts, 16))
        ).numpy()


@pytest.mark.parametrize("use_ddim", [False, True])
def test_the_gradient_points_uphill(guided: Cascade, use_ddim: bool) -> None:
    means = []
    for scale in (-20, 0, 20):
        result = guided.sample(
            PROMPTS, steps=10, batch_size=5, classifier_scale=scale, use_ddim=use_ddim
        )
        means.append(similarity(guided, result.stages[0], PROMPTS).mean())
    assert means[0] < means[1] - 0.01 and means[1] + 0.01 < means[2]


def test_scale_0_is_no_guidance(guided: Cascade, cascade: Cascade) -> None:
    off = guided.sample(PROMPTS[:2], steps=STEPS, classifier_scale=0).stages
    for one, other in zip(off, cascade.sample(PROMPTS[:2], steps=STEPS).stages, strict=True):
        np.testing.assert_array_equal(one, other)


def test_both_kinds_of_guidance_work_together(guided: Cascade) -> None:
    drawn = [
        guided.sample(PROMPTS[:2], steps=8, classifier_scale=c, guidance_scale=g).stages[0]
        for c, g in ((0, 1), (20, 1), (0, 4), (20, 4))
    ]
    for number, one in enumerate(drawn):
        for other in drawn[:number]:
            assert largest_difference(one, other) > 3
    means = [similarity(guided, pictures, PROMPTS[:2]).mean() for pictures in drawn]
    assert means[3] > means[2] + 0.01  # the CLIP still pulls under classifier-free guidance


def test_the_clip_is_asked_at_its_own_nearest_noise_level(
    guided: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CLIP of 1000 linear steps beside a generator of 20 cosine steps, respaced to 5."""
    guide = guided.stages[0].guide
    assert guide is not None
    asked: list[int] = []
    encode = guide.loaded.clip.encode_image

    def spy(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(int(t[0]))
        return encode(x_t, t)

    monkeypatch.setattr(guide.loaded.clip, "encode_image", spy)
    guided.sample(PROMPTS[:1], steps=[5, 1, 1])
    assert len(asked) == 5

    def log_snr(alpha_bar: torch.Tensor) -> torch.Tensor:
        return torch.log(alpha_bar / (1 - alpha_bar))

    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    clip_levels = log_snr(torch.cumprod(1 - beta, 0))
    kept = guided.stages[0].loaded.diffusion.respace("5").alpha_bar
    nearest = [int((clip_levels - level).abs().argmin()) for level in log_snr(kept)]
    assert asked == nearest[::-1] and len(set(asked)) == 5


def test_guidance_weighs_the_clips_own_logit_scale(
    guided: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = guided.stages[0].guide
    assert guide is not None
    weak = guided.sample(PROMPTS[:1], steps=STEPS, classifier_scale=1).stages[0]
    halved = guide.loaded.clip.logit_scale.data - np.log(2)
    monkeypatch.setattr(guide.loaded.clip.logit_scale, "data", halved)
    strong = guided.sample(PROMPTS[:1], steps=STEPS, classifier_scale=2).stages[0]
    assert largest_difference(weak, strong) <= 1


# Reranking


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
    paths = files(folder, "base.pt", "up32.pt")
    cascade = Cascade.load(paths, ["none", str(clip)])
    result = cascade.sample(PROMPTS, steps=2, rerank=4, batch_size=5)
    cfg = SampleConfig(rerank=4, timestep_respacing=["2"])
    assert cascade.plan(cfg).rerank_stage == 1 and cascade.plan(cfg).steps == 16
    first = cascade.sample(PROMPTS, steps=2, batch_size=5)
    kept_first = np.array(result.candidates) == 0
    assert not kept_first.all()
    same = [
        np.array_equal(one, other)
        for one, other in zip(result.stages[0], first.stages[0], strict=True)
    ]
    assert same == kept_first.tolist()


# Streaming


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


def test_messages_are_one_line(folder: Path) -> None:
    with pytest.raises(UsageError) as error:
        Cascade.load(files(folder, "up64.pt", "base.pt"))
    assert re.fullmatch(r"[^\n]+", str(error.value))
