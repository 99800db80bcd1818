"""JSON of ours: readable text, any file name, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diff_dalle.data.json_files import json_bytes, write_json


def test_text_stands_as_it_is_and_what_is_no_unicode_reads_back() -> None:
    content = {"caption": "고양이", "source": b"caf\xe9".decode("utf-8", "surrogateescape")}
    assert json_bytes(content) == '{"caption": "고양이", "source": "caf\\udce9"}'.encode()
    assert json.loads(json_bytes(content)) == content


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n'

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
