"""Runs that differ in their seed or fold: finished ones are kept, and all are summarised."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ood_core._files import write_json
from ood_core.errors import UsageError

__all__ = ["kept_runs", "percent", "spread"]

log = logging.getLogger(__name__)

Run = dict[str, Any]


def kept_runs(file: Path | None, recipe: Mapping[str, Any], make: Callable[[], list[Run]]) -> list[Run]:
    """The runs of a recipe: those of the file if it holds them, else new ones, which are written there.

    Args:
        file: JSON; None keeps nothing. A damaged one is made again.
        recipe: everything the runs depend on.
        make: makes them.

    Raises:
        UsageError: the file holds runs of another recipe.
    """
    recipe = json.loads(json.dumps(recipe))
    found = None if file is None or not file.is_file() else _read(file, recipe)
    if found is None:
        found = make()
        if file is not None:
            write_json(file, {"recipe": recipe, "runs": found})
    return found


def _read(file: Path, recipe: Mapping[str, Any]) -> list[Run] | None:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if saved["recipe"] == recipe:
            return saved["runs"]
    except (ValueError, KeyError, TypeError):
        log.warning("%s is damaged: it is computed again.", file)
        return None
    raise UsageError(f"{file} is a run with other settings or images: remove it, or give another folder.")


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, standard deviation (n - 1) and 95 % interval of the mean (Student's t) over runs.

    Args:
        values: one per run; None where a run has no such figure.

    Returns:
        "mean", "std", "low", "high" (None from one run) and "runs"; None where a value is None.

    Example:
        >>> found = spread([0.5, 0.7])
        >>> round(found["mean"], 3), round(found["std"], 3), found["runs"]
        (0.6, 0.141, 2)
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    mean, count = statistics.fmean(known), len(known)
    if count == 1:
        return {"mean": mean, "std": None, "low": None, "high": None, "runs": 1}
    from scipy.stats import t

    std = statistics.stdev(known)
    half = float(t.ppf(0.975, count - 1)) * std / math.sqrt(count)
    return {"mean": mean, "std": std, "low": mean - half, "high": mean + half, "runs": count}


def percent(figure: Mapping[str, Any] | None) -> str:
    """A `spread` of fractions for a table, in percent; "" for None.

    Example:
        >>> percent({"mean": 0.5, "std": 0.0123}), percent({"mean": 0.5, "std": None})
        ('50.00±1.23', '50.00')
    """
    if figure is None:
        return ""
    return f"{100 * figure['mean']:.2f}" + ("" if figure["std"] is None else f"±{100 * figure['std']:.2f}")
