"""`scripts/sample.py`: editing from flags to manifest, and what makes a command the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diff_dalle import Cascade
from diff_dalle.cascade import Edit
from diff_dalle.cascade.consistency import measure
from diff_dalle.cascade.share import open_writer, request_of
from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.config import SampleConfig
from diff_dalle.sampling_io.store import read_pictures

ROOT = Path(__file__).parents[2]
FEW = ["--steps", "2", "--device", "cpu"]
PROMPTS = ["a red circle", "파란 별 위의 빨간 원"]
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
MASK = np.zeros((32, 32), np.uint8)
MASK[:, 16:] = 255
Sample = Callable[[list[str]], None]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``0.png``, ``1.png`` and ``mask.png``."""
    place = tmp_path_factory.mktemp("inputs")
    for number, picture in enumerate(PICTURES):
        Image.fromarray(picture).save(place / f"{number}.png")
    Image.fromarray(MASK).save(place / "mask.png")
    return place


def edit_flags(inputs: Path) -> list[str]:
    images = [str(inputs / "0.png"), str(inputs / "1.png")]
    return ["--init_images", *images, "--masks", str(inputs / "mask.png"), "--strength", "0.5"]


def two_stages(folder: Path) -> list[str]:
    return ["--model_path", str(folder / "base.pt"), str(folder / "up32.pt"), *FEW]


def test_the_manifest_tells_what_was_edited(
    folder: Path, inputs: Path, tmp_path: Path, sample: Sample
) -> None:
    argv = [*two_stages(folder), "--prompts", *PROMPTS, "--num_samples", "3"]
    sample([*argv, *edit_flags(inputs), "--log_dir", str(tmp_path)])
    drawn = read_pictures(tmp_path / "samples_3x32x32x3.npz")
    known = MASK == 0
    for picture, given in zip(drawn, PICTURES[[0, 1, 0]], strict=True):
        np.testing.assert_array_equal(picture[known], given[known])
    cascade = Cascade.load([str(folder / "base.pt"), str(folder / "up32.pt")])
    edit = Edit(init_images=PICTURES, masks=MASK, strength=0.5)
    expected = cascade.sample(PROMPTS, steps=2, edit=edit).stages[1]
    assert np.abs(drawn[:2].astype(int) - expected).max() <= 1

    manifest = json.loads((tmp_path / "samples_3x32x32x3.json").read_text())
    assert [stage["strength"] for stage in manifest["stages"]] == [0.5, 1.0]
    assert [stage["variation"] for stage in manifest["stages"]] == [None, None]
    assert [stage["steps"] for stage in manifest["stages"]] == [1, 2]
    sources = [Path(one["source"]).name for one in manifest["init_images"]]
    assert sources == ["0.png", "1.png"] and Path(manifest["masks"][0]["source"]).name == "mask.png"
    hashes = [one["sha256"] for one in manifest["init_images"] + manifest["masks"]]
    assert len(set(hashes)) == 3 and all(len(one) == 64 for one in hashes)
    assert [image["init_image"] for image in manifest["images"]] == [0, 1, 0]


def test_the_manifest_numbers_the_frames(folder: Path, tmp_path: Path, sample: Sample) -> None:
    argv = ["--model_path", str(folder / "base.pt"), *FEW, "--prompts", *PROMPTS]
    argv += ["--interpolate_to", "a star", "--interpolate_seed", "5", "--frames", "3"]
    sample([*argv, "--batch_size", "4", "--log_dir", str(tmp_path)])
    manifest = json.loads((tmp_path / "samples_6x16x16x3.json").read_text())
    images = manifest["images"]
    assert [image["frame"] for image in images] == [0, 1, 2] * 2
    assert [image["share"] for image in images] == [0, 0.5, 1] * 2
    assert [image["prompt"] for image in images] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert manifest["interpolate_to"] == ["a star"]
    assert (manifest["frames"], manifest["interpolate_seed"]) == (3, 5)


def test_the_manifest_holds_frames_against_their_prompts_small_picture(
    folder: Path, tmp_path: Path, sample: Sample
) -> None:
    """Three prompts of two frames from two small pictures."""
    small = np.stack([np.full((16, 16, 3), 40, np.uint8), PICTURES[0, :16, :16]])
    np.savez(tmp_path / "small.npz", small)
    argv = ["--model_path", str(folder / "up32.pt"), *FEW, "--prompts", *PROMPTS]
    argv += ["--low_res", str(tmp_path / "small.npz"), "--num_samples", "3", "--frames", "2"]
    sample([*argv, "--interpolate_seed", "5", "--batch_size", "4", "--log_dir", str(tmp_path)])
    drawn = read_pictures(tmp_path / "samples_6x32x32x3.npz")
    manifest = json.loads((tmp_path / "samples_6x32x32x3.json").read_text())
    expected = measure(drawn, small[[0, 0, 1, 1, 0, 0]])
    told = [image["consistency"] for image in manifest["images"]]
    assert told == [[expected.to_json(n)] for n in range(6)]


