"""The members of a tar: `tarfile` alone is the oracle, for whole, odd and damaged files."""

from __future__ import annotations

import io
import random
import struct
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

import pytest

from diff_dalle.data.tar_members import Member, read_members

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NAMES = (
    "a.jpg",
    "folder/b.txt",
    "한글.json",
    b"caf\xe9.png".decode("utf-8", "surrogateescape"),
    "",
)
KINDS = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.AREGTYPE)

Reader = Callable[[BinaryIO, int, list[str]], Iterator[Member]]


def plain(file: BinaryIO, size: int, faults: list[str]) -> Iterator[Member]:
    """What `read_members` should find, by `tarfile` alone."""
    try:
        archive = tarfile.open(fileobj=file, mode="r:")
    except tarfile.ReadError:
        faults.append("not a tar file" if size else "empty file")
        return
    except (OverflowError, ValueError):
        faults.append("broken shard")
        return
    try:
        while (found := archive.next()) is not None:
            if found.offset_data + found.size > size:
                raise tarfile.ReadError("cut")
            if found.isreg() and not found.issparse():
                yield Member(found.name, found.offset_data, found.size)
        file.seek(archive.offset)
    except tarfile.ReadError:
        faults.append("truncated shard")
        return
    except (OverflowError, ValueError):  # a header of which the library makes no sense
        faults.append("broken shard")
        return
    block = file.read(512)
    if block.count(0) < 512:
        faults.append("truncated shard" if len(block) < 512 else "broken shard")


def outcome(reader: Reader, data: bytes) -> tuple[list[Member], list[str]]:
    faults: list[str] = []
    return list(reader(io.BytesIO(data), len(data), faults)), faults


def random_tar(rng: random.Random) -> bytes:
    """A few members of all kinds, mostly ordinary files, in one of the three formats."""
    file, form = io.BytesIO(), rng.choice(FORMATS)
    shared = {"path": "of all.jpg"} if form == tarfile.PAX_FORMAT and rng.random() < 0.1 else {}
    with tarfile.open(fileobj=file, mode="w", format=form, pax_headers=shared) as archive:
        for number in range(rng.randrange(8)):
            name = f"{number:09d}.jpg" if rng.random() < 0.5 else rng.choice(NAMES)
            entry = tarfile.TarInfo(rng.choice(("", "d" * 90 + "/", "d" * 200 + "/")) + name)
            if rng.random() < 0.2:
                entry.type = rng.choice(KINDS)
                entry.linkname = "e" * rng.choice((5, 150))
            if entry.isreg():
                entry.size = rng.choice((0, 1, 511, 512, 513, 2000))
            if form != tarfile.USTAR_FORMAT:
                entry.mtime = rng.choice((0, 1.5e9, 1.5e9 + 0.25))
                entry.uid = rng.choice((0, 1000, 2**24))
                entry.pax_headers = rng.choice(({}, {}, {"size": "7"}, {"path": "12"}))
            try:
                archive.addfile(entry, io.BytesIO(rng.randbytes(entry.size)))
            except ValueError:  # a name too long for ustar
                continue
    return file.getvalue()


def sealed(header: bytes, form: bytes = b"%06o\0 ") -> bytes:
    """A header with its checksum."""
    total = sum(header[:148]) + sum(header[156:]) + 8 * 32
    return header[:148] + form % total + header[156:]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The same with a byte changed in or after a header, whose checksum is mostly mended."""
    starts = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    if not starts:
        return data[: rng.randrange(len(data) + 1)]
    at, changed = rng.choice(starts), bytearray(data)
    numbers, device = range(100, 157), range(329, 345)
    field = rng.choice((range(512), numbers, device, range(512, 560)))
    changed[at + rng.choice(field)] = rng.choice(b"\0 017_x5gLS8\x80\xff/")
    if rng.random() < 0.8:
        form = rng.choice((b"%06o\0 ", b"%07o\0", b"%06o \0"))
        changed[at : at + 512] = sealed(bytes(changed[at : at + 512]), form)
    return bytes(changed[: rng.choice((len(data), len(data), rng.randrange(len(data) + 1)))])


@pytest.mark.parametrize("seed", range(4))
def test_members_and_faults_are_those_of_the_library(seed: int) -> None:
    rng = random.Random(seed)
    met = set()
    for _ in range(150):
        data = random_tar(rng)
        for one in (data, *(damaged(data, rng) for _ in range(4))):
            found = outcome(read_members, one)
            assert found == outcome(plain, one)
            met.update(found[1])
    assert met >= {"truncated shard", "broken shard", "not a tar file"}


@pytest.mark.parametrize(
    "records",
    [
        b"13 mtime=1.5\n" + b"26 atime=1500000000.123456\n",
        b"14 path=b.jpg\n",
        b"13 mtime=1.5\n" + b"14 path=b.jpg\n",
        b"0 mtime=1.5\n",  # a length that the library refuses
        b"32 mtime=1500000000.12345678901\n" * 16 + b"14 path=b.jpg\n",  # in a second block
        b"",
    ],
)
def test_a_pax_header_counts_unless_it_holds_only_times(records: bytes) -> None:
    whole = shard(3, tarfile.USTAR_FORMAT)
    entry = tarfile.TarInfo("header")
    entry.type, entry.size = tarfile.XHDTYPE, len(records)
    extra = entry.tobuf(tarfile.USTAR_FORMAT) + records + b"\0" * (-len(records) % 512)
    data = whole[:1024] + extra + whole[1024:]
    found = outcome(read_members, data)
    assert found == outcome(plain, data)
    assert any(member.name == "b.jpg" for member in found[0]) == (b"path" in records)


def shard(count: int, form: int, folder: str = "", **facts: float) -> bytes:
    """Files of 100 bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for number in range(count):
            entry = tarfile.TarInfo(f"{folder}{number:09d}.jpg")
            entry.size = 100
            for name, value in facts.items():
                setattr(entry, name, value)
            archive.addfile(entry, io.BytesIO(b"x" * 100))
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        shard(50, tarfile.USTAR_FORMAT, "d" * 90 + "/"),  # a name that needs the prefix
        shard(50, tarfile.GNU_FORMAT, uid=2**24),
        shard(50, tarfile.PAX_FORMAT, mtime=1.5e9 + 0.25),  # webdataset's and img2dataset's
        b"".join(
            sealed(block, b"%07o\0") if block[257:262] == b"ustar" else block  # Rust's
            for (block,) in struct.iter_unpack("512s", shard(50, tarfile.USTAR_FORMAT))
        ),
    ],
    ids=["ustar", "gnu", "pax", "seven digits"],
)
def test_the_library_reads_no_ordinary_member_but_the_first(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outcome(plain, data)
    calls = []
    original = tarfile.TarFile.next
    monkeypatch.setattr(
        tarfile.TarFile, "next", lambda archive: calls.append(1) or original(archive)
    )
    assert outcome(read_members, data) == expected
    assert len(expected[0]) == 50
    assert len(calls) == 3  # as it opens, the first member, the end
