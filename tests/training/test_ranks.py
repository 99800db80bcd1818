"""Training under a true ``mpiexec -n 2``: two ranks do what one would have done."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diff_dalle.training.checkpoint_file import load_weights
from diff_dalle.training.checkpoints import load_training_state

ROOT = Path(__file__).parent.parent.parent
PROGRAM = ROOT / "tests" / "programs" / "loop_two_ranks.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks left their files, and ``found.json``."""
    folder = tmp_path_factory.mktemp("ranks")
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert mpiexec, "the tests need an mpiexec: pip install -e .[mpich]"
    hidden = ("PMI", "OMPI_", "SLURM_", "TORCHELASTIC", "OPENAI_LOGDIR")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [mpiexec, "-n", "2", sys.executable, str(PROGRAM), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What rank 0 found."""
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize("kind", ["generator", "classifier"])
def test_gradients_are_those_of_one_process(found: dict[str, Any], kind: str) -> None:
    assert found[f"{kind} parameters without gradient"] == 0
    assert found[f"{kind} gradient error"] < 1e-6
    assert found[f"{kind} worst tensor's gradient error"] < 1e-5


@pytest.mark.parametrize("kind", ["generator", "classifier"])
def test_weights_in_float64_are_those_of_one_process(found: dict[str, Any], kind: str) -> None:
    assert found[f"{kind} weights error"] < 1e-9
    assert found[f"{kind} averages error"] < 1e-9
    assert found[f"{kind} samples"] == 18


def test_a_loss_aware_sampler_is_the_same_everywhere(found: dict[str, Any]) -> None:
    assert found["sampler memory"] == [True, True]
    assert found["sampler losses"] == 11  # of 12 samples, one is broken


@pytest.mark.parametrize("kind", ["generator", "classifier"])
def test_evaluations_do_not_depend_on_the_ranks(found: dict[str, Any], kind: str) -> None:
    assert found[f"{kind} evaluation error"] < 1e-9
    assert found[f"{kind} evaluation everywhere"] == 1


def test_an_interrupted_run_ends_bit_for_bit_alike(found: dict[str, Any], folder: Path) -> None:
    one, two = (load_training_state(folder / name, 12) for name in ("straight", "broken"))
    for name, tensor in one.model.items():
        assert torch.equal(tensor, two.model[name]), name
        assert torch.equal(one.emas["0.9"][name], two.emas["0.9"][name]), name
    moments = [state.optimizer_state["adamw"]["state"][0]["exp_avg_sq"] for state in (one, two)]
    assert torch.equal(moments[0], moments[1])
    assert one.extra == two.extra
    assert found["order kept"]


def test_averaged_weights_alone_start_both_ranks(found: dict[str, Any], folder: Path) -> None:
    assert found["averages alone keep ranks equal"]
    start = load_weights(folder / "averaged" / "ema_0.9_000002.pt").state_dict
    state = load_training_state(folder / "from", 3)
    for name, tensor in state.emas["0.9"].items():  # one step of averaging away from the file
        expected = start[name] + 0.1 * (state.model[name] - start[name])
        assert torch.allclose(tensor, expected, atol=1e-6), name


def test_ranks_read_different_samples(found: dict[str, Any]) -> None:
    assert found["samples of both ranks"] == 0
    assert found["samples in all"] == 12 * 6


def test_one_bad_rank_makes_all_skip(found: dict[str, Any], folder: Path) -> None:
    assert found["skip keeps ranks equal"]
    before, after, later = (load_training_state(folder / "skipped", step) for step in (2, 3, 4))
    for name, tensor in before.model.items():
        assert torch.equal(tensor, after.model[name]), name
        assert torch.equal(before.emas["0.9"][name], after.emas["0.9"][name]), name
        assert not torch.equal(tensor, later.model[name]), name
    assert later.extra["guard"]["skipped"] == 1


def test_files_hold_what_all_ranks_saw(folder: Path) -> None:
    text = (folder / "bad" / "bad_samples.jsonl").read_text()
    keys = [json.loads(line)["key"] for line in text.splitlines()]
    assert sorted(keys) == ["000001", "000002", "000007"]
    row = json.loads((folder / "bad" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["bad_share"] == 3 / 8 and row["samples"] == 8
    captions = (folder / "bad" / "samples_000002.txt").read_text().splitlines()
    assert len(captions) == 5
    assert Image.open(folder / "bad" / "samples_000002.png").size == (4 * 16, 2 * 16)


def test_a_dry_run_leaves_nothing(found: dict[str, Any]) -> None:
    assert not found["dry run left"]


def test_only_one_rank_talks(folder: Path) -> None:
    lines = (folder / "stdout.txt").read_text().splitlines()
    assert len([line for line in lines if line.startswith("step 5: ")]) == 3
