"""The contrastive loss against its formula, and cached gradients against the full batch's.

Two ranks are in tests/test_distributed.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from diff_dalle.distributed import World
from diff_dalle.training.contrastive import cached_step, contrastive_loss

ALONE = World()


def features(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, rows, 8, generator=generator, dtype=torch.float64)
    image, text = nn.functional.normalize(pair, dim=2)
    return image.requires_grad_(), text.requires_grad_()


def by_the_formula(image: Tensor, text: Tensor, scale: float) -> float:
    """Radford et al. 2021, figure 3, in plain Python."""
    logits = [[scale * float(i @ t) for t in text.detach()] for i in image.detach()]
    n = len(logits)

    def one_way(rows: list[list[float]]) -> float:
        return sum(math.log(sum(map(math.exp, row))) - row[k] for k, row in enumerate(rows)) / n

    return (one_way(logits) + one_way([list(column) for column in zip(*logits, strict=True)])) / 2


def test_the_loss_is_the_formula() -> None:
    image, text = features(6)
    valid = torch.ones(6, dtype=torch.bool)
    loss = contrastive_loss(image, text, torch.tensor(7.0), valid, ALONE)
    assert math.isclose(float(loss.detach()), by_the_formula(image, text, 7.0), rel_tol=1e-12)


def test_features_without_a_match_give_the_logarithm_of_the_batch() -> None:
    same = torch.ones(5, 3) / math.sqrt(3)
    valid = torch.ones(5, dtype=torch.bool)
    loss = contrastive_loss(same, same, torch.tensor(14.0), valid, ALONE)
    assert math.isclose(float(loss), math.log(5), rel_tol=1e-6)


def test_a_broken_sample_is_as_if_absent() -> None:
    image, text = features(7)
    valid = torch.tensor([True, False, True, True, False, True, True])
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(image, text, scale, valid, ALONE)
    gradients = torch.autograd.grad(loss, (image, text, scale))
    few = [x.detach()[valid].requires_grad_() for x in (image, text)]
    few_loss = contrastive_loss(*few, scale, torch.ones(5, dtype=torch.bool), ALONE)
    few_gradients = torch.autograd.grad(few_loss, (*few, scale))
    torch.testing.assert_close(loss, few_loss)
    for whole, part in zip(gradients[:2], few_gradients[:2], strict=True):
        torch.testing.assert_close(whole[valid], part)
        assert torch.equal(whole[~valid], torch.zeros_like(whole[~valid]))
    torch.testing.assert_close(gradients[2], few_gradients[2])


def test_no_valid_sample_is_no_loss_and_no_nan() -> None:
    image, text = features(3)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(image, text, scale, torch.zeros(3, dtype=torch.bool), ALONE)
    gradients = torch.autograd.grad(loss, (image, text, scale))
    assert float(loss.detach()) == 0.0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


class Towers(nn.Module):
    """Two towers with dropout, noise from torch's generator and a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Dropout(0.4), nn.Linear(9, 6))
        self.text = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.4), nn.Tanh(), nn.Linear(9, 6))
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.graphs = 0
        self.double()

    def encode(self, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, texts = chunk
        self.graphs = max(self.graphs, len(images) if torch.is_grad_enabled() else 0)
        noised = images + 0.3 * torch.randn_like(images)
        image = nn.functional.normalize(self.image(noised), dim=1)
        return image, nn.functional.normalize(self.text(texts), dim=1)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        valid = torch.ones(len(image), dtype=torch.bool, device=image.device)
        valid[3] = False
        return contrastive_loss(image, text, self.log_scale.exp(), valid, ALONE)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters() if p.grad is not None]


@pytest.mark.parametrize("sizes", [[10], [5, 5], [4, 4, 2], [1, 2, 3, 4], [1] * 10])
def test_cached_gradients_are_those_of_the_full_batch(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(10, 5, generator=generator, dtype=torch.float64).split(sizes)
    texts = torch.randn(10, 4, generator=generator, dtype=torch.float64).split(sizes)
    chunks = list(zip(images, texts, strict=True))

    full = Towers()
    torch.manual_seed(9)
    parts = [full.encode(chunk) for chunk in chunks]  # one graph over all chunks
    after = torch.get_rng_state()
    loss = full.loss(torch.cat([i for i, _ in parts]), torch.cat([t for _, t in parts]))
    loss.backward()

    cached = Towers()
    torch.manual_seed(9)
    result = cached_step(cached, chunks, cached.encode, cached.loss, ALONE, loss_scale=64.0)
    assert torch.equal(torch.get_rng_state(), after)
    assert cached.graphs == max(sizes)  # never a graph of more rows than a chunk has
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(result.image_features, torch.cat([i.detach() for i, _ in parts]))
    assert not result.loss.requires_grad and not result.text_features.requires_grad
    assert len(cached.gradients()) == len(full.gradients()) == 9
    for a, b in zip(cached.gradients(), full.gradients(), strict=True):
        torch.testing.assert_close(a / 64.0, b, rtol=1e-11, atol=1e-13)


def test_the_gpus_random_state_is_put_back_before_each_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken, restored = iter(range(10)), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: next(taken))
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    towers = Towers()
    chunks = [(torch.ones(2, 5).double(), torch.ones(2, 4).double()) for _ in range(3)]
    cached_step(towers, chunks, towers.encode, towers.loss, ALONE)
    assert restored == [0, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_dropout_on_a_gpu_draws_the_same_masks_again() -> None:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(10, 5, generator=generator, dtype=torch.float64).cuda().split(4)
    texts = torch.randn(10, 4, generator=generator, dtype=torch.float64).cuda().split(4)
    chunks = list(zip(images, texts, strict=True))
    full, cached = Towers().cuda(), Towers().cuda()
    torch.manual_seed(9)
    parts = [full.encode(chunk) for chunk in chunks]
    full.loss(torch.cat([i for i, _ in parts]), torch.cat([t for _, t in parts])).backward()
    torch.manual_seed(9)
    cached_step(cached, chunks, cached.encode, cached.loss, ALONE)
    for a, b in zip(cached.gradients(), full.gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
