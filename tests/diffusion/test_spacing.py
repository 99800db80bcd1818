"""Which steps are visited: known lists, known positions, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diff_dalle.diffusion.schedule import Schedule
from diff_dalle.diffusion.spacing import NAMED_STEPS, SPACINGS, choose_steps, space_timesteps
from diff_dalle.errors import UsageError

LINEAR = Schedule.make("linear", 1000).alpha_bar
COSINE = Schedule.make("cosine", 1000).alpha_bar
FLOW = Schedule.make("flow", 1000).alpha_bar


@pytest.mark.parametrize(
    ("spec", "count", "first", "last"),
    [
        ("250", 250, [0, 4, 8], [995, 999]),
        ("ddim25", 25, [0, 40, 80], [920, 960]),
        ("50", 50, [0, 20, 41], [979, 999]),
        ("ddim27", 27, [0, 38], [988]),
        ("", 1000, [0, 1, 2], [998, 999]),
        ("1000", 1000, [0, 1, 2], [998, 999]),
        ("1", 1, [0], [0]),
        ("2", 2, [0], [999]),
        ("ddim1000", 1000, [0, 1], [999]),
        ("10, 15,20", 45, [0, 37, 74], [982, 999]),
        ("0,5", 5, [500], [999]),
    ],
)
def test_respacing(spec: str, count: int, first: list[int], last: list[int]) -> None:
    kept = space_timesteps(1000, spec)
    assert len(kept) == count == len(set(kept))
    assert kept == sorted(kept)
    assert kept[: len(first)] == first and kept[-len(last) :] == last


def test_sections_of_300_steps() -> None:
    """The example in the field's own documentation: strides of about 11, 7 and 5."""
    kept = space_timesteps(300, "10,15,20")
    assert [sum(low <= t < low + 100 for t in kept) for low in (0, 100, 200)] == [10, 15, 20]
    assert kept[:3] == [0, 11, 22] and kept[10:12] == [100, 107] and kept[-1] == 299


@pytest.mark.parametrize(
    "spec", ["ddim400", "1001", "0", "0,0", "ddim0", "-5", "abc", "ddim", "12.5", "10,", "ddim5,5"]
)
def test_respacing_refuses_what_does_not_exist(spec: str) -> None:
    with pytest.raises(UsageError, match="--timestep_respacing is '") as error:
        space_timesteps(1000, spec)
    assert "\n" not in str(error.value)


def test_an_impossible_stride_names_its_neighbours() -> None:
    with pytest.raises(UsageError, match="ddim334 or ddim500"):
        space_timesteps(1000, "ddim400")


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("fast27", [999, 800, 799, 600, 599, 500, 400, 399, 377, 355, 333, 311, 288]),
        ("super27", [999, 991, 982, 974, 966, 958, 950, 941, 933, 925, 916, 908, 900, 899]),
        ("super40", [999, 992, 985, 978, 971, 964, 957, 949, 942, 935, 928, 921, 914, 907]),
        ("smart50", [999, 988, 977, 966, 955, 944, 933, 922, 911, 900, 899, 879, 859, 840]),
    ],
)
def test_published_lists(name: str, beginning: list[int]) -> None:
    kept = space_timesteps(1000, name)[::-1]
    assert kept[: len(beginning)] == beginning and kept[-1] == 0


@pytest.mark.parametrize("name", NAMED_STEPS)
def test_named_lists_hold_as_many_steps_as_they_say(name: str) -> None:
    for num_steps in (1000, 4000):
        kept = space_timesteps(num_steps, name)
        assert len(kept) == len(set(kept)) == int(name.lstrip("fastmruep"))
        assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == num_steps - 1


def test_a_misspelt_list_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean smart50"):
        space_timesteps(1000, "smrt50")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("alpha_bar", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("count", [2, 3, 20, 250, 999, 1000])
def test_every_spacing_visits_both_ends_and_no_step_twice(
    spacing: str, alpha_bar: Tensor, count: int
) -> None:
    kept = choose_steps(alpha_bar, str(count), spacing)
    assert len(kept) == count and kept == sorted(set(kept))
    assert kept[0] == 0 and kept[-1] == 999


@pytest.mark.parametrize("spacing", [name for name in SPACINGS if name != "uniform"])
@pytest.mark.parametrize("alpha_bar", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_one_step_starts_from_noise(spacing: str, alpha_bar: Tensor) -> None:
    assert choose_steps(alpha_bar, "1", spacing) == [999]


def test_quadratic_steps_are_squares() -> None:
    assert choose_steps(LINEAR, "4", "quadratic") == [0, 111, 444, 999]


def levels(alpha_bar: Tensor, kept: list[int]) -> Tensor:
    return torch.logit(alpha_bar[kept]) / 2


def test_logsnr_steps_are_even_where_the_grid_allows() -> None:
    found = levels(LINEAR, choose_steps(LINEAR, "20", "logsnr"))
    wanted = torch.linspace(float(found[0]), float(found[-1]), 20, dtype=torch.float64)
    # Beside the image neighbouring steps lie 0.3 apart, farther on ever nearer.
    assert (found - wanted).abs().max() < 0.17
    assert (found - wanted)[6:].abs().max() < 0.02


def test_karras_steps_follow_the_published_formula() -> None:
    """Eq. 5: sigma_i = (max^(1/7) + i / (n - 1) (min^(1/7) - max^(1/7)))^7."""
    kept = choose_steps(LINEAR, "10", "karras")[::-1]
    sigma = ((1 - LINEAR) / LINEAR).sqrt()
    high, low = float(sigma[-1]), float(sigma[0])
    for i, step in enumerate(kept):
        wanted = (high ** (1 / 7) + i / 9 * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        near = (sigma.log() - math.log(wanted)).abs()
        assert near[step] <= near.min() + 1e-12


@pytest.mark.parametrize("spacing", ["karras", "logsnr"])
@pytest.mark.parametrize("count", [2, 20, 250])
def test_noise_below_a_grey_level_takes_no_step(spacing: str, count: int) -> None:
    """The flow schedule begins at a half log-SNR of 6.9, where noise is an eighth of a level."""
    kept = choose_steps(FLOW, str(count), spacing)
    assert len(set(kept)) == count and kept[-1] == 999
    assert kept[0] == int((torch.logit(FLOW) / 2 - 4.6).abs().argmin()) == 9


@pytest.mark.parametrize("spacing", ["karras", "logsnr"])
def test_what_lies_beyond_total_noise_takes_one_step(spacing: str) -> None:
    """The last step is visited, and the next is where 0.6 % of the picture are left."""
    no_signal = torch.cat([LINEAR[:-1], torch.zeros(1, dtype=torch.float64)])
    for alpha_bar, end in ((COSINE, -5.1), (no_signal, -5.05)):
        found = levels(alpha_bar, choose_steps(alpha_bar, "20", spacing))
        assert found[-1] < -9 and float(found[-2]) == pytest.approx(end, abs=0.15)


def test_a_list_of_steps_is_not_spread() -> None:
    for spec in ("ddim25", "10,15,20", "smart50", ""):
        with pytest.raises(UsageError, match="names its steps itself") as error:
            choose_steps(LINEAR, spec, "karras")
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="--step_spacing is 'even': it must be one of uniform"):
        choose_steps(LINEAR, "20", "even")
    with pytest.raises(UsageError, match="--timestep_respacing is '0'"):
        choose_steps(LINEAR, "0", "logsnr")
