"""Train and judge on every task of a layout, all from one extraction; means, spreads and intervals over runs."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from ood_core.backbones.base import Backbone
from ood_core.detectors import create_detector
from ood_core.detectors.base import Detector, backbone_of
from ood_core.evaluation import evaluate
from ood_core.features import FeatureSet, extract
from ood_core.runs import Run, UsedImages, kept_runs, recipe, spread

from ood_hvl.detectors import HVL
from ood_hvl.layouts import Layout, Task
from ood_hvl.pyramid import FEATURE

__all__ = ["BASELINES", "MEASURES", "pyramid_features", "run_layout", "summarise"]

log = logging.getLogger(__name__)

MEASURES = ("accuracy", "auroc", "fpr95")
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "mcm": ("mcm", {}),
    "msp of a linear probe": ("linear_probe", {}),
    "gen of a linear probe": ("linear_probe", {"scorer": "gen"}),
    "knn": ("knn", {}),
    "vim": ("vim", {}),
    "mahalanobis": ("mahalanobis", {}),
}
"""Methods on the embedding of the whole image, by the name they have in tables."""


def pyramid_features(layout: Layout, backbone: Backbone, options: Mapping[str, Any], **extraction: Any) -> FeatureSet:
    """The embeddings of every image of a layout, for all its tasks, and the whole image's as "image".

    Args:
        layout: of `find_layout` or `leave_classes_out`.
        backbone: of the detectors.
        options: of `HVL`, of which those of the pyramid matter.
        **extraction: for `extract`.
    """
    found = extract(_wide(backbone, options), layout.source, {FEATURE}, **extraction)
    return replace(found, image=F.normalize(found.extra[FEATURE][:, 0].float(), dim=-1))


def run_layout(
    layout: Layout,
    backbone: Backbone,
    features: FeatureSet,
    *,
    options: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    baselines: Mapping[str, tuple[str, dict[str, Any]]] | None = None,
    folder: str | Path | None = None,
    convention: str = "standard",
    bootstrap: int = 0,
) -> list[Run]:
    """Train HVL on every task with every seed, and judge it beside other methods.

    Args:
        layout: the tasks.
        backbone: that of the features.
        features: of `pyramid_features`, for these options.
        options: of `HVL`.
        seeds: of `HVL`; methods without chance run once per task.
        baselines: name -> (detector, its options), such as `BASELINES`; None for HVL alone.
        folder: keeps every run; finished ones are read back.
        convention: of the FPR.
        bootstrap: replicates for intervals of each run.

    Returns:
        A mapping per task, seed and detector: "task", "seed", "detector", "accuracy", "auroc", "fpr95" (averages over
        the OOD sets, fractions) and "per_set". HVL comes with both means over tiles, "hvl" and "hvl_kept".

    Raises:
        UsageError: a folder with runs of other settings.

    Example:
        >>> features = pyramid_features(layout, backbone, {}, cache="cache")  # doctest: +SKIP
        >>> summarise(run_layout(layout, backbone, features), layout)["hvl"]["auroc"]  # doctest: +SKIP
        {'mean': 0.81, 'std': 0.01, 'low': 0.78, 'high': 0.84, 'runs': 5}
    """
    options = dict(options or {})
    backbone = _wide(backbone, options)
    given: dict[str, Any] = {"convention": convention, "bootstrap": bootstrap}
    images = {"images": UsedImages(layout.source)}
    runs: list[Run] = []
    for task in layout.tasks:
        parts = cache(partial(task.features, features))
        jobs = {f"seed-{seed}": (seed, {"hvl": ("hvl", options | {"seed": seed})}) for seed in seeds}
        if baselines:
            jobs["baselines"] = (seeds[0], dict(baselines))
        for label, (seed, methods) in jobs.items():
            file = None if folder is None else Path(folder) / task.name / f"{label}.json"
            about = recipe(
                backbone,
                images,
                task.class_names,
                code=["ood_hvl"],
                options=options,
                methods=methods,
                parts=_ids_of(task),
                **given,
            )
            runs += kept_runs(file, about, partial(_judge, task, parts, backbone, methods, label, seed, given))
    return runs


def _ids_of(task: Task) -> dict[str, str]:
    """Digest of the images of each part: another fold has others of the same source."""
    ids = task.source.ids
    return {
        name: hashlib.sha256(json.dumps([ids[row] for row in rows]).encode()).hexdigest()[:16]
        for name, rows in task.rows.items()
    }


def _judge(
    task: Task,
    features: Callable[[], Mapping[str, FeatureSet]],
    backbone: Backbone,
    methods: Mapping[str, tuple[str, dict[str, Any]]],
    label: str,
    seed: int,
    options: dict[str, Any],
) -> list[Run]:
    log.info("%s, %s", task.name, label)
    parts = features()
    made: dict[str, Detector] = {}
    for name, (method, chosen) in methods.items():
        if method == "hvl":
            hvl = HVL(class_names=task.class_names, **chosen)
            hvl.attach(backbone)
            made |= hvl.fit(parts["train"], progress=False).variants()
        else:
            made[name] = create_detector(method, class_names=task.class_names, **chosen)
            if "text" in made[name].capabilities:
                made[name].attach(backbone)
    named = {name: part for name, part in parts.items() if name not in ("train", "test")}
    found = evaluate(made, id=parts["test"], ood=named, fit=parts["train"], **options).results["detectors"]
    return [
        {"task": task.name, "seed": None if label == "baselines" else seed, "detector": name}
        | {"accuracy": figures.get("accuracy")}
        | {measure: figures["average"][measure] for measure in ("auroc", "fpr95")}
        | {"per_set": figures["per_set"]}
        for name, figures in found.items()
    ]


def _wide(backbone: Backbone, options: Mapping[str, Any]) -> Backbone:
    """The backbone with the pyramid of these options."""
    made = HVL(**options)
    made.attach(backbone)
    return backbone_of(made)


def summarise(runs: Sequence[Run], layout: Layout) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation (n - 1) and 95 % interval (Student's t) of each detector over independent units.

    Where the tasks are folds of one, a unit is a fold: the seeds of a fold share its images, so they are averaged and
    do not count as measurements of their own. Else a unit is a seed, whose tasks are averaged.

    Args:
        runs: of `run_layout`.
        layout: of them.

    Returns:
        Detector -> measure -> "mean", "std", "low", "high" (None from one unit) and "runs", the number of units; an
        accuracy that a detector does not have is None.
    """
    folds = len({tuple(task.class_names) for task in layout.tasks}) == 1
    table: dict[str, dict[Any, list[Run]]] = {}
    for run in runs:
        unit = run["task"] if folds else run["seed"]
        table.setdefault(run["detector"], {}).setdefault(unit, []).append(run)
    return {
        name: {measure: spread([_mean(unit, measure) for unit in units.values()]) for measure in MEASURES}
        for name, units in table.items()
    }


def _mean(runs: Sequence[Run], measure: str) -> float | None:
    values = [run[measure] for run in runs]
    return None if None in values else statistics.fmean(values)
