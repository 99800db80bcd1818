"""The demo data sets: scenes of shapes, or emoji artwork, as a folder with train and val shards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from diff_dalle.data import emoji
from diff_dalle.data.captions import captions
from diff_dalle.data.json_files import write_json
from diff_dalle.data.scenes import TRAIN, VAL, sample_scene
from diff_dalle.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from diff_dalle.data.writer import (
    FORMATS,
    Sample,
    require_same_settings,
    write_shards,
)
from diff_dalle.errors import UsageError
from diff_dalle.knobs import knob, require, require_choice

SOURCES = ("shapes", "emoji")
_SCENES = {TRAIN: 20_000, VAL: 1_000}
_TOKENIZER_CAPTIONS = 100_000
_TOKENIZERS = ("tokenizer.json", f"{TRAIN}/tokenizer.json")
_UNFINISHED, _FINISHED = "unfinished.json", "dataset.json"


@dataclass(frozen=True, kw_only=True)
class DemoDataConfig:
    """What to draw and where to put it."""

    source: str = knob("shapes", "shapes (drawn here) or emoji (from --artwork)")
    out_dir: str | None = knob(None, "folder to write: train/, val/, tokenizer.json, dataset.json")
    artwork: str | None = knob(None, "Iconify JSON, for --source emoji")
    languages: list[str] = knob(["en", "ko"], "languages of the emoji captions")
    num_train: int = knob(0, "training samples; 0: 20,000 scenes, or every icon once")
    num_val: int = knob(0, "validation samples; 0: 1,000 scenes, or every held-out icon once")
    image_size: int = knob(256, "pixels of a picture's side")
    image_format: str = knob("png", "png or jpg")
    seed: int = knob(0, "which scenes, or which order of the icons")
    samples_per_shard: int = knob(1000, "samples in a tar file")
    num_workers: int = knob(2, "drawing processes; 0 draws in the main one")
    vocab_size: int = knob(4096, "the most entries of the tokenizer's vocabulary")

    def __post_init__(self) -> None:
        require_choice("source", self.source, SOURCES)
        require_choice("image_format", self.image_format, FORMATS)
        require(bool(self.out_dir), "out_dir", self.out_dir, "name a folder to write")
        emoji_given = self.source == "emoji"
        if emoji_given != (self.artwork is not None):
            must = "name an Iconify JSON for --source emoji, and be left out for shapes"
            require(False, "artwork", self.artwork, must)
        require(16 <= self.image_size <= 2048, "image_size", self.image_size, "be 16 to 2048")
        for name in ("num_train", "num_val", "num_workers"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "be 0 or more")
        must = "be 1 to 100000"
        require(
            1 <= self.samples_per_shard <= 100_000,
            "samples_per_shard",
            self.samples_per_shard,
            must,
        )
        least = SMALLEST_VOCABULARY
        require(self.vocab_size >= least, "vocab_size", self.vocab_size, f"be at least {least}")


@dataclass(frozen=True)
class _Split:
    """Where the samples of a split come from."""

    name: str
    count: int
    sample: Callable[[int], Sample]


@dataclass(frozen=True)
class _Source:
    """A source of samples and what `dataset.json` says about it."""

    splits: list[_Split]
    licence: dict[str, str]
    facts: dict[str, Any]


def make_demo_data(cfg: DemoDataConfig) -> str:
    """Write the data set, or find it complete.

    The folder afterwards: ``train/*.tar``, ``val/*.tar``, ``tokenizer.json`` (also in
    ``train/``) and ``dataset.json``. An interrupted call with the same settings goes on.

    Returns:
        One line for the user.
    Raises:
        UsageError: the folder holds something else, or the artwork cannot be used.
    """
    folder = Path(cfg.out_dir or "")
    settings = _settings(cfg)
    if _is_complete(folder, settings):
        return f"{folder} is complete already: {_summary(folder)}"
    source = _shapes(cfg) if cfg.source == "shapes" else _emoji(cfg)
    write_json(folder / _UNFINISHED, {"settings": settings})
    splits = {split.name: _write_split(split, folder, cfg) for split in source.splits}
    tokenizer = _train_tokenizer(source.splits[0], cfg.vocab_size)
    for name in _TOKENIZERS:
        tokenizer.save(folder / name)
    content = {
        "length": sum(split["length"] for split in splits.values()),
        "splits": splits,
        "image_size": cfg.image_size,
        "image_format": cfg.image_format,
        "licence": source.licence,
        **source.facts,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
        "settings": settings,
        "versions": _versions(cfg.source),
    }
    write_json(folder / _FINISHED, content)
    (folder / _UNFINISHED).unlink()
    return f"{folder}: {_summary(folder)}"


def _settings(cfg: DemoDataConfig) -> dict[str, Any]:
    """What decides the bytes of the data set."""
    settings = dataclasses.asdict(cfg)
    del settings["out_dir"], settings["num_workers"]
    if cfg.artwork is None:
        del settings["artwork"], settings["languages"]
    elif Path(cfg.artwork).is_file():  # elsewhere `read_icons` refuses it
        settings["artwork"] = "sha256 " + hashlib.sha256(Path(cfg.artwork).read_bytes()).hexdigest()
    return settings


def _is_complete(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the data set lies there already; a folder that holds anything else is refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir() if path.suffix != ".part"}
    except OSError as error:
        raise UsageError(f"--out_dir {folder}: cannot be written ({error.strerror})") from error
    if not names:
        return False
    marker = _FINISHED if _FINISHED in names else _UNFINISHED
    try:
        content = json.loads((folder / marker).read_text(encoding="utf-8"))
        saved = content["settings"]
        shards = _shard_sizes(content) if marker == _FINISHED else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        some = ", ".join(sorted(names)[:3])
        raise UsageError(
            f"--out_dir {folder} holds something else ({some}): name a new or an empty folder"
        ) from error
    require_same_settings(folder, saved, settings, of="other settings")
    for name, size in shards.items():
        path = folder / name
        if path.exists() and path.stat().st_size != size:
            raise UsageError(f"{path} is damaged (not {size} bytes): remove it and run again")
    needed = [*shards, *_TOKENIZERS]
    return marker == _FINISHED and all((folder / name).exists() for name in needed)


def _shard_sizes(content: dict[str, Any]) -> dict[str, int]:
    return {
        f"{split}/{name}": size
        for split, facts in content["splits"].items()
        for name, size in facts["shards"].items()
    }


def _shapes(cfg: DemoDataConfig) -> _Source:
    def split(name: str, count: int) -> _Split:
        def sample(index: int) -> Sample:
            scene = sample_scene(cfg.seed, index, name)
            key = f"{name}{index:08d}"
            return Sample(key=key, captions=captions(scene), truth=scene.truth(), picture=scene)

        return _Split(name, count or _SCENES[name], sample)

    splits = [split(TRAIN, cfg.num_train), split(VAL, cfg.num_val)]
    return _Source(splits, {"title": "CC0 1.0", "spdx": "CC0-1.0"}, {})


def _emoji(cfg: DemoDataConfig) -> _Source:
    path = Path(cfg.artwork or "")
    icons = emoji.read_icons(path, cfg.languages)

    def split(name: str, count: int) -> _Split:
        mine = emoji.shuffled([icon for icon in icons if icon.held_out == (name == VAL)], cfg.seed)
        if not mine:
            raise UsageError(f"--artwork {path}: {len(icons)} icons leave none for {name}/")

        def sample(index: int) -> Sample:
            picture = emoji.icon_picture(mine, cfg.seed, index)
            lines = picture.icon.captions()
            key = f"{name}{index:08d}"
            return Sample(key=key, captions=lines, truth=picture.truth(), picture=picture)

        return _Split(name, count or len(mine), sample)

    splits = [split(TRAIN, cfg.num_train), split(VAL, cfg.num_val)]
    sides = Counter(VAL if icon.held_out else TRAIN for icon in icons)
    named = sum(bool(icon.emoji) for icon in icons)
    counts = {"all": len(icons), **sides, "named": named, "by_own_name": len(icons) - named}
    return _Source(splits, emoji.licence_of(path), {"icons": counts})


def _write_split(split: _Split, folder: Path, cfg: DemoDataConfig) -> dict[str, Any]:
    shards = write_shards(
        folder / split.name,
        split.sample,
        split.count,
        image_size=cfg.image_size,
        image_format=cfg.image_format,
        samples_per_shard=cfg.samples_per_shard,
        num_workers=cfg.num_workers,
    )
    held_out = sum(split.sample(index).truth["held_out"] for index in range(split.count))
    return {"length": split.count, "held_out": held_out, "shards": shards}


def _train_tokenizer(split: _Split, vocab_size: int) -> Tokenizer:
    lines = (line for index in range(split.count) for line in split.sample(index).captions)
    return Tokenizer.train(islice(lines, _TOKENIZER_CAPTIONS), vocab_size)


def _versions(source: str) -> dict[str, str]:
    names = ["numpy", "pillow", "tokenizers", "torch"]
    return {name: version(name) for name in names + ["emoji", "resvg_py"] * (source == "emoji")}


def _summary(folder: Path) -> str:
    content = json.loads((folder / _FINISHED).read_text(encoding="utf-8"))
    lengths = ", ".join(f"{split['length']} in {n}/" for n, split in content["splits"].items())
    return f"{lengths} at {content['image_size']} px, {content['image_format']}"
