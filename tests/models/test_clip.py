"""The noised CLIP: published size, features, scale, gradients, user mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diff_dalle.errors import UsageError
from diff_dalle.models.clip import CLIPConfig, ImageEncoder, NoisyCLIP
from diff_dalle.models.cost import count_parameters

Perturb = Callable[[nn.Module], nn.Module]
CFG = CLIPConfig(
    image_size=16,
    classifier_width=16,
    classifier_depth=1,
    classifier_channel_mult=(1, 2),
    classifier_attention_resolutions=(8,),
    classifier_enc_attn_dim=16,
    classifier_enc_depth=2,
    classifier_embed_dim=12,
    classifier_head_channels=8,
    text_length=8,
    vocab_size=20,
)


def _clip(cfg: CLIPConfig = CFG) -> NoisyCLIP:
    torch.manual_seed(0)
    return NoisyCLIP(cfg).eval()


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 16, 16, generator=generator)
    tokens = torch.randint(3, 20, (3, 6), generator=generator)
    return x, torch.tensor([3, 400, 999]), tokens, torch.ones(3, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("size", "depth", "parameters"),
    [(64, 4, 65_438_568), (128, 2, 42_568_040), (256, 2, 54_096_360), (512, 2, 54_448_360)],
)
def test_parameters_of_adms_classifiers(size: int, depth: int, parameters: int) -> None:
    cfg = CLIPConfig(image_size=size, classifier_depth=depth)
    with torch.device("meta"):
        encoder = ImageEncoder(cfg.image_half(), out_channels=1000)
    assert count_parameters(encoder) == parameters


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_default_shapes_at_every_stage(size: int) -> None:
    with torch.device("meta"):
        clip = NoisyCLIP(CLIPConfig(image_size=size, vocab_size=100))
        x, t = torch.empty(2, 3, size, size), torch.empty(2)
        tokens, mask = torch.empty(2, 48).long(), torch.empty(2, 48).bool()
        image, text = clip(x, t, tokens, mask)
    assert image.shape == text.shape == (2, 512)


def test_a_large_stage_runs_folded_and_without_attention(perturb: Perturb) -> None:
    cfg = replace(CFG, image_size=1024, classifier_patch_size=32,
                  classifier_attention_resolutions=())  # fmt: skip
    features = perturb(_clip(cfg)).encode_image(torch.randn(1, 3, 1024, 1024), torch.tensor([5]))
    assert features.shape == (1, 12)


def test_features_have_length_one(perturb: Perturb) -> None:
    image, text = perturb(_clip())(*_inputs())
    for features in (image, text):
        assert features.shape == (3, 12)
        assert features.dtype == torch.float32
        assert torch.allclose(features.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_are_float32_under_autocast(dtype: torch.dtype, perturb: Perturb) -> None:
    clip = perturb(_clip())
    exact = clip(*_inputs())
    with torch.autocast("cpu", dtype=dtype):
        features = clip(*_inputs())
    for close, true in zip(features, exact, strict=True):
        assert close.dtype == torch.float32
        assert (close * true).sum(1).min() > 0.999
        assert torch.allclose(close.norm(dim=1), torch.ones(3))


def test_the_timestep_is_heard_only_by_a_noised_clip(perturb: Perturb) -> None:
    x, t, _, _ = _inputs()
    noised = perturb(_clip())
    assert not torch.allclose(noised.encode_image(x, t), noised.encode_image(x, t * 0))
    clean = perturb(_clip(replace(CFG, noised=False)))
    assert torch.equal(clean.encode_image(x, t), clean.encode_image(x, t * 0))
    assert torch.equal(clean.encode_image(x, t), noised.encode_image(x, t * 0))


def test_padding_changes_no_text_feature(perturb: Perturb) -> None:
    clip = perturb(_clip())
    _, _, tokens, mask = _inputs()
    mask = torch.arange(6) < torch.tensor([6, 3, 0])[:, None]
    features = clip.encode_text(tokens, mask)
    assert torch.isfinite(features).all()
    other = torch.where(mask, tokens, 19)
    longer = torch.cat([other, other[:, :2]], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    assert torch.equal(clip.encode_text(other, mask), features)
    assert torch.allclose(clip.encode_text(longer, longer_mask), features, atol=1e-5)


def test_the_scale_starts_at_its_published_value_and_stops_at_100() -> None:
    clip = _clip()
    assert clip.scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(500))
    scale = clip.scale()
    assert 99.99 < scale.item() <= 100
    scale.backward()  # at the limit it can still come down
    assert clip.logit_scale.grad is not None and clip.logit_scale.grad > 0
    with torch.no_grad():
        clip.logit_scale.sub_(0.1)
    assert clip.scale() < 91


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_every_parameter_gets_a_gradient(use_checkpoint: bool, perturb: Perturb) -> None:
    clip = perturb(_clip(replace(CFG, use_checkpoint=use_checkpoint))).train()
    image, text = clip(*_inputs())
    (clip.scale() * image @ text.T).logsumexp(1).sum().backward()
    silent = [n for n, w in clip.named_parameters() if w.grad is None or not w.grad.any()]
    assert silent == []


def test_checkpointing_keeps_the_gradients(perturb: Perturb) -> None:
    gradients = []
    for use_checkpoint in (False, True):
        cfg = replace(CFG, use_checkpoint=use_checkpoint, dropout=0.3)
        clip = perturb(_clip(cfg)).double().train()
        x, t, tokens, mask = _inputs()
        torch.manual_seed(7)
        image, text = clip(x.double(), t, tokens, mask)
        assert image.dtype == text.dtype == torch.float64
        (image @ text.T).exp().sum().backward()
        gradients.append({n: w.grad for n, w in clip.named_parameters() if w.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_gradient_with_respect_to_the_image(perturb: Perturb) -> None:
    """What guidance needs: the similarity rises along its own gradient."""
    clip = perturb(_clip()).double()
    x, t, tokens, mask = _inputs()
    x = x.double().requires_grad_()
    text = clip.encode_text(tokens, mask).detach()
    before = (clip.encode_image(x, t) * text).sum(1)
    (gradient,) = torch.autograd.grad(before.sum(), x)
    after = (clip.encode_image(x + 1e-3 * gradient, t) * text).sum(1)
    assert (after > before).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"classifier_width": 0}, "--classifier_width is 0"),
        ({"classifier_head_channels": 7}, "--classifier_head_channels is 7"),
        ({"classifier_channel_mult": (1, 0.01)}, "--classifier_channel_mult is"),
        ({"image_size": 17}, "--image_size is 17: .*--classifier_patch_size"),
        ({"classifier_embed_dim": 0}, "--classifier_embed_dim is 0"),
        ({"dropout": 1.5}, "--dropout is 1.5"),
        ({"vocab_size": 0}, "--vocab_size is 0"),
    ],
)
def test_mistakes_are_named_by_the_users_flag(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _clip(replace(CFG, **flags))  # type: ignore[arg-type]


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="16 x 16 px"):
        _clip().encode_image(torch.zeros(1, 3, 32, 32), torch.tensor([1]))
