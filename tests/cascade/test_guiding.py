"""Intervals, schedules, negative prompts and contrast sets of a cascade, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diff_dalle import Cascade
from diff_dalle.cascade.contrast import Bank, ContrastSet, read_contrast
from diff_dalle.cascade.edits import NO_EDITS, Edits
from diff_dalle.cascade.init_images import read_given
from diff_dalle.diffusion.samplers import SAMPLERS
from diff_dalle.errors import UsageError
from diff_dalle.models.clip import NoisyCLIP
from diff_dalle.models.generator import Generator
from diff_dalle.sampling_io.config import SampleConfig
from diff_dalle.sampling_io.prompts import Prompt

PROMPTS = ["a red circle", "파란 별 위의 빨간 원", "a star", "a large blue square", "x"]
STEPS = 4


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


@pytest.fixture
def base(folder: Path) -> Cascade:
    return Cascade.load(str(folder / "base.pt"))


def levels(cascade: Cascade, steps: int) -> list[float]:
    """The noise levels of the first stage's steps."""
    alpha_bar = cascade.stages[0].loaded.diffusion.respace(str(steps)).alpha_bar
    return ((1 - alpha_bar) / alpha_bar).sqrt().tolist()


def between(cascade: Cascade, steps: int, first: int, last: int) -> str:
    """An interval that holds the steps from ``first`` to ``last``, neither of them at an end."""
    at = levels(cascade, steps)
    return f"{at[first] * 0.99},{at[last] * 1.01}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 2, "guidance_interval": "5,1"}, "--guidance_interval is '5,1'"),
        ({"guidance_scale": 2, "guidance_interval": "-1,1"}, "--guidance_interval is '-1,1'"),
        ({"guidance_interval": "5,1"}, "--guidance_interval is 5,1, but stage 1 would not read"),
        ({"guidance_scale": 2, "guidance_schedule": "cosin"}, "did you mean cosine"),
        ({"guidance_scale": 2, "guidance_rescale": 1.5}, "--guidance_rescale is"),
        ({"guidance_scale": 2, "guidance_rescale": -0.1}, "lie between 0 and 1"),
        ({"guidance_rescale": 0.7}, "since --guidance_scale is 1"),
        (
            {"guidance_scale": [2, 1, 1], "guidance_rescale": [0, 0.7, 0]},
            "--guidance_rescale is 0.7, but stage 2",
        ),
        (
            {"guidance_scale": 2, "guidance_interval": ["1,2", "all"]},
            "--guidance_interval has 2 entries for 3 stages",
        ),
        ({"classifier_interval": "9,1"}, "--classifier_interval is '9,1'"),
        ({"classifier_schedule": "constnt"}, "did you mean constant"),
        ({"classifier_schedule": ["linear", "linear", "constant"]}, "stage 2 would not read it"),
        ({"classifier_scale": 0, "classifier_schedule": "linear"}, "no CLIP guides it"),
        ({"classifier_scale": 0, "contrast": "prompts"}, "--contrast is prompts, but no CLIP"),
        ({"contrast": "promts"}, "--contrast promts is no file.*did you mean prompts"),
        ({"negative_prompts": "grey"}, "--negative_prompts are read by classifier-free"),
        (
            {"guidance_scale": 2, "negative_prompts": ["a", "b"]},
            "--negative_prompts has 2 entries for 5 prompts",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    guided: Cascade, settings: dict[str, Any], message: str
) -> None:
    for ask in (guided.sample, lambda *a, **k: list(guided.stream(*a, **k))):
        with pytest.raises(UsageError, match=message) as error:
            ask(PROMPTS, **settings)
        assert "\n" not in str(error.value)


def test_one_value_for_all_is_for_the_stages_that_are_guided(guided: Cascade) -> None:
    cfg = SampleConfig(
        guidance_scale=["2", "1", "3"], guidance_rescale=["0.7"], classifier_schedule=["cosine"]
    )
    stages = guided.plan(cfg).stages
    assert [part.settings.guidance_rescale for part in stages] == [0.7, 0.0, 0.7]
    schedules = [part.classifier.classifier_schedule for part in stages]
    assert schedules == ["cosine", "constant", "constant"]


