"""Samples by number: what is read, what is refused, what identifies a dataset."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest

from diff_dalle.data import dataset as dataset_module
from diff_dalle.data import shard_reader
from diff_dalle.data.batch import BadSample
from diff_dalle.data.dataset import DataConfig, Dataset
from diff_dalle.data.shard_index import ensure_index
from diff_dalle.data.shard_reader import Shard
from diff_dalle.data.shards import find_shards
from diff_dalle.errors import UsageError


def open_folder(*folders: Path, limit: int = 0, **options: object) -> Dataset:
    files = find_shards([str(folder) for folder in folders])
    shards = [Shard(file, *ensure_index(file)) for file in files]
    return Dataset(shards, DataConfig(**options), image_size=16, seed=0, limit=limit)


def keys_of(dataset: Dataset) -> list[str]:
    return [dataset.entry(sample)[1].key for sample in range(len(dataset))]


def test_samples_are_found_by_number(tmp_path: Path, pack_many, picture) -> None:
    keys = pack_many(tmp_path, [3, 1, 5])
    dataset = open_folder(tmp_path)
    assert len(dataset) == 9 and keys_of(dataset) == keys
    for sample in (8, 0, 3, 4, 2):
        shard, entry = dataset.entry(sample)
        raw = dataset.read(sample)
        assert shard.name == f"{keys[sample][:5]}.tar" and entry.key == keys[sample]
        assert raw.image == picture(sample)
        assert raw.text == f"sample {keys[sample]}".encode()
        assert raw.json is not None and json.loads(raw.json)["caption"] == raw.text.decode()
        captionless = dataset.read(sample, image=False)
        assert (captionless.image, captionless.text) == (b"", raw.text)


def test_members_far_apart_are_read_one_by_one(tmp_path: Path, pack) -> None:
    pack(
        tmp_path / "0.tar",
        [("a.txt", b"text a"), ("pad.bin", bytes(100_000)), ("a.jpg", b"image a"), ("b.jpg", b"")],
    )
    dataset = open_folder(tmp_path)
    assert dataset.read(0) == (b"image a", b"text a", None)
    assert dataset.read(0, image=False) == (b"", b"text a", None)
    assert dataset.read(1) == (b"", None, None)


def test_a_limit_keeps_the_first_samples(tmp_path: Path, pack_many) -> None:
    keys = pack_many(tmp_path, [3, 4, 5])
    dataset = open_folder(tmp_path, limit=5)
    assert len(dataset) == 5 and keys_of(dataset) == keys[:5]


def test_captions_come_in_order_and_all_of_them(tmp_path: Path, pack, pack_many) -> None:
    keys = pack_many(tmp_path / "a", [2])
    pack(tmp_path / "b/0.tar", [("x.jpg", b""), ("y.jpg", b""), ("y.txt", b"why")])
    dataset = open_folder(tmp_path / "a", tmp_path / "b")
    expected = [f"{text}" for key in keys for text in (f"sample {key}", f"{key} again")]
    got = list(dataset.captions())
    assert [text for text in got if "세" not in text] == [*expected, "why"]
    assert len(got) == 7 and list(dataset.captions(limit=99)) == got
    firsts = [(key, f"sample {key}") for key in keys] + [("y", "why")]
    assert list(dataset.first_captions()) == firsts


def test_a_limit_of_captions_is_spread_over_the_dataset(tmp_path: Path, pack_many) -> None:
    keys = pack_many(tmp_path, [20, 20])  # three captions each
    dataset = open_folder(tmp_path)
    for limit in (1, 2, 3, 10, 30, 50, 119, 120):
        got = list(dataset.captions(limit))
        assert limit - 3 < len(got) <= limit, limit
        first = sum(re.search("[0-9]{9}", text)[0] in keys[:20] for text in got)
        assert abs(first - limit / 2) <= 3, limit
    assert [text for text in dataset.captions(12) if text.startswith("sample")] == [
        f"sample {keys[number]}" for number in (0, 10, 20, 30)
    ]


def test_a_visit_is_a_square_and_captions_or_a_reason(tmp_path: Path, pack, picture) -> None:
    whole = picture(0)
    pack(tmp_path / "0.tar", [("a.png", whole), ("b.png", whole[:-300]), ("b.txt", b"words")])
    dataset = open_folder(tmp_path)
    square, captions = dataset.visit(0, with_text=False)
    assert square.shape == (3, 16, 16) and captions is None
    flipped, _ = dataset.visit(0, with_text=False, flip=True)
    assert (flipped == square[:, :, ::-1]).all()
    with pytest.raises(BadSample, match="no caption"):
        dataset.visit(0, with_text=True)
    with pytest.raises(BadSample, match="truncated"):
        dataset.visit(1, with_text=True)


def test_a_shard_that_changes_or_goes_makes_bad_samples(tmp_path: Path, pack_many) -> None:
    pack_many(tmp_path, [2, 2])
    dataset = open_folder(tmp_path)
    os.utime(tmp_path / "00000.tar", ns=(1, 1))
    (tmp_path / "00001.tar").unlink()
    for sample, reason in ((0, "shard changed"), (2, "unreadable")):
        with pytest.raises(BadSample, match=reason):
            dataset.read(sample)


def test_repeated_keys_and_giants_are_bad(tmp_path: Path, pack, monkeypatch) -> None:
    members = [
        ("a.jpg", b"1"),
        ("a.jpg", b"2"),
        ("b.jpg", b"12345"),
        ("c.jpg", b""),
        ("c.txt", b"12345"),
    ]
    pack(tmp_path / "0.tar", members)
    monkeypatch.setattr(dataset_module, "LARGEST_FILE", 4)
    dataset = open_folder(tmp_path)
    assert dataset.read(0).image == b"1"
    for sample, reason in ((1, "duplicate key"), (2, "file too large"), (3, "file too large")):
        with pytest.raises(BadSample, match=reason):
            dataset.read(sample)


def test_few_files_are_open_at_once(tmp_path: Path, pack_many, monkeypatch) -> None:
    pack_many(tmp_path, [1] * 12)
    monkeypatch.setattr(shard_reader, "_OPEN_FILES", 3)
    dataset = open_folder(tmp_path)
    for sample in list(range(12)) * 2:
        dataset.read(sample)
        links = [file for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
        ours = [link for link in map(os.readlink, links) if link.startswith(str(tmp_path))]
        assert 0 < len(ours) <= 3


def test_what_was_used_last_stays_open(tmp_path: Path, pack_many, monkeypatch) -> None:
    pack_many(tmp_path, [2] * 5)
    opened: list[str] = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda *given: opened.append(given[0]) or original(*given))
    monkeypatch.setattr(shard_reader, "_OPEN_FILES", 2)
    monkeypatch.setattr(shard_reader, "_INDEXED_SAMPLES", 4)
    indexed: list[str] = []
    open_index = shard_reader.open_index
    monkeypatch.setattr(
        shard_reader,
        "open_index",
        lambda *given: indexed.append(given[0].name) or open_index(*given),
    )
    dataset = open_folder(tmp_path)
    opened.clear()
    for shard in (0, 1, 0, 2, 0, 3, 0):
        dataset.read(2 * shard)
    names = [f"{shard:05d}.tar" for shard in (0, 1, 2, 3)]
    assert [Path(path).name for path in opened] == indexed == names


def test_many_small_shards_are_indexed_once(tmp_path: Path, pack, monkeypatch) -> None:
    for number in range(300):
        pack(tmp_path / f"{number:03d}.tar", [("a.jpg", b"")])
    calls: list[str] = []
    open_index = shard_reader.open_index
    monkeypatch.setattr(
        shard_reader, "open_index", lambda *given: calls.append("") or open_index(*given)
    )
    dataset = open_folder(tmp_path)
    for sample in list(range(300)) * 2:
        dataset.entry(sample)
    assert len(calls) == 300


def test_a_lost_index_is_built_again(tmp_path: Path, pack_many) -> None:
    keys = pack_many(tmp_path, [2])
    dataset = open_folder(tmp_path)
    (tmp_path / "00000.tar.index").unlink()
    assert dataset.entry(1)[1].key == keys[1] and dataset.read(1).text is not None
    assert (tmp_path / "00000.tar.index").exists()


def test_the_index_of_a_shard_that_changed_is_not_read(tmp_path: Path, pack_many) -> None:
    pack_many(tmp_path / "d", [3])
    dataset = open_folder(tmp_path / "d")
    pack_many(tmp_path / "d", [2])
    open_folder(tmp_path / "d")  # as another process would: there is a new index now
    for look in (dataset.entry, dataset.read):
        with pytest.raises(BadSample, match="shard changed"):
            look(0)
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(BadSample, match="unreadable"):
        dataset.entry(0)
    assert dataset.shard_of(0).name == "00000.tar"


def test_captions_are_read_without_the_picture(tmp_path: Path, pack, monkeypatch) -> None:
    pack(tmp_path / "0.tar", [("a.jpg", bytes(100_000)), ("a.txt", b"text"), ("a.json", b"{}")])
    pack(tmp_path / "1.tar", [("a.jpg", bytes(9))])
    dataset, reads = open_folder(tmp_path), []
    original = os.pread
    monkeypatch.setattr(os, "pread", lambda *given: reads.append(given[1]) or original(*given))
    assert dataset.read(0, image=False) == (b"", b"text", b"{}")
    assert dataset.read(1, image=False) == (b"", None, None)
    assert len(reads) == 1 and reads[0] < 2000


def test_open_files_stay_behind_when_a_dataset_travels(tmp_path: Path, pack_many) -> None:
    pack_many(tmp_path, [2])
    dataset = open_folder(tmp_path)
    first = dataset.read(1)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.read(1) == first and copy.fingerprint == dataset.fingerprint


def test_the_fingerprint_is_of_contents_not_of_places(tmp_path: Path, pack_many) -> None:
    pack_many(tmp_path / "a", [2, 3])
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere/b")
    os.utime(tmp_path / "elsewhere/b/00000.tar", ns=(5, 5))
    original = open_folder(tmp_path / "a").fingerprint
    assert open_folder(tmp_path / "elsewhere/b").fingerprint == original
    assert len(original) == 64
    (tmp_path / "a/00001.tar").rename(tmp_path / "a/00002.tar")
    assert open_folder(tmp_path / "a").fingerprint != original


def test_the_fingerprint_knows_the_order(tmp_path: Path, pack, monkeypatch) -> None:
    pack(tmp_path / "0.tar", [("a.jpg", b"image")])
    dataset = open_folder(tmp_path)
    # Runs of version 1 go on: do not touch the number.
    known = hashlib.sha256(b'[["0.tar", 10240, 1]]').hexdigest()
    seen = {known, dataset.fingerprint}
    assert len(seen) == 1
    monkeypatch.setattr(dataset_module, "ORDER_VERSION", 2)
    seen.add(dataset.fingerprint)
    monkeypatch.setattr(dataset_module, "BLOCK_SAMPLES", 2**15)
    seen.add(dataset.fingerprint)
    assert len(seen) == 3


def test_the_tokenizer_beside_or_above(tmp_path: Path, pack_many) -> None:
    pack_many(tmp_path / "d/train", [1])
    pack_many(tmp_path / "e", [1])
    both = open_folder(tmp_path / "d/train", tmp_path / "e")
    assert both.tokenizer_path is None
    (tmp_path / "d/tokenizer.json").write_text("above")
    assert both.tokenizer_path == str(tmp_path / "d/tokenizer.json")
    (tmp_path / "d/train/tokenizer.json").write_text("beside")
    assert both.tokenizer_path == str(tmp_path / "d/train/tokenizer.json")
    (tmp_path / "e/tokenizer.json").write_text("beside")
    assert both.tokenizer_path == str(tmp_path / "d/train/tokenizer.json")
    (tmp_path / "e/tokenizer.json").write_text("another")
    with pytest.raises(UsageError, match="--tokenizer"):
        _ = both.tokenizer_path


def test_faulty_shards_are_listed(tmp_path: Path, pack_many) -> None:
    pack_many(tmp_path, [2])
    (tmp_path / "1.tar").write_bytes(b"")
    assert open_folder(tmp_path).bad == [(str(tmp_path / "1.tar"), "", "empty file")]


@pytest.mark.parametrize(
    "options", [{"num_workers": -1}, {"max_train_samples": -1}, {"caption_key": ""}]
)
def test_wrong_values_are_named(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(options))}"):
        DataConfig(**options)
