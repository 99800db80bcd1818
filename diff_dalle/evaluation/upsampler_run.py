"""The measurement of an upsampler on held-out pictures, from flags to files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from diff_dalle.cascade.inputs import shrunk_to
from diff_dalle.data.batch import BadSample
from diff_dalle.data.images import decode
from diff_dalle.data.loader import DataConfig, open_data
from diff_dalle.data.order import spread
from diff_dalle.errors import UsageError
from diff_dalle.evaluation.drawing import Drawer, DrawingConfig
from diff_dalle.evaluation.features import ANY_PICTURE, FEATURES, LEAST_SIDE
from diff_dalle.evaluation.report import write_report
from diff_dalle.evaluation.upsampling import compare_with_lanczos, enlarge_lanczos
from diff_dalle.knobs import knob, require
from diff_dalle.sampling_io.store import Pictures

_SHOWN, _LARGEST_SHOWN = 6, 256  # rows of the comparison, pixels of a picture in it


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpsamplerConfig(DrawingConfig):
    """Which held-out pictures to enlarge."""

    data_dir: list[str] = knob([], "held-out shards: folders, tar files or patterns")
    caption_key: str | None = knob(
        None, "field of the .json that holds captions (default: that of the training)"
    )
    classifier_scale: float = knob(1.0, "strength of the noised CLIP's gradient, if one is given")
    seed: int = knob(0, "of the noise")
    features: list[str] = knob(
        [*ANY_PICTURE], "for Fréchet distances: bands, random; shapes is for demo scenes alone"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.data_dir), "data_dir", self.data_dir, "name held-out shards")
        known = bool(self.features) and set(self.features) <= set(FEATURES)
        require(known, "features", self.features, f"name some of {', '.join(FEATURES)}")


def evaluate_upsampler(cfg: UpsamplerConfig) -> tuple[list[Path], str]:
    """Enlarge held-out pictures and write ``upsampler.json``, ``.md`` and ``.png``.

    Returns:
        The files written, and the table to show.
    Raises:
        UsageError: no single upsampler, or too few usable pictures.
    """
    drawer = Drawer(cfg)
    stage = drawer.cascade.stages[0]
    if len(drawer.cascade.stages) > 1 or not stage.small_size:
        raise UsageError("--model_path must name one upsampler: evaluate_shapes.py takes cascades")
    least = max(LEAST_SIDE[name] for name in cfg.features)
    must = f"be of stages of {least} px or more: this one makes {stage.image_size} px"
    require(stage.image_size >= least, "features", cfg.features, must)
    key = cfg.caption_key or stage.loaded.run.data.caption_key
    data = DataConfig(data_dir=cfg.data_dir, caption_key=key, num_workers=0)
    true, captions = read_held_out(
        data, cfg.num_samples, stage.image_size, with_text=stage.reads_text
    )
    small = shrunk_to(true, (stage.small_size, stage.small_size), stage.device)
    folder = cfg.folder()  # before hours of drawing, not after them
    (output,) = drawer.draw(
        captions, seed=cfg.seed, classifier_scale=cfg.classifier_scale, low_res=small
    )
    report = compare_with_lanczos(true, small, output, cfg.features)
    content, table = {**drawer.facts(), **report.to_json()}, report.table()
    grid = comparison(true, small, output)
    return write_report(folder, "upsampler", content, table, grid), table


def read_held_out(
    cfg: DataConfig, count: int, image_size: int, *, with_text: bool
) -> tuple[Pictures, list[str]]:
    """Pictures uint8 [N,S,S,3] spread evenly over a dataset, and their captions.

    Broken samples are left out. Without text the captions are empty.

    Raises:
        UsageError: the dataset is missing or has fewer than four usable pictures.
    """
    dataset = open_data(cfg, split="train", image_size=image_size, with_text=with_text, seed=0)
    pictures, captions = [], []
    for sample in spread(len(dataset), count):
        try:
            raw = dataset.read(int(sample))
            caption = dataset.captions_of(raw).first if with_text else ""
            pictures.append(decode(raw.image, image_size).transpose(1, 2, 0))  # [S,S,3]
        except BadSample:
            continue
        captions.append(caption)
    if len(pictures) < 4:
        raise UsageError(
            f"--data_dir {' '.join(cfg.data_dir)} has {len(pictures)} usable pictures of "
            f"{image_size} px: 4 are the least, 256 are good"
        )
    return np.stack(pictures), captions


def comparison(true: Pictures, small: Pictures, output: Pictures) -> Image.Image:
    """Rows of small picture, Lanczos, model and truth; large ones are cut to their middle."""
    size = true.shape[1]
    lanczos = enlarge_lanczos(small[:_SHOWN], size)
    factor = size // small.shape[1]
    blocks = small[:_SHOWN].repeat(factor, axis=1).repeat(factor, axis=2)
    start = max(0, (size - _LARGEST_SHOWN) // 2)
    middle = slice(start, start + min(size, _LARGEST_SHOWN))
    columns = [part[:_SHOWN, middle, middle] for part in (blocks, lanczos, output, true)]
    rows = [np.concatenate(row, axis=1) for row in zip(*columns, strict=True)]
    return Image.fromarray(np.concatenate(rows, axis=0))
