"""Parquet files and Hugging Face datasets as records: read in order, never whole in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diff_dalle.data.packing.records import (
    IMAGE_COLUMNS,
    Columns,
    Record,
    choose_columns,
    record_of_row,
)
from diff_dalle.errors import UsageError

_ROWS = 64  # that are in memory at a time


class ParquetSource:
    """The rows of parquet files, by row groups."""

    def __init__(self, entries: Sequence[str], given: Columns) -> None:
        """Read the footers of all files.

        Args:
            entries: files, or folders of ``*.parquet`` at any depth.
            given: the columns of the picture (bytes, a struct of bytes and path as Hugging Face
                writes it, or a path relative to the file's folder) and of the captions.
        Raises:
            UsageError: a file is missing or broken, or a column is not there.
        """
        self._files = [path for entry in entries for path in _parquet_files(entry)]
        self._columns: list[Columns] = []
        self._rows: list[int] = []
        for path in self._files:
            with _opened(path) as file:
                schema = file.schema_arrow
                image = given.image or _struct_of_bytes(schema)
                chosen = choose_columns(
                    schema.names, Columns(image, given.caption), f"--parquet {path}"
                )
                self._columns.append(chosen)
                self._rows.append(file.metadata.num_rows)
        self.total = sum(self._rows)
        if not self.total:
            raise UsageError(f"--parquet {' '.join(entries)}: no row in any file")
        facts = [(path.name, rows) for path, rows in zip(self._files, self._rows, strict=True)]
        self.identity = {"records": self.total, "sha256": _digest(facts)}

    def records(self, start: int) -> Iterator[Record]:
        """All rows from number ``start`` on; row groups before it are not read."""
        for path, columns, rows in zip(self._files, self._columns, self._rows, strict=True):
            if start < rows:
                yield from _file_records(path, columns, max(start, 0))
            start -= rows


class HuggingFaceSource:
    """A split of a data set that the ``datasets`` package opens; pictures are not decoded."""

    def __init__(self, name: str, split: str, given: Columns) -> None:
        """Open the data set.

        Args:
            name: on the Hub, or a folder (of ``save_to_disk``, or one that it recognises).
            split: which one to read.
            given: the columns of the picture and of the captions.
        Raises:
            UsageError: the package, the data set, the split or a column is missing.
        """
        where = f"--hf_dataset {name}"
        opened = _open_dataset(name, split, where)
        kinds = {name: type(feature).__name__ for name, feature in opened.features.items()}
        pictures = [name for name, kind in kinds.items() if kind == "Image"]
        image = given.image or next(iter(pictures), None)
        self._columns = choose_columns(list(kinds), Columns(image, given.caption), where)
        wanted = [n for n, kind in kinds.items() if n in self._columns or kind == "Value"]
        self._dataset = opened.select_columns(wanted)
        if self._columns.image in pictures:
            from datasets import Image

            self._dataset = self._dataset.cast_column(self._columns.image, Image(decode=False))
        self.total = len(self._dataset)
        if not self.total:
            raise UsageError(f"{where}: split {split} has no row")
        self.identity = {"records": self.total, "sha256": _digest(kinds)}

    def records(self, start: int) -> Iterator[Record]:
        """All rows from number ``start`` on, by random access."""
        for number, fields in enumerate(self._dataset.skip(start), start):
            yield record_of_row(fields, self._columns, [Path()], f"row {number}")


def _parquet_files(entry: str) -> list[Path]:
    path = Path(entry)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise UsageError(f"--parquet {entry}: no such file, or a folder without *.parquet")
    return files


def _opened(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UsageError(_lacks("--parquet", "pyarrow")) from error
    try:
        return ParquetFile(path)
    except (OSError, ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--parquet {path}: cannot be read ({reason})") from error


def _struct_of_bytes(schema: Any) -> str | None:
    """The column of Hugging Face's form, unless one has a usual name."""
    from pyarrow import types

    if any(name in schema.names for name in IMAGE_COLUMNS):
        return None
    return next((f.name for f in schema if types.is_struct(f.type) and "bytes" in _names(f)), None)


def _names(field: Any) -> list[str]:
    return [field.type.field(number).name for number in range(field.type.num_fields)]


def _file_records(path: Path, columns: Columns, start: int) -> Iterator[Record]:
    with _opened(path) as file:
        wanted = [f.name for f in file.schema_arrow if f.name in columns or _is_plain(f.type)]
        first = 0  # row of the group
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start < first + rows:
                batches = file.iter_batches(_ROWS, row_groups=[group], columns=wanted)
                for number, fields in enumerate(_row_dicts(batches), first):
                    if number >= start:
                        source = f"{path.name}:{number}"
                        yield record_of_row(fields, columns, [path.parent], source)
            first += rows


def _row_dicts(batches: Iterator[Any]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist()


def _is_plain(kind: Any) -> bool:
    """Whether a column's values go to the ``.json``; vectors and files would only be read."""
    from pyarrow import types

    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating)
    return any(test(kind) for test in (*tests, types.is_boolean))


def _open_dataset(name: str, split: str, where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(_lacks("--hf_dataset", "datasets")) from error
    try:
        saved = Path(name, "state.json").exists() or Path(name, "dataset_dict.json").exists()
        if not saved:
            return datasets.load_dataset(name, split=split)
        found = datasets.load_from_disk(name)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(f"{where}: cannot be opened ({reason})") from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise UsageError(f"{where}: no split {split}, --hf_split is one of {', '.join(found)}")
    return found[split]


def _lacks(flag: str, package: str) -> str:
    return f"{flag} needs the package {package}: pip install 'diff_dalle[datasets]'"


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
