"""`scripts/sample.py` with pictures that are not square, and in tiles: its files, and going on."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diff_dalle import Cascade
from diff_dalle.cascade import share
from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.store import read_pictures

PROMPTS = ["a red circle", "a star", "x"]
Sample = Callable[[list[str]], None]
pytestmark = pytest.mark.filterwarnings("ignore:stage . is drawn in tiles")


def argv(out: Path, *models: Path) -> list[str]:
    paths = [str(model) for model in models]
    return ["--model_path", *paths, "--log_dir", str(out), "--steps", "2", "--device", "cpu"]


def test_every_file_has_the_shape_and_an_interrupted_run_goes_on(
    folder: Path,
    tmp_path: Path,
    sample: Sample,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    two = [folder / "base.pt", folder / "up32.pt"]
    command = [*argv(tmp_path, *two), "--prompts", *PROMPTS, "--size", "48x16"]
    command += ["--tile_size", "24", "--tile_overlap", "8", "--save_png"]
    draw, drawn = Cascade.draw, []

    def fail_late(self: Cascade, plan: Any, indices: Any, *args: Any, **options: Any) -> Any:
        if len(drawn) == 2:
            raise RuntimeError("out of memory")
        drawn.extend(indices)
        return draw(self, plan, indices, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Cascade, "draw", fail_late)
        with pytest.raises(RuntimeError):
            sample([*command, "--batch_size", "1"])
    capsys.readouterr()
    sample([*command, "--tile_batch", "3"])
    printed = capsys.readouterr().out
    assert "2 of 3 are there already" in printed
    assert "stage 2 is drawn in tiles of 24 px that share 8" in printed
    assert "24x8 px 2 (2 steps), 48x16 px 2 (2 steps), each of 3 tiles" in printed
    assert "shrunk, against what was enlarged, on average: 48x16 px" in printed

    expected = Cascade.load([str(path) for path in two]).sample(
        PROMPTS, steps=2, batch_size=1, size="48x16", tile_size=24, tile_overlap=8
    )
    for shape, pictures in zip(("8x24", "16x48"), expected.stages, strict=True):
        written = read_pictures(tmp_path / f"samples_3x{shape}x3.npz")
        assert np.abs(written.astype(int) - pictures).max() <= 1
    with Image.open(tmp_path / "grid.jpg") as grid:
        assert grid.size == (3 * 48, 16)
    with Image.open(tmp_path / "samples_3x16x48x3" / "000001.png") as image:
        np.testing.assert_array_equal(np.asarray(image), written[1])
    manifest = json.loads((tmp_path / "samples_3x16x48x3.json").read_text())
    told = [[s[name] for name in ("width", "height", "tile_size")] for s in manifest["stages"]]
    assert told == [[24, 8, 0], [48, 16, 24]]
    assert manifest["stages"][1]["image_size"] == 32  # what it was trained at
    assert manifest["images"][0]["consistency"][1]["psnr_db"] > 0
    assert "stage 2 is drawn in tiles of 24 px" in " ".join(manifest["notes"])


def test_stage_by_stage_through_files_equals_one_run(
    folder: Path, tmp_path: Path, sample: Sample
) -> None:
    given = ["--prompts", *PROMPTS]
    sample([*argv(tmp_path / "one", folder / "base.pt"), *given, "--size", "24x16"])
    npz = str(tmp_path / "one" / "samples_3x16x24x3.npz")
    sample([*argv(tmp_path / "two", folder / "up32.pt"), "--low_res", npz, "--size", "48x32"])
    both = argv(tmp_path / "both", folder / "base.pt", folder / "up32.pt")
    sample([*both, *given, "--size", "48x32"])
    alone, chained = (
        read_pictures(tmp_path / name / "samples_3x32x48x3.npz") for name in ("two", "both")
    )
    np.testing.assert_array_equal(alone, chained)
    with pytest.raises(UsageError, match=r"--low_res holds .* another --size"):
        sample([*argv(tmp_path / "no", folder / "up32.pt"), "--low_res", npz])


@pytest.mark.parametrize(("size", "left", "width"), [("48", 8, 48), ("64x48", 0, 64)])
def test_shards_give_the_middle(
    folder: Path, tmp_path: Path, sample: Sample, size: str, left: int, width: int
) -> None:
    """Of any shape: a stage's input is the picture at its own size, averaged down."""
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("0.png", data.getvalue()), ("0.txt", b"a star")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    command = [*argv(tmp_path / "out", folder / "up32.pt"), "--low_res", str(tmp_path / "a.tar")]
    sample([*command, "--size", size])
    middle = picture[:, left : left + width]
    small = middle.reshape(1, 24, 2, width // 2, 2, 3).mean((2, 4)).round().astype(np.uint8)
    expected = Cascade.load(str(folder / "up32.pt")).sample(
        "a star", low_res=small, size=size, steps=2
    )
    written = read_pictures(tmp_path / "out" / f"samples_1x48x{width}x3.npz")
    assert np.abs(written.astype(int) - expected.stages[0]).max() <= 1


@pytest.mark.parametrize("change", [{"size": "48x32"}, {"tile_size": ["16"]}, {"tile_batch": 2}])
def test_sizes_and_tiles_decide_the_folder_and_their_batch_does_not(
    folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    cascade = Cascade.load([str(folder / name) for name in ("base.pt", "up32.pt")])

    def work(**settings: Any) -> Path:
        flags = {"prompts": ["a"], "size": "64x32", "tile_size": ["24"]} | settings
        cfg = share.SampleConfig(**flags)
        request = share.request_of(cascade, cfg)
        writer = share.open_writer(tmp_path, cascade, cascade.plan(cfg), request)
        writer.discard()
        return writer.work

    assert (work() == work(**change)) == ("tile_batch" in change)
