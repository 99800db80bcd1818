"""An upsampler on held-out pictures, with random models: what is measured, what is refused."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diff_dalle.data.captions import captions
from diff_dalle.data.loader import DataConfig
from diff_dalle.data.scenes import sample_scene
from diff_dalle.data.writer import Sample, write_shards
from diff_dalle.errors import UsageError
from diff_dalle.evaluation import upsampler_run
from diff_dalle.evaluation.drawing import Drawer
from diff_dalle.evaluation.upsampler_run import (
    UpsamplerConfig,
    evaluate_upsampler,
    read_held_out,
)
from diff_dalle.training.stage import shrink

TINY = runpy.run_path(str(Path(__file__).parents[1] / "programs" / "tiny_cascade.py"))
FAST: dict[str, Any] = {
    "num_samples": 4,
    "batch_size": 3,
    "timestep_respacing": ["2"],
    "device": "cpu",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("val")

    def sample(index: int) -> Sample:
        scene = sample_scene(0, index, "val")
        return Sample(
            key=f"{index:04d}", captions=captions(scene), truth=scene.truth(), picture=scene
        )

    write_shards(folder, sample, 12, image_size=64)
    return folder


def paths(folder: Path, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


def test_an_upsampler_is_compared_with_lanczos(models: Path, shards: Path, tmp_path: Path) -> None:
    cfg = UpsamplerConfig(
        model_path=paths(models, "up64.pt"), data_dir=[str(shards)], log_dir=str(tmp_path), **FAST
    )
    (data, _, grid), table = evaluate_upsampler(cfg)
    content = json.loads(data.read_text())
    assert (content["small_size"], content["image_size"], content["count"]) == (32, 64, 4)
    assert content["distances"]["bands"]["model"] > content["distances"]["bands"]["lanczos"]
    assert content["consistent"] < 1  # a random model heeds nothing
    assert "Lanczos" in table
    assert Image.open(grid).size == (4 * 64, 4 * 64)


def test_an_upsampler_is_given_what_training_shrinks(
    models: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: halves round as they do there."""
    cfg = UpsamplerConfig(
        model_path=paths(models, "up64.pt"), data_dir=[str(shards)], log_dir=str(tmp_path), **FAST
    )
    true, _ = read_held_out(of_shards(shards), cfg.num_samples, 64, with_text=True)
    given = []

    def draw(drawer: Drawer, captions: list[str], *, low_res: np.ndarray, **_: Any) -> list[Any]:
        given.append(low_res)
        return [true]

    monkeypatch.setattr(Drawer, "draw", draw)
    evaluate_upsampler(cfg)
    expected = shrink(torch.from_numpy(true).permute(0, 3, 1, 2), (32, 32))
    np.testing.assert_array_equal(given[0], expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("features", [[], ["bands", "inception"]])
def test_features_that_nobody_knows_are_refused(features: list[str]) -> None:
    with pytest.raises(UsageError, match="--features.* bands, random, shapes"):
        UpsamplerConfig(model_path=["a.pt"], data_dir=["b"], features=features)


def test_a_base_model_or_a_cascade_is_no_upsampler(models: Path, shards: Path) -> None:
    for names in (["base.pt"], ["up32.pt", "up64.pt"]):
        cfg = UpsamplerConfig(model_path=paths(models, *names), data_dir=[str(shards)], **FAST)
        with pytest.raises(UsageError, match="must name one upsampler"):
            evaluate_upsampler(cfg)


def of_shards(folder: Path) -> DataConfig:
    return DataConfig(data_dir=[str(folder)], num_workers=0)


def test_captions_are_read_as_in_training_or_as_asked(
    models: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[DataConfig] = []

    def read(cfg: DataConfig, *_: Any, **__: Any) -> Any:
        asked.append(cfg)
        raise StopIteration

    monkeypatch.setattr(upsampler_run, "read_held_out", read)
    alt = TINY["write_generator"](
        tmp_path / "alt.pt", image_size=64, small_size=32, caption_key="alt"
    )
    for path, key in ((models / "up64.pt", None), (alt, None), (alt, "other")):
        cfg = UpsamplerConfig(
            model_path=[str(path)], data_dir=[str(shards)], caption_key=key, **FAST
        )
        with pytest.raises(StopIteration):
            evaluate_upsampler(cfg)
    assert [cfg.caption_key for cfg in asked] == ["caption", "alt", "other"]


def test_features_need_pictures_of_their_size(models: Path, shards: Path) -> None:
    """Told before anything is drawn."""
    cfg = UpsamplerConfig(model_path=paths(models, "up32.pt"), data_dir=[str(shards)], **FAST)
    with pytest.raises(UsageError, match="--features.* 48 px or more: this one makes 32 px"):
        evaluate_upsampler(cfg)


def test_held_out_pictures_are_spread_over_the_dataset(shards: Path) -> None:
    pictures, texts = read_held_out(of_shards(shards), 4, 64, with_text=True)
    scenes = [sample_scene(0, index, "val") for index in (0, 3, 6, 9)]
    np.testing.assert_array_equal(pictures, [scene.draw(64) for scene in scenes])
    assert texts == [captions(scene)[0] for scene in scenes]
    assert read_held_out(of_shards(shards), 4, 64, with_text=False)[1] == [""] * 4


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    one = Sample(key="a", captions=["x"], truth={}, picture=sample_scene(0, 0, "val"))
    write_shards(tmp_path, lambda _: one, 1, image_size=64)
    with pytest.raises(UsageError, match="1 usable pictures"):
        read_held_out(of_shards(tmp_path), 256, 64, with_text=True)
