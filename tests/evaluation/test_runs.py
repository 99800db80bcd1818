"""The scripts' work, with random models: what is written, and what is refused."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diff_dalle import Cascade
from diff_dalle.data.captions import captions, one_object_captions
from diff_dalle.errors import UsageError
from diff_dalle.evaluation.drawing import Drawer, DrawingConfig
from diff_dalle.evaluation.report import write_report
from diff_dalle.evaluation.shapes_run import (
    ShapesConfig,
    evaluate_shapes,
    read_outputs,
    report_pictures,
)

TINY = runpy.run_path(str(Path(__file__).parents[1] / "programs" / "tiny_cascade.py"))
FAST: dict[str, Any] = {
    "num_samples": 4,
    "batch_size": 3,
    "timestep_respacing": ["2"],
    "device": "cpu",
}


def paths(folder: Path, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_base_model_is_drawn_and_scored(models: Path, tmp_path: Path) -> None:
    cfg = ShapesConfig(model_path=paths(models, "base.pt"), log_dir=str(tmp_path / "new"), **FAST)
    (data, text, grid), table = evaluate_shapes(cfg)
    content = read(data)
    assert content["step"] == 7 and content["count"] == 4
    assert len(content["pictures"]) == 4
    assert content["stages"][0]["checkpoint"]["sha256"]
    assert 0 <= content["scores"]["shape"]["low"] <= content["scores"]["shape"]["mean"] <= 1
    assert "agreement" not in content
    assert text.read_text() == table + "\n"
    assert Image.open(grid).width > 8 * 160


def test_a_cascade_says_whether_its_last_stage_keeps_the_verdict(
    models: Path, tmp_path: Path
) -> None:
    names = paths(models, "base.pt", "up32.pt", "up64.pt")
    cfg = ShapesConfig(model_path=names, log_dir=str(tmp_path), **FAST)
    (data, *_), table = evaluate_shapes(cfg)
    assert set(read(data)["agreement"]) == {"background", "colour", "shape", "verdict"}
    assert "the same verdict on 16 px and 64 px" in table


def test_a_sweep_of_strengths(models: Path, tmp_path: Path) -> None:
    cfg = ShapesConfig(
        model_path=paths(models, "base.pt"),
        classifier_path=paths(models, "clip.pt"),
        classifier_scale=[0.0, 2.0],
        seeds=[0, 1],
        log_dir=str(tmp_path),
        **FAST,
    )
    (data, _), table = evaluate_shapes(cfg)
    content = read(data)
    assert [row["scale"] for row in content["rows"]] == [-2, 0, 2]
    assert content["seeds"] == [0, 1] and content["captions"] == 4
    assert "| 2 |" in table


def test_a_sweep_without_a_clip_is_refused(models: Path, tmp_path: Path) -> None:
    names = paths(models, "base.pt")
    cfg = ShapesConfig(model_path=names, classifier_scale=[0, 1], log_dir=str(tmp_path), **FAST)
    with pytest.raises(UsageError, match="--classifier_path"):
        evaluate_shapes(cfg)


@pytest.fixture
def outputs(tmp_path: Path) -> dict[str, Any]:
    """True pictures, as sample.py would leave them."""
    chosen = one_object_captions(8, 0)
    files = []
    for size in (64, 128):
        pictures = np.stack([scene.draw(size) for _, scene in chosen])
        files.append(str(tmp_path / f"samples_8x{size}x{size}x3.npz"))
        np.savez(files[-1], arr_0=pictures)
    text = tmp_path / "samples.txt"
    text.write_text("".join(f"{caption}\n" for caption, _ in chosen), encoding="utf-8")
    return {"images": files, "captions": str(text), "log_dir": str(tmp_path)}


def test_existing_pictures_are_scored(outputs: dict[str, Any]) -> None:
    (data, *_), _ = evaluate_shapes(ShapesConfig(**outputs))
    content = read(data)
    assert content["scores"]["all"]["mean"] == 1
    assert content["agreement"]["verdict"]["mean"] == 1
    assert all(picture["right"] for picture in content["pictures"])


def test_the_last_stage_is_scored_and_held_against_the_first(outputs: dict[str, Any]) -> None:
    first = np.load(outputs["images"][0])["arr_0"]
    first[0] = first[1]  # the 64 px picture of the first caption shows another scene
    np.savez(outputs["images"][0], arr_0=first)
    (data, *_), _ = evaluate_shapes(ShapesConfig(**outputs))
    content = read(data)
    assert content["scores"]["all"]["mean"] == 1
    assert content["agreement"]["verdict"]["mean"] == 7 / 8


def test_the_batch_size_does_not_change_what_is_drawn(models: Path) -> None:
    prompts = ["a red circle", "a star", "a large blue square", "x"]
    drawn = [
        Drawer(DrawingConfig(model_path=paths(models, "base.pt"), **(FAST | {"batch_size": size})))
        .draw(prompts, seed=0, classifier_scale=1.0)[0]
        .astype(int)
        for size in (4, 3)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert np.abs(drawn[0][3] - drawn[0][0]).max() > 10


def test_guidance_is_that_of_sample_py(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guidance: dict[str, Any] = {
        "guidance_scale": ["4"],
        "guidance_interval": ["0.1,inf"],
        "guidance_schedule": ["linear"],
        "guidance_rescale": ["0.5"],
    }
    base = paths(models, "base.pt")
    drawer = Drawer(DrawingConfig(model_path=base, **FAST, **guidance))
    drawn = drawer.draw(["a star"], seed=0, classifier_scale=1.0)[0]
    steps = FAST["timestep_respacing"][0]
    same = {"sampler": "ddpm", "steps": steps, "step_spacing": "uniform"}
    expected = Cascade.load(base[0]).sample("a star", **same, **guidance)
    np.testing.assert_array_equal(drawn, expected.stages[0])
    assert "network evaluations a picture: 16 px" in capsys.readouterr().out


def test_the_clip_guides_as_in_sample_py_and_not_at_all_at_strength_0(models: Path) -> None:
    guidance: dict[str, Any] = {
        "classifier_interval": ["0.1,inf"],
        "classifier_schedule": ["linear"],
        "contrast": "prompts",
    }
    base, clip = paths(models, "base.pt"), paths(models, "clip.pt")
    drawer = Drawer(DrawingConfig(model_path=base, classifier_path=clip, **FAST, **guidance))
    steps = FAST["timestep_respacing"][0]
    same = {"sampler": "ddpm", "steps": steps, "step_spacing": "uniform"}
    cascade, prompts = Cascade.load(base[0], clip[0]), ["a star", "a circle"]
    for scale, settings in ((20.0, guidance), (0.0, {})):
        drawn = drawer.draw(prompts, seed=0, classifier_scale=scale)[0]
        expected = cascade.sample(prompts, classifier_scale=scale, **same, **settings)
        np.testing.assert_array_equal(drawn, expected.stages[0])


def test_what_the_user_should_know_is_told_once(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An average of mostly initial weights, prompts that are cut."""
    old = TINY["write_generator"](tmp_path / "old.pt", image_size=16, ema_rate=0.9)
    clip = paths(models, "clip.pt")
    cfg = DrawingConfig(model_path=[str(old)], classifier_path=clip, **FAST)
    drawer = Drawer(cfg)
    for seed in (0, 1):
        drawer.draw(["x", "long " * 60], seed=seed, classifier_scale=0.1)
    printed = capsys.readouterr().out
    for note in ("averages over more steps", "prompt 1: "):
        assert note in printed
    lines = printed.splitlines()
    assert len(lines) == len(set(lines))


