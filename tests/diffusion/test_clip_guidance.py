"""Guidance by a CLIP whose features, similarities and gradients are known in closed form.

Pictures are one pixel x and captions are angles a: the image's feature is (cos x, sin x), the
caption's (cos a, sin a), so that their cosine is cos(x - a).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diff_dalle.diffusion.clip_guidance import clip_gradient, log_softmax_in_set, similarity

X = torch.tensor([0.3, -0.9, 2.0, 0.0, 1.4], dtype=torch.float64)
OWN = torch.tensor([0.5, 0.1, 1.0, -2.0, 1.4], dtype=torch.float64)
SET = torch.tensor([-1.0, 0.5, 2.5], dtype=torch.float64)  # holds the first picture's own
USED = torch.ones(5, 3, dtype=torch.bool)
USED[0, 1] = False
T = torch.arange(5)
SCALE, LOGIT_SCALE = 1.7, 6.0


def feature(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


class Encoder:
    """Counts the pictures that it is asked about."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, x_t: Tensor, time: Tensor) -> Tensor:
        self.asked += len(x_t)
        return feature(x_t.flatten())


def gradient(log_probability: object, encoder: Encoder | None = None, x: Tensor = X) -> Tensor:
    guide = clip_gradient(encoder or Encoder(), log_probability, SCALE, lambda t: t)  # type: ignore[arg-type]
    found = guide(x.reshape(-1, 1, 1, 1), T[: len(x)])
    assert found is not None
    return found.flatten()


def test_without_a_set_the_normaliser_is_left_out() -> None:
    found = gradient(similarity(feature(OWN), LOGIT_SCALE))
    torch.testing.assert_close(found, -SCALE * LOGIT_SCALE * (X - OWN).sin())


def test_with_a_set_it_is_the_gradient_of_the_log_softmax() -> None:
    """log p = L cos(x-a) - log(e^(L cos(x-a)) + sum_k e^(L cos(x-a_k))), differentiated by hand."""
    found = gradient(log_softmax_in_set(feature(OWN), LOGIT_SCALE, feature(SET), USED))
    expected = []
    for x, own, used in zip(X, OWN, USED, strict=True):
        angles = torch.cat([own[None], SET[used]])
        p = (LOGIT_SCALE * (x - angles).cos()).exp()
        p = p / p.sum()
        slopes = -LOGIT_SCALE * (x - angles).sin()
        expected.append(SCALE * (slopes[0] - (p * slopes).sum()))
    torch.testing.assert_close(found, torch.stack(expected))


def test_the_log_softmax_is_that_of_the_set_with_the_own_caption_once() -> None:
    log_p = log_softmax_in_set(feature(OWN), LOGIT_SCALE, feature(SET), USED)(feature(X))
    logits = LOGIT_SCALE * torch.stack([(X[0] - OWN[0]).cos(), *(X[0] - SET[[0, 2]]).cos()])
    torch.testing.assert_close(log_p[0], logits.log_softmax(0)[0])


def test_a_set_tells_from_its_neighbours() -> None:
    """Between two captions the set leads away from the other, the bare similarity nowhere."""
    own, other = torch.tensor([0.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    at_the_text = torch.zeros(1, dtype=torch.float64)
    used = torch.ones(1, 1, dtype=torch.bool)
    within = log_softmax_in_set(feature(own), LOGIT_SCALE, feature(other), used)
    assert float(gradient(similarity(feature(own), LOGIT_SCALE), x=at_the_text)) == 0
    assert float(gradient(within, x=at_the_text)) < -0.1


def test_a_set_is_weighed_in_full_precision_beside_half_precision() -> None:
    """Generators compute in halves around it."""
    x = feature(X).float()
    log_p = log_softmax_in_set(feature(OWN).float(), 100.0, feature(SET).float(), USED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = log_p(x)
    torch.testing.assert_close(found, log_p(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_picture_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """Bit for bit."""
    generator = torch.Generator().manual_seed(0)
    own, others = (torch.randn(n, 16, generator=generator, dtype=dtype) for n in (5, 300))
    features = torch.randn(5, 16, generator=generator, dtype=dtype)
    used = torch.rand(5, 300, generator=generator) > 0.1

    def slope(rows: slice) -> Tensor:
        x = features[rows].clone().requires_grad_(True)
        log_p = log_softmax_in_set(own[rows], LOGIT_SCALE, others, used[rows])(x)
        return torch.autograd.grad(log_p.sum(), x)[0]

    together = slope(slice(None))
    for n in range(5):
        assert torch.equal(slope(slice(n, n + 1))[0], together[n])


def test_the_encoder_is_not_asked_where_the_scale_is_0() -> None:
    encoder = Encoder()
    scales = torch.tensor([0.0, 2.0, 0.0, -1.0, 0.0], dtype=torch.float64)
    log_probability = similarity(feature(OWN), LOGIT_SCALE)
    guide = clip_gradient(encoder, log_probability, lambda t: scales[t], lambda t: t)
    x = X.reshape(-1, 1, 1, 1)
    for step in (0, 2, 4):
        assert guide(x, torch.full((5,), step)) is None
    assert encoder.asked == 0
    slope = -LOGIT_SCALE * (X - OWN).sin()
    for step, scale in ((1, 2.0), (3, -1.0)):
        found = guide(x, torch.full((5,), step))
        assert found is not None
        torch.testing.assert_close(found.flatten(), scale * slope)
    assert encoder.asked == 10
