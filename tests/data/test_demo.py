"""The demo data sets from the command's settings to the folder, and the command itself."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from diff_dalle.data.demo import DemoDataConfig, make_demo_data
from diff_dalle.data.scenes import sample_scene
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.errors import UsageError

ROOT = Path(__file__).parents[2]
TINY = {"num_train": 24, "num_val": 10, "image_size": 32, "samples_per_shard": 10, "num_workers": 0}


def config(out_dir: Path, **changes: Any) -> DemoDataConfig:
    return DemoDataConfig(**{"out_dir": str(out_dir), **TINY, **changes})


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "D"
    make_demo_data(config(folder))
    return folder


def facts(shard: Path) -> list[dict[str, Any]]:
    with tarfile.open(shard) as archive:
        members = [m for m in archive.getmembers() if m.name.endswith(".json")]
        return [json.load(archive.extractfile(m)) for m in members]  # type: ignore[arg-type]


def test_the_folder_holds_what_was_asked_for(made: Path) -> None:
    assert sorted(hashes(made)) == [
        "dataset.json",
        "tokenizer.json",
        *(f"train/0000{number}.tar" for number in range(3)),
        "train/tokenizer.json",
        "val/00000.tar",
    ]
    content = json.loads((made / "dataset.json").read_text())
    assert content["length"] == 34
    assert content["splits"]["train"]["length"] == 24
    assert content["splits"]["train"]["held_out"] == 0
    assert content["splits"]["val"]["shards"] == {
        "00000.tar": (made / "val" / "00000.tar").stat().st_size
    }
    assert content["image_size"] == 32 and content["licence"]["spdx"] == "CC0-1.0"
    assert content["settings"]["seed"] == 0
    assert set(content["versions"]) >= {"numpy", "pillow", "tokenizers"}
    assert content["tokenizer"]["sha256"] == Tokenizer.load(made / "tokenizer.json").sha256


def test_validation_samples_say_whether_they_are_held_out(made: Path) -> None:
    flags = [sample["held_out"] for sample in facts(made / "val" / "00000.tar")]
    assert flags == [sample_scene(0, index, "val").held_out for index in range(10)]
    assert True in flags and False in flags
    content = json.loads((made / "dataset.json").read_text())
    assert content["splits"]["val"]["held_out"] == sum(flags)


def test_the_same_settings_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    make_demo_data(config(tmp_path, num_workers=1))
    assert hashes(tmp_path) == hashes(made)
    make_demo_data(config(tmp_path / "other", seed=1))
    assert hashes(tmp_path / "other")["train/00000.tar"] != hashes(made)["train/00000.tar"]


def test_a_complete_folder_is_left_alone(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert "complete already: 24 in train/, 10 in val/" in make_demo_data(config(made))
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_an_unfinished_folder_is_finished(made: Path, tmp_path: Path) -> None:
    make_demo_data(config(tmp_path))
    (tmp_path / "train" / "00001.tar").unlink()
    (tmp_path / "dataset.json").rename(tmp_path / "unfinished.json")
    make_demo_data(config(tmp_path))
    assert hashes(tmp_path) == hashes(made)
    (tmp_path / "val" / "00000.tar").unlink()
    make_demo_data(config(tmp_path))
    assert hashes(tmp_path) == hashes(made)


def test_a_missing_tokenizer_is_written_again(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "D"
    for name in ("tokenizer.json", "train/tokenizer.json"):
        shutil.copytree(made, folder)
        (folder / name).unlink()
        make_demo_data(config(folder))
        assert hashes(folder) == hashes(made)
        shutil.rmtree(folder)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    make_demo_data(config(tmp_path))
    (tmp_path / "val" / "00000.tar").write_bytes(b"half")
    with pytest.raises(UsageError, match="val/00000.tar is damaged .*remove it and run again"):
        make_demo_data(config(tmp_path))


def test_another_data_set_is_refused(made: Path) -> None:
    before = hashes(made)
    with pytest.raises(UsageError, match=r"other settings \(image_size 32 -> 64, seed 0 -> 3\)"):
        make_demo_data(config(made, seed=3, image_size=64))
    assert hashes(made) == before


@pytest.mark.parametrize("name", ["photo.jpg", "dataset.json", "unfinished.json"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[]")
    with pytest.raises(UsageError, match=f"something else .{name}"):
        make_demo_data(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(UsageError, match="cannot be written"):
        make_demo_data(config(tmp_path / name / "below"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "photos"}, "--source is 'photos'"),
        ({"out_dir": None}, "--out_dir is None"),
        ({"source": "emoji"}, "--artwork is None"),
        ({"artwork": "icons.json"}, "--artwork is 'icons.json'"),
        ({"image_size": 8}, "--image_size is 8"),
        ({"image_format": "gif"}, "--image_format is 'gif'"),
        ({"num_val": -1}, "--num_val is -1"),
        ({"samples_per_shard": 0}, "--samples_per_shard is 0"),
        ({"vocab_size": 100}, "--vocab_size is 100"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DemoDataConfig(**{"out_dir": "D", **changes})


def artwork(folder: Path, count: int = 60) -> Path:
    names = {f"letter-{number}" for number in range(count - 1)} | {"red-apple"}
    icons = {name: {"body": f'<circle r="4" cx="8" cy="8"/><!--{name}-->'} for name in names}
    path = folder / "icons.json"
    path.write_text(json.dumps({"icons": icons}))
    return path


def test_emoji_every_icon_once_then_again(tmp_path: Path) -> None:
    path, out = artwork(tmp_path), tmp_path / "E"
    settings = {"source": "emoji", "artwork": str(path), "num_train": 0, "num_val": 0}
    make_demo_data(config(out, **settings))
    content = json.loads((out / "dataset.json").read_text())
    counts, splits = content["icons"], content["splits"]
    assert counts["all"] == 60 == counts["train"] + counts["val"]
    assert (counts["named"], counts["by_own_name"]) == (1, 59)
    assert (splits["train"]["length"], splits["val"]["length"]) == (counts["train"], counts["val"])
    samples = [sample for shard in sorted(out.rglob("*.tar")) for sample in facts(shard)]
    assert len({sample["icon"] for sample in samples}) == 60
    assert all(sample["held_out"] == (k >= counts["train"]) for k, sample in enumerate(samples))
    assert "빨간 사과" in {caption for sample in samples for caption in sample["captions"]}

    more = {**settings, "num_train": 70, "num_val": 1}
    make_demo_data(config(tmp_path / "F", **more))
    shards = sorted((tmp_path / "F" / "train").glob("*.tar"))
    repeated = [sample for shard in shards for sample in facts(shard)]
    assert len(repeated) == 70 and repeated[counts["train"]]["icon"] == repeated[0]["icon"]
    assert repeated[counts["train"]]["scale"] < 1 == repeated[0]["scale"]


def test_too_few_icons_are_refused(tmp_path: Path) -> None:
    path = artwork(tmp_path, 1)
    with pytest.raises(UsageError, match="1 icons leave none for"):
        make_demo_data(config(tmp_path / "E", source="emoji", artwork=str(path)))
    with pytest.raises(UsageError, match="missing.json"):
        make_demo_data(
            config(tmp_path / "E", source="emoji", artwork=str(tmp_path / "missing.json"))
        )


def command(*flags: str) -> subprocess.Popen[str]:
    script = [sys.executable, str(ROOT / "scripts" / "make_demo_data.py")]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    pipe = subprocess.PIPE
    return subprocess.Popen([*script, *flags], stdout=pipe, stderr=pipe, text=True, env=environment)


def test_the_command_writes_and_refuses(made: Path, tmp_path: Path) -> None:
    tiny = [f"--{name}={value}" for name, value in {**TINY, "num_workers": 1}.items()]
    writing = command("--source", "shapes", "--out_dir", str(tmp_path / "D"), *tiny)
    refusing = command("--out_dir", str(made), "--seed", "9", *tiny)
    out, error = writing.communicate(timeout=120)
    assert writing.returncode == 0, error
    assert out == f"{tmp_path / 'D'}: 24 in train/, 10 in val/ at 32 px, png\n"
    assert hashes(tmp_path / "D") == hashes(made)
    out, error = refusing.communicate(timeout=120)
    assert refusing.returncode == 2 and out == ""
    assert error.startswith(f"error: --out_dir {made} holds a data set") and error.count("\n") == 1
