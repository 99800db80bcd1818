"""The compute type, and the loss scale of fp16."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from diff_dalle.errors import UsageError
from diff_dalle.training.precision import Precision, PrecisionConfig

CPU = torch.device("cpu")


def fp16(growth: float = 1e-3) -> Precision:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Precision(PrecisionConfig(use_fp16=True, fp16_scale_growth=growth), CPU)


def test_names_resolve() -> None:
    assert PrecisionConfig().resolved_precision(CPU) == "fp32"
    assert PrecisionConfig(use_fp16=True).resolved_precision(CPU) == "fp16"
    assert PrecisionConfig(precision="bf16").resolved_precision(CPU) == "bf16"
    with pytest.raises(UsageError, match="--use_fp16 True contradicts --precision bf16"):
        PrecisionConfig(use_fp16=True, precision="bf16")
    with pytest.raises(UsageError, match="--precision is 'fp8'"):
        PrecisionConfig(precision="fp8")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_autocast_decides_the_compute_type(name: str, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision = Precision(PrecisionConfig(precision=name), CPU)
    layer = nn.Linear(4, 4)
    with precision.autocast():
        out = layer(torch.ones(2, 4))
    assert out.dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_fp16_on_a_cpu_warns() -> None:
    with pytest.warns(UserWarning, match="fp16 on a CPU"):
        Precision(PrecisionConfig(use_fp16=True), CPU)


def test_the_scale_grows_additively_and_halves() -> None:
    precision = fp16()
    assert precision.loss_scale == 2.0**20
    for _ in range(1000):
        precision.update(overflow=False)
    assert math.isclose(precision.lg_loss_scale, 21.0)
    precision.update(overflow=True)
    assert math.isclose(precision.lg_loss_scale, 20.0)
    assert math.isclose(precision.loss_scale, 2.0**20, rel_tol=1e-9)


def test_other_precisions_have_no_scale() -> None:
    precision = Precision(PrecisionConfig(precision="bf16"), CPU)
    precision.update(overflow=True)
    assert precision.loss_scale == 1.0 and precision.state_dict() == {}


def test_every_parameter_is_unscaled() -> None:
    # Small numbers that only a scaled loss carries through fp16 (2^-24 is its smallest).
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inputs = torch.full((2, 4), 2.0**-3)
    reference = [p.clone() for p in model.parameters()]
    (model(inputs).sum() * 2.0**-20).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    precision = fp16()
    with precision.autocast():
        out = model(inputs).sum()
    (out.float() * 2.0**-20 * precision.loss_scale).backward()
    precision.unscale_(model.parameters())
    for p, gradient, before in zip(model.parameters(), expected, reference, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradient, rtol=2e-2, atol=1e-9)
        assert torch.equal(p, before)


def test_a_collapsing_scale_stops_at_a_floor_with_advice() -> None:
    precision = fp16()
    survived = 0
    with pytest.raises(UsageError, match="overflowed 20 times in a row.*--precision bf16 or fp32"):
        for _ in range(100):
            precision.update(overflow=True)
            survived += 1
            assert precision.loss_scale >= 1.0
    assert survived == 20 + 19  # 20 halvings to the floor, then 20 overflows there


def test_a_good_step_at_the_floor_starts_the_count_anew() -> None:
    precision = fp16(growth=0.0)
    for _ in range(20 + 19):
        precision.update(overflow=True)
    precision.update(overflow=False)
    for _ in range(19):
        precision.update(overflow=True)
    with pytest.raises(UsageError):
        precision.update(overflow=True)


def test_the_scale_survives_a_checkpoint() -> None:
    precision, resumed = fp16(), fp16()
    for overflow in (True, True, False, True):
        precision.update(overflow)
    resumed.load_state_dict(precision.state_dict())
    assert resumed.lg_loss_scale == precision.lg_loss_scale != 20.0
    resumed.load_state_dict({})  # from a run in another precision
    assert resumed.lg_loss_scale == precision.lg_loss_scale
