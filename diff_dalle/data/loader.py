"""Batches for one rank: open the data, then read them in training or evaluation.

The server that workers start from (see `workers`) starts when the data are opened, so it is
ready by the time the first batch is asked for.

Notation: B batch, L tokens.
"""

from __future__ import annotations

import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from diff_dalle.data.batch import BadSample, Batch
from diff_dalle.data.cache import ShardCache
from diff_dalle.data.dataset import DataConfig, Dataset
from diff_dalle.data.images import IMAGE_EXTENSIONS
from diff_dalle.data.order import Slot, rank_batches, spread
from diff_dalle.data.shard_index import build_index, find_index
from diff_dalle.data.shard_reader import Shard
from diff_dalle.data.shards import ShardFile, find_sources
from diff_dalle.data.sources import Source, parse_sources
from diff_dalle.data.visits import Arrays, CaptionEncoder, Visits
from diff_dalle.data.workers import load, start_fork_server
from diff_dalle.errors import UsageError
from diff_dalle.knobs import require

__all__ = ["DataConfig", "Dataset", "eval_batches", "open_data", "train_batches"]

EVAL_EPOCH = -1  # so that held-out samples meet the same noise at every evaluation
_TRIED = 64  # samples, before a dataset is called useless
_READERS = 8  # shards indexed at once; the disk is what takes time
_GB = 10**9  # bytes

Result = TypeVar("Result")


def open_data(
    cfg: DataConfig,
    *,
    split: str,
    image_size: int,
    with_text: bool,
    seed: int,
    show: bool = True,
) -> Dataset:
    """Find and index the shards of ``cfg.data_dir`` or ``cfg.val_data_dir``.

    Args:
        cfg: where the data are.
        split: "train" or "val".
        image_size: S, pixels.
        with_text: whether the run needs captions.
        seed: of the run.
        show: warn of missing and faulty shards and of a pass over remote ones, and show the
            progress of a long indexing: what one rank of a run does for all.
    Raises:
        UsageError: there are no usable samples; says what was found.
    """
    flag = {"train": "data_dir", "val": "val_data_dir"}[split]
    entries: list[str] = getattr(cfg, flag)
    sources = parse_sources(entries, cfg.datasets, flag)
    with warnings.catch_warnings():
        if not show:
            warnings.simplefilter("ignore")
        cache = ShardCache.of(cfg.cache_dir, cfg.cache_gb)
        files = find_sources([source.paths for source in sources], flag, cache)
    if cfg.num_workers:
        start_fork_server()
    indexed = iter(_index([file for found in files for file in found], flag, show))
    shards = [list(islice(indexed, len(found))) for found in files]
    _require_lengths(sources, shards, flag)
    where = f"--{flag} {' '.join(entries)}"
    limit = cfg.max_train_samples if split == "train" else 0
    must = "be left out where --data_dir gives weights"
    require(limit == 0 or len(sources) == 1, "max_train_samples", limit, must)
    dataset = Dataset(
        [shard for own in shards for shard in own],
        cfg,
        image_size=image_size,
        seed=seed,
        limit=limit,
        sources={
            source.name: (source.weight, len(own))
            for source, own in zip(sources, shards, strict=True)
        },
    )
    if dataset.bad and show:
        path, _, reason = dataset.bad[0]
        warnings.warn(f"{where}: {len(dataset.bad)} faulty: {path} ({reason})", stacklevel=2)
    if not len(dataset):
        kinds = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
        raise UsageError(f"{where}: {len(shards)} tar files without an image ({kinds}) in them")
    _require_usable(dataset, where, with_text)
    return dataset


def train_batches(
    dataset: Dataset,
    *,
    tokenizer: CaptionEncoder | None,
    text_length: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    start_sample: int = 0,
    num_workers: int | None = None,
) -> Iterator[Batch]:
    """One rank's batches of a training run, without end; workers start at the call.

    Args:
        dataset: what `open_data` returned; its seed decides the order.
        tokenizer: None for a run without text: captions are then not read.
        text_length: L.
        batch_size: B of this rank; all ranks must use the same.
        rank: 0 … ``world`` − 1.
        world: the number of ranks.
        start_sample: how many samples all ranks together have visited so far.
        num_workers: processes that decode; the dataset's configuration by default.
    """
    order = dataset.order()
    visits = Visits(
        dataset,
        order,
        tokenizer=tokenizer,
        text_length=text_length,
        training=True,
        blocks=order if dataset.remote else None,
    )
    positions = rank_batches(start_sample, batch_size, rank, world)
    return map(Arrays.to_batch, load(visits, positions, _workers(dataset, num_workers)))


