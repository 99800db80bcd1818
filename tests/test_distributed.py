"""Start-up, collectives and the end of a run, alone and under a true mpiexec."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diff_dalle.distributed import (
    World,
    all_gather_objects,
    all_gather_with_grad,
    average_gradients_,
    broadcast_object,
    start,
)
from diff_dalle.distributed.world import (
    Launch,
    choose_device,
    detect_launch,
    require_own_gpus,
    threads_per_rank,
)
from diff_dalle.errors import UsageError

ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT / "tests" / "programs"


def mpiexec() -> str:
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert found, "the tests need an mpiexec: pip install -e .[mpich]"
    return found


def launch(
    command: list[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end, without this process's launcher and folder variables."""
    hidden = ("PMI", "OMPI_", "SLURM_", "TORCHELASTIC", "OPENAI_LOGDIR", "OMP_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    env |= {"PYTHONPATH": str(ROOT)} | (environment or {})
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the checks of dist_collectives.py found under ``mpiexec -n 2``."""
    result = tmp_path_factory.mktemp("two_ranks") / "found.json"
    program = str(PROGRAMS / "dist_collectives.py")
    done = launch([mpiexec(), "-n", "2", sys.executable, program, str(result)])
    assert done.returncode == 0, done.stdout + done.stderr
    return read_found(result)


def read_found(result: Path) -> dict[str, Any]:
    found = json.loads(result.read_text(encoding="utf-8"))
    found["threads_left"] = [json.loads(result.with_suffix(f".{r}").read_text()) for r in (0, 1)]
    return found


def test_two_ranks_know_their_places(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["worlds"] == [[0, 2, 0, 2, "mpi"], [1, 2, 1, 2, "mpi"]]
    assert two_ranks["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert two_ranks["child_sees_mpi"] == "[]"


def test_two_ranks_exchange(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["sum"] == [3.0]
    assert two_ranks["gathered"] == [[0], [1]]
    assert two_ranks["broadcast"] == [{"of": 0}, {"of": 0}]


def test_the_gather_sums_gradients_over_ranks(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["gather_gradient_error"] < 1e-12


def test_every_parameter_and_buffer_is_synchronised(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["unsynchronised"] == []
    assert two_ranks["changed_on_rank_0"] == []


def test_gradients_are_averaged_over_ranks(two_ranks: dict[str, Any]) -> None:
    # Parameter 1 has gradient 10 on rank 0 and none on rank 1.
    assert two_ranks["averages"] == [[0.5], [5.0], [20.5], [30.5], [40.5], [50.5]]
    assert not two_ranks["frozen_has_gradient"]


def test_two_ranks_reach_the_weights_of_one(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["two_ranks_weight_error"] < 1e-9


def test_cached_contrastive_gradients_equal_the_full_batch(two_ranks: dict[str, Any]) -> None:
    # Ratios to the full batch's gradient: a factor of the world size would show as 1.
    assert len(two_ranks["cached_gradient_errors"]) == 7
    assert max(two_ranks["cached_gradient_errors"].values()) < 1e-12
    assert two_ranks["cached_loss_error"] < 1e-12


def test_drift_between_ranks_is_named_everywhere(two_ranks: dict[str, Any]) -> None:
    assert len(set(two_ranks["drift"])) == 1
    assert two_ranks["drift"][0].startswith("flipped on rank 1 differs")


def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["skipped"] == [[True, 1, [[1.0, 1.0], [1.0, 1.0]]]] * 2


def test_no_thread_outlives_the_group(two_ranks: dict[str, Any]) -> None:
    # Such a thread could abort the interpreter on its way out: exit code 134 after a good run.
    assert two_ranks["threads_left"] == [[], []]


def test_torchrun_finds_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    result = tmp_path / "found.json"
    done = launch([*command, "2", str(PROGRAMS / "dist_collectives.py"), str(result)])
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_found(result)
    assert found["worlds"] == [[0, 2, 0, 2, "torchrun"], [1, 2, 1, 2, "torchrun"]]
    assert found["sum"] == [3.0]
    assert found["threads_left"] == [[], []]
    assert found["two_ranks_weight_error"] < 1e-9


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        ("usage-before-start", 2, "error: --lr is -1.0: it must be positive"),
        ("usage-on-all", 2, "error: the folder is empty: give another"),
        (
            "alone",
            2,
            "error: this script works in one process, but mpi started 2: start it "
            "without mpiexec, srun or torchrun",
        ),
    ],
)
def test_a_mistake_of_all_ranks_is_told_once(
    fault: str, code: int, line: str, tmp_path: Path
) -> None:
    done = launch_faulty(fault, tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.splitlines() == [line]


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("raise", "error: rank 1: RuntimeError: a planted failure (traceback in "),
        ("usage-on-one", "error: rank 1: a file that only this machine lacks: copy it (see "),
        ("sys-exit-0", "error: rank 0: RuntimeError: "),  # its connection to rank 1 is closed
        ("kill", ""),
        ("interrupt", ""),
    ],
)
def test_one_bad_rank_ends_the_job(fault: str, line: str, tmp_path: Path) -> None:
    # That it ends at all is the point: the other rank would go on for minutes.
    done = launch_faulty(fault, tmp_path)
    assert done.returncode != 0
    assert line in done.stderr
    if fault in ("raise", "usage-on-one"):
        written = (tmp_path / "error.txt").read_text(encoding="utf-8")
        assert "rank 1\n" in written and "Traceback" * (fault == "raise") in written


def test_a_rank_that_vanishes_ends_the_job(tmp_path: Path) -> None:
    launch_faulty("os-exit-0", tmp_path)  # MPICH's own launcher may report 0 for it


def launch_faulty(fault: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(PROGRAMS / "dist_fail.py"), fault, str(folder)]
    return launch([mpiexec(), "-n", "2", *program])


def test_a_script_alone_ends_with_its_code(tmp_path: Path) -> None:
    text = (
        "import sys\n"
        "from diff_dalle.distributed import run_main\n"
        "from diff_dalle.errors import UsageError\n"
        "def main(argv):\n"
        "    if argv[0] == 'usage': raise UsageError('a wrong flag: mend it')\n"
        "    if argv[0] == 'crash': raise ValueError('two\\nlines')\n"
        "    return int(argv[0])\n"
        "run_main(main)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(text, encoding="utf-8")
    log_dir = {"OPENAI_LOGDIR": str(tmp_path)}
    usage = launch([sys.executable, str(script), "usage"], log_dir)
    assert (usage.returncode, usage.stderr) == (2, "error: a wrong flag: mend it\n")
    crash = launch([sys.executable, str(script), "crash"], log_dir)
    assert crash.returncode == 1
    assert crash.stderr == f"error: ValueError: two (traceback in {tmp_path}/error.txt)\n"
    written = (tmp_path / "error.txt").read_text(encoding="utf-8")
    assert written.count("a wrong flag") == 1 and "ValueError: two\nlines" in written
    assert launch([sys.executable, str(script), "75"]).returncode == 75


def test_a_launcher_of_another_mpi_is_refused(tmp_path: Path) -> None:
    # What happens under Open MPI's mpiexec with MPICH's mpi4py: rank 0 of 1, n times.
    program = [sys.executable, str(PROGRAMS / "dist_fail.py"), "none", str(tmp_path)]
    for rank, lines in (("0", 1), ("1", 0)):
        env = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": "2"}
        done = launch(program, env)
        assert done.returncode == 2
        message = "error: the launcher started 2 processes, but MPI sees 1"
        assert done.stderr.count("error: ") == done.stderr.count(message) == lines


def test_a_launcher_without_mpi_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"MPI cannot be loaded .*pip install -e \.\[mpich\]"):
        start("cpu")


def test_alone_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert start("cpu") == World()
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    assert start("cpu") == World(launcher="mpi")


def test_collectives_alone_change_nothing() -> None:
    world = World()
    x = torch.ones(2, 3, requires_grad=True)
    assert all_gather_with_grad(x, world) is x
    assert all_gather_objects("a", world) == ["a"] and broadcast_object("a", world) == "a"
    x.grad = torch.full_like(x, 3.0)
    average_gradients_([x], world)
    assert torch.equal(x.grad, torch.full((2, 3), 3.0))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch("alone", 0, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, Launch("mpi", 1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, Launch("mpi", 2, 4)),
        # srun with PMIx
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "PMIX_RANK": "3"}, Launch("mpi", 3, 4)),
        # inside an allocation, but not started by srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Launch("alone", 0, 1)),
        # torchrun, itself started by srun
        (
            {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "PMI_RANK": "1"}
            | {"PMI_SIZE": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            Launch("torchrun", 5, 8),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, Launch("torchrun", 1, 2)),
    ],
)
def test_launchers_are_recognised(environment: dict[str, str], expected: Launch) -> None:
    assert detect_launch(environment) == expected


def test_srun_without_mpi_is_refused() -> None:
    with pytest.raises(UsageError, match="4 tasks without MPI.*--mpi=pmi"):
        detect_launch({"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"})


def test_threads_divide_shared_cores_alone() -> None:
    def cores(host: str, first: int, last: int) -> frozenset[tuple[str, int]]:
        return frozenset((host, core) for core in range(first, last))

    unbound = [cores("a", 0, 8), cores("a", 0, 8), cores("b", 0, 4)]
    assert [threads_per_rank(unbound, rank) for rank in range(3)] == [4, 4, 4]
    bound = [cores("a", 0, 4), cores("a", 4, 8)]
    assert [threads_per_rank(bound, rank) for rank in range(2)] == [4, 4]
    crowded = [cores("a", 0, 1)] * 3
    assert threads_per_rank(crowded, 0) == 1


def test_the_device_follows_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    assert choose_device("cuda:0", 1) == torch.device("cuda", 0)
    assert choose_device("cpu", 1) == torch.device("cpu")
    assert chosen == [1, 0]
    with pytest.raises(UsageError, match="GPU 2 was asked for, but CUDA shows 2"):
        choose_device("cuda", 2)
    # Every rank is shown one GPU of its own.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto", 3) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto", 0) == torch.device("cpu")
    for wrong in ("cuda", "gpu"):
        with pytest.raises(UsageError, match=f"--device is '{wrong}'"):
            choose_device(wrong, 0)


def test_two_ranks_on_one_gpu_are_refused() -> None:
    require_own_gpus([None, None])
    require_own_gpus(["a, GPU-1", "b, GPU-1", None])
    with pytest.raises(UsageError, match=r"ranks 0 and 2 share one GPU \(a, GPU-1\)"):
        require_own_gpus(["a, GPU-1", "a, GPU-2", "a, GPU-1"])
