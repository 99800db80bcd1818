"""The loader's processes: clean at the start, gone at the end, at home under mpiexec."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diff_dalle.data import workers
from diff_dalle.data.batch import Batch
from diff_dalle.data.loader import DataConfig, Dataset, open_data, train_batches
from diff_dalle.data.order import Order
from diff_dalle.data.visits import CaptionEncoder

ROOT = Path(__file__).parents[2]


def opened(folder: Path) -> Dataset:
    cfg = DataConfig(data_dir=[str(folder)], num_workers=0)
    return open_data(cfg, split="train", image_size=16, with_text=False, seed=1)


def test_workers_are_clean_processes(tmp_path: Path, pack_many, monkeypatch) -> None:
    """No MPI, no main script, one torch thread: asked of a worker through its tokenizer."""
    pack_many(tmp_path / "data", [2])
    (tmp_path / "probe.py").write_text(
        textwrap.dedent("""
            import os, sys, torch
            class Probe:
                def encode(self, captions, length):
                    facts = ["mpi4py.MPI" in sys.modules, "pytest" in sys.modules,
                             torch.get_num_threads(), os.getpid()]
                    tokens = torch.tensor([facts] * len(captions))
                    return tokens, tokens > 0
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from probe import Probe  # type: ignore[import-not-found]

    batches = train_batches(
        opened(tmp_path / "data"), tokenizer=Probe(), text_length=4, batch_size=1, num_workers=2
    )
    facts = [
        batch.tokens[0].tolist()
        for batch in itertools.islice(batches, 6)
        if batch.tokens is not None
    ]
    assert {tuple(fact[:3]) for fact in facts} == {(0, 0, 1)}
    pids = {fact[3] for fact in facts}
    assert len(pids) == 2 and os.getpid() not in pids


def test_workers_under_mpiexec(tmp_path: Path, pack_many) -> None:
    """Two real ranks, MPI and Gloo running, a worker each: the batches of a single process."""
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert mpiexec, "mpiexec is missing: install the extra [mpich]"
    pack_many(tmp_path / "data", [5, 4])
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            import os, sys
            from mpi4py import MPI  # on top and unguarded, as the ancestors have it
            import torch.distributed
            from diff_dalle.data.loader import DataConfig, open_data, train_batches
            world = MPI.COMM_WORLD
            folder, store = sys.argv[1:]
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=world.rank, world_size=world.size)
            torch.distributed.all_reduce(torch.ones(1000, 1000) @ torch.ones(1000, 1000))
            cfg = DataConfig(data_dir=[folder], num_workers=1)
            data = open_data(cfg, split="train", image_size=16, with_text=False, seed=1)
            batches = train_batches(data, tokenizer=None, text_length=8, batch_size=4,
                                    rank=world.rank, world=world.size)
            for step in range(4):
                keys = world.gather(next(batches).keys)
                if world.rank == 0:
                    print(step, *(key for part in keys for key in part), flush=True)
            world.Barrier()
            torch.distributed.destroy_process_group()
        """)
    )
    command = [mpiexec, "-n", "2", sys.executable, str(program), str(tmp_path / "data")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    dataset = opened(tmp_path / "data")
    keys, order = [dataset.entry(n)[1].key for n in range(9)], Order([5, 4], seed=1)
    for step in range(4):
        expected = [keys[order.slot(position).sample] for position in range(8 * step, 8 * step + 8)]
        assert f"{step} {' '.join(expected)}" in done.stdout.splitlines()


def probe(folder: Path, monkeypatch: pytest.MonkeyPatch, encode: str) -> CaptionEncoder:
    """A tokenizer whose ``encode(captions)`` runs the given lines in the worker."""
    source = f"""
        import os, signal, struct
        from multiprocessing.connection import Connection
        import torch

        def send_half(self, message):
            os.write(self.fileno(), struct.pack("!i", 10**6) + bytes(1000))
            os.kill(os.getpid(), signal.SIGKILL)

        class Probe:
            calls = 0
            def encode(self, captions, length):
                self.calls += 1
                {encode}
                tokens = torch.full((len(captions), length), os.getpid())
                return tokens, tokens > 0
    """
    (folder / f"{folder.name}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(str(folder))
    made: CaptionEncoder = importlib.import_module(folder.name).Probe()
    return made


def probed(folder: Path, tokenizer: CaptionEncoder) -> Iterator[Batch]:
    return train_batches(
        opened(folder), tokenizer=tokenizer, text_length=4, batch_size=2, num_workers=2
    )


@pytest.mark.timeout(60)
def test_a_worker_that_is_killed_while_it_writes_ends_the_run(
    tmp_path: Path, pack_many, monkeypatch
) -> None:
    pack_many(tmp_path, [4])
    monkeypatch.setattr(workers, "_PATIENCE", 0.1)
    killer = probe(tmp_path, monkeypatch, "Connection._send_bytes = send_half")
    others = set(multiprocessing.active_children())
    batches = probed(tmp_path, killer)
    with pytest.raises(RuntimeError, match="worker died .signal SIGKILL.*--num_workers"):
        next(batches)
    assert next(batches, None) is None
    for worker in set(multiprocessing.active_children()) - others:
        worker.join(20)
        assert worker.exitcode is not None


@pytest.mark.timeout(60)
def test_what_fails_in_a_worker_reaches_the_caller(tmp_path: Path, pack_many, monkeypatch) -> None:
    pack_many(tmp_path, [4])
    failing = probe(tmp_path, monkeypatch, "if self.calls == 2: raise ZeroDivisionError('why')")
    batches = probed(tmp_path, failing)
    assert next(batches).valid.all() and next(batches).valid.all()
    with pytest.raises(ZeroDivisionError, match="why"):
        next(batches)
    assert next(batches, None) is None


def test_the_end_is_told_before_the_workers_leave() -> None:
    """Else they would be taken for dead wherever they take their time."""
    ready: queue.Queue[int | BaseException] = queue.Queue()
    told_when_gone = []

    class Made:
        """The loader's iterator, with which its workers go."""

        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            return 7

        def __del__(self) -> None:
            told_when_gone.append(ready.qsize())

    workers._hand_over(Made(), 3, ready, threading.Event())
    assert told_when_gone == [4]
    assert [ready.get() for _ in range(3)] == [7, 7, 7]
    assert isinstance(ready.get(), StopIteration)


