"""Tiny shards and pictures, made inside the tests, and a server of shards."""

from __future__ import annotations

import http.server
import io
import json
import sys
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diff_dalle.data import remote

sys.path.insert(0, str(Path(__file__).parent.parent / "programs"))

Members = Iterable[tuple[str, bytes]]
Picture = Callable[..., bytes]
Pack = Callable[[Path, Members], Path]


def _picture(number: int, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    """A picture whose pixels tell its number; ``size`` is width, height."""
    rng = np.random.default_rng(number)
    low = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    low.resize(size, Image.Resampling.BICUBIC).save(file, kind, quality=90)
    return file.getvalue()


def _pack(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def picture() -> Picture:
    return _picture


@pytest.fixture
def pack() -> Pack:
    return _pack


@pytest.fixture
def pack_many() -> Callable[..., list[str]]:
    """Shards of given sizes in img2dataset's form; returns all keys in order."""

    def make(folder: Path, counts: Iterable[int], size: tuple[int, int] = (20, 16)) -> list[str]:
        keys = []
        for number, count in enumerate(counts):
            members = []
            for row in range(count):
                key = f"{number:05d}{row:04d}"
                caption = f"sample {key}"
                listed = {"caption": caption, "captions": [caption, f"{key} again", f"{key} 세 번"]}
                members += [
                    (f"{key}.jpg", _picture(len(keys), size)),
                    (f"{key}.txt", caption.encode()),
                    (f"{key}.json", json.dumps(listed).encode()),
                ]
                keys.append(key)
            _pack(folder / f"{number:05d}.tar", members)
            (folder / f"{number:05d}_stats.json").write_text("{}")
        return keys

    return make


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; the first requests of a URL meet the faults in `faults`."""

    files: dict[str, bytes]
    faults: dict[str, list[str]]
    asked: list[str]
    address: str
    halfway: threading.Event  # set by the fault "pause", which then waits for `go_on`
    go_on: threading.Event

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        faults = self.faults.get(self.path, [])
        fault = faults.pop(0) if faults else ""
        if self.path not in self.files or fault.isdigit():
            self.send_error(int(fault or 404))
            return
        content, status = self.files[self.path], 200
        wanted = self.headers.get("Range")
        if wanted and fault != "no ranges":
            content, status = content[int(wanted[6:-1]) :], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", str(hash(self.files[self.path])))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2])
            if fault == "pause":
                self.halfway.set()
                self.go_on.wait()
            if fault != "break":
                self.wfile.write(content[len(content) // 2 :])

    def log_message(self, format: str, *args: object) -> None:
        pass

    @classmethod
    def serve(cls, folder: Path) -> None:
        """The files of a folder, below the server's address."""
        for path in folder.rglob("*"):
            if path.is_file():
                cls.files[f"/{path.relative_to(folder).as_posix()}"] = path.read_bytes()

    @classmethod
    def gets(cls, ending: str = ".tar") -> list[str]:
        """The paths that were fetched, in order."""
        paths = [line.split()[1] for line in cls.asked if line.startswith("GET")]
        return [path for path in paths if path.endswith(ending)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.0)
    handler = type("Handler", (Server,), {"files": {}, "faults": {}, "asked": []})
    handler.halfway, handler.go_on = threading.Event(), threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        handler.address = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield handler
        handler.go_on.set()
        running.shutdown()
