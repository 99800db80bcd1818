"""The pictures of docs/sampling.md, each a grid with its settings written at its edges.

python benchmarks/sampling_figures.py --cascade runs/base/ema.pt runs/up256/ema.pt \
    --clip runs/clip/best.pt --out_dir docs/images
python benchmarks/sampling_figures.py ... --figures guidance clip

The models are trained on the demo scenes. Within a grid every picture has the same
noise, except where seeds are named.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diff_dalle import Cascade
from diff_dalle.cascade import Edit, SampleSettings
from diff_dalle.data.captions import one_object_captions

Pictures = NDArray[np.uint8]

CAPTIONS = (
    "a large orange star at the top of a grey background",
    "a small blue circle in the centre of a pink background",
)
SEED, MARGIN, LABEL, CELL = 3, 4, 118, 128  # pixels


@dataclass(frozen=True)
class Models:
    """What figures draw with: the base model alone, that with its CLIP, and with an upsampler."""

    base: Cascade
    guided: Cascade
    upsampled: Cascade


@dataclass(frozen=True)
class Grid:
    """Pictures uint8 [H,W,3] by row and column, and what stands beside and above them."""

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Pictures]]

    def draw(self) -> Image.Image:
        step, top = CELL + MARGIN, 20
        size = (LABEL + step * len(self.columns), top + step * len(self.rows))
        sheet = Image.new("RGB", size, "white")
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
        for number, text in enumerate(self.columns):
            pen.text((LABEL + number * step + 2, 3), text, "black", font)
        for number, text in enumerate(self.rows):
            pen.multiline_text((2, top + number * step + 4), text, "black", font)
        for row, pictures in enumerate(self.cells):
            for column, pixels in enumerate(pictures):
                picture = Image.fromarray(pixels)
                shape = [round(CELL * side / max(picture.size)) for side in picture.size]
                picture = picture.resize((shape[0], shape[1]), Image.Resampling.LANCZOS)
                sheet.paste(picture, (LABEL + column * step, top + row * step))
        return sheet


def one(
    cascade: Cascade,
    caption: str = CAPTIONS[0],
    edit: Edit | None = None,
    **settings: Unpack[SampleSettings],
) -> Pictures:
    """The last stage's picture."""
    result = cascade.sample([caption], edit=edit, **{"seed": SEED, **settings})
    picture: Pictures = result.stages[-1][0]
    return picture


