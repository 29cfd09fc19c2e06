"""Scores of several detectors brought to one scale, and one score from them: pure functions, float64.

M detectors, N images, n ID calibration images. Higher = more in-distribution: a small p-value speaks for OOD.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ood_core import check

__all__ = ["cauchy", "fisher", "log_p_correlation", "robust_z_score", "weighted_mean", "z_score"]

# 1 / the 75 % quantile of the normal distribution: makes the MAD of normal scores their standard deviation.
_MAD_TO_STD = 1.4826022185056018


def z_score(scores: Tensor, reference: Tensor) -> Tensor:
    """(score - mean) / standard deviation of ID scores.

    Args:
        scores: [N].
        reference: scores [n] of ID images, not all equal.

    Raises:
        ValueError: all reference scores are equal.

    Example:
        >>> z_score(torch.tensor([3.0]), torch.tensor([0.0, 1.0, 2.0]))
        tensor([2.], dtype=torch.float64)
    """
    reference = reference.double()
    return (scores.double() - reference.mean()) / _positive(reference.std(), "standard deviation")


def robust_z_score(scores: Tensor, reference: Tensor) -> Tensor:
    """(score - median) / (1.4826 * median absolute deviation) of ID scores: outliers among these do not matter.

    Args:
        scores: [N].
        reference: scores [n] of ID images, at most half of them equal.

    Raises:
        ValueError: more than half of the reference scores are equal.

    Example:
        >>> robust_z_score(torch.tensor([3.0]), torch.tensor([0.0, 1.0, 2.0, 1e6, -1e6])).round(decimals=3)
        tensor([1.3490], dtype=torch.float64)
    """
    middle = _median(reference.double())
    deviation = _MAD_TO_STD * _median((reference.double() - middle).abs())
    return (scores.double() - middle) / _positive(deviation, "median absolute deviation")


def _median(values: Tensor) -> Tensor:
    return values.quantile(0.5) if len(values) < 2**24 else values.median()  # quantile takes no more


def _positive(spread: Tensor, kind: str) -> Tensor:
    if not spread > 0:
        raise ValueError(f"The {kind} of the ID scores is {float(spread)}: nothing to divide by.")
    return spread


def weighted_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over detectors [N] of values [M, N].

    Example:
        >>> weighted_mean(torch.tensor([[0.0], [1.0]]), torch.tensor([1.0, 3.0]))
        tensor([0.7500], dtype=torch.float64)
    """
    values, weights = _values_and_weights(values, weights)
    return (weights[:, None] * values).sum(0) / weights.sum()


def log_p_correlation(p_values: Tensor) -> Tensor:
    """Correlation [M, M] of -2 ln p over ID images, for `fisher`.

    Args:
        p_values: of n ID images, [M, n] in (0, 1].

    Source: Poole et al., "Combining dependent P-values with an empirical adaptation of Brown's method",
    Bioinformatics 2016 (the covariance from data instead of Brown's polynomial in the correlation).

    Example:
        >>> p = torch.tensor([0.2, 0.4, 0.8])
        >>> log_p_correlation(torch.stack([p, p])).round(decimals=6)
        tensor([[1., 1.],
                [1., 1.]], dtype=torch.float64)
    """
    p_values, _ = _values_and_weights(p_values, None)
    return torch.corrcoef(_check_p(p_values).log()).reshape(len(p_values), len(p_values))


def fisher(p_values: Tensor, *, correlation: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Fisher's combined p-value [N], with Brown's correction for dependent detectors.

    The statistic X = -2 sum w ln p has mean 2 sum w, and for p-values uniform on ID images the variance
    4 w' R w. X / c is taken as chi-squared with f degrees of freedom, where c and f match both moments: exact for
    independent detectors of equal weight (then c = 1, f = 2 M), Brown's approximation otherwise.

    Args:
        p_values: [M, N] in (0, 1].
        correlation: R [M, M] of -2 ln p on ID images (`log_p_correlation`); None for independent detectors.
        weights: w [M], none negative; None for equal ones.

    Returns:
        [N] in [0, 1], float64.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, p-values outside (0, 1], weights that are negative or all 0.

    Source: Fisher, "Statistical methods for research workers", 1925; Brown, "A method for combining non-independent,
    one-sided tests of significance", Biometrics 1975; weights: Good, JRSS B 1955 (by moments).

    Example:
        >>> fisher(torch.tensor([[0.05], [0.05]])).round(decimals=4)
        tensor([0.0175], dtype=torch.float64)
        >>> fisher(torch.tensor([[0.05], [0.05]]), correlation=torch.ones(2, 2)).round(decimals=4)
        tensor([0.0500], dtype=torch.float64)
    """
    p_values, weights = _values_and_weights(p_values, weights)
    dependence = torch.eye(len(p_values), dtype=torch.float64) if correlation is None else correlation.double()
    if dependence.shape != (len(p_values), len(p_values)):
        raise ValueError(f"correlation must be [{len(p_values)}, {len(p_values)}], got {list(dependence.shape)}.")
    statistic = -2 * (weights[:, None] * _check_p(p_values).log()).sum(0)
    mean = 2 * weights.sum()
    # Detectors that contradict each other can have next to no variance together; rounding must not make it negative.
    variance = (4 * weights @ dependence @ weights).clamp(min=1e-9 * float(mean) ** 2)
    scale, freedom = variance / (2 * mean), 2 * mean.square() / variance
    return torch.special.gammaincc((freedom / 2).expand_as(statistic), statistic / (2 * scale))


def cauchy(p_values: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """The Cauchy combination test: p-value [N] that holds for small p under almost any dependence.

    Each p becomes a Cauchy variable tan((1/2 - p) pi); their weighted mean is one too, nearly so even if they depend
    on each other. A p-value of 1 is minus infinity there and outweighs everything: `Fusion` keeps p-values below 1.

    Args:
        p_values: [M, N] in (0, 1].
        weights: [M], none negative; None for equal ones.

    Returns:
        [N] in [0, 1], float64.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, p-values outside (0, 1], weights that are negative or all 0.

    Source: Liu & Xie, "Cauchy combination test: a powerful test with analytic p-value calculation under arbitrary
    dependency structures", JASA 2020.

    Example:
        >>> cauchy(torch.tensor([[0.01], [0.5]])).round(decimals=4)
        tensor([0.0200], dtype=torch.float64)
    """
    p_values, weights = _values_and_weights(p_values, weights)
    p = _check_p(p_values)
    # tan((1/2 - p) pi) = 1 / tan(p pi), which keeps the digits of a small p.
    statistic = weighted_mean(1 / torch.tan(p * math.pi), weights)
    # The same on the way back: 1/2 - atan(t) / pi = atan2(1, t) / pi.
    return torch.atan2(torch.ones_like(statistic), statistic) / math.pi


def _values_and_weights(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    values, weights = check.tensors(values=(values, "M N"), weights=(weights, "M"))
    weights = torch.ones(len(values)) if weights is None else weights
    if not (weights >= 0).all() or not weights.sum() > 0:
        raise ValueError(f"weights={weights.tolist()} must not be negative, nor all 0.")
    return values.double(), weights.double()


def _check_p(p_values: Tensor) -> Tensor:
    if not ((p_values > 0) & (p_values <= 1)).all():
        low, high = float(p_values.min()), float(p_values.max())
        raise ValueError(f"p-values must lie in (0, 1], got {low} to {high}.")
    return p_values