@pytest.mark.parametrize(
    "change",
    [
        {"init_images": ["1.png"]},
        {"masks": []},
        {"strength": ["0.9"]},
        {"variation": 0.5, "strength": ["1"]},
        {"interpolate_to": ["x"], "frames": 2},
        {"interpolate_seed": 1, "frames": 2},
    ],
)
def test_what_is_edited_decides_the_folder(
    folder: Path, inputs: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Which an interrupted command goes on in."""
    cascade = Cascade.load(str(folder / "base.pt"))

    def work(**settings: Any) -> Path:
        settings = {"init_images": ["0.png"], "masks": ["mask.png"], "strength": ["0.5"]} | settings
        for name in ("init_images", "masks"):
            settings[name] = [str(inputs / file) for file in settings[name]]
        cfg = SampleConfig(prompts=["a"], steps=["4"], device="cpu", **settings)
        request = request_of(cascade, cfg)
        plan = cascade.plan(cfg, None, (), request.edits)
        writer = open_writer(tmp_path, cascade, plan, request)
        writer.discard()
        return writer.work

    assert work() == work(batch_size=9, save_png=True)
    assert work() != work(**change)


def test_other_pixels_in_the_same_file_are_another_command(
    folder: Path, inputs: Path, tmp_path: Path
) -> None:
    cascade, found = Cascade.load(str(folder / "base.pt")), []
    for picture in PICTURES:
        Image.fromarray(picture).save(tmp_path / "picture.png")
        cfg = SampleConfig(
            prompts=["a"], init_images=[str(tmp_path / "picture.png")], strength=["0.5"]
        )
        request = request_of(cascade, cfg)
        plan = cascade.plan(cfg, None, (), request.edits)
        found.append(open_writer(tmp_path, cascade, plan, request).work)
    assert found[0] != found[1]


def test_an_interrupted_edit_goes_on(
    folder: Path, inputs: Path, tmp_path: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the missing frames, bit for bit."""
    draw, drawn = Cascade.draw, []

    def fail_late(self: Cascade, plan: object, indices: range, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        if len(drawn) == 3:
            raise RuntimeError("out of memory")
        drawn.extend(indices)
        return draw(self, plan, indices, *args, **kwargs)  # type: ignore[arg-type]

    argv = [*two_stages(folder), "--prompts", *PROMPTS, *edit_flags(inputs), "--batch_size", "1"]
    argv += ["--interpolate_seed", "5", "--frames", "2", "--log_dir"]
    with monkeypatch.context() as patch:
        patch.setattr(Cascade, "draw", fail_late)
        with pytest.raises(RuntimeError):
            sample([*argv, str(tmp_path / "late")])
    sample([*argv, str(tmp_path / "late")])
    sample([*argv, str(tmp_path / "whole")])
    late, whole = (read_pictures(tmp_path / n / "samples_4x32x32x3.npz") for n in ("late", "whole"))
    assert drawn == [0, 1, 2]
    np.testing.assert_array_equal(late, whole)


def test_ranks_edit_what_one_process_edits(
    folder: Path, inputs: Path, tmp_path: Path, sample: Sample
) -> None:
    argv = [*two_stages(folder), "--prompts", *PROMPTS, *edit_flags(inputs)]
    argv += ["--interpolate_to", "x", "--frames", "3"]
    sample([*argv, "--log_dir", str(tmp_path / "one")])
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else str(shutil.which("mpiexec"))
    command = [mpiexec, "-n", "2", sys.executable, str(ROOT / "scripts" / "sample.py"), *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["--log_dir", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = (read_pictures(tmp_path / run / "samples_6x32x32x3.npz") for run in ("one", "two"))
    assert np.abs(one.astype(int) - two).max() <= 1


def test_a_mask_without_a_picture_stops_before_anything_is_written(
    folder: Path, inputs: Path, tmp_path: Path, sample: Sample
) -> None:
    argv = [*two_stages(folder), "--prompts", "a", "--masks", str(inputs / "mask.png")]
    with pytest.raises(UsageError, match="--masks belong to pictures"):
        sample([*argv, "--log_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
