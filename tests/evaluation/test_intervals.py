import math

import numpy as np
import pytest
from scipy import stats

from diff_dalle.evaluation.intervals import mean_over_captions, paired_difference, wilson


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 7), (250, 256), (1, 1)])
def test_wilson_agrees_with_scipy(successes: int, trials: int) -> None:
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    interval = wilson(successes, trials)
    assert interval.mean == successes / trials
    assert interval.low == pytest.approx(expected.low, abs=1e-12)
    assert interval.high == pytest.approx(expected.high, abs=1e-12)


def test_wilson_covers_the_truth_in_95_percent() -> None:
    draws = np.random.default_rng(0).binomial(256, 0.9, size=4000)
    covered = [wilson(int(d), 256).low <= 0.9 <= wilson(int(d), 256).high for d in draws]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("successes", "trials"), [(3, 2), (-1, 2), (0, 0)])
def test_wilson_refuses_nonsense(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="trials"):
        wilson(successes, trials)


def test_a_caption_counts_once_however_many_seeds() -> None:
    one_seed = np.random.default_rng(0).random(50) < 0.5
    three_equal_seeds = np.repeat(one_seed[:, None], 3, axis=1)
    assert mean_over_captions(one_seed) == mean_over_captions(three_equal_seeds)


def test_mean_over_captions_is_the_textbook_interval() -> None:
    values = np.array([0.0, 1.0, 1.0, 1.0])
    interval = mean_over_captions(values)
    error = 1.959963984540054 * 0.5 / math.sqrt(4)  # standard deviation 0.5
    assert interval.mean == 0.75
    assert interval.high - interval.mean == pytest.approx(error, rel=1e-12)


def test_pairing_removes_what_the_captions_share() -> None:
    rng = np.random.default_rng(1)
    difficulty = rng.random(256)[:, None]
    noise = rng.random((256, 3))
    first, second = noise < difficulty + 0.1, noise < difficulty
    paired = paired_difference(first, second)
    assert 0 < paired.low < paired.mean < paired.high
    unpaired = mean_over_captions(first)
    assert paired.high - paired.low < unpaired.high - unpaired.low


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ"):
        paired_difference(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="captions"):
        mean_over_captions(np.zeros(1))
