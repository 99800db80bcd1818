"""Which tar files ``--data_dir`` means: folders, brace and glob patterns, single files.

Local files must be regular ones. Whatever is missing, empty or of another shape is refused
in one line that says what was found.
"""

from __future__ import annotations

import os
import shlex
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob
from itertools import islice
from pathlib import Path

from diff_dalle.data import remote
from diff_dalle.data.cache import ShardCache
from diff_dalle.data.remote import FileStat, is_remote
from diff_dalle.errors import UsageError

_GLOB = "*?["
_SPLITS = ("train", "val")  # what `scripts/make_demo_data.py` writes side by side
_LOOSE_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BESIDE = (".index", ".json", ".jsonl", ".parquet", ".csv", ".txt", ".md")
_LOOK_AT = 10_000  # files of a folder that holds no shards, to tell the user what it holds
_TO_PACK = "python scripts/pack_dataset.py --images {} --out_dir OUT"


@dataclass(frozen=True)
class ShardFile:
    """One tar file.

    Attributes:
        path: where it lies.
        name: its path below the entry of ``--data_dir`` that led to it or, where two shards
            would share that, below the folder that holds them all: the same wherever the dataset
            is copied to. No two shards of a dataset have the same.
        cache: where local copies of a remote shard lie; None for a file on this machine.
    """

    path: str
    name: str
    cache: ShardCache | None = None

    @property
    def folders(self) -> tuple[str, ...]:
        """The folder that holds it and the one above; a store has none above its top."""
        if self.cache is None:
            folder = Path(self.path).absolute().parent
            return str(folder), str(folder.parent)
        protocol, path = self.path.split("://", 1)
        parts = path.split("/")
        top = 2 if protocol == "az" else 1  # parts: account and container, a bucket or a host
        above = [parts[:-up] for up in (1, 2) if len(parts) - up >= top]
        return tuple(f"{protocol}://{'/'.join(folder)}" for folder in above)

    def beside(self, name: str) -> tuple[str, Path] | None:
        """Where a small file lies in one of the `folders`, and a local path of it.

        Raises:
            UsageError: the store of a remote shard cannot be reached.
        """
        for folder in self.folders:
            address = f"{folder}/{name}"
            path = Path(address) if self.cache is None else self.cache.copy(address)
            if path is not None and path.is_file():
                return address, path
        return None

    def stat(self) -> FileStat:
        """Size and version; for a local file its time of change, in nanoseconds.

        Raises:
            UsageError: it cannot be read.
        """
        if self.cache is not None:
            return remote.stat(self.path)
        try:
            facts = os.stat(self.path)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be read ({error.strerror})") from error
        return FileStat(facts.st_size, facts.st_mtime_ns)

    def open(self, known: FileStat) -> int:
        """A descriptor of the file, or of its local copy; remote ones are of the known version.

        Raises:
            OSError: it cannot be read.
            UsageError: it cannot be had from where it lies.
        """
        if self.cache is not None:
            return self.cache.open(self.path, known)
        return os.open(self.path, os.O_RDONLY)


def find_shards(entries: Sequence[str], flag: str = "data_dir") -> list[ShardFile]:
    """All shards of all entries: entries in the order given, shards of one sorted by name.

    Args:
        entries: each a folder (searched recursively for ``*.tar``), a tar file, a brace pattern
            such as ``data/{00000..00099}.tar`` (gaps are allowed), or a glob pattern (``**``
            crosses folders) of tar files and folders. What usually lies beside shards (indices,
            ``.json``, ``.parquet`` …) is passed over where tar files are named too: a shell hands
            it over for ``data/*``.
        flag: the name of the flag, for messages.
    Raises:
        UsageError: an entry is missing, empty, a pipe, or holds something else.
    """
    return find_sources([entries], flag, ShardCache.of(None, 0.0))[0]


def find_sources(
    sources: Sequence[Sequence[str]], flag: str, cache: ShardCache
) -> list[list[ShardFile]]:
    """The shards of several sources, each as `find_shards` has them, with names that differ.

    Args:
        sources: entries of each.
        flag: the name of the flag, for messages.
        cache: for remote shards.
    Raises:
        UsageError: as `find_shards`; or a shard belongs to two sources.
    """
    if not any(sources):
        raise UsageError(f"--{flag} is missing: name a folder with tar shards")
    owner: dict[str, int] = {}
    found: list[dict[str, ShardFile]] = []
    for number, entries in enumerate(sources):
        own: dict[str, ShardFile] = {}
        for entry in _without_bystanders(entries):
            for shard in _expand(entry, flag, cache):
                own.setdefault(_identity(shard.path), shard)
        for path in own:
            if owner.setdefault(path, number) != number:
                raise UsageError(f"--{flag}: {path} belongs to two sources, name it once")
        found.append(own)
    named = iter(_told_apart([shard for own in found for shard in own.values()]))
    return [list(islice(named, len(own))) for own in found]


def _without_bystanders(entries: Sequence[str]) -> list[str]:
    """What of ``data/*``, spelled out by a shell, are shards."""
    if not any(entry.endswith(".tar") for entry in entries):
        return list(entries)
    return [e for e in entries if not (e.endswith(_BESIDE) and os.path.isfile(e))]


def _told_apart(shards: list[ShardFile]) -> list[ShardFile]:
    """Names that differ: the noise of a sample derives from its shard's name and its key."""
    taken = Counter(shard.name for shard in shards)
    if len(taken) == len(shards):
        return shards
    paths = [os.path.abspath(shard.path) for shard in shards]
    top = os.path.commonpath(paths)
    long = [Path(path).relative_to(top).as_posix() for path in paths]
    # Names that were unique stay, so that runs of old go on, unless a long one meets them.
    names = [
        name if taken[shard.name] > 1 else shard.name
        for shard, name in zip(shards, long, strict=True)
    ]
    names = names if len(set(names)) == len(names) else long
    return [replace(shard, name=name) for shard, name in zip(shards, names, strict=True)]


