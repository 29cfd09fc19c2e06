"""Decisions with a stated error rate: thresholds, their interval, conformal p-values, false discovery control.

Everything here is computed in float64 from scores, higher = more in-distribution.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ood_core.errors import DataError, UsageError

__all__ = [
    "LEAST_CALIBRATION",
    "Calibration",
    "benjamini_hochberg",
    "class_conditional_p_values",
    "conformal_p_values",
    "features_hash",
    "leave_one_out_p_values",
    "scores_hash",
    "threshold_at",
    "tpr_interval",
]

log = logging.getLogger(__name__)

LEAST_CALIBRATION = 20
"""Fewer calibration images than this say nothing about a 5 % tail."""

CONFIDENCE = 0.95
"""Of the interval that is shown and saved."""


def threshold_at(scores: Tensor, tpr: float) -> float:
    """The highest value that accepts at least a share `tpr` of the scores.

    Args:
        scores: [n] of ID images, in any order.
        tpr: in (0, 1].

    Raises:
        ValueError: `tpr` out of range.

    Example:
        >>> threshold_at(torch.arange(20.0), 0.9)
        2.0
    """
    return float(scores.sort().values[len(scores) - _accepted(len(scores), tpr)])


def tpr_interval(n: int, tpr: float, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Where the true TPR lies of a threshold that was set on n ID images.

    The threshold is an order statistic of the calibration scores: `k = ceil(tpr * n)` of them are at or above it. For
    exchangeable images and continuous scores the share of all ID images above it is therefore distributed exactly as
    Beta(k, n - k + 1), whatever the scores' distribution; the interval holds its central `confidence`. This is not
    Clopper-Pearson, which is for a threshold chosen without looking at these images. With tied scores the
    true TPR can only be higher, so the lower end still holds.

    Args:
        n: number of calibration images.
        tpr: that the threshold was set for, in (0, 1].
        confidence: in (0, 1).

    Returns:
        (low, high) as fractions.

    Raises:
        ValueError: `tpr` or `confidence` out of range, or no image.

    Source: Wilks, "Determination of sample sizes for setting tolerance limits", Annals of Mathematical Statistics 1941.

    Example:
        >>> [round(end, 3) for end in tpr_interval(200, 0.95)]
        [0.91, 0.972]
    """
    from scipy.stats import beta

    if n < 1:
        raise ValueError(f"n={n} must be at least 1 calibration image.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1.")
    accepted = _accepted(n, tpr)
    tail = (1 - confidence) / 2
    low, high = beta.ppf([tail, 1 - tail], accepted, n - accepted + 1)
    return float(low), float(high)


def _accepted(n: int, tpr: float) -> int:
    return int(np.ceil(check_tpr(tpr) * n - 1e-9))


def check_tpr(tpr: float) -> float:
    """A share in (0, 1], or a ValueError."""
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr={tpr} must lie in (0, 1].")
    return float(tpr)


def conformal_p_values(scores: Tensor, reference: Tensor) -> Tensor:
    """(1 + reference scores at or below the score) / (n + 1), float64 [N] in (0, 1].

    Of images exchangeable with the reference images at most a share `a` has a p-value of `a` or less, for every `a`.

    Args:
        scores: [N].
        reference: scores [n] of ID images, in any order.

    Source: Vovk, Gammerman & Shafer, "Algorithmic learning in a random world", 2005, section 2.2.

    Example:
        >>> conformal_p_values(torch.tensor([0.0, 2.5]), torch.tensor([3.0, 1.0, 2.0]))
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    below = torch.searchsorted(reference.double().sort().values, scores.double().contiguous(), right=True)
    return (1 + below).double() / (len(reference) + 1)


def leave_one_out_p_values(scores: Tensor) -> Tensor:
    """(1 + other scores at or below) / (n + 1) of each of n scores, float64 [n].

    `conformal_p_values` ranks a new image among all n, this each of the n among the others, on the same grid. A new
    image could only raise these, so a threshold on a monotone combination of them is not too high.

    Args:
        scores: [n] of ID images, in any order.

    Example:
        >>> leave_one_out_p_values(torch.tensor([3.0, 1.0, 2.0, 2.0]))
        tensor([0.8000, 0.2000, 0.6000, 0.6000], dtype=torch.float64)
    """
    scores = scores.double().contiguous()
    return torch.searchsorted(scores.sort().values, scores, right=True).double() / (len(scores) + 1)


def class_conditional_p_values(
    scores: Tensor, classes: Tensor, reference: Tensor, reference_classes: Tensor, *, least: int = LEAST_CALIBRATION
) -> Tensor:
    """Conformal p-values against the reference images of the same predicted class (Mondrian), float64 [N].

    The guarantee of `conformal_p_values` then holds among the images predicted as each class, not only on average
    over classes. Classes with fewer than `least` reference images are one class together; if that has fewer too, its
    images are compared with all reference images, and the guarantee is again one over all classes.

    Args:
        scores: [N].
        classes: class number predicted for each, int64 [N].
        reference: scores [n] of ID images.
        reference_classes: class number predicted for each, int64 [n].
        least: reference images that a class needs.

    Raises:
        DataError: no class has `least` reference images.

    Source: Vovk, Gammerman & Shafer, "Algorithmic learning in a random world", 2005, section 4.5.

    Example:
        >>> class_conditional_p_values(
        ...     torch.tensor([1.5, 1.5]), torch.tensor([0, 1]),
        ...     torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1]), least=2,
        ... )
        tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    large = _large_classes(reference_classes, least)
    if not len(large):
        raise DataError(
            f"No class has {least} calibration images, so there are no p-values by class: calibrate with more ID "
            "images, or leave by_class out."
        )
    p_values = conformal_p_values(scores, _others(reference, reference_classes, large, least))
    for label in large:
        mine = classes == label
        p_values[mine] = conformal_p_values(scores[mine], reference[reference_classes == label])
    return p_values


