"""Figures drawn with matplotlib, which only the packages' extra "plot" installs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ood_core.errors import UsageError

_SUFFIXES = (".png", ".pdf", ".svg")


def new_figure(path: str | Path, package: str, **options: Any) -> Any:
    """An empty matplotlib figure that `save_figure` can write to `path`.

    Raises:
        UsageError: another kind of file, or matplotlib is not installed.
    """
    if Path(path).suffix not in _SUFFIXES:
        raise UsageError(f"{str(path)!r} must end in .png, .pdf or .svg.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"Pictures need matplotlib: pip install '{package}[plot]'") from error
    return Figure(layout="constrained", **options)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write it, in a folder that is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
