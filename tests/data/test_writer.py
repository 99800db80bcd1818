"""Shards: the same bytes from any number of processes, readable by webdataset, never half there."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diff_dalle.data.captions import captions
from diff_dalle.data.scenes import sample_scene
from diff_dalle.data.writer import Sample, write_shards


def sample(index: int) -> Sample:
    scene = sample_scene(0, index)
    return Sample(key=f"s{index:03d}", captions=captions(scene), truth=scene.truth(), picture=scene)


def write(folder: Path, **changes: Any) -> dict[str, int]:
    settings = {"image_size": 32, "samples_per_shard": 16, **changes}
    return write_shards(folder, sample, 40, **settings)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    write(folder)
    return folder


def test_any_number_of_workers_writes_the_same_bytes(alone: Path, tmp_path: Path) -> None:
    write(tmp_path, num_workers=2)
    assert hashes(tmp_path) == hashes(alone)
    assert sorted(hashes(alone)) == ["00000.tar", "00001.tar", "00002.tar"]


def test_a_relative_folder_is_written_where_it_lies(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("out/train"))
    assert hashes(tmp_path / "out" / "train") == hashes(alone)
    assert sorted(path.name for path in tmp_path.rglob("*.tar")) == sorted(hashes(alone))


def test_members_carry_no_time_and_no_owner(alone: Path) -> None:
    with tarfile.open(alone / "00002.tar") as archive:
        members = archive.getmembers()
    assert [member.name for member in members[:3]] == ["s032.png", "s032.txt", "s032.json"]
    assert len(members) == 8 * 3
    for member in members:
        owner = (member.uid, member.gid, member.uname, member.gname)
        assert (member.mtime, member.mode, *owner) == (0, 0o644, 0, 0, "", "")


def test_webdataset_reads_what_was_drawn(alone: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import webdataset

    shards = [str(path) for path in sorted(alone.iterdir())]
    read = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [row["__key__"] for row in read] == [f"s{index:03d}" for index in range(40)]
    for index in (0, 17, 39):
        scene, row = sample_scene(0, index), read[index]
        facts = json.loads(row["json"])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["png"]))), scene.draw(32))
        assert row["txt"].decode() == facts["caption"] == captions(scene)[0]
        assert facts["captions"] == captions(scene)
        assert facts["background"] == scene.background
        assert facts["objects"][0]["centre"] == list(scene.objects[0].centre)


def test_jpeg_keeps_the_colours(tmp_path: Path) -> None:
    write(tmp_path, image_format="jpg", image_size=64)
    with tarfile.open(tmp_path / "00000.tar") as archive:
        content = archive.extractfile("s000.jpg")
        assert content is not None
        picture = np.asarray(Image.open(content), dtype=np.float64)
    assert np.abs(picture - sample_scene(0, 0).draw(64)).mean() < 2


def test_an_interrupted_run_goes_on(alone: Path, tmp_path: Path) -> None:
    calls = []

    def fails_once(index: int) -> Sample:
        calls.append(index)
        if index == 20 and len(calls) < 30:
            raise KeyboardInterrupt
        return sample(index)

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, fails_once, 40, image_size=32, samples_per_shard=16)
    # The half-written shard has another name, which no reader takes for a shard.
    assert sorted(hashes(tmp_path)) == ["00000.tar", "00001.tar.part"]
    done = (tmp_path / "00000.tar").stat().st_mtime_ns
    write(tmp_path)
    assert hashes(tmp_path) == hashes(alone)
    assert (tmp_path / "00000.tar").stat().st_mtime_ns == done


def test_sizes_are_reported(alone: Path, tmp_path: Path) -> None:
    sizes = write(tmp_path)
    assert sizes == {path.name: path.stat().st_size for path in alone.iterdir()}
