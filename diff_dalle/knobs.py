"""How a knob is declared: one dataclass field with a default and one line of help.

A configuration class is a frozen keyword-only dataclass that stands above the class that
reads it. ``diff_dalle.config`` turns the fields of such classes into command-line flags, so
the annotations below are at once types (for a checker) and converters from the text of a flag.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from diff_dalle.errors import UsageError

AUTO = "auto"

if TYPE_CHECKING:
    Ints = tuple[int, ...]
    Floats = tuple[float, ...]
    OneOrInts = int | tuple[int, ...]
    AutoInts = tuple[int, ...] | str
    AutoInt = int | str
    AutoFloat = float | str
    Table = dict[str, Any]
else:

    class Ints:
        """``"32,16,8"`` -> ``(32, 16, 8)``; an empty text is the empty tuple."""

        def __new__(cls, text: str) -> tuple[int, ...]:
            return tuple(int(part) for part in text.split(",") if part.strip())

    class Floats:
        """``"0.9999,0.999"`` -> ``(0.9999, 0.999)``; an empty text is the empty tuple."""

        def __new__(cls, text: str) -> tuple[float, ...]:
            return tuple(float(part) for part in text.split(",") if part.strip())

    class OneOrInts:
        """``"3"`` -> ``3``, which stands for all; ``"2,4,8"`` -> ``(2, 4, 8)``, one each."""

        def __new__(cls, text: str) -> int | tuple[int, ...]:
            return Ints(text) if "," in text else int(text)

    class AutoInts:
        """As `Ints`, or ``"auto"``."""

        def __new__(cls, text: str) -> tuple[int, ...] | str:
            return text if text == AUTO else Ints(text)

    class AutoInt:
        """An integer, or ``"auto"``."""

        def __new__(cls, text: str) -> int | str:
            return text if text == AUTO else int(text)

    class AutoFloat:
        """A float, or ``"auto"``."""

        def __new__(cls, text: str) -> float | str:
            return text if text == AUTO else float(text)

    class Table:
        """``'{"a": 1}'`` -> ``{"a": 1}``: a table, as JSON on the command line."""

        def __new__(cls, text: str) -> dict[str, Any]:
            table = json.loads(text)
            if not isinstance(table, dict):
                raise ValueError(text)
            return table


COMMA_LISTS = (Ints, Floats, OneOrInts, AutoInts)
"""Converters whose value may be a tuple; files may spell it as a list."""


def knob(default: Any, help: str, *, aliases: Sequence[str] = ()) -> Any:
    """A dataclass field: its default, the line ``--help`` shows, other spellings of its flag."""
    metadata: dict[str, Any] = {"help": help}
    if aliases:
        metadata["aliases"] = [f"--{alias}" for alias in aliases]
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def require(condition: bool, name: str, value: object, must: str) -> None:
    """Raise a `UsageError` that names the flag, its value and what it must be.

    >>> require(False, "num_channels", -3, "be a positive multiple of 32")
    Traceback (most recent call last):
    diff_dalle.errors.UsageError: --num_channels is -3: it must be a positive multiple of 32
    """
    if not condition:
        raise UsageError(f"--{name} is {value!r}: it must {must}")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a `UsageError` unless ``value`` is one of ``choices``."""
    require(value in choices, name, value, f"be one of {', '.join(choices)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the most alike of ``known``, or an empty text."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
