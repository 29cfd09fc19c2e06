"""The picture of an edit: what every layer loses, and how the search went."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ood_core.pictures.plots import new_figure, save_figure

if TYPE_CHECKING:
    from ood_setar.edit import SeTAREdit

__all__ = ["draw"]


def draw(edit: SeTAREdit, path: str | Path) -> None:
    """Write a PNG: above the ratio of every weight, below the search's values in the order of its steps.

    Args:
        edit: any; without a record of its search only the upper half is drawn.
        path: file to write, .png, .pdf or .svg.

    Raises:
        UsageError: matplotlib is not installed, or another kind of file.
    """
    steps = edit.record.get("steps", [])
    size = (max(6.0, 1.5 + 0.42 * len(edit.ratios)), 6.4 if steps else 3.4)
    figure = new_figure(path, "ood-setar", figsize=size)
    axes = figure.subplots(2 if steps else 1, 1, sharex=True, squeeze=False)[:, 0]
    _draw_ratios(axes[0], edit)
    if steps:
        _draw_path(axes[1], steps)
    axes[-1].set_xticks(range(len(edit.ratios)), list(edit.ratios), rotation=90)
    axes[-1].set_xlabel("weights in the order of the search")
    save_figure(figure, path)


def _draw_ratios(axis: Any, edit: SeTAREdit) -> None:
    colours = ["#2b6cb0" if name.startswith("visual") else "#c05621" for name in edit.ratios]
    percent = [100 * ratio for ratio in edit.ratios.values()]
    axis.bar(range(len(percent)), percent, color=colours, width=0.7)
    for place, value in enumerate(percent):
        axis.annotate(f"{value:g}", (place, value), ha="center", va="bottom", fontsize=8, color="#4a5568")
    axis.set_ylabel("singular values dropped, %")
    axis.set_title(f"{edit.drop} singular values; blue: image tower, orange: text tower", fontsize=10, loc="left")
    _plain(axis)


def _draw_path(axis: Any, steps: list[dict[str, Any]]) -> None:
    for place, step in enumerate(steps):
        measured = [figures["loss"] for ratio, figures in step["candidates"].items() if float(ratio)]
        axis.plot([place] * len(measured), measured, "o", color="#a0aec0", markersize=3)
    axis.step(range(len(steps)), [step["value"] for step in steps], where="mid", color="#2b6cb0")
    axis.set_ylabel("search value")
    axis.set_title("line: best so far; dots: candidates", fontsize=10, loc="left")
    _plain(axis)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e2e8f0")
    axis.set_axisbelow(True)
