"""A dataset: the samples of some shards, found by number and read from their tar files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diff_dalle.data.batch import BadSample
from diff_dalle.data.caption_fields import DEFAULT_KEY, Captions, read_captions
from diff_dalle.data.images import Crop, Pixels, decode
from diff_dalle.data.limits import LARGEST_FILE
from diff_dalle.data.mixture import Mixture
from diff_dalle.data.order import (
    BLOCK_SAMPLES,
    ORDER_VERSION,
    Integers,
    Need,
    Order,
    first_samples,
    spread,
)
from diff_dalle.data.shard_index import Entry
from diff_dalle.data.shard_reader import Shard, ShardReader
from diff_dalle.data.shards import ShardFile
from diff_dalle.errors import UsageError
from diff_dalle.knobs import Table, knob, require

_FIRST_ORDER = (1, 2**16)  # version and block size of runs whose fingerprint says neither


class Raw(NamedTuple):
    """The members of a sample, as bytes."""

    image: bytes
    text: bytes | None
    json: bytes | None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data a run reads, and how each visit varies it."""

    data_dir: list[str] = knob(
        [],
        "folders, tar files, patterns or names of training shards; a=0.7 b=0.3 reads shares",
        aliases=["index_dir"],
    )
    val_data_dir: list[str] = knob(
        [], "folders, tar files or patterns of held-out shards", aliases=["index_dir_val"]
    )
    datasets: Table | None = knob(
        None, "name -> root, or root and length, that --data_dir may name; for --config files"
    )
    cache_dir: str | None = knob(
        None, "where copies of remote shards lie (default: the user's cache folder)"
    )
    cache_gb: float = knob(100.0, "GiB that copies of remote shards may take, on each machine")
    num_workers: int = knob(2, "processes that decode, for each rank; 0: in the main process")
    random_flip: bool = knob(False, "mirror half of the images (makes 'left of' untrue)")
    random_crop: bool = knob(False, "cut squares of 0.8 to 1.0 of the shorter side, not the centre")
    tokenizer: str | None = knob(None, "tokenizer.json to use instead of the one with the shards")
    max_train_samples: int = knob(0, "train on the first so many samples only; 0: on all")
    caption_key: str = knob(
        DEFAULT_KEY, "field of the .json that holds captions; any but this one outranks .txt"
    )
    first_caption_prob: float = knob(
        0.0, "share of training visits that read the first of several captions; else any of them"
    )

    def __post_init__(self) -> None:
        require(self.num_workers >= 0, "num_workers", self.num_workers, "be 0 or more")
        require(self.cache_gb > 0, "cache_gb", self.cache_gb, "be above 0")
        limit = self.max_train_samples
        require(limit >= 0, "max_train_samples", limit, "be 0 (all) or more")
        require(bool(self.caption_key), "caption_key", self.caption_key, "name a field")
        share = self.first_caption_prob
        require(0 <= share <= 1, "first_caption_prob", share, "lie in [0, 1]")


