"""AUROC, AUPR and FPR at a fixed TPR of OOD scores, their bootstrap intervals and paired comparisons.

Higher score = more in-distribution; ID is the positive class unless a name says otherwise. All results are
float fractions. Every metric follows from one sort (`_Ranking`) and the counts at each distinct score
(`_Tally`); a bootstrap replicate is the same sort with other counts.
"""

from __future__ import annotations

__all__ = [
    "CONVENTIONS",
    "Comparison",
    "OODMetrics",
    "PairedDifference",
    "SetMetrics",
    "aupr_in",
    "aupr_out",
    "auroc",
    "evaluate_scores",
    "fpr_at_tpr",
    "paired_bootstrap",
    "paired_difference",
]

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ood_core.errors import unknown_name

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

Scores: TypeAlias = "npt.ArrayLike | Tensor"
Array: TypeAlias = npt.NDArray[Any]

CONVENTIONS = ("standard", "released", "openood")
_BOOTSTRAPPED = ("auroc", "fpr95")
# Counts held at once while bootstrapping: 2 MiB an array, so that a chunk stays in the processor's cache.
_CHUNK = 2**18


def auroc(id_scores: Scores, ood_scores: Scores) -> float:
    """Area under the ROC curve: the chance that an ID image scores above an OOD image, ties counting half.

    Args:
        id_scores: [N] numbers, higher = more ID: a list, array or tensor of any float or integer type;
            infinite scores are fine.
        ood_scores: [M] numbers, the same detector's scores of OOD images.

    Returns:
        A fraction in [0, 1].

    Raises:
        TypeError: scores that are not numbers.
        ValueError: empty scores, NaN, or not one-dimensional.

    Example:
        >>> auroc([0.9, 0.8, 0.7], [0.8, 0.1])
        0.75
    """
    return float(_tally(id_scores, ood_scores).auroc())


def aupr_in(id_scores: Scores, ood_scores: Scores) -> float:
    """Average precision with ID as the positive class: step-wise, tied scores taken together.

    Args:
        id_scores: [N] numbers, higher = more ID.
        ood_scores: [M] numbers.

    Returns:
        A fraction in (0, 1].

    Raises:
        TypeError: scores that are not numbers.
        ValueError: empty scores, NaN, or not one-dimensional.

    Example:
        >>> aupr_in([0.9, 0.7], [0.8])
        0.8333333333333333
    """
    return float(_tally(id_scores, ood_scores).average_precision())


def aupr_out(id_scores: Scores, ood_scores: Scores) -> float:
    """Average precision with OOD as the positive class and the scores negated.

    Args:
        id_scores: [N] numbers, higher = more ID.
        ood_scores: [M] numbers.

    Returns:
        A fraction in (0, 1].

    Raises:
        TypeError: scores that are not numbers.
        ValueError: empty scores, NaN, or not one-dimensional.

    Example:
        >>> aupr_out([0.9, 0.7], [0.8])
        0.5
    """
    return float(_tally(id_scores, ood_scores).flipped().average_precision())


def fpr_at_tpr(id_scores: Scores, ood_scores: Scores, *, tpr: float = 0.95, convention: str = "standard") -> float:
    """False positive rate at a given true positive rate, under one of three conventions.

    They give different numbers; a table holds one convention only.

    * `"standard"`: t = the highest threshold that still accepts a share `tpr` of ID (the m-th largest ID
      score, m the smallest integer with m/N >= tpr); the share of OOD with score >= t.
    * `"released"`, the rule of the released SeTAR and IIM code, hence of their published numbers: a = the ID
      score whose share of accepted ID is nearest to `tpr` (two equally near: the larger share), b = the next
      lower distinct ID score; the share of OOD with score > b. If no ID score is below a: the share of OOD
      with score >= a.
    * `"openood"`, the rule of the OpenOOD benchmark: OOD is positive. t = the m-th smallest OOD score, m the
      smallest integer with m/M >= tpr; the share of ID with score <= t.

    Args:
        id_scores: [N] numbers, higher = more ID.
        ood_scores: [M] numbers.
        tpr: the true positive rate, in (0, 1].
        convention: `"standard"`, `"released"` or `"openood"`.

    Returns:
        A fraction in [0, 1], lower = better.

    Raises:
        TypeError: scores or `tpr` that are not numbers.
        ValueError: empty scores, NaN, not one-dimensional, `tpr` outside (0, 1], or an unknown convention.

    Example:
        >>> [fpr_at_tpr([4, 3, 2, 1], [3.5, 2.5, 1.5, 0.5], tpr=0.5, convention=c) for c in CONVENTIONS]
        [0.25, 0.5, 0.25]
    """
    return float(_tally(id_scores, ood_scores).fpr(_check_tpr(tpr), _check_convention(convention)))


