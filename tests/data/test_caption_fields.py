"""Which captions a sample has."""

from __future__ import annotations

import json

import pytest

from diff_dalle.data.batch import BadSample
from diff_dalle.data.caption_fields import Captions, read_captions


def meta(**fields: object) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        (b"a cat\n", None, Captions("a cat", ["a cat"])),
        (b"\xef\xbb\xbfa cat", None, Captions("a cat", ["a cat"])),
        (b"text", meta(caption="field"), Captions("text", ["text"])),
        (None, meta(caption="field"), Captions("field", ["field"])),
        (b" \n", meta(caption="field"), Captions("field", ["field"])),
        (None, meta(caption=["x", "y"]), Captions("x", ["x"])),
        (None, meta(captions=["x", "", 3, "y"]), Captions("x", ["x", "y"])),
        (b"text", meta(captions=["x", "고양이"]), Captions("text", ["x", "고양이"])),
        (None, meta(caption="field", captions=["x", "y"]), Captions("field", ["x", "y"])),
        (b"text", meta(captions=[], caption=None), Captions("text", ["text"])),
        (b"text", b"{broken", Captions("text", ["text"])),
        (b"text", meta(width="x" * 2**21), Captions("text", ["text"])),
        (b"text", b"[1, 2]", Captions("text", ["text"])),
        (b"text", b"[" * 100_000, Captions("text", ["text"])),
    ],
)
def test_the_captions_of_a_sample(
    text: bytes | None, fields: bytes | None, expected: Captions
) -> None:
    assert read_captions(text, fields) == expected


def test_a_named_field_outranks_the_text() -> None:
    fields = meta(cap=["one", "two"], caption="other")
    assert read_captions(b"text", fields, "cap") == Captions("one", ["one", "two"])
    for missing in (fields, None):
        with pytest.raises(BadSample, match="no caption"):
            read_captions(b"text", missing, "missing")
    assert read_captions(b"x" * 2**21, fields, "cap").first == "one"


@pytest.mark.parametrize(
    ("text", "fields", "reason"),
    [
        (None, None, "no caption"),
        (None, meta(width=3), "no caption"),
        (b"  \n", None, "empty caption"),
        (b"caf\xe9", meta(caption="field"), "caption not UTF-8"),
        (None, b"caf\xe9", "caption not UTF-8"),
        (None, b"{broken", "broken json"),
        (None, b"[" * 100_000, "broken json"),
        (b"x" * 2**21, None, "caption too long"),
        (None, meta(caption="x" * 2**21), "caption too long"),
    ],
)
def test_reasons(text: bytes | None, fields: bytes | None, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        read_captions(text, fields)
    assert str(caught.value) == reason
