"""What bad samples cost: 300 of 1,000 against none, in time and memory.

python benchmarks/bad_samples.py --photos FOLDER

Both shards hold the same photographs of 1 Mpx; in one of them three in ten are spoilt.
"""

from __future__ import annotations

import argparse
import io
import itertools
import resource
import statistics
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from decoding import photographs
from measure import ROUNDS, interleaved, machine, speedup, timed
from PIL import Image

from diff_dalle.data.dataset import DataConfig, Dataset
from diff_dalle.data.loader import open_data, train_batches
from diff_dalle.data.tokenizer import Tokenizer

SAMPLES, BATCH, SIZE = 1000, 50, 64
CAPTION = b"a photograph of a garden"


def bomb() -> bytes:
    """A picture of a few kilobytes that unpacks to 400 million pixels."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


def spoilt(picture: bytes) -> Iterator[tuple[bytes, bytes | None]]:
    """The same picture with one fault after the other, without end."""
    noise = np.zeros((10_000, 1, 3), dtype=np.uint8)
    thin = io.BytesIO()
    Image.fromarray(noise).save(thin, "PNG")
    return itertools.cycle(
        [
            (picture[: len(picture) // 2], CAPTION),
            (picture[:-2000], CAPTION),
            (b"<html>502 Bad Gateway</html>", CAPTION),
            (b"", CAPTION),
            (bomb(), CAPTION),
            (thin.getvalue(), CAPTION),
            (picture, None),
            (picture, b"\xff\xfe"),
        ]
    )


def write(path: Path, pictures: list[bytes], *, spoil: bool) -> None:
    bad = spoilt(pictures[0])
    with tarfile.open(path, "w") as archive:
        for number, picture in zip(range(SAMPLES), itertools.cycle(pictures), strict=False):
            broken = spoil and number % 10 in (2, 5, 8)
            image, caption = next(bad) if broken else (picture, CAPTION)
            for extension, content in (("jpg", image), ("txt", caption)):
                if content is not None:
                    entry = tarfile.TarInfo(f"{number:06d}.{extension}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def epoch(data: Dataset, tokenizer: Tokenizer) -> Counter[str]:
    """Read every sample once; the reasons of those that could not be used."""
    batches = train_batches(
        data, tokenizer=tokenizer, text_length=16, batch_size=BATCH, num_workers=0
    )
    taken = itertools.islice(batches, SAMPLES // BATCH)
    return Counter(reason for batch in taken for _, _, reason in batch.bad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    print(machine("pillow", "torch"))
    tokenizer = Tokenizer.train([CAPTION.decode()], 300)
    pictures = photographs(args.photos, 1)
    with tempfile.TemporaryDirectory() as name:
        opened = {}
        for kind in ("clean", "spoilt"):
            path = Path(name) / f"{kind}.tar"
            write(path, pictures, spoil=kind == "spoilt")
            cfg = DataConfig(data_dir=[str(path)], num_workers=0)
            opened[kind] = open_data(cfg, split="train", image_size=SIZE, with_text=True, seed=0)
        assert not epoch(opened["clean"], tokenizer)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reasons = epoch(opened["spoilt"], tokenizer)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 / 1e6
        seconds = interleaved(
            {kind: timed(lambda d=data: epoch(d, tokenizer)) for kind, data in opened.items()},
            args.rounds,
        )
    median, _ = speedup(seconds["spoilt"], seconds["clean"])
    rates = [SAMPLES / statistics.median(seconds[kind]) for kind in ("clean", "spoilt")]
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    print("| bad of 1,000 | clean samples/s | spoilt samples/s | time, spoilt / clean | goal |"
          " peak memory grew by, MB | goal |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {reasons.total()}: {listed} | {rates[0]:.0f} | {rates[1]:.0f} | {median:.2f} | "
        f"1.10 | {grown:.0f} | 200 |"
    )


if __name__ == "__main__":
    main()
