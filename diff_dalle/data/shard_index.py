"""Where the members of a tar shard lie: read once, kept in a small file.

A sample is one image member and, optionally, a ``.txt`` and a ``.json`` of the same key. A key
ends at the first dot of the file name and keeps its folder, as webdataset has it. Members of
other kinds are never read. A shard that was cut short keeps its complete members.

An index file holds one line of JSON (padded to `_ALIGNMENT`), the table of samples, and the
bytes of all keys. It lies beside the shard or, where that folder cannot be written, in the
user's cache folder, else in the temporary folder; it is built anew when the shard's size or time
of change differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import compress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diff_dalle.data import remote
from diff_dalle.data.batch import BadSample
from diff_dalle.data.images import IMAGE_EXTENSIONS
from diff_dalle.data.remote import FileStat
from diff_dalle.data.shards import ShardFile
from diff_dalle.data.tar_members import read_members
from diff_dalle.errors import UsageError

_FORMAT = 1
_ALIGNMENT = 64
_LARGEST = 2**32 - 1  # what a size field holds; nothing so large is ever read
_PARTS = ("image", "text", "json")
_PART_OF = {**dict.fromkeys(IMAGE_EXTENSIONS, "image"), "txt": "text", "json": "json"}

# Offsets are -1 and sizes 0 where a sample has no such member.
_TABLE = np.dtype(
    [(f"{part}_at", "<i8") for part in _PARTS]
    + [(f"{part}_size", "<u4") for part in _PARTS]
    + [("key_end", "<i8"), ("duplicate", "?")]
)
_KEY_END = 2 * len(_PARTS)  # the column of that name


class Span(NamedTuple):
    """Where the bytes of a member lie in its shard."""

    offset: int
    size: int


class Entry(NamedTuple):
    """One sample of a shard; ``duplicate`` if an earlier one has the same key."""

    key: str
    image: Span
    text: Span | None
    json: Span | None
    duplicate: bool


@dataclass(frozen=True)
class Summary:
    """What the first line of an index file says.

    Attributes:
        size: bytes of the shard.
        mtime_ns: when the shard was last changed; of a remote one, a number for its version.
        samples: keys with an image, duplicates included.
        fault: "" or why the shard may lack samples: "truncated shard", "broken shard", "empty
            file" or "not a tar file".
        key_bytes: length of all keys together.
    """

    size: int
    mtime_ns: int
    samples: int
    fault: str
    key_bytes: int


class ShardIndex:
    """The samples of one shard, in the order of their first members."""

    def __init__(self, path: str | Path, summary: Summary) -> None:
        """Read an index file.

        Raises:
            OSError: it cannot be read.
            ValueError: it does not have that summary.
        """
        with open(path, "rb") as file:
            if _summary_of(file) != summary:
                raise ValueError(f"{path} is not the index that it was")
            # Not mapped: a map holds a descriptor, and there may be many small shards.
            self._table: NDArray[Any] = np.fromfile(file, _TABLE, summary.samples)
            self._keys = file.read()

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> Entry:
        *offsets_and_sizes, end, duplicate = self._table[row].item()
        start = self._table[row - 1].item()[_KEY_END] if row else 0
        image, text, meta = map(Span, offsets_and_sizes[:3], offsets_and_sizes[3:])
        return Entry(
            # A name that is not UTF-8 is shown with escapes.
            key=self._keys[start:end].decode(errors="backslashreplace"),
            image=image,
            text=text if text.offset >= 0 else None,
            json=meta if meta.offset >= 0 else None,
            duplicate=duplicate,
        )


def ensure_index(shard: ShardFile) -> tuple[Path, Summary]:
    """The index file of a shard, built if there is none or the shard has changed.

    Raises:
        UsageError: the shard cannot be read, or no folder can hold the index.
    """
    known = shard.stat()
    return find_index(shard, known) or build_index(shard, known)


def find_index(shard: ShardFile, known: FileStat) -> tuple[Path, Summary] | None:
    """The index file of a shard of a known version, where there is one; kept if it was remote.

    Raises:
        UsageError: no folder can hold the index.
    """
    found = _kept(shard, known)
    if found is None and (beside := _index_beside(shard, known)) is not None:
        found = _keep(shard, *beside)
    return found


def build_index(shard: ShardFile, known: FileStat) -> tuple[Path, Summary]:
    """The index file of a shard that had none; it may have been built meanwhile.

    Raises:
        UsageError: the shard cannot be read, or no folder can hold the index.
    """
    return _kept(shard, known) or _keep(shard, *_read_once(shard, known))


def _kept(shard: ShardFile, known: FileStat) -> tuple[Path, Summary] | None:
    for place in _places(shard.path):
        summary = _read_summary(place)
        if summary and (summary.size, summary.mtime_ns) == known:
            return place, summary
    return None


def _keep(
    shard: ShardFile, summary: Summary, table: NDArray[Any], keys: bytes
) -> tuple[Path, Summary]:
    tried = []
    for place in _places(shard.path):
        try:
            _write(place, summary, table, keys)
        except OSError:  # read-only or full: try the next place
            tried.append(str(place.parent))
            continue
        return place, summary
    raise UsageError(
        f"{shard.path}: its index can be written neither in {' nor in '.join(tried)}: "
        "make one of them writable or set XDG_CACHE_HOME"
    )


def _read_once(shard: ShardFile, known: FileStat) -> tuple[Summary, NDArray[Any], bytes]:
    try:
        with os.fdopen(shard.open(known), "rb") as file:
            return _scan(file, known)
    except OSError as error:
        raise UsageError(f"{shard.path}: cannot be read ({error.strerror})") from error


def _index_beside(shard: ShardFile, known: FileStat) -> tuple[Summary, NDArray[Any], bytes] | None:
    """The index file that lies beside a remote shard; it saves reading the shard for it."""
    if shard.cache is None:
        return None
    url = f"{shard.path}.index"
    with contextlib.suppress(UsageError), tempfile.TemporaryFile() as file:
        remote.download(url, file, remote.stat(url).size)
        file.seek(0)
        summary = _summary_of(file)
        if summary and summary.size == known.size:
            table = np.frombuffer(file.read(summary.samples * _TABLE.itemsize), _TABLE)
            return replace(summary, mtime_ns=known.version), table, file.read()
    return None


def open_index(shard: ShardFile, place: Path, summary: Summary) -> ShardIndex:
    """The index that `ensure_index` found earlier, built again if it is lost or another's.

    Raises:
        BadSample: "unreadable" (the shard is gone) or "shard changed" (since then).
    """
    with contextlib.suppress(OSError, ValueError):
        return ShardIndex(place, summary)
    try:
        place, current = ensure_index(shard)
        if current != summary:
            raise BadSample("shard changed")
        return ShardIndex(place, summary)
    except (UsageError, OSError, ValueError) as error:
        raise BadSample("unreadable") from error


def split_member_name(name: str) -> tuple[str, str] | None:
    """(key, extension) by webdataset's rule; None for hidden or nameless members.

    >>> split_member_name("a.b/0001.seg.png")
    ('a.b/0001', 'seg.png')
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return None
    return folder + slash + stem, extension.lower()


