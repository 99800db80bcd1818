"""Schedules and respacing against published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diff_dalle.diffusion.schedule import (
    ProcessConfig,
    Schedule,
    betas_cosine,
    betas_linear,
)
from diff_dalle.diffusion.spacing import choose_steps
from diff_dalle.errors import UsageError

LINEAR = Schedule.make("linear", 1000)
COSINE = Schedule.make("cosine", 1000)


@pytest.mark.parametrize(
    ("table", "step", "value"),
    [
        (LINEAR.betas, 0, 1e-4),
        (LINEAR.betas, 999, 0.02),
        (LINEAR.alpha_bar, 499, 0.07858724288177824),
        (LINEAR.alpha_bar, 999, 4.035829765375676e-05),
        (LINEAR.posterior_variance, 1, 5.4531876613021935e-05),
        (LINEAR.posterior_log_variance, 0, -9.81672513529567),
        (LINEAR.posterior_coef_x_0, 500, 0.003058057075629619),
        (LINEAR.posterior_coef_x_t, 500, 0.9941043507567258),
        (COSINE.betas, 0, 4.128422482196914e-05),
        (COSINE.betas, 998, 0.7499993929011166),
        (COSINE.betas, 999, 0.999),
        (COSINE.alpha_bar, 499, 0.4938435904406382),
        (COSINE.alpha_bar, 999, 2.4287669070348567e-09),
        (COSINE.posterior_variance, 999, 0.9989975760881921),
    ],
)
def test_published_constants(table: Tensor, step: int, value: float) -> None:
    assert table.dtype == torch.float64
    assert float(table[step]) == pytest.approx(value, rel=1e-11)


def test_first_posterior_variance_is_zero_and_its_logarithm_borrowed() -> None:
    assert float(LINEAR.posterior_variance[0]) == 0
    assert LINEAR.posterior_log_variance[0] == LINEAR.posterior_log_variance[1]
    assert LINEAR.large_log_variance[0] == LINEAR.posterior_log_variance[1]
    assert torch.equal(LINEAR.large_log_variance[1:], LINEAR.betas[1:].log())


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, LINEAR.respace("250"), COSINE.respace("10")])
def test_tables_agree_with_their_definitions(schedule: Schedule) -> None:
    a, prev, b = schedule.alpha_bar, schedule.alpha_bar_prev, schedule.betas
    assert prev[0] == 1 and torch.equal(prev[1:], a[:-1])
    assert schedule.alpha_bar_next[-1] == 0 and torch.equal(schedule.alpha_bar_next[:-1], a[1:])
    torch.testing.assert_close(schedule.log_snr, torch.log(a / (1 - a)), rtol=1e-9, atol=0)
    # Bayes: precision of q(x_{t-1} | x_t, x_0) = precision from x_t + precision from x_0.
    precision = (1 - b) / b + 1 / (1 - prev)
    torch.testing.assert_close(
        1 / schedule.posterior_variance[1:], precision[1:], rtol=1e-9, atol=0
    )
    # The mean of x_{t-1} given x_0, averaged over x_t, is sqrt(alpha_bar_prev) x_0.
    mean = schedule.posterior_coef_x_0 + schedule.posterior_coef_x_t * a.sqrt()
    torch.testing.assert_close(mean, prev.sqrt(), rtol=1e-9, atol=0)


def test_linear_schedule_adds_about_the_same_noise_at_any_step_count() -> None:
    for steps in (250, 4000):
        assert math.log(float(Schedule.make("linear", steps).alpha_bar[-1])) == pytest.approx(
            math.log(4.035829765375676e-05), rel=0.03
        )


def test_cosine_follows_the_cosine_until_it_is_clipped() -> None:
    a = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    wanted = torch.tensor(a[1:], dtype=torch.float64) / a[0]
    torch.testing.assert_close(COSINE.alpha_bar[:999], wanted[:999], rtol=1e-9, atol=0)
    assert betas_cosine(1000).max() == 0.999
    assert betas_linear(1000).dtype == torch.float64


@pytest.mark.parametrize("base", [LINEAR, COSINE])
@pytest.mark.parametrize("spec", ["250", "ddim25", "10,15,20", "1"])
def test_respaced_process_keeps_alpha_bar(base: Schedule, spec: str) -> None:
    short = base.respace(spec)
    assert torch.equal(short.alpha_bar, base.alpha_bar[short.timestep_map])
    torch.testing.assert_close(
        torch.cumprod(1 - short.betas, 0), short.alpha_bar, rtol=1e-8, atol=0
    )
    assert short.timestep_map.tolist() == choose_steps(base.alpha_bar, spec)
    assert short.base_steps == 1000
    assert torch.isfinite(short.posterior_log_variance).all()


def test_respacing_twice_still_points_to_the_base_process() -> None:
    twice = LINEAR.respace("100").respace("10")
    assert torch.equal(twice.alpha_bar, LINEAR.alpha_bar[twice.timestep_map])
    assert twice.timestep_map[-1] == 999 and twice.base_steps == 1000


def test_whole_respacing_changes_nothing() -> None:
    whole = COSINE.respace("")
    torch.testing.assert_close(whole.betas, COSINE.betas, rtol=1e-9, atol=0)
    assert torch.equal(whole.alpha_bar, COSINE.alpha_bar)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0], [[0.1]]])
def test_impossible_betas_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="betas"):
        Schedule.from_betas(torch.tensor(betas))


def test_auto_schedule_is_cosine_up_to_64_and_linear_above() -> None:
    assert [ProcessConfig().resolve(size) for size in (32, 64, 65, 256, 1024)] == [
        "cosine",
        "cosine",
        "linear",
        "linear",
        "linear",
    ]
    assert ProcessConfig(noise_schedule="linear").resolve(64) == "linear"


def test_predict_xstart_is_a_spelling_of_x0() -> None:
    assert ProcessConfig(predict_xstart=True).resolved_prediction == "x0"
    assert ProcessConfig(prediction="v").resolved_prediction == "v"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("noise_schedule", {"noise_schedule": "sqrt"}),
        ("prediction", {"prediction": "epsilon"}),
        ("prediction", {"prediction": "v", "predict_xstart": True}),
        ("diffusion_steps", {"diffusion_steps": 0}),
        ("diffusion_steps", {"diffusion_steps": 20, "noise_schedule": "linear"}),
    ],
)
def test_a_wrong_knob_is_named(field: str, values: dict) -> None:
    with pytest.raises(UsageError, match=f"--{field} is "):
        ProcessConfig(**values)


def test_the_smallest_step_counts_work() -> None:
    assert len(Schedule.make("linear", 21).betas) == 21
    assert len(Schedule.make("cosine", 1).betas) == 1
