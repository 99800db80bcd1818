"""An interrupted `scripts/sample.py` goes on: nothing is drawn twice, nothing comes out wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diff_dalle import Cascade
from diff_dalle.cascade import share
from diff_dalle.sampling_io.outputs import publish
from diff_dalle.sampling_io.store import read_pictures

ROOT = Path(__file__).parents[2]
FEW = ["--timestep_respacing", "2", "--device", "cpu"]
PROMPTS = ["a red circle", "파란 별 위의 빨간 원", "a star"]
Sample = Callable[[list[str]], None]


def test_a_run_that_fails_goes_on_where_it_was(
    folder: Path,
    tmp_path: Path,
    sample: Sample,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit, with the candidates that were chosen before; what else lies there stays."""
    (tmp_path / "config.json").write_text("a training run's")
    two_stages = [str(folder / "base.pt"), str(folder / "up32.pt")]
    draw, drawn = Cascade.draw, []

    def fail_late(self: Cascade, plan: object, indices: range, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        if len(drawn) == 2:
            raise RuntimeError("out of memory")
        drawn.extend(indices)
        return draw(self, plan, indices, *args, **kwargs)  # type: ignore[arg-type]

    argv = ["--model_path", *two_stages, "--classifier_path", str(folder / "clip.pt")]
    argv += ["--prompts", *PROMPTS, *FEW, "--rerank", "2", "--log_dir", str(tmp_path)]
    one_by_one = [*argv, "--batch_size", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(Cascade, "draw", fail_late)
        with pytest.raises(RuntimeError):
            sample(one_by_one)
    (work,) = tmp_path.glob(".samples_*")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "error.txt", work.name}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "are kept" in line]
    assert line.startswith("2 of 3 pictures are kept in") and "the same command" in line
    sample([*argv, "--seed", "1"])  # another request leaves it alone
    assert work.is_dir()
    drawn.clear()
    monkeypatch.setattr(Cascade, "draw", fail_late)
    sample([*argv, "--batch_size", "4", "--grid_size", "64"])
    assert drawn == [2] and not work.exists()
    monkeypatch.undo()
    sample([*one_by_one, "--log_dir", str(tmp_path / "whole")])
    ends = (tmp_path / "samples_3x32x32x3_2", tmp_path / "whole" / "samples_3x32x32x3")
    kept, whole = (read_pictures(f"{end}.npz") for end in ends)
    np.testing.assert_array_equal(kept, whole)
    kept, whole = (json.loads(Path(f"{end}.json").read_text())["images"] for end in ends)
    assert kept == whole
    assert all(image["consistency"][1]["psnr_db"] > 0 for image in kept)


KILLED = """
import os, runpy, signal, sys
from diff_dalle.sampling_io.writer import OutputWriter
write = OutputWriter.write

def die_in_the_third(self, indices, stages, candidates, *, rank):
    if 4 in indices:
        self.stores[0].write(indices, stages[0])
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, indices, stages, candidates, rank=rank)

OutputWriter.write = die_in_the_third
runpy.run_path(sys.argv[1])["sample"](sys.argv[2:])
"""


