"""A folder of pictures: texts beside them, a table in it, or train and val below it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from diff_dalle.data.packing.folders import folder_source
from diff_dalle.data.packing.records import Columns, Record
from diff_dalle.errors import UsageError

Drawings = Callable[..., Path]
USUAL = Columns(None, None)


def read(folder: Path, start: int = 0) -> list[Record]:
    return list(folder_source(folder, USUAL).records(start))


def test_texts_beside_the_pictures_in_the_order_of_paths(tmp_path: Path) -> None:
    names = ["b.v2.JPG", "한글 이름.webp", "deep/er/x.gif", "a.png", "lone.bmp", "deep.tiff"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")
        if name != "lone.bmp":
            path.with_name(os.path.splitext(path.name)[0] + ".txt").write_text("a caption")
    for other in (".hidden.png", "notes.pdf", ".cache/thumb.png"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(b"")
    records = read(tmp_path)
    assert [record.source for record in records] == sorted(names)
    assert all(record.image == (tmp_path / record.source,) for record in records)
    assert [record.captions for record in records] == [
        tmp_path / "a.txt",
        tmp_path / "b.v2.txt",
        tmp_path / "deep.txt",
        tmp_path / "deep" / "er" / "x.txt",
        [],
        tmp_path / "한글 이름.txt",
    ]
    assert [record.source for record in read(tmp_path, 4)] == sorted(names)[4:]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.jsonl", '{"file": "001.png", "text": "one"}\n'),
        ("captions.csv", "file,text\n001.png,one\n"),
        ("captions.tsv", "file\ttext\n001.png\tone\n"),
        ("metadata.jsonl", '{"file_name": "001.png", "text": "one"}\n'),
        ("metadata.csv", "file_name,text\n001.png,one\n"),
    ],
)
def test_a_table_in_the_folder(tmp_path: Path, drawings: Drawings, name: str, text: str) -> None:
    folder = drawings(tmp_path / "D", 3, texts=False)
    (folder / name).write_text(text)
    (record,) = read(folder)
    assert (record.source, record.captions, record.split) == ("001.png", ["one"], None)


def test_text_files_come_before_a_table(tmp_path: Path, drawings: Drawings) -> None:
    folder = drawings(tmp_path / "D", 2)
    (folder / "captions.csv").write_text("file,text\n001.png,one\n")
    assert [record.captions for record in read(folder)] == [folder / "000.txt", folder / "001.txt"]


def test_folders_named_train_and_val_decide(tmp_path: Path, drawings: Drawings) -> None:
    drawings(tmp_path / "D" / "train" / "cats", 2)
    val = drawings(tmp_path / "D" / "val", 2, texts=False)
    (val / "metadata.csv").write_text("file_name,text\n001.png,one\n")
    assert [(record.source, record.split) for record in read(tmp_path / "D")] == [
        ("train/cats/000.png", "train"),
        ("train/cats/001.png", "train"),
        ("val/001.png", "val"),
    ]
    (tmp_path / "D" / "other").mkdir()
    assert {record.split for record in read(tmp_path / "D")} == {None}


def test_without_images_or_captions_it_is_refused(tmp_path: Path, drawings: Drawings) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"--images .*empty: no image found"):
        read(tmp_path / "empty")
    folder = drawings(tmp_path / "D", 1, texts=False)
    (folder / "000.jpg.txt").write_text("another name")
    with pytest.raises(UsageError, match="no captions at all; each image needs a .txt"):
        read(folder)