def test_an_earlier_report_stays(outputs: dict[str, Any]) -> None:
    (first, *_), _ = evaluate_shapes(ShapesConfig(**outputs))
    before = first.read_bytes()
    (second, *_), _ = evaluate_shapes(ShapesConfig(**outputs))
    assert (first.name, second.name) == ("alignment.json", "alignment_2.json")
    assert first.read_bytes() == before


def test_pictures_of_a_run_say_which_step_drew_them(outputs: dict[str, Any]) -> None:
    """The manifest beside them does; plot_curves takes the step for its horizontal axis."""
    (data, *_), _ = evaluate_shapes(ShapesConfig(**outputs))
    assert read(data)["settings"]["num_samples"] == 8 and "step" not in read(data)
    stages = [{"checkpoint": {"step": 70}}, {"checkpoint": {"step": 9}}]
    manifest = {"files": ["samples_8x128x128x3.npz"], "stages": stages}
    folder = Path(outputs["log_dir"])
    (folder / "samples_8x128x128x3.json").write_text(json.dumps(manifest))
    (folder / "samples_1x1x1x3.json").write_text("[")
    (data, *_), _ = evaluate_shapes(ShapesConfig(**outputs))
    assert read(data)["step"] == 70 and read(data)["stages"] == stages


@pytest.mark.parametrize("sweep", [False, True])
def test_a_folder_that_cannot_be_made_is_found_before_drawing(
    models: Path, tmp_path: Path, sweep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Drawer, "draw", lambda *_, **__: pytest.fail("drawn"))
    cfg = ShapesConfig(
        model_path=paths(models, "base.pt"),
        log_dir=str(tmp_path / "file"),
        seeds=[0, 1] if sweep else [0],
        **FAST,
    )
    with pytest.raises(UsageError, match="file cannot be made"):
        evaluate_shapes(cfg)


