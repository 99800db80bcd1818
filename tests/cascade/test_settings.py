"""Settings of a program against the flags that they stand for."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

import numpy as np
import pytest

from diff_dalle.cascade.settings import SampleSettings, as_flags
from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.config import SampleConfig

# What a program says otherwise: where it loaded from, what it draws, what it writes.
ELSEWHERE = {
    *("model_path", "classifier_path", "device", "offload", "precision", "use_fp16"),
    *("prompts", "data_dir", "num_samples", "low_res", "grid_size", "save_png", "log_dir"),
    *("init_images", "masks", "strength", "variation"),
    *("interpolate_to", "interpolate_seed", "frames"),
    "timestep_respacing",  # of which steps is the newer spelling
}


def test_every_flag_that_decides_a_picture_is_a_setting() -> None:
    flags = {field.name for field in dataclasses.fields(SampleConfig)}
    assert set(SampleSettings.__annotations__) == flags - ELSEWHERE


def test_documented_settings_are_those_that_exist() -> None:
    assert SampleSettings.__doc__ is not None
    described = SampleSettings.__doc__.split("Attributes:")[1].splitlines()
    names = [line.split(":")[0].strip() for line in described if line[8:9].strip() and ":" in line]
    assert names == list(get_type_hints(SampleSettings))


def test_nothing_is_the_flags_default() -> None:
    assert as_flags({}) == SampleConfig()


def test_values_are_spelled_as_flags() -> None:
    flags = as_flags(
        {"steps": [20, "ddim25"], "guidance_scale": 3, "negative_prompts": "a b", "size": 96}
    )
    assert flags.steps == ["20", "ddim25"] and flags.guidance_scale == ["3"]
    assert flags.negative_prompts == ["a b"] and flags.size == "96"
    assert as_flags({"rerank": 3, "use_ddim": True}) == SampleConfig(rerank=3, use_ddim=True)


def test_numbers_of_numpy_are_numbers() -> None:
    flags = as_flags({"steps": np.int64(2), "guidance_scale": np.float32(2), "seeds": np.arange(2)})
    assert (flags.steps, flags.guidance_scale, flags.seeds) == (["2"], ["2.0"], [0, 1])


def test_what_is_no_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="'guidance' is no setting of a cascade"):
        as_flags({"guidance": 3})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(TypeError, match="'log_dir' is no setting"):
        as_flags({"log_dir": "x"})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(UsageError, match="--rerank is 0"):
        as_flags({"rerank": 0})
