"""Tables of captions, in every spelling that users have them in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diff_dalle.data.packing import tables
from diff_dalle.data.packing.records import Columns, ListedSource, Record
from diff_dalle.data.packing.tables import table_source
from diff_dalle.errors import UsageError

Write = Callable[..., Path]
USUAL = Columns(None, None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png", "c d.v1.png", "그림.png"):
        (folder / name).write_bytes(b"picture")
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(name: str, content: Any, encoding: str = "utf-8") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        path.write_bytes(text.encode(encoding))
        return path

    return make


def read(
    images: Path, *files: Path, image: str | None = None, caption: str | None = None
) -> list[Record]:
    return list(table_source(files, images, Columns(image, caption)).records(0))


def captions(records: list[Record]) -> dict[str, Any]:
    return {record.source: record.captions for record in records}


def test_json_lines(images: Path, write: Write) -> None:
    lines = [
        {"file_name": "그림.png", "caption": "한 줄\u2028둘", "stars": 4, "box": [1, 2]},
        {"file_name": "c d.v1.png", "caption": ["one", "", "two"], "stars": float("nan")},
    ]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    records = read(images, write("t.jsonl", text + "\n"))
    assert captions(records) == {"그림.png": ["한 줄\u2028둘"], "c d.v1.png": ["one", "two"]}
    assert [record.extra for record in records] == [{"stars": 4}, {}]
    assert records[0].image == (images / "그림.png", images.parent / "그림.png")


def test_csv_with_a_byte_order_mark_and_quotes(images: Path, write: Write) -> None:
    text = 'image,text,credit\r\na.png,"red, ""round""\nthing",me\r\nb.png,파란 별,\r\n'
    records = read(images, write("t.csv", text, "utf-8-sig"))
    assert captions(records) == {"a.png": ['red, "round"\nthing'], "b.png": ["파란 별"]}
    assert records[0].extra == {"credit": "me"}


def test_tsv_and_a_json_list(images: Path, write: Write) -> None:
    tsv = read(images, write("t.tsv", "path\tcaption\na.png\tone, two\n"))
    assert captions(tsv) == {"a.png": ["one, two"]}
    listed = read(images, write("t.json", [{"filename": "b.png", "captions": ["x", "y"]}]))
    assert captions(listed) == {"b.png": ["x", "y"]}
    spelled = read(images, write("t.csv", 'path,text\na.png,"[""x"", ""y""]"\n'))
    assert captions(spelled) == {"a.png": ["x", "y"]}


def test_rows_of_one_image_are_one_record(images: Path, write: Write) -> None:
    one = write("en.csv", "image,caption\na.png,first\nb.png,other\n./a.png,second\n")
    two = write("ko.tsv", "path\ttext\nb.png\t둘\na.png\t하나\n")
    assert captions(read(images, one, two)) == {
        "a.png": ["first", "second", "하나"],
        "b.png": ["other", "둘"],
    }


def coco(texts: list[tuple[int, int, str]], prefix: str = "") -> dict[str, Any]:
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 7, "file_name": f"{prefix}b.png", "license": 3},
            {"id": 4, "file_name": f"{prefix}a.png", "license": 1},
        ],
        "annotations": [{"id": i, "image_id": j, "caption": text} for i, j, text in texts],
    }


def test_coco_languages_are_merged_by_file_name(images: Path, write: Write) -> None:
    english = write("en.json", coco([(12, 4, "a late one"), (5, 4, "an early one"), (6, 7, "b")]))
    korean = write("ko.json", coco([(1, 7, "비"), (2, 4, "에이")]))
    records = read(images, english, korean)
    assert captions(records) == {
        "b.png": ["b", "비"],
        "a.png": ["an early one", "a late one", "에이"],
    }
    assert records[0].extra == {"id": 7, "license": 3}


def test_coco_that_is_something_else(images: Path, write: Write) -> None:
    boxes = {"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "bbox": []}]}
    with pytest.raises(UsageError, match="not COCO captions, images need id"):
        read(images, write("boxes.json", boxes))
    with pytest.raises(UsageError, match="neither a list of objects nor COCO"):
        read(images, write("other.json", {"a.png": "text"}))


def test_columns_by_name(images: Path, write: Write) -> None:
    table = write("t.csv", "name,caption,kurz\na.png,long,short\n")
    records = read(images, table, image="name", caption="kurz")
    assert captions(records) == {"a.png": ["short"]} and records[0].extra == {"caption": "long"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (USUAL, r"t.csv: no image column, name one with --image_column \(there are: name, kurz\)"),
        (Columns("name", None), "no caption column, name one with --caption_column"),
        (Columns("nam", "kurz"), r"no column 'nam', .* \(there are: name, kurz\)"),
    ],
)
def test_a_missing_column_is_named(
    images: Path, write: Write, columns: Columns, message: str
) -> None:
    table = write("t.csv", "name,kurz\na.png,short\n")
    with pytest.raises(UsageError, match=message):
        table_source([table], images, columns)


def test_paths_start_at_the_images_or_at_the_table(images: Path, write: Write) -> None:
    absolute = str(images / "a.png")
    rows = [absolute, "../images/b.png", "x/../a.png", "x/../../b.png", ""]
    lines = [json.dumps({"file": row, "caption": row or "none"}) for row in rows]
    records = read(images, write("deep/t.jsonl", "\n".join(lines)))
    assert [record.fault for record in records] == [
        "",
        "path outside its folder",
        "",
        "path outside its folder",
        "no image named",
    ]
    assert records[0].image == (Path(absolute),)
    assert records[2].image == (images / "a.png", images.parent / "deep" / "a.png")


def test_broken_rows_are_faults_with_their_line(images: Path, write: Write) -> None:
    lines = write("t.jsonl", '{"file": "a.png", "text": "x"}\n{"file": \n[1]\n')
    assert [(r.source, r.fault) for r in read(images, lines)] == [
        ("a.png", ""),
        ("t.jsonl:2", "malformed row"),
        ("t.jsonl:3", "malformed row"),
    ]
    commas = write("t.csv", "file,text\na.png,x\nb.png,cut, in two\n")
    assert [(r.source, r.fault) for r in read(images, commas)][1:] == [("t.csv:3", "malformed row")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", "x", "unknown kind of table, use one of .csv, .json, .jsonl, .tsv"),
        ("t.json", "{", "not JSON"),
        ("t.jsonl", "{\n", "no row with named columns"),
        ("t.csv", "file,text\n", "no row with named columns"),
        ("t.csv", "file,text\nnone.png,x\n", "none of the 1 images is there, e.g. none.png"),
        ("t.csv", "file,text\na.png,\n", "no captions at all"),
        ("t.csv", "file,text\n,x\n", "no image found"),
    ],
)
def test_useless_tables_are_refused(
    images: Path, write: Write, name: str, content: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read(images, write(name, content))


def test_unreadable_tables_are_refused(
    images: Path, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="missing.csv: cannot be read"):
        read(images, tmp_path / "missing.csv")
    with pytest.raises(UsageError, match="not UTF-8"):
        read(images, write("t.csv", "file,text\na.png,별\n", "cp949"))
    monkeypatch.setattr(tables, "_LONGEST_CELL", 8)
    with pytest.raises(UsageError, match="t.csv, after line 1: field larger than field limit"):
        read(images, write("t.csv", "file,text\na.png,more than eight\n"))


def test_another_table_has_another_identity(images: Path, write: Write) -> None:
    def identity(text: str) -> dict[str, Any]:
        table = write("t.csv", f"file,text\na.png,{text}\nb.png,y\n")
        source: ListedSource = table_source([table], images, USUAL)
        assert source.total == 2
        assert [record.source for record in source.records(1)] == ["b.png"]
        return source.identity

    assert identity("x") == identity("x") != identity("z")
