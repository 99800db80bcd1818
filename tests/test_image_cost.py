"""What an image costs: the budget of the cascades, and the sum by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diff_dalle.config import GeneratorRun, make_generator, parse_run
from diff_dalle.image_cost import CASCADES, StageCost, cascade_cost, cost_table, generator_inputs


def test_the_largest_cascade_costs_forty_teraflop_an_image() -> None:
    costs = cascade_cost(CASCADES["diff-dalle"], vocabulary=100)
    assert [cost.evaluations for cost in costs] == [20 * 2, 12, 6]
    assert sum(cost.total for cost in costs) / 1e12 == pytest.approx(38.63, abs=0.01)
    assert sum(cost.total for cost in costs) <= 40e12


def test_the_tiny_upsampler_to_1024_px_runs_on_two_cores() -> None:
    *_, largest = cascade_cost(CASCADES["tiny"], vocabulary=100)
    assert largest.preset == "tiny-1024"
    assert largest.evaluation <= 60e9


def test_a_stage_is_what_its_network_does() -> None:
    """The encoder once, then evaluations that are given encoded text."""
    base, *_ = cascade_cost(CASCADES["tiny"][:1], vocabulary=100)
    run = parse_run(GeneratorRun, ["--preset", "tiny-64", "--vocab_size", "100"])
    x, t, cond = generator_inputs(run, batch=1, size=64)
    with torch.device("meta"), torch.no_grad():
        model = make_generator(run)
        with FlopCounterMode(display=False) as text:
            encoded = model.encode(cond)
        with FlopCounterMode(display=False) as evaluation:
            model(x, t, encoded)
    assert (base.text, base.evaluation) == (text.get_total_flops(), evaluation.get_total_flops())
    assert base.total == 40 * base.evaluation + base.text


def test_the_table_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [
        StageCost(preset="a", parameters=10, evaluation=2 * 10**12, evaluations=3, text=10**11),
        StageCost(preset="b", parameters=5, evaluation=10**11, evaluations=2, text=0),
    ]
    monkeypatch.setattr("diff_dalle.image_cost.cascade_cost", lambda *_: costs)
    assert cost_table("tiny", 100)[2:] == [
        "| `a` | 10 | 2,000.0 | 3 | 6.10 |",
        "| `b` | 5 | 100.0 | 2 | 0.20 |",
        "| the `tiny` cascade | 15 | | | **6.30** |",
    ]
