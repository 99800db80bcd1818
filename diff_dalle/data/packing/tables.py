"""Tables of captions (CSV, TSV, JSON Lines, JSON, COCO) as records, one a picture.

Rows that name the same picture are one record: five rows with a caption each, or the tables of
several languages. A table is read into memory; larger ones belong into parquet.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diff_dalle.data.packing.records import (
    Columns,
    ListedSource,
    Record,
    choose_columns,
    record_of_row,
)
from diff_dalle.errors import UsageError

_LONGEST_CELL = 2**24  # characters; the library's own limit is 2**17


class _Row(NamedTuple):
    """A row and the name to call it; ``fields`` is None where it cannot be read."""

    name: str
    fields: dict[str, Any] | None


def table_source(files: Sequence[Path], images: Path, columns: Columns) -> ListedSource:
    """The pictures that tables of captions name.

    Args:
        files: .jsonl, .csv, .tsv or .json; their rows are merged by picture.
        images: the folder that paths are relative to; the table's own is tried next.
        columns: of the picture and of the captions.
    Raises:
        UsageError: a table cannot be read or lacks a column; no image or caption is there.
    """
    records = table_records(files, images, columns)
    where = f"--images {images}"
    named = [record for record in records if record.image]
    if named and not any(_exists(record) for record in named):
        raise UsageError(
            f"{where}: none of the {len(named)} images is there, e.g. {named[0].source}"
        )
    return ListedSource(records, where)


def table_records(files: Sequence[Path], images: Path, columns: Columns) -> list[Record]:
    """The records of some tables in the order in which their pictures are first named."""
    records: dict[str, Record] = {}
    for file in files:
        rows = _read(file)
        names = list(dict.fromkeys(name for row in rows for name in row.fields or ()))
        chosen = choose_columns(names, columns, str(file))
        for row in rows:
            record = _record(row, chosen, [images, file.parent])
            earlier = records.setdefault(record.source, record)
            if earlier is not record:
                captions = [*_texts(earlier), *_texts(record)]
                records[record.source] = dataclasses.replace(earlier, captions=captions)
    return list(records.values())


def _record(row: _Row, columns: Columns, folders: Sequence[Path]) -> Record:
    if row.fields is None:
        return Record(source=row.name, fault="malformed row")
    named = row.fields.get(columns.image or "")
    # Equal paths are the same picture however they are spelled.
    source = os.path.normpath(named) if isinstance(named, str) and named.strip() else row.name
    return record_of_row(row.fields, columns, folders, source)


def _texts(record: Record) -> list[str]:
    assert isinstance(record.captions, list)
    return record.captions


def _exists(record: Record) -> bool:
    assert isinstance(record.image, tuple)
    return any(path.exists() for path in record.image)


def _read(file: Path) -> list[_Row]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8, save it in this encoding") from error
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows, ".json": _json_rows}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise UsageError(f"{file}: unknown kind of table, use one of {', '.join(sorted(readers))}")
    rows = list(reader(file, text))
    if not any(row.fields for row in rows):
        raise UsageError(f"{file}: no row with named columns, see that it is the right table")
    return rows


def _csv_rows(file: Path, text: str) -> Iterator[_Row]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        # Line ends inside quotes belong to the caption, so the reader must see all of them.
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        for fields in reader:
            # More cells than columns: a comma without quotes has cut a caption in two.
            whole = None not in fields
            known = {name: value for name, value in fields.items() if value is not None}
            yield _Row(f"{file.name}:{reader.line_num}", known if whole else None)
    except csv.Error as error:
        raise UsageError(f"{file}, after line {reader.line_num}: {error}, mend it") from error
    finally:
        csv.field_size_limit(limit)


def _jsonl_rows(file: Path, text: str) -> Iterator[_Row]:
    # Not splitlines: JSON may hold further kinds of line ends unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _Row(f"{file.name}:{number}", _object(line))


def _object(line: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _json_rows(file: Path, text: str) -> Iterator[_Row]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not JSON ({error})") from error
    if isinstance(content, list):
        for number, fields in enumerate(content):
            yield _Row(f"{file.name}:{number}", fields if isinstance(fields, dict) else None)
    elif isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        yield from _coco_rows(file, content)
    else:
        raise UsageError(
            f"{file}: neither a list of objects nor COCO captions (images and annotations)"
        )


def _coco_rows(file: Path, content: dict[str, Any]) -> Iterator[_Row]:
    captions: dict[Any, list[str]] = defaultdict(list)
    try:
        for annotation in sorted(content["annotations"], key=lambda one: one["id"]):
            captions[annotation["image_id"]].append(annotation["caption"])
        for image in content["images"]:
            fields = {**image, "captions": captions[image["id"]]}
            yield _Row(f"{file.name}:{image['id']}", fields)
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{file}: not COCO captions, images need id and file_name, annotations id, image_id "
            "and caption"
        ) from error
