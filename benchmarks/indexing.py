"""How fast the members of a shard are found: our reader of headers against Python's tarfile.

python benchmarks/indexing.py

Shards of small samples (.jpg, .txt and .json), in the forms in which Python and webdataset write
them: plain ustar headers, and a pax header with the time of writing before each. The last column
is the work of the first reading of a shard: headers, samples, index file.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from measure import ROUNDS, interleaved, machine, speedup, timed

from diff_dalle.data.shard_index import ensure_index
from diff_dalle.data.shards import ShardFile
from diff_dalle.data.tar_members import read_members

SIZES = {"jpg": 3000, "txt": 50, "json": 300}  # bytes
FORMS = {"ustar": (tarfile.USTAR_FORMAT, 0.0), "pax times": (tarfile.PAX_FORMAT, 1.5e9 + 0.25)}


def write_shard(path: Path, samples: int, form: int, time: float) -> None:
    with tarfile.open(path, "w", format=form) as archive:
        for number in range(samples):
            for extension, size in SIZES.items():
                entry = tarfile.TarInfo(f"{number:09d}.{extension}")
                entry.size, entry.mtime = size, time
                archive.addfile(entry, io.BytesIO(b"x" * size))


def by_tarfile(shard: Path) -> list[tuple[str, int, int]]:
    found = []
    with tarfile.open(shard, "r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []
            found.append((member.name, member.offset_data, member.size))
    return found


def by_ours(shard: Path) -> list[tuple[str, int, int]]:
    with open(shard, "rb") as file:
        return [tuple(member) for member in read_members(file, shard.stat().st_size, [])]


def first_reading(shard: Path) -> None:
    Path(f"{shard}.index").unlink(missing_ok=True)
    ensure_index(ShardFile(str(shard), shard.name))


def compare(shard: Path, rounds: int) -> list[str]:
    """Rates of all three in members a second, and the ratio of the two readers."""
    found = by_tarfile(shard)
    if by_ours(shard) != found:
        raise SystemExit(f"{shard}: the readers differ")
    ways: dict[str, Callable[[], object]] = {
        "tarfile": lambda: by_tarfile(shard),
        "ours": lambda: by_ours(shard),
        "index": lambda: first_reading(shard),
    }
    seconds = interleaved({name: timed(way) for name, way in ways.items()}, rounds)
    median, bound = speedup(seconds["tarfile"], seconds["ours"])
    rates = [f"{len(found) / statistics.median(seconds[name]):.0f}" for name in ways]
    return [*rates[:2], f"{median:.2f} (≥ {bound:.2f})", rates[2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    print(machine("numpy"))
    print("| headers | tarfile members/s | ours members/s | ratio (95 % bound) |"
          " whole index members/s |")  # fmt: skip
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for kind, (form, time) in FORMS.items():
            shard = Path(name) / f"{form}.tar"
            write_shard(shard, args.samples, form, time)
            what = f"{kind}, {args.samples} samples"
            print(f"| {' | '.join([what, *compare(shard, args.rounds)])} |", flush=True)


if __name__ == "__main__":
    main()
