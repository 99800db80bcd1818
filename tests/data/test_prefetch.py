"""Shards that are fetched before they are read: which, when, how often, and what is kept."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest

from diff_dalle.data import remote
from diff_dalle.data.cache import RemoteFile, ShardCache
from diff_dalle.data.dataset import Dataset
from diff_dalle.data.loader import DataConfig, open_data, train_batches
from diff_dalle.data.order import Order
from diff_dalle.data.prefetch import Prefetcher
from diff_dalle.data.visits import Arrays, Visits
from diff_dalle.errors import UsageError

SIZE = 2**18  # half of it is what a broken transfer leaves, in whole pieces
SHARDS = 6
SAMPLES = 4  # of a shard
BLOCK = 2 * SAMPLES


def serve_files(server: Any, names: str) -> list[RemoteFile]:
    files = []
    for number, name in enumerate(names):
        server.files[f"/{name}.tar"] = bytes([number]) * SIZE
        url = f"{server.address}/{name}.tar"
        files.append(RemoteFile(url, remote.stat(url)))
    return files


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def test_one_downloads_and_nobody_else_waits(server: Any, tmp_path: Path) -> None:
    first, second = serve_files(server, "ab")
    server.faults["/a.tar"] = ["pause"]
    # Locks tell processes apart as they do the two caches here.
    cache, other = ShardCache(tmp_path, 10**7), ShardCache(tmp_path, 10**7)
    prefetcher = Prefetcher(cache)
    prefetcher.want([first])
    assert server.halfway.wait(10)
    other.fetch(*first)  # is being fetched: passed over
    os.close(other.open(*second))
    opened: list[bytes] = []
    reader = threading.Thread(target=lambda: opened.append(read(other.open(*first))))
    reader.start()
    assert server.gets() == ["/a.tar", "/b.tar"] and not opened
    server.go_on.set()
    reader.join()
    assert opened == [server.files["/a.tar"]] and server.gets() == ["/a.tar", "/b.tar"]
    cache.fetch(*first)
    assert server.gets() == ["/a.tar", "/b.tar"]


def read(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def test_only_what_fits_beside_what_is_needed_before_is_fetched(
    server: Any, tmp_path: Path
) -> None:
    a, b, c, d, old = serve_files(server, "abcdz")
    cache = ShardCache(tmp_path, 3 * SIZE)
    os.close(cache.open(*c))
    os.close(cache.open(*old))
    prefetcher = Prefetcher(cache)
    prefetcher.want([a, b, c, d])  # c was opened before the old one, but is needed
    prefetcher.join()
    assert server.gets() == ["/c.tar", "/z.tar", "/a.tar", "/b.tar"]
    for file in (a, b, c):
        os.close(cache.open(*file))
    assert len(server.gets()) == 4 and held(tmp_path) == 3 * SIZE
    assert cache.keep([d, a]) == [d] and cache.keep([a, d, b, c]) == [d]


def test_a_newer_list_takes_the_place_of_an_older_one(server: Any, tmp_path: Path) -> None:
    a, b, c = serve_files(server, "abc")
    server.faults["/a.tar"] = ["pause"]
    prefetcher = Prefetcher(ShardCache(tmp_path, 10**7))
    prefetcher.want([a, b])
    first = prefetcher._thread
    assert first is not None and server.halfway.wait(10)
    prefetcher.want([c])
    prefetcher.join()
    server.go_on.set()
    first.join()
    assert server.gets() == ["/a.tar", "/c.tar"]


def test_nothing_is_fetched_for_who_is_gone(server: Any, tmp_path: Path) -> None:
    a, b = serve_files(server, "ab")
    server.faults["/a.tar"] = ["pause"]
    prefetcher = Prefetcher(ShardCache(tmp_path, 10**7))
    prefetcher.want([a, b])
    thread = prefetcher._thread
    assert thread is not None and server.halfway.wait(10)
    del prefetcher
    server.go_on.set()
    thread.join()
    assert server.gets() == ["/a.tar"]


def test_what_cannot_be_fetched_ahead_is_left_to_who_reads_it(server: Any, tmp_path: Path) -> None:
    a, b = serve_files(server, "ab")
    server.faults["/a.tar"] = ["500"] * remote.ATTEMPTS
    cache = ShardCache(tmp_path, 10**7)
    prefetcher = Prefetcher(cache)
    prefetcher.want([a, b])
    prefetcher.join()
    assert server.gets() == ["/a.tar"] * remote.ATTEMPTS + ["/b.tar"]
    assert read(cache.open(*a)) == server.files["/a.tar"]
    del server.files["/a.tar"]
    with pytest.raises(UsageError, match="a.tar cannot be read"):
        ShardCache(tmp_path / "empty", 10**7).open(*a)


def test_what_broken_downloads_left_makes_room(server: Any, tmp_path: Path) -> None:
    a, b, c = serve_files(server, "abc")
    server.faults["/a.tar"] = ["break", *["500"] * remote.ATTEMPTS]
    cache = ShardCache(tmp_path, SIZE + SIZE // 2)
    with pytest.raises(UsageError, match="status 500"):
        cache.fetch(*a)
    assert [path.stat().st_size for path in tmp_path.glob("*.part")] == [SIZE // 2]
    os.close(cache.open(*b))
    assert [path.stat().st_size for path in tmp_path.glob("*.part")] == [SIZE // 2]
    os.close(cache.open(*c))
    assert not [*tmp_path.glob("*.part")] and held(tmp_path) == SIZE


def test_what_is_being_downloaded_is_not_removed(server: Any, tmp_path: Path) -> None:
    a, b = serve_files(server, "ab")
    server.faults["/a.tar"] = ["pause"]
    cache = ShardCache(tmp_path, SIZE)
    prefetcher = Prefetcher(cache)
    prefetcher.want([a])
    assert server.halfway.wait(10)
    os.close(ShardCache(tmp_path, SIZE).open(*b))
    server.go_on.set()
    prefetcher.join()
    assert held(tmp_path) == SIZE and server.gets() == ["/a.tar", "/b.tar"]
    assert read(cache.open(*a)) == server.files["/a.tar"] and len(server.gets()) == 2


def test_room_is_made_before_a_download(server: Any, tmp_path: Path) -> None:
    a, b, c = serve_files(server, "abc")
    server.faults["/c.tar"] = ["pause"]
    cache = ShardCache(tmp_path, 2 * SIZE)
    os.close(cache.open(*a))
    os.close(cache.open(*b))
    prefetcher = Prefetcher(cache)
    prefetcher.want([c])
    assert server.halfway.wait(10)
    assert held(tmp_path) == SIZE


def test_what_was_begun_long_ago_counts_as_used_when_it_is_whole(
    server: Any, tmp_path: Path
) -> None:
    a, b, c = serve_files(server, "abc")
    cache = ShardCache(tmp_path, 2 * SIZE)
    os.close(cache.open(*b))
    part = cache._place(*a).with_suffix(".part")
    part.write_bytes(server.files["/a.tar"])  # whole, but killed before it was renamed
    os.utime(part, (0, 0))
    cache.fetch(*a)
    os.close(cache.open(*c))
    assert cache.keep([a, b]) == [b]


def test_a_process_ends_while_it_fetches(server: Any, tmp_path: Path) -> None:
    (file,) = serve_files(server, "a")
    server.faults["/a.tar"] = ["pause"]
    program = (
        "import pickle, sys; from diff_dalle.data.prefetch import Prefetcher;"
        "cache, file = pickle.loads(bytes.fromhex(sys.argv[1]));"
        "prefetcher = Prefetcher(cache); prefetcher.want([file]); sys.stdin.read()"
    )
    hand = pickle.dumps((ShardCache(tmp_path, 10**7), file)).hex()
    with subprocess.Popen(
        [sys.executable, "-c", program, hand], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert server.halfway.wait(30)
        _, said = process.communicate(timeout=30)  # the server still waits
    assert (process.returncode, said) == (0, b"")
    server.go_on.set()
    assert read(ShardCache(tmp_path, 10**7).open(*file)) == server.files["/a.tar"]


def visits_of(dataset: Dataset) -> Visits:
    order = Order(dataset.counts, dataset.seed, block_samples=BLOCK)
    return Visits(dataset, order, tokenizer=None, text_length=2, training=True, blocks=order)


def opened(data_dir: str, cache: Path, room: int = 0) -> Dataset:
    cfg = DataConfig(
        data_dir=[data_dir], cache_dir=str(cache), cache_gb=max(room, 1) / 2**30, num_workers=0
    )
    return open_data(cfg, split="train", image_size=16, with_text=False, seed=5)


@pytest.fixture
def packed(server: Any, tmp_path: Path, pack_many, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six local shards with indices, and the same ones served."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    pack_many(tmp_path / "local", [SAMPLES] * SHARDS)
    opened(str(tmp_path / "local"), tmp_path / "unused")
    server.serve(tmp_path / "local")
    return tmp_path / "local"


def same(one: Arrays, other: Arrays) -> bool:
    return (
        one.keys == other.keys
        and (one.image == other.image).all()
        and (one.seed == other.seed).all()
        and not one.bad + other.bad
    )


def shards_of(order: Order, block: int) -> set[str]:
    needs = order.needs(block * BLOCK)
    return {f"/{need.shard:05d}.tar" for need in needs if need.blocks == 0}


@pytest.mark.parametrize(
    ("batch", "start"), [(1, 0), (1, 2), (3, 0), (3, 2), (5, 0), (5, 2), (BLOCK, 0)]
)
def test_a_small_cache_downloads_no_shard_twice_for_one_visit(
    server: Any, tmp_path: Path, packed: Path, batch: int, start: int
) -> None:
    size = max(path.stat().st_size for path in packed.glob("*.tar"))
    dataset = opened(f"{server.address}/{{00000..00005}}.tar", tmp_path / "cache", 3 * size)
    local, visits = visits_of(opened(str(packed), tmp_path / "unused")), visits_of(dataset)
    order = Order(dataset.counts, dataset.seed, block_samples=BLOCK)
    looked_into = Counter(server.gets())  # by opening the data
    for first in range(start, 4 * SAMPLES * SHARDS, batch):
        positions = range(first, first + batch)
        assert same(visits.__getitems__(positions), local.__getitems__(positions))
        prefetcher = dataset._reader._prefetcher
        assert prefetcher is not None
        prefetcher.join()
        begun = range(start // BLOCK, positions[-1] // BLOCK + 2)  # and the block after
        allowed = Counter(shard for block in begun for shard in shards_of(order, block))
        assert Counter(server.gets()) <= allowed + looked_into
        assert held(tmp_path / "cache") <= 3 * size
        assert len(dataset._reader._descriptors) <= 4  # of this block and the one before


def test_who_is_quicker_changes_nothing(server: Any, tmp_path: Path, packed: Path) -> None:
    size = max(path.stat().st_size for path in packed.glob("*.tar"))
    dataset = opened(f"{server.address}/{{00000..00005}}.tar", tmp_path / "cache", 2 * size)
    local, visits = visits_of(opened(str(packed), tmp_path / "unused")), visits_of(dataset)
    for first in range(0, 4 * SAMPLES * SHARDS, 7):
        positions = range(first, first + 7)
        assert same(visits.__getitems__(positions), local.__getitems__(positions))


def test_the_next_block_is_there_when_it_begins(server: Any, tmp_path: Path, packed: Path) -> None:
    size = max(path.stat().st_size for path in packed.glob("*.tar"))
    dataset = opened(f"{server.address}/{{00000..00005}}.tar", tmp_path / "cache", 4 * size)
    visits = visits_of(dataset)
    order = Order(dataset.counts, dataset.seed, block_samples=BLOCK)
    for position in range(8 * BLOCK):
        visits.__getitems__([position])
        assert dataset._reader._prefetcher is not None
        dataset._reader._prefetcher.join()
        if position % BLOCK == 0:
            begun = server.gets()
            assert shards_of(order, position // BLOCK + 1) <= set(begun)
        assert server.gets() == begun  # nothing was missing while the block was read


def test_a_run_fetches_ahead(server: Any, tmp_path: Path, packed: Path) -> None:
    dataset = opened(f"{server.address}/{{00000..00005}}.tar", tmp_path / "cache", 10**7)
    next(train_batches(dataset, tokenizer=None, text_length=2, batch_size=1))
    assert dataset._reader._prefetcher is not None
    dataset._reader._prefetcher.join()
    assert sorted(server.gets()) == [f"/{number:05d}.tar" for number in range(SHARDS)]


def test_shards_of_other_stores_are_fetched_ahead(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    wanted = []
    for name in "ab":
        files.pipe(f"/ahead/{name}.tar", name.encode() * SIZE)
        url = f"memory://ahead/{name}.tar"
        wanted.append(RemoteFile(url, remote.stat(url)))
    cache = ShardCache(tmp_path, 10**7)
    prefetcher = Prefetcher(cache)
    prefetcher.want(wanted)
    prefetcher.join()
    files.rm("/ahead", recursive=True)
    assert [read(cache.open(*file))[:1] for file in wanted] == [b"a", b"b"]
