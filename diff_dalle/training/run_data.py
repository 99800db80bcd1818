"""The data of a run: shards, tokenizer, and batches from any position.

A run reads captions with one tokenizer, which its checkpoints carry. Shards that bring none get
one trained on their own captions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diff_dalle.data.batch import Batch
from diff_dalle.data.loader import DataConfig, Dataset, eval_batches, open_data, train_batches
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.distributed import World, broadcast_object
from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO
from diff_dalle.models.text import TextEncoderConfig
from diff_dalle.training.checkpoints import load_weights
from diff_dalle.training.resume import TOKENIZER_FILE
from diff_dalle.training.train_config import TrainConfig
from diff_dalle.training.trainer import Data

_CAPTIONS = 100_000  # that a tokenizer is trained on where the shards bring none
_VOCABULARY = 8192  # of such a tokenizer, where no size is asked for


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a training run reads.

    Attributes:
        batches: for the loop.
        tokenizer: None for a run without captions.
        fingerprint: of the training set; see `Dataset.fingerprint`.
    """

    batches: Data
    tokenizer: Tokenizer | None
    fingerprint: str


def open_run_data(
    cfg: DataConfig,
    train: TrainConfig,
    *,
    image_size: int,
    text: TextEncoderConfig | None,
    world: World,
) -> RunData:
    """Open the training and the held-out shards (a collective).

    Args:
        cfg: where the data are.
        train: seed, batch size and run folder.
        image_size: H = W of the images in a batch, in pixels.
        text: what reads the captions, None for a run without them. Its ``vocab_size`` is that of
            a tokenizer that has to be trained, 0 for 8192; any other tokenizer must agree.
        world: the ranks.
    Raises:
        UsageError: no usable shards, or a tokenizer of another size.
    """

    def opened(split: str) -> Dataset:
        return open_data(
            cfg,
            split=split,
            image_size=image_size,
            with_text=text is not None,
            seed=train.seed,
        )

    dataset = opened("train")
    held_out = opened("val") if cfg.val_data_dir else None
    tokenizer, text_length = None, 0
    if text is not None:
        tokenizer = choose_tokenizer(cfg, train, dataset, text.vocab_size, world)
        text_length = text.text_length

    def training(start_sample: int) -> Iterator[Batch]:
        return train_batches(
            dataset,
            tokenizer=tokenizer,
            text_length=text_length,
            batch_size=train.batch_size,
            rank=world.rank,
            world=world.size,
            start_sample=start_sample,
        )

    def evaluation() -> Iterable[Batch]:
        assert held_out is not None
        return eval_batches(
            held_out,
            tokenizer=tokenizer,
            text_length=text_length,
            batch_size=train.batch_size,
            rank=world.rank,
            world=world.size,
            max_samples=train.eval_samples,
        )

    batches = Data(train=training, val=evaluation if held_out else None, tokenizer=tokenizer)
    return RunData(batches=batches, tokenizer=tokenizer, fingerprint=dataset.fingerprint)


def choose_tokenizer(
    cfg: DataConfig, train: TrainConfig, dataset: Dataset, vocab_size: int, world: World
) -> Tokenizer:
    """The run's tokenizer (a collective): rank 0 finds or trains it, all ranks use it.

    In this order: ``--tokenizer``; that of the checkpoint which the run starts from; that of
    the run folder; the one beside the shards; a new one, trained on their captions.

    Raises:
        UsageError: one that exists has another size than ``vocab_size`` asks for.
    """
    text = _find_or_train(cfg, train, dataset, vocab_size) if world.is_main else ""
    tokenizer = Tokenizer.from_json(broadcast_object(text, world))
    if vocab_size not in (0, tokenizer.vocab_size):
        raise UsageError(
            f"--vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens: "
            "leave the flag out"
        )
    return tokenizer


def _find_or_train(cfg: DataConfig, train: TrainConfig, dataset: Dataset, vocab_size: int) -> str:
    if cfg.tokenizer is not None:
        return Tokenizer.load(cfg.tokenizer).to_json()
    for start in (train.init_checkpoint, train.resume_checkpoint):
        if start not in (None, "", "none", AUTO) and Path(start).is_file():
            carried = load_weights(start).tokenizer_json
            if carried is not None:
                return carried
    folder = train.log_dir or os.environ.get("OPENAI_LOGDIR")
    stored = Path(folder, TOKENIZER_FILE) if folder else None
    if stored is not None and stored.is_file():
        return Tokenizer.load(stored).to_json()
    if dataset.tokenizer_path is not None:
        return Tokenizer.load(dataset.tokenizer_path).to_json()
    captions = dataset.captions(_CAPTIONS)
    return Tokenizer.train(captions, vocab_size or _VOCABULARY).to_json()
