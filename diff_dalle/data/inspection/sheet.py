"""Some pictures of a data set side by side, and beside them which ones they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from diff_dalle.data.inspection.look import TILE, Sight

MOST = 64  # pictures
_COLUMNS = 8
_GAP = 4
_GROUND = (128, 128, 128)  # neither white nor black, so that borders of both can be seen


def write_sheet(folder: Path, sights: Sequence[Sight]) -> list[Path]:
    """Write ``contact_sheet.png`` and ``contact_sheet.txt``, each whole or not at all.

    The pictures are the centre squares, row by row, eight in a row; the text has a line for
    each: row, column (both from 1), shard, key and first caption, separated by tabs.

    Args:
        folder: where they go.
        sights: that have a picture to show, one at least.
    """
    sheet, lines = _blank(len(sights)), []
    for number, sight in enumerate(sights):
        assert sight.shown is not None
        row, column = divmod(number, _COLUMNS)
        tile = Image.fromarray(sight.shown.pixels.transpose(1, 2, 0))
        within = (TILE - tile.width) // 2
        corner = _GAP + within + column * (TILE + _GAP), _GAP + within + row * (TILE + _GAP)
        sheet.paste(tile, corner)
        caption = " ".join(sight.shown.caption.split())
        lines.append("\t".join([str(row + 1), str(column + 1), sight.shard, sight.key, caption]))
    picture, text = folder / "contact_sheet.png", folder / "contact_sheet.txt"
    aside = folder / "contact_sheet.part"
    sheet.save(aside, "PNG")
    os.replace(aside, picture)
    # A caption from JSON may hold what UTF-8 cannot.
    aside.write_text("\n".join([*lines, ""]), encoding="utf-8", errors="backslashreplace")
    os.replace(aside, text)
    return [picture, text]


def _blank(count: int) -> Image.Image:
    columns, rows = min(count, _COLUMNS), -(-count // _COLUMNS)
    size = [_GAP + number * (TILE + _GAP) for number in (columns, rows)]
    return Image.new("RGB", (size[0], size[1]), _GROUND)
