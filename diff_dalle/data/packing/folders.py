"""A folder of pictures as records: text files beside them, or a table in the folder.

A folder that holds only ``train`` and ``val`` decides with them which split a picture is in.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from diff_dalle.data.images import IMAGE_EXTENSIONS
from diff_dalle.data.packing.records import Columns, ListedSource, Record
from diff_dalle.data.packing.tables import table_records

SPLITS = ("train", "val")
_TABLES = ("captions.jsonl", "captions.csv", "captions.tsv", "metadata.jsonl", "metadata.csv")
_SUFFIXES = {f".{name}" for name in (*IMAGE_EXTENSIONS, "gif", "bmp", "tif", "tiff")}


def folder_source(folder: Path, columns: Columns) -> ListedSource:
    """The pictures below a folder, in the order of their paths.

    Args:
        folder: holds pictures at any depth, each with a ``.txt`` of the same name (one caption a
            line), or a table such as ``captions.jsonl`` or ``metadata.csv``.
        columns: of such a table.
    Raises:
        UsageError: there is no image, or no caption.
    """
    if not _decides_split(folder):
        return ListedSource(_records(folder, columns), f"--images {folder}")
    records = []
    for split in SPLITS:
        for record in _records(folder / split, columns):
            source = f"{split}/{record.source}"
            records.append(dataclasses.replace(record, source=source, split=split))
    return ListedSource(records, f"--images {folder}")


def _decides_split(folder: Path) -> bool:
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    folders = {path.name for path in visible if path.is_dir()}
    loose = any(_is_image(path.name) or path.name in _TABLES for path in visible)
    return folders == set(SPLITS) and not loose


def _records(folder: Path, columns: Columns) -> list[Record]:
    names = sorted(_files(folder))
    known = set(names)
    pictures = [name for name in names if _is_image(name)]
    texts = [os.path.splitext(name)[0] + ".txt" for name in pictures]
    table = next((name for name in _TABLES if name in known), None)
    if table is not None and known.isdisjoint(texts):
        return table_records([folder / table], folder, columns)
    return [
        Record(
            source=_shown(picture),
            image=(folder / picture,),
            captions=folder / text if text in known else [],
        )
        for picture, text in zip(pictures, texts, strict=True)
    ]


def _files(folder: Path) -> Iterator[str]:
    """The paths of all visible files, relative to the folder; linked folders are not entered."""
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(where, folder)
        yield from (
            os.path.normpath(os.path.join(below, name))
            for name in names
            if not name.startswith(".")
        )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _SUFFIXES


def _shown(name: str) -> str:
    """A name that is not UTF-8 is shown with escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")
