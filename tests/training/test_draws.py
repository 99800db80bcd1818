"""Draws are functions of a sample's seed alone, each with a stream of its own."""

import math

import pytest
import torch

from diff_dalle.training import draws

SEEDS = torch.arange(4000, dtype=torch.int64) * 7_919 + 3


def test_a_sample_meets_the_same_draws_in_any_batch() -> None:
    order = torch.tensor([5, 2, 9])
    some, all_ = SEEDS[order], SEEDS[:10]
    assert torch.equal(draws.timestep(some), draws.timestep(all_)[order])
    assert torch.equal(draws.noise(some, (3, 4, 4)), draws.noise(all_, (3, 4, 4))[order])
    assert torch.equal(draws.caption_drop(some, 0.5), draws.caption_drop(all_, 0.5)[order])
    level = draws.aug_level(all_, 0.3)[order]
    assert torch.equal(draws.aug_level(some, 0.3), level)
    rows, columns = draws.crop_corner(all_, 9)
    assert torch.equal(
        torch.stack(draws.crop_corner(some, 9)), torch.stack([rows, columns])[:, order]
    )


def test_draws_do_not_read_torchs_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draws.noise(SEEDS[:3], (2,))
    torch.manual_seed(1)
    assert torch.equal(draws.noise(SEEDS[:3], (2,)), first)
    torch.manual_seed(0)
    draws.held_out(SEEDS[:3], (2,), 1, 1000)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_draw_has_a_stream_of_its_own() -> None:
    held_out = {draws.Stream.HELD_OUT + i for i in range(8)}
    training = {stream for stream in draws.Stream if stream != draws.Stream.HELD_OUT}
    assert len(training) == len(draws.Stream) - 1 and not held_out & training

    row, column = draws.crop_corner(SEEDS, 1_000_000)
    singles = [
        draws.timestep(SEEDS),
        draws.aug_level(SEEDS, 1.0),
        draws.blur_sigma(SEEDS, 1.0, (0.0, 1.0)),
        row / 1e6,
        column / 1e6,
        draws.noise(SEEDS, ()),
        draws.aug_noise(SEEDS, ()),
        draws.noise_offset(SEEDS, 1).flatten(),
        draws.perturbation(SEEDS, ()),
        *(u for q in range(4) for u in draws.held_out(SEEDS, (), q, 10**6)),
    ]
    table = torch.stack([numbers.double() for numbers in singles])
    correlation = torch.corrcoef(table) - torch.eye(len(singles), dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(len(SEEDS))


def test_draws_stay_what_they_were() -> None:
    """Runs go on, and compare, across versions: new draws take new streams."""
    seed = torch.tensor([3, 4])
    found = {
        "timestep": draws.timestep(seed),
        "noise": draws.noise(seed, ()),
        "aug_level": draws.aug_level(seed, 1.0),
        "blur_sigma": draws.blur_sigma(seed, 1.0, (0.0, 1.0)),
        "aug_noise": draws.aug_noise(seed, ()),
        "held_out": draws.held_out(seed, (), 2, 1000)[1],
        "noise_offset": draws.noise_offset(seed, 2)[:, 1, 0, 0],
        "perturbation": draws.perturbation(seed, ()),
    }
    wanted = {
        "timestep": [0.7375181, 0.6263198],
        "noise": [-0.2645400, 0.7969528],
        "aug_level": [0.4590541, 0.8785746],
        "blur_sigma": [0.7607583, 0.1433591],
        "aug_noise": [0.3817731, -0.2548461],
        "held_out": [1.4986547, 1.9464884],
        "noise_offset": [0.3140509, -0.6793438],
        "perturbation": [-0.2369092, -1.1084597],
    }
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], torch.tensor(values), rtol=1e-5, atol=1e-6)
    rows, columns = draws.crop_corner(seed, 1000)
    assert rows.tolist() == [686, 603] and columns.tolist() == [464, 626]
    assert draws.held_out(seed, (), 2, 1000)[0].tolist() == [540, 582]
    dropped = draws.caption_drop(torch.arange(16), 0.5)
    assert dropped.nonzero().flatten().tolist() == [3, 4, 5, 9, 10, 12, 13, 15]
    blurred = draws.blur_sigma(torch.arange(16), 0.5, (1.0, 1.0))
    assert blurred.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 10, 11, 13, 14]


def test_an_offset_is_one_number_a_channel() -> None:
    offset = draws.noise_offset(SEEDS, 3)
    assert offset.shape == (len(SEEDS), 3, 1, 1)
    table = offset.flatten(1).double()
    assert (torch.corrcoef(table.T) - torch.eye(3)).abs().max() < 0.08
    assert float(table.std()) == pytest.approx(1, abs=0.03)


def test_dropping_is_independent_of_what_else_is_drawn() -> None:
    dropped = draws.caption_drop(SEEDS, 0.5)
    for other in (draws.timestep(SEEDS), draws.blur_sigma(SEEDS, 1.0, (0.0, 1.0))):
        assert abs(float(other[dropped].mean() - other[~dropped].mean())) < 0.05


def test_shares_and_ranges() -> None:
    assert abs(float(draws.caption_drop(SEEDS, 0.1).double().mean()) - 0.1) < 0.02
    assert not draws.caption_drop(SEEDS, 0.0).any()
    sigma = draws.blur_sigma(SEEDS, 0.5, (0.4, 0.6))
    blurred = sigma > 0
    assert abs(float(blurred.double().mean()) - 0.5) < 0.03
    assert 0.4 <= float(sigma[blurred].min()) and float(sigma[blurred].max()) <= 0.6
    level = draws.aug_level(SEEDS, 0.2)
    assert 0 < float(level.min()) and float(level.max()) < 0.2
    assert abs(float(level.mean()) - 0.1) < 0.005
    assert not draws.aug_level(SEEDS, 0.0).any()


def test_crops_reach_every_position_and_none_beyond() -> None:
    rows, columns = draws.crop_corner(SEEDS, 5)
    assert set(rows.tolist()) == set(columns.tolist()) == {0, 1, 2, 3, 4}
    assert not any(part.any() for part in draws.crop_corner(SEEDS, 1))


def test_held_out_noise_differs_between_quartiles() -> None:
    noises = [draws.held_out(SEEDS[:2], (8,), q, 1000)[1] for q in range(4)]
    assert not torch.equal(noises[0], noises[1])
    assert torch.equal(noises[2], draws.held_out(SEEDS[:2], (8,), 2, 1000)[1])


@pytest.mark.parametrize("steps", [1000, 10, 4])
def test_held_out_steps_fill_their_quarter_and_leave_none(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for quartile in range(4):
        t, _ = draws.held_out(SEEDS, (), quartile, steps)
        assert quartile * steps / 4 - 1 < t.min() and t.max() < (quartile + 1) * steps / 4
    # The largest uniform number: 3 + r is 4 in float32, and row * 7 may be 7.
    nearly_1 = torch.full((len(SEEDS),), 1 - 2**-24)
    monkeypatch.setattr(draws.keyed_noise, "uniform", lambda *_: nearly_1)
    assert draws.held_out(SEEDS, (), 3, steps)[0].max() == steps - 1
    assert all(int(part.max()) == 6 for part in draws.crop_corner(SEEDS, 7))