def test_a_killed_run_draws_only_what_is_missing(
    folder: Path, tmp_path: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The npz equals that of a run that nobody killed, bit for bit."""
    argv = ["--model_path", str(folder / "base.pt"), str(folder / "up32.pt"), "--prompts", *PROMPTS]
    argv += ["--num_samples", "7", "--batch_size", "2", *FEW, "--log_dir"]
    out = str(tmp_path / "killed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(ROOT / "scripts" / "sample.py"), *argv, out]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=200)
    assert done.returncode == -signal.SIGKILL
    drawn, draw = [], Cascade.draw

    def spy(self: Cascade, plan: object, indices: range, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        drawn.extend(indices)
        return draw(self, plan, indices, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Cascade, "draw", spy)
    sample([*argv, out])
    assert drawn == [4, 5, 6]
    sample([*argv, str(tmp_path / "whole")])
    for size in (16, 32):
        name = f"samples_7x{size}x{size}x3.npz"
        killed, whole = (read_pictures(tmp_path / run / name) for run in ("killed", "whole"))
        np.testing.assert_array_equal(killed, whole)
    assert not list((tmp_path / "killed").glob(".samples_*"))


@pytest.mark.parametrize("change", [{"seed": 1}, {"prompts": ["x"]}, {"rerank": 2}, {"low_res": 1}])
def test_what_decides_the_pictures_decides_the_folder(
    folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    cascade = Cascade.load(str(folder / "base.pt"), str(folder / "clip.pt"))
    small = change.pop("low_res", 0)

    def work(small: int, **settings: Any) -> Path:
        cfg = share.SampleConfig(**({"prompts": ["a"], "device": ["cpu"]} | settings))
        request = share.request_of(cascade, cfg)
        request = replace(request, low_res=np.full((1, 2, 2, 3), small, np.uint8))
        writer = share.open_writer(tmp_path, cascade, cascade.plan(cfg), request)
        writer.discard()
        return writer.work

    assert work(0) == work(0, batch_size=9, grid_size=9, save_png=True, num_samples=1)
    assert work(0) != work(small, **change)


def work_of(cascade: Cascade, out: Path, **settings: Any) -> Path:
    """The hidden folder that a command works in."""
    cfg = share.SampleConfig(steps=["2"], **settings)
    request = share.request_of(cascade, cfg)
    plan = cascade.plan(cfg, request.low_res, request.contrast_texts, request.edits)
    writer = share.open_writer(out, cascade, plan, request)
    writer.discard()
    return writer.work


def test_where_files_lie_does_not_decide_the_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints, CLIP, captions and pictures moved, or given from another working directory."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here, there):
        place.mkdir()
        for name in ("base.pt", "clip.pt"):
            shutil.copy(folder / name, place / f"{place.name}_{name}")
        (place / f"{place.name}.txt").write_text("a star\nx\n")
        Image.fromarray(picture).save(place / f"{place.name}.png")
        np.savez(place / f"{place.name}.npz", picture[None])

    def work(place: Path, prefix: str, suffix: str, **settings: Any) -> Path:
        at = f"{prefix}{place.name}"
        flags = {"contrast": f"{at}.txt", "init_images": [f"{at}.{suffix}"], "strength": ["0.5"]}
        return work_of(
            Cascade.load(f"{at}_base.pt", f"{at}_clip.pt"), tmp_path, **flags, **settings
        )

    first = work(here, f"{here}/", "png", prompts=["a star", "x", "y"])
    assert work(there, f"{there}/", "npz", prompts=["a star", "x", "y"]) == first
    (here / "prompts.txt").write_text("a star\n\nx\ny\n")
    monkeypatch.chdir(here)
    assert work(here, "", "npz", data_dir=["prompts.txt"]) == first
    assert work(here, "", "npz", prompts=["a star", "x", "z"]) != first


def test_where_small_pictures_lie_does_not_decide_the_folder(folder: Path, tmp_path: Path) -> None:
    """And those beyond the number of samples do not count, nor what goes with them."""
    cascade = Cascade.load(str(folder / "up32.pt"))
    small = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    for name, pictures in (("a", small), ("b", small), ("c", small[[0, 1, 0]]), ("d", small[::-1])):
        np.savez(tmp_path / f"{name}.npz", pictures)

    def work(name: str, *ends: str) -> Path:
        flags: dict[str, Any] = {"low_res": str(tmp_path / f"{name}.npz"), "num_samples": 2}
        flags |= {"interpolate_to": [*ends], "frames": 2} if ends else {}
        return work_of(cascade, tmp_path, prompts=PROMPTS, **flags)

    assert work("a") == work("b") == work("c") != work("d")
    assert work("a", "x", "y", "z") == work("a", "x", "y", "v") != work("a", "x", "v", "z")


def test_shares_of_more_ranks_than_pictures(folder: Path, tmp_path: Path) -> None:
    """Ranks 0 … 4 for 3 pictures: two of them have nothing to do."""
    cascade = Cascade.load(str(folder / "base.pt"))
    cfg = share.SampleConfig(prompts=PROMPTS, steps=["2"])
    request, plan = share.request_of(cascade, cfg), cascade.plan(cfg)
    writer = share.open_writer(tmp_path, cascade, plan, request)
    kept: dict[int, int] = {}
    for rank in range(5):
        kept |= share.draw_share(cascade, plan, request, writer, cfg, rank=rank, ranks=5).kept
    publish(writer, PROMPTS, {}, grid_size=64)
    assert kept == {0: 0, 1: 0, 2: 0}
    expected = cascade.sample(PROMPTS, steps=2, batch_size=1).stages[0]
    np.testing.assert_array_equal(read_pictures(tmp_path / "samples_3x16x16x3.npz"), expected)


def test_the_manifest_times_what_this_call_drew(
    folder: Path, tmp_path: Path, sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three pictures are there from an interrupted run, which was not off-loaded."""
    cascade = Cascade.load(str(folder))
    cfg = share.SampleConfig(model_path=[str(folder)], prompts=PROMPTS, steps=["2"])
    request, plan = share.request_of(cascade, cfg), cascade.plan(cfg)
    writer = share.open_writer(tmp_path, cascade, plan, request)
    first = share.draw_share(cascade, plan, request, writer, cfg, rank=0, ranks=2)
    assert writer.lock is not None
    writer.lock.close()
    assert first.timing.images == 1
    argv = ["--model_path", str(folder), "--prompts", *PROMPTS, "--steps", "2"]
    argv += ["--device", "cpu", "cpu:0", "cpu", "--offload", "--log_dir", str(tmp_path)]
    sample(argv)
    (manifest,) = tmp_path.glob("*.json")
    facts = json.loads(manifest.read_text())
    assert facts["offload"] is True and facts["device"] == "cpu"
    assert facts["timing"]["images"] == 2 and all(
        s > 0 for s in facts["timing"]["seconds_per_image"]
    )
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "a picture (" in text]
    assert line.startswith("16 px ") and line.endswith(" s a picture (2 drawn)")
