"""The index says where members lie; webdataset's own reader is the oracle."""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
import threading
from pathlib import Path

import pytest

from diff_dalle.data import shard_index
from diff_dalle.data.shard_index import ShardIndex, Span, Summary, ensure_index
from diff_dalle.data.shards import ShardFile
from diff_dalle.errors import UsageError


def index_of(path: Path) -> tuple[ShardIndex, Summary]:
    place, summary = ensure_index(ShardFile(path=str(path), name=path.name))
    return ShardIndex(place, summary), summary


def read(path: Path, span: Span | None) -> bytes | None:
    if span is None:
        return None
    data = path.read_bytes()[span.offset : span.offset + span.size]
    assert len(data) == span.size
    return data


def contents(path: Path) -> list[tuple[str, bytes | None, bytes | None, bytes | None]]:
    index, _ = index_of(path)
    return [
        (entry.key, read(path, entry.image), read(path, entry.text), read(path, entry.json))
        for entry in (index[row] for row in range(len(index)))
    ]


def test_members_are_grouped_as_webdataset_groups_them(tmp_path: Path, pack) -> None:
    import webdataset

    members = [
        ("0.jpg", b"image 0"),
        ("0.txt", b"text 0"),
        ("0.json", b"{}"),
        ("folder.v1/0.jpg", b"image in a folder"),
        ("folder.v1/0.seg.png", b"a mask, not the image"),
        ("folder.v1/0.txt", b"text in a folder"),
        ("./0.PNG", b"upper case"),
        ("./0.cls", b"3"),
        ("ünï çødé " + "x" * 150 + ".webp", b"long and not ASCII"),
        ("last.jpeg", b""),
    ]
    path = pack(tmp_path / "0.tar", members)
    expected = []
    pipeline = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    for sample in pipeline:
        (image,) = [sample[e] for e in ("jpg", "jpeg", "png", "webp") if e in sample]
        expected.append((sample["__key__"], image, sample.get("txt"), sample.get("json")))
    assert contents(path) == expected
    assert len(expected) == 5


def test_what_is_no_sample_is_left_out(tmp_path: Path, pack) -> None:
    members = [
        ("only_text.txt", b"failed download"),
        (".hidden.jpg", b"x"),
        ("a/._mac.jpg", b"x"),
        ("no_extension", b"x"),
        ("evil.pickle", b"cos\nsystem\n"),
        ("good.jpg", b"image"),
        ("good.pyd", b"cos\nsystem\n"),
    ]
    path = pack(tmp_path / "0.tar", members)
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"special{ord(kind)}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert contents(path) == [("good", b"image", None, None)]


def test_scattered_members_meet_and_repeated_keys_are_marked(tmp_path: Path, pack) -> None:
    members = [
        ("a.txt", b"text a"),
        ("b.jpg", b"image b"),
        ("a.jpg", b"image a"),
        ("b.png", b"second format of b"),
        ("b.jpg", b"b again"),
        ("b.txt", b"text after the repetition"),
        ("b.jpg", b"b once more"),
    ]
    path = pack(tmp_path / "0.tar", members)
    index, summary = index_of(path)
    got = [(index[row].key, index[row].duplicate) for row in range(len(index))]
    assert got == [("a", False), ("b", False), ("b", True), ("b", True)]
    assert contents(path)[0] == ("a", b"image a", b"text a", None)
    assert contents(path)[1][1] == b"image b"
    assert summary.samples == 4


def test_a_cut_shard_keeps_its_complete_members(tmp_path: Path, pack) -> None:
    members = [(f"{n}.{kind}", bytes([n]) * 700) for n in range(5) for kind in ("jpg", "txt")]
    whole = pack(tmp_path / "whole.tar", members).read_bytes()
    assert index_of(tmp_path / "whole.tar")[1].fault == ""
    for length in range(512, len(whole), 256):
        path = tmp_path / f"{length}.tar"
        path.write_bytes(whole[:length])
        index, summary = index_of(path)
        # A member is a header of 512 bytes and 700 bytes of data, padded to 1024.
        complete = (max(length - 512, 0) - 700) // 1536 + 1 if length >= 1212 else 0
        complete = min(complete, 10)
        assert len(index) == (complete + 1) // 2, length
        finished = length >= 10 * 1536 + 512
        assert summary.fault == ("" if finished else "truncated shard"), length
        for row, (key, image, text, _) in enumerate(contents(path)):
            assert (key, image) == (str(row), bytes([row]) * 700)
            assert text == (image if 2 * row + 1 < complete else None)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "empty file"),
        (b"<html>404</html>" * 100, "not a tar file"),
        (b"\0" * 10240, ""),
    ],
)
def test_a_file_without_samples_says_why(tmp_path: Path, data: bytes, fault: str) -> None:
    (tmp_path / "0.tar").write_bytes(data)
    index, summary = index_of(tmp_path / "0.tar")
    assert (len(index), summary.fault) == (0, fault)


