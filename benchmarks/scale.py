"""What a data set costs before its first batch and in memory, up to 100 million samples.

python benchmarks/scale.py

One shard of 10,000 small samples stands under many names (hard links, of its index too): every
name is a shard of its own to the loader. Each line is measured in processes of its own, after
the shards were opened once, so that their folder lies in the page cache for all lines alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loading import small_picture, write_shard
from measure import machine

from diff_dalle.data.dataset import DataConfig
from diff_dalle.data.loader import open_data, train_batches
from diff_dalle.data.shard_index import ensure_index
from diff_dalle.data.shards import ShardFile

PER_SHARD, BATCH, WORKERS, BATCHES = 10_000, 64, 2, 200
SHARDS = (10, 100, 1_000, 10_000)
FAR = 1_000_000  # steps


def link(shard: Path, folder: Path, shards: int) -> None:
    folder.mkdir()
    for number in range(shards):
        path = folder / f"{number:05d}.tar"
        os.link(shard, path)
        os.link(f"{shard}.index", f"{path}.index")


def private_megabytes(process: int | str) -> float:
    """Memory that a process shares with no other, in 10⁶ bytes."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
    lines = [line.split() for line in text.splitlines()]
    return sum(int(line[1]) for line in lines if line[0].startswith("Private_")) * 1024 / 1e6


def workers() -> list[int]:
    """The processes that decode: those that started from this one's fork server."""
    tree: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        tree.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    return [worker for server in tree.get(os.getpid(), []) for worker in tree.get(server, [])]


def measure(folder: str, step: int) -> dict[str, float]:
    """Open, wait for the first batch at a step, read on, and look at memory."""
    before = private_megabytes("self")
    start = time.perf_counter()
    cfg = DataConfig(data_dir=[folder], num_workers=WORKERS)
    data = open_data(cfg, split="train", image_size=32, with_text=False, seed=0)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    batches = train_batches(
        data, tokenizer=None, text_length=8, batch_size=BATCH, start_sample=step * BATCH
    )
    next(batches)
    first = time.perf_counter() - start
    for _ in range(BATCHES):
        next(batches)
    return {
        "opened": opened,
        "first": first,
        "main": private_megabytes("self") - before,
        "worker": max(map(private_megabytes, workers())),
    }


def in_own_process(folder: Path, step: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--folder", str(folder), "--step", str(step)]
    found: dict[str, float] = json.loads(subprocess.check_output(command))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="measure one folder and print JSON")
    parser.add_argument("--step", type=int, default=0)
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(measure(args.folder, args.step)))
        return
    print(machine("torch", "numpy"))
    with tempfile.TemporaryDirectory() as name:
        shard = Path(name) / "one.tar"
        write_shard(shard, [small_picture()], PER_SHARD)
        index, _ = ensure_index(ShardFile(str(shard), shard.name))
        print(f"index: {index.stat().st_size / PER_SHARD:.0f} bytes a sample\n")
        print("| samples | shards | starts at step | opened, s | first batch, s |"
              " a worker, MB | main process, MB more |")  # fmt: skip
        print("|---|---|---|---|---|---|---|")
        for shards in SHARDS:
            folder = Path(name) / str(shards)
            link(shard, folder, shards)
            in_own_process(folder, 0)
            for step in (0, FAR):
                found = in_own_process(folder, step)
                cells = [f"{shards * PER_SHARD:,}", f"{shards:,}", f"{step:,}"]
                cells += [f"{found[key]:.2f}" for key in ("opened", "first")]
                cells += [f"{found[key]:.0f}" for key in ("worker", "main")]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
