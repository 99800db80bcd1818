"""Kills at any instant of a save, full disks and read-only folders: older checkpoints stand."""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diff_dalle.errors import UsageError
from diff_dalle.training import files
from diff_dalle.training.checkpoint_file import save_weights
from diff_dalle.training.checkpoints import (
    checkpoint_bytes,
    find_latest,
    load_latest,
    load_training_state,
    save_checkpoint,
)
from diff_dalle.training.files import file_digest, require_room

NAMES = ["ema_0.9_{:06d}.pt", "model{:06d}.pt", "opt{:06d}.pt", "manifest{:06d}.json"]


def model_state(seed: int) -> dict[str, Tensor]:
    return {"weight": torch.full((40, 30), float(seed))}


def save(folder: Path, step: int, seed: int = 0) -> None:
    model = model_state(seed)
    save_checkpoint(
        folder,
        step,
        kind="generator",
        config={},
        tokenizer_json=None,
        model=model,
        emas={"0.9": model},
        optimizer_state={"exp_avg": model["weight"]},
        extra={"seed": seed},
    )


def holds(folder: Path, step: int, seed: int) -> bool:
    """Whether the checkpoint of a step is that of one save, in all its files."""
    state = load_training_state(folder, step)
    tensors = [state.model["weight"], state.emas["0.9"]["weight"], state.optimizer_state["exp_avg"]]
    wanted = model_state(seed)["weight"]
    return state.extra == {"seed": seed} and all(torch.equal(x, wanted) for x in tensors)


def run_and_die(work: Callable[[], object], at: int) -> bool:
    """Run in a child that dies, as by kill -9, before its operation number ``at``.

    Returns:
        True where the child came to the end.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal seen
                if seen == at:
                    os._exit(9)
                seen += 1
                return operation(*args, **kwargs)

            return run

        # A kill, unlike a power cut, keeps what the system was given: no need for true syncs.
        os.fsync, os.replace = counted(lambda handle: None), counted(os.replace)
        Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]
        files.HashingFile.write = counted(files.HashingFile.write)  # type: ignore[method-assign]
        try:
            work()
        finally:
            os._exit(0 if sys.exception() is None else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def hashes(folder: Path, step: int) -> dict[str, str]:
    return {name.format(step): file_digest(folder / name.format(step)) for name in NAMES}


def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=1)
    before = hashes(tmp_path, 1)
    at, done, newer = 0, False, 0
    while not done:
        done = run_and_die(lambda: save(tmp_path, 2, seed=2), at)
        state = load_latest(tmp_path, pytest.fail)  # type: ignore[arg-type]
        assert state is not None and holds(tmp_path, state.step, seed=state.step)
        assert hashes(tmp_path, 1) == before
        newer += state.step == 2
        for path in tmp_path.glob("*2.*"):
            path.unlink()
        at += 1
    assert at > 40 and newer >= 2  # killed after the commit, and not killed at all


def test_the_kill_test_catches_a_plain_writer(tmp_path: Path) -> None:
    def write_plainly() -> None:
        with open(tmp_path / "model000002.pt", "wb") as file:
            torch.save(model_state(2), files.HashingFile(file))  # type: ignore[arg-type]

    torn = 0
    for at in range(0, 40, 4):
        run_and_die(write_plainly, at)
        try:
            torch.load(tmp_path / "model000002.pt", weights_only=True)
        except Exception:
            torn += 1
    assert torn > 0


def test_everything_reaches_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, str]] = []
    fsync, replace, write = os.fsync, os.replace, files.HashingFile.write

    def name_of(handle: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{handle}")).name

    def log_write(file: files.HashingFile, data: Any) -> int:
        log.append(("write", name_of(file._file.fileno())))
        return write(file, data)

    monkeypatch.setattr(os, "fsync", lambda h: (log.append(("fsync", name_of(h))), fsync(h)))
    monkeypatch.setattr(
        os, "replace", lambda a, b: (log.append(("replace", Path(b).name)), replace(a, b))
    )
    monkeypatch.setattr(files.HashingFile, "write", log_write)
    save(tmp_path, 1)
    assert log[-2:] == [("replace", "manifest000001.json"), ("fsync", tmp_path.name)]
    for name in [name.format(1) for name in NAMES]:
        last_write = max(k for k, entry in enumerate(log) if entry == ("write", f"{name}.tmp"))
        synced = log.index(("fsync", f"{name}.tmp"))
        renamed = log.index(("replace", name))
        assert last_write < synced < renamed
        assert log[renamed + 1] == ("fsync", tmp_path.name)


def test_a_full_disk_harms_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = hashes(tmp_path, 1)

    def in_little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            save(tmp_path, 2)
        except OSError as error:
            os._exit(0 if error.errno == errno.EFBIG else 1)

    assert run_and_die(in_little_room, at=-1)
    assert hashes(tmp_path, 1) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(before)
    assert find_latest(tmp_path) == 1


def test_a_full_disk_leaves_no_piece_of_single_weights(tmp_path: Path) -> None:
    def in_little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        with pytest.raises(OSError):
            save_weights(
                tmp_path / "best.pt",
                kind="generator",
                config={},
                tokenizer_json=None,
                step=1,
                ema_rate=None,
                state_dict=model_state(1),
            )

    assert run_and_die(in_little_room, at=-1)
    assert list(tmp_path.iterdir()) == []


def test_a_second_save_of_one_step_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=1)
    save(tmp_path, 1, seed=2)
    assert holds(tmp_path, 1, seed=2)
    second = {path: path.read_bytes() for path in tmp_path.iterdir()}
    at = 0
    while not run_and_die(lambda: save(tmp_path, 1, seed=3), at):
        # Whole, or nothing that claims to be: never files of two saves.
        assert find_latest(tmp_path) is None or any(holds(tmp_path, 1, seed) for seed in (2, 3))
        for path, content in second.items():
            path.write_bytes(content)
        at += 1


def test_room_is_checked_before_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(250, 1000, bias=False)
    size = checkpoint_bytes(model, ema_count=2)
    assert size == 1_000_000 * (1 + 2 + 2)
    require_room(tmp_path / "deep" / "run", size)
    assert list((tmp_path / "deep" / "run").iterdir()) == []
    usage = type("Usage", (), {"free": 2 * size - 1})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UsageError, match=r"0.01 GiB free, but 2 checkpoints need 0.01 GiB"):
        require_room(tmp_path, size)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be written .*give another --log_dir"):
        require_room(tmp_path / "file" / "run", 1)
