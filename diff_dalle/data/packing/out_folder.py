"""The folder that is written: new, unfinished, complete, or something else that is refused.

A run leaves ``unfinished.json`` (the journal) until ``train/dataset.json`` and
``val/dataset.json`` are there. Only its state counts: files are cut back to what it says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diff_dalle.data.json_files import write_json
from diff_dalle.data.packing.folders import SPLITS
from diff_dalle.data.packing.shard_writer import SplitState, publish_shards, require_shards
from diff_dalle.data.writer import require_same_settings
from diff_dalle.errors import UsageError

SKIPPED = "skipped.jsonl"
DIGESTS = "digests.part"
_UNFINISHED, _FINISHED = "unfinished.json", "dataset.json"
# Of some network file systems, which lock no folder: nothing is held there.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


@dataclass(kw_only=True)
class Progress:
    """How far a run is: what the journal holds.

    Attributes:
        position: records of the source that are dealt with.
        skipped: reason -> how many of them were left out for it.
        skipped_bytes: length of the list of skipped records.
        digest_bytes: length of the list of the pictures' hashes.
        splits: the shards of each split.
        finished: all records are dealt with.
    """

    position: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_bytes: int = 0
    digest_bytes: int = 0
    splits: dict[str, SplitState] = field(
        default_factory=lambda: {split: SplitState() for split in SPLITS}
    )
    finished: bool = False


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and hold it for one process; the system lets go when that is gone.

    Raises:
        UsageError: it cannot be written, or another process packs into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"--out_dir {folder}: cannot be written ({error.strerror})") from error
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def open_progress(folder: Path, settings: dict[str, Any]) -> Progress | None:
    """Where a run with these settings goes on; None where it is complete.

    Raises:
        UsageError: the folder holds something else, other settings or a damaged shard.
    """
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".part")
    if not names:
        save_progress(folder, settings, Progress())
        return Progress()
    unfinished = _UNFINISHED in names
    try:
        if unfinished:
            journal = _read_json(folder / _UNFINISHED)
            saved, progress = journal["settings"], _progress(journal["progress"])
        else:
            contents = {split: _read_json(folder / split / _FINISHED) for split in SPLITS}
            saved = contents[SPLITS[0]]["settings"]
            shards = {split: content["shards"] for split, content in contents.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        some = ", ".join(names[:3])
        raise UsageError(
            f"--out_dir {folder} holds something else ({some}): name a new or an empty folder"
        ) from error
    require_same_settings(folder, saved, settings, of="another command")
    if unfinished:
        return progress
    for split, sizes in shards.items():
        require_shards(folder / split, sizes)
    return None


def save_progress(folder: Path, settings: dict[str, Any], progress: Progress) -> None:
    """Replace the journal; on the disk when this returns."""
    content = {"settings": settings, "progress": dataclasses.asdict(progress)}
    write_json(folder / _UNFINISHED, content)


def finish(folder: Path, facts: dict[str, Any], progress: Progress) -> None:
    """Leave the complete data set and nothing else; a killed call can be repeated.

    Args:
        folder: whose shards are all whole, if not yet named so.
        facts: JSON values for both ``dataset.json``, the settings among them.
        progress: of the finished run.
    Raises:
        UsageError: a shard is missing or damaged.
    """
    skipped = folder / f"{SKIPPED}.part"
    if skipped.exists():
        os.replace(skipped, folder / SKIPPED)
    for split, state in progress.splits.items():
        publish_shards(folder / split, state.shards)
        require_shards(folder / split, state.shards)
        content = {
            "length": state.length,
            "shards": state.shards,
            "records": progress.position,
            "skipped": dict(sorted(progress.skipped.items())),
            **facts,
        }
        write_json(folder / split / _FINISHED, content)
    (folder / DIGESTS).unlink(missing_ok=True)
    (folder / _UNFINISHED).unlink()


def summary(folder: Path) -> str:
    """What a complete folder holds, and how many records were skipped for which reason."""
    contents = {split: _read_json(folder / split / _FINISHED) for split in SPLITS}
    lengths = ", ".join(f"{content['length']} in {split}/" for split, content in contents.items())
    skipped: dict[str, int] = contents[SPLITS[0]]["skipped"]
    if not skipped:
        return f"{lengths}; none skipped"
    return f"{lengths}; skipped {reasons(skipped)}; see {folder / SKIPPED}"


def reasons(skipped: dict[str, int]) -> str:
    """The number of skipped records, and the reasons from the most frequent on.

    >>> reasons({"truncated": 2, "duplicate": 5})
    '7 (5 duplicate, 2 truncated)'
    """
    counts = ", ".join(f"{n} {reason}" for reason, n in Counter(skipped).most_common())
    return f"{sum(skipped.values())} ({counts})"


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"--out_dir {folder}: another process packs into it, wait for its end"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _progress(saved: dict[str, Any]) -> Progress:
    splits = {split: SplitState(**state) for split, state in saved["splits"].items()}
    return Progress(**{**saved, "splits": splits})
