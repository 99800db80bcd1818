"""Thousands of captioned photographs of 1 to 12 megapixels, cut from a few large ones.

python benchmarks/make_photographs.py --photos FOLDER --out_dir OUT --number 2000

Writes OUT/00000.jpg … and OUT/captions.jsonl. A picture is a part of a photograph, enlarged or
reduced to its size; some lie on their side with an orientation tag, some are PNG or WebP.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = ("jpg", "jpg", "jpg", "jpg", "jpg", "jpg", "jpg", "png", "webp", "turned")
ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3)  # width / height
ORIENTATION, TURNED_LEFT = 0x0112, 6  # the tag of EXIF, and "turn it by 90 degrees to the right"


def part_of(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Half to all of a picture, of a random shape, with 1 to 12 million pixels."""
    pixels, aspect = rng.uniform(1e6, 12e6), ASPECTS[rng.integers(len(ASPECTS))]
    size = round((pixels * aspect) ** 0.5), round((pixels / aspect) ** 0.5)
    scale = min(picture.width / size[0], picture.height / size[1]) * rng.uniform(0.5, 1.0)
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
    box = (left, top, left + width, top + height)
    return picture.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)


def make(number: int, sources: list[Path], out: Path) -> dict[str, str]:
    """Write one picture; its row for captions.jsonl."""
    rng = np.random.default_rng(number)
    source, kind = sources[number % len(sources)], KINDS[rng.integers(len(KINDS))]
    with Image.open(source) as opened:
        picture = part_of(opened.convert("RGB"), rng)
    name = f"{number:05d}.{'jpg' if kind == 'turned' else kind}"
    if kind == "turned":
        exif = Image.Exif()
        exif[ORIENTATION] = TURNED_LEFT
        picture.transpose(Image.Transpose.ROTATE_90).save(out / name, quality=85, exif=exif)
    elif kind == "png":
        picture.save(out / name, compress_level=1)
    else:
        picture.save(out / name, quality=int(rng.integers(75, 96)), method=0)
    title = source.stem.replace("_", " ").replace("-", " ")
    return {"image": name, "caption": f"a photograph, {title}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of large photographs")
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--number", type=int, default=2000)
    args = parser.parse_args()
    sources = sorted(path for path in args.photos.rglob("*.jpg") if path.is_file())
    args.out_dir.mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        work = partial(make, sources=sources, out=args.out_dir)
        rows = list(pool.map(work, range(args.number), chunksize=8))
    with open(args.out_dir / "captions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
