"""The one place where samples are written: in order, without duplicates, never twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from diff_dalle.data.json_files import json_bytes
from diff_dalle.data.packing.folders import SPLITS
from diff_dalle.data.packing.out_folder import DIGESTS, SKIPPED, Progress, save_progress
from diff_dalle.data.packing.prepare import Prepared
from diff_dalle.data.packing.records import Record
from diff_dalle.data.packing.shard_writer import GrowingFile, ShardWriter

COMMIT_EVERY = 500  # records that a killed run does again at most
_DIGEST = 32  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Which samples are kept, and how they are laid out.

    Attributes:
        drop_duplicates: keep the first of equal image files only.
        val_share: of the pictures whose source names no split, 0 … 1.
        samples_per_shard: the most samples of a shard.
        shard_bytes: the most bytes of a shard of more than one sample.
    """

    drop_duplicates: bool
    val_share: float
    samples_per_shard: int
    shard_bytes: int


class Assembly:
    """Prepared records into the shards of both splits, from where the journal says."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], progress: Progress, rules: Rules
    ) -> None:
        """Open what is there and cut off what the journal does not know.

        Args:
            folder: to write.
            settings: go into the journal.
            progress: where to go on; kept up to date.
            rules: which samples are kept, and where.
        Raises:
            UsageError: a file that the journal speaks of is missing or damaged.
        """
        self.progress = progress
        self._folder = folder
        self._settings = settings
        self._rules = rules
        self._writers = {
            split: ShardWriter(
                folder / split,
                progress.splits[split],
                samples_per_shard=rules.samples_per_shard,
                shard_bytes=rules.shard_bytes,
            )
            for split in SPLITS
        }
        self._skipped = GrowingFile(folder / f"{SKIPPED}.part", progress.skipped_bytes)
        self._digests = GrowingFile(folder / DIGESTS, progress.digest_bytes)
        content = (folder / DIGESTS).read_bytes()
        self._seen = {content[at : at + _DIGEST] for at in range(0, len(content), _DIGEST)}
        self._committed = progress.position

    def add(self, record: Record, prepared: Prepared) -> None:
        """Deal with the next record of the source."""
        reason = prepared.reason
        if not reason and self._rules.drop_duplicates:
            reason = "duplicate" if prepared.digest in self._seen else ""
        if reason:
            self._skip(record, reason)
        else:
            key = f"{self.progress.position:09d}"
            self._writers[self._split(record, prepared.digest)].append(key, prepared.members)
            if self._rules.drop_duplicates:
                self._seen.add(prepared.digest)
                self._digests.append(prepared.digest)
        self.progress.position += 1
        # A whole shard waits for the journal; so it does not wait long.
        whole = any(writer.has_unpublished for writer in self._writers.values())
        if whole or self.progress.position - self._committed >= COMMIT_EVERY:
            self._commit()

    def end(self) -> None:
        """Make the last shards whole after the last record."""
        for writer in self._writers.values():
            writer.end_shard()
        self.progress.finished = True
        self._commit()
        self._skipped.close()
        self._digests.close()

    def _skip(self, record: Record, reason: str) -> None:
        line = {"source": record.source, "reason": reason}
        self._skipped.append(json_bytes(line) + b"\n")
        self.progress.skipped[reason] = self.progress.skipped.get(reason, 0) + 1

    def _split(self, record: Record, digest: bytes) -> str:
        """Equal files are on the same side, whatever else the source holds."""
        if record.split is not None:
            return record.split
        train, val = SPLITS
        return val if int.from_bytes(digest[:8]) < self._rules.val_share * 2**64 else train

    def _commit(self) -> None:
        """First the data, then the journal, then the names that it permits."""
        for writer in self._writers.values():
            writer.sync()
        for file in (self._skipped, self._digests):
            file.sync()
        self.progress.skipped_bytes = self._skipped.length
        self.progress.digest_bytes = self._digests.length
        save_progress(self._folder, self._settings, self.progress)
        for writer in self._writers.values():
            writer.publish()
        self._committed = self.progress.position
