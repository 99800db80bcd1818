"""A tokenizer of the captions of any shards: the one a run would take, or one to keep."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diff_dalle.data.caption_fields import DEFAULT_KEY
from diff_dalle.data.loader import DataConfig, Dataset, open_data
from diff_dalle.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from diff_dalle.errors import UsageError
from diff_dalle.knobs import knob, require

TRAINED = "trained on these captions"
_CAPTIONS = 100_000  # that a tokenizer is trained on where the shards bring none
_VOCABULARY = 8192
_MEASURED = 10_000  # captions that the new tokenizer is tried on
_CONTROL = 2  # tokens of a caption that are no text: start and end


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which captions to learn from, and where the tokenizer goes."""

    data_dir: list[str] = knob([], "folders, tar files or patterns of shards")
    out: str | None = knob(None, "file to write; tokenizer.json beside the shards is found by runs")
    vocab_size: int = knob(_VOCABULARY, "the most entries of the vocabulary")
    max_captions: int = knob(0, "learn from at most so many captions; 0: from all")
    caption_key: str = knob(DEFAULT_KEY, "field of the .json that holds captions")
    overwrite: bool = knob(False, "replace the file if there is one")

    def __post_init__(self) -> None:
        require(bool(self.out), "out", self.out, "name a file to write")
        least = SMALLEST_VOCABULARY
        require(self.vocab_size >= least, "vocab_size", self.vocab_size, f"be at least {least}")
        limit = self.max_captions
        require(limit >= 0, "max_captions", limit, "be 0 (all) or more")
        require(bool(self.caption_key), "caption_key", self.caption_key, "name a field")


def tokenizer_of(dataset: Dataset, vocab_size: int = 0) -> tuple[Tokenizer, str]:
    """The tokenizer that a fresh run on a dataset takes, and where it is from.

    That is ``dataset.cfg.tokenizer``, else the one beside the shards, else a new one of
    ``vocab_size`` entries (0: 8192), trained on 100,000 of their captions at most (then the
    second value is `TRAINED`).
    """
    path = dataset.cfg.tokenizer or dataset.tokenizer_path
    if path is not None:
        return Tokenizer.load(path), path
    captions = dataset.captions(_CAPTIONS)
    return Tokenizer.train(captions, vocab_size or _VOCABULARY), TRAINED


def train_tokenizer(cfg: TokenizerConfig) -> str:
    """Train a tokenizer on captions and write it, whole or not at all.

    Returns:
        One line for the user: vocabulary, captions read, tokens a caption and a character.
    Raises:
        UsageError: no usable shards, or the file exists or cannot be written.
    """
    path = Path(cfg.out or "")
    _require_place(path, cfg.overwrite)
    data = DataConfig(data_dir=cfg.data_dir, caption_key=cfg.caption_key, num_workers=0)
    dataset = open_data(data, split="train", image_size=1, with_text=True, seed=0)
    heard = _Heard(dataset.captions(cfg.max_captions))
    tokenizer = Tokenizer.train(heard, cfg.vocab_size)
    _save(tokenizer, path)
    return f"{path}: {tokenizer.vocab_size:,} tokens, from {heard.count:,} captions; " + _lengths(
        tokenizer, heard.first
    )


class _Heard:
    """Hands captions on, counts them and keeps the first ones."""

    def __init__(self, captions: Iterable[str]) -> None:
        self.count = 0
        self.first: list[str] = []
        self._captions = captions

    def __iter__(self) -> Iterator[str]:
        for caption in self._captions:
            self.count += 1
            if len(self.first) < _MEASURED:
                self.first.append(caption)
            yield caption


def _lengths(tokenizer: Tokenizer, captions: list[str]) -> str:
    tokens = sum(tokenizer.lengths(captions))
    text_tokens = tokens - _CONTROL * len(captions)
    a_character = text_tokens / sum(map(len, captions))
    return (
        f"{tokens / len(captions):.1f} tokens a caption (start and end included) and "
        f"{a_character:.2f} a character over the first {len(captions):,}"
    )


def _require_place(path: Path, overwrite: bool) -> None:
    """Refuse before any caption is read what could not be written afterwards."""
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder: name a file, e.g. {path / 'tokenizer.json'}")
    if path.exists() and not overwrite:
        raise UsageError(f"--out {path} exists: name another file, or give --overwrite True")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path}: {_cannot(error)}") from error


def _save(tokenizer: Tokenizer, path: Path) -> None:
    aside = path.with_name(path.name + ".part")
    try:
        tokenizer.save(aside)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UsageError(f"--out {path}: {_cannot(error)}") from error


def _cannot(error: OSError) -> str:
    return f"cannot be written ({error.strerror}), name a file elsewhere"
