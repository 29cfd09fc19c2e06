"""What the report shows, as numbers: pure functions of results and score table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from PIL import Image

Figures: TypeAlias = Mapping[str, Any]
OpenImage: TypeAlias = Callable[[str, str], Image.Image | None]
ExplainImage: TypeAlias = Callable[[str, Image.Image], Image.Image | None]

SIGNIFICANT = 0.05
"""Detectors whose difference has a p-value above this are called not distinguishable."""


@dataclass(frozen=True, eq=False)
class Run:
    """An evaluation to report on.

    Attributes:
        results: the content of results.json.
        table: columns id, source, label, status and one per detector.
        open_image: (source, id) -> the image, or None.
        explain_image: (detector, image) -> its explanation picture, or None.
    """

    results: Figures
    table: pd.DataFrame
    open_image: OpenImage | None = None
    explain_image: ExplainImage | None = None

    @cached_property
    def detectors(self) -> list[str]:
        """Names by average AUROC, best first."""
        return rank_detectors(self.results["detectors"])

    @cached_property
    def sets(self) -> list[str]:
        """Names of the OOD sets; the place in this list gives the colour."""
        return set_names(self.results, self.table)

    @property
    def data(self) -> Figures:
        """What is known of the images."""
        return self.results.get("data") or {}

    def entry(self, detector: str) -> Figures:
        """Everything known of a detector."""
        return self.results["detectors"][detector]

    def on(self, detector: str, source: str | None) -> Figures | None:
        """The detector's figures on a set; None for the average."""
        return on_set(self.entry(detector), source)


def on_set(entry: Figures | None, source: str | None) -> Figures | None:
    """Figures on a set, or their average (None), of a detector or of its difference to another."""
    entry = entry or {}
    return entry.get("average") if source is None else (entry.get("per_set") or {}).get(source)


def difference(comparison: Figures | None, detector: str, source: str | None) -> Figures | None:
    """A detector's paired difference to the reference of a comparison; None without one."""
    return on_set(((comparison or {}).get("detectors") or {}).get(detector), source)


def distinguishable(difference: Figures) -> bool:
    """Whether a paired difference is more than chance explains."""
    return bool(difference["p_value"] <= SIGNIFICANT)


def rank_detectors(detectors: Figures) -> list[str]:
    """Names by average AUROC, best first; those without one last."""
    return sorted(detectors, key=lambda name: -np.nan_to_num(fraction(detectors[name].get("average"), "auroc"), nan=-1))


def set_names(results: Figures, table: pd.DataFrame) -> list[str]:
    """Every OOD set of the data, the figures or the table, in order of appearance."""
    described = (results.get("data") or {}).get("ood") or {}
    measured = [name for figures in results["detectors"].values() for name in figures.get("per_set") or {}]
    return [name for name in dict.fromkeys([*described, *measured, *table["source"].dropna()]) if name != "id"]


def fraction(figures: Figures | None, key: str) -> float:
    """A figure as float; NaN where there is none."""
    value = (figures or {}).get(key)
    return math.nan if value is None else float(value)


def best(values: Sequence[float], *, higher: bool) -> list[bool]:
    """Which figures are the best as printed (ties included); none without a rival."""
    shown = np.array([float(f"{100 * value:.1f}") for value in values])
    if np.isfinite(shown).sum() < 2:
        return [False] * len(shown)
    return list(shown == (np.nanmax(shown) if higher else np.nanmin(shown)))


def scored_rows(table: pd.DataFrame, detector: str) -> pd.DataFrame:
    """The rows with a score of this detector; none if the table has no such column."""
    if detector not in table:
        return table.iloc[:0].assign(**{detector: 0.0})
    return table[(table["status"] == "ok") & table[detector].notna()]


def scores_by_source(table: pd.DataFrame, detector: str) -> dict[str, np.ndarray]:
    """Scores of each set, float64 without NaN; infinities stay."""
    rows = scored_rows(table, detector)
    scores = rows[detector].to_numpy(np.float64)
    # On an array of objects: pandas' own strings, so its groups, cannot hold a lone surrogate.
    places, sources = pd.factorize(rows["source"].to_numpy(object))
    return {source: scores[places == place] for place, source in enumerate(sources)}


