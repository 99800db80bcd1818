"""Where measurements go: progress.csv, metrics.jsonl, TensorBoard and Weights & Biases.

Each writer is told the step it starts after and drops what an interrupted run had written
beyond it, so a resumed run repeats no row. Only rank 0 writes; `open_log` gives the other
ranks a log without writers.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO
from diff_dalle.training.files import write_whole

Bad = tuple[str, str, str]
"""A sample that could not be used: its shard, its key and the reason."""


class Writer(Protocol):
    """One destination of measurements."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record the values of one step."""

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Record a picture, uint8 [H,W,3]."""

    def close(self) -> None:
        """Flush and release."""


class RunLog:
    """Sends measurements to every writer, and bad samples to ``bad_samples.jsonl``."""

    def __init__(self, writers: Sequence[Writer], bad_samples: JsonLines | None = None) -> None:
        self._writers = writers
        self._bad_samples = bad_samples
        rows = bad_samples.rows if bad_samples else []
        self._known = {(row["shard"], row["key"], row["reason"]) for row in rows}

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record the values of one step."""
        for writer in self._writers:
            writer.write(step, values)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Record a picture, uint8 [H,W,3]."""
        for writer in self._writers:
            writer.image(step, name, picture)

    def bad(self, step: int, samples: Sequence[Bad]) -> None:
        """Record samples that could not be used, one line each, however often they are met."""
        if self._bad_samples is None:
            return
        for sample in samples:
            if sample not in self._known:
                self._known.add(sample)
                shard, key, reason = sample
                row = {"step": step, "shard": shard, "key": key, "reason": reason}
                self._bad_samples.append(row)

    def close(self) -> None:
        """Flush and release every writer."""
        for writer in self._writers:
            writer.close()


def open_log(
    folder: Path | None, report_to: str, *, start_step: int, config: dict[str, Any]
) -> RunLog:
    """The log of a run that goes on after ``start_step``.

    Args:
        folder: the run folder; None on ranks other than 0, which write nothing.
        report_to: comma-separated names out of `REPORTERS`, "auto" (TensorBoard where it is
            installed), "none" or an empty text.
        start_step: what was written for later steps is dropped.
        config: the run's flags, shown by Weights & Biases.
    Raises:
        UsageError: an unknown or missing reporter.
    """
    names = reporter_names(report_to)
    if folder is None:
        return RunLog([])
    writers: list[Writer] = [
        CsvTable(folder / "progress.csv", start_step),
        JsonLines(folder / "metrics.jsonl", start_step),
    ]
    writers += [REPORTERS[name](folder, start_step, config) for name in names]
    return RunLog(writers, JsonLines(folder / "bad_samples.jsonl", start_step))


def reporter_names(report_to: str) -> list[str]:
    """The reporters that ``report_to`` names, each known and installed.

    Raises:
        UsageError: otherwise.
    """
    if report_to == AUTO:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in REPORTERS:
            known = ", ".join(REPORTERS)
            raise UsageError(f"--report_to names {name!r}: it must be among {known}")
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--report_to {name} needs the package: pip install {name}")
    return names


class CsvTable:
    """A table with one row a step, whose columns grow when a new name appears."""

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        self._columns: list[str] = ["step"]
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if _complete(row)]
            self._rewrite([row for row in rows if int(row["step"]) <= start_step])

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a row."""
        new = [name for name in values if name not in self._columns]
        if new or not self._path.exists():
            rows = []
            if self._path.exists():
                with self._path.open(newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
            self._columns += new
            self._rewrite(rows)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow({"step": step, **values})

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """The whole table anew, so that a crash at any instant loses no row."""
        for row in rows:
            self._columns += [name for name in row if name not in self._columns]
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self._path, table.getvalue().encode())

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A table holds no pictures."""

    def close(self) -> None:
        """Every row is on disk already."""


def _complete(row: dict[str | Any, Any]) -> bool:
    """Whether a row was not torn by a crash while it was written."""
    return None not in row.values() and None not in row and str(row.get("step", "")).isdigit()


class JsonLines:
    """One JSON object a line, each with its ``step``.

    Attributes:
        rows: the objects that stood there at the start and were kept.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= start_step]
            self.rows = [json.loads(line) for line in kept]
            write_whole(path, b"".join(kept))

    def append(self, row: dict[str, Any]) -> None:
        """Append one object."""
        with self._path.open("a", encoding="ascii") as file:  # names that are no UTF-8 escaped
            file.write(json.dumps(row) + "\n")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the values of one step."""
        self.append({"step": step, **values})

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Lines hold no pictures."""

    def close(self) -> None:
        """Every line is on disk already."""


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for one that a crash tore."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


class TensorBoard:
    """TensorBoard event files in the run folder."""

    def __init__(self, folder: Path, start_step: int, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add one point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Add a picture."""
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WeightsAndBiases:
    """Weights & Biases, or files in the run folder where ``WANDB_MODE=offline``."""

    def __init__(self, folder: Path, start_step: int, config: dict[str, Any]) -> None:
        import wandb

        # The name of the run stays in its folder, so that a resumed run goes on with its curves.
        name = folder / "wandb_run_id.txt"
        if not name.exists():
            name.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self._wandb = wandb
        self._run = wandb.init(
            project="diff_dalle",
            dir=str(folder),
            id=name.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=config,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add one point to each curve."""
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Add a picture."""
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


REPORTERS: dict[str, Callable[[Path, int, dict[str, Any]], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
