"""How fast, and how well, a photograph becomes a small square: ours against the ancestors' way.

python benchmarks/decoding.py --photos FOLDER

The ancestors (guided-diffusion and its line) decode in full, halve with a box filter while the
shorter side is at least twice the target, and finish with a bicubic one. Every photograph of
the folder that is large enough is first made into a JPEG of 1 and of 4 megapixels, quality 90.
Fidelity is the peak signal-to-noise ratio to a Lanczos filter on the full picture.
"""

from __future__ import annotations

import argparse
import io
import statistics
from pathlib import Path

import numpy as np
from measure import ROUNDS, interleaved, machine, speedup, timed
from PIL import Image

from diff_dalle.data.images import decode

MEGAPIXELS, TARGETS = (1, 4), (64, 256)
GOALS = {(1, 64): 3.5, (4, 64): 5.0, (1, 256): 1.25, (4, 256): 2.5}


def ancestors(data: bytes, size: int) -> np.ndarray:
    """uint8 [size,size,3]."""
    picture = Image.open(io.BytesIO(data))
    picture.load()
    while min(picture.size) >= 2 * size:
        half = (picture.width // 2, picture.height // 2)
        picture = picture.resize(half, Image.Resampling.BOX)
    scale = size / min(picture.size)
    whole = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.convert("RGB").resize(whole, Image.Resampling.BICUBIC)
    return centre(np.asarray(picture), size)


def lanczos(data: bytes, size: int) -> np.ndarray:
    """uint8 [size,size,3]: what both should come close to."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    scale = size / min(picture.size)
    whole = (round(picture.width * scale), round(picture.height * scale))
    return centre(np.asarray(picture.resize(whole, Image.Resampling.LANCZOS)), size)


def centre(pixels: np.ndarray, size: int) -> np.ndarray:
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def photographs(folder: Path, megapixels: int) -> list[bytes]:
    """JPEG files of so many megapixels, made of the larger photographs of a folder."""
    made = []
    Image.MAX_IMAGE_PIXELS = None
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in (".jpg", ".jpeg"):
            continue
        with Image.open(path) as original:
            scale = (megapixels * 1e6 / (original.width * original.height)) ** 0.5
            if scale > 1:
                continue
            size = (round(original.width * scale), round(original.height * scale))
            picture = original.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def compare(photos: list[bytes], size: int, rounds: int) -> list[str]:
    """Rates of both, the ratio with its bound, fidelity of both."""
    seconds = interleaved(
        {
            "ancestors": timed(lambda: [ancestors(photo, size) for photo in photos]),
            "ours": timed(lambda: [decode(photo, size) for photo in photos]),
        },
        rounds,
    )
    median, bound = speedup(seconds["ancestors"], seconds["ours"])
    rates = [len(photos) / statistics.median(seconds[name]) for name in ("ancestors", "ours")]
    true = [lanczos(photo, size) for photo in photos]
    theirs = [psnr(ancestors(p, size), t) for p, t in zip(photos, true, strict=True)]
    ours = [psnr(decode(p, size).transpose(1, 2, 0), t) for p, t in zip(photos, true, strict=True)]
    fidelity = [statistics.median(theirs), statistics.median(ours)]
    row = [*(f"{rate:.1f}" for rate in rates), f"{median:.2f} (≥ {bound:.2f})"]
    return [*row, *(f"{one:.1f}" for one in fidelity)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    print(machine("pillow", "numpy"))
    print("| photographs | target | ancestors img/s | ours img/s | ratio (95 % bound) | goal |"
          " ancestors dB | ours dB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for megapixels in MEGAPIXELS:
        photos = photographs(args.photos, megapixels)
        for size in TARGETS:
            row = compare(photos, size, args.rounds)
            goal = f"{GOALS[megapixels, size]:g}"
            cells = [f"{len(photos)} of {megapixels} Mpx", f"{size} px", *row[:3], goal, *row[3:]]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
