"""A run that is killed at any instant goes on and leaves the bytes of one that was not."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from diff_dalle.data.packing import assembly, prepare
from diff_dalle.data.packing.encode import EncodeSettings
from diff_dalle.data.packing.pack import PackConfig, pack_dataset
from diff_dalle.data.packing.records import Record
from diff_dalle.data.packing.shard_writer import GrowingFile
from diff_dalle.errors import UsageError

PLAIN = EncodeSettings(resize=0, quality=95, reencode=False, min_size=0, max_pixels=10**6)
Hashes = Callable[[Path], dict[str, str]]


@pytest.fixture
def source(tmp_path: Path, drawings: Callable[..., Path]) -> Path:
    """11 pictures, of which one is broken, one empty and one there twice."""
    folder = drawings(tmp_path / "D", 11)
    (folder / "004.png").write_bytes(b"broken")
    (folder / "008.png").write_bytes((folder / "001.png").read_bytes())
    (folder / "009.png").write_bytes(b"")
    return folder


@pytest.fixture
def settings(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(assembly, "COMMIT_EVERY", 3)
    # A killed process loses nothing that the system has; only a machine that stops does.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    return {"images": str(source), "val_share": 0.3, "samples_per_shard": 3}


def killed(work: Callable[[], object], instant: int) -> bool:
    """Run ``work`` in a process that is killed at its n-th step; False if it came to its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            # The bar's own lock is shared with this process: who dies with it, holds it for ever.
            tqdm.set_lock(threading.RLock())
            _die_at(instant)
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def _die_at(instant: int) -> None:
    """Count every change of the disk; at the n-th, do half of it or nothing, and die."""
    steps = iter(range(instant))

    def step() -> None:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            step()
            return function(*args)

        return call

    append = GrowingFile.append

    def append_in_halves(self: GrowingFile, data: bytes) -> None:
        half = len(data) // 2
        append(self, data[:half])
        self._file.flush()
        step()
        append(self, data[half:])

    GrowingFile.append = append_in_halves  # type: ignore[method-assign]
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def test_a_kill_at_any_instant_changes_nothing(
    tmp_path: Path, settings: dict[str, Any], config: Callable[..., PackConfig], hashes: Hashes
) -> None:
    pack_dataset(config(tmp_path / "truth", **settings))
    truth, instant = hashes(tmp_path / "truth"), 0
    while True:
        cfg = config(tmp_path / f"out{instant}", **settings)
        if not killed(lambda cfg=cfg: pack_dataset(cfg), instant):
            break
        pack_dataset(cfg)
        assert hashes(tmp_path / f"out{instant}") == truth, instant
        instant += 1
    assert instant > 50


def test_a_run_that_is_killed_again_and_again_comes_to_its_end(
    tmp_path: Path, settings: dict[str, Any], config: Callable[..., PackConfig], hashes: Hashes
) -> None:
    pack_dataset(config(tmp_path / "truth", **settings))
    cfg, attempts = config(tmp_path / "out", **settings), 1
    while killed(lambda: pack_dataset(cfg), 17):
        attempts += 1
        assert attempts < 20
    assert attempts > 3
    assert hashes(tmp_path / "out") == hashes(tmp_path / "truth")


def test_what_was_committed_is_not_done_again(
    tmp_path: Path,
    settings: dict[str, Any],
    config: Callable[..., PackConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    prepare_one = prepare.prepare

    def noted(record: Record, *rest: Any) -> prepare.Prepared:
        done.append(record.source)
        if done.count("007.png") == 1 and record.source == "007.png":
            raise KeyboardInterrupt
        return prepare_one(record, *rest)

    monkeypatch.setattr(prepare, "prepare", noted)
    cfg = config(tmp_path / "out", **settings)
    with pytest.raises(KeyboardInterrupt):
        pack_dataset(cfg)
    assert done == [f"{number:03d}.png" for number in range(8)]
    pack_dataset(cfg)
    again = done[8:]
    assert "005.png" <= again[0] <= "007.png" and again[-1] == "010.png"


def test_an_unfinished_folder_is_for_the_same_command(
    tmp_path: Path, settings: dict[str, Any], config: Callable[..., PackConfig]
) -> None:
    cfg = config(tmp_path / "out", **settings)
    assert killed(lambda: pack_dataset(cfg), 40)
    with pytest.raises(UsageError, match=r"another command \(quality 95 -> 90\)"):
        pack_dataset(config(tmp_path / "out", **settings, quality=90))
    for part in (tmp_path / "out" / "train").glob("*.part"):
        part.write_bytes(b"")
    for shard in (tmp_path / "out" / "train").glob("*.tar"):
        shard.write_bytes(b"")
    with pytest.raises(UsageError, match="damaged"):
        pack_dataset(cfg)


def test_workers_have_a_bounded_number_of_records_before_them(
    picture: Callable[..., bytes],
) -> None:
    taken: list[int] = []

    def records() -> Any:
        for number in range(60):
            taken.append(number)
            yield Record(source=str(number), image=picture(number), captions=["text"])

    results = prepare.prepare_all(records(), PLAIN, normalise_captions=True, num_workers=1)
    for number in range(12):
        record, result = next(results)
        assert record.source == str(number) and not result.reason
        assert len(taken) <= number + 8
    results.close()
    assert len(taken) < 30


def test_workers_import_no_torch() -> None:
    code = f"import sys, {prepare.__name__}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workers_leave_with_a_main_process_that_was_killed(picture: Callable[..., bytes]) -> None:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _work_until_killed(picture, theirs)
        finally:
            os._exit(1)
    worker = os.pidfd_open(int.from_bytes(os.read(ours, 8)))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    gone, _, _ = select.select([worker], [], [], 30.0)
    assert gone == [worker]
    for handle in (ours, theirs, worker):
        os.close(handle)


def _work_until_killed(picture: Callable[..., bytes], pipe: int) -> None:
    record = Record(source="x", image=picture(0), captions=["text"])
    results = prepare.prepare_all([record] * 9, PLAIN, normalise_captions=True, num_workers=1)
    next(results)
    (worker,) = multiprocessing.active_children()
    os.write(pipe, (worker.pid or 0).to_bytes(8))
    signal.pause()