@dataclass(frozen=True)
class SetMetrics:
    """The metrics of one OOD set (or their mean), as fractions.

    Attributes:
        auroc: area under the ROC curve.
        aupr_in: average precision, ID positive.
        aupr_out: average precision, OOD positive.
        fpr95: false positive rate at 95 % true positives, under the convention of the evaluation.
        n: OOD images.
        auroc_low: lower end of the 95 % bootstrap interval; None without bootstrap, as the next three.
        auroc_high: upper end.
        fpr95_low: lower end.
        fpr95_high: upper end.
    """

    auroc: float
    aupr_in: float
    aupr_out: float
    fpr95: float
    n: int
    auroc_low: float | None = None
    auroc_high: float | None = None
    fpr95_low: float | None = None
    fpr95_high: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class OODMetrics:
    """The metrics of one detector on several OOD sets; printing it gives the table and the convention.

    Attributes:
        per_set: name of the OOD set -> its metrics.
        mean: plain mean over the sets; `n` is the number of OOD images altogether.
        convention: the FPR convention.
        n_id: ID images.
        bootstrap: replicates behind the intervals, 0 = none.
        seed: seed of the replicates.
    """

    per_set: dict[str, SetMetrics]
    mean: SetMetrics
    convention: str
    n_id: int
    bootstrap: int
    seed: int

    def to_frame(self) -> pd.DataFrame:
        """A pandas table: one row per OOD set and a last row `mean`, one column per metric."""
        import pandas as pd

        rows = {**self.per_set, "mean": self.mean}
        table = pd.DataFrame([row.to_dict() for row in rows.values()], index=list(rows))
        return table.rename_axis("ood_set")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and strings, ready for JSON (`average` = the mean)."""
        return {
            "convention": self.convention,
            "n_id": self.n_id,
            "bootstrap": self.bootstrap,
            "seed": self.seed,
            "average": self.mean.to_dict(),
            "per_set": {name: row.to_dict() for name, row in self.per_set.items()},
        }

    def __str__(self) -> str:
        """The table in fractions, headed by the convention and the number of ID images."""
        return f"FPR95 convention: {self.convention}; ID images: {self.n_id}\n{self.to_frame().to_string()}"


def evaluate_scores(
    id_scores: Scores,
    ood_scores: Mapping[str, Scores],
    *,
    convention: str = "standard",
    bootstrap: int = 0,
    seed: int = 0,
) -> OODMetrics:
    """All metrics of one detector on one or more OOD sets, with 95 % intervals if asked.

    The intervals are percentiles over replicates in which ID and OOD images are resampled separately
    (stratified). A replicate uses the same ID resample for every OOD set, so the interval of the mean
    accounts for the shared ID images.

    Args:
        id_scores: [N] numbers, higher = more ID.
        ood_scores: name of the OOD set -> [M] numbers.
        convention: of the FPR: `"standard"`, `"released"` or `"openood"`, see `fpr_at_tpr`.
        bootstrap: replicates, 0 = no intervals.
        seed: seed of the replicates; the same seed gives the same intervals.

    Raises:
        TypeError: scores that are not numbers, or `ood_scores` that is not a mapping from names.
        ValueError: empty scores, NaN, not one-dimensional, no OOD set, a set named "mean", an unknown
            convention, or a negative `bootstrap` or `seed`.

    Example:
        >>> evaluate_scores([0.9, 0.8], {"near": [0.85], "far": [0.1]}).mean.auroc
        0.75
    """
    convention = _check_convention(convention)
    bootstrap, seed = _check_count("bootstrap", bootstrap), _check_count("seed", seed)
    known = _check_scores("id_scores", id_scores)
    rankings = {name: _Ranking.of(known, scores) for name, scores in _check_sets(ood_scores).items()}
    replicates = [
        _replicates(ranking, convention, bootstrap, id_seed=(seed, 0), ood_seed=(seed, 1 + position))
        for position, ranking in enumerate(rankings.values())
    ]
    per_set = {
        name: _summary(ranking, convention, own)
        for (name, ranking), own in zip(rankings.items(), replicates, strict=True)
    }
    mean = _mean(list(per_set.values()), np.mean(replicates, axis=0))
    return OODMetrics(per_set, mean, convention, len(known), bootstrap, seed)


@dataclass(frozen=True)
class PairedDifference:
    """The difference of one metric between two detectors on the same images.

    Attributes:
        difference: metric of detector a minus that of b (AUROC: above 0 = a better; FPR95: below 0).
        low: lower end of the 95 % bootstrap interval.
        high: upper end.
        p_value: two-sided bootstrap p-value of "no difference", in (0, 1].
    """

    difference: float
    low: float
    high: float
    p_value: float


def paired_difference(
    id_a: Scores,
    ood_a: Scores,
    id_b: Scores,
    ood_b: Scores,
    *,
    metric: str = "auroc",
    bootstrap: int = 1000,
    seed: int = 0,
    convention: str = "standard",
) -> PairedDifference:
    """Compare two detectors on the same images by a paired bootstrap: both see the same resampled images.

    Args:
        id_a: [N] scores of the ID images by detector a, higher = more ID.
        ood_a: [M] scores of the OOD images by detector a.
        id_b: [N] scores by detector b; entry i belongs to the same image as in `id_a`.
        ood_b: [M] scores by detector b; entry i belongs to the same image as in `ood_a`.
        metric: `"auroc"` or `"fpr95"`.
        bootstrap: replicates, at least 1.
        seed: seed of the replicates.
        convention: of the FPR, see `fpr_at_tpr`.

    Raises:
        TypeError: scores that are not numbers.
        ValueError: empty scores, NaN, not one-dimensional, different numbers of images, an unknown metric or
            convention, `bootstrap` below 1, or a negative `seed`.

    Example:
        >>> paired_difference([3, 2], [1, 0], [3, 1], [2, 0]).difference
        0.25
    """
    if metric not in _BOOTSTRAPPED:
        raise unknown_name("metric", metric, _BOOTSTRAPPED)
    row = _BOOTSTRAPPED.index(metric)
    convention = _check_convention(convention)
    bootstrap, seed = _check_count("bootstrap", bootstrap, low=1), _check_count("seed", seed)
    rankings = _check_pair(id_a, ood_a, id_b, ood_b)
    point_a, point_b = (_bootstrapped(ranking.tally(), convention)[row] for ranking in rankings)
    a, b = (_replicates(r, convention, bootstrap, id_seed=(seed, 0), ood_seed=(seed, 1))[row] for r in rankings)
    low, high = _interval(a - b)
    return PairedDifference(float(point_a - point_b), float(low), float(high), _p_value(a - b))


@dataclass(frozen=True)
class Comparison:
    """The AUROC of several detectors minus that of one of them, all on the same images.

    Attributes:
        reference: the detector that the others are compared with.
        mean: every other detector -> the difference of the plain means over the OOD sets.
        per_set: every other detector -> OOD set -> the difference.
        bootstrap: replicates behind the intervals and p-values.
        seed: seed of the replicates.
    """

    reference: str
    mean: dict[str, PairedDifference]
    per_set: dict[str, dict[str, PairedDifference]]
    bootstrap: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and strings, ready for JSON, in the layout of `OODMetrics.to_dict`."""
        rows = {
            name: {
                "average": asdict(self.mean[name]),
                "per_set": {source: asdict(row) for source, row in self.per_set[name].items()},
            }
            for name in self.mean
        }
        return {"reference": self.reference, "bootstrap": self.bootstrap, "seed": self.seed, "detectors": rows}