class Dataset:
    """Samples 0 … len − 1 in the order of shards and of members in them.

    Attributes:
        cfg: what the user asked for.
        image_size: S, pixels of the squares that its batches hold.
        seed: of the run; order and all noise derive from it.
        shards: all shards.
        counts: how many samples of each shard belong to the dataset (``limit`` cuts the last).
        bad: (shard, "", reason) of every shard that may lack samples.
        sources: name -> weight (0 for the one pool of entries without) and how many of the
            shards, in their order, are its own.
        remote: whether some shards are remote.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        cfg: DataConfig,
        *,
        image_size: int,
        seed: int,
        limit: int = 0,
        sources: Mapping[str, tuple[float, int]] | None = None,
    ) -> None:
        """The first ``limit`` samples of indexed shards; 0 takes all. Without sources, one pool."""
        self.cfg = cfg
        self.image_size = image_size
        self.seed = seed
        self.shards = list(shards)
        self.counts = first_samples([shard.summary.samples for shard in shards], limit)
        self.bad = [(s.file.path, "", s.summary.fault) for s in shards if s.summary.fault]
        self.sources = dict(sources or {"": (0.0, len(self.shards))})
        self.remote = any(shard.file.cache is not None for shard in self.shards)
        self._ends = np.cumsum(self.counts)
        self._reader = ShardReader(self.shards)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def order(self) -> Order | Mixture:
        """In which order training visits the samples."""
        if len(self.sources) == 1:
            return Order(self.counts, self.seed)
        weights = [weight for weight, _ in self.sources.values()]
        return Mixture(self._counts_by_source(), weights, self.seed)

    def epochs(self, position: int) -> dict[str, float]:
        """How often the samples, of each source, were visited before a position of the order."""
        order = self.order()
        if isinstance(order, Order):
            return {"epoch": position / len(self)}
        sizes = [max(sum(counts), 1) for counts in self._counts_by_source()]
        visits = zip(self.sources, order.visits(position), sizes, strict=True)
        return {f"epoch_{name}": count / size for name, count, size in visits}

    def expect(self, needs: Sequence[Need]) -> None:
        """Fetch the remote shards that are read next; see `ShardReader.expect`."""
        self._reader.expect(needs)

    def entry(self, sample: int) -> tuple[ShardFile, Entry]:
        """The shard of a sample, and where in it the sample's members lie.

        Raises:
            BadSample: "unreadable" or "shard changed": the shard's index was lost, and the shard
                is no longer what it was.
        """
        number, row = self._locate(sample)
        return self.shards[number].file, self._reader.index(number)[row]

    def shard_of(self, sample: int) -> ShardFile:
        """The shard of a sample, whether it can be read or not."""
        return self.shards[self._locate(sample)[0]].file

    def read(self, sample: int, *, image: bool = True) -> Raw:
        """The members of a sample.

        Args:
            sample: 0 … len − 1.
            image: False leaves the image empty, where only captions are wanted.
        Raises:
            BadSample: "duplicate key", "file too large", "unreadable" (the shard is gone) or
                "shard changed" (since it was indexed).
        """
        number, row = self._locate(sample)
        entry = self._reader.index(number)[row]
        if entry.duplicate:
            raise BadSample("duplicate key")
        places = {"image": entry.image if image else None, "text": entry.text, "json": entry.json}
        wanted = {part: span for part, span in places.items() if span is not None}
        if any(span.size > LARGEST_FILE for span in wanted.values()):
            raise BadSample("file too large")
        found = dict(zip(wanted, self._reader.read(number, [*wanted.values()]), strict=True))
        return Raw(image=found.get("image", b""), text=found.get("text"), json=found.get("json"))

    def captions_of(self, raw: Raw) -> Captions:
        """The captions in a sample's members; `BadSample` where there is none."""
        return read_captions(raw.text, raw.json, self.cfg.caption_key)

    def visit(
        self, sample: int, *, with_text: bool, crop: Crop | None = None, flip: bool = False
    ) -> tuple[Pixels, Captions | None]:
        """The square uint8 [3,S,S] of a sample and, with text, its captions.

        Args:
            sample: 0 … len − 1.
            with_text: whether a sample without captions is bad; they are not looked at else.
            crop: see `images.decode`.
            flip: see `images.decode`.
        Raises:
            BadSample: the sample cannot be read, has no captions or no usable picture.
        """
        raw = self.read(sample)
        captions = self.captions_of(raw) if with_text else None
        return decode(raw.image, self.image_size, crop=crop, flip=flip), captions

    def captions(self, limit: int = 0) -> Iterator[str]:
        """All captions of samples evenly spread over the dataset; broken ones are left out.

        At most ``limit`` > 0, of at most that many samples: shards are often sorted, so the first
        ones would not speak for all. Of remote shards, whole ones would be fetched for a few
        captions each: there it is the samples that training visits first, of shards in random
        order.
        """
        chosen = self._visited_first(limit) if self.remote and limit else spread(len(self), limit)
        samples = self._captions_of_all(chosen.tolist())
        different = (list(dict.fromkeys([c.first, *c.choices])) for _, c in samples)
        if limit < 1:
            return chain.from_iterable(different)
        found = list(different)
        kept = max(limit * len(found) // max(sum(map(len, found)), 1), 1)
        return islice((text for n in spread(len(found), kept) for text in found[n]), limit)

    def first_captions(self) -> Iterator[tuple[str, str]]:
        """(key, first caption) of every sample in order, broken ones left out."""
        for key, captions in self._captions_of_all(range(len(self))):
            yield key, captions.first

    @property
    def fingerprint(self) -> str:
        """Hexadecimal hash of the shards' names, sizes and numbers of samples.

        Neither the folder that holds the dataset nor the times of its files count. A run that
        goes on must meet the samples in the same order, so a change of the order changes it.
        """
        facts: list[list[Any]] = [
            [s.file.name, s.summary.size, s.summary.samples] for s in self.shards
        ]
        if (ORDER_VERSION, BLOCK_SAMPLES) != _FIRST_ORDER:
            facts.append([ORDER_VERSION, BLOCK_SAMPLES])
        if len(self.sources) > 1:
            facts.append([list(source) for source in self.sources.values()])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def tokenizer_path(self) -> str | None:
        """A local path of the ``tokenizer.json`` beside the shards or in the folder above.

        None if there is none.

        Raises:
            UsageError: there are several that differ, or a store cannot be reached.
        """
        found: dict[bytes, tuple[str, Path]] = {}
        for file in {shard.file.folders: shard.file for shard in self.shards}.values():
            if (tokenizer := file.beside("tokenizer.json")) is not None:
                found.setdefault(tokenizer[1].read_bytes(), tokenizer)
        if len(found) > 1:
            both = " and ".join([address for address, _ in found.values()][:2])
            raise UsageError(f"{both} differ: name the one to use with --tokenizer")
        return next((str(path) for _, path in found.values()), None)

    def _captions_of_all(self, samples: Iterable[int]) -> Iterator[tuple[str, Captions]]:
        for sample in samples:
            try:
                yield self.entry(sample)[1].key, self.captions_of(self.read(sample, image=False))
            except BadSample:
                continue

    def _visited_first(self, visits: int) -> Integers:
        """The samples of the first visits in order of their numbers, those of a shard together."""
        order = self.order()
        slots = map(order.slot, range(min(visits, len(self))))
        return np.unique(np.array([slot.sample for slot in slots], dtype=np.int64))

    def _counts_by_source(self) -> list[list[int]]:
        counts = iter(self.counts)
        return [list(islice(counts, shards)) for _, shards in self.sources.values()]

    def _locate(self, sample: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._ends, sample, side="right"))
        return number, sample - int(self._ends[number]) + self.counts[number]
