"""Which captions a sample of a shard has, and which one a visit takes.

img2dataset writes the same text to ``.txt`` and to the field ``caption`` of ``.json``; our own
shards also list all phrasings in the field ``captions``.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from diff_dalle.data.batch import BadSample

DEFAULT_KEY = "caption"
_LIST_KEY = "captions"
_MAX_BYTES = 2**20


class Captions(NamedTuple):
    """The captions of one sample.

    Attributes:
        first: what an evaluation takes.
        choices: one of these is drawn at each visit in training; never empty.
    """

    first: str
    choices: list[str]


def read_captions(text: bytes | None, meta: bytes | None, key: str = DEFAULT_KEY) -> Captions:
    """The captions in the ``.txt`` and ``.json`` members of a sample.

    The first caption is the text, else the field ``caption``, else the first of the list
    ``captions``; the choices are that list where there is one. Another ``key`` names the one
    field (a text or a list of texts) that counts; the text member is then ignored.

    Args:
        text: the bytes of the ``.txt`` member, None without one.
        meta: the bytes of the ``.json`` member, None without one.
        key: the field of the JSON object.
    Raises:
        BadSample: "no caption", "empty caption", "caption not UTF-8", "caption too long" (the
            member has over 1 MiB) or "broken json". What is wrong with a JSON does not matter
            where the text says all that is needed.
    """
    if key != DEFAULT_KEY:
        named = _texts(_fields(meta).get(key))
        return Captions(_first(named, None), named)
    plain = _texts(_decode(text)) if text is not None else []
    try:
        fields = _fields(meta)
    except BadSample:
        if not plain:
            raise
        fields = {}  # the text member says all that is needed
    listed = _texts(fields.get(_LIST_KEY))
    first = _first(plain or _texts(fields.get(key)) or listed, text)
    return Captions(first, listed or [first])


def _first(captions: list[str], source: bytes | None) -> str:
    if not captions:
        raise BadSample("no caption" if source is None else "empty caption")
    return captions[0]


def _decode(text: bytes) -> str:
    if len(text) > _MAX_BYTES:
        raise BadSample("caption too long")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("caption not UTF-8") from error


def _fields(meta: bytes | None) -> dict[str, Any]:
    if meta is None:
        return {}
    try:
        fields = json.loads(_decode(meta))
    except (ValueError, RecursionError) as error:
        raise BadSample("broken json") from error
    return fields if isinstance(fields, dict) else {}


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [one.strip() for one in values if isinstance(one, str) and one.strip()]
