"""Remote shards: served on the loopback, by servers that fail, break off and change."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from diff_dalle.data import loader, remote
from diff_dalle.data.cache import ShardCache
from diff_dalle.data.dataset import Dataset
from diff_dalle.data.loader import DataConfig, open_data, train_batches
from diff_dalle.data.order import Order
from diff_dalle.data.remote import FileStat
from diff_dalle.data.shard_index import ensure_index
from diff_dalle.data.shards import ShardFile, find_shards
from diff_dalle.errors import UsageError

CONTENT = bytes(range(256)) * 2000


def read(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def test_what_is_served_is_what_is_read(server: Any, tmp_path: Path) -> None:
    server.files["/a.tar"] = CONTENT
    url = f"{server.address}/a.tar"
    known = remote.stat(url)
    cache = ShardCache(tmp_path, 10**7)
    assert known.size == len(CONTENT)
    assert read(cache.open(url, known)) == read(cache.open(url, known)) == CONTENT
    assert sum(line.startswith("GET") for line in server.asked) == 1
    server.files["/a.tar"] = CONTENT[:-1] + b"x"
    assert remote.stat(url).version != known.version


@pytest.mark.parametrize(
    "faults", [["503"], ["break"], ["break", "500", "break"], ["break", "no ranges"]]
)
def test_transfers_that_break_are_taken_up_again(
    server: Any, tmp_path: Path, faults: list[str]
) -> None:
    server.files["/a.tar"], url = CONTENT, f"{server.address}/a.tar"
    known = remote.stat(url)
    server.faults["/a.tar"] = list(faults)
    assert read(ShardCache(tmp_path, 10**7).open(url, known)) == CONTENT
    ranged = [line for line in server.asked if "bytes=" in line]
    assert len(ranged) == sum("break" in fault for fault in faults) + ("500" in faults)


def test_what_cannot_be_had_is_said_in_one_line(server: Any, tmp_path: Path) -> None:
    address = server.address
    server.files["/a.tar"] = CONTENT
    server.faults["/a.tar"] = ["500"] * remote.ATTEMPTS
    with pytest.raises(UsageError, match=r"a.tar cannot be read .*status 500\), tried 5 times"):
        remote.stat(f"{address}/a.tar")
    server.faults["/a.tar"] = ["403"]
    with pytest.raises(UsageError, match="PermissionError"):
        remote.stat(f"{address}/a.tar")
    with pytest.raises(UsageError, match="missing.tar cannot be read .FileNotFoundError"):
        remote.stat(f"{address}/missing.tar")
    with pytest.raises(UsageError, match=r"folders cannot be listed.*\{00000..00099\}.tar"):
        remote.list_files(f"{address}/folder")
    with pytest.raises(UsageError, match="nonsense://"):
        remote.stat("nonsense://a/b.tar")
    changed = pytest.raises(UsageError, match="changed while it was read")
    with changed, open(tmp_path / "x", "ab+") as file:
        remote.download(f"{address}/a.tar", file, len(CONTENT) - 1)


def test_a_cache_stays_within_its_bound_and_keeps_what_was_used_last(
    server: Any, tmp_path: Path
) -> None:
    urls = []
    for name in "abc":
        server.files[f"/{name}.tar"] = CONTENT
        urls.append(f"{server.address}/{name}.tar")
    cache = ShardCache(tmp_path, 2 * len(CONTENT) + 1)
    known = [remote.stat(url) for url in urls]
    first = cache.open(urls[0], known[0])
    os.close(cache.open(urls[1], known[1]))
    for place, path in enumerate(sorted(tmp_path.glob("*.tar"), key=os.path.getmtime)):
        os.utime(path, (place, place))
    os.close(cache.open(urls[0], known[0]))  # now the second one is the oldest
    os.close(cache.open(urls[2], known[2]))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 2 * len(CONTENT) + 1
    gets = len([line for line in server.asked if line.startswith("GET")])
    os.close(cache.open(urls[0], known[0]))
    assert len([line for line in server.asked if line.startswith("GET")]) == gets == 3
    os.close(cache.open(urls[1], known[1]))  # was evicted
    assert read(first) == CONTENT
    with pytest.raises(UsageError, match="more than --cache_gb"):
        ShardCache(tmp_path, 10).open(urls[0], FileStat(known[0].size, 1))


def test_a_download_that_was_killed_is_gone_on_with(server: Any, tmp_path: Path) -> None:
    server.files["/a.tar"], url = CONTENT, f"{server.address}/a.tar"
    known = remote.stat(url)
    cache = ShardCache(tmp_path, 10**7)
    server.faults["/a.tar"] = ["break", *["500"] * remote.ATTEMPTS]
    with contextlib.suppress(UsageError):
        cache.open(url, known)
    assert read(cache.open(url, known)) == CONTENT
    offset = int(server.asked[-1].removeprefix("GET /a.tar bytes=").rstrip("-"))
    assert 0 < offset <= len(CONTENT) // 2


def test_other_stores_are_read_through_fsspec(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for name in ("b", "a"):
        with files.open(f"/bucket/{name}.tar", "wb") as file:
            file.write(CONTENT)
    urls = remote.list_files("memory://bucket")
    assert [url.rpartition("/")[2] for url in urls] == ["a.tar", "b.tar"]
    known = remote.stat(urls[0])
    assert read(ShardCache(tmp_path, 10**7).open(urls[0], known)) == CONTENT


def test_blobfile_reads_what_it_knows(tmp_path: Path) -> None:
    """Its stores are out of reach here; it takes a local path by the same calls."""
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "a.tar"
    path.write_bytes(CONTENT)
    store = remote._Blobfile()
    assert store.stat(str(path)).size == len(CONTENT)
    assert store.list(str(tmp_path)) == [str(path)]
    with open(tmp_path / "copy", "wb") as file:
        store.read(str(path), 100, file)
    assert (tmp_path / "copy").read_bytes() == CONTENT[100:]


def read_run(data_dir: list[str], cache: Path, workers: int, gib: float) -> list[object]:
    cfg = DataConfig(data_dir=data_dir, cache_dir=str(cache), cache_gb=gib, num_workers=workers)
    dataset = open_data(cfg, split="train", image_size=16, with_text=False, seed=3, show=False)
    batches = train_batches(dataset, tokenizer=None, text_length=8, batch_size=5)
    found: list[object] = []
    for batch in itertools.islice(batches, 6):
        assert batch.bad == []
        found += zip(batch.keys, batch.seed.tolist(), batch.image, strict=True)
    return found


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("indexed", [True, False])
def test_remote_shards_train_as_local_ones_do(
    server: Any,
    tmp_path: Path,
    pack_many,
    monkeypatch: pytest.MonkeyPatch,
    indexed: bool,
    workers: int,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    local = tmp_path / "local"
    pack_many(local, [6, 9, 4])
    expected = read_run([str(local)], tmp_path / "unused", 0, 1.0)
    if not indexed:
        for path in local.glob("*.index"):
            path.unlink()
    server.serve(local)
    room = max(path.stat().st_size for path in local.glob("*.tar")) * 2 / 2**30
    for _ in range(2):
        found = read_run(
            [f"{server.address}/{{00000..00002}}.tar"], tmp_path / "cache", workers, room
        )
        for (key, seed, image), (key_2, seed_2, image_2) in zip(expected, found, strict=True):
            assert (key, seed) == (key_2, seed_2) and torch.equal(image, image_2)
    held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar"))
    assert 0 < held <= room * 2**30
    indices = [line for line in server.asked if line.startswith("GET") and "index" in line]
    assert len(indices) == (3 if indexed else 0)  # once, then they lie in the cache folder


def test_a_shard_that_goes_away_makes_bad_samples(
    server: Any, tmp_path: Path, pack_many, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    pack_many(tmp_path / "local", [6, 9])
    server.serve(tmp_path / "local")
    cfg = DataConfig(
        data_dir=[f"{server.address}/{{00000..00001}}.tar"],
        cache_dir=str(tmp_path / "cache"),
        num_workers=0,
    )
    dataset = open_data(cfg, split="train", image_size=16, with_text=False, seed=3, show=False)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    del server.files["/00001.tar"]
    fresh = pickle.loads(pickle.dumps(dataset))  # as a worker starts: nothing is open
    batches = train_batches(fresh, tokenizer=None, text_length=8, batch_size=15)
    batch = next(batches)
    assert int(batch.valid.sum()) == 6 and {reason for _, _, reason in batch.bad} == {"unreadable"}


def test_a_remote_folder_is_listed(tmp_path: Path, pack_many) -> None:
    pack_many(tmp_path / "local", [2, 3])
    files = fsspec.filesystem("memory")
    for path in (tmp_path / "local").glob("*.tar"):
        files.pipe(f"/data/deep/{path.name}", path.read_bytes())
    shards = find_shards(["memory://data"])
    assert [shard.name for shard in shards] == ["deep/00000.tar", "deep/00001.tar"]
    with pytest.raises(UsageError, match="no .tar shards there"):
        find_shards(["memory://nothing"])


def remote_set(server: Any, cache: Path, pattern: str) -> Dataset:
    cfg = DataConfig(data_dir=[f"{server.address}/{pattern}"], cache_dir=str(cache), num_workers=0)
    return open_data(cfg, split="train", image_size=16, with_text=True, seed=3, show=False)


def test_the_tokenizer_beside_remote_shards_or_above(
    server: Any, tmp_path: Path, pack_many, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for folder in ("d/train", "d/more"):
        pack_many(tmp_path / "local" / folder, [2, 2])
    server.serve(tmp_path / "local")
    dataset = remote_set(server, tmp_path / "cache", "d/{train,more}/{00000,00001}.tar")
    assert dataset.tokenizer_path is None
    server.files["/tokenizer.json"] = b"too far up"
    server.faults["/d/tokenizer.json"] = ["403"]
    assert dataset.tokenizer_path is None

    server.files["/d/tokenizer.json"] = b"above"
    server.asked.clear()
    for _ in range(2):
        path = Path(dataset.tokenizer_path or "")
        assert path.parent == tmp_path / "cache" and path.read_bytes() == b"above"
    assert server.gets("tokenizer.json") == ["/d/tokenizer.json"]
    server.files["/d/more/tokenizer.json"] = b"beside"
    with pytest.raises(
        UsageError, match=r"/d/tokenizer.json and \S+/d/more/tokenizer.json differ.*--tokenizer"
    ):
        _ = dataset.tokenizer_path
    server.files["/d/more/tokenizer.json"] = b"above"
    assert Path(dataset.tokenizer_path or "").read_bytes() == b"above"
    server.faults["/d/train/tokenizer.json"] = ["500"] * remote.ATTEMPTS
    with pytest.raises(UsageError, match=r"d/train/tokenizer.json cannot be read .*status 500"):
        _ = dataset.tokenizer_path


@pytest.mark.parametrize(
    ("url", "folders"),
    [
        ("http://host/0.tar", ["http://host"]),
        ("http://host/a/0.tar", ["http://host/a", "http://host"]),
        ("s3://bucket/a/b/0.tar", ["s3://bucket/a/b", "s3://bucket/a"]),
        ("gs://bucket/0.tar", ["gs://bucket"]),
        ("az://account/container/0.tar", ["az://account/container"]),
    ],
)
def test_nothing_lies_above_a_store(url: str, folders: list[str]) -> None:
    (shard,) = find_shards([url])
    assert list(shard.folders) == folders


def test_a_tokenizer_in_another_store(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/tokens/train/0.tar", b"")
    cache = ShardCache(tmp_path, 10**7)
    (listed,) = remote.list_files("memory://tokens")
    shard = ShardFile(listed, "0.tar", cache)
    assert shard.beside("tokenizer.json") is None
    files.pipe("/tokens/tokenizer.json", b"above")
    address, path = shard.beside("tokenizer.json") or ("", Path())
    assert address.endswith("tokens/tokenizer.json") and path.read_bytes() == b"above"


def index(folder: Path) -> None:
    """Index local shards, so that their indices lie beside them."""
    for path in folder.glob("*.tar"):
        ensure_index(ShardFile(str(path), path.name))


def test_a_pass_over_remote_shards_is_announced(
    server: Any, tmp_path: Path, pack_many, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    local = tmp_path / "local"
    pack_many(local, [2, 2, 2])
    index(local)
    (local / "00001.tar.index").unlink()
    server.serve(local)
    server.files["/00000.tar"] += bytes(10_000)  # its index is of another size
    size = sum(len(server.files[f"/0000{number}.tar"]) for number in (0, 1))
    monkeypatch.setattr(loader, "_GB", size / 1000)
    cfg = DataConfig(
        data_dir=[f"{server.address}/{{00000..00002}}.tar"],
        cache_dir=str(tmp_path / "cache"),
        num_workers=0,
    )

    def said(show: bool) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            open_data(cfg, split="train", image_size=16, with_text=True, seed=0, show=show)
        return [str(one.message) for one in caught if "index" in str(one.message)]

    (line,) = said(show=True)
    assert "--data_dir: 2 of 3 remote shards have no index" in line
    assert "read once, 1,000.0 GB" in line and "\n" not in line
    assert len([path for path in server.gets() if path != "/00002.tar"]) == 2
    assert said(show=True) == []  # they are kept
    (tmp_path / "home").rename(tmp_path / "moved")
    assert said(show=False) == []


def test_a_tokenizer_of_remote_captions_reads_what_training_reads_first(
    server: Any, tmp_path: Path, pack_many, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Order.__init__, "__defaults__", (6,))
    pack_many(tmp_path / "local", [3] * 8)
    index(tmp_path / "local")
    server.serve(tmp_path / "local")
    dataset = remote_set(server, tmp_path / "cache", "{00000..00007}.tar")
    visited = Order(dataset.counts, seed=3)
    needed = {f"/{need.shard:05d}.tar" for need in visited.needs(0)}
    keys = {dataset.entry(visited.slot(position).sample)[1].key for position in range(10)}
    server.asked.clear()
    captions = [*dataset.captions(10)]
    assert len(captions) == 9 and captions == [*dataset.captions(10)]
    assert {caption.removeprefix("sample ").split()[0] for caption in captions} <= keys
    assert set(server.gets()) <= needed and len(needed) == 4
    assert len([*dataset.captions(0)]) == 24 * 3  # all of all
