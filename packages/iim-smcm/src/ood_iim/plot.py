"""The picture of Fig. 3: likeness of text class prototypes, and where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from ood_core.pictures.panels import COLORS
from ood_core.pictures.plots import new_figure, save_figure

__all__ = ["draw_prototypes"]


def draw_prototypes(found: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draw the distribution of pairwise cosines of every list, and all prototypes in two dimensions.

    Args:
        found: of `prototypes.prototypes`.
        path: file to write, .png, .pdf or .svg.

    Raises:
        UsageError: matplotlib is not installed, or another kind of file.
    """
    figure = new_figure(path, "ood-iim", figsize=(11.0, 4.8))
    left, right = figure.subplots(1, 2)
    lowest = min(one["quantiles"]["0"] for one in found.values())
    highest = max(one["quantiles"]["1"] for one in found.values())
    for (name, one), color in zip(found.items(), cycle(COLORS), strict=False):
        label = f"{name} ({one['classes']} classes)"
        shape = {"bins": 50, "range": (lowest, highest), "density": True}
        left.hist(one["similarities"], **shape, color=color, alpha=0.45, label=label)
        left.axvline(one["mean"], color=color, linestyle="--", linewidth=1)
        x, y = ([place[axis] for place in one["map"]] for axis in ("x", "y"))
        right.scatter(x, y, s=12, color=color, label=label)
    left.set_title("cosines of pairs of classes (dashed: mean)", fontsize=10, loc="left")
    left.set_xlabel("cosine")
    left.set_ylabel("density")
    right.set_title("text class prototypes (t-SNE)", fontsize=10, loc="left")
    right.set_xticks([])
    right.set_yticks([])
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save_figure(figure, path)
