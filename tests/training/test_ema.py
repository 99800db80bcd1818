"""Averages of weights, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diff_dalle.errors import UsageError
from diff_dalle.training.ema import EMA
from diff_dalle.training.train_config import TrainConfig


def model_with_buffer() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    return model.double()


def walk(model: nn.Module, ema: EMA, steps: int) -> list[list[torch.Tensor]]:
    """Change the weights and update; returns the weights after every step."""
    seen = []
    with torch.no_grad():
        for _ in range(steps):
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            ema.update()
            seen.append([p.detach().clone() for p in model.parameters()])
    return seen


def test_every_rate_follows_the_formula() -> None:
    model = model_with_buffer()
    start = [p.detach().clone() for p in model.parameters()]
    ema = EMA(model, (0.9, 0.5, 0.0))
    seen = walk(model, ema, 7)
    for rate in (0.9, 0.5, 0.0):
        state = ema.state_dicts()[str(rate)]
        for index, (name, _) in enumerate(model.named_parameters()):
            expected = start[index]
            for weights in seen:
                expected = rate * expected + (1 - rate) * weights[index]
            torch.testing.assert_close(state[name], expected, rtol=1e-12, atol=1e-12)


def test_state_dicts_fit_the_model_and_carry_present_buffers() -> None:
    model = model_with_buffer()
    ema = EMA(model, (0.9999, 0.99))
    assert list(ema.state_dicts()) == ["0.9999", "0.99"]
    model[1].running_mean.fill_(5.0)  # type: ignore[union-attr, operator]
    other = model_with_buffer()
    other.load_state_dict(ema.state_dicts()["0.99"])
    assert torch.equal(other[1].running_mean, model[1].running_mean)  # type: ignore[arg-type]


def test_resuming_goes_on_bit_for_bit() -> None:
    def run(stop_at: int | None) -> dict[str, torch.Tensor]:
        model = model_with_buffer()
        ema = EMA(model, (0.9,))
        torch.manual_seed(1)
        for step in range(6):
            if step == stop_at:
                saved = {name: dict(state) for name, state in ema.state_dicts().items()}
                ema = EMA(model, (0.9,))
                ema.load_state_dicts(saved)
            walk(model, ema, 1)
        return ema.state_dicts()["0.9"]

    whole, parts = run(None), run(3)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_other_rates_are_refused() -> None:
    ema = EMA(model_with_buffer(), (0.9, 0.5))
    states = EMA(model_with_buffer(), (0.9, 0.99)).state_dicts()
    with pytest.raises(UsageError, match="--ema_rate is 0.9,0.5, but the checkpoint has 0.9,0.99"):
        ema.load_state_dicts(states)


@pytest.mark.parametrize("rates", [(1.0,), (-0.1,), (0.9, 0.9)])
def test_impossible_rates_are_refused_before_any_work(rates: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="--ema_rate"):
        TrainConfig(ema_rate=rates)


def test_applied_puts_the_average_in_and_the_weights_back() -> None:
    model = model_with_buffer()
    ema = EMA(model, (0.9,))
    raw = walk(model, ema, 3)[-1]
    average = [ema.state_dicts()["0.9"][name] for name, _ in model.named_parameters()]

    def holds(values: list[torch.Tensor]) -> bool:
        return all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))

    with pytest.raises(ValueError), ema.applied(0.9) as inside:
        assert inside is model and holds(average)
        raise ValueError
    assert holds(raw)


def test_averages_of_bf16_weights_are_fp32() -> None:
    model = nn.Linear(2, 2, bias=False).bfloat16()
    nn.init.zeros_(model.weight)
    ema = EMA(model, (0.999,))
    nn.init.ones_(model.weight)
    for _ in range(10):
        ema.update()
    average = ema.state_dicts()["0.999"]["weight"]
    assert average.dtype == torch.float32  # bf16 would stand still near 0.5
    torch.testing.assert_close(average, torch.full((2, 2), 1 - 0.999**10))


def test_tied_weights_are_averaged_under_both_names() -> None:
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    model[1].weight = model[0].weight
    ema = EMA(model, (0.5,))
    walk(model, ema, 2)
    state = ema.state_dicts()["0.5"]
    assert torch.equal(state["0.weight"], state["1.weight"])
    assert not torch.equal(state["0.weight"], model[0].weight)  # type: ignore[arg-type]
