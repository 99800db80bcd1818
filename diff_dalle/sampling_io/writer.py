"""The pictures of a run until all are drawn: an interrupted run goes on where it was.

They lie in a hidden folder of the output folder, ``.samples_`` and a hash of what was asked for:
the same request finds them again, another one begins a folder of its own. A picture counts from
the moment when its line stands in a record, and it is on the disk before that: a kill at any
instant costs no more than the batches that were being drawn.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.sizes import Size, spell
from diff_dalle.sampling_io.store import Pictures, PictureStore

_REQUEST = "request"
_RECORD = re.compile(r"(\d+) (\d+) done")  # index, candidate; a torn line lacks its end


@dataclass(frozen=True)
class OutputWriter:
    """The hidden folder in which a run's pictures gather, shared by all ranks.

    Attributes:
        folder: where the finished files go.
        work: the hidden folder inside it.
        count: N, the number of images.
        sizes: (H, W) of the stages' pictures in pixels, smallest first.
        kept: for each picture that earlier runs drew, the candidate that was kept.
        lock: an open file that keeps other processes out, on the rank that opened the folder.
    """

    folder: Path
    work: Path
    count: int
    sizes: tuple[Size, ...]
    kept: dict[int, int]
    lock: IO[str] | None

    @classmethod
    def open(cls, folder: Path, request: str, count: int, sizes: Sequence[Size]) -> OutputWriter:
        """Make the hidden folder, or find what an interrupted run left; for one rank only.

        Args:
            folder: exists.
            request: hexadecimal hash of all that decides the pictures.
            count: N.
            sizes: (H, W) of the stages in pixels, smallest first.
        Raises:
            UsageError: the disk is too full, the folder cannot be written, or another process
                draws the same pictures into it.
        """
        work = folder / f".samples_{request[:16]}"
        try:
            work.mkdir(exist_ok=True)
            lock = _lock(work / _REQUEST)
            writer = cls(folder, work, count, tuple(sizes), {}, lock)
            lock.seek(0)
            # The request is written last: where it stands, the stores were whole.
            if lock.read() == request and all(store.is_whole() for store in writer.stores):
                writer.kept.update(writer.recorded())
            writer._require_room()
            if not writer.kept:
                writer._begin(request)
        except OSError as problem:
            raise UsageError(
                f"{folder} cannot be written to ({problem.strerror}): name another --log_dir"
            ) from problem
        return writer

    def __getstate__(self) -> dict[str, Any]:
        """The lock stays in its process."""
        return {**self.__dict__, "lock": None}

    @property
    def stores(self) -> list[PictureStore]:
        """One store a stage."""
        return [PictureStore(self.work / f"{spell(n)}.npy", self.count, n) for n in self.sizes]

    def notes(self) -> list[str]:
        """What the user should know: whether an interrupted run goes on."""
        if not self.kept:
            return []
        return [f"{len(self.kept)} of {self.count} are there already: an interrupted run goes on"]

    def require_shared(self) -> None:
        """Raise a `UsageError` where this machine does not see the hidden folder."""
        if not self.work.is_dir():
            raise UsageError(
                f"{socket.gethostname()} does not see {self.work}, which another machine made: "
                "give a --log_dir that all machines share"
            )

    def share(self, rank: int, ranks: int) -> list[int]:
        """The missing pictures that one of ``ranks`` ranks is to draw.

        Neighbours lie in the same pages of a file, so that each rank takes a run of them.
        """
        missing = [index for index in range(self.count) if index not in self.kept]
        return missing[len(missing) * rank // ranks : len(missing) * (rank + 1) // ranks]

    def write(
        self,
        indices: Sequence[int],
        stages: Sequence[Pictures],
        candidates: Sequence[int],
        *,
        rank: int,
    ) -> None:
        """Keep a batch; it is on the disk when this returns. Every rank has its own record.

        Args:
            indices: the numbers of B pictures.
            stages: uint8 [B,H,W,3] a stage.
            candidates: which candidate was kept, one a picture.
            rank: of the caller.
        """
        for store, pictures in zip(self.stores, stages, strict=True):
            store.write(indices, pictures)
        pairs = zip(indices, candidates, strict=True)
        lines = [f"{index} {candidate} done\n" for index, candidate in pairs]
        with open(self.work / f"done_{rank}.txt", "a", encoding="ascii") as record:
            record.write("\n" + "".join(lines))  # a killed run may have left half a line
            record.flush()
            os.fsync(record.fileno())

    def recorded(self) -> dict[int, int]:
        """For each picture that is on the disk by now, the candidate that was kept."""
        found = {}
        for path in self.work.glob("done_*.txt"):
            for line in path.read_text(encoding="ascii", errors="replace").splitlines():
                if match := _RECORD.fullmatch(line):
                    found[int(match[1])] = int(match[2])
        return found

    @contextmanager
    def session(self, rank: int) -> Iterator[None]:
        """Drawing and publishing happen inside; the lock ends with it.

        An exception passes through and one line says what is kept; of Ctrl-C, which meets all
        ranks, rank 0 alone speaks.
        """
        try:
            yield
        except BaseException as problem:
            if rank == 0 or not isinstance(problem, KeyboardInterrupt):
                print(
                    f"{len(self.recorded())} of {self.count} pictures are kept in {self.work}: "
                    f"the same command with --log_dir {self.folder} goes on",
                    file=sys.stderr,
                    flush=True,
                )
            raise
        finally:
            if self.lock is not None:
                self.lock.close()

    def discard(self) -> None:
        """Remove the hidden folder and all in it."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _begin(self, request: str) -> None:
        """Empty stores, then the request."""
        assert self.lock is not None
        self.lock.truncate(0)
        for path in self.work.iterdir():
            if path.name != _REQUEST:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for store in self.stores:
            store.create()
        self.lock.write(request)
        self.lock.flush()
        os.fsync(self.lock.fileno())

    def _require_room(self) -> None:
        # Everything is there twice while it is copied into the zips.
        all_bytes = sum(self.count * h * w * 3 for h, w in self.sizes)
        needed = all_bytes * (2 - len(self.kept) / self.count)
        free = shutil.disk_usage(self.folder).free
        if free >= needed:
            return
        if not self.kept:
            self.discard()
        raise UsageError(
            f"{self.folder} has {free / 2**20:.0f} MB left, but {self.count} images need "
            f"{needed / 2**20:.0f} MB while they are written: name another --log_dir"
        )


def _lock(path: Path) -> IO[str]:
    """A file, made if missing, that no other process has locked; the lock ends with the process."""
    file = open(path, "a+", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as problem:
        file.close()
        raise UsageError(
            f"another process draws the same pictures into {path.parent.parent}: wait for it, or "
            "name another --log_dir"
        ) from problem
    except OSError:  # a file system without locks
        pass
    return file