def samplers(models: Models) -> Grid:
    counts = (6, 12, 20, 50)
    names = ("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun")
    cells = [
        [
            one(models.base, sampler=name, steps=max(n // (2 if name == "heun" else 1), 1))
            for n in counts
        ]
        for name in names
    ]
    return Grid(names, [f"up to {n} evaluations" for n in counts], cells)


def guidance(models: Models) -> Grid:
    scales = (1, 2, 4, 8, 16)
    kinds: dict[str, SampleSettings] = {
        "everywhere": {},
        "interval 1,5": {"guidance_interval": "1,5"},
        "schedule linear": {"guidance_schedule": "linear"},
        "rescale 0.7": {"guidance_rescale": 0.7},
        "dynamic\nthreshold": {"threshold": "dynamic"},
    }
    cells = [
        [one(models.base, guidance_scale=scale, **(kind if scale > 1 else {})) for scale in scales]
        for kind in kinds.values()
    ]
    return Grid(list(kinds), [f"scale {scale}" for scale in scales], cells)


def clip(models: Models) -> Grid:
    scales = (0, 1, 3, 10, 30)
    rows = {"unipc": "unipc", "ddim": "ddim", "ddpm, 50 steps": "ddpm"}
    cells = [
        [
            one(
                models.guided,
                CAPTIONS[1],
                classifier_scale=scale,
                sampler=sampler,
                steps=50 if sampler == "ddpm" else 20,
            )
            for scale in scales
        ]
        for sampler in rows.values()
    ]
    return Grid(list(rows), [f"scale {scale}" for scale in scales], cells)


def augmentation(models: Models) -> Grid:
    levels = (0.0, 0.05, 0.1, 0.2)
    cells = [
        [one(models.upsampled, caption, aug_level=["0", str(level)]) for level in levels]
        for caption in CAPTIONS
    ]
    return Grid(["orange star", "blue circle"], [f"aug_level {level}" for level in levels], cells)


def negative(models: Models) -> Grid:
    prompts = ("", "a star", "orange", "a grey background")
    cells = [
        [one(models.base, guidance_scale=3, negative_prompts=[text]) for text in prompts],
    ]
    return Grid(["orange star,\ngrey background"], [f"not: {t or '-'}" for t in prompts], cells)


def given_scene() -> Pictures:
    """The picture that is edited: a demo scene at 256 px."""
    ((_, scene),) = one_object_captions(1, seed=7, held_out=True)
    picture: Pictures = scene.draw(256)
    return picture


def inpainting(models: Models) -> Grid:
    given, mask = given_scene(), np.zeros((256, 256), np.uint8)
    mask[128:, :] = 255  # the lower half
    guided: SampleSettings = {"guidance_scale": ["4", "1"], "guidance_interval": ["1,5", "all"]}
    cells = []
    for caption in CAPTIONS:
        edit = Edit(init_images=given, masks=mask)
        drawn = [
            models.upsampled.sample([caption], seed=seed, edit=edit, **guided).stages[-1][0]
            for seed in (0, 1, 2)
        ]
        cells.append([given, np.repeat(mask[..., None], 3, 2), *drawn])
    return Grid(["orange star", "blue circle"], ["given", "mask", "seed 0", "1", "2"], cells)


def image_to_image(models: Models) -> Grid:
    given, shares = given_scene(), (0.3, 0.5, 0.7, 0.9)
    cells = [
        [given]
        + [
            one(models.upsampled, caption, edit=Edit(init_images=given, strength=share))
            for share in shares
        ]
        for caption in CAPTIONS
    ]
    columns = ["given", *(f"strength {share}" for share in shares)]
    return Grid(["orange star", "blue circle"], columns, cells)


def variations(models: Models) -> Grid:
    given, shares = given_scene(), (0.0, 0.2, 0.4, 1.0)
    ((caption, _),) = one_object_captions(1, seed=7, held_out=True)
    drawn = [
        one(models.upsampled, caption, edit=Edit(init_images=given, variation=share))
        for share in shares
    ]
    columns = ["given", *(f"variation {share}" for share in shares)]
    return Grid(["its own caption"], columns, [[given, *drawn]])


def interpolation(models: Models) -> Grid:
    cells = []
    for seed in (None, 8):
        edit = Edit(interpolate_to=CAPTIONS[1], interpolate_seed=seed, frames=5)
        result = models.upsampled.sample([CAPTIONS[0]], seed=SEED, edit=edit)
        cells.append(list(result.stages[-1]))
    rows = ["orange star\nto blue circle", "and to other\nnoise"]
    return Grid(rows, [f"frame {n}" for n in range(1, 6)], cells)


def sizes(models: Models) -> Grid:
    asked = {"as trained": "auto", "384x256": "384x256", "256x384": "256x384", "512": "512"}
    tiles = {"whole": 0, "tiles of 128": 128, "tiles of 64": 64}
    cells = [
        [one(models.upsampled, size=size, tile_size=["0", str(tile)]) for tile in tiles.values()]
        for size in asked.values()
    ]
    return Grid(list(asked), list(tiles), cells)


FIGURES: dict[str, Callable[[Models], Grid]] = {
    "samplers": samplers,
    "guidance": guidance,
    "clip": clip,
    "augmentation": augmentation,
    "negative": negative,
    "inpainting": inpainting,
    "image_to_image": image_to_image,
    "variations": variations,
    "interpolation": interpolation,
    "sizes": sizes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cascade", nargs=2, required=True, help="base model and upsampler")
    parser.add_argument("--clip", required=True, help="noised CLIP of the base model's size")
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=[*FIGURES])
    args = parser.parse_args()
    models = Models(
        base=Cascade.load(args.cascade[0]),
        guided=Cascade.load(args.cascade[0], classifier=args.clip),
        upsampled=Cascade.load(args.cascade),
    )
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name in args.figures:
        path = args.out_dir / f"sampling_{name}.png"
        FIGURES[name](models).draw().save(path)
        print(path, flush=True)


if __name__ == "__main__":
    main()