def eval_batches(
    dataset: Dataset,
    *,
    tokenizer: CaptionEncoder | None,
    text_length: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int | None = None,
    max_samples: int = 0,
) -> Iterator[Batch]:
    """One rank's batches of a fixed subset: no variation, first captions, same seeds every time.

    Every sample comes once over all ranks; all ranks get the same number of full batches, the
    last ones padded with rows that are not valid and have no key. Arguments as in
    `train_batches`; ``max_samples`` > 0 takes that many, evenly spread over the dataset.
    """
    order = _FixedOrder(spread(len(dataset), max_samples))
    visits = Visits(dataset, order, tokenizer=tokenizer, text_length=text_length, training=False)
    steps = -(-len(order) // (batch_size * world))
    positions = rank_batches(0, batch_size, rank, world)
    taken = [next(positions) for _ in range(steps)]
    workers = min(_workers(dataset, num_workers), steps)
    return map(Arrays.to_batch, load(visits, taken, workers))


class _FixedOrder:
    """Some samples once, in order, then padding."""

    def __init__(self, samples: np.ndarray) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def slot(self, position: int) -> Slot | None:
        if position >= len(self):
            return None
        return Slot(EVAL_EPOCH, int(self._samples[position]))


def _workers(dataset: Dataset, given: int | None) -> int:
    return dataset.cfg.num_workers if given is None else given


def _index(files: list[ShardFile], flag: str, show: bool) -> list[Shard]:
    """The shards with their indices, in the order given.

    Ranks that start together go through the shards in different orders and find most of each
    other's work done.
    """
    shuffled = list(files)
    random.Random(os.getpid()).shuffle(shuffled)
    known = _each(ShardFile.stat, shuffled, "looking for shards", show)
    found = _each(lambda file: find_index(file, known[file]), shuffled, "looking for indices", show)
    without = [file for file, index in found.items() if index is None]
    remote = [file for file in without if file.cache is not None]
    if remote and show:
        gigabytes = sum(known[file].size for file in remote) / _GB
        warnings.warn(
            f"--{flag}: {len(remote)} of {sum(f.cache is not None for f in files)} remote shards "
            f"have no index beside them and are read once, {gigabytes:,.1f} GB; the indices are "
            "kept in the user's cache folder; upload the *.tar.index of a local copy to save this",
            stacklevel=3,
        )
    what = "reading remote shards once" if remote else "indexing shards"
    built = _each(lambda file: build_index(file, known[file]), without, what, show)
    indices = {file: index for file, index in found.items() if index is not None} | built
    return [Shard(file, *indices[file]) for file in files]


def _each(
    work: Callable[[ShardFile], Result], files: Sequence[ShardFile], what: str, show: bool
) -> dict[ShardFile, Result]:
    """What some work makes of each shard, several at once; its progress is shown if it is long."""
    from tqdm import tqdm

    with ThreadPoolExecutor(_READERS) as pool:
        bar = tqdm(
            pool.map(work, files),
            what,
            len(files),
            delay=2.0,
            mininterval=1.0,
            unit="shard",
            disable=not show,
        )
        return dict(zip(files, bar, strict=True))


def _require_lengths(
    sources: Sequence[Source], shards: Sequence[Sequence[Shard]], flag: str
) -> None:
    """Hold the lengths that a table of datasets states against the indices."""
    for source, own in zip(sources, shards, strict=True):
        samples = sum(shard.summary.samples for shard in own)
        if source.length not in (0, samples):
            raise UsageError(
                f"--{flag} {source.name} has {samples} samples in {len(own)} shards, datasets "
                f"says {source.length}: complete the copy, or mend the table"
            )
        if not samples and len(sources) > 1:
            raise UsageError(f"--{flag} {source.name} has no sample: give it none of the shares")


def _require_usable(dataset: Dataset, where: str, with_text: bool) -> None:
    """Refuse data of which no sample can be used, before any work starts."""
    reasons: Counter[str] = Counter()
    for sample in spread(len(dataset), _TRIED):
        try:
            dataset.visit(int(sample), with_text=with_text)
            return
        except BadSample as problem:
            reasons[str(problem)] += 1
    reason, count = reasons.most_common(1)[0]
    tried = f"{where}: {count} of {reasons.total()} samples tried cannot be used: {reason}"
    if reason in ("no caption", "empty caption"):
        key = dataset.cfg.caption_key
        hint = f"needs .txt, or {key!r} in .json (a generator learns without: --cond_text False)"
        raise UsageError(f"{tried}; {hint}")
    if reason == "too small":
        size = dataset.image_size
        raise UsageError(f"{tried}; --image_size {size} needs images of {size} px or more")
    raise UsageError(f"{tried}; see that the shards are whole")