def test_an_interval_that_no_step_lies_in_is_pointed_out(guided_base: Cascade) -> None:
    """Also where a step asks the network twice, or inversion asks it before."""
    nowhere = {"guidance_interval": ["0,1e-9"], "classifier_interval": ["0,1e-9"]}
    picture = np.zeros((16, 16, 3), np.uint8)
    varied = Edits(given=read_given(picture, (), [(16, 16)]))
    for options, edits in (
        ({}, NO_EDITS),
        ({"sampler": ["heun"]}, NO_EDITS),
        ({"variation": 0.5}, varied),
    ):
        cfg = SampleConfig(guidance_scale=["2"], **nowhere, **options)
        free, classifier = guided_base.plan(cfg, edits=edits).notes()
        assert "--guidance_interval 0,1e-9 holds no step of stage 1" in free
        assert "--classifier_interval 0,1e-9 holds no step of stage 1" in classifier
        cfg = SampleConfig(guidance_scale=["2"], **options)
        assert guided_base.plan(cfg, edits=edits).notes() == []


class Counter:
    """Pictures that networks were asked about."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.generator = self.clip = self.texts = 0
        forward, image, text = Generator.forward, NoisyCLIP.encode_image, NoisyCLIP.encode_text

        def ask(model: Generator, x_t: Any, t: Any, cond: Any) -> Any:
            self.generator += len(x_t)
            return forward(model, x_t, t, cond)

        def ask_clip(model: NoisyCLIP, x_t: Any, t: Any) -> Any:
            self.clip += len(x_t)
            return image(model, x_t, t)

        def ask_text(model: NoisyCLIP, tokens: Any, mask: Any) -> Any:
            self.texts += len(tokens)
            return text(model, tokens, mask)

        monkeypatch.setattr(Generator, "forward", ask)
        monkeypatch.setattr(NoisyCLIP, "encode_image", ask_clip)
        monkeypatch.setattr(NoisyCLIP, "encode_text", ask_text)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_plan_counts_what_is_evaluated(
    guided_base: Cascade, counter: Counter, sampler: str
) -> None:
    """A guided step costs two evaluations, one outside the interval of the CLIP none of its."""
    settings: dict[str, Any] = {
        "guidance_scale": 2,
        "guidance_interval": between(guided_base, 10, 3, 6),
        "classifier_interval": between(guided_base, 10, 0, 1),
        "sampler": sampler,
        "steps": 10,
        "step_spacing": "uniform",
    }
    cfg = SampleConfig(**{name: [str(value)] for name, value in settings.items()})
    (part,) = guided_base.plan(cfg).stages
    # Heun's method asks at both ends of a step, but once at the last.
    counts = (10, 19 + 8, 4) if sampler == "heun" else (10, 14, 2)
    assert (part.steps, part.evaluations, part.classifier_evaluations) == counts
    guided_base.sample(PROMPTS[:3], **settings)
    assert (counter.generator, counter.clip) == (3 * counts[1], 3 * counts[2])
    line = guided_base.plan(cfg).describe_cost()
    costs = f"16 px {counts[1]} (10 steps) and {counts[2]} of the CLIP"
    assert line == f"network evaluations a picture: {costs}"


def test_the_cost_holds_every_candidate(guided: Cascade) -> None:
    cfg = SampleConfig(timestep_respacing=["5"], guidance_scale=["2", "1", "1"], rerank=3)
    line = guided.plan(cfg).describe_cost()
    assert line.endswith(
        "16 px 30 (15 steps) and 15 of the CLIP, 32 px 5 (5 steps), 64 px 5 (5 steps)"
    )


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_intervals_reach_from_full_guidance_to_none(base: Cascade, sampler: str) -> None:
    """Bit for bit at both ends; in between the pictures are others."""
    options: dict[str, Any] = {"sampler": sampler, "steps": STEPS, "step_spacing": "uniform"}
    full = base.sample(PROMPTS[:2], guidance_scale=4, **options).stages[0]
    none = base.sample(PROMPTS[:2], **options).stages[0]

    def within(interval: str) -> np.ndarray:
        drawn = base.sample(PROMPTS[:2], guidance_scale=4, guidance_interval=interval, **options)
        return drawn.stages[0]

    np.testing.assert_array_equal(within("0,inf"), full)
    with pytest.warns(UserWarning, match="holds no step"):
        np.testing.assert_array_equal(within("0,1e-9"), none)
    part = within(between(base, STEPS, 1, 2))
    assert largest_difference(part, full) > 1 and largest_difference(part, none) > 1


def test_schedules_and_rescaling_change_the_pictures(base: Cascade) -> None:
    drawn = [
        base.sample(PROMPTS[:2], steps=STEPS, guidance_scale=4, **extra).stages[0]
        for extra in (
            {},
            {"guidance_schedule": "linear"},
            {"guidance_schedule": "cosine"},
            {"guidance_rescale": 0.7},
        )
    ]
    for number, one in enumerate(drawn):
        for other in drawn[:number]:
            assert largest_difference(one, other) > 0


def test_a_clip_outside_its_interval_is_no_clip(guided_base: Cascade, base: Cascade) -> None:
    with pytest.warns(UserWarning, match="holds no step"):
        found = guided_base.sample(
            PROMPTS[:2], steps=STEPS, use_ddim=True, classifier_interval="0,1e-9"
        )
    plain = base.sample(PROMPTS[:2], steps=STEPS, use_ddim=True)
    np.testing.assert_array_equal(found.stages[0], plain.stages[0])


def test_negative_prompts_are_one_for_all_or_one_a_prompt(base: Cascade) -> None:
    def draw(negative: Any, batch_size: int = 3) -> np.ndarray:
        return base.sample(
            PROMPTS[:3],
            steps=STEPS,
            guidance_scale=4,
            negative_prompts=negative,
            batch_size=batch_size,
        ).stages[0]

    none, star = draw(()), draw("a blue star")
    np.testing.assert_array_equal(draw(["a blue star"] * 3), star)
    np.testing.assert_array_equal(draw(""), none)
    for number in range(3):
        assert largest_difference(none[number], star[number]) > 1
    # A blank one is the null caption, beside others too.
    mixed = draw(["", "a blue star", " "])
    np.testing.assert_array_equal(mixed[[0, 2]], none[[0, 2]])
    np.testing.assert_array_equal(mixed[1], star[1])
    assert largest_difference(draw(["", "a blue star", " "], batch_size=1), mixed) <= 1


def test_long_negative_prompts_are_pointed_out_for_generators_alone(guided_base: Cascade) -> None:
    with pytest.warns(UserWarning) as caught:
        guided_base.sample("a", steps=1, guidance_scale=2, negative_prompts="red circle " * 20)
    lines = [str(one.message) for one in caught]
    assert len(lines) == 1 and lines[0].startswith("--negative_prompts entry 1: ")


@pytest.fixture
def captions(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "captions.txt"
    path.write_text("a green square\na star\n\na green square\nnothing at all\n", encoding="utf-8")
    yield path


def test_a_contrast_set_holds_each_caption_once(captions: Path) -> None:
    prompts = [Prompt("a star", "p 0"), Prompt("x", "p 1"), Prompt("a star", "p 2")]
    assert read_contrast("none", prompts) == []
    assert read_contrast("prompts", prompts) == prompts[:2]
    found = [caption.text for caption in read_contrast(str(captions), prompts)]
    assert found == ["a green square", "a star", "nothing at all"]


def test_a_prompt_that_nothing_is_told_from_is_refused(captions: Path) -> None:
    alone = [Prompt("a star", "p 0"), Prompt("a star", "p 1")]
    with pytest.raises(UsageError, match="--contrast prompts holds no caption to tell p 0 from"):
        read_contrast("prompts", alone)
    captions.write_text("a star\n")
    with pytest.raises(UsageError, match="holds no caption to tell p 0 from"):
        read_contrast(str(captions), alone)
    assert read_contrast(str(captions), [Prompt("x", "p 0")])


def test_frames_that_nothing_is_told_from_are_refused(captions: Path) -> None:
    """On its way a frame is told from neither end; at an end it is the plain picture."""

    def read(texts: list[str], ends: list[str], frames: int) -> list[Prompt]:
        prompts = [Prompt(text, f"p {n}") for n, text in enumerate(texts) for _ in range(frames)]
        edits = Edits(ends=[Prompt(text, "end") for text in ends], frames=frames)
        return read_contrast("prompts", prompts, edits)

    assert len(read(["a", "b"], ["b", "a"], 2)) == 2  # no frame lies in between
    with pytest.raises(UsageError, match="no caption to tell the frames of p 0 from: give a file"):
        read(["a", "b"], ["b", "a"], 3)
    with pytest.raises(UsageError, match="no caption to tell the frames of p 1 from"):
        read(["a", "b"], ["x", "a"], 3)
    assert len(read(["a", "b"], ["x"], 3)) == 2
    assert len(read(["a", "b"], [], 3)) == 2  # the noise alone goes over


def test_captions_that_a_clip_reads_alike_are_one(guided_base: Cascade) -> None:
    guide = guided_base.stages[0].guide
    assert guide is not None
    bank = Bank.encode(guide, ["x", "long " * 60, "long " * 61, "y"])
    assert len(bank.tokens) == len(bank.features) == 3
    tokens, _ = guide.loaded.tokenizer.encode(["long " * 62, "z", "y"], guide.text_length)
    assert bank.others(tokens).tolist() == [
        [True, False, True],
        [True, True, True],
        [True, True, False],
    ]
    assert ContrastSet(["x"]).bank(guide) is not None and ContrastSet().bank(guide) is None


def test_a_contrast_set_is_encoded_once_a_run(guided_base: Cascade, counter: Counter) -> None:
    guided_base.sample(PROMPTS, steps=3, batch_size=2, contrast="prompts")
    assert counter.texts == len(PROMPTS) + len(PROMPTS)  # the set, and each picture's own


def test_the_own_prompt_does_not_count_twice(guided_base: Cascade, captions: Path) -> None:
    def draw(text: str) -> np.ndarray:
        captions.write_text(text, encoding="utf-8")
        options: dict[str, Any] = {"steps": STEPS, "classifier_scale": 50}
        return guided_base.sample("a star", contrast=str(captions), **options).stages[0]

    with_own, without = draw("a green square\na star\nx"), draw("a green square\nx")
    np.testing.assert_array_equal(with_own, without)
    assert largest_difference(draw("a green square\n"), without) > 0
    plain = guided_base.sample("a star", steps=STEPS, classifier_scale=50).stages[0]
    assert largest_difference(plain, without) > 0


def test_neither_batch_size_nor_ranks_decide_what_a_contrast_set_draws(
    guided_base: Cascade,
) -> None:
    """Bit for bit: the set is that of the request, not of the batch."""
    steps: dict[str, Any] = {"sampler": "ddpm", "steps": STEPS, "step_spacing": "uniform"}
    options = {**steps, "classifier_scale": 20, "contrast": "prompts"}
    one_by_one = guided_base.sample(PROMPTS, batch_size=1, **options).stages[0]
    for batch_size in (2, 5):
        batched = guided_base.sample(PROMPTS, batch_size=batch_size, **options).stages[0]
        np.testing.assert_array_equal(batched, one_by_one)
    cfg = SampleConfig(timestep_respacing=[str(STEPS)], classifier_scale=["20"], contrast="prompts")
    plan = guided_base.plan(cfg, None, PROMPTS)
    share = guided_base.draw(plan, [1, 3], [PROMPTS[1], PROMPTS[3]])  # rank 1 of 2
    np.testing.assert_array_equal(share.stages[0], one_by_one[[1, 3]])


def test_the_stream_takes_the_same_guidance(guided: Cascade) -> None:
    settings: dict[str, Any] = {
        "steps": 2,
        "guidance_scale": 3,
        "guidance_interval": "all",
        "guidance_schedule": "linear",
        "guidance_rescale": 0.5,
        "negative_prompts": ["a star", "grey"],
        "classifier_schedule": "cosine",
        "contrast": "prompts",
    }
    *_, last = guided.stream(PROMPTS[:2], **settings)
    result = guided.sample(PROMPTS[:2], **settings)
    shown = np.stack([np.asarray(image) for image in last.images])
    np.testing.assert_array_equal(shown, result.stages[-1])
    plain = guided.sample(PROMPTS[:2], steps=2, guidance_scale=3)
    assert largest_difference(shown, plain.stages[-1]) > 1


def test_text_features_of_the_set_are_those_of_the_clip(guided_base: Cascade) -> None:
    guide = guided_base.stages[0].guide
    assert guide is not None
    bank = ContrastSet(PROMPTS).bank(guide)
    assert bank is not None
    with torch.no_grad():
        expected = guide.loaded.clip.encode_text(
            *guide.loaded.tokenizer.encode(PROMPTS, guide.text_length)
        )
    torch.testing.assert_close(bank.features, expected)