def test_two_measurements_never_share_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may write a report between the look at the folder and the file."""
    first = write_report(tmp_path, "x", {"first": 1}, "")
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))
    second = write_report(tmp_path, "x", {"second": 2}, "")
    assert [path.name for path in second] == ["x_2.json", "x_2.md"]
    assert read(first[0]) == {"first": 1}


def test_pictures_and_captions_that_differ_in_number_are_refused(outputs: dict[str, Any]) -> None:
    Path(outputs["captions"]).write_text("a red star on a teal background\n")
    with pytest.raises(UsageError, match="holds 8 pictures.* has 1 lines"):
        evaluate_shapes(ShapesConfig(**outputs))
    with pytest.raises(UsageError, match="give files of sample.py"):
        evaluate_shapes(ShapesConfig(**(outputs | {"images": ["missing.npz"]})))


@pytest.mark.parametrize("size", [(64, 128), (16, 16)])
def test_pictures_that_nothing_can_judge_are_refused(size: tuple[int, int], tmp_path: Path) -> None:
    file, text = tmp_path / "samples.npz", tmp_path / "captions.txt"
    np.savez(file, np.zeros((1, *size, 3), np.uint8))
    text.write_text("a red star on a teal background\n")
    with pytest.raises(UsageError, match=f"{size[1]} x {size[0]} px: only squares of 32 px"):
        read_outputs([str(file)], str(text))


def test_captions_for_sample_py(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    evaluate_shapes(ShapesConfig(write_captions=str(path), num_samples=16))
    expected = [caption for caption, _ in one_object_captions(16, 0, held_out=True)]
    assert path.read_text(encoding="utf-8").splitlines() == expected
    with pytest.raises(UsageError, match="captions.txt cannot be written .File exists"):
        evaluate_shapes(ShapesConfig(write_captions=str(path), num_samples=4))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--model_path"),
        ({"model_path": ["a.pt"], "write_captions": "b.txt"}, "one of the four"),
        ({"images": ["a.npz"]}, "--captions"),
        ({"model_path": ["a.pt"], "seeds": []}, "--seeds"),
        ({"model_path": ["a.pt"], "num_samples": 3}, "--num_samples"),
    ],
)
def test_flags_that_contradict_each_other(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ShapesConfig(**flags)


def test_wrong_pictures_are_marked_in_the_grid(tmp_path: Path) -> None:
    (_, said), (_, shown) = one_object_captions(2, 0)
    picture = shown.draw(64)[None]
    files, _ = report_pictures([picture], [captions(said)[0]], tmp_path, {})
    corner = np.asarray(Image.open(files[-1]))[5, 5]
    assert tuple(corner) == (190, 30, 30)
