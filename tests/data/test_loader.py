"""The loader as the training loop sees it: same batches for any ranks and workers."""

from __future__ import annotations

import itertools
import json
import random
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from diff_dalle.data.batch import Batch
from diff_dalle.data.loader import DataConfig, Dataset, eval_batches, open_data, train_batches
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.errors import UsageError


def opened(folder: Path, *, with_text: bool = True, seed: int = 4, **options: object) -> Dataset:
    options = {"num_workers": 0, "random_flip": True, "random_crop": True, **options}
    cfg = DataConfig(data_dir=[str(folder)], **options)
    return open_data(cfg, split="train", image_size=16, with_text=with_text, seed=seed)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["sample 0123456789 again 세 번"], 300)


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def joined(ranks: list[list[Batch]]) -> list[tuple[str, bytes, list[int], int]]:
    """Every visit of some steps: key, pixels, tokens, seed; the ranks' parts side by side."""
    visits = []
    for parts in zip(*ranks, strict=True):
        for batch in parts:
            assert batch.tokens is not None
            pixels = [image.numpy().tobytes() for image in batch.image]
            rows = zip(batch.keys, pixels, batch.tokens.tolist(), batch.seed.tolist(), strict=True)
            visits += list(rows)
    return visits


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_ranks_and_workers_do_not_change_the_global_batches(
    tmp_path: Path, pack_many, tokenizer: Tokenizer
) -> None:
    keys = pack_many(tmp_path, [3, 9, 1, 7], size=(24, 20))
    dataset = opened(tmp_path)
    # 5 global batches of 12 cross three epochs of 20.
    common = {"tokenizer": tokenizer, "text_length": 24}
    truth = joined([take(train_batches(dataset, batch_size=12, **common), 5)])
    for epoch in range(3):
        assert sorted(visit[0] for visit in truth[20 * epoch : 20 * epoch + 20]) == keys
    assert len({visit[3] for visit in truth}) == 60  # a seed of its own for each visit
    for world, workers in itertools.product((1, 2, 3), (0, 1, 3)):
        ranks = [
            train_batches(
                dataset,
                batch_size=12 // world,
                rank=rank,
                world=world,
                num_workers=workers,
                **common,
            )
            for rank in range(world)
        ]
        assert joined([take(rank, 5) for rank in ranks]) == truth, (world, workers)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_a_run_goes_on_anywhere_with_another_world_and_other_workers(
    tmp_path: Path, pack_many, tokenizer: Tokenizer
) -> None:
    keys = pack_many(tmp_path, [5, 6, 1], size=(24, 20))
    dataset = opened(tmp_path)
    common = {"tokenizer": tokenizer, "text_length": 8, "batch_size": 2}
    stops = random.Random(1)
    stretches = list(itertools.product((1, 2, 3), (0, 1, 3)))
    stops.shuffle(stretches)
    visits, position = [], 0
    for world, workers in stretches:
        steps = stops.randint(1, 4)
        asked = {"world": world, "num_workers": workers, "start_sample": position, **common}
        ranks = [take(train_batches(dataset, rank=r, **asked), steps) for r in range(world)]
        visits += joined(ranks)
        position += steps * world * 2
    truth = joined([take(train_batches(dataset, num_workers=0, **common), position // 2)])
    assert visits == truth
    epochs, rest = divmod(position, len(keys))
    assert epochs >= 3 and rest
    for epoch in range(epochs):
        assert sorted(visit[0] for visit in visits[12 * epoch : 12 * epoch + 12]) == keys


def test_a_batch_larger_than_the_data_runs_through_epochs(
    tmp_path: Path, pack_many, tokenizer: Tokenizer
) -> None:
    keys = pack_many(tmp_path, [2, 1])
    batches = train_batches(
        opened(tmp_path), tokenizer=tokenizer, text_length=8, batch_size=10, num_workers=1
    )
    batch = next(batches)
    assert [sorted(batch.keys[at : at + 3]) for at in (0, 3, 6)] == [keys] * 3


def test_only_the_first_samples_are_trained_on(
    tmp_path: Path, pack_many, tokenizer: Tokenizer
) -> None:
    keys = pack_many(tmp_path, [3, 3, 3])
    dataset = opened(tmp_path, max_train_samples=4)
    batch = next(train_batches(dataset, tokenizer=tokenizer, text_length=8, batch_size=8))
    assert sorted(batch.keys) == sorted(keys[:4] * 2)


def test_a_folder_packed_by_tar_is_read_with_its_captions_in_a_field_of_the_json(
    tmp_path: Path, picture
) -> None:
    """As NXTP's shards are: folders and their own entries in the tar, captions in ``cap``."""
    captions = {"coco/00000/000000012": "sample 12", "coco/00001/000000345": "again 345"}
    for number, (key, caption) in enumerate(captions.items()):
        image = tmp_path / f"{key}.jpg"
        image.parent.mkdir(parents=True)
        image.write_bytes(picture(number, kind="JPEG"))
        image.with_suffix(".json").write_text(json.dumps({"cap": caption, "caption": "not this"}))
        image.with_suffix(".txt").write_text("nor this")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/0.tar", "w") as archive:
        archive.add(tmp_path / "coco", "coco")
    tokenizer = Tokenizer.train(["sample 0123456789 again not nor this"], 300)
    dataset = opened(tmp_path / "shards", caption_key="cap")
    assert dataset.bad == [] and len(dataset) == 2
    batch = next(train_batches(dataset, tokenizer=tokenizer, text_length=24, batch_size=2))
    assert batch.tokens is not None and batch.bad == [] and batch.valid.all()
    read = {key: tokenizer.decode(row) for key, row in zip(batch.keys, batch.tokens, strict=True)}
    assert read == captions
    assert batch.image.shape == (2, 3, 16, 16) and len(batch.image.unique()) > 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "size", "limit"), [(1, 4, 0), (2, 4, 0), (3, 1, 0), (3, 2, 5)])
def test_an_evaluation_sees_each_key_once_in_equal_steps(
    tmp_path: Path, pack_many, tokenizer: Tokenizer, world: int, size: int, limit: int, workers: int
) -> None:
    keys = pack_many(tmp_path, [4, 7])
    dataset = opened(tmp_path)

    def run() -> list[list[Batch]]:
        return [
            list(
                eval_batches(
                    dataset,
                    tokenizer=tokenizer,
                    text_length=24,
                    batch_size=size,
                    rank=rank,
                    world=world,
                    num_workers=workers,
                    max_samples=limit,
                )
            )
            for rank in range(world)
        ]

    ranks = run()
    assert {len(batch) for rank in ranks for batch in rank} == {size}
    visits = joined(ranks)  # zip is strict: every rank took the same number of steps
    seen = [visit[0] for visit in visits if visit[0]]
    assert seen == (keys if not limit else [keys[11 * n // 5] for n in range(5)])
    valid = sum(int(batch.valid.sum()) for rank in ranks for batch in rank)
    assert valid == len(seen) and not any(batch.bad for rank in ranks for batch in rank)
    texts = [tokenizer.decode(visit[2]) for visit in visits if visit[0]]
    assert texts == [f"sample {key}" for key in seen]
    assert joined(run()) == visits


def test_a_run_without_text_needs_no_captions(tmp_path: Path, pack, picture) -> None:
    pack(tmp_path / "0.tar", [(f"{n}.png", picture(n)) for n in range(3)])
    dataset = opened(tmp_path, with_text=False)
    batch = next(train_batches(dataset, tokenizer=None, text_length=8, batch_size=3))
    assert batch.tokens is None and batch.mask is None and batch.valid.all()


def test_three_hundred_bad_of_a_thousand(
    tmp_path: Path, pack, picture, tokenizer: Tokenizer
) -> None:
    bad = {f"{n:04d}" for n in range(1000) if n % 10 in (1, 4, 7)}

    def members(spoil: bool) -> Iterator[tuple[str, bytes]]:
        whole = picture(0)
        for n in range(1000):
            key = f"{n:04d}"
            broken = spoil and key in bad
            kind = n % 10 if broken else 0
            yield f"{key}.png", whole[:-200] if kind == 1 else b"<html>" if kind == 4 else whole
            yield f"{key}.txt", b"\xff" if kind == 7 else f"sample {key}".encode()

    for name, spoil in (("clean", False), ("spoilt", True)):
        path = pack(tmp_path / name / "0.tar", members(spoil))
    results = {}
    for name in ("clean", "spoilt"):
        ranks = [
            train_batches(
                opened(tmp_path / name),
                tokenizer=tokenizer,
                text_length=8,
                batch_size=50,
                rank=rank,
                world=2,
                num_workers=1,
            )
            for rank in range(2)
        ]
        pairs = zip(*(take(rank, 10) for rank in ranks), strict=True)
        results[name] = [batch for pair in pairs for batch in pair]
    clean = [key for batch in results["clean"] for key in batch.keys]
    spoilt = [key for batch in results["spoilt"] for key in batch.keys]
    assert spoilt == clean and len(set(clean)) == 1000
    listed = [entry for batch in results["spoilt"] for entry in batch.bad]
    assert len(listed) == 300 and {key for _, key, _ in listed} == bad
    assert {shard for shard, _, _ in listed} == {str(path)}
    reasons = {key: reason for _, key, reason in listed}
    assert {reasons["0001"], reasons["0004"], reasons["0007"]} == {
        *("truncated", "not an image", "caption not UTF-8")
    }
    good = [
        key
        for batch in results["spoilt"]
        for key, valid in zip(batch.keys, batch.valid, strict=True)
        if valid
    ]
    assert good == [key for key in clean if key not in bad]


def refusal(folder: Path, *, image_size: int = 16, with_text: bool = True, **options) -> str:
    cfg = DataConfig(data_dir=[str(folder)], num_workers=0, **options)
    with pytest.raises(UsageError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_data(cfg, split="train", image_size=image_size, with_text=with_text, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_useless_data_are_refused_before_work_starts(tmp_path: Path, pack, picture) -> None:
    image = picture(0)
    pack(tmp_path / "silent/0.tar", [(f"{n}.png", image) for n in range(100)])
    pack(tmp_path / "small/0.tar", [("a.png", image), ("a.txt", b"words")])
    pack(tmp_path / "texts/0.tar", [("a.txt", b"words")])
    pack(tmp_path / "broken/0.tar", [("a.png", image[:-200]), ("a.txt", b"words")])
    pack(tmp_path / "fields/0.tar", [("a.png", image), ("a.json", b'{"cap": "words"}')])
    (tmp_path / "html").mkdir()
    (tmp_path / "html/0.tar").write_bytes(b"<html>" * 1000)
    assert "--cond_text False" in refusal(tmp_path / "silent")
    assert "--image_size 256 needs" in refusal(tmp_path / "small", image_size=256)
    assert "1 tar files without an image" in refusal(tmp_path / "texts")
    assert "1 tar files without an image" in refusal(tmp_path / "html")
    assert "truncated" in refusal(tmp_path / "broken")
    assert "'caption' in .json" in refusal(tmp_path / "fields")
    assert len(opened(tmp_path / "fields", caption_key="cap")) == 1
    assert "--val_data_dir is missing" in str(
        pytest.raises(
            UsageError,
            open_data,
            *(DataConfig(num_workers=0),),
            **{"split": "val", "image_size": 16, "with_text": True, "seed": 0},
        ).value
    )


def test_a_faulty_shard_is_announced_once_and_the_rest_is_used(tmp_path: Path, pack_many) -> None:
    pack_many(tmp_path, [4, 4])
    cut = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(cut[: len(cut) // 2])
    with pytest.warns(UserWarning, match="truncated shard") as caught:
        dataset = opened(tmp_path)
    assert len(caught) == 1 and 4 < len(dataset) < 8
    assert dataset.bad == [(str(tmp_path / "00001.tar"), "", "truncated shard")]


def test_one_rank_speaks_for_all(tmp_path: Path, pack_many, monkeypatch) -> None:
    pack_many(tmp_path, [4, 4])
    (tmp_path / "00001.tar").write_bytes(b"")
    hidden = []

    def bar(items: Iterable[object], *_: object, disable: bool, **__: object) -> Iterable[object]:
        hidden.append(disable)
        return items

    monkeypatch.setattr("tqdm.tqdm", bar)
    cfg = DataConfig(data_dir=[f"{tmp_path}/{{00000..00002}}.tar"], num_workers=0)
    asked = {"split": "train", "image_size": 16, "with_text": True, "seed": 0}
    with pytest.warns(UserWarning) as caught:
        open_data(cfg, **asked)
    assert len(caught) == 2  # a missing shard and an empty one
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_data(cfg, **asked, show=False)) == 4
    assert hidden == [False] * 3 + [True] * 3  # found, with an index, without


def test_fewer_shards_than_readers_and_empty_shards_among_them(
    tmp_path: Path, pack_many, tokenizer: Tokenizer
) -> None:
    keys = pack_many(tmp_path, [0, 2, 0])
    dataset = opened(tmp_path)
    for rank in range(3):
        batches = train_batches(
            dataset,
            tokenizer=tokenizer,
            text_length=8,
            batch_size=2,
            rank=rank,
            world=3,
            num_workers=2,
        )
        assert sorted(next(batches).keys) == keys


def test_the_loader_leaves_the_global_generator_alone(
    tmp_path: Path, pack_many, tokenizer: Tokenizer
) -> None:
    pack_many(tmp_path, [4])
    before = torch.get_rng_state()
    for workers in (0, 1):
        batches = train_batches(
            opened(tmp_path),
            tokenizer=tokenizer,
            text_length=8,
            batch_size=2,
            num_workers=workers,
        )
        take(batches, 3)
    assert torch.equal(torch.get_rng_state(), before)


def two_sources(folder: Path, pack, picture) -> dict[str, object]:
    for name, count in (("a", 30), ("b", 7)):
        members = [(f"{name}{row:02d}.jpg", picture(row, kind="JPEG")) for row in range(count)]
        pack(folder / name / "0.tar", members)
    return {"a": {"root": str(folder / "a"), "length": 30}, "b": str(folder / "b")}


def test_sources_are_read_in_their_shares_from_any_position(tmp_path: Path, pack, picture) -> None:
    roots = two_sources(tmp_path, pack, picture)
    cfg = DataConfig(data_dir=["a=0.75", "b=0.25"], datasets=roots, num_workers=0)
    dataset = open_data(cfg, split="train", image_size=16, with_text=False, seed=5)
    read = train_batches(dataset, tokenizer=None, text_length=8, batch_size=100)
    batches = take(read, 20)
    keys = [key for batch in batches for key in batch.keys]
    assert [sum(key[0] == "a" for key in keys[at : at + 1000]) for at in (0, 1000)] == [750, 750]
    assert len({int(seed) for batch in batches for seed in batch.seed}) == 2000
    later = train_batches(
        dataset, tokenizer=None, text_length=8, batch_size=25, rank=1, world=2, start_sample=1450
    )
    assert next(later).keys == keys[1475:1500]
    assert dataset.epochs(1000) == {"epoch_a": 750 / 30, "epoch_b": 250 / 7}
    plain = open_data(
        DataConfig(data_dir=[str(tmp_path / "a")], num_workers=0),
        split="train",
        image_size=16,
        with_text=False,
        seed=5,
    )
    assert plain.epochs(45) == {"epoch": 1.5}


def test_sources_that_cannot_be_mixed_are_refused(tmp_path: Path, pack, picture) -> None:
    roots = two_sources(tmp_path, pack, picture)
    for changes, message in (
        ({"datasets": {**roots, "a": {"root": str(tmp_path / "a"), "length": 31}}}, "30 samples"),
        ({"max_train_samples": 5}, "--max_train_samples is 5: it must be left out"),
        ({"data_dir": ["a=1", f"{tmp_path}/a=1"]}, "0.tar belongs to two sources"),
    ):
        values = {"data_dir": ["a=3", "b=1"], "datasets": roots, "num_workers": 0} | changes
        with pytest.raises(UsageError, match=message):
            open_data(DataConfig(**values), split="train", image_size=16, with_text=False, seed=5)


def test_other_shares_are_another_order(tmp_path: Path, pack, picture) -> None:
    roots = two_sources(tmp_path, pack, picture)
    prints = set()
    for entries in (["a=3", "b=1"], ["a=1", "b=1"], ["a", "b"]):
        cfg = DataConfig(data_dir=entries, datasets=roots, num_workers=0)
        data = open_data(cfg, split="train", image_size=16, with_text=False, seed=5)
        prints.add(data.fingerprint)
    assert len(prints) == 3
