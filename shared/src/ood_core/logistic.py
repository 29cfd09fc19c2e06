"""Multinomial logistic regression: linear probes, and the stacking of fusions."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from ood_core import check

__all__ = ["fit_logistic"]

log = logging.getLogger(__name__)


def fit_logistic(
    x: Tensor,
    labels: Tensor,
    classes: int,
    *,
    l2: float,
    start: tuple[Tensor, Tensor] | None = None,
    tolerance: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """The minimum of mean cross-entropy + l2 / 2 * |weight|^2 (L-BFGS in float64); the bias is not penalised.

    scikit-learn's `LogisticRegression(C=1 / (N * l2))` has the same minimum for three and more classes.

    Args:
        x: features [N, d].
        labels: int64 [N] in [0, classes).
        classes: number of classes, at least 2.
        l2: strength of the penalty, above 0.
        start: (weight, bias) to start from; zeros by default.
        tolerance: largest entry of the gradient at which to stop.

    Returns:
        weight [classes, d] and bias [classes], float64, each with zero sum over the classes.

    Raises:
        TypeError: `x` or `labels` is no tensor of its kind.
        ValueError: shapes that do not fit, NaN, labels out of range, `l2` not above 0.

    Example:
        >>> weight, bias = fit_logistic(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), 2, l2=0.1)
        >>> weight.round(decimals=3)
        tensor([[ 1.0640],
                [-1.0640]], dtype=torch.float64)
    """
    from scipy.optimize import minimize

    (x,) = check.tensors(x=(x, "N d"))
    x, labels = x.double(), check.labels("labels", labels, len(x), classes).to(x.device)
    check.positive("l2", l2)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _loss_and_gradient(_unflatten(flat, classes, x), x, labels, l2)
        return value, gradient.cpu().numpy()

    first = np.zeros(classes * (x.shape[1] + 1)) if start is None else torch.cat([s.flatten() for s in start]).numpy()
    options = {"maxiter": 5000, "maxfun": 10000, "maxcor": 20, "ftol": 1e-15, "gtol": tolerance}
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options=options)
    if (steepness := float(np.abs(found.jac).max())) > 1e-4:
        log.warning("The linear probe with l2=%g stopped early, at a gradient of %.1g.", l2, steepness)
    weight, bias = _unflatten(found.x, classes, x)
    return weight.cpu(), bias.cpu()


def _unflatten(flat: np.ndarray, classes: int, x: Tensor) -> tuple[Tensor, Tensor]:
    split = torch.from_numpy(flat).to(x.device).split([classes * x.shape[1], classes])
    return split[0].view(classes, x.shape[1]), split[1]


def _loss_and_gradient(parameters: tuple[Tensor, Tensor], x: Tensor, labels: Tensor, l2: float) -> tuple[float, Tensor]:
    weight, bias = parameters
    log_p = (x @ weight.T + bias).log_softmax(1)
    error = log_p.exp()
    rows = torch.arange(len(x), device=x.device)
    error[rows, labels] -= 1
    error /= len(x)
    value = -log_p[rows, labels].mean() + l2 / 2 * weight.square().sum()
    return float(value), torch.cat([(error.T @ x + l2 * weight).flatten(), error.sum(0)])
