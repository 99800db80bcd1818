"""A batch keeps its rows together when it is moved and cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diff_dalle.data.batch import Batch


def make_batch(size: int, *, with_text: bool = True) -> Batch:
    return Batch(
        image=torch.arange(size, dtype=torch.uint8)[:, None, None, None].expand(size, 3, 4, 4),
        tokens=torch.arange(size)[:, None].expand(size, 5) if with_text else None,
        mask=torch.ones(size, 5, dtype=torch.bool) if with_text else None,
        valid=torch.arange(size) % 3 != 1,
        seed=torch.arange(size) * 10,
        keys=[f"k{row}" for row in range(size)],
        bad=[("0.tar", f"k{row}", "truncated") for row in range(size) if row % 3 == 1],
    )


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_chunks_are_the_rows_in_order_and_count_bad_samples_once(
    size: int, with_text: bool
) -> None:
    batch = make_batch(7, with_text=with_text)
    chunks = batch.chunk(size)
    assert [len(chunk) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    assert [key for chunk in chunks for key in chunk.keys] == batch.keys
    assert [bad for chunk in chunks for bad in chunk.bad] == batch.bad
    for name in ("image", "tokens", "mask", "valid", "seed"):
        whole = getattr(batch, name)
        parts = [getattr(chunk, name) for chunk in chunks]
        assert whole is None and set(parts) == {None} or torch.equal(torch.cat(parts), whole)


def test_a_size_below_one_means_the_whole_batch() -> None:
    assert [len(chunk) for chunk in make_batch(5).chunk(-1)] == [5]


def test_moving_keeps_values_and_types() -> None:
    batch = make_batch(4)
    moved = batch.to("cpu")
    assert moved.image.dtype == torch.uint8 and torch.equal(moved.image, batch.image)
    assert moved.keys == batch.keys and moved.bad == batch.bad
    assert batch.to("meta").seed.device.type == "meta"


def test_a_batch_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_batch(2).keys = []  # type: ignore[misc]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moving_to_cuda_keeps_values() -> None:
    batch = make_batch(4)
    moved = batch.to("cuda")
    torch.cuda.synchronize()
    assert torch.equal(moved.image.cpu(), batch.image)
    assert torch.equal(moved.valid.cpu(), batch.valid)
