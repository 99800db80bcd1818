"""The data of a run: each rank its own part of every batch, of the size that was asked for."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from loop_tiny import ALONE, train_config

from diff_dalle.data.batch import Batch
from diff_dalle.data.dataset import DataConfig
from diff_dalle.data.demo import DemoDataConfig, make_demo_data
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.distributed import World
from diff_dalle.errors import UsageError
from diff_dalle.models.text import TextEncoderConfig
from diff_dalle.training import run_data
from diff_dalle.training.checkpoint_file import save_weights
from diff_dalle.training.checkpoints import save_checkpoint
from diff_dalle.training.run_data import RunData, open_run_data

TWO = [World(rank=rank, size=2) for rank in range(2)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    tiny = {"num_train": 20, "num_val": 7, "image_size": 16, "samples_per_shard": 8}
    make_demo_data(DemoDataConfig(out_dir=str(folder), num_workers=0, **tiny))
    return folder


@pytest.fixture(autouse=True)
def ranks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of these tests live in one process: each hears itself from all."""
    monkeypatch.setattr(run_data, "all_gather_objects", lambda obj, world: [obj] * world.size)


def opened(shards: Path, world: World, text: TextEncoderConfig | None, **train: object) -> RunData:
    cfg = DataConfig(
        data_dir=[str(shards / "train")], val_data_dir=[str(shards / "val")], num_workers=0
    )
    return open_run_data(cfg, train_config(shards, **train), image_size=16, text=text, world=world)


def first(data: RunData, count: int, start: int = 0) -> list[Batch]:
    return list(itertools.islice(data.batches.train(start), count))


def test_ranks_share_every_batch_and_go_on_where_they_were(shards: Path) -> None:
    ranks = [opened(shards, world, None, batch_size=3) for world in TWO]
    whole = first(opened(shards, ALONE, None, batch_size=6), 5)
    for start in (0, 2):
        parts = zip(*(first(rank, 3, start=6 * start) for rank in ranks), strict=True)
        for batch, (left, right) in zip(whole[start : start + 3], parts, strict=True):
            assert len(left) == len(right) == 3
            assert left.keys + right.keys == batch.keys


def test_ranks_share_the_held_out_samples(shards: Path) -> None:
    seen: list[str] = []
    for world in TWO:
        data = opened(shards, world, None, batch_size=3)
        assert data.batches.val is not None
        batches = list(data.batches.val())
        assert [len(batch) for batch in batches] == [3, 3]  # 7 samples: one row is padding
        seen += [key for batch in batches for key in batch.keys if key]
    assert len(seen) == len(set(seen)) == 7


@pytest.mark.parametrize("microbatch", [-1, 2])
def test_the_loader_gives_whole_batches_with_captions(shards: Path, microbatch: int) -> None:
    text = TextEncoderConfig(text_length=24)
    data = opened(shards, ALONE, text, batch_size=5, microbatch=microbatch)
    for batch in first(data, 3):
        assert len(batch) == 5 and batch.tokens is not None and batch.mask is not None
        assert batch.tokens.shape == (5, 24) and bool((batch.mask.sum(1) > 2).all())
    assert data.tokenizer is not None and data.batches.tokenizer is data.tokenizer


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"batch_size": 6}, [4]),  # 7 samples for 2 ranks: no rank pads to a batch of 6
        ({"batch_size": 6, "microbatch": 2}, [2, 2]),  # what memory was granted
        ({"batch_size": 6, "microbatch": 1}, [2, 2]),  # a caption needs a neighbour's
        ({"batch_size": 6, "eval_samples": 2}, [2]),
    ],
)
def test_evaluations_need_no_more_memory_than_a_step(
    shards: Path, train: dict[str, int], expected: list[int]
) -> None:
    data = opened(shards, TWO[0], None, **train)
    assert data.batches.val is not None
    assert [len(batch) for batch in data.batches.val()] == expected


def test_ranks_that_see_other_data_are_refused(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gathered(seen: list[tuple[str, int, int]], world: World) -> list[object]:
        return [seen, [(fingerprint + "0", 2, 13) for fingerprint, _, _ in seen]]

    monkeypatch.setattr(run_data, "all_gather_objects", gathered)
    with pytest.raises(UsageError, match="rank 0 sees 3 shards with 20 samples, rank 1 sees 2 "):
        opened(shards, TWO[0], None)


@pytest.mark.parametrize("start", ["folder", "opt000005.pt", "best.pt"])
def test_a_run_goes_on_with_the_tokenizer_of_its_start(
    shards: Path, tmp_path: Path, start: str
) -> None:
    other = Tokenizer.train(["abc abc", "abd"], 300)
    other.save(tmp_path / "tokenizer.json")
    save_checkpoint(
        tmp_path,
        5,
        kind="generator",
        config={},
        tokenizer_json=other.to_json(),
        model={},
        emas={},
        optimizer_state={},
        extra={},
    )
    shared = {"kind": "generator", "config": {}, "tokenizer_json": other.to_json()}
    save_weights(tmp_path / "best.pt", **shared, step=5, ema_rate=None, state_dict={})
    given = str(tmp_path if start == "folder" else tmp_path / start)
    data = opened(shards, ALONE, TextEncoderConfig(), log_dir=None, resume_checkpoint=given)
    assert data.tokenizer is not None and data.tokenizer.to_json() == other.to_json()
