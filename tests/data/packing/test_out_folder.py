"""What is refused or left alone: folders in use, of another command or complete; wrong settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diff_dalle.data.packing.out_folder import held
from diff_dalle.data.packing.pack import PackConfig, pack_dataset
from diff_dalle.errors import UsageError

Config = Callable[..., PackConfig]
Drawings = Callable[..., Path]


def test_a_complete_folder_is_left_alone(
    tmp_path: Path, drawings: Drawings, config: Config
) -> None:
    cfg = config(tmp_path / "out", images=str(drawings(tmp_path / "D", 3)))
    pack_dataset(cfg)
    (tmp_path / "out" / "train" / "tokenizer.json").write_text("{}")  # what a user may add
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert "is complete already: 3 in train/, 0 in val/; none skipped" in pack_dataset(cfg)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    (tmp_path / "out" / "train" / "000000.tar").write_bytes(b"half")
    with pytest.raises(UsageError, match=r"train/000000.tar is missing or damaged"):
        pack_dataset(cfg)


def test_another_command_is_refused(tmp_path: Path, drawings: Drawings, config: Config) -> None:
    folder, out = drawings(tmp_path / "D", 3), tmp_path / "out"
    pack_dataset(config(out, images=str(folder)))
    with pytest.raises(UsageError, match=r"another command \(min_size 0 -> 8, resize 0 -> 64\)"):
        pack_dataset(config(out, images=str(folder), resize=64, min_size=8))
    (folder / "003.txt").write_text("more")
    (folder / "003.png").write_bytes(b"picture")
    with pytest.raises(UsageError, match=r"another command \(source .*'records': 3"):
        pack_dataset(config(out, images=str(folder)))


@pytest.mark.parametrize("name", ["photo.jpg", "unfinished.json", "train"])
def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, drawings: Drawings, config: Config, name: str
) -> None:
    folder, out = drawings(tmp_path / "D", 1), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("[]")
    with pytest.raises(UsageError, match=f"holds something else .{name}"):
        pack_dataset(config(out, images=str(folder)))
    assert [path.name for path in out.iterdir()] == [name]
    with pytest.raises(UsageError, match="cannot be written"):
        pack_dataset(config(out / name / "below", images=str(folder)))


def test_a_folder_in_use_is_refused(tmp_path: Path, drawings: Drawings, config: Config) -> None:
    cfg = config(tmp_path / "out", images=str(drawings(tmp_path / "D", 1)))
    with held(tmp_path / "out"), pytest.raises(UsageError, match="another process packs into it"):
        pack_dataset(cfg)
    pack_dataset(cfg)


def test_pictures_of_which_none_can_be_used_are_refused(
    tmp_path: Path, drawings: Drawings, config: Config
) -> None:
    cfg = config(tmp_path / "out", images=str(drawings(tmp_path / "D", 3)), min_size=17)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"no record can be packed, skipped 3 \(3 too small\)"):
            pack_dataset(cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_dir": None}, "--out_dir is None"),
        ({"images": None}, r"give one source: .*\(given: none\)"),
        ({"parquet": ["t.parquet"]}, r"\(given: --images and --parquet\)"),
        ({"images": None, "parquet": ["t"], "captions": ["c.csv"]}, "it must come with --images"),
        ({"resize": -1}, "--resize is -1"),
        ({"min_size": -1}, "--min_size is -1"),
        ({"num_workers": -1}, "--num_workers is -1"),
        ({"samples_per_shard": 0}, "--samples_per_shard is 0"),
        ({"shard_bytes": 0}, "--shard_bytes is 0"),
        ({"quality": 101}, "--quality is 101"),
        ({"val_share": 1.0}, "--val_share is 1.0"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PackConfig(**{"out_dir": "out", "images": "D", **changes})


def test_wrong_folders_are_refused_before_anything_is_written(
    tmp_path: Path, drawings: Drawings, config: Config
) -> None:
    folder = drawings(tmp_path / "D", 1)
    with pytest.raises(UsageError, match=r"--images .*none: no such folder"):
        pack_dataset(config(tmp_path / "out", images=str(tmp_path / "none")))
    with pytest.raises(UsageError, match="lies in --images: name a folder outside it"):
        pack_dataset(config(folder / "out", images=str(folder)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["D"]
    assert len(list(folder.iterdir())) == 2