def test_rubbish_between_members_is_a_fault(tmp_path: Path, pack) -> None:
    path = pack(tmp_path / "0.tar", [("a.jpg", b"x"), ("b.jpg", b"x")])
    data = bytearray(path.read_bytes())
    data[1024:1536] = b"rubbish!" * 64
    path.write_bytes(data)
    index, summary = index_of(path)
    assert (len(index), summary.fault) == (1, "broken shard")


def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    original = shard_index._scan

    def counted(path, stat):
        calls.append(path)
        return original(path, stat)

    monkeypatch.setattr(shard_index, "_scan", counted)
    return calls


def test_an_index_is_built_once_and_anew_when_the_shard_changes(
    tmp_path: Path, pack, monkeypatch
) -> None:
    calls = scans(monkeypatch)
    path = pack(tmp_path / "0.tar", [("a.jpg", b"first")])
    assert contents(path) == contents(path) == [("a", b"first", None, None)]
    assert len(calls) == 1
    pack(path, [("b.jpg", b"2nd!!")])  # the same size
    os.utime(path, ns=(1, 1))
    assert contents(path) == [("b", b"2nd!!", None, None)]
    assert len(calls) == 2
    assert [name.name for name in tmp_path.iterdir() if name.name.startswith(".")] == []


def test_a_damaged_index_is_built_anew(tmp_path: Path, pack, monkeypatch) -> None:
    calls = scans(monkeypatch)
    path = pack(tmp_path / "0.tar", [("a.jpg", b"image"), ("b.jpg", b"image")])
    good = contents(path)
    place = tmp_path / "0.tar.index"
    whole = place.read_bytes()
    damaged = [b"", b"\xff" * 100, b"[]\n", whole[:-1], whole + b"x", whole[:40], b"null\n"]
    damaged += [whole.replace(b'"format": 1', b'"format": 0')]
    for number, data in enumerate(damaged, start=2):
        place.write_bytes(data)
        assert contents(path) == good
        assert len(calls) == number
    assert place.read_bytes() == whole


def test_a_folder_that_cannot_be_written_uses_the_cache(tmp_path: Path, pack, monkeypatch) -> None:
    path = pack(tmp_path / "data/0.tar", [("a.jpg", b"image")])
    (tmp_path / "data/0.tar.index").mkdir()  # in the way, as a read-only folder would be
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = scans(monkeypatch)
    assert contents(path) == contents(path) == [("a", b"image", None, None)]
    assert len(calls) == 1
    assert len(list((tmp_path / "cache/diff_dalle/shards").iterdir())) == 1


def test_a_user_without_a_home_indexes_beside_the_shard(tmp_path: Path, pack, monkeypatch) -> None:
    path = pack(tmp_path / "0.tar", [("a.jpg", b"image")])

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert contents(path) == [("a", b"image", None, None)]
    (tmp_path / "0.tar.index").unlink()
    (tmp_path / "0.tar.index").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    assert contents(path) == [("a", b"image", None, None)]
    assert len(list((tmp_path / "scratch").glob("*/*.index"))) == 1


def test_an_index_that_also_counts_texts_is_still_good(tmp_path: Path, pack, monkeypatch) -> None:
    path = pack(tmp_path / "0.tar", [("a.jpg", b"image")])
    good, calls = contents(path), scans(monkeypatch)
    place = tmp_path / "0.tar.index"
    header, _, rest = place.read_bytes().partition(b"\n")
    header = json.dumps({**json.loads(header), "texts": 0, "jsons": 0}).encode()
    place.write_bytes(header.ljust(63 + 64 * (len(header) // 64)) + b"\n" + rest)
    assert contents(path) == good and not calls


def test_no_place_for_an_index_is_refused(tmp_path: Path, pack, monkeypatch) -> None:
    path = pack(tmp_path / "0.tar", [("a.jpg", b"image")])
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(shard_index, "_places", lambda path: [blocked / "a", blocked / "b"])
    with pytest.raises(UsageError, match="XDG_CACHE_HOME"):
        index_of(path)
    with pytest.raises(UsageError, match="cannot be read"):
        index_of(tmp_path / "gone.tar")


def test_builders_at_the_same_time_agree(tmp_path: Path, pack) -> None:
    path = pack(tmp_path / "0.tar", [(f"{n}.jpg", b"x" * n) for n in range(50)])
    results: list[list] = []
    threads = [threading.Thread(target=lambda: results.append(contents(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(result == results[0] for result in results)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.tar", "0.tar.index"]


def test_a_name_that_is_not_utf8_becomes_a_printable_key(tmp_path: Path) -> None:
    import io

    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo(b"caf\xe9.jpg".decode("utf-8", "surrogateescape"))
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    ((key, *_),) = contents(tmp_path / "0.tar")
    assert key == "caf\\xe9"
