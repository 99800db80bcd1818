import numpy as np
import pytest
from scipy.linalg import sqrtm

from diff_dalle.evaluation.frechet import Moments, frechet_between, frechet_distance, moments


def random_moments(seed: int, dimension: int = 12) -> Moments:
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((dimension, dimension))
    return Moments(rng.standard_normal(dimension), factor @ factor.T)


def test_one_dimension_is_the_closed_form() -> None:
    a = Moments(np.array([1.0]), np.array([[4.0]]))
    b = Moments(np.array([4.0]), np.array([[9.0]]))
    assert frechet_distance(a, b) == pytest.approx((1 - 4) ** 2 + (2 - 3) ** 2, rel=1e-12)


def test_commuting_covariances_are_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    s, t = rng.random(6) + 0.1, rng.random(6) + 0.1
    a = Moments(rng.standard_normal(6), basis @ np.diag(s**2) @ basis.T)
    b = Moments(rng.standard_normal(6), basis @ np.diag(t**2) @ basis.T)
    expected = ((a.mean - b.mean) ** 2).sum() + ((s - t) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scipys_matrix_root(seed: int) -> None:
    a, b = random_moments(seed), random_moments(seed + 100)
    root = np.trace(sqrtm(a.covariance @ b.covariance)).real
    offset = ((a.mean - b.mean) ** 2).sum()
    expected = offset + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_moments_are_numpys() -> None:
    features = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    found = moments(features)
    assert found.mean.dtype == found.covariance.dtype == np.float64
    np.testing.assert_allclose(found.mean, features.astype(float).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.astype(float).T), rtol=1e-12)


def test_a_set_has_no_distance_to_itself_even_with_more_features_than_pictures() -> None:
    features = np.random.default_rng(0).standard_normal((10, 40))
    assert frechet_between(features, features) == pytest.approx(0, abs=1e-6)
    shifted = frechet_between(features, features + 2.0)
    assert shifted == pytest.approx(40 * 2.0**2, rel=1e-6)


def test_large_samples_approach_the_truth() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((20_000, 3))
    b = rng.standard_normal((20_000, 3)) * 2 + 1
    assert frechet_between(a, b) == pytest.approx(3 * 1 + 3 * 1, rel=0.03)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="N >= 2"):
        moments(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="NaN"):
        moments(np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="differ"):
        frechet_distance(random_moments(0, 3), random_moments(0, 4))
