"""What the values of --data_dir stand for."""

from pathlib import Path

import pytest

from diff_dalle.data.sources import Source, parse_sources
from diff_dalle.errors import UsageError


def test_entries_without_weights_are_one_pool() -> None:
    assert parse_sources(["a", "b/{0..3}.tar"], None, "data_dir") == [
        Source("a b/{0..3}.tar", ("a", "b/{0..3}.tar"))
    ]


def test_weights_make_sources_of_entries(tmp_path: Path) -> None:
    assert parse_sources(["a=0.7", "b=3e-1"], None, "data_dir") == [
        Source("a", ("a",), 0.7),
        Source("b", ("b",), 0.3),
    ]
    (tmp_path / "x=1").mkdir()  # what exists is a path
    path = str(tmp_path / "x=1")
    assert parse_sources([path], None, "data_dir")[0].paths == (path,)
    assert parse_sources([f"{path}=2"], None, "data_dir") == [Source(path, (path,), 2.0)]
    assert parse_sources(["a=b"], None, "data_dir")[0].paths == ("a=b",)


def test_names_stand_for_roots() -> None:
    table = {"coco": {"root": "/d/coco", "length": 10}, "mine": "/d/mine"}
    assert parse_sources(["coco=2", "mine=1"], table, "data_dir") == [
        Source("coco", ("/d/coco",), 2.0, 10),
        Source("mine", ("/d/mine",), 1.0),
    ]
    assert parse_sources(["coco"], table, "data_dir") == [Source("coco", ("/d/coco",), length=10)]
    assert parse_sources(["coco", "mine"], table, "data_dir")[0].length == 0
    assert parse_sources(["./coco"], table, "data_dir")[0].paths == ("./coco",)


@pytest.mark.parametrize(
    ("entries", "table", "message"),
    [
        (["a=1", "b"], None, "b has no weight, but others do: write b=1"),
        (["a=0"], None, "the weight must be a positive number"),
        (["a=-1"], None, "the weight must be a positive number"),
        (["a=nan"], None, "the weight must be a positive number"),
        (["a=1000", "b=0.1"], None, "b=0.1: its share is under 1 of 1000"),
        (
            ["coca"],
            {"coco": "/d"},
            "coca: neither a path nor a name in datasets; did you mean",
        ),
        (["a"], {"coco": {"length": 3}}, "coco must be a folder, or a table with root and length"),
        (["a"], {"coco": {"root": "/d", "size": 3}}, "coco must be a folder"),
        (["a"], {"coco": ["/d"]}, "coco must be a folder"),
        (["a"], {"coco": {"root": "/d", "length": "many"}}, "coco must be a folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    entries: list[str], table: dict[str, object] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        parse_sources(entries, table, "data_dir")
