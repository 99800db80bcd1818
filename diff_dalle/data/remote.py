"""Files on other machines, each through the library that knows its kind of store.

``gs://`` and ``az://`` through blobfile, ``http(s)://`` through urllib3, any other protocol that
fsspec knows (``s3://`` with the package s3fs) through fsspec. Only reading is needed here.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

from diff_dalle.errors import UsageError

ATTEMPTS = 5
_FIRST_PAUSE_S = 0.5  # doubled after each failure
_PIECE = 2**16  # bytes read at once: what a broken transfer loses
_TIMEOUT_S = 60.0  # without a byte

Result = TypeVar("Result")


class FileStat(NamedTuple):
    """How large a file is, in bytes, and a number that changes when it is replaced."""

    size: int
    version: int


class Store(Protocol):
    """A kind of storage; any method may raise whatever its library raises."""

    def stat(self, url: str) -> FileStat:
        """Size and version of a file."""
        ...

    def list(self, url: str) -> list[str]:
        """The URLs of all files below a folder, sorted."""
        ...

    def read(self, url: str, offset: int, file: BinaryIO) -> None:
        """Append the bytes of a file from ``offset`` on to an open one."""
        ...


def is_remote(path: str) -> bool:
    """Whether a path names a file on another machine.

    >>> is_remote("s3://bucket/000.tar"), is_remote("data/000.tar")
    (True, False)
    """
    return "://" in path


def stat(url: str) -> FileStat:
    """Size and version of a remote file.

    Raises:
        UsageError: it cannot be reached after `ATTEMPTS` attempts.
    """
    return _retried(url, lambda: _store_of(url).stat(url))


def find(url: str) -> FileStat | None:
    """As `stat`; None for a file that is not there."""
    try:
        return stat(url)
    except UsageError as error:
        # To those who may not list a folder, stores say "forbidden" of what is missing.
        if isinstance(error.__cause__, FileNotFoundError | PermissionError):
            return None
        raise


def list_files(url: str) -> list[str]:
    """The URLs of all files below a remote folder, sorted.

    Raises:
        UsageError: it cannot be reached, or its store cannot list.
    """
    return _retried(url, lambda: _store_of(url).list(url))


def download(url: str, file: BinaryIO, size: int) -> None:
    """Write a remote file of ``size`` bytes to a local one; a broken transfer is taken up again.

    Raises:
        UsageError: it cannot be had after `ATTEMPTS` attempts, or has another size.
    """

    def go_on() -> None:
        file.seek(0, 2)
        _store_of(url).read(url, file.tell(), file)
        if file.tell() < size:
            raise OSError(f"{file.tell()} of {size} bytes came through")

    _retried(url, go_on)
    if file.tell() != size:
        raise UsageError(f"{url} changed while it was read: start again")


def _retried(url: str, work: Callable[[], Result]) -> Result:
    """The result of work that may fail now and then, with growing pauses in between."""
    pause = _FIRST_PAUSE_S
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except (UsageError, FileNotFoundError, PermissionError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{url} cannot be read ({type(error).__name__})") from error
        except Exception as error:  # every library has its own
            if attempt == ATTEMPTS - 1:
                reason = (str(error).splitlines() or [""])[0][:200]
                raise UsageError(
                    f"{url} cannot be read ({type(error).__name__}: {reason}), tried {ATTEMPTS} "
                    "times: check the address, the network and your credentials"
                ) from error
            time.sleep(pause)
            pause *= 2
    raise AssertionError("unreachable")


def _store_of(url: str) -> Store:
    protocol = url.split("://")[0]
    if protocol in ("gs", "az"):
        return _Blobfile()
    if protocol in ("http", "https"):
        return _Http()
    return _Fsspec(protocol)


def _version(text: object) -> int:
    """A number of 63 bits for what a store says of a file's version."""
    return int.from_bytes(hashlib.sha256(str(text).encode()).digest()[:8]) >> 1


class _Blobfile:
    """Google Cloud and Azure storage."""

    def stat(self, url: str) -> FileStat:
        import blobfile

        found = blobfile.stat(url)
        return FileStat(found.size, _version(found.version or found.mtime))

    def list(self, url: str) -> list[str]:
        import blobfile

        walked = blobfile.walk(url)
        return sorted(blobfile.join(where, name) for where, _, names in walked for name in names)

    def read(self, url: str, offset: int, file: BinaryIO) -> None:
        import blobfile

        with blobfile.BlobFile(url, "rb", streaming=True) as source:
            source.seek(offset)
            while piece := source.read(_PIECE):
                file.write(piece)


class _Http:
    """Web servers; they have no folders that could be listed."""

    def stat(self, url: str) -> FileStat:
        with self._request("HEAD", url, {}) as answer:
            size = answer.headers.get("Content-Length")
            if size is None:
                raise UsageError(f"{url}: its server does not tell sizes, copy it to a disk")
            told = [answer.headers.get(name) for name in ("ETag", "Last-Modified")]
            return FileStat(int(size), _version(told))

    def list(self, url: str) -> list[str]:
        raise UsageError(
            f"{url}: a web server's folders cannot be listed, name the shards, e.g. "
            f"{url.rstrip('/')}/{{00000..00099}}.tar"
        )

    def read(self, url: str, offset: int, file: BinaryIO) -> None:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self._request("GET", url, headers) as answer:
            if offset and answer.status != 206:  # the server starts from the beginning
                file.seek(0)
                file.truncate()
            for piece in answer.stream(_PIECE):
                file.write(piece)

    def _request(self, method: str, url: str, headers: dict[str, str]) -> Any:
        # Stored compressed or not, the bytes are wanted as they lie there.
        headers = {"Accept-Encoding": "identity", **headers}
        answer = _pool().request(
            method, url, headers=headers, preload_content=False, timeout=_TIMEOUT_S, retries=False
        )
        if answer.status == 404:
            raise FileNotFoundError(url)
        if answer.status in (401, 403):
            raise PermissionError(url)
        if answer.status >= 300:
            raise OSError(f"status {answer.status}")
        return answer


@functools.cache
def _pool() -> Any:
    import urllib3

    return urllib3.PoolManager(maxsize=32)  # threads that index


class _Fsspec:
    """Everything else that fsspec has a driver for, such as s3 (package s3fs)."""

    def __init__(self, protocol: str) -> None:
        import fsspec

        try:
            self._files = fsspec.filesystem(protocol)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{protocol}:// cannot be opened: {error}") from error
        self._protocol = protocol

    def stat(self, url: str) -> FileStat:
        facts = self._files.info(url)
        told = [facts.get(name) for name in ("ETag", "etag", "LastModified", "mtime", "created")]
        return FileStat(int(facts["size"]), _version(told))

    def list(self, url: str) -> list[str]:
        return sorted(self._files.unstrip_protocol(path) for path in self._files.find(url))

    def read(self, url: str, offset: int, file: BinaryIO) -> None:
        with self._files.open(url, "rb") as source:
            source.seek(offset)
            while piece := source.read(_PIECE):
                file.write(piece)