def test_batches_that_nobody_wants_end_their_workers(
    tmp_path: Path, pack_many, monkeypatch
) -> None:
    pack_many(tmp_path, [4])
    monkeypatch.setattr(workers, "_PATIENCE", 0.1)
    others = set(threading.enumerate())
    batches = probed(tmp_path, probe(tmp_path, monkeypatch, ""))
    pids = []
    for batch in itertools.islice(batches, 2):
        assert batch.tokens is not None
        pids.append(int(batch.tokens[0, 0]))
    threads = set(threading.enumerate()) - others
    assert all(map(runs, pids)) and threads
    del batches
    ended_by(time.monotonic() + 20, pids)
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


def processes_below(root: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            name, fields = stat.read_text().rsplit(")", 1)
            parents[int(name.split()[0])] = int(fields.split()[1])
    below = [root]
    for pid in below:
        below += [child for child, parent in parents.items() if parent == pid]
    return below[1:]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ended_by(deadline: float, pids: list[int]) -> None:
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if runs(pid)] == []


def test_a_killed_run_leaves_no_process_behind(tmp_path: Path, pack_many) -> None:
    pack_many(tmp_path / "data", [4])
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            import sys, time
            from diff_dalle.data.loader import DataConfig, open_data, train_batches
            cfg = DataConfig(data_dir=[sys.argv[1]], num_workers=2)
            data = open_data(cfg, split="train", image_size=16, with_text=False, seed=1)
            batches = train_batches(data, tokenizer=None, text_length=8, batch_size=2)
            next(batches)
            print("ready", flush=True)
            time.sleep(60)
        """)
    )
    run = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path / "data")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    children = processes_below(run.pid)
    assert len(children) >= 3  # the fork server and two workers
    run.kill()
    run.wait()
    ended_by(time.monotonic() + 10, children)
    run.stdout.close()
