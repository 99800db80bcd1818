"""Bytes and indices of shards, with few files open and not too many indices in memory.

A process visits the shards of one block of its order again and again, and these may be hundreds
of small ones: what was used last stays.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diff_dalle.data.batch import BadSample
from diff_dalle.data.cache import RemoteFile
from diff_dalle.data.order import Need
from diff_dalle.data.prefetch import Prefetcher
from diff_dalle.data.remote import FileStat
from diff_dalle.data.shard_index import ShardIndex, Span, Summary, open_index
from diff_dalle.data.shards import ShardFile
from diff_dalle.errors import UsageError

_OPEN_FILES = 128  # of one process
_INDEXED_SAMPLES = 2**18  # some 20 MB; two blocks of 2**16 meet where batches cross
_GAP = 2**14  # bytes between members that are read rather than skipped


@dataclass(frozen=True)
class Shard:
    """A shard and where its index lies."""

    file: ShardFile
    index: Path
    summary: Summary

    @property
    def known(self) -> FileStat:
        """Size and version of what was indexed."""
        return FileStat(self.summary.size, self.summary.mtime_ns)


class ShardReader:
    """Some shards by number; its open files stay in their process."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        # Both with the latest used last.
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._indexed = 0  # samples in `_indices`
        self._block: set[int] = set()  # shards
        caches = [shard.file.cache for shard in shards if shard.file.cache is not None]
        self._prefetcher = Prefetcher(caches[0]) if caches else None

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self._shards,)

    def expect(self, needs: Sequence[Need]) -> None:
        """Fetch the remote shards that are read next, at the begin of a block of an order.

        Only shards of this block and of the one before stay open: what the cache has dropped
        takes disk space until it is closed.

        Args:
            needs: which shards, by number; those needed first first.
        """
        if self._prefetcher is None:
            return
        block = {need.shard for need in needs if need.blocks == 0}
        for number in self._descriptors.keys() - block - self._block:
            os.close(self._descriptors.pop(number))
        self._block = block
        shards = [self._shards[number] for number in dict.fromkeys(need.shard for need in needs)]
        self._prefetcher.want([RemoteFile(s.file.path, s.known) for s in shards if s.file.cache])

    def index(self, number: int) -> ShardIndex:
        """The index of a shard, built again if its file was lost.

        Raises:
            BadSample: "unreadable" or "shard changed", where that cannot be done.
        """
        if number not in self._indices:
            shard = self._shards[number]
            self._indices[number] = open_index(shard.file, shard.index, shard.summary)
            self._indexed += shard.summary.samples
        self._indices.move_to_end(number)
        while self._indexed > _INDEXED_SAMPLES and len(self._indices) > 1:
            _, oldest = self._indices.popitem(last=False)
            self._indexed -= len(oldest)
        return self._indices[number]

    def read(self, number: int, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of some members; neighbours are read at once, since disks may be far.

        Raises:
            BadSample: "unreadable" (the shard is gone) or "shard changed" (since it was indexed).
        """
        if not spans:
            return []
        start = min(span.offset for span in spans)
        stop = max(span.offset + span.size for span in spans)
        total = sum(span.size for span in spans)
        if stop - start > total + _GAP:
            return [self._pread(number, span) for span in spans]
        block = memoryview(self._pread(number, Span(start, stop - start)))
        return [bytes(block[at - start : at - start + size]) for at, size in spans]

    def _pread(self, number: int, span: Span) -> bytes:
        try:
            data = os.pread(self._descriptor(number), span.size, span.offset)
        except OSError as error:
            raise BadSample("unreadable") from error
        if len(data) < span.size:
            raise BadSample("unreadable")
        return data

    def _descriptor(self, number: int) -> int:
        if number not in self._descriptors:
            if len(self._descriptors) >= _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[number] = _open(self._shards[number])
        self._descriptors.move_to_end(number)
        return self._descriptors[number]


def _open(shard: Shard) -> int:
    try:
        descriptor = shard.file.open(shard.known)
    except UsageError as error:  # its storage is out of reach
        raise BadSample("unreadable") from error
    stat = os.fstat(descriptor)
    if shard.file.cache is None and (stat.st_size, stat.st_mtime_ns) != shard.known:
        os.close(descriptor)
        raise BadSample("shard changed")
    return descriptor
