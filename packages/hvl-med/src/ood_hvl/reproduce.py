"""The paper's benchmarks and studies on the user's data, our numbers beside the published ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ood_core.cli.common import (
    extraction_options,
    load_backbone,
    message,
    parse_params,
    print_differences,
    print_json,
    print_table,
)
from ood_core.cli.methods import show_found
from ood_core.errors import unknown_name
from ood_core.published import Beside, beside
from ood_core.runs import percent, study_options

from ood_hvl._published import published_table
from ood_hvl.layouts import Layout, find_layout, inspect_layout

__all__ = ["PARTS", "STUDIES", "reproduce"]

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
    from ood_hvl.runner import BASELINES, pyramid_features, run_layout, summarise

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
        rows.append([f"published: {row['method']}", *(_published_cell(row, measure) for measure in _COLUMNS)])
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


def _published_cell(row: dict[str, Any], measure: str) -> str:
    spread = row.get(f"{measure}_std")
    return f"{row[measure]:.2f}" + (f"±{spread:.2f}" if spread is not None else "")