def _large_classes(reference_classes: Tensor, least: int) -> Tensor:
    """Numbers of the classes with enough reference images."""
    present, counts = reference_classes.unique(return_counts=True)
    return present[counts >= least]


def _others(reference: Tensor, reference_classes: Tensor, large: Tensor, least: int) -> Tensor:
    """Reference scores for images of all other classes."""
    rest = reference[~torch.isin(reference_classes, large)]
    return rest if len(rest) >= least else reference


def benjamini_hochberg(p_values: Tensor, fdr: float) -> Tensor:
    """Which images of a batch are OOD, bool [N], so that at most a share `fdr` of those named is ID on average.

    Conformal p-values that share a calibration set are positively dependent in the way the procedure allows.

    Args:
        p_values: [N] in (0, 1].
        fdr: in (0, 1).

    Raises:
        UsageError: `fdr` out of range.

    Source: Benjamini & Hochberg, JRSS B 1995; for conformal p-values Bates et al., "Testing for outliers with
    conformal p-values", Annals of Statistics 2023, Theorem 2.

    Example:
        >>> benjamini_hochberg(torch.tensor([0.01, 0.02, 0.6]), 0.05)
        tensor([ True,  True, False])
    """
    from scipy.stats import false_discovery_control

    check_fdr(fdr)
    adjusted = false_discovery_control(p_values.double().numpy(), method="bh")
    return torch.from_numpy(adjusted <= fdr * (1 + 1e-9))


def check_fdr(fdr: float) -> float:
    """A share in (0, 1), or a UsageError."""
    if isinstance(fdr, bool) or not isinstance(fdr, int | float) or not 0 < fdr < 1:
        raise UsageError(f"fdr={fdr!r} must lie between 0 and 1, e.g. 0.05.")
    return float(fdr)


def features_hash(source: str, ids: Sequence[str]) -> str:
    """Digest of which images were used: the fingerprint of their source and their ids."""
    return _digest(json.dumps([source, list(ids)]).encode())


