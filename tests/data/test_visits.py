"""What one visit of a sample looks like: keyed draws, bad samples in their rows."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diff_dalle.data.batch import Batch
from diff_dalle.data.dataset import DataConfig, Dataset
from diff_dalle.data.order import Slot
from diff_dalle.data.shard_index import ensure_index
from diff_dalle.data.shard_reader import Shard
from diff_dalle.data.shards import find_shards
from diff_dalle.data.visits import Visits
from diff_dalle.keyed_noise import key_of


class Letters:
    """A tokenizer-like object: one token a letter."""

    def encode(self, captions: Sequence[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.zeros(len(captions), length, dtype=torch.int64)
        for row, caption in enumerate(captions):
            ids = [1, *map(ord, caption[: length - 2]), 2]
            tokens[row, : len(ids)] = torch.tensor(ids)
        return tokens, tokens != 0


class Table:
    """An order that is a list."""

    def __init__(self, slots: Sequence[Slot | None]) -> None:
        self.slots = slots

    def slot(self, position: int) -> Slot | None:
        return self.slots[position]


def visit(
    folder: Path,
    slots: Sequence[Slot | None],
    *,
    training: bool = True,
    with_text: bool = True,
    **options: object,
) -> Batch:
    files = find_shards([str(folder)])
    shards = [Shard(file, *ensure_index(file)) for file in files]
    dataset = Dataset(shards, DataConfig(**options), image_size=16, seed=9)
    tokenizer = Letters() if with_text else None
    visits = Visits(dataset, Table(slots), tokenizer=tokenizer, text_length=32, training=training)
    return visits.__getitems__(range(len(slots))).to_batch()


def text_of(batch: Batch, row: int) -> str:
    assert batch.tokens is not None
    return "".join(map(chr, batch.tokens[row].tolist())).strip("\0\1\2")


def test_a_batch_has_the_shapes_and_types_of_the_contract(tmp_path: Path, pack_many) -> None:
    keys = pack_many(tmp_path, [4])
    batch = visit(tmp_path, [Slot(2, 3), Slot(2, 0), Slot(3, 1)])
    assert (batch.image.shape, batch.image.dtype) == ((3, 3, 16, 16), torch.uint8)
    assert batch.tokens is not None and batch.mask is not None
    assert (batch.tokens.shape, batch.tokens.dtype) == ((3, 32), torch.int64)
    assert (batch.mask.shape, batch.mask.dtype) == ((3, 32), torch.bool)
    assert batch.keys == [keys[3], keys[0], keys[1]] and batch.valid.all() and not batch.bad
    drawn = ((2, keys[3]), (2, keys[0]), (3, keys[1]))
    assert batch.seed.tolist() == [key_of(9, epoch, "00000.tar", key) for epoch, key in drawn]
    without = visit(tmp_path, [Slot(0, 0)], with_text=False)
    assert without.tokens is None and without.mask is None and without.valid.all()


def test_shards_that_number_their_samples_alike_share_no_noise(
    tmp_path: Path, pack, picture
) -> None:
    for name in ("a.tar", "b.tar"):
        pack(tmp_path / name, [("0.jpg", picture(1, (20, 16))), ("0.txt", b"same key")])
    batch = visit(tmp_path, [Slot(0, 0), Slot(0, 1)])
    assert batch.keys == ["0", "0"] and batch.seed[0] != batch.seed[1]


def test_a_visit_does_not_depend_on_its_neighbours(tmp_path: Path, pack_many) -> None:
    pack_many(tmp_path, [3, 5], size=(30, 24))
    options = {"random_flip": True, "random_crop": True}
    slots = [Slot(epoch, sample) for epoch in range(3) for sample in range(8)]
    together = visit(tmp_path, slots, **options)
    assert together.tokens is not None
    for row, slot in enumerate(slots):
        alone = visit(tmp_path, [None, slot], **options)
        assert alone.tokens is not None
        assert torch.equal(alone.image[1], together.image[row])
        assert torch.equal(alone.tokens[1], together.tokens[row])
        assert alone.seed[1] == together.seed[row]


def test_flips_crops_and_captions_vary_between_epochs(tmp_path: Path, pack_many) -> None:
    (key,) = pack_many(tmp_path, [1], size=(40, 30))
    slots = [Slot(epoch, 0) for epoch in range(400)]

    def views(**options: object) -> Counter[bytes]:
        return Counter(image.numpy().tobytes() for image in visit(tmp_path, slots, **options).image)

    assert len(views()) == 1
    flips = views(random_flip=True)
    assert len(flips) == 2 and 150 < min(flips.values())
    assert len(views(random_crop=True)) > 50
    batch = visit(tmp_path, slots)
    captions = Counter(text_of(batch, row) for row in range(400))
    assert set(captions) == {f"sample {key}", f"{key} again", f"{key} 세 번"}
    assert 90 < min(captions.values())  # 133 expected
    batch = visit(tmp_path, slots, first_caption_prob=0.7)
    captions = Counter(text_of(batch, row) for row in range(400))
    assert set(captions) == {f"sample {key}", f"{key} again", f"{key} 세 번"}
    assert 290 < captions[f"sample {key}"] < 350  # 320 expected
    batch = visit(tmp_path, slots, first_caption_prob=1.0)
    assert {text_of(batch, row) for row in range(400)} == {f"sample {key}"}


def test_an_evaluation_varies_nothing(tmp_path: Path, pack_many) -> None:
    (key,) = pack_many(tmp_path, [1], size=(40, 30))
    slots = [Slot(epoch, 0) for epoch in range(50)]
    batch = visit(tmp_path, slots, training=False, random_flip=True, random_crop=True)
    assert (batch.image == batch.image[0]).all()
    assert {text_of(batch, row) for row in range(50)} == {f"sample {key}"}


def test_padding_has_no_key_and_is_not_bad(tmp_path: Path, pack_many) -> None:
    pack_many(tmp_path, [1])
    batch = visit(tmp_path, [Slot(0, 0), None, None])
    assert batch.valid.tolist() == [True, False, False] and batch.keys[1:] == ["", ""]
    assert not batch.image[1:].any() and not batch.bad


def broken_members(picture) -> dict[str, list[tuple[str, bytes]]]:
    """One sample for each way to be bad (or just odd), by the reason expected ("" is good)."""
    good, text = picture(0), ("txt", b"words")
    cmyk = io.BytesIO()
    Image.new("CMYK", (20, 20)).save(cmyk, "JPEG")
    deep = io.BytesIO()
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(deep, "PNG")
    moving = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(moving, "WEBP", save_all=True, append_images=frames[1:])
    return {
        "good": [("png", good), text],
        "cmyk": [("jpg", cmyk.getvalue()), text],
        "deep": [("png", deep.getvalue()), text],
        "moving": [("webp", moving.getvalue()), text],
        "truncated": [("png", good[:-300]), text],
        "not an image": [("jpg", b"<html>gone</html>"), text],
        "empty file": [("jpg", b""), text],
        "too small": [("png", picture(0, (100, 15))), text],
        "no caption": [("png", good)],
        "empty caption": [("png", good), ("txt", b" ")],
        "caption not UTF-8": [("png", good), ("txt", b"\xff\xfe\xfd")],
        "broken json": [("png", good), ("json", b"{")],
    }


def test_bad_samples_keep_their_rows_and_say_why(tmp_path: Path, pack, picture) -> None:
    samples = broken_members(picture)
    members = [(f"{key}.{kind}", data) for key, parts in samples.items() for kind, data in parts]
    path = pack(tmp_path / "0.tar", [*members, ("good.png", picture(0))])
    batch = visit(tmp_path, [Slot(0, sample) for sample in range(13)])
    good = ["good", "cmyk", "deep", "moving"]
    bad = [key for key in samples if key not in good]
    assert batch.keys == [*samples, "good"]
    assert [key for key, valid in zip(batch.keys, batch.valid, strict=True) if valid] == good
    expected = [(str(path), key, key) for key in bad]
    assert batch.bad == [*expected, (str(path), "good", "duplicate key")]
    assert not batch.image[4:].any()
    # A bad row carries the empty caption, so that no row is padding alone.
    assert batch.mask is not None and batch.mask[4:].sum(1).tolist() == [2] * 9


def test_a_shard_that_changed_under_a_lost_index_is_bad(tmp_path: Path, pack, picture) -> None:
    def write(*keys: str) -> Path:
        return pack(tmp_path / "0.tar", [(f"{key}.png", picture(0)) for key in keys])

    write("a", "b")
    files = find_shards([str(tmp_path)])
    shards = [Shard(file, *ensure_index(file)) for file in files]
    dataset = Dataset(shards, DataConfig(), image_size=16, seed=9)
    path = write("c")
    ensure_index(files[0])
    order = Table([Slot(0, 1), None])
    visits = Visits(dataset, order, tokenizer=None, text_length=2, training=True)
    batch = visits.__getitems__([0, 1]).to_batch()
    assert batch.bad == [(str(path), "", "shard changed")] and batch.keys == ["", ""]
    assert not batch.valid.any() and batch.seed.tolist() == [0, 0]


@pytest.mark.parametrize("with_text", [True, False])
def test_captions_matter_only_to_a_run_with_text(
    tmp_path: Path, pack, picture, with_text: bool
) -> None:
    pack(tmp_path / "0.tar", [("a.png", picture(0)), ("a.json", json.dumps({}).encode())])
    batch = visit(tmp_path, [Slot(0, 0)], with_text=with_text)
    assert batch.valid.tolist() == [not with_text]
