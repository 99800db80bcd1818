"""Records to the members of their samples, in processes of their own, in the order given."""

from __future__ import annotations

import hashlib
import stat
import unicodedata
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from diff_dalle.data.json_files import json_bytes
from diff_dalle.data.limits import LARGEST_FILE
from diff_dalle.data.packing.encode import EncodeSettings, Unusable, encode
from diff_dalle.data.packing.records import Record
from diff_dalle.data.processes import make_pool

_AHEAD = 8  # records that a process has before it, so that none waits and memory stays bounded


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What became of a record.

    Attributes:
        reason: why it cannot be packed, else "".
        digest: SHA-256 of the image file's bytes.
        members: (extension, content) of the sample, in the order in which they are written.
    """

    reason: str = ""
    digest: bytes = b""
    members: list[tuple[str, bytes]] = field(default_factory=list)


def prepare(record: Record, settings: EncodeSettings, normalise_captions: bool) -> Prepared:
    """Read, hash, decode and, where needed, encode one record's picture.

    Args:
        record: of any source.
        settings: what the image must be.
        normalise_captions: make texts Unicode NFC with single blanks.
    """
    try:
        if record.fault:
            raise Unusable(record.fault)
        captions = _captions(record, normalise_captions)
        data = record.image if isinstance(record.image, bytes) else _read(record.image)
        image = encode(data, settings)
    except Unusable as problem:
        return Prepared(reason=str(problem))
    facts = {
        "caption": captions[0],
        "captions": captions,
        "width": image.width,
        "height": image.height,
        "source": record.source,
    }
    if record.extra:
        facts["extra"] = record.extra
    text = captions[0].encode()
    members = [(image.extension, image.data), ("txt", text), ("json", json_bytes(facts))]
    return Prepared(digest=hashlib.sha256(data).digest(), members=members)


def prepare_all(
    records: Iterable[Record],
    settings: EncodeSettings,
    *,
    normalise_captions: bool,
    num_workers: int,
) -> Generator[tuple[Record, Prepared], None, None]:
    """`prepare` for all records, in their order.

    Args:
        records: read only as far as the processes are busy.
        settings: as in `prepare`.
        normalise_captions: as in `prepare`.
        num_workers: processes; 0 works in this one.
    """
    if num_workers == 0:
        for record in records:
            yield record, prepare(record, settings, normalise_captions)
        return
    pool = make_pool(num_workers)
    window: deque[tuple[Record, Future[Prepared]]] = deque()
    try:
        for record in records:
            window.append((record, pool.submit(prepare, record, settings, normalise_captions)))
            if len(window) >= _AHEAD * num_workers:
                first, future = window.popleft()
                yield first, future.result()
        while window:
            first, future = window.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _captions(record: Record, normalise: bool) -> list[str]:
    texts = record.captions
    if isinstance(texts, Path):
        try:
            texts = texts.read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise Unusable("unreadable caption file") from error
        except UnicodeDecodeError as error:
            raise Unusable("caption not UTF-8") from error
    cleaned = [_clean(text, normalise) for text in texts if text.strip()]
    if not cleaned:
        raise Unusable("no caption")
    return cleaned


def _clean(text: str, normalise: bool) -> str:
    text = text.encode(errors="replace").decode()  # half a surrogate pair is no text
    return " ".join(unicodedata.normalize("NFC", text).split()) if normalise else text


def _read(paths: tuple[Path, ...]) -> bytes:
    for path in paths:
        try:
            facts = path.stat()
        except (OSError, ValueError):  # a name that no file can have
            continue
        if not stat.S_ISREG(facts.st_mode):  # a pipe would never end
            continue
        if facts.st_size > LARGEST_FILE:  # the loader reads no larger member
            raise Unusable("file too large")
        try:
            return path.read_bytes()
        except OSError as error:
            raise Unusable("unreadable") from error
    raise Unusable("missing file")
