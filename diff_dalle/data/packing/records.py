"""The record: one captioned picture of a source, the same whatever kind of source it is."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from diff_dalle.errors import UsageError

IMAGE_COLUMNS = ("file_name", "file", "filename", "file_path", "image", "path")
CAPTION_COLUMNS = ("caption", "captions", "text")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One captioned picture before its file is read; it travels to other processes (pickle).

    Attributes:
        source: what to call it: a path below the user's folder, or a table and a row.
        image: the bytes of its file, or paths of which the first that exists counts.
        captions: texts, or the text file that holds one a line.
        extra: the other plain values of its row, for the ``.json``.
        split: "train" or "val" where the source decides, else None.
        fault: why it cannot be used, "" if nothing is known against it.
    """

    source: str
    image: bytes | tuple[Path, ...] = ()
    captions: list[str] | Path = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    fault: str = ""


class Columns(NamedTuple):
    """The names of two columns; None: not told."""

    image: str | None
    caption: str | None


class Source(Protocol):
    """Records in an order that is always the same.

    Attributes:
        total: how many records there are.
        identity: JSON values that differ where another source is read.
    """

    total: int
    identity: dict[str, Any]

    def records(self, start: int) -> Iterator[Record]:
        """All records from number ``start`` on; the earlier ones are skipped cheaply."""
        ...


class ListedSource:
    """A source whose records fit into memory: names and texts, no pictures."""

    def __init__(self, records: Sequence[Record], where: str) -> None:
        """Take the records; ``where`` begins the errors.

        Raises:
            UsageError: no record has a picture, or none has a caption.
        """
        if not any(record.image for record in records):
            raise UsageError(f"{where}: no image found there, name the folder that holds images")
        if not any(record.captions for record in records):
            raise UsageError(
                f"{where}: no captions at all; each image needs a .txt of the same name beside "
                "it, or a row of a table with a caption"
            )
        self._records = records
        self.total = len(records)
        self.identity = {"records": self.total, "sha256": _digest(records)}

    def records(self, start: int) -> Iterator[Record]:
        """All records from number ``start`` on."""
        return iter(self._records[start:])


def choose_columns(columns: Sequence[str], given: Columns, where: str) -> Columns:
    """The two columns to read: the given ones, else the first of the usual names.

    Raises:
        UsageError: one is missing; lists the columns that there are.
    """
    return Columns(
        _choose(columns, given.image, IMAGE_COLUMNS, "image", where),
        _choose(columns, given.caption, CAPTION_COLUMNS, "caption", where),
    )


def record_of_row(
    fields: dict[str, Any], columns: Columns, folders: Sequence[Path], source: str
) -> Record:
    """The record of one row of a table.

    Args:
        fields: column -> value.
        columns: which hold the picture (bytes, a struct of bytes and path, or a path) and the
            captions (a text or a list of texts).
        folders: which a relative path may start from.
        source: the record's name.
    """
    value = fields.get(columns.image or "")
    if isinstance(value, dict):  # Hugging Face's form
        value = value.get("bytes") or value.get("path")
    image: bytes | tuple[Path, ...] = ()
    fault = ""
    if isinstance(value, bytes):
        image = value
    elif isinstance(value, str) and value.strip():
        image = allowed_paths(value, folders)
        fault = "" if image else "path outside its folder"
    else:
        fault = "no image named"
    extra = {name: one for name, one in fields.items() if name not in columns and _is_plain(one)}
    captions = texts_of(fields.get(columns.caption or ""))
    return Record(source=source, image=image, captions=captions, extra=extra, fault=fault)


def allowed_paths(name: str, folders: Iterable[Path]) -> tuple[Path, ...]:
    """Where a named file may lie: below each of the folders, or where an absolute path says.

    >>> allowed_paths("../secret.png", [Path("images")])
    ()
    """
    if os.path.isabs(name):
        return (Path(name),)
    inside = os.path.normpath(name)
    if inside.split(os.sep)[0] == os.pardir:
        return ()
    return tuple(dict.fromkeys(folder / inside for folder in folders))


def texts_of(value: object) -> list[str]:
    """The texts in a cell: a text, a list of texts, or such a list spelled as JSON.

    >>> texts_of('["a cat", "고양이"]')
    ['a cat', '고양이']
    """
    if isinstance(value, str):
        return _spelled_list(value) or ([value] if value.strip() else [])
    values = value if isinstance(value, list) else []
    return [one for one in values if isinstance(one, str) and one.strip()]


def _is_plain(value: object) -> bool:
    """Whether JSON can hold it as one value; it has no infinity and no NaN."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _spelled_list(text: str) -> list[str]:
    if not text.startswith('["'):  # how tables without lists hold several captions
        return []
    try:
        return texts_of(json.loads(text))
    except ValueError:
        return []


def _choose(
    columns: Sequence[str], given: str | None, usual: Sequence[str], kind: str, where: str
) -> str:
    for name in usual if given is None else [given]:
        if name in columns:
            return name
    lacks = f"no column {given!r}" if given else f"no {kind} column"
    raise UsageError(
        f"{where}: {lacks}, name one with --{kind}_column (there are: {', '.join(columns)})"
    )


def _digest(records: Iterable[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        captions = record.captions if isinstance(record.captions, list) else None
        facts = [record.source, captions, record.extra, record.split, record.fault]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()
