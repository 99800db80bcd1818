"""The data of a run: shards, tokenizer, and batches from any position.

A run reads captions with one tokenizer, which its checkpoints carry. Shards that bring none get
one trained on their own captions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diff_dalle.data.batch import Batch
from diff_dalle.data.loader import DataConfig, Dataset, eval_batches, open_data, train_batches
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.data.tokenizer_training import tokenizer_of
from diff_dalle.distributed import World, all_gather_objects, broadcast_object
from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO
from diff_dalle.models.text import TextEncoderConfig
from diff_dalle.training.checkpoint_file import read_header
from diff_dalle.training.resume import TOKENIZER_FILE, named_folder
from diff_dalle.training.train_config import TrainConfig
from diff_dalle.training.trainer import Data


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
            show=world.is_main,
        )

    dataset = opened("train")
    held_out = opened("val") if cfg.val_data_dir else None
    require_same_data([dataset] if held_out is None else [dataset, held_out], world)
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
            batch_size=_held_out_batch(train, len(held_out), world),
            rank=world.rank,
            world=world.size,
            max_samples=train.eval_samples,
        )

    batches = Data(
        train=training,
        val=evaluation if held_out else None,
        tokenizer=tokenizer,
        epochs=dataset.epochs,
        faults=[*dataset.bad, *(held_out.bad if held_out else [])],
    )
    return RunData(batches=batches, tokenizer=tokenizer, fingerprint=dataset.fingerprint)


def _held_out_batch(train: TrainConfig, samples: int, world: World) -> int:
    """How many held-out samples a rank takes at once: what memory was granted, but no padding.

    Two at least: a caption is compared with its neighbour's.
    """
    share = -(-min(train.eval_samples, samples) // world.size)
    granted = train.microbatch if train.microbatch > 0 else train.batch_size
    return max(2, min(granted, train.batch_size, share))


def require_same_data(datasets: Sequence[Dataset], world: World) -> None:
    """Refuse to start where ranks see different shards: each would have an order of its own.

    A collective.

    Raises:
        UsageError: says which rank sees what.
    """
    seen = [(data.fingerprint, len(data.shards), len(data)) for data in datasets]
    for rank, other in enumerate(all_gather_objects(seen, world)):
        for (here, shards, samples), (there, *its) in zip(seen, other, strict=True):
            if here != there:
                raise UsageError(
                    f"rank {world.rank} sees {shards} shards with {samples} samples, rank {rank} "
                    f"sees {its[0]} with {its[1]}, or other ones: give all machines the same data"
                )


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
        if start not in (None, "", "none", AUTO):
            carried = _carried(Path(start))
            if carried is not None:
                return carried
    folder = named_folder(train)
    if folder is not None and (folder / TOKENIZER_FILE).is_file():
        return Tokenizer.load(folder / TOKENIZER_FILE).to_json()
    return tokenizer_of(dataset, vocab_size)[0].to_json()


def _carried(start: Path) -> str | None:
    """The tokenizer of a run folder or of one of its files, if there is one."""
    if start.is_dir():
        stored = start / TOKENIZER_FILE
        return Tokenizer.load(stored).to_json() if stored.is_file() else None
    return read_header(start).tokenizer_json if start.is_file() else None
