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
    zero_terminal,
)
from diff_dalle.diffusion.spacing import choose_steps
from diff_dalle.errors import UsageError

LINEAR = Schedule.make("linear", 1000)
COSINE = Schedule.make("cosine", 1000)
FLOW = Schedule.make("flow", 1000)
TERMINAL = Schedule.make("linear", 1000, zero_terminal_snr=True)


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
        (FLOW.alpha_bar, 249, 0.9),  # s = 1/4: 9 / (9 + 1)
        (FLOW.alpha_bar, 499, 0.5),
        (FLOW.betas, 999, 1.0),
        (FLOW.alpha_bar, 999, 0.0),
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


PROCESSES = [LINEAR, COSINE, FLOW, TERMINAL]
PROCESSES += [LINEAR.respace("250"), COSINE.respace("10"), FLOW.respace("10")]


@pytest.mark.parametrize("schedule", PROCESSES)
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


def test_the_flow_schedule_is_the_straight_path() -> None:
    """Liu et al. 2022, eq. 1: noise to signal as s to 1 - s, s in equal steps up to 1."""
    ratio = (FLOW.alpha_bar.reciprocal() - 1).sqrt()
    s = ratio[:-1] / (1 + ratio[:-1])
    torch.testing.assert_close(s, torch.arange(1, 1000, dtype=torch.float64) / 1000)
    assert len(Schedule.make("flow", 1).betas) == 1


@pytest.mark.parametrize("name", ["linear", "cosine", "flow"])
def test_a_shift_lowers_the_log_snr_alike_everywhere(name: str) -> None:
    """Hoogeboom et al. 2023, section 3.1: by 2 log(256 / 64) from 64 to 256 pixels."""
    plain, moved = Schedule.make(name, 1000), Schedule.make(name, 1000, shift=4.0)
    gap = (plain.log_snr - moved.log_snr)[:-1]
    torch.testing.assert_close(gap, torch.full_like(gap, math.log(16)), rtol=0, atol=1e-6)


def test_a_shifted_flow_is_that_of_stable_diffusion_3() -> None:
    """Esser et al. 2024, eq. 23, with 9 times the pixels: s -> 3 s / (1 + 2 s)."""
    ratio = (Schedule.make("flow", 1000, shift=3.0).alpha_bar.reciprocal() - 1).sqrt()[:-1]
    s = torch.arange(1, 1000, dtype=torch.float64) / 1000
    torch.testing.assert_close(ratio / (1 + ratio), 3 * s / (1 + 2 * s))


def test_no_shift_changes_no_bit() -> None:
    assert torch.equal(Schedule.make("cosine", 1000, shift=1.0).betas, COSINE.betas)


@pytest.mark.parametrize("plain", [LINEAR, COSINE, FLOW])
def test_zero_terminal_snr_moves_and_scales_the_signal(plain: Schedule) -> None:
    """Lin et al. 2024, algorithm 1: the last root of alpha_bar is 0, the first one stays."""
    old, new = plain.alpha_bar.sqrt(), Schedule.from_betas(zero_terminal(plain.betas))
    assert new.alpha_bar[-1] == 0 and new.betas[-1] == 1 and new.log_snr[-1] == -math.inf
    assert float(new.alpha_bar[0]) == pytest.approx(float(plain.alpha_bar[0]), rel=1e-12)
    slope = new.alpha_bar.sqrt().diff() / old.diff()
    torch.testing.assert_close(slope, slope[:1].expand(999), rtol=1e-6, atol=0)


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    ddim = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    wanted = ddim.rescale_zero_terminal_snr(LINEAR.betas)
    torch.testing.assert_close(TERMINAL.betas, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("schedule", [FLOW, TERMINAL, FLOW.respace("2"), TERMINAL.respace("50")])
def test_tables_of_a_process_that_ends_in_noise_are_finite(schedule: Schedule) -> None:
    for name in (
        "posterior_variance",
        "posterior_log_variance",
        "large_log_variance",
        "posterior_coef_x_0",
        "posterior_coef_x_t",
        "betas",
    ):
        assert torch.isfinite(getattr(schedule, name)).all(), name
    # Noise alone says nothing: q(x_{t-1} | x_t, x_0) is q(x_{t-1} | x_0).
    assert schedule.alpha_bar[-1] == 0 and schedule.posterior_coef_x_t[-1] == 0
    assert schedule.posterior_coef_x_0[-1] == schedule.alpha_bar[-2].sqrt()
    assert schedule.posterior_variance[-1] == 1 - schedule.alpha_bar[-2]


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


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [1.0, 0.1], [0.1, 1.01], [[0.1]]])
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
        (
            "diffusion_steps",
            {
                "diffusion_steps": 1,
                "noise_schedule": "cosine",
                "zero_terminal_snr": True,
                "prediction": "v",
            },
        ),
        ("schedule_shift", {"schedule_shift": 0.0}),
        ("schedule_shift", {"schedule_shift": 1e-9}),
        ("schedule_shift", {"schedule_shift": math.inf}),
        ("sigma_data", {"sigma_data": 0.0}),
        ("sigma_data", {"sigma_data": math.inf}),
        ("prediction", {"prediction": "flow", "predict_xstart": True}),
        ("prediction", {"zero_terminal_snr": True}),
        ("prediction", {"noise_schedule": "flow", "prediction": "eps"}),
    ],
)
def test_a_wrong_knob_is_named(field: str, values: dict) -> None:
    with pytest.raises(UsageError, match=f"--{field} is "):
        ProcessConfig(**values)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("shift", [1e-3, 1e3])
def test_the_largest_shifts_make_a_schedule(schedule: str, shift: float) -> None:
    betas = Schedule.make(schedule, 1000, shift=shift).betas
    assert bool(((betas > 0) & (betas < 1)).all())


@pytest.mark.parametrize("prediction", ["x0", "v", "edm", "flow"])
def test_other_predictions_stand_noise_alone(prediction: str) -> None:
    ProcessConfig(noise_schedule="flow", prediction=prediction)
    ProcessConfig(zero_terminal_snr=True, prediction=prediction)
    ProcessConfig(zero_terminal_snr=True, predict_xstart=True)


def test_the_smallest_step_counts_work() -> None:
    assert len(Schedule.make("linear", 21).betas) == 21
    assert len(Schedule.make("cosine", 1).betas) == 1
