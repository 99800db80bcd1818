"""Reports on disk: JSON for programs, Markdown and a picture for people."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diff_dalle.evaluation.alignment import VERDICT, Truth
from diff_dalle.evaluation.detector import Detection
from diff_dalle.sampling_io.store import Pictures

_TILE = 160  # pixels
_TEXT = 34  # pixels below a tile
_GAP = 6
_RIGHT, _WRONG = (20, 120, 40), (190, 30, 30)


def write_report(
    folder: Path,
    name: str,
    content: dict[str, Any],
    table: str,
    picture: Image.Image | None = None,
    terms: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes ``name.json``, ``name.md``, perhaps ``name.png`` and ``name_terms.npz``.

    There is a number behind the name where files of that name are there already.

    Args:
        folder: where the files go.
        name: how they begin.
        content: of the JSON file.
        table: of the Markdown file.
        picture: of the PNG file.
        terms: arrays of the npz file, by name.
    Returns:
        The paths of the files.
    """
    taken = {path.stem for path in folder.iterdir()}
    for number in itertools.count(1):
        stem = name if number == 1 else f"{name}_{number}"
        if not taken.isdisjoint((stem, f"{stem}_terms")):
            continue
        data = folder / f"{stem}.json"
        try:
            with data.open("x", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        except FileExistsError:  # another measurement took the name this instant
            continue
        break
    files = [data, data.with_suffix(".md")]
    files[1].write_text(table + "\n", encoding="utf-8")
    if picture is not None:
        files.append(data.with_suffix(".png"))
        picture.save(files[-1])
    if terms is not None:
        files.append(folder / f"{stem}_terms.npz")
        np.savez(files[-1], **terms)
    return files


def verdict_rows(
    captions: Sequence[str], truths: Sequence[Truth], detections: Sequence[Detection]
) -> list[dict[str, Any]]:
    """What JSON says of each picture."""
    return [
        {
            "caption": caption,
            "seen": {name: getattr(seen, name) for name in VERDICT},
            "right": all(getattr(seen, name) == getattr(said, name) for name in VERDICT),
            "confidence": round(seen.confidence, 4),
        }
        for caption, said, seen in zip(captions, truths, detections, strict=True)
    ]


def verdict_grid(
    pictures: Pictures, truths: Sequence[Truth], detections: Sequence[Detection], columns: int = 8
) -> Image.Image:
    """Pictures [N,H,W,3], each above what was asked for and, where it differs, what was seen."""
    rows = -(-len(pictures) // columns)
    width, height = _TILE + _GAP, _TILE + _TEXT + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for place, (picture, said, seen) in enumerate(zip(pictures, truths, detections, strict=True)):
        left, top = _GAP + place % columns * width, _GAP + place // columns * height
        sheet.paste(_tile(picture), (left, top))
        wrong = [name for name in VERDICT if getattr(said, name) != getattr(seen, name)]
        lines = [f"{said.colour} {said.shape}, {said.background}"]
        lines += [f"seen: {seen.colour} {seen.shape}, {seen.background}"] if wrong else []
        colour = _WRONG if wrong else _RIGHT
        pen.rectangle((left - 1, top - 1, left + _TILE, top + _TILE), outline=colour)
        pen.multiline_text((left, top + _TILE + 3), "\n".join(lines), fill=colour, font=font)
    return sheet


def _tile(picture: Pictures) -> Image.Image:
    """Small pictures keep their pixels visible, large ones are averaged."""
    small = len(picture) < _TILE
    how = Image.Resampling.NEAREST if small else Image.Resampling.BOX
    return Image.fromarray(picture).resize((_TILE, _TILE), how)
