from __future__ import annotations

import csv
import json

import plots

from pages import RESULTS, ROOT, read, table


def page() -> str:
    """How the embedded backbone was trained: trials, finished runs, the curve of the last one."""
    recipes = read("tiny_recipes") or {}
    parts = ["# How the embedded backbone was trained\n"]
    for part in recipes.values():
        header = list(dict.fromkeys(key for row in part["rows"] for key in row))
        rows = [[_shown(row.get(key)) for key in header] for row in part["rows"]]
        parts.append(f"{part['about'][0].upper()}{part['about'][1:]}.\n\n{table(header, rows)}")
    history = json.loads((ROOT / "shared/src/ood_core/tiny/config.json").read_text())["training"]["runs"]
    rows = [
        [f"{run['samples']:,}", f"{run['muon_lr']:g}", *(f"{100 * value:.1f}" for value in run["top1"].values())]
        for run in history
    ]
    parts.append(
        "The shipped weights, each run continuing from the one before; top-1 in percent on `val` by the text tower.\n\n"
        + table(["samples", "Muon", "image", "single patch", "mean of patches"], rows)
    )
    parts.append(
        "The weights that are shipped, and the runs they come from, are in "
        "[the model card](../shared/src/ood_core/tiny/MODEL_CARD.md). The last run, losses by images seen:\n\n"
        "![learning curves](tiny_curves.svg)\n"
    )
    return "\n".join(parts)


def _shown(value: object) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def curves() -> str:
    """The losses of the last run as an SVG."""
    with (RESULTS / "tiny_training.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = {name.replace("_", " "): [float(row[name]) for row in rows] for name in ("image_loss", "patch_loss")}
    return plots.lines([float(row["samples"]) for row in rows], losses, "images", "losses over training images")
