"""Remote shards on the local disk: a folder of bounded size that several processes share.

A shard is downloaded whole, aside, and renamed. When room is needed the shards that were opened
longest ago go; a process that still reads one keeps it until it closes it. Shards that are just
being downloaded come on top of the bound.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from diff_dalle.data import remote
from diff_dalle.data.remote import FileStat
from diff_dalle.errors import UsageError

GIB = 2**30


class ShardCache:
    """Opens remote shards as local files."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Keep at most ``limit`` bytes in a folder, which is made at need."""
        self._folder = folder
        self._limit = limit

    @classmethod
    def of(cls, folder: str | None, gib: float) -> ShardCache:
        """A cache of so many GiB; without a folder, in the user's cache folder."""
        if folder is None:
            home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            folder = os.path.join(home, "diff_dalle", "remote")
        return cls(Path(folder), int(gib * GIB))

    def open(self, url: str, known: FileStat) -> int:
        """A descriptor of the local copy of a shard, downloaded if it is not there.

        Args:
            url: of the shard.
            known: its size and version; a copy of another version is not used.
        Raises:
            UsageError: it cannot be had, or the cache is too small for it.
        """
        path = self._folder / f"{_name(url, known)}.tar"
        with self._locked(path.name):
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                os.utime(path)
                return descriptor
            if known.size > self._limit:
                raise UsageError(
                    f"{url} has {known.size / GIB:.1f} GiB, more than --cache_gb "
                    f"{self._limit / GIB:g}"
                )
            self._make_room(known.size)
            aside = path.with_suffix(".part")
            with open(aside, "ab+") as file:
                if file.tell() > known.size:
                    file.truncate(0)
                remote.download(url, file, known.size)
            os.replace(aside, path)
            descriptor = os.open(path, os.O_RDONLY)
        self._make_room(0)  # others may have been downloaded at the same time
        return descriptor

    def _make_room(self, size: int) -> None:
        """Remove the shards that were opened longest ago, until ``size`` bytes are free."""
        with self._locked("room"):
            shards = []
            for path in self._folder.glob("*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    facts = path.stat()
                    shards.append((facts.st_mtime_ns, facts.st_size, path))
            total = size + sum(held for _, held, _ in shards)
            for _, held, path in sorted(shards):
                if total <= self._limit:
                    break
                path.unlink(missing_ok=True)
                total -= held

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time, also on one that dies."""
        from filelock import FileLock

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._folder / f"{name}.lock")
            with lock:
                yield
        except OSError as error:
            raise UsageError(
                f"{self._folder} cannot hold remote shards ({error.strerror or error}): "
                "give another --cache_dir"
            ) from error


def _name(url: str, known: FileStat) -> str:
    return hashlib.sha256(f"{url}\n{known.size}\n{known.version}".encode()).hexdigest()[:32]
