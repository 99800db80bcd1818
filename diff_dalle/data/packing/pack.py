"""The entry: from the command's settings to a folder with train and val shards."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diff_dalle.data.limits import MAX_PIXELS
from diff_dalle.data.packing.assembly import Assembly, Rules
from diff_dalle.data.packing.columnar import HuggingFaceSource, ParquetSource
from diff_dalle.data.packing.encode import EncodeSettings
from diff_dalle.data.packing.folders import folder_source
from diff_dalle.data.packing.out_folder import (
    Progress,
    finish,
    held,
    open_progress,
    reasons,
    summary,
)
from diff_dalle.data.packing.prepare import prepare_all
from diff_dalle.data.packing.records import Columns, Source
from diff_dalle.data.packing.tables import table_source
from diff_dalle.errors import UsageError
from diff_dalle.knobs import knob, require

_PACKAGES = {"images": [], "parquet": ["pyarrow"], "hf_dataset": ["datasets", "pyarrow"]}


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Which pictures to pack, what they must be, and where to put them."""

    images: str | None = knob(None, "folder of images, with .txt beside them or --captions")
    captions: list[str] = knob(
        [], "tables for --images: .jsonl, .csv, .tsv, .json (a list, or COCO); merged by image"
    )
    parquet: list[str] = knob([], "parquet files, or folders of them")
    hf_dataset: str | None = knob(None, "data set on the Hugging Face Hub, or a folder of one")
    hf_split: str = knob("train", "which split of --hf_dataset")
    image_column: str | None = knob(None, "column of the image; else a usual name is looked for")
    caption_column: str | None = knob(None, "column of a text or a list of texts; likewise")
    out_dir: str | None = knob(None, "folder to write: train/, val/, skipped.jsonl")
    resize: int = knob(0, "most pixels of the shorter side, larger images shrink; 0: keep all")
    quality: int = knob(95, "of JPEGs that are encoded anew, 1 to 100")
    reencode: bool = knob(False, "encode all images anew, upright and without metadata")
    min_size: int = knob(0, "skip images whose shorter side has fewer pixels")
    drop_duplicates: bool = knob(True, "of equal image files keep the first only")
    val_share: float = knob(0.01, "share of val/; ignored where folders train and val decide")
    normalise_captions: bool = knob(True, "Unicode NFC and single blanks in captions")
    samples_per_shard: int = knob(10_000, "the most samples of a tar file")
    shard_bytes: int = knob(2**30, "the most bytes of a tar file of more than one sample")
    num_workers: int = knob(2, "processes that read and encode; 0: in the main one")

    def __post_init__(self) -> None:
        require(bool(self.out_dir), "out_dir", self.out_dir, "name a folder to write")
        given = self.sources
        if len(given) != 1:
            found = " and ".join(f"--{name}" for name in given) or "none"
            raise UsageError(
                "give one source: --images DIR [--captions FILE ...], --parquet FILE ... or "
                f"--hf_dataset NAME (given: {found})"
            )
        if self.captions and self.images is None:
            require(False, "captions", self.captions, "come with --images")
        for name in ("resize", "min_size", "num_workers"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "be 0 or more")
        for name in ("samples_per_shard", "shard_bytes"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "be 1 or more")
        require(1 <= self.quality <= 100, "quality", self.quality, "be 1 to 100")
        require(0 <= self.val_share < 1, "val_share", self.val_share, "lie in [0, 1)")

    @property
    def sources(self) -> list[str]:
        """The kinds of source that are given."""
        return [name for name in _PACKAGES if getattr(self, name)]


def pack_dataset(cfg: PackConfig) -> str:
    """Write the data set, go on where an interrupted call stopped, or find it complete.

    The folder afterwards: ``train/`` and ``val/`` with ``000000.tar``, ... and ``dataset.json``,
    and ``skipped.jsonl``. It is the same, byte for byte, for any number of workers and
    interruptions.

    Returns:
        One line for the user.
    Raises:
        UsageError: the source or the folder cannot be used; before any work where possible.
    """
    source = open_source(cfg)
    folder = Path(cfg.out_dir or "")
    settings = _settings(cfg, source)
    with held(folder):
        progress = open_progress(folder, settings)
        if progress is None:
            return f"{folder} is complete already: {summary(folder)}"
        if not progress.finished:
            _pack(cfg, source, settings, progress)
        versions = {name: version(name) for name in ["pillow", *_PACKAGES[cfg.sources[0]]]}
        finish(folder, {"settings": settings, "versions": versions}, progress)
    return f"{folder}: {summary(folder)}"


def open_source(cfg: PackConfig) -> Source:
    """The one source that is given.

    Raises:
        UsageError: it is missing, empty or lacks a column.
    """
    columns = Columns(cfg.image_column, cfg.caption_column)
    if cfg.parquet:
        return ParquetSource(cfg.parquet, columns)
    if cfg.hf_dataset:
        return HuggingFaceSource(cfg.hf_dataset, cfg.hf_split, columns)
    images = Path(cfg.images or "")
    if not images.is_dir():
        raise UsageError(f"--images {images}: no such folder")
    # Shards would come to lie among what the next call reads.
    if Path(cfg.out_dir or "").resolve().is_relative_to(images.resolve()):
        raise UsageError(f"--out_dir {cfg.out_dir} lies in --images: name a folder outside it")
    if cfg.captions:
        return table_source([Path(name) for name in cfg.captions], images, columns)
    return folder_source(images, columns)


def _pack(cfg: PackConfig, source: Source, settings: dict[str, Any], progress: Progress) -> None:
    from tqdm import tqdm

    rules = Rules(
        drop_duplicates=cfg.drop_duplicates,
        val_share=cfg.val_share,
        samples_per_shard=cfg.samples_per_shard,
        shard_bytes=cfg.shard_bytes,
    )
    encoding = EncodeSettings(
        resize=cfg.resize,
        quality=cfg.quality,
        reencode=cfg.reencode,
        min_size=cfg.min_size,
        max_pixels=MAX_PIXELS,
    )
    assembly = Assembly(Path(cfg.out_dir or ""), settings, progress, rules)
    prepared = prepare_all(
        source.records(progress.position),
        encoding,
        normalise_captions=cfg.normalise_captions,
        num_workers=cfg.num_workers,
    )
    with (
        closing(prepared),
        tqdm(total=source.total, initial=progress.position, unit="img", desc="packing") as bar,
    ):
        for record, result in prepared:
            assembly.add(record, result)
            bar.update()
    if not any(state.length for state in progress.splits.values()):
        skipped = reasons(progress.skipped)
        raise UsageError(
            f"no record can be packed, skipped {skipped}: mend the source, name a new --out_dir"
        )
    assembly.end()


def _settings(cfg: PackConfig, source: Source) -> dict[str, Any]:
    """What decides the bytes of the data set."""
    settings = dataclasses.asdict(cfg)
    del settings["out_dir"], settings["num_workers"]
    return {**settings, "source": source.identity}
