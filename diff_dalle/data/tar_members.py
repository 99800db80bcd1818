"""The members of a tar file, read from its headers alone.

`tarfile` makes an object with all fields of every header, most of the time that indexing takes.
Ordinary headers are read here, one pattern each; whatever else lies in the file is left to
`tarfile`, and so is every judgement on what is wrong with it.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from tarfile import BLOCKSIZE, ENCODING
from typing import BinaryIO, NamedTuple

_HEADER = re.compile(
    rb"""(.{100})                                  # name
    (?:[0-7]{6}[0-7 ][\0 ] | [\x80\xff].{7}){3}    # mode, user, group; large ones are binary
    ([0-7]{11})[\0 ]                               # size
    [0-7]{11}[\0 ]                                 # time
    ([0-7]{6}[0-7]?)\0[ ]?                         # checksum
    ([0x])                                         # kind: a file, or a pax header of the next one
    .{172}                                         # link, magic, names of user and group
    (?:\0{8} | [0-7]{6}[0-7 ][\0 ]){2}             # device
    (.{155}) .{12}                                 # prefix of the name
    """,
    re.DOTALL | re.VERBOSE,
)
_CHECKSUM = slice(148, 156)  # counts as blanks in the checksum
# What Python and GNU tar put into the pax header of a file with an ordinary name.
_TIME = re.compile(rb"(\d+) [acm]time=\d+(?:\.\d+)?\n")


class Member(NamedTuple):
    """An ordinary file: its name as `tarfile` decodes it, and where its bytes lie."""

    name: str
    offset: int
    size: int


def read_members(file: BinaryIO, size: int, faults: list[str]) -> Iterator[Member]:
    """The complete ordinary files of a tar, in order; links, folders and sparse files are not.

    Args:
        file: open for reading at its start; its place moves.
        size: bytes of the file.
        faults: takes what is wrong with the tar, once it is met: "empty file", "not a tar file",
            "truncated shard" or "broken shard".
    """
    try:
        yield from _members(file, size, faults)
    except (OverflowError, ValueError):  # sizes beyond any file, text that is none
        faults.append("broken shard")


def _members(file: BinaryIO, size: int, faults: list[str]) -> Iterator[Member]:
    try:
        archive = tarfile.open(fileobj=file, mode="r:")
    except tarfile.ReadError:
        faults.append("not a tar file" if size else "empty file")
        return
    with archive:
        while True:
            try:
                found = archive.next()
            except tarfile.ReadError:
                faults.append("truncated shard")
                return
            if found is None:
                _check_end(archive, faults)
                return
            archive.members = []  # type: ignore[attr-defined]  # or it keeps all that it met
            if found.offset_data + found.size > size:
                faults.append("truncated shard")
                return
            if found.isreg() and not found.issparse():
                yield Member(found.name, found.offset_data, found.size)
            if archive.pax_headers:  # hold for all members from here on
                continue
            for member in _ordinary_members(file, archive.offset, size):
                archive.offset = member.offset + _padded(member.size)
                yield member


def _ordinary_members(file: BinaryIO, at: int, size: int) -> Iterator[Member]:
    """The members from ``at`` up to one that is incomplete or in any way unusual."""
    while True:
        file.seek(at)
        header = file.read(BLOCKSIZE)
        match = _HEADER.fullmatch(header)
        if match is None:
            return
        name, digits, checksum, kind, prefix = match.groups()
        if int(checksum, 8) != _sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" "):
            return
        length = int(digits, 8)
        at += BLOCKSIZE
        if kind == b"x":
            if length > BLOCKSIZE or not _holds_only_times(file.read(BLOCKSIZE)):
                return
        elif at + length > size:
            return
        else:
            name = name.partition(b"\0")[0]
            if prefix[0]:
                name = prefix.partition(b"\0")[0] + b"/" + name
            yield Member(name.decode(ENCODING, "surrogateescape"), at, length)
        at += _padded(length)


def _sum(header: bytes) -> int:
    return sum(header.translate(None, b"\0"))  # most of a header is zeros


def _holds_only_times(block: bytes) -> bool:
    """Whether a pax header changes nothing about its member that is read here."""
    at = 0
    while match := _TIME.match(block, at):
        if int(match[1]) != match.end() - at:
            return False
        at = match.end()
    return not block[at:].strip(b"\0")


def _padded(length: int) -> int:
    return -(-length // BLOCKSIZE) * BLOCKSIZE


def _check_end(archive: tarfile.TarFile, faults: list[str]) -> None:
    """A writer that finished left a block of zeros; the library stops at anything else too."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(BLOCKSIZE)
    if len(block) < BLOCKSIZE:
        faults.append("truncated shard")
    elif block.strip(b"\0"):
        faults.append("broken shard")
