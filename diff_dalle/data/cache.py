"""Remote shards on the local disk: a folder of bounded size that several processes share.

A shard is downloaded whole, aside, and renamed. When room is needed the shards that were opened
longest ago go, and what downloads that were broken off have left; a process that still reads a
shard keeps it until it closes it. Shards that are just being downloaded come on top of the bound.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from diff_dalle.data import remote
from diff_dalle.data.remote import FileStat
from diff_dalle.errors import UsageError

GIB = 2**30


class RemoteFile(NamedTuple):
    """A file in a store, at the version that is wanted."""

    url: str
    known: FileStat


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
        path = self._place(url, known)
        with self._locked(path.stem):
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                _mark_used(path)
                return descriptor
            descriptor = self._download(url, known, path)
        self._make_room(0)  # others may have been downloaded at the same time
        return descriptor

    def keep(self, wanted: Iterable[RemoteFile]) -> list[RemoteFile]:
        """Let other shards go before those that are needed next.

        Args:
            wanted: shards, those needed first first. Only so many count as the cache can hold
                together, so that what is fetched ahead never drives out what is needed before.
        Returns:
            Those of them that have no copy.
        """
        together, room = [], self._limit
        for file in wanted:
            room -= file.known.size
            if room < 0:
                break
            together.append(file)
        missing = []
        for file in reversed(together):  # the latest used goes last
            try:
                _mark_used(self._place(*file))
            except OSError:
                missing.append(file)
        return missing[::-1]

    def fetch(self, url: str, known: FileStat) -> None:
        """Download a shard ahead, unless it is there or somebody is at it; `open`'s arguments.

        Raises:
            UsageError: it cannot be had, or the cache is too small for it.
        """
        path = self._place(url, known)
        if path.exists():
            return
        with self._locked(path.stem, wait=False) as mine:
            if not mine or path.exists():
                return
            os.close(self._download(url, known, path))
        self._make_room(0)

    def copy(self, url: str) -> Path | None:
        """The local copy of a small file, which is never removed; None if there is no such file.

        Raises:
            UsageError: its store cannot be reached.
        """
        known = remote.find(url)
        if known is None:
            return None
        path = self._place(url, known)
        with self._locked(path.stem):
            if not path.exists():
                os.close(self._download(url, known, path))
        return path

    def _place(self, url: str, known: FileStat) -> Path:
        name = hashlib.sha256(f"{url}\n{known.size}\n{known.version}".encode()).hexdigest()[:32]
        return self._folder / f"{name}{Path(url).suffix}"

    def _download(self, url: str, known: FileStat, path: Path) -> int:
        """Put a file at its place; a descriptor of it, which outlasts its removal."""
        if known.size > self._limit:
            raise UsageError(
                f"{url} has {known.size / GIB:.1f} GiB, more than --cache_gb {self._limit / GIB:g}"
            )
        aside = path.with_suffix(".part")
        with open(aside, "ab+") as file:
            if file.tell() > known.size:
                file.truncate(0)
            self._make_room(known.size - os.fstat(file.fileno()).st_size)
            remote.download(url, file, known.size)
        descriptor = os.open(aside, os.O_RDONLY)
        _mark_used(aside)
        os.replace(aside, path)
        return descriptor

    def _make_room(self, size: int) -> None:
        """Remove the shards that were opened longest ago, until ``size`` bytes are free."""
        with self._locked("room"):
            copies = []
            for path in self._folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if path.suffix in (".tar", ".part"):
                        facts = path.stat()
                        copies.append((facts.st_mtime_ns, facts.st_size, path))
            total = size + sum(held for _, held, _ in copies)
            for _, held, path in sorted(copies):
                if total <= self._limit:
                    break
                # Whoever opens or downloads it holds its lock.
                with self._locked(path.stem, wait=False) as free:
                    if free:
                        path.unlink(missing_ok=True)
                        total -= held

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """One process at a time, also on one that dies; without ``wait``, whether it got in."""
        from filelock import FileLock, Timeout

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._folder / f"{name}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(blocking=wait)
            try:
                yield lock.is_locked
            finally:
                lock.release()
        except OSError as error:
            raise UsageError(
                f"{self._folder} cannot hold remote shards ({error.strerror or error}): "
                "give another --cache_dir"
            ) from error


def _mark_used(path: Path) -> None:
    now = time.time_ns()  # a file system's own times are of the last tick, equal for neighbours
    os.utime(path, ns=(now, now))
