"""Attention against its formula in float64, and padding."""

from __future__ import annotations

import pytest
import torch

from diff_dalle.models.attention import (
    AttentionPool,
    CrossAttention,
    SelfAttention,
    TextMemory,
    attend,
    padding_bias,
    split_qkv,
)


def _formula(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    """Equation 1 of Vaswani et al. 2017 for each head, in float64."""
    query, key, value = (x.double() for x in (query, key, value))
    scores = torch.einsum("bqnk,bmnk->bnqm", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -float("inf"))
    out = torch.einsum("bnqm,bmnk->bqnk", scores.softmax(-1), value)
    return out.flatten(2)


def test_attend_is_the_formula() -> None:
    query, key, value = torch.randn(2, 5, 3, 4), torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 4)
    mask = torch.arange(7) < torch.tensor([7, 2])[:, None]
    assert torch.allclose(
        attend(query, key, value).double(), _formula(query, key, value), atol=1e-6
    )
    masked = attend(query, key, value, padding_bias(mask))
    assert torch.allclose(masked.double(), _formula(query, key, value, mask), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_in_half_precision_neither_overflow_nor_leak_padding(
    dtype: torch.dtype,
) -> None:
    query = torch.full((1, 2, 1, 8), 20.0, dtype=dtype)
    key = torch.cat([query, 2 * query], dim=1)  # scores of 1,131, and of 2,263 for padding
    value = torch.randn(1, 4, 1, 8).to(dtype)
    mask = torch.tensor([[True, True, False, False]])
    out = attend(query, key, value, padding_bias(mask))
    assert torch.isfinite(out).all()
    value[:, 2:] = 1000.0
    assert torch.equal(attend(query, key, value, padding_bias(mask)), out)


def test_the_bias_is_finite_in_every_dtype() -> None:
    bias = padding_bias(torch.tensor([[True, False]]))
    assert bias.shape == (1, 1, 1, 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        low = bias.to(dtype).flatten()
        assert torch.isfinite(low).all() and low[0] == 0 and low[1] < -20000


def test_the_two_orders_of_qkv() -> None:
    heads, width = 2, 3
    labels = torch.arange(3 * heads * width)[None, None]  # [1,1,3*heads*width]
    query, key, value = split_qkv(labels, heads, new_order=True)
    assert query[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert key[0, 0, 0].tolist() == [6, 7, 8]
    assert value[0, 0, 1].tolist() == [15, 16, 17]
    query, key, value = split_qkv(labels, heads, new_order=False)
    assert query[0, 0].tolist() == [[0, 1, 2], [9, 10, 11]]
    assert key[0, 0, 0].tolist() == [3, 4, 5]
    assert value[0, 0, 1].tolist() == [15, 16, 17]


def test_new_attention_blocks_change_nothing() -> None:
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(SelfAttention(16, 2, True)(x), x)
    assert torch.equal(CrossAttention(16, 2, 8)(x, torch.randn(2, 3, 8), None), x)


def test_keys_and_values_have_projections_of_their_own(perturb) -> None:  # type: ignore[no-untyped-def]
    block = perturb(CrossAttention(16, 2, text_dim=16))
    assert block.key.weight.data_ptr() != block.value.weight.data_ptr()
    x, text = torch.randn(1, 16, 2, 2), torch.randn(1, 3, 16)
    before = block(x, text, None)
    with torch.no_grad():
        block.key.weight.mul_(-1)
    swapped_keys = block(x, text, None)
    with torch.no_grad():
        block.value.weight.mul_(-1)
    assert not torch.allclose(swapped_keys, before)
    assert torch.allclose(block(x, text, None) - x, x - swapped_keys, atol=1e-6)


def test_attention_reads_the_text_and_not_its_padding(perturb) -> None:  # type: ignore[no-untyped-def]
    block = perturb(CrossAttention(16, 2, text_dim=8))
    x, text = torch.randn(1, 16, 2, 2), torch.randn(1, 3, 8)
    mask = torch.tensor([[True, True, False]])
    before = block(x, text, padding_bias(mask))
    text[:, 2] += 1
    assert torch.equal(block(x, text, padding_bias(mask)), before)
    text[:, 1] += 1
    assert not torch.allclose(block(x, text, padding_bias(mask)), before)


def test_a_memory_is_read_once_and_says_the_same(perturb) -> None:  # type: ignore[no-untyped-def]
    blocks = [perturb(CrossAttention(16, 2, text_dim=8)) for _ in range(2)]
    text, mask = torch.randn(2, 3, 8), torch.tensor([[True, True, False], [True, False, False]])
    memory = TextMemory(text, mask)
    with torch.no_grad():
        blocks[1].value.weight.neg_()
    read = []
    for block in blocks:
        block.key.register_forward_hook(lambda *_: read.append(1))
    plain = text.masked_fill(~mask[:, :, None], 0.0)
    for x in torch.randn(3, 2, 16, 2, 2):
        for block in blocks:  # each has keys of its own
            read.clear()
            assert torch.equal(block(x, memory, memory.bias), block(x, plain, padding_bias(mask)))
    assert read == [1]  # the plain call's


def test_pooling_equals_full_attention_read_at_the_mean(perturb) -> None:  # type: ignore[no-untyped-def]
    pool = perturb(AttentionPool(16, 3, heads=2, out_channels=5))
    x = torch.randn(2, 16, 3, 3)
    tokens = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.positions
    qkv = split_qkv(pool.qkv(tokens), 2, new_order=True)
    expected = pool.project(_formula(*qkv)[:, 0].float())
    assert torch.allclose(pool(x), expected, atol=1e-5)
