"""Parquet files and Hugging Face data sets: the same records from any start."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diff_dalle.data.packing.columnar import HuggingFaceSource, ParquetSource
from diff_dalle.data.packing.records import Columns, Record
from diff_dalle.errors import UsageError

Write = Callable[..., Path]
USUAL = Columns(None, None)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(name: str, columns: dict[str, Any], rows_per_group: int = 3) -> Path:
        import pyarrow
        from pyarrow import parquet

        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_per_group)
        return path

    return make


def rows(count: int) -> dict[str, list[Any]]:
    return {
        "image": [{"bytes": b"picture %d" % row, "path": "x.png"} for row in range(count)],
        "caption": [f"그림 {row}" for row in range(count)],
        "stars": list(range(count)),
        "score": [float("nan")] * count,
        "vector": [[0.5, 0.25]] * count,
        "raw": [b"thumb"] * count,
    }


def parquet(*entries: Path, columns: Columns = USUAL) -> ParquetSource:
    return ParquetSource([str(entry) for entry in entries], columns)


def test_row_groups_are_streamed_from_any_row(write: Write) -> None:
    source = parquet(write("b.parquet", rows(8)), write("a.parquet", rows(4)))
    records = list(source.records(0))
    assert source.total == 12 == len(records)
    assert records[7] == Record(
        source="b.parquet:7", image=b"picture 7", captions=["그림 7"], extra={"stars": 7}
    )
    assert records[8].source == "a.parquet:0"
    for start in range(13):
        assert list(source.records(start)) == records[start:]


def test_what_is_not_needed_is_not_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow.parquet import ParquetFile

    read, groups = ParquetFile.iter_batches, []

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        groups.extend(options["row_groups"])
        assert options["columns"] == ["image", "caption", "stars", "score"]
        return read(self, *args, **options)

    monkeypatch.setattr(ParquetFile, "iter_batches", noted)
    records = list(parquet(write("t.parquet", rows(8))).records(4))
    assert [record.extra["stars"] for record in records] == [4, 5, 6, 7] and groups == [1, 2]


def test_folders_are_read_in_the_order_of_names(write: Write, tmp_path: Path) -> None:
    for name in ("d/2.parquet", "d/1.parquet"):
        write(name, rows(1))
    records = list(parquet(tmp_path / "d").records(0))
    assert [record.source for record in records] == ["1.parquet:0", "2.parquet:0"]


def test_images_as_bytes_paths_or_neither(write: Write) -> None:
    path = write(
        "t.parquet",
        {
            "image": [
                {"bytes": None, "path": "a.png"},
                {"bytes": b"picture", "path": None},
                {"bytes": None, "path": "../a.png"},
                None,
            ],
            "text": [["a", "b"], [], None, ["c"]],
        },
    )
    records = list(parquet(path).records(0))
    assert [record.image for record in records] == [(path.parent / "a.png",), b"picture", (), ()]
    assert [r.fault for r in records] == ["", "", "path outside its folder", "no image named"]
    assert [record.captions for record in records] == [["a", "b"], [], [], ["c"]]
    named = write("n.parquet", {"jpg": [b"picture"], "path": ["a.png"], "alt": ["x"]})
    (record,) = parquet(named, columns=Columns("jpg", "alt")).records(0)
    assert (record.image, record.captions, record.extra) == (b"picture", ["x"], {"path": "a.png"})


def test_a_struct_of_bytes_is_the_image_whatever_its_name(write: Write) -> None:
    columns = rows(1)
    columns["picture"] = columns.pop("image")
    (record,) = parquet(write("t.parquet", columns)).records(0)
    assert record.image == b"picture 0"


def test_useless_parquet_is_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no caption column.*\(there are: image, name\)"):
        parquet(write("t.parquet", {"image": [b""], "name": ["a"]}))
    with pytest.raises(UsageError, match="no row in any file"):
        parquet(write("t.parquet", {"image": [], "text": []}))
    with pytest.raises(UsageError, match="none: no such file, or a folder without"):
        parquet(tmp_path / "none")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UsageError, match="t.parquet: cannot be read"):
        parquet(tmp_path / "t.parquet")


def test_other_rows_have_another_identity(write: Write) -> None:
    identities = [parquet(write("t.parquet", rows(count))).identity for count in (4, 4, 5)]
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize(("package", "flag"), [("pyarrow", "parquet"), ("datasets", "hf_dataset")])
def test_a_missing_package_is_named(
    package: str, flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "t.parquet").write_bytes(b"")
    with pytest.raises(UsageError, match=rf"--{flag} needs the package {package}: pip install"):
        if flag == "parquet":
            parquet(tmp_path)
        else:
            HuggingFaceSource(str(tmp_path), "train", USUAL)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The package, with its cache in a folder of the test and its bars off."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def saved(hub: Any, folder: Path, picture: Callable[..., bytes], count: int = 5) -> Path:
    content = {
        "thumb": [{"bytes": b"no picture", "path": None}] * count,  # decoding it would fail
        "photo": [{"bytes": picture(90 + row), "path": f"{row}.png"} for row in range(count)],
        "caption": [[f"a {row}", f"b {row}"] for row in range(count)],
        "label": list(range(count)),
    }
    dataset = hub.Dataset.from_dict(content)
    for name in ("photo", "thumb"):
        dataset = dataset.cast_column(name, hub.Image())
    hub.DatasetDict({"test": dataset}).save_to_disk(folder / "all")
    dataset.save_to_disk(folder / "one")
    return folder


def test_a_data_set_saved_to_disk(hub: Any, tmp_path: Path, picture: Callable[..., bytes]) -> None:
    folder = saved(hub, tmp_path, picture)
    source = HuggingFaceSource(str(folder / "all"), "test", Columns("photo", None))
    records = list(source.records(0))
    assert source.total == 5
    assert records[3] == Record(
        source="row 3", image=picture(93), captions=["a 3", "b 3"], extra={"label": 3}
    )
    assert list(source.records(2)) == records[2:]
    first = next(HuggingFaceSource(str(folder / "one"), "train", USUAL).records(0))
    assert first.image == b"no picture"  # of the first column of pictures
    with pytest.raises(UsageError, match="no split train, --hf_split is one of test"):
        HuggingFaceSource(str(folder / "all"), "train", USUAL)
    with pytest.raises(UsageError, match=r"no column 'alt'.*\(there are: thumb, photo, caption"):
        HuggingFaceSource(str(folder / "one"), "train", Columns(None, "alt"))


def test_a_folder_that_the_package_recognises(
    hub: Any, tmp_path: Path, drawings: Callable[..., Path]
) -> None:
    folder = drawings(tmp_path / "D", 2, texts=False)
    (folder / "metadata.csv").write_text("file_name,text\n001.png,one\n000.png,nil\n")
    records = list(HuggingFaceSource(str(folder), "train", USUAL).records(0))
    assert sorted((r.captions, r.image) for r in records) == [
        (["nil"], (folder / "000.png",)),
        (["one"], (folder / "001.png",)),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="--hf_dataset .*empty: cannot be opened"):
        HuggingFaceSource(str(tmp_path / "empty"), "train", USUAL)
