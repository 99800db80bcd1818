"""The order of a run under a true mpiexec: that of one process, from wherever it goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from read_two_ranks import read

from diff_dalle.distributed import World

ROOT = Path(__file__).parent.parent.parent
PROGRAM = ROOT / "tests" / "programs" / "read_two_ranks.py"


def test_two_ranks_read_what_one_reads_and_go_on_in_its_place(tmp_path: Path, pack_many) -> None:
    shards = str(tmp_path / "shards")
    pack_many(Path(shards), [7, 0, 5, 9])
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert mpiexec, "the tests need an mpiexec: pip install -e .[mpich]"
    hidden = ("PMI", "OMPI_", "SLURM_", "TORCHELASTIC")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def two_ranks(start: int, count: int) -> list[tuple[str, str, int]]:
        out = tmp_path / f"{start}.json"
        command = [mpiexec, "-n", "2", sys.executable, str(PROGRAM), shards, str(out)]
        command += [str(start), str(count), "6"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
        return [(key, pixels, seed) for key, pixels, seed in json.loads(out.read_text())]

    def alone(start: int, count: int) -> list[tuple[str, str, int]]:
        return [sample for batch in read(shards, World(), start, count, 6) for sample in batch]

    whole = alone(0, 8)  # 48 samples: over two edges of an epoch of 21
    assert len({key for key, _, _ in whole[:21]}) == len({key for key, _, _ in whole[21:42]}) == 21
    assert two_ranks(0, 3) + two_ranks(18, 2) + alone(30, 3) == whole
