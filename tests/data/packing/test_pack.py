"""From the command's settings to shards that the loader and webdataset read."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diff_dalle.data.loader import DataConfig, open_data, train_batches
from diff_dalle.data.packing import prepare
from diff_dalle.data.packing.pack import PackConfig, pack_dataset
from diff_dalle.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
Config = Callable[..., PackConfig]
Hashes = Callable[[Path], dict[str, str]]
Samples = Callable[[Path], list[dict[str, Any]]]
Skipped = Callable[[Path], list[tuple[str, str]]]
Drawings = Callable[..., Path]
Picture = Callable[..., bytes]


def test_the_folder_holds_what_was_asked_for(
    tmp_path: Path, drawings: Drawings, config: Config, hashes: Hashes, samples: Samples
) -> None:
    folder, out = drawings(tmp_path / "D", 5), tmp_path / "out"
    line = pack_dataset(config(out, images=str(folder), samples_per_shard=2))
    assert line == f"{out}: 5 in train/, 0 in val/; none skipped"
    assert sorted(hashes(out)) == [
        "skipped.jsonl",
        *(f"train/00000{number}.tar" for number in range(3)),
        "train/dataset.json",
        "val/dataset.json",
    ]
    content = json.loads((out / "train" / "dataset.json").read_text())
    assert content["length"] == content["records"] == 5
    sizes = {path.name: path.stat().st_size for path in (out / "train").glob("*.tar")}
    assert content["shards"] == sizes
    assert content["settings"]["samples_per_shard"] == 2 and content["versions"]["pillow"]
    packed = samples(out / "train")
    assert [sample["key"] for sample in packed] == [f"{number:09d}" for number in range(5)]
    assert packed[3]["image"] == (folder / "003.png").read_bytes()
    assert packed[3]["txt"] == packed[3]["caption"] == "picture 3"
    assert packed[3]["captions"] == ["picture 3", "그림 3"]
    size_and_source = [packed[3][name] for name in ("width", "height", "source")]
    assert size_and_source == [20, 16, "003.png"] and "extra" not in packed[3]


def test_members_carry_no_time_and_no_owner(
    tmp_path: Path, drawings: Drawings, config: Config
) -> None:
    pack_dataset(config(tmp_path / "out", images=str(drawings(tmp_path / "D", 2))))
    path = tmp_path / "out" / "train" / "000000.tar"
    assert path.stat().st_size % tarfile.RECORDSIZE == 0
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    assert [member.name for member in members[:3]] == [
        f"000000000.{extension}" for extension in ("png", "txt", "json")
    ]
    for member in members:
        owner = (member.uid, member.gid, member.uname, member.gname)
        assert (member.mtime, member.mode, *owner) == (0, 0o644, 0, 0, "", "")


def test_captions_are_normalised(
    tmp_path: Path, drawings: Drawings, config: Config, samples: Samples, skipped: Skipped
) -> None:
    folder = drawings(tmp_path / "D", 4, texts=False)
    texts = ["  a \t b\u00a0c \n\n\u1100\u1161", " \n", "\ufeffmarked", "half \ud800 pair"]
    for number, text in enumerate(texts):
        data = text.encode(errors="surrogatepass")
        (folder / f"{number:03d}.txt").write_bytes(data)
    pack_dataset(config(tmp_path / "out", images=str(folder)))
    packed = samples(tmp_path / "out" / "train")
    assert [sample["captions"] for sample in packed] == [["a b c", "가"], ["marked"]]
    assert skipped(tmp_path / "out") == [
        ("001.png", "no caption"),
        ("003.png", "caption not UTF-8"),
    ]
    pack_dataset(config(tmp_path / "raw", images=str(folder), normalise_captions=False))
    raw = samples(tmp_path / "raw" / "train")[0]
    assert raw["captions"] == ["  a \t b\u00a0c ", "\u1100\u1161"]


def test_half_a_character_in_a_table_is_replaced(
    tmp_path: Path, drawings: Drawings, config: Config, samples: Samples, skipped: Skipped
) -> None:
    folder = drawings(tmp_path / "D", 1, texts=False)
    row = {"file": "000.png", "text": "half \ud800", "note": "\udfff"}
    nameless = {"file": "\ud800.png", "text": "no file has this name"}
    (folder / "captions.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(nameless)}")
    pack_dataset(config(tmp_path / "out", images=str(folder)))
    (sample,) = samples(tmp_path / "out" / "train")
    assert sample["txt"] == sample["caption"] == "half ?" and sample["extra"] == {"note": "\udfff"}
    assert skipped(tmp_path / "out") == [("\ud800.png", "missing file")]


def test_a_file_that_the_loader_would_not_read_is_skipped(
    tmp_path: Path,
    drawings: Drawings,
    config: Config,
    skipped: Skipped,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = drawings(tmp_path / "D", 2)
    with open(folder / "001.png", "ab") as file:
        file.write(bytes(5000))
    monkeypatch.setattr(prepare, "LARGEST_FILE", 5000)
    pack_dataset(config(tmp_path / "out", images=str(folder)))
    assert skipped(tmp_path / "out") == [("001.png", "file too large")]


def test_broken_pictures_are_skipped_with_their_reason(
    tmp_path: Path, drawings: Drawings, config: Config, samples: Samples, skipped: Skipped
) -> None:
    folder = drawings(tmp_path / "D", 6)
    whole = (folder / "000.png").read_bytes()
    (folder / "001.png").write_bytes(whole[: len(whole) // 2])
    (folder / "002.png").write_bytes(b"")
    (folder / "003.png").write_bytes(b"text")
    os.unlink(folder / "004.png")
    os.mkfifo(folder / "004.png")
    line = pack_dataset(config(tmp_path / "out", images=str(folder)))
    assert skipped(tmp_path / "out") == [
        ("001.png", "truncated"),
        ("002.png", "empty file"),
        ("003.png", "not an image"),
        ("004.png", "missing file"),
    ]
    packed = samples(tmp_path / "out" / "train")
    assert [sample["key"] for sample in packed] == ["000000000", "000000005"]
    counts = "1 empty file, 1 missing file, 1 not an image, 1 truncated"
    assert f"2 in train/, 0 in val/; skipped 4 ({counts}); see " in line
    content = json.loads((tmp_path / "out" / "train" / "dataset.json").read_text())
    assert content["skipped"] == dict.fromkeys(
        ["empty file", "missing file", "not an image", "truncated"], 1
    )


def test_equal_files_are_packed_once(
    tmp_path: Path, drawings: Drawings, config: Config, samples: Samples, skipped: Skipped
) -> None:
    folder = drawings(tmp_path / "D", 3)
    (folder / "001.png").write_bytes((folder / "000.png").read_bytes())
    pack_dataset(config(tmp_path / "out", images=str(folder)))
    packed = samples(tmp_path / "out" / "train")
    assert [sample["source"] for sample in packed] == ["000.png", "002.png"]
    assert skipped(tmp_path / "out") == [("001.png", "duplicate")]
    pack_dataset(config(tmp_path / "all", images=str(folder), drop_duplicates=False))
    assert len(samples(tmp_path / "all" / "train")) == 3


def sides(out: Path, samples: Samples) -> dict[bytes, set[str]]:
    found: dict[bytes, set[str]] = {}
    for split in ("train", "val"):
        for sample in samples(out / split):
            found.setdefault(sample["image"], set()).add(split)
    return found


def test_the_content_decides_the_split(
    tmp_path: Path, drawings: Drawings, config: Config, samples: Samples
) -> None:
    settings = {"val_share": 0.3, "drop_duplicates": False}
    folder = drawings(tmp_path / "D", 40)
    for number in range(5):
        (folder / f"z{number}.png").write_bytes((folder / f"00{number}.png").read_bytes())
        (folder / f"z{number}.txt").write_text("again")
    pack_dataset(config(tmp_path / "all", images=str(folder), **settings))
    some = drawings(tmp_path / "S", 20)
    (some / "000.png").rename(some / "other.png")
    (some / "000.txt").rename(some / "other.txt")
    pack_dataset(config(tmp_path / "some", images=str(some), **settings))
    of_all, of_some = sides(tmp_path / "all", samples), sides(tmp_path / "some", samples)
    assert all(len(split) == 1 for split in of_all.values()) and len(of_all) == 40
    assert all(of_all[image] == split for image, split in of_some.items()) and len(of_some) == 20
    assert 4 <= sum(split == {"val"} for split in of_all.values()) <= 20


def test_folders_decide_the_split(
    tmp_path: Path, drawings: Drawings, config: Config, samples: Samples, skipped: Skipped
) -> None:
    drawings(tmp_path / "D" / "train", 2)
    val = drawings(tmp_path / "D" / "val", 3)  # two of which are those of train
    pack_dataset(config(tmp_path / "out", images=str(val.parent), val_share=0.9))
    assert [s["source"] for s in samples(tmp_path / "out" / "train")] == [
        "train/000.png",
        "train/001.png",
    ]
    assert [s["source"] for s in samples(tmp_path / "out" / "val")] == ["val/002.png"]
    assert [reason for _, reason in skipped(tmp_path / "out")] == ["duplicate"] * 2


def test_shards_are_bounded(
    tmp_path: Path, drawings: Drawings, config: Config, samples: Samples, picture: Picture
) -> None:
    folder = drawings(tmp_path / "D", 12)
    (folder / "005.png").write_bytes(picture(5, (300, 200)))
    out, bound = tmp_path / "out", 20_480
    pack_dataset(config(out, images=str(folder), shard_bytes=bound))
    packed = samples(out / "train")
    large = packed[5]["shard"]
    assert len(packed) == 12 and [s["key"] for s in packed if s["shard"] == large] == ["000000005"]
    for path in (out / "train").glob("*.tar"):
        assert (path.stat().st_size > bound) == (path.name == large)
    shards = [sample["shard"] for sample in packed]
    assert shards == sorted(shards) and max(map(shards.count, shards)) > 2


def test_settings_reach_the_encoder(
    tmp_path: Path, drawings: Drawings, config: Config, samples: Samples, picture: Picture
) -> None:
    folder = drawings(tmp_path / "D", 2)
    (folder / "001.png").write_bytes(picture(1, (50, 40), "JPEG"))
    settings = {"resize": 20, "quality": 30, "min_size": 18, "images": str(folder)}
    pack_dataset(config(tmp_path / "out", **settings))
    (sample,) = samples(tmp_path / "out" / "train")
    assert (sample["width"], sample["height"], sample["extension"]) == (25, 20, "jpg")
    tables = Image.open(io.BytesIO(sample["image"])).quantization  # type: ignore[attr-defined]
    assert tables[0][0] > 20  # of quality 30; quality 95 has 2


def test_the_loader_reads_what_was_packed(
    tmp_path: Path, drawings: Drawings, config: Config
) -> None:
    folder = drawings(tmp_path / "D", 8)
    pack_dataset(config(tmp_path / "out", images=str(folder), samples_per_shard=3))
    cfg = DataConfig(data_dir=[str(tmp_path / "out" / "train")], num_workers=0)
    dataset = open_data(cfg, split="train", image_size=16, with_text=True, seed=0)
    assert len(dataset) == 8 and not dataset.bad
    assert sorted(dataset.captions())[:2] == ["picture 0", "picture 1"]
    tokenizer = Tokenizer.train(dataset.captions(), 300)
    batch = next(train_batches(dataset, tokenizer=tokenizer, text_length=16, batch_size=8))
    assert batch.valid.all() and sorted(batch.keys) == [f"{number:09d}" for number in range(8)]


def test_webdataset_reads_what_was_packed(
    tmp_path: Path, drawings: Drawings, config: Config
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import webdataset

    folder = drawings(tmp_path / "D", 4)
    pack_dataset(config(tmp_path / "out", images=str(folder), samples_per_shard=3))
    shards = [str(path) for path in sorted((tmp_path / "out" / "train").glob("*.tar"))]
    read = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [row["__key__"] for row in read] == [f"{number:09d}" for number in range(4)]
    assert read[2]["png"] == (folder / "002.png").read_bytes()
    assert json.loads(read[2]["json"])["caption"] == read[2]["txt"].decode() == "picture 2"


def test_parquet_goes_in_as_pictures_do(
    tmp_path: Path, config: Config, samples: Samples, picture: Picture
) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {"image": [picture(0), picture(1)], "text": ["a", "b"], "stars": [3, 4]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    pack_dataset(config(tmp_path / "out", parquet=[str(tmp_path / "t.parquet")]))
    packed = samples(tmp_path / "out" / "train")
    assert [s["image"] for s in packed] == [picture(0), picture(1)]
    assert packed[1]["source"] == "t.parquet:1" and packed[1]["extra"] == {"stars": 4}
    content = json.loads((tmp_path / "out" / "train" / "dataset.json").read_text())
    assert set(content["versions"]) == {"pillow", "pyarrow"}


@pytest.fixture
def mixed(tmp_path: Path, drawings: Drawings) -> dict[str, Any]:
    """Settings that pack 30 pictures, of which one is broken and one there twice."""
    folder = drawings(tmp_path / "D", 30)
    (folder / "007.png").write_bytes(b"broken")
    (folder / "009.png").write_bytes((folder / "003.png").read_bytes())
    return {"images": str(folder), "val_share": 0.2, "samples_per_shard": 8, "resize": 12}


def test_a_worker_packs_the_same_bytes(
    tmp_path: Path, mixed: dict[str, Any], config: Config, hashes: Hashes
) -> None:
    for workers in (0, 1):
        pack_dataset(config(tmp_path / f"by {workers}", **mixed, num_workers=workers))
    assert hashes(tmp_path / "by 0") == hashes(tmp_path / "by 1")


def test_the_command_packs_the_same_bytes_and_refuses(
    tmp_path: Path, mixed: dict[str, Any], config: Config, hashes: Hashes
) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    pack_dataset(config(alone, **mixed))

    def command(*more: str) -> subprocess.Popen[str]:
        script = [sys.executable, str(ROOT / "scripts" / "pack_dataset.py")]
        flags = [f"--{name}={value}" for name, value in mixed.items()]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        pipe = subprocess.PIPE
        words = [*script, *flags, *more]
        return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment)

    packing = command("--out_dir", str(out), "--num_workers", "2")
    refusing = command("--out_dir", str(alone), "--resize", "13")
    printed, error = packing.communicate(timeout=120)
    assert packing.returncode == 0, error
    assert "skipped 2 (1 duplicate, 1 not an image)" in printed and printed.count("\n") == 1
    assert hashes(out) == hashes(alone)
    printed, error = refusing.communicate(timeout=120)
    assert refusing.returncode == 2 and printed == ""
    assert error == (
        f"error: --out_dir {alone} holds a data set of another command (resize 12 -> 13): "
        "name another folder, or remove this one\n"
    )
