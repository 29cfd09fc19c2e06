"""Pictures: classes coloured by group, features of known and unknown images, figures class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ood_core.pictures.panels import COLORS, OTHER
from ood_core.pictures.plots import new_figure, save_figure
from torch import Tensor

__all__ = ["draw", "draw_classes", "draw_features", "principal_plane"]

_MARKERS = "os^Dv*"
_MOST_NAMED = 60


def principal_plane(x: Tensor) -> tuple[Tensor, Tensor]:
    """Points in their two directions of largest variance (PCA).

    Args:
        x: [N, D], D at least 2.

    Returns:
        float64 [N, 2], and the shares [2] of the variance that the two hold. A direction's sign is that of its largest
        entry, so that the picture does not depend on the machine.

    Example:
        >>> points, shares = principal_plane(torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]]))
        >>> points[:, 0].tolist(), shares.tolist()
        ([-2.0, 0.0, 2.0], [1.0, 0.0])
    """
    centred = x.double() - x.double().mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=True)
    two = directions[:2]
    two = two * two.gather(1, two.abs().argmax(1, keepdim=True)).sign()
    variance = torch.nn.functional.pad(values.square(), (0, 2))[:2]
    return centred @ two.T, variance / values.square().sum().clamp(min=torch.finfo(torch.float64).tiny)


def draw(prototypes: Tensor, group: Tensor, class_names: Sequence[str], path: str | Path) -> None:
    """Draw every class at its prototype's place; up to 60 classes are named.

    Args:
        prototypes: [C, D].
        group: int64 [C].
        class_names: C names.
        path: file to write, .png, .pdf or .svg.

    Raises:
        UsageError: matplotlib is not installed, or another kind of file.
    """
    figure = new_figure(path, "ood-mofe", figsize=(9.0, 6.4))
    axis = figure.subplots()
    points, shares = principal_plane(prototypes)
    for number in range(int(group.max()) + 1):
        x, y = points[group == number].T.tolist()
        style = {"color": COLORS[number % len(COLORS)], "marker": _MARKERS[number // len(COLORS) % len(_MARKERS)]}
        axis.scatter(x, y, s=22, label=f"group {number}: {len(x)} classes", **style)
    if len(class_names) <= _MOST_NAMED:
        for name, place in zip(class_names, points.tolist(), strict=True):
            axis.annotate(name, place, xytext=(4, 3), textcoords="offset points", fontsize=7, parse_math=False)
    axis.set_xlabel(f"first principal component ({100 * float(shares[0]):.0f} % of the variance)")
    axis.set_ylabel(f"second ({100 * float(shares[1]):.0f} %)")
    axis.set_title("class prototypes as the router sees them", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(0.12)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_features(features: Mapping[str, Mapping[str, Tensor]], path: str | Path) -> None:
    """Draw features of known and unknown images, a panel for each kind of features.

    The known images' principal plane is the plane of a panel: what leaves them in other directions falls on its middle.

    Args:
        features: title of a panel -> set -> [N, D]; the set "id" holds the known images, whose dots are grey. All
            panels have the same sets.
        path: file to write, .png, .pdf or .svg.

    Raises:
        UsageError: matplotlib is not installed, or another kind of file.
    """
    figure = new_figure(path, "ood-mofe", figsize=(5.4 * len(features) + 1.6, 5.0))
    axes = figure.subplots(1, len(features), squeeze=False)[0]
    for axis, (title, sets) in zip(axes, features.items(), strict=True):
        known = sets["id"].double()
        _, _, directions = torch.linalg.svd(known - known.mean(0), full_matrices=False)
        unknown = [name for name in sets if name != "id"]
        colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(unknown)}
        for name in ("id", *colors):
            x, y = ((sets[name].double() - known.mean(0)) @ directions[:2].T).T.tolist()
            axis.scatter(x, y, s=5, color=colors.get(name, OTHER), label=name)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, markerscale=3)
    save_figure(figure, path)


def draw_classes(figures: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Draw columns of FPR95 and AUROC, side by side for each class.

    Args:
        figures: title of a column -> one mapping per class with "name", "fpr95" and "auroc" as fractions; all have the
            same classes.
        path: file to write, .png, .pdf or .svg.

    Raises:
        UsageError: matplotlib is not installed, or another kind of file.
    """
    names = [one["name"] for one in next(iter(figures.values()))]
    figure = new_figure(path, "ood-mofe", figsize=(1.6 + 0.75 * len(names), 6.4))
    axes = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(figures)
    for axis, measure, label in zip(axes, ("fpr95", "auroc"), ("FPR95", "AUROC"), strict=True):
        for number, (title, classes) in enumerate(figures.items()):
            places = [place + (number - (len(figures) - 1) / 2) * width for place in range(len(names))]
            heights = [100 * one[measure] for one in classes]
            axis.bar(places, heights, width, label=title, color=COLORS[number % len(COLORS)])
        axis.set_ylabel(f"{label}, percent")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8, parse_math=False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", frameon=False, fontsize=8)
    save_figure(figure, path)
