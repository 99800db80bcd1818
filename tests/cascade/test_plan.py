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
        ({"ddim_eta": 0.5}, "--ddim_eta is 0.5: it needs --use_ddim True"),
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
    assert guided.plan(SampleConfig(classifier_scale=["5", "1", "0"])).stages[1].steps == 20
    assert guided.plan(SampleConfig(aug_level=["0.3"])).stages[1].settings.aug_level == 0.3
    with pytest.raises(UsageError, match="is 5, but there is no CLIP for the stage of 32 px"):
        guided.plan(SampleConfig(classifier_scale=["1", "5", "1"]))
    with pytest.raises(UsageError, match="--aug_level is 0.3, but .*base.pt is a base model"):
        Cascade.load(str(folder / "base.pt")).plan(SampleConfig(aug_level=["0.3"]))


def test_ddim_beside_a_clip_is_pointed_out(guided_base: Cascade) -> None:
    (note,) = guided_base.plan(SampleConfig(use_ddim=True)).notes()
    assert "--use_ddim True beside a CLIP" in note
    for harmless in ({"use_ddim": True, "classifier_scale": ["0"]}, {"use_ddim": False}):
        assert guided_base.plan(SampleConfig(**harmless)).notes() == []
    with pytest.warns(UserWarning, match="--use_ddim True beside a CLIP"):
        guided_base.sample("x", use_ddim=True, steps=1)


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
