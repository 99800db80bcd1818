"""Sizes of pictures: (H, W) inside, as tensors have them; WIDTHxHEIGHT to users, as files do."""

from __future__ import annotations

import re

from diff_dalle.errors import UsageError

Size = tuple[int, int]
"""(H, W) in pixels."""

_SPELLING = re.compile(r"(\d+)(?:x(\d+))?", re.IGNORECASE)


def parse_size(text: str, name: str) -> Size:
    """``WIDTHxHEIGHT``, or one number for both.

    >>> parse_size("320x192", "size"), parse_size("64", "size")
    ((192, 320), (64, 64))

    Args:
        text: what the user typed.
        name: the flag, for messages.
    Raises:
        UsageError: anything else, or a side of 0.
    """
    match = _SPELLING.fullmatch(text.strip())
    sides = [int(side or match[1]) for side in match.groups()] if match else [0]
    if 0 in sides:
        raise UsageError(
            f"--{name} is {text!r}: it must be WIDTHxHEIGHT in pixels, such as 320x192"
        )
    return sides[1], sides[0]


def spell(size: Size) -> str:
    """A size as users read it.

    >>> spell((192, 320)), spell((64, 64))
    ('320x192', '64')
    """
    height, width = size
    return str(width) if height == width else f"{width}x{height}"
