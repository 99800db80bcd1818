"""The whole loader against plain webdataset, and two workers against one.

python benchmarks/loading.py --photos FOLDER

Shards of photographs with captions; a loader's work is everything from the tar to a batch of
pixels and tokens. Plain webdataset streams, decodes the ancestors' way (see decoding.py) and
tokenises with the same tokenizer. The first table reads members without decoding them, the last
one sets two of our workers against one.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from decoding import GOALS, MEGAPIXELS, TARGETS, ancestors, photographs
from measure import ROUNDS, interleaved, machine, speedup, timed
from PIL import Image

from diff_dalle.data.dataset import DataConfig, Dataset
from diff_dalle.data.loader import open_data, train_batches
from diff_dalle.data.order import Order
from diff_dalle.data.tokenizer import Tokenizer

BATCH, LENGTH = 8, 48
WARM, TIMED = 2, 6  # batches before the clock starts, and on the clock
LONG = 40  # batches on the clock, beside which those that workers have ready do not count
CAPTION = "a photograph of a garden with many flowers, number {}"


class Photographs(NamedTuple):
    """A shard of photographs of so many megapixels, opened for pictures of a size."""

    megapixels: int
    size: int
    shard: Path
    data: Dataset


def write_shard(path: Path, pictures: list[bytes], samples: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, picture in zip(range(samples), itertools.cycle(pictures), strict=False):
            members = {"jpg": picture, "txt": CAPTION.format(number).encode()}
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"{number:09d}.{extension}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def plain(shard: Path, tokenizer: Tokenizer, size: int) -> Iterator[Any]:
    """Batches of plain webdataset, without end."""

    def sample(raw: dict[str, bytes]) -> tuple[torch.Tensor, str]:
        return torch.from_numpy(ancestors(raw["jpg"], size).copy()), raw["txt"].decode()

    def collate(samples: list[tuple[torch.Tensor, str]]) -> Any:
        tokens, mask = tokenizer.encode([caption for _, caption in samples], LENGTH)
        return torch.stack([picture for picture, _ in samples]), tokens, mask

    pipeline = webdataset.WebDataset(str(shard), shardshuffle=False).map(sample)
    return iter(pipeline.batched(BATCH, collation_fn=collate).repeat())


def ours(data: Dataset, tokenizer: Tokenizer, workers: int) -> Iterator[Any]:
    return train_batches(
        data, tokenizer=tokenizer, text_length=LENGTH, batch_size=BATCH, num_workers=workers
    )


def seconds_of(make: Callable[[], Iterator[Any]], count: int = TIMED) -> float:
    """Seconds for some batches of a new loader that has got going."""
    batches = make()
    for _ in range(WARM):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - start


def opened(shard: Path, size: int) -> Dataset:
    cfg = DataConfig(data_dir=[str(shard)], num_workers=0)
    return open_data(cfg, split="train", image_size=size, with_text=True, seed=0)


def compare_loaders(datasets: Iterable[Photographs], tokenizer: Tokenizer, rounds: int) -> None:
    print("| photographs | target | webdataset img/s | ours img/s | ratio (95 % bound) | goal |")
    print("|---|---|---|---|---|---|")
    for megapixels, size, shard, data in datasets:
        seconds = interleaved(
            {
                "plain": lambda s=shard, z=size: seconds_of(lambda: plain(s, tokenizer, z)),
                "ours": lambda d=data: seconds_of(lambda: ours(d, tokenizer, 0)),
            },
            rounds,
        )
        rates = [BATCH * TIMED / statistics.median(seconds[n]) for n in ("plain", "ours")]
        median, bound = speedup(seconds["plain"], seconds["ours"])
        cells = [f"{megapixels} Mpx", f"{size} px", *(f"{rate:.1f}" for rate in rates)]
        cells += [f"{median:.2f} (≥ {bound:.2f})", f"{0.9 * GOALS[megapixels, size]:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def compare_workers(datasets: Iterable[Photographs], tokenizer: Tokenizer, rounds: int) -> None:
    print("| photographs | target | one worker img/s | two img/s | ratio (95 % bound) | goal |")
    print("|---|---|---|---|---|---|")
    for megapixels, size, _, data in datasets:
        seconds = interleaved(
            {
                str(workers): lambda d=data, w=workers: seconds_of(
                    lambda: ours(d, tokenizer, w), LONG
                )
                for workers in (1, 2)
            },
            rounds,
        )
        rates = [BATCH * LONG / statistics.median(seconds[n]) for n in ("1", "2")]
        median, bound = speedup(seconds["1"], seconds["2"])
        cells = [f"{megapixels} Mpx", f"{size} px", *(f"{rate:.1f}" for rate in rates)]
        print(f"| {' | '.join(cells)} | {median:.2f} (≥ {bound:.2f}) | 1.8 |", flush=True)


def photograph_sets(folder: Path, photos: Path) -> Iterator[Photographs]:
    for megapixels in MEGAPIXELS:
        shard = folder / f"{megapixels}.tar"
        write_shard(shard, photographs(photos, megapixels), samples=200)
        for size in TARGETS:
            yield Photographs(megapixels, size, shard, opened(shard, size))


def small_picture() -> bytes:
    """A JPEG of a few kilobytes."""
    noise = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=80)
    return file.getvalue()


def compare_reading(folder: Path, rounds: int, samples: int = 20_000) -> None:
    """Samples a second without decoding, small pictures, one process."""
    shard = folder / "small.tar"
    write_shard(shard, [small_picture()], samples)
    data = opened(shard, 32)

    def stream() -> None:
        for _ in webdataset.WebDataset(str(shard), shardshuffle=False):
            pass

    def shuffled() -> None:
        order = Order(data.counts, seed=0)
        for position in range(len(data)):
            sample = order.slot(position).sample
            data.entry(sample)
            data.read(sample)

    seconds = interleaved({"stream": timed(stream), "ours": timed(shuffled)}, rounds)
    median, bound = speedup(seconds["stream"], seconds["ours"])
    rates = [samples / statistics.median(seconds[name]) for name in ("stream", "ours")]
    print("| reading without decoding | webdataset samples/s | ours samples/s | ratio | goal |")
    print("|---|---|---|---|---|")
    what = f"{samples} of {len(small_picture()) / 1000:.1f} kB"
    print(f"| {what} | {rates[0]:.0f} | {rates[1]:.0f} | {median:.2f} (≥ {bound:.2f}) | 2 |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    print(machine("pillow", "webdataset", "torch", "tokenizers"))
    tokenizer = Tokenizer.train([CAPTION.format(number) for number in range(1000)], 500)
    with tempfile.TemporaryDirectory() as name:
        compare_reading(Path(name), args.rounds)
        datasets = list(photograph_sets(Path(name), args.photos))
        compare_loaders(datasets, tokenizer, args.rounds)
        compare_workers(datasets, tokenizer, args.rounds)


if __name__ == "__main__":
    main()