def score_range(groups: Iterable[np.ndarray]) -> tuple[float, float]:
    """A range that holds the middle 99 % of every group, never empty; infinities do not widen it."""
    finite = [kept for group in groups if len(kept := group[abs(group) < 1e300])]
    if not finite:
        return 0.0, 1.0
    low = min(float(np.quantile(group, 0.005)) for group in finite)
    high = max(float(np.quantile(group, 0.995)) for group in finite)
    if low == high:
        low, high = min(float(group.min()) for group in finite), max(float(group.max()) for group in finite)
    scale = max(abs(low), abs(high))
    pad = (0.01 * scale or 1.0) if high - low <= 1e-9 * scale else 0.0
    return low - pad, high + pad


def histogram(scores: np.ndarray, low: float, high: float, bins: int = 40) -> np.ndarray:
    """Counts in equal bins, int [bins]; the end bins also hold what lies beyond, so they sum to N."""
    place = (np.clip(scores, low, high) - low) / (high - low) * bins
    return np.bincount(np.minimum(place.astype(np.int64), bins - 1), minlength=bins)


def roc_points(known: np.ndarray, unknown: np.ndarray, limit: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """The ROC curve with ID positive as at most `limit` points, evenly spread along it.

    Returns:
        (share of OOD accepted, share of ID accepted), from (0, 0) to (1, 1).
    """
    thresholds = np.unique(np.concatenate([known, unknown]))[::-1]
    curve = np.zeros((2, len(thresholds) + 1))
    for row, scores in zip(curve, (unknown, known), strict=True):
        row[1:] = (len(scores) - np.searchsorted(np.sort(scores), thresholds)) / len(scores)
    kept = np.unique(np.searchsorted(curve.sum(axis=0), np.linspace(0, 2, limit)))
    return curve[0, kept], curve[1, kept]


def confident_mistakes(table: pd.DataFrame, detector: str, count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The `count` highest OOD rows and the `count` lowest ID rows; ties in table order."""
    rows = scored_rows(table, detector)
    known = rows["source"] == "id"
    highest = rows[~known].sort_values(detector, ascending=False, kind="stable").head(count)
    return highest, rows[known].sort_values(detector, kind="stable").head(count)


def failures(table: pd.DataFrame, detectors: Iterable[str]) -> list[tuple[str, str, int, str]]:
    """(source, reason, images, id of the first) of images without a score, most frequent first."""
    found: dict[tuple[str, str], list[str]] = {}
    failed = table["status"] != "ok"
    for row in table[failed].itertuples():
        found.setdefault((row.source, str(row.status)), []).append(row.id)
    for name in detectors:
        silent = table[~failed & table[name].isna()] if name in table else table.iloc[:0]
        for row in silent.itertuples():
            found.setdefault((row.source, f"no score from {name}"), []).append(row.id)
    counted = [(source, reason, len(ids), ids[0]) for (source, reason), ids in found.items()]
    return sorted(counted, key=lambda row: -row[2])


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, text) pairs, the names of the levels joined; empty values are left out."""
    if isinstance(value, Mapping):
        return [pair for key, part in value.items() for pair in flatten(part, f"{name} {key}".strip())]
    if isinstance(value, list | tuple) and any(isinstance(part, Mapping | list | tuple) for part in value):
        return flatten({str(place): part for place, part in enumerate(value, 1)} if len(value) > 1 else value[0], name)
    if isinstance(value, list | tuple):
        value = ", ".join(map(_plain, value))
    return [] if value is None or value == "" else [(name, _plain(value))]


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def acceptance_band(nominal: Sequence[float], calibration: int, test: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the share of `test` images accepted lies with 95 % at each TPR, if they are like the calibration images.

    The count is beta-binomial: drawn at a true TPR that is itself Beta(k, n - k + 1), see
    `ood_core.calibration.tpr_interval`. Approximated by the Beta distribution of the same mean and variance.
    """
    from scipy.stats import beta

    mean = np.ceil(np.asarray(nominal) * calibration - 1e-9) / (calibration + 1)
    size = test * (calibration + 2) / (test + calibration + 1) - 1
    low, high = (beta.ppf(end, mean * size, (1 - mean) * size) for end in (0.025, 0.975))
    # A share of few images moves in steps: half a step to either side.
    return np.maximum(low - 0.5 / test, 0), np.minimum(high + 0.5 / test, 1)


def bar_range(figures: Iterable[Figures | None]) -> float:
    """Left end of bars of AUROC: 50 %, or the next lower step of 10 % that shows every figure and interval."""
    values = [fraction(own, key) for own in figures for key in ("auroc", "auroc_low")]
    lowest = min([0.5, *(value for value in values if math.isfinite(value))])
    return math.floor(10 * lowest + 1e-9) / 10
