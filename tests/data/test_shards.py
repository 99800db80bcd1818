"""Which tar files the user means, and what is said when there are none."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from diff_dalle.data.shards import find_shards
from diff_dalle.errors import UsageError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def names(*entries: str | Path) -> list[str]:
    return [shard.name for shard in find_shards([str(entry) for entry in entries])]


def test_a_folder_is_searched_to_the_bottom_and_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.tar", "b/0.tar", "a.tar", "b/c/2.tar", "0_stats.json", "b/0.parquet")
    touch(tmp_path, ".hidden/3.tar", "b/.part.tar", "b/0.tar.index", "x.tar.gz")
    assert names(tmp_path) == ["a.tar", "b/0.tar", "b/1.tar", "b/c/2.tar"]


def test_a_relative_folder_is_joined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "data/train/0.tar")
    monkeypatch.chdir(tmp_path)
    for entry in ("data/train", "./data/train/", "data/train/0.tar", "data/*/0.tar"):
        (shard,) = find_shards([entry])
        assert shard.name == "0.tar" and os.path.samefile(shard.path, "data/train/0.tar")


def test_a_link_is_followed_and_a_loop_is_not(tmp_path: Path) -> None:
    touch(tmp_path, "real/0.tar", "data/1.tar")
    os.symlink(tmp_path / "real", tmp_path / "data" / "linked")
    os.symlink(tmp_path / "data", tmp_path / "data" / "loop")
    assert names(tmp_path / "data") == ["1.tar", "linked/0.tar"]


def test_files_patterns_and_folders_may_be_mixed_and_count_once(tmp_path: Path) -> None:
    touch(tmp_path, "d/0.tar", "d/1.tar", "e/2.tar", "e/3.tar", "e/5.tar")
    assert names(tmp_path / "e/5.tar", tmp_path / "d", tmp_path / "e") == [
        *("5.tar", "0.tar", "1.tar", "2.tar", "3.tar")
    ]
    assert names(f"{tmp_path}/{{d,e}}/?.tar") == ["0.tar", "1.tar", "2.tar", "3.tar", "5.tar"]


def test_a_brace_pattern_may_have_gaps_and_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "00001.tar", "00003.tar")
    with pytest.warns(UserWarning, match="3 of 5 are missing"):
        assert names(f"{tmp_path}/{{00000..00004}}.tar") == ["00001.tar", "00003.tar"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(f"{tmp_path}/{{00001,00003}}.tar") == ["00001.tar", "00003.tar"]


def refusal(*entries: str | Path) -> str:
    with pytest.raises(UsageError) as caught:
        find_shards([str(entry) for entry in entries])
    message = str(caught.value)
    assert message.startswith("--data_dir") and "\n" not in message
    return message


def test_what_is_missing_or_shaped_wrongly_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "empty/.keep", "loose/a.jpg", "loose/sub/b.PNG", "zipped/0.tar.gz", "note.txt")
    touch(tmp_path, "odd/a.parquet", "odd/b.parquet", "odd/c", "both/train/0.tar", "both/val/0.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    assert "is missing" in refusal()
    assert f"no such file or folder ({tmp_path} exists)" in refusal(tmp_path / "missing")
    assert "an empty folder" in refusal(tmp_path / "empty")
    command = f"python scripts/pack_dataset.py --images {tmp_path}/loose --out_dir OUT"
    assert f"2 loose images, pack them into tar shards: {command}" in refusal(tmp_path / "loose")
    assert "unpack" in refusal(tmp_path / "zipped")
    assert "2 .parquet, 1 no extension" in refusal(tmp_path / "odd")
    assert "not a .tar file" in refusal(tmp_path / "note.txt")
    assert "both train and val" in refusal(tmp_path / "both")
    assert "no file matches" in refusal(f"{tmp_path}/{{0..3}}.tar")
    assert "braces" in refusal(f"{tmp_path}/{{0..3.tar")
    assert "not a regular file" in refusal(tmp_path / "pipe.tar")


def test_the_packing_command_can_be_pasted(tmp_path: Path) -> None:
    touch(tmp_path, "my art/a.jpg")
    assert f"--images '{tmp_path}/my art' --out_dir OUT" in refusal(tmp_path / "my art")


def test_nothing_is_run_and_nothing_fetched(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    assert "would run a program" in refusal(f"pipe:touch {canary}")
    (shard,) = find_shards(["s3://bucket/0.tar"])  # nothing is asked of it yet
    assert shard.cache is not None and shard.name == "0.tar"
    assert not canary.exists()


def test_one_of_train_and_val_is_fine(tmp_path: Path) -> None:
    touch(tmp_path, "train/0.tar", "val/0.tar", "more/0.tar")
    assert names(tmp_path / "train") == ["0.tar"]
    assert names(tmp_path / "train", tmp_path / "val") == ["train/0.tar", "val/0.tar"]


def test_the_same_command_works_again_where_indices_lie_beside_shards(tmp_path: Path) -> None:
    touch(tmp_path, "0.tar", "0.tar.index", "0_stats.json", "1.tar", "dataset.json", "a.tar.gz")
    assert names(f"{tmp_path}/*") == ["0.tar", "1.tar"]
    expanded = sorted(path for path in tmp_path.iterdir() if path.name != "a.tar.gz")
    assert names(*expanded) == ["0.tar", "1.tar"]  # as a shell spells out data/*
    assert "a.tar.gz: not a .tar file" in refusal(*expanded, tmp_path / "a.tar.gz")
    assert "not a .tar file" in refusal(tmp_path / "dataset.json")
    assert "not a .tar file" in refusal(f"{tmp_path}/*.json")
    assert "not a .tar file" in refusal(tmp_path / "0.tar", f"{tmp_path}/*.json")


def test_a_pattern_crosses_folders_and_names_them(tmp_path: Path) -> None:
    touch(tmp_path, "A/0.tar", "A/deep/1.tar", "B/2.tar", "C/3.tar", "empty/note.txt", "4.tar")
    everything = ["0.tar", "1.tar", "2.tar", "3.tar", "4.tar"]
    assert sorted(names(f"{tmp_path}/**/*.tar")) == everything
    assert names(f"{tmp_path}/[AB]") == ["0.tar", "deep/1.tar", "2.tar"]
    assert names(f"{tmp_path}/{{B,C}}") == ["2.tar", "3.tar"]
    assert names(f"{tmp_path}/*") == ["4.tar", "0.tar", "deep/1.tar", "2.tar", "3.tar"]
    assert "found: 1 .txt" in refusal(f"{tmp_path}/em*")


def test_shards_of_different_folders_have_different_names(tmp_path: Path) -> None:
    touch(tmp_path, "x/A/0.tar", "x/A/1.tar", "x/B/0.tar", "x/B/A/0.tar")
    expected = ["A/0.tar", "1.tar", "B/0.tar"]
    assert names(tmp_path / "x/A", f"{tmp_path}/x/B/0.tar") == expected
    assert names(f"{tmp_path}/x/[AB]/?.tar") == expected
    (tmp_path / "x").rename(tmp_path / "elsewhere")
    assert names(f"{tmp_path}/elsewhere/[AB]/?.tar") == expected
    # The long name of A/0.tar is the short one of another shard.
    folder = tmp_path / "elsewhere"
    assert names(folder / "A/0.tar", folder / "B") == ["A/0.tar", "B/0.tar", "B/A/0.tar"]
