"""The Fréchet distance between two sets of features, in float64.

Between normal distributions it is d² = |m₁ − m₂|² + tr(S₁ + S₂ − 2 (S₁ S₂)^½) (Dowson and Landau
1982; Heusel et al. 2017 apply it to features of pictures). Values are comparable only for the
same features, the same number of pictures and the same reference.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean [D] and unbiased covariance [D, D] of a set of features, float64."""

    mean: Array
    covariance: Array


def moments(features: NDArray[np.floating]) -> Moments:
    """The moments of features [N, D], N ≥ 2."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features {features.shape} must be [N >= 2, D]")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinite values")
    centred = features - features.mean(axis=0)  # [N, D]
    covariance = centred.T @ centred / (len(features) - 1)  # [D, D]
    return Moments(features.mean(axis=0), covariance)


def frechet_distance(a: Moments, b: Moments) -> float:
    """d² between two normal distributions; 0 for equal ones, never negative.

    tr (S₁ S₂)^½ is the sum of the roots of the eigenvalues of S₁^½ S₂ S₁^½, a symmetric matrix
    with the same spectrum, so singular covariances (fewer pictures than features) are no trouble.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"{a.mean.shape} and {b.mean.shape} features differ")
    root = _root(a.covariance)  # [D, D]
    spectrum = np.linalg.eigvalsh(root @ b.covariance @ root)  # [D]
    trace_of_root = np.sqrt(np.clip(spectrum, 0, None)).sum()
    offset = a.mean - b.mean
    total = np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_of_root
    return max(0.0, float(offset @ offset + total))


def frechet_between(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """The Fréchet distance between features a [N, D] and b [M, D]."""
    return frechet_distance(moments(a), moments(b))


def _root(covariance: Array) -> Array:
    """The symmetric root of a positive semi-definite matrix [D, D]."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