class _Rows:
    """The samples of a shard while it is read; by columns, which are small and soon a table."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._duplicate: list[bool] = []
        self._offsets: dict[str, list[int]] = {part: [] for part in _PARTS}
        self._sizes: dict[str, list[int]] = {part: [] for part in _PARTS}
        self._latest: dict[str, int] = {}  # key -> its row
        self._seen: set[tuple[str, str]] = set()  # (key, extension)

    def add(self, name: tuple[str, str], part: str, offset: int, size: int) -> None:
        """Give a member to its sample; a repeated image begins a further one."""
        key, _ = name
        repeated = name in self._seen
        self._seen.add(name)
        if key not in self._latest or (repeated and part == "image"):
            self._latest[key] = len(self._keys)
            self._keys.append(key)
            self._duplicate.append(repeated)
            for each in _PARTS:
                self._offsets[each].append(-1)
                self._sizes[each].append(0)
        row = self._latest[key]
        # The first of two pictures (say .jpg and .png) of one key is the sample's.
        if self._offsets[part][row] < 0:
            self._offsets[part][row] = offset
            self._sizes[part][row] = min(size, _LARGEST)

    def table(self) -> tuple[NDArray[Any], bytes]:
        """The table of the samples that have an image, and the bytes of their keys."""
        table = np.zeros(len(self._keys), _TABLE)
        for part in _PARTS:
            table[f"{part}_at"] = self._offsets[part]
            table[f"{part}_size"] = self._sizes[part]
        table["duplicate"] = self._duplicate
        has_image = table["image_at"] >= 0
        keys = [key.encode("utf-8", "surrogateescape") for key in compress(self._keys, has_image)]
        table = table[has_image]
        table["key_end"] = np.cumsum([len(key) for key in keys])
        return table, b"".join(keys)


def _scan(file: BinaryIO, known: FileStat) -> tuple[Summary, NDArray[Any], bytes]:
    rows = _Rows()
    faults: list[str] = []
    for member in read_members(file, known.size, faults):
        name = split_member_name(member.name)
        part = _PART_OF.get(name[1]) if name else None
        if name is not None and part is not None:
            rows.add(name, part, member.offset, member.size)
    table, keys = rows.table()
    summary = Summary(
        size=known.size,
        mtime_ns=known.version,
        samples=len(table),
        fault=faults[0] if faults else "",
        key_bytes=len(keys),
    )
    return summary, table, keys


def _places(path: str) -> Iterator[Path]:
    """Where an index may lie: beside the shard, the cache folder, the temporary folder."""
    real = path if remote.is_remote(path) else os.path.realpath(path)
    if not remote.is_remote(path):
        yield Path(f"{real}.index")
    name = hashlib.sha256(os.fsencode(real)).hexdigest()[:32] + ".index"
    with contextlib.suppress(RuntimeError):  # a user whom the system does not know has no home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        yield cache / "diff_dalle" / "shards" / name
    with contextlib.suppress(OSError):  # there may be no temporary folder
        yield Path(tempfile.gettempdir()) / f"diff_dalle-{os.getuid()}" / name


def _read_summary(path: Path) -> Summary | None:
    """None where there is no index, or one that is damaged or of another format."""
    try:
        with open(path, "rb") as file:
            return _summary_of(file)
    except OSError:
        return None


def _summary_of(file: BinaryIO) -> Summary | None:
    """The summary of an index file, which is left at its table; None as in `_read_summary`."""
    header = file.readline()
    try:
        content = json.loads(header)
        if content["format"] != _FORMAT:
            return None
        summary = Summary(**{field.name: content[field.name] for field in fields(Summary)})
        expected = len(header) + summary.samples * _TABLE.itemsize + summary.key_bytes
    except (ValueError, TypeError, KeyError):
        return None
    return summary if os.fstat(file.fileno()).st_size == expected else None


def _write(path: Path, summary: Summary, table: NDArray[Any], keys: bytes) -> None:
    """Whole or not at all: several ranks may build the same index at the same time."""
    header = json.dumps({"format": _FORMAT, **vars(summary)}).encode()
    header = header.ljust(-(-(len(header) + 1) // _ALIGNMENT) * _ALIGNMENT - 1) + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=".", suffix=".index", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header + table.tobytes() + keys)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
