import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from diff_dalle.errors import UsageError
from diff_dalle.evaluation.curves import CurvesConfig, draw_curves, read_curves


@pytest.fixture
def progress(tmp_path: Path) -> str:
    path = tmp_path / "progress.csv"
    path.write_text("step,samples,loss,val_loss\n20,640,0.5,\n10,320,0.75,0.8\n30,960,nan,0.4\n")
    return str(path)


@pytest.fixture
def measured(tmp_path: Path) -> list[str]:
    files = []
    for step, share in ((200, 0.5), (100, 0.25)):
        interval = {"mean": share, "low": share - 0.1, "high": share + 0.1}
        content = {
            "step": step,
            "scores": {"colour": interval},
            "agreement": {"colour": {**interval, "mean": 9}},
            "pictures": [{"confidence": 1}],
        }
        files.append(str(tmp_path / f"{step}.json"))
        Path(files[-1]).write_text(json.dumps(content))
    return files


def test_a_run_gives_one_curve_a_column_without_holes(progress: str) -> None:
    loss, held_out = read_curves([progress], "samples", ["loss", "val_loss"], 1.0)
    assert (loss.label, loss.x, loss.y) == ("loss", [320, 640], [0.75, 0.5])
    assert (held_out.x, held_out.y, held_out.low) == ([320, 960], [0.8, 0.4], [0.8, 0.4])


def test_several_runs_are_told_apart(progress: str, tmp_path: Path) -> None:
    other = tmp_path / "other" / "progress.csv"
    other.parent.mkdir()
    other.write_text(Path(progress).read_text())
    labels = [curve.label for curve in read_curves([progress, str(other)], "step", ["loss"], 1)]
    assert labels == [f"{tmp_path}: loss", f"{other.parent}: loss"]


def test_two_tables_of_one_folder_are_two_curves(progress: str, tmp_path: Path) -> None:
    other = tmp_path / "earlier.csv"
    other.write_text("step,loss\n5,1.5\n10,1\n")
    first, second = read_curves([progress, str(other), progress], "step", ["loss"], 1)
    assert (first.label, first.x) == (f"{progress}: loss", [10, 20])
    assert (second.label, second.x) == (f"{other}: loss", [5, 10])


def test_a_column_without_a_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "progress.csv"
    path.write_text("step,loss\n10,nan\n20,nan\n")
    with pytest.raises(UsageError, match="--y loss has no finite value .* nothing to draw"):
        draw_curves(CurvesConfig(files=[str(path)], y=["loss"], out=str(tmp_path / "x.png")))


def test_measurements_are_points_of_one_curve_with_intervals(measured: list[str]) -> None:
    (curve,) = read_curves(measured, "step", ["scores.colour"], 32.0)
    assert (curve.x, curve.y) == ([3200, 6400], [0.25, 0.5])
    assert curve.low == pytest.approx([0.15, 0.4]) and curve.high == pytest.approx([0.35, 0.6])


def test_a_short_name_finds_the_shortest_path(measured: list[str]) -> None:
    (curve,) = read_curves(measured, "step", ["colour"], 1.0)
    assert curve.y == [0.25, 0.5]


def test_unknown_names_and_files_are_refused(progress: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no vall_loss; did you mean val_loss"):
        read_curves([progress], "step", ["vall_loss"], 1.0)
    with pytest.raises(UsageError, match="cannot be read"):
        read_curves([str(tmp_path / "missing.csv")], "step", ["loss"], 1.0)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UsageError, match="broken.json cannot be read"):
        read_curves([str(tmp_path / "broken.json")], "step", ["loss"], 1.0)


def test_the_picture_is_drawn_or_matplotlib_is_asked_for(
    measured: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "docs" / "curves.png"
    cfg = CurvesConfig(files=measured, y=["colour"], out=str(out), x_label="images seen")
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(UsageError, match="pip install matplotlib"):
            draw_curves(cfg)
        return
    assert draw_curves(cfg) == out
    picture = Image.open(out).convert("L")
    assert picture.size == (960, 540)
    assert len(picture.getcolors() or []) > 2
    for wrong in (tmp_path / "curves.xyz", out / "curves.png"):
        with pytest.raises(UsageError, match=f"--out {wrong} cannot be written"):
            draw_curves(dataclasses.replace(cfg, out=str(wrong)))


def test_flags_that_draw_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="--files"):
        CurvesConfig(y=["loss"])
    with pytest.raises(UsageError, match="--y"):
        CurvesConfig(files=["a.csv"])
