"""Downloads of shards that will be read, in the background of the process that will read them."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Sequence

from diff_dalle.data.cache import RemoteFile, ShardCache
from diff_dalle.errors import UsageError


class Prefetcher:
    """Works through the latest list of shards, one at a time."""

    def __init__(self, cache: ShardCache) -> None:
        """Fetch into a cache; its other users skip what is being fetched here, and the reverse."""
        self._cache = cache
        self._wanted: Sequence[RemoteFile] = ()
        self._thread: threading.Thread | None = None

    def want(self, wanted: Sequence[RemoteFile]) -> None:
        """Keep these copies before all others, and fetch those that are missing.

        Args:
            wanted: shards, those needed first first; the rest of an earlier list is dropped.
        """
        self._wanted = self._cache.keep(wanted)
        # A daemon: a process that ends leaves part of a file, with which the next one goes on.
        hand = (weakref.ref(self), self._cache, self._wanted)
        self._thread = threading.Thread(target=_fetch, args=hand, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the latest list has been worked through."""
        if self._thread is not None:
            self._thread.join()


def _fetch(owner: weakref.ref[Prefetcher], cache: ShardCache, wanted: Sequence[RemoteFile]) -> None:
    for file in wanted:
        prefetcher = owner()
        if prefetcher is None or prefetcher._wanted is not wanted:
            return
        del prefetcher
        with contextlib.suppress(UsageError):  # whoever reads the shard will meet it, and say so
            cache.fetch(*file)
