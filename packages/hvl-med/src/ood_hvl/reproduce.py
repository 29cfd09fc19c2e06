"""The paper's benchmarks and studies on the user's data, our numbers beside the published ones.

Every task of a layout is trained and judged from one extraction; means, spreads and intervals are over runs.
"""

from __future__ import annotations

import argparse
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
from ood_core.cli.common import (
    extraction_options,
    load_backbone,
    message,
    parse_params,
    print_json,
    print_table,
)
from ood_core.detectors import create_detector
from ood_core.detectors.base import Detector, backbone_of
from ood_core.errors import unknown_name
from ood_core.evaluation import evaluate
from ood_core.features import FeatureSet, extract
from ood_core.reproduction import tables
from ood_core.reproduction.command import print_differences, show_found
from ood_core.reproduction.kept import Run, UsedImages, kept_runs, recipe
from ood_core.reproduction.studies import spread, study_options
from ood_core.reproduction.tables import Beside, beside, figure_cell, percent

from ood_hvl.detectors import HVL
from ood_hvl.layouts import Layout, Task, find_layout, inspect_layout
from ood_hvl.pyramid import FEATURE

__all__ = [
    "BASELINES",
    "MEASURES",
    "PARTS",
    "STUDIES",
    "published_table",
    "pyramid_features",
    "reproduce",
    "run_layout",
    "summarise",
]

log = logging.getLogger(__name__)

PARTS: dict[str, dict[str, Any]] = {
    "no L_OOD, no CSF": {"selection": "none", "csf": False},
    "no L_OOD": {"selection": "none"},
    "background, no CSF": {"selection": "background", "csf": False},
    "no CSF": {"csf": False},
    "background": {"selection": "background"},
    "HVL": {},
}
"""The rows of the paper's Table 2 in its order, as options of `HVL`."""

STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "parts": PARTS | {"no lower scales": {"lower_scales": False}},
    "k": {f"K={k}": {"k": k} for k in (1, 2, 4, 6, 8)},
    "n": {f"n={n}": {"n": n, "k": min(4, 4 * n * n)} for n in (1, 2, 3, 4, 6, 8)},
    "epochs": {
        f"{epochs} epochs{label}": {"epochs": epochs} | options
        for epochs in (5, 15, 40, 100)
        for label, options in (("", {}), (", no CSF", {"csf": False}))
    },
}
"""Settings by study: Table 2 with the left panel of Fig. 2, the other panels of Fig. 2, and the length of training."""


def reproduce(args: argparse.Namespace) -> None:
    """Run a benchmark or a study of the paper."""
    if args.study and args.study not in STUDIES:
        raise unknown_name("study", args.study, STUDIES)
    if args.dry_run:
        show_found(args, inspect_layout(args.protocol, args.root))
        return
    layout = find_layout(args.protocol, args.root, **_layout_options(args))
    message(layout.describe())
    backbone, given = load_backbone(args), parse_params(args.param)
    settings = STUDIES[args.study] if args.study else {"HVL": {}}
    results: dict[str, Any] = {}
    for label, options in study_options(settings, given, message).items():
        message(f"{label}: embeddings at {options.get('n', 2)} x {options.get('n', 2)} partitions, then training")
        runs = run_layout(
            layout,
            backbone,
            pyramid_features(layout, backbone, options, **extraction_options(args)),
            options=options,
            seeds=args.seeds,
            baselines=None if args.study else BASELINES,
            folder=Path(args.out) / _folder(layout) / label.replace(" ", "-"),
        )
        results |= {_name(label, detector): row for detector, row in summarise(runs, layout).items()}
    _show(args, results, _notes(layout))


_COLUMNS = ("accuracy", "fpr95", "auroc")


def _show(args: argparse.Namespace, results: dict[str, Any], notes: list[str]) -> None:
    """Our rows, the published ones, and the differences where a row has the same name in both."""
    published = _published(args.protocol, args.study)
    found = [one for row in published if row["method"] in results for one in _beside(row, results[row["method"]])]
    if args.json:
        compared = [one.to_dict() for one in found]
        content = {"protocol": args.protocol, "convention": _CONVENTION, "results": results, "published": published}
        print_json(content | {"differences": compared, "notes": notes})
        return
    rows = [[name, *(percent(row[measure]) for measure in _COLUMNS)] for name, row in results.items()]
    for row in published:
        rows.append([f"published: {row['method']}", *(figure_cell(row, [measure]) for measure in _COLUMNS)])
    print_table([f"percent, FPR95 {_CONVENTION}", "accuracy", "FPR95", "AUROC"], rows)
    print_differences(found, _COLUMNS, _COLUMNS)
    for note in notes:
        message(f"Note: {note}")
    message(f"Every run: {args.out}")


_CONVENTION = "standard"


def _beside(row: dict[str, Any], ours: dict[str, Any]) -> list[Beside]:
    """A published row and ours, a place per column."""
    mine = {m: {m: 100 * ours[m]["mean"]} for m in _COLUMNS if ours[m] is not None}
    return beside(row["method"], mine, {m: {m: row[m]} for m in _COLUMNS})


def _layout_options(args: argparse.Namespace) -> dict[str, Any]:
    if args.protocol == "isic-4":
        return {"folds": args.folds}
    if args.protocol == "nct-crc" and args.ood_triples:
        return {"ood_triples": [triple.split(",") for triple in args.ood_triples]}
    return {}


def _folder(layout: Layout) -> str:
    """Apart by the kind of folds."""
    return layout.tasks[0].name.rpartition("-")[0] if layout.name == "isic-4" else layout.name


def _notes(layout: Layout) -> list[str]:
    return list(dict.fromkeys([*layout.notes, *(note for task in layout.tasks for note in task.notes)]))


def _name(label: str, detector: str) -> str:
    """Rows of HVL are named after the setting, with the mean over tiles; others as they are."""
    if not detector.startswith("hvl"):
        return detector
    mean = detector.partition("_")[2]
    return label + (f", patch_mean={mean}" if mean else "")


def _published(protocol: str, study: str | None) -> list[dict[str, Any]]:
    """The paper's rows for this benchmark: Table 1, Table 2 for its parts, none for what it only draws."""
    if study is None:
        return [{"method": row["method"], **row["sets"][protocol]} for row in published_table(1)["rows"]]
    if study != "parts":
        return []
    rows = published_table(2)["rows"]
    return [{"method": name, **row["sets"][protocol]} for name, row in zip(PARTS, rows, strict=True)]


# ---- published


def published_table(number: int) -> dict[str, Any]:
    """A table of the paper: where it comes from, what to know of it, and its rows.

    Every row has figures of `accuracy`, `fpr95` and `auroc` in percent by benchmark in `sets`, under the names of
    `list_layouts`. Table 1 has `fpr95_std` and `auroc_std`, too, and the `average` of the columns;
    `inconsistent_averages` lists those that do not follow from them. Table 2 says what is on in `ood_loss`,
    `entropy_gain` and `csf` (cross-scale fusion).

    Args:
        number: 1 other methods and HVL, 2 parts of HVL.

    Raises:
        UsageError: another number.

    Example:
        >>> published_table(1)["rows"][-1]["average"]["auroc"]
        83.34
    """
    return tables.published_table("ood_hvl", number)


# ---- runs

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
