"""Curves from a run's ``progress.csv`` and from the JSON files of measurements.

Matplotlib draws them: it is what readers of such plots know, and it is well kept. It serves
documents only, so it is the extra ``docs`` and is imported when a curve is drawn.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diff_dalle.errors import UsageError
from diff_dalle.knobs import knob, nearest, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    """What to draw, from where to where."""

    files: list[str] = knob([], "progress.csv of runs, or JSON files of measurements")
    x: str = knob("step", "column, or path in the JSON, of the horizontal axis")
    y: list[str] = knob([], "columns or paths to draw, one curve each")
    x_scale: float = knob(1.0, "multiplies x, as the batch size turns steps into images")
    x_label: str | None = knob(None, "text of the horizontal axis (default: --x)")
    y_label: str | None = knob(None, "text of the vertical axis")
    log_y: bool = knob(False, "a logarithmic vertical axis")
    out: str = knob("curves.png", "the picture to write")

    def __post_init__(self) -> None:
        require(bool(self.files), "files", self.files, "name at least one .csv or .json")
        require(bool(self.y), "y", self.y, "name at least one column")


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points by rising x; ``low`` and ``high`` bound them where the file has intervals."""

    label: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


def read_curves(files: Sequence[str], x: str, y: Sequence[str], x_scale: float) -> list[Curve]:
    """The curves in some files.

    A CSV file holds whole curves, labelled, where there are several, with its folder (with the
    file where a folder holds two). All JSON files together hold one curve, each file one point. A
    name may leave out the front of a path: ``colour`` finds ``scores.colour``. Values that are
    missing or not finite are left out.

    Raises:
        UsageError: a file that cannot be read, a name that is in none of them, or one that has no
            value to draw.
    """
    paths = [Path(file) for file in dict.fromkeys(files)]
    folders = Counter(path.parent for path in paths if path.suffix == ".csv")
    tables: dict[str, list[dict[str, float]]] = {}
    for path in paths:
        label = str(path if folders[path.parent] > 1 else path.parent)
        tables.setdefault(label if path.suffix == ".csv" else "", []).extend(_read(path))
    curves = []
    for label, rows in tables.items():
        for name in y:
            prefix = f"{label}: " if len(tables) > 1 and label else ""
            curves.append(_curve(prefix + name, rows, x, name, x_scale))
    return curves


def draw_curves(cfg: CurvesConfig) -> Path:
    """Draw the curves into a picture.

    Raises:
        UsageError: matplotlib is missing, or there is nothing to draw.
    """
    curves = read_curves(cfg.files, cfg.x, cfg.y, cfg.x_scale)
    try:
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise UsageError("curves need matplotlib: pip install matplotlib") from problem
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        marker = "o" if len(curve.x) <= 30 else None
        (line,) = axes.plot(curve.x, curve.y, label=curve.label, marker=marker, markersize=3)
        if curve.low != curve.high:
            axes.fill_between(curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.15)
    axes.set_xlabel(cfg.x_label or cfg.x)
    axes.set_ylabel(cfg.y_label or "")
    axes.set_yscale("log" if cfg.log_y else "linear")
    axes.grid(alpha=0.3)
    axes.legend()
    out = Path(cfg.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as problem:  # ValueError: no such kind of picture
        raise UsageError(f"--out {out} cannot be written: {problem}") from problem
    return out


def _read(path: Path) -> list[dict[str, float]]:
    """The rows of a file: names and numbers."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return [_numbers(row) for row in csv.DictReader(text.splitlines())]
        return [_flat(json.loads(text))]
    except (OSError, ValueError) as problem:
        reason = str(problem).splitlines()[0]
        raise UsageError(f"--files {path} cannot be read: {reason}") from problem


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name, text in row.items():
        try:
            numbers[name] = float(text)
        except (TypeError, ValueError):
            continue  # an empty cell: not every line logs every quantity
    return numbers


def _flat(value: Any, path: str = "") -> dict[str, float]:
    """All numbers of a JSON value by their dotted paths, lists left out."""
    if isinstance(value, dict):
        flat: dict[str, float] = {}
        for name, inner in value.items():
            flat |= _flat(inner, f"{path}.{name}" if path else str(name))
        return flat
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {path: float(value)}
    return {}


def _curve(label: str, rows: Sequence[dict[str, float]], x: str, y: str, scale: float) -> Curve:
    known = {name for row in rows for name in row}
    at, value = _find(x, known), _find(y, known)
    interval = value.endswith(".mean")
    low, high = (value.removesuffix("mean") + end if interval else value for end in ("low", "high"))
    points = sorted(
        (row[at] * scale, row[value], row[low], row[high])
        for row in rows
        if all(math.isfinite(row.get(name, math.nan)) for name in (at, value, low, high))
    )
    if not points:
        raise UsageError(f"--y {y} has no finite value in --files: there is nothing to draw")
    return Curve(label, *([point[i] for point in points] for i in range(4)))


def _find(name: str, known: set[str]) -> str:
    """The full name that ends in ``name``, of an interval its mean; the shortest of several."""
    endings = (name, f"{name}.mean")
    found = [k for k in known if any(k == e or k.endswith(f".{e}") for e in endings)]
    if not found:
        raise UsageError(f"--files have no {name}{nearest(name, known)}")
    return min(found, key=lambda full: (len(full), full))
