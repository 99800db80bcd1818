"""JSON that people read: text stands as it is, and files are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def json_bytes(content: dict[str, Any], indent: int | None = None) -> bytes:
    """UTF-8; names of files that are no Unicode have escapes in it, which read back the same."""
    # Half a surrogate pair cannot be UTF-8; its escape is valid JSON.
    return json.dumps(content, ensure_ascii=False, indent=indent).encode(errors="backslashreplace")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file, whole or not at all, whenever the process or the machine stops."""
    aside = path.with_name(path.name + ".part")
    with open(aside, "wb") as file:
        file.write(json_bytes(content, indent=1) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
