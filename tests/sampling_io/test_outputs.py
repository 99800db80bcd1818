"""Output files: whole or not at all, numbered, readable by numpy and people."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import tracemalloc
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.outputs import grid_shape, make_grid, make_output_folder, publish
from diff_dalle.sampling_io.store import Pictures, PictureStore, map_pictures, read_pictures
from diff_dalle.sampling_io.writer import OutputWriter


def pictures(count: int, size: int, seed: int = 0) -> Pictures:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


REQUEST = "ab" * 32


def write_run(
    folder: Path, stages: list[Pictures], *, png: bool = False, batch_size: int = 1
) -> list[Path]:
    count = len(stages[0])
    writer = OutputWriter.open(folder, REQUEST, count, [stage.shape[1:3] for stage in stages])
    with writer.session(rank=0):
        missing = writer.share(0, 1)[::-1]  # any order
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            writer.write(part, [stage[part] for stage in stages], part, rank=0)
        assert writer.recorded() == {index: index for index in range(count)}
        captions = [f"caption {n}" for n in range(count)]
        return publish(writer, captions, {"seed": 0}, grid_size=20, png=png)


def test_every_file_of_a_run(tmp_path: Path) -> None:
    small, large = pictures(5, 4), pictures(5, 8, seed=1)
    places = write_run(tmp_path, [small, large], png=True)
    assert sorted(os.listdir(tmp_path)) == sorted(place.name for place in places)
    assert {place.name for place in places} == {
        "samples_5x4x4x3.npz",
        "samples_5x4x4x3.txt",
        "samples_5x8x8x3.npz",
        "samples_5x8x8x3.txt",
        "samples_5x8x8x3.json",
        "samples_5x8x8x3",
        "grid.jpg",
        "grid.txt",
    }
    assert places[0].name == "samples_5x8x8x3.npz"
    for name, expected in (("samples_5x4x4x3", small), ("samples_5x8x8x3", large)):
        with np.load(tmp_path / f"{name}.npz") as archive:
            assert archive.files == ["arr_0"]
            np.testing.assert_array_equal(archive["arr_0"], expected)
        lines = (tmp_path / f"{name}.txt").read_text().splitlines()
        assert lines == [f"caption {n}" for n in range(5)]
    with Image.open(tmp_path / "samples_5x8x8x3" / "000003.png") as image:
        np.testing.assert_array_equal(np.asarray(image), large[3])
    manifest = json.loads((tmp_path / "samples_5x8x8x3.json").read_text())
    assert manifest["seed"] == 0 and "samples_5x4x4x3.npz" in manifest["files"]


def test_the_grid_shows_whole_unscaled_pictures(tmp_path: Path) -> None:
    stage = pictures(5, 8)
    write_run(tmp_path, [stage])  # 20 px hold 2 pictures of 8 px an axis
    with Image.open(tmp_path / "grid.jpg") as grid:
        assert grid.size == (16, 16)
    assert (tmp_path / "grid.txt").read_text().splitlines() == [f"caption {n}" for n in range(4)]
    exact = np.asarray(make_grid(list(stage[:4]), 2, 2))
    np.testing.assert_array_equal(exact[8:, :8], stage[2])  # reading order: third is lower left


@pytest.mark.parametrize(
    ("count", "size", "grid_size", "shape"),
    [
        (100, 64, 512, (8, 8)),
        (4, 1024, 512, (1, 1)),  # one whole image, never scaled down
        (4, 1024, 2048, (2, 2)),
        (3, 1024, 2048, (2, 2)),
        (5, 64, 512, (1, 5)),
        (1, 64, 64, (1, 1)),
    ],
)
def test_grid_shape(count: int, size: int, grid_size: int, shape: tuple[int, int]) -> None:
    assert grid_shape(count, (size, size), grid_size) == shape


def test_a_grid_of_wide_pictures_has_more_rows() -> None:
    assert grid_shape(9, (64, 128), 256) == (4, 2)
    assert grid_shape(9, (128, 64), 256) == (2, 4)


def test_repeated_outputs_are_numbered_and_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("a run's")
    first, second = pictures(2, 4), pictures(2, 4, seed=1)
    write_run(tmp_path, [first])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "grid.txt").unlink()  # one free name does not make the number free
    before.pop(tmp_path / "grid.txt")
    names = {place.name for place in write_run(tmp_path, [second])}
    assert {"samples_2x4x4x3_2.npz", "samples_2x4x4x3_2.txt", "grid_2.jpg", "grid_2.txt"} < names
    # Another size of run takes the same next number for all its files.
    assert "samples_3x4x4x3_3.npz" in {p.name for p in write_run(tmp_path, [pictures(3, 4)])}
    assert {path: path.read_bytes() for path in before} == before
    np.testing.assert_array_equal(read_pictures(tmp_path / "samples_2x4x4x3.npz"), first)
    np.testing.assert_array_equal(read_pictures(tmp_path / "samples_2x4x4x3_2.npz"), second)


def test_captions_and_manifest_survive_awkward_prompts(tmp_path: Path) -> None:
    prompts = ["two\nlines", "lone \ud800", "a\u2028b", "파란 별"]
    writer = OutputWriter.open(tmp_path, REQUEST, 4, [(4, 4)])
    writer.write(range(4), [pictures(4, 4)], [0] * 4, rank=0)
    publish(writer, prompts, {"images": [{"prompt": text} for text in prompts]}, grid_size=64)
    lines = (tmp_path / "samples_4x4x4x3.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and lines[3] == "파란 별"
    manifest = json.loads((tmp_path / "samples_4x4x4x3.json").read_text())
    assert [image["prompt"] for image in manifest["images"]] == prompts


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path: Path) -> None:
    count, size = 400, 128  # 20 MB
    writer = OutputWriter.open(tmp_path, REQUEST, count, [(size, size)])
    few = pictures(8, size)
    tracemalloc.start()
    for start in range(0, count, 8):
        writer.write(range(start, start + 8), [few], [0] * 8, rank=0)
    publish(writer, ["x"] * count, {}, grid_size=size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20
    assert read_pictures(tmp_path / f"samples_{count}x{size}x{size}x3.npz").shape[0] == count


def test_a_kill_at_any_moment_costs_no_picture_and_publishes_no_wrong_one(tmp_path: Path) -> None:
    """A child dies at every traced call of a run in turn; the same run goes on from there."""
    stage = pictures(2, 16)
    found = set()
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        child = os.fork()
        if child == 0:
            _die_at_call(step)
            write_run(folder, [stage])
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        final = folder / "samples_2x16x16x3.npz"
        found.add(final.exists())
        killed = os.WIFSIGNALED(status)
        if killed:
            write_run(folder, [stage])
            assert not list(folder.glob(".samples_*"))
        # npz and grid with their captions, and a manifest; once more where all had been moved.
        assert len(list(folder.iterdir())) in (5, 10)
        for npz in folder.glob("*.npz"):
            np.testing.assert_array_equal(read_pictures(npz), stage)
        if not killed:  # this child outlived its last call
            break
    assert status == 0 and step > 20 and found == {True, False}


def test_what_was_drawn_is_not_drawn_again(tmp_path: Path) -> None:
    """Whatever the number of ranks; half a line of a record does not count."""
    writer = OutputWriter.open(tmp_path, REQUEST, 7, [(4, 4)])
    assert [writer.share(rank, 3) for rank in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]
    writer.write([2, 3], [pictures(2, 4)], [0, 5], rank=1)
    writer.write([4], [pictures(1, 4)], [1], rank=2)
    with open(writer.work / "done_2.txt", "a") as record:
        record.write("5 1 don")
    writer.lock.close()  # type: ignore[union-attr]
    writer = OutputWriter.open(tmp_path, REQUEST, 7, [(4, 4)])
    assert writer.kept == {2: 0, 3: 5, 4: 1} and "3 of 7" in writer.notes()[0]
    assert [writer.share(rank, 2) for rank in range(2)] == [[0, 1], [5, 6]]
    writer.write([6], [pictures(1, 4)], [3], rank=2)
    assert writer.recorded() == {2: 0, 3: 5, 4: 1, 6: 3}


def test_only_the_same_request_goes_on(tmp_path: Path) -> None:
    first = OutputWriter.open(tmp_path, REQUEST, 2, [(4, 4)])
    first.write([0], [pictures(1, 4)], [0], rank=0)
    first.lock.close()  # type: ignore[union-attr]
    other = OutputWriter.open(tmp_path, "cd" * 32, 2, [(4, 4)])
    assert other.work != first.work and not other.kept and not other.notes()
    other.discard()
    again = OutputWriter.open(tmp_path, REQUEST, 2, [(4, 4)])
    assert again.kept == {0: 0}
    with pytest.raises(UsageError, match="another process draws the same pictures"):
        OutputWriter.open(tmp_path, REQUEST, 2, [(4, 4)])


@pytest.mark.parametrize(
    ("rank", "problem", "speaks"),
    [(0, KeyboardInterrupt, True), (1, KeyboardInterrupt, False), (1, RuntimeError, True)],
)
def test_an_interruption_says_what_is_kept(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rank: int,
    problem: type[BaseException],
    speaks: bool,
) -> None:
    writer = OutputWriter.open(tmp_path, REQUEST, 2, [(4, 4)])
    with pytest.raises(problem), writer.session(rank):
        writer.write([0], [pictures(1, 4)], [0], rank=rank)
        raise problem
    told = capsys.readouterr().err
    assert ("1 of 2 pictures are kept in" in told) == speaks
    assert OutputWriter.open(tmp_path, REQUEST, 2, [(4, 4)]).kept == {0: 0}


def test_a_store_that_is_not_whole_is_begun_anew(tmp_path: Path) -> None:
    writer = OutputWriter.open(tmp_path, REQUEST, 2, [(4, 4)])
    writer.write([0], [pictures(1, 4)], [0], rank=0)
    writer.lock.close()  # type: ignore[union-attr]
    os.truncate(writer.stores[0].path, 100)
    writer = OutputWriter.open(tmp_path, REQUEST, 2, [(4, 4)])
    assert writer.kept == writer.recorded() == {} and writer.stores[0].is_whole()


def test_a_machine_that_does_not_see_the_folder_is_told_to_share_it(tmp_path: Path) -> None:
    writer = OutputWriter.open(tmp_path, REQUEST, 2, [(4, 4)])
    writer.require_shared()
    elsewhere = replace(writer, work=tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="give a --log_dir that all machines share"):
        elsewhere.require_shared()


def test_stores_are_never_read_by_those_who_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NFS a page would be read, changed and sent back whole, over another rank's bytes."""
    store = PictureStore(tmp_path / "x.npy", 2, (4, 4))
    store.create()
    opened, plain = [], os.open

    def spy(path: object, flags: int, *rest: object) -> int:
        opened.append(flags)
        return plain(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", spy)
    store.write([1], pictures(1, 4))
    assert opened == [os.O_WRONLY]


def test_a_failure_before_the_first_move_leaves_no_name_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_run(tmp_path, [pictures(3, 4)])
    assert [path.name[:9] for path in tmp_path.iterdir()] == [".samples_"]
    assert write_run(tmp_path, [pictures(3, 4)])[0].name == "samples_3x4x4x3.npz"


def _die_at_call(step: int) -> None:
    """Kill this process at the step-th write, fsync or rename."""
    calls = 0

    def count(original):  # type: ignore[no-untyped-def]
        def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal calls
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return original(*args, **kwargs)

        return counted

    for name in ("fsync", "replace", "open"):
        setattr(os, name, count(getattr(os, name)))
    PictureStore.write = count(PictureStore.write)  # type: ignore[method-assign]
    PictureStore.pack = count(PictureStore.pack)  # type: ignore[method-assign]


def test_a_full_disk_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(UsageError, match="MB left"):
        OutputWriter.open(tmp_path, REQUEST, 1000, [(64, 64)])
    assert list(tmp_path.iterdir()) == []


def test_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "env"))
    assert make_output_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert make_output_folder(None) == tmp_path / "env" and (tmp_path / "env").is_dir()
    monkeypatch.setenv("OPENAI_LOGDIR", "")
    temporary = make_output_folder(None)
    assert temporary.is_dir() and temporary != make_output_folder(None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        make_output_folder(str(tmp_path / "file"))


def test_the_store_refuses_foreign_pictures(tmp_path: Path) -> None:
    store = PictureStore(tmp_path / "x.npy", 2, (4, 4))
    store.create()
    with pytest.raises(ValueError):
        store.write([0], pictures(1, 5))
    with pytest.raises(ValueError):
        store.write([0], pictures(2, 4))
    with pytest.raises(IndexError):
        store.write([2], pictures(1, 4))


def test_pictures_are_mapped_where_they_can_be(tmp_path: Path) -> None:
    stage = pictures(3, 8)
    (npz, *_) = write_run(tmp_path, [stage])
    np.savez(tmp_path / "numpy.npz", stage)
    np.savez_compressed(tmp_path / "small.npz", stage)
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(stage))
    for path, mapped in ((npz, True), ("numpy.npz", True), ("small.npz", False)):
        found = map_pictures(tmp_path / path)
        assert isinstance(found, np.memmap) == mapped
        np.testing.assert_array_equal(found, stage)
    np.testing.assert_array_equal(map_pictures(tmp_path / "fortran.npz"), stage)


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, pictures(2, 4))
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="CRC"):
        read_pictures(path)


@pytest.mark.parametrize("read_pictures", [read_pictures, map_pictures])
def test_what_is_no_npz_of_pictures_is_refused(
    tmp_path: Path, read_pictures: Callable[[Path], Pictures]
) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="float64"):
        read_pictures(path)
    np.savez(path, other=pictures(2, 4))
    with pytest.raises(ValueError, match="arr_0"):
        read_pictures(path)
    np.savez(path, pictures(2, 4))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="zip"):
        read_pictures(path)
    with pytest.raises(OSError):
        read_pictures(tmp_path / "missing.npz")
