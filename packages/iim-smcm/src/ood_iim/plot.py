"""The picture of Fig. 3: mined patches in two dimensions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ood_core._panels import COLORS, OTHER
from ood_core._plots import new_figure, save_figure

__all__ = ["draw_local_map"]


def draw_local_map(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw patches in the colour of their image's class: positives as dots, negatives as small crosses.

    Args:
        rows: of `studies.local_map`; the eight most frequent classes have colours, the others are grey.
        path: file to write, .png, .pdf or .svg.

    Raises:
        UsageError: matplotlib is not installed, or another kind of file.
    """
    figure = new_figure(path, "ood-iim", figsize=(9.0, 6.4))
    axis = figure.subplots()
    frequent = Counter(row["class"] for row in rows).most_common(len(COLORS))
    colors = {name: color for (name, _), color in zip(frequent, COLORS, strict=False)}
    for kind, style in (("negative", {"marker": "x", "s": 10, "linewidths": 0.6}), ("positive", {"s": 12})):
        for name in ("other classes", *colors):
            own = [row for row in rows if row["kind"] == kind and _shown(row["class"], colors) == name]
            x, y = ([row[place] for row in own] for place in ("x", "y"))
            label = name if own and kind == "positive" else None
            axis.scatter(x, y, color=colors.get(name, OTHER), label=label, **style)
    axis.set_title("mined patches (t-SNE): dots positive, crosses negative", fontsize=10, loc="left")
    axis.set_xticks([])
    axis.set_yticks([])
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path)


def _shown(name: str, colors: Mapping[str, str]) -> str:
    return name if name in colors else "other classes"