def paired_bootstrap(
    id_scores: Mapping[str, Scores],
    ood_scores: Mapping[str, Mapping[str, Scores]],
    *,
    reference: str | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare the AUROC of several detectors with that of one, each pair on the same resampled images.

    The images drawn are those of `evaluate_scores` with the same seed: one ID resample per replicate for all sets, so
    that the difference of the means accounts for the shared ID images. Each detector is compared on its own; the
    p-values are not corrected for the number of detectors.

    Args:
        id_scores: detector -> [N] scores of the ID images, in the same order for all.
        ood_scores: OOD set -> detector -> [M] scores of its images, in the same order for all.
        reference: the detector to compare with; None for the one of highest mean AUROC.
        bootstrap: replicates, at least 1.
        seed: seed of the replicates.

    Raises:
        TypeError: scores that are not numbers, or sets that are not mappings from names.
        ValueError: empty scores, NaN, not one-dimensional, no OOD set, sets or detectors of different numbers of
            images, other detectors in a set than in `id_scores`, an unknown `reference`, `bootstrap` below 1, or a
            negative `seed`.

    Example:
        >>> known = {"a": [3, 2], "b": [3, 1]}
        >>> compared = paired_bootstrap(known, {"far": {"a": [1, 0], "b": [2, 0]}})
        >>> compared.reference, compared.mean["b"].difference
        ('a', -0.25)
    """
    bootstrap, seed = _check_count("bootstrap", bootstrap, low=1), _check_count("seed", seed)
    standings = _check_detectors(id_scores, ood_scores)
    names, ones = list(standings), [np.ones(size, np.int64) for size in standings[next(iter(standings))].sizes]
    points = np.array([standing.aurocs(ones) for standing in standings.values()])
    best = names.index(_check_reference(reference, names)) if reference else int(points[:, 0].argmax())
    replicates = _paired_replicates(list(standings.values()), bootstrap, seed)
    rows = {
        name: [_difference(*pair) for pair in zip(points[row] - points[best], spread, strict=True)]
        for row, name in enumerate(names)
        if row != best
        for spread in [(replicates[:, row] - replicates[:, best]).T]
    }
    per_set = {name: dict(zip(ood_scores, row[1:], strict=True)) for name, row in rows.items()}
    return Comparison(names[best], {name: row[0] for name, row in rows.items()}, per_set, bootstrap, seed)


def _difference(point: float, replicates: Array) -> PairedDifference:
    low, high = _interval(replicates)
    return PairedDifference(float(point), float(low), float(high), _p_value(replicates))


def _paired_replicates(standings: Sequence[_Standing], count: int, seed: int) -> Array:
    """AUROC of replicates [count, detectors, 1 + sets], of the mean first; all detectors see the same images."""
    sizes = standings[0].sizes
    rngs = [np.random.default_rng((seed, place)) for place in range(len(sizes))]
    result = np.empty((count, len(standings), len(sizes)))
    # One replicate at a time: its counts then stay in the processor's cache.
    for row in result:
        counts = [_resample(rng, size) for rng, size in zip(rngs, sizes, strict=True)]
        row[:] = [standing.aurocs(counts) for standing in standings]
    return result


def _resample(rng: np.random.Generator, size: int) -> Array:
    """How often each image is drawn."""
    return np.bincount(rng.integers(0, size, size), minlength=size)


@dataclass(frozen=True)
class _Standing:
    """One detector's sort of the ID images, and where the OOD images of every set fall in it.

    The AUROC of any resample of images then takes no further sort, only the counts of the images.
    """

    order: Array
    falls: list[tuple[Array, Array]]

    @classmethod
    def of(cls, id_scores: Array, ood_scores: Sequence[Array]) -> _Standing:
        order = np.argsort(id_scores, kind="stable")
        ranked = id_scores[order]
        sides = [(np.searchsorted(ranked, own, "left"), np.searchsorted(ranked, own, "right")) for own in ood_scores]
        return cls(order, sides)

    @property
    def sizes(self) -> list[int]:
        """ID images, then OOD images of every set."""
        return [len(self.order), *(len(below) for below, _ in self.falls)]

    def aurocs(self, counts: Sequence[Array]) -> list[float]:
        """The mean over sets, then every set, with as many copies of each image as the counts in `sizes` say."""
        id_counts, *ood_counts = counts
        passed = np.concatenate([[0], np.cumsum(id_counts[self.order])])
        found = [
            _share_won(passed[below] + passed[upto], own, passed[-1])
            for (below, upto), own in zip(self.falls, ood_counts, strict=True)
        ]
        return [float(np.mean(found)), *found]


def _share_won(lost: Array, ood_counts: Array, n_id: int) -> float:
    # In integers (twice the pairs, for the halves of ties), as in `_Tally.auroc`.
    pairs = 2 * int(n_id) * int(ood_counts.sum())
    return (pairs - int(ood_counts @ lost)) / pairs


@dataclass(frozen=True)
class _Ranking:
    """The one sort: the place of every image among the distinct scores, 0 = the highest."""

    id_place: Array
    ood_place: Array
    places: int

    @classmethod
    def of(cls, id_scores: Array, ood_scores: Array) -> _Ranking:
        distinct, place = np.unique(-np.concatenate([id_scores, ood_scores]), return_inverse=True)
        return cls(place[: len(id_scores)], place[len(id_scores) :], len(distinct))

    def tally(self) -> _Tally:
        return _Tally(*(np.bincount(own, minlength=self.places) for own in (self.id_place, self.ood_place)))

    def resampled(self, id_draws: Array, ood_draws: Array) -> _Tally:
        """Counts of R replicates, from the numbers of the images drawn: [R, N] and [R, M]."""
        return _Tally(self._count(self.id_place[id_draws]), self._count(self.ood_place[ood_draws]))

    def _count(self, place: Array) -> Array:
        rows = len(place)
        cell = place + self.places * np.arange(rows)[:, None]
        return np.bincount(cell.ravel(), minlength=rows * self.places).reshape(rows, self.places)


@dataclass(frozen=True)
class _Tally:
    """Positives and negatives with each distinct score, highest first: [G], or [R, G] for R replicates."""

    positive: Array
    negative: Array

    @cached_property
    def true_positives(self) -> Array:
        return np.cumsum(self.positive, axis=-1)

    @cached_property
    def false_positives(self) -> Array:
        return np.cumsum(self.negative, axis=-1)

    @property
    def totals(self) -> tuple[int, int]:
        """Positives and negatives altogether, the same in every replicate."""
        return int(self.true_positives.flat[-1]), int(self.false_positives.flat[-1])

    def flipped(self) -> _Tally:
        """The other class positive and every score negated."""
        return _Tally(self.negative[..., ::-1], self.positive[..., ::-1])

    def auroc(self) -> Array:
        # In integers (twice the pairs, for the halves of ties), hence exact up to the division.
        lost = 2 * _dot(self.positive, self.false_positives) - _dot(self.positive, self.negative)
        pairs = 2 * math.prod(self.totals)
        return (pairs - lost) / pairs

    def average_precision(self) -> Array:
        precision = self.true_positives / (self.true_positives + self.false_positives)
        return _dot(self.positive, precision) / self.totals[0]

    def fpr(self, tpr: float, convention: str) -> Array:
        if convention == "openood":
            return self.flipped().fpr(tpr, "standard")
        # 0.8 means 4/5: the nearest binary number is above it, and 8 of 10 would fall short.
        target = Fraction(tpr).limit_denominator(10**9) * self.totals[0]
        place = (self.true_positives < max(1, math.ceil(target))).sum(axis=-1)
        if convention == "released":
            place = self._released(place, target)
        return _pick(self.false_positives, place) / self.totals[1]

    def _released(self, place: Array, target: Fraction) -> Array:
        """Place of the released threshold, given the first place that accepts at least `target` positives."""
        above = _pick(self.true_positives, place)
        below = above - _pick(self.positive, place)
        last = (self.true_positives <= above[..., None]).sum(axis=-1) - 1
        last = np.where(above == self.totals[0], place, last)
        nearer_below = (below > 0) & (above + below > math.floor(2 * target))
        return np.where(nearer_below, place - 1, last)


def _dot(a: Array, b: Array) -> Array:
    return np.einsum("...g,...g->...", a, b)


def _pick(values: Array, place: Array) -> Array:
    return np.take_along_axis(values, place[..., None], axis=-1)[..., 0]


def _tally(id_scores: Scores, ood_scores: Scores) -> _Tally:
    known, unknown = _check_scores("id_scores", id_scores), _check_scores("ood_scores", ood_scores)
    return _Ranking.of(known, unknown).tally()


def _bootstrapped(tally: _Tally, convention: str) -> Array:
    """The metrics that get intervals, in the order of `_BOOTSTRAPPED`: [2] or [2, R]."""
    return np.stack([tally.auroc(), tally.fpr(0.95, convention)])


def _replicates(
    ranking: _Ranking, convention: str, count: int, *, id_seed: tuple[int, ...], ood_seed: tuple[int, ...]
) -> Array:
    """Bootstrap replicates [2, count]; equal seeds draw the same images in rankings of as many images."""
    n_id, n_ood = len(ranking.id_place), len(ranking.ood_place)
    id_rng, ood_rng = np.random.default_rng(id_seed), np.random.default_rng(ood_seed)
    rows = max(1, _CHUNK // (n_id + n_ood))
    result = np.empty((len(_BOOTSTRAPPED), count))
    for start in range(0, count, rows):
        part = result[:, start : start + rows]
        id_draws = id_rng.integers(0, n_id, (part.shape[1], n_id))
        ood_draws = ood_rng.integers(0, n_ood, (part.shape[1], n_ood))
        part[:] = _bootstrapped(ranking.resampled(id_draws, ood_draws), convention)
    return result


def _interval(replicates: Array) -> Array:
    return np.quantile(replicates, [0.025, 0.975], axis=-1)


def _intervals(replicates: Array) -> dict[str, Any]:
    if not replicates.size:
        return {}
    (auroc_low, fpr95_low), (auroc_high, fpr95_high) = _interval(replicates).tolist()
    return {
        "auroc_low": auroc_low,
        "auroc_high": auroc_high,
        "fpr95_low": fpr95_low,
        "fpr95_high": fpr95_high,
    }


def _summary(ranking: _Ranking, convention: str, replicates: Array) -> SetMetrics:
    tally = ranking.tally()
    return SetMetrics(
        auroc=float(tally.auroc()),
        aupr_in=float(tally.average_precision()),
        aupr_out=float(tally.flipped().average_precision()),
        fpr95=float(tally.fpr(0.95, convention)),
        n=len(ranking.ood_place),
        **_intervals(replicates),
    )


def _mean(rows: Sequence[SetMetrics], replicates: Array) -> SetMetrics:
    names = ("auroc", "aupr_in", "aupr_out", "fpr95")
    means: dict[str, Any] = {name: float(np.mean([getattr(row, name) for row in rows])) for name in names}
    return SetMetrics(**means, n=sum(row.n for row in rows), **_intervals(replicates))


def _p_value(differences: Array) -> float:
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, float(2 * (tail + 1) / (len(differences) + 1)))


def _check_scores(name: str, scores: Scores) -> Array:
    """The one place that reads scores: float64 [N], at least one, no NaN."""
    values = _as_array(name, scores)
    if values.dtype.kind not in "iuf":
        raise TypeError(f"{name} must hold numbers, got {values.dtype} ({type(scores).__name__}).")
    if values.ndim != 1:
        raise ValueError(f"{name} must have shape [N], one score per image, got {list(values.shape)}.")
    if not len(values):
        raise ValueError(f"{name} is empty: metrics need at least one score of each kind.")
    values = values.astype(np.float64, copy=False)
    if missing := int(np.isnan(values).sum()):
        raise ValueError(f"{name} holds NaN ({missing} of {len(values)} values): leave out images without a score.")
    return values


def _as_array(name: str, scores: Any) -> Array:
    if hasattr(scores, "detach"):
        scores = scores.detach().cpu()
        # numpy has no bfloat16.
        return (scores.double() if scores.is_floating_point() else scores).numpy()
    try:
        return np.asarray(scores)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} cannot be read as a list of numbers: {error}") from error


def _check_sets(ood_scores: Mapping[str, Scores]) -> dict[str, Array]:
    if not isinstance(ood_scores, Mapping):
        raise TypeError(f"ood_scores must map names to scores, {{name: scores}}, got {type(ood_scores).__name__}.")
    if not ood_scores:
        raise ValueError("ood_scores has no OOD set: give at least one, {name: scores}.")
    if wrong := [name for name in ood_scores if not isinstance(name, str)]:
        raise TypeError(f"ood_scores: the name of an OOD set must be a string, got {wrong[0]!r}.")
    if "mean" in ood_scores:
        raise ValueError("ood_scores has a set named 'mean', the name of the row of means: rename it.")
    return {name: _check_scores(f"ood_scores[{name!r}]", scores) for name, scores in ood_scores.items()}


def _check_pair(id_a: Scores, ood_a: Scores, id_b: Scores, ood_b: Scores) -> tuple[_Ranking, _Ranking]:
    given = {"id_a": id_a, "ood_a": ood_a, "id_b": id_b, "ood_b": ood_b}
    scores = {name: _check_scores(name, value) for name, value in given.items()}
    for a, b in (("id_a", "id_b"), ("ood_a", "ood_b")):
        if len(scores[a]) != len(scores[b]):
            lengths = f"{a} has {len(scores[a])} scores and {b} has {len(scores[b])}"
            raise ValueError(f"{lengths}: a paired comparison needs both detectors' scores of the same images.")
    return _Ranking.of(scores["id_a"], scores["ood_a"]), _Ranking.of(scores["id_b"], scores["ood_b"])


def _check_detectors(
    id_scores: Mapping[str, Scores], ood_scores: Mapping[str, Mapping[str, Scores]]
) -> dict[str, _Standing]:
    """Every detector's standing, of scores of the same images."""
    if not isinstance(id_scores, Mapping) or not isinstance(ood_scores, Mapping):
        raise TypeError("id_scores and ood_scores must be mappings: {detector: scores}, {set: {detector: scores}}.")
    if not id_scores or not ood_scores:
        raise ValueError("A comparison needs at least one detector and one OOD set.")
    names = list(id_scores)
    known = _check_same_images("id_scores", id_scores, names)
    sets = [_check_same_images(f"ood_scores[{name!r}]", own, names) for name, own in ood_scores.items()]
    return {name: _Standing.of(known[name], [own[name] for own in sets]) for name in names}


def _check_same_images(name: str, scores: Mapping[str, Scores], detectors: list[str]) -> dict[str, Array]:
    if set(scores) != set(detectors):
        raise ValueError(f"{name} has scores of {sorted(scores)}, not of the detectors {sorted(detectors)}.")
    values = {detector: _check_scores(f"{name} of {detector!r}", scores[detector]) for detector in detectors}
    sizes = [len(own) for own in values.values()]
    if len(set(sizes)) > 1:
        raise ValueError(f"{name} has {sizes} scores of {detectors}: a comparison needs scores of the same images.")
    return values


def _check_reference(reference: str, detectors: list[str]) -> str:
    if reference not in detectors:
        raise unknown_name("reference", reference, detectors)
    return reference


def _check_convention(convention: str) -> str:
    if convention not in CONVENTIONS:
        raise unknown_name("convention", convention, CONVENTIONS)
    return convention


def _check_tpr(tpr: float) -> float:
    if isinstance(tpr, bool) or not isinstance(tpr, Real):
        raise TypeError(f"tpr must be a number, got {tpr!r}.")
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr={tpr} must lie in (0, 1]: a share of images, not a percentage.")
    return float(tpr)


def _check_count(name: str, value: int, low: int = 0) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if operator.index(value) < low:
        raise ValueError(f"{name}={value} must be at least {low}.")
    return operator.index(value)
