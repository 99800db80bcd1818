"""Which checkpoint files a path stands for.

A path is a file, or a folder that holds a cascade. Of a folder, these files count, in it and in
each folder directly inside it:

- of a run's files (``model200000.pt``, ``ema_0.9999_200000.pt``) one: ``best.pt`` if it is there,
  else an EMA rather than the raw weights, of the newest step, with the highest rate;
- every other ``.pt`` file (``base.pt``, ``up256.pt``), optimizer states excepted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.config import split_paths

_RUN_FILE = re.compile(r"(?:model|ema_(?P<rate>[0-9.eE+-]+)_)(?P<step>\d+)\.pt")
_OPTIMIZER_FILE = re.compile(r"opt\d+\.pt")
_BEST = "best.pt"


def expand_paths(
    paths: Sequence[str], kind: str, kind_of: Callable[[str], str], flag: str
) -> list[str]:
    """Checkpoint files, each folder replaced by the files of the wanted kind in it.

    Args:
        paths: files, folders, or comma lists of them. Files are passed on unread.
        kind: "generator" or "classifier"; in a folder, others are left out.
        kind_of: reads the kind of a checkpoint file.
        flag: the flag that gave the paths, for messages.
    Raises:
        UsageError: a path is missing, or a folder holds no such checkpoint.
    """
    files: list[str] = []
    for path in split_paths(paths, lambda text: Path(text).exists()):
        if not Path(path).exists():
            raise UsageError(f"--{flag} {path} does not exist: name a checkpoint or its folder")
        if not Path(path).is_dir():
            files.append(path)
            continue
        found = [file for file in _candidates(Path(path)) if kind_of(str(file)) == kind]
        if not found:
            raise UsageError(
                f"--{flag} {path} holds no checkpoint of a {kind}: name a .pt file, a run's "
                "folder, or a folder of runs"
            )
        files += map(str, found)
    return files


def _candidates(folder: Path) -> list[Path]:
    folders = [folder, *sorted(place for place in folder.iterdir() if place.is_dir())]
    return [file for place in folders for file in _of_one_folder(place)]


def _of_one_folder(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.pt"))
    of_a_run = [file for file in files if _RUN_FILE.fullmatch(file.name)]
    others = [
        file for file in files if file not in of_a_run and not _OPTIMIZER_FILE.fullmatch(file.name)
    ]
    if of_a_run and not (folder / _BEST).exists():
        others.append(max(of_a_run, key=_rank))
    return others


def _rank(file: Path) -> tuple[bool, int, float]:
    """Larger is preferred: EMA over raw, then the newest step, then the highest rate."""
    match = _RUN_FILE.fullmatch(file.name)
    assert match is not None
    rate = float(match["rate"] or 0)
    return match["rate"] is not None, int(match["step"]), rate
