"""What ``--data_dir`` asks for: one pool of shards, or several sources with a share each.

``a b`` is one pool; ``a=0.7 b=0.3`` are two sources. A name of the ``datasets`` table of a
configuration file stands for its root; its length, where given, must be that of the index.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diff_dalle.data.mixture import BLOCK, quotas
from diff_dalle.errors import UsageError
from diff_dalle.knobs import nearest

_FIELDS = {"root", "length"}


@dataclass(frozen=True)
class Source:
    """Shards that are read in an order of their own.

    Attributes:
        name: as the user wrote it, without the weight.
        paths: entries for `shards.find_shards`.
        weight: its share, in any unit; 0 for the one pool of unweighted entries.
        length: how many samples it must have; 0: any number.
    """

    name: str
    paths: tuple[str, ...]
    weight: float = 0.0
    length: int = 0


def parse_sources(
    entries: Sequence[str], datasets: Mapping[str, Any] | None, flag: str
) -> list[Source]:
    """The sources that the values of a flag name.

    Args:
        entries: paths, patterns or names of ``datasets``, each with ``=WEIGHT`` or none.
        datasets: name -> root, or a table with ``root`` and optionally ``length``.
        flag: the name of the flag, for messages.
    Raises:
        UsageError: weights for some entries only, a share under a thousandth, or a table of
            another form.
    """
    table = {name: _root(name, value) for name, value in (datasets or {}).items()}
    split = [_split(entry) for entry in entries]
    weights = [weight for _, weight in split if weight is not None]
    found = [_source(path, weight or 0.0, table, flag) for path, weight in split]
    if not weights:
        lengths = [source.length for source in found]
        whole = sum(lengths) if all(lengths) else 0
        paths = tuple(path for source in found for path in source.paths)
        return [Source(" ".join(source.name for source in found), paths, length=whole)]
    if len(weights) < len(entries):
        bare = next(path for path, weight in split if weight is None)
        raise UsageError(f"--{flag} {bare} has no weight, but others do: write {bare}=1")
    for source, quota in zip(found, quotas(weights), strict=True):
        if quota == 0:
            raise UsageError(
                f"--{flag} {source.name}={source.weight:g}: its share is under 1 of {BLOCK} "
                "samples, give it more or leave it out"
            )
    return found


def _split(entry: str) -> tuple[str, float | None]:
    path, equals, text = entry.rpartition("=")
    if not equals or os.path.lexists(entry):
        return entry, None
    try:
        weight = float(text)
    except ValueError:
        return entry, None
    if not 0 < weight < float("inf"):
        raise UsageError(f"{entry}: the weight must be a positive number")
    return path, weight


def _source(path: str, weight: float, table: Mapping[str, tuple[str, int]], flag: str) -> Source:
    if path in table:
        root, length = table[path]
        return Source(path, (root,), weight, length)
    plain = os.sep not in path and "://" not in path and not os.path.lexists(path)
    if table and plain and not any(letter in path for letter in "{*?["):
        hint = nearest(path, table) or f"; there are {', '.join(table)}"
        raise UsageError(f"--{flag} {path}: neither a path nor a name in datasets{hint}")
    return Source(path, (path,), weight)


def _root(name: str, value: Any) -> tuple[str, int]:
    fields = value if isinstance(value, dict) else {"root": value}
    root, length = fields.get("root"), fields.get("length", 0)
    known = not fields.keys() - _FIELDS
    if known and isinstance(root, str) and isinstance(length, int) and length >= 0:
        return root, length
    raise UsageError(f"datasets: {name} must be a folder, or a table with root and length")