def _identity(path: str) -> str:
    return path if is_remote(path) else os.path.realpath(path)


def _expand(entry: str, flag: str, cache: ShardCache) -> list[ShardFile]:
    if entry.startswith("pipe:"):
        raise UsageError(f"--{flag} {entry}: pipe: would run a program, name files or folders")
    if is_remote(entry):
        return _remote(entry, flag, cache)
    if os.path.lexists(entry):
        return _existing(entry, entry, flag)
    if any(letter in entry for letter in "{" + _GLOB):
        return _matching(entry, flag)
    hint = _nearest_folder(entry)
    raise UsageError(f"--{flag} {entry}: no such file or folder{hint}")


def _remote(entry: str, flag: str, cache: ShardCache) -> list[ShardFile]:
    """One shard, a brace pattern (without gaps: nothing is asked of each), or a folder."""
    if "{" in entry or entry.endswith(".tar"):
        urls = _spelled(entry, flag)
        return [ShardFile(url, url.rpartition("/")[2], cache) for url in urls]
    urls = [url for url in remote.list_files(entry) if url.endswith(".tar")]
    if not urls:
        raise UsageError(f"--{flag} {entry}: no .tar shards there")
    return [ShardFile(url, _below(url, entry), cache) for url in urls]


def _below(url: str, folder: str) -> str:
    """The part of a URL below a folder's; stores differ in the slashes that they begin with."""
    path, top = (one.split("://", 1)[1].strip("/") for one in (url, folder))
    return path.removeprefix(f"{top}/")


def _spelled(pattern: str, flag: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UsageError(f"--{flag} {pattern}: the braces do not match") from error


def _existing(path: str, entry: str, flag: str) -> list[ShardFile]:
    return _in_folder(path, flag) if os.path.isdir(path) else [_one_file(path, entry, flag)]


def _one_file(path: str, entry: str, flag: str) -> ShardFile:
    if not os.path.isfile(path):
        raise UsageError(f"--{flag} {entry}: not a regular file, name a tar file or a folder")
    if not path.endswith(".tar"):
        raise UsageError(f"--{flag} {entry}: not a .tar file, name tar shards or their folder")
    return ShardFile(path=path, name=os.path.basename(path))


def _matching(pattern: str, flag: str) -> list[ShardFile]:
    spelled = _spelled(pattern, flag)
    paths, missing = [], 0
    for one in spelled:
        existing = _matches(one)
        missing += not existing
        paths.extend(existing)
    if not paths:
        raise UsageError(f"--{flag} {pattern}: no file matches, e.g. {spelled[0]} is missing")
    if missing:
        warnings.warn(f"--{flag} {pattern}: {missing} of {len(spelled)} are missing", stacklevel=2)
    return [shard for path in paths for shard in _existing(path, pattern, flag)]


def _matches(pattern: str) -> list[str]:
    """The existing tar files and folders; other files of a glob pattern lie beside its shards."""
    if not any(letter in pattern for letter in _GLOB):
        return [pattern] if os.path.exists(pattern) else []
    paths = sorted(glob(pattern, recursive=True))
    return [path for path in paths if _holds_shards(path)] or paths


def _holds_shards(path: str) -> bool:
    if os.path.isdir(path):
        return any(below.endswith(".tar") for below in _files(path))
    return path.endswith(".tar")


def _in_folder(folder: str, flag: str) -> list[ShardFile]:
    paths = sorted(path for path in _files(folder) if path.endswith(".tar"))
    shards = [
        ShardFile(path=path, name=Path(path).relative_to(folder).as_posix())
        for path in paths
        if os.path.isfile(path)
    ]
    if not shards:
        raise UsageError(f"--{flag} {folder}: {_what_lies_in(folder)}")
    tops = {shard.name.split("/")[0] for shard in shards if "/" in shard.name}
    if tops.issuperset(_SPLITS):
        train = os.path.join(folder, _SPLITS[0])
        raise UsageError(
            f"--{flag} {folder} holds both train and val shards: name one, e.g. {train}"
        )
    return shards


def _files(folder: str) -> Iterator[str]:
    """Every visible file below a folder; links are followed, loops are not."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(where, name) for name in names if not name.startswith("."))


def _what_lies_in(folder: str) -> str:
    paths = list(islice(_files(folder), _LOOK_AT))
    if not paths:
        return "an empty folder, put tar shards there or name another"
    counts = Counter(os.path.splitext(path)[1].lower() or "no extension" for path in paths)
    images = sum(counts[extension] for extension in _LOOSE_IMAGES)
    if images:
        command = _TO_PACK.format(shlex.quote(folder))
        return f"no .tar shards but {images} loose images, pack them into tar shards: {command}"
    compressed = [path for path in paths if path.endswith(_COMPRESSED)]
    if compressed:
        name = os.path.basename(compressed[0])
        return f"only compressed archives such as {name}, unpack them to plain .tar files"
    listing = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(3))
    return f"no .tar shards (found: {listing}), name a folder with tar shards"


def _nearest_folder(path: str) -> str:
    """Which part of a missing path exists, so that a typing error is quick to see."""
    parent = Path(path).absolute().parent
    while not parent.exists():
        parent = parent.parent
    return f" ({parent} exists)" if parent != parent.parent else ""