def scores_hash(scores: Tensor) -> str:
    """Digest of scores, where nothing is known of their images; the order does not matter."""
    return _digest(scores.float().sort().values.numpy().tobytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class Calibration:
    """What a detector knows of ID images that it was not fitted on.

    Attributes:
        scores: theirs, ascending, float32 [n].
        threshold: the highest value that accepts at least a share `tpr` of them.
        tpr: that share.
        classes: the class predicted for each, int64 [n]; None if the detector does not classify.
        data_hash: of the images' source and ids, or of the scores where only these were given; "" if unknown.

    Example:
        >>> known = Calibration.of(torch.linspace(0, 1, 101), 0.95)
        >>> known.n, round(known.threshold, 2), [round(end, 2) for end in known.tpr_interval()]
        (101, 0.05, [0.89, 0.98])
    """

    scores: Tensor
    threshold: float
    tpr: float
    classes: Tensor | None = None
    data_hash: str = ""

    @classmethod
    def of(cls, scores: Tensor, tpr: float, *, classes: Tensor | None = None, data_hash: str = "") -> Calibration:
        """From scores in any order.

        Raises:
            ValueError: `tpr` out of range.
            DataError: fewer than 20 scores, infinite ones, or all the same.
        """
        check_tpr(tpr)
        check_enough(len(scores))
        _check_told_apart(scores)
        ordered, order = scores.sort(stable=True)
        classes = None if classes is None else classes[order]
        return cls(ordered, threshold_at(ordered, tpr), float(tpr), classes, data_hash)

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.scores)

    def tpr_interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Where the true TPR of the threshold lies (see `tpr_interval`)."""
        return tpr_interval(self.n, self.tpr, confidence=confidence)

    def p_values(self, scores: Tensor, classes: Tensor | None = None) -> Tensor:
        """Conformal p-values, float64 [N]; with `classes` against the images of the same predicted class.

        Raises:
            UsageError: `classes`, but the detector does not classify.
            DataError: `classes`, of which none has enough calibration images.
        """
        if classes is None:
            return conformal_p_values(scores, self.scores)
        if self.classes is None:
            raise UsageError("The calibration knows no predicted classes: calibrate again, on features or images.")
        found = class_conditional_p_values(scores, classes, self.scores, self.classes)
        self._tell_small_classes(classes)
        return found

    def is_ood(self, scores: Tensor, classes: Tensor | None = None, *, fdr: float | None = None) -> Tensor:
        """Decisions, bool [N]: scores below the threshold; with `classes` p-values at 1 - `tpr` or less.

        Args:
            scores: [N].
            classes: predicted for each, int64 [N], to compare with the images of the same class.
            fdr: decide on all of them together instead (`benjamini_hochberg`).

        Raises:
            UsageError: `fdr` out of range, or `classes`, but the detector does not classify.
            DataError: too few calibration images for `fdr`, or of every class.

        Example:
            >>> Calibration.of(torch.arange(100.0), 0.95).is_ood(torch.tensor([2.0, 50.0]))
            tensor([ True, False])
        """
        if fdr is not None:
            self.check_reaches(fdr)
            return benjamini_hochberg(self.p_values(scores, classes), fdr)
        return scores < self.threshold if classes is None else self.p_values(scores, classes) <= 1 - self.tpr + 1e-9

    def _tell_small_classes(self, classes: Tensor) -> None:
        large = _large_classes(self.classes, LEAST_CALIBRATION)  # type: ignore[arg-type]  # known to the caller
        small = classes[~torch.isin(classes, large)].unique()
        if len(small):
            log.warning(
                "%d of the predicted classes have fewer than %d calibration images: their p-values come from such "
                "classes together, or from all images.",
                len(small),
                LEAST_CALIBRATION,
            )

    def accepted(self, scores: Tensor, tprs: Sequence[float]) -> list[float]:
        """The share of other images that the threshold of each TPR accepts, to be compared with that TPR.

        Args:
            scores: [N] of ID test images.
            tprs: each in (0, 1].

        Raises:
            ValueError: a TPR out of range.

        Example:
            >>> Calibration.of(torch.arange(100.0), 0.95).accepted(torch.arange(50.0), [0.5, 0.9])
            [0.0, 0.8]
        """
        thresholds = torch.tensor([threshold_at(self.scores, tpr) for tpr in tprs], dtype=scores.dtype)
        return [float((scores >= threshold).double().mean()) for threshold in thresholds]

    def check_reaches(self, fdr: float) -> None:
        """Refuse a false discovery rate below the smallest p-value there can be.

        Raises:
            DataError: nothing could ever be named OOD at this rate.
        """
        smallest = 1 / (self.n + 1)
        if smallest > check_fdr(fdr) * (1 + 1e-9):
            raise DataError(
                f"With {self.n} calibration images no p-value is below {smallest:.3g}, so fdr={fdr} would never name "
                f"an image: calibrate with at least {int(np.ceil(1 / fdr)) - 1}."
            )

    def describe(self) -> dict[str, Any]:
        """What is shown and saved beside the threshold."""
        return {
            "n": self.n,
            "tpr_interval": list(self.tpr_interval()),
            "confidence": CONFIDENCE,
            "data_hash": self.data_hash,
        }


def _check_told_apart(scores: Tensor) -> None:
    """Refuse scores that set no threshold: any infinite one, or all the same."""
    if infinite := int((~scores.isfinite()).sum()):
        raise DataError(
            f"{infinite} of {len(scores)} calibration scores are infinite or no number: a threshold among them would "
            "accept everything or nothing. Leave these images out, or use another score."
        )
    if bool((scores == scores[0]).all()):
        raise DataError(
            f"All {len(scores)} calibration scores are {float(scores[0]):g}: a score that tells no ID images apart has "
            "no threshold. Check what the detector was fitted on, or use another score."
        )


def check_enough(n: int) -> None:
    """Refuse a calibration on too few images.

    Raises:
        DataError: fewer than 20.
    """
    if n < LEAST_CALIBRATION:
        raise DataError(f"{n} calibration images are too few: give at least {LEAST_CALIBRATION} ID images.")
