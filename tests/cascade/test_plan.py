"""Settings, one entry a stage, and those that no stage can follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diff_dalle import Cascade
from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.config import SampleConfig, per_stage

PROMPTS = ["a red circle", "파란 별 위의 빨간 원", "a star", "a large blue square", "x"]


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
        ({"ddim_eta": 0.5}, "--ddim_eta is 0.5: it needs --use_ddim True, or --sampler ddim"),
        ({"sampler": "dpmpp2m"}, "--sampler is 'dpmpp2m': .*did you mean dpmpp_2m"),
        ({"sampler": "heun", "steps": 0}, "--timestep_respacing is '0': .*--steps is the same"),
        ({"sampler": "unipc", "steps": "ddim19"}, "--timestep_respacing is 'ddim19'"),
        ({"sampler": ["ddpm", "ddim"]}, "--sampler has 2 entries for 3 stages"),
        ({"steps": [3, 3]}, "--steps has 2 entries for 3 stages"),
        ({"sampler": "unipc", "use_ddim": True}, "--sampler is 'unipc': .*beside --use_ddim"),
        ({"step_spacing": "linear"}, "--step_spacing is 'linear': it must be one of uniform"),
        ({"step_spacing": "karras", "steps": "5,5"}, "'5,5' names its steps itself"),
        ({"threshold": "hard"}, "--threshold is 'hard'"),
        ({"threshold": "dynamic", "threshold_percentile": 95}, "--threshold_percentile is 95"),
        ({"threshold": "dynamic", "threshold_max": 0.5}, "--threshold_max is 0.5"),
        ({"threshold_max": 1.5}, "--threshold_max is 1.5: .* beside --threshold dynamic"),
        ({"threshold_percentile": 0.9}, "--threshold_percentile is 0.9: .*dynamic"),
        ({"threshold": "static", "clip_denoised": False}, "--threshold is 'static'"),
        ({"classifier_scale": [1, 0, 4]}, "--classifier_scale is 4, but there is no CLIP"),
        ({"aug_level": [0.3, 0, 0]}, "--aug_level is 0.3, but .*base.pt is a base model"),
        ({"batch_size": 0}, "--batch_size"),
        ({"low_res": np.zeros((5, 16, 16, 3), np.uint8)}, "--low_res is for an upsampler"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    cascade: Cascade, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        cascade.sample(PROMPTS, **settings)


def test_a_value_for_a_stage_that_cannot_read_it_is_refused(guided: Cascade, folder: Path) -> None:
    """One value for all is for those that can."""
    assert guided.plan(SampleConfig(classifier_scale=["5"])).stages[0].classifier_scale == 5
    assert guided.plan(SampleConfig(classifier_scale=["5", "1", "0"])).stages[1].steps == 12
    assert guided.plan(SampleConfig(aug_level=["0.3"])).stages[1].settings.aug_level == 0.3
    with pytest.raises(UsageError, match="is 5, but there is no CLIP for the stage of 32 px"):
        guided.plan(SampleConfig(classifier_scale=["1", "5", "1"]))
    with pytest.raises(UsageError, match="--aug_level is 0.3, but .*base.pt is a base model"):
        Cascade.load(str(folder / "base.pt")).plan(SampleConfig(aug_level=["0.3"]))


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


def chosen(cascade: Cascade, **flags: Any) -> list[tuple[str, str, str]]:
    plan = cascade.plan(SampleConfig(**flags))
    return [
        (part.settings.sampler, part.settings.timestep_respacing, part.settings.step_spacing)
        for part in plan.stages
    ]


def test_without_a_flag_the_fast_sampler_takes_few_steps(cascade: Cascade) -> None:
    assert chosen(cascade) == [("unipc", n, "logsnr") for n in ("20", "12", "12")]
    plan = cascade.plan(SampleConfig())
    assert [stage.steps for stage in plan.stages] == [20, 12, 12] and plan.steps == 44
    assert chosen(cascade, steps=["9", "auto", "3"]) == [
        ("unipc", n, "logsnr") for n in ("9", "12", "3")
    ]


def test_the_older_flags_keep_their_meaning(cascade: Cascade) -> None:
    for flags, sampler in (({}, "ddpm"), ({"use_ddim": True}, "ddim")):
        found = chosen(cascade, timestep_respacing=["10", "ddim5", "1,2"], **flags)
        assert found == [(sampler, spec, "uniform") for spec in ("10", "ddim5", "1,2")]
    # All 20 steps that these models have, of the 100 and 27 wanted.
    assert chosen(cascade, use_ddim=True) == [("ddim", "20", "uniform")] * 3
    plan = cascade.plan(SampleConfig(timestep_respacing=["10", "ddim5", "1,2"]))
    assert [stage.steps for stage in plan.stages] == [10, 5, 3] and plan.steps == 18


def test_a_named_sampler_goes_with_any_spacing(cascade: Cascade) -> None:
    assert chosen(cascade, sampler=["heun", "dpmpp_2m", "ddpm"]) == [
        ("heun", "10", "logsnr"),
        ("dpmpp_2m", "12", "logsnr"),
        ("ddpm", "20", "quadratic"),
    ]
    assert (
        chosen(cascade, sampler=["ddim"], timestep_respacing=["5"], step_spacing=["karras"])
        == [("ddim", "5", "karras")] * 3
    )
    assert chosen(cascade, sampler=["unipc"], steps=["5", "2,2", "ddim10"]) == [
        ("unipc", "5", "logsnr"),
        ("unipc", "2,2", "uniform"),
        ("unipc", "ddim10", "uniform"),
    ]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({}, "static"),
        ({"clip_denoised": False}, "none"),
        ({"threshold": "none"}, "none"),
        ({"threshold": "dynamic", "threshold_percentile": 0.95, "threshold_max": 1.5}, "dynamic"),
    ],
)
def test_thresholds(cascade: Cascade, flags: dict[str, Any], wanted: str) -> None:
    settings = cascade.plan(SampleConfig(**flags)).stages[0].settings
    assert settings.threshold == wanted
    assert settings.threshold_max == flags.get("threshold_max", 0)
    assert settings.threshold_percentile == flags.get("threshold_percentile", 0.995)


def test_randomness_goes_to_the_stages_that_read_it(cascade: Cascade) -> None:
    plan = cascade.plan(SampleConfig(sampler=["ddim", "unipc", "ddim"], ddim_eta=0.5))
    assert [part.settings.ddim_eta for part in plan.stages] == [0.5, 0, 0.5]


def test_values_for_stages() -> None:
    assert per_stage([1, 2, 3], 3, "x") == [1, 2, 3] and per_stage([1], 3, "x") == [1, 1, 1]
    config = SampleConfig(steps=["20", "12", "6"])
    assert config.resolved_respacing == ["20", "12", "6"]
    with pytest.raises(UsageError, match="--steps"):
        SampleConfig(steps=["20"], timestep_respacing=["10"])
    assert SampleConfig(use_fp16=True).resolved_precision == "fp16"
    with pytest.raises(UsageError, match="--precision"):
        SampleConfig(use_fp16=True, precision="bf16")
