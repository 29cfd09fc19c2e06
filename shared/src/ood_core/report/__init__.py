"""The HTML report of an evaluation: one self-contained file, without script or outside resource.

`figures` prepares numbers, `charts` draws them, `markup` writes text; one module per part of the page.
"""

from __future__ import annotations

__all__ = ["write_report"]

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from ood_core.errors import DataError, UsageError
from ood_core.files import write_atomically
from ood_core.report.detectors import calibration, score_charts
from ood_core.report.figures import ExplainImage, OpenImage, Run
from ood_core.report.markup import escaped
from ood_core.report.mistakes import mistakes as mistake_pictures
from ood_core.report.provenance import failure_list, provenance
from ood_core.report.summary import figure_table, fusions, headline, set_bars


def write_report(
    path: str | Path,
    results: Mapping[str, Any],
    table: pd.DataFrame,
    open_image: OpenImage | None = None,
    *,
    explain_image: ExplainImage | None = None,
    title: str = "Out-of-distribution detection report",
    mistakes: int = 8,
    explained: int = 2,
) -> Path:
    """Write the report of an evaluation as one HTML file (atomic).

    Detectors are listed by average AUROC, best first.

    Args:
        path: the file to write.
        results: the content of results.json; every figure a fraction.
        table: columns id, source, label, status and one float column per detector (higher = more ID).
        open_image: (source, id) -> the image for a thumbnail, or None; without it there are no pictures.
        explain_image: (detector, image) -> a picture of why it got its score, or None.
        title: heading of the page.
        mistakes: how many of the most confident mistakes to show of each kind; 0 leaves the section out.
        explained: how many of these get explanation pictures.

    Returns:
        `path`.

    Raises:
        UsageError: `mistakes` or `explained` below 0.
        DataError: no detector in `results`, or a column missing from `table`.

    Example:
        >>> write_report("report.html", results, table)  # doctest: +SKIP
    """
    for name, count in (("mistakes", mistakes), ("explained", explained)):
        if count < 0:
            raise UsageError(f"{name}={count}: give 0 or more.")
    if not results.get("detectors"):
        raise DataError("These results hold no detector to report on.")
    if missing := [name for name in ("id", "source", "label", "status") if name not in table]:
        raise DataError(f"The score table lacks the columns {missing}.")
    page = _page(Run(results, table, open_image, explain_image), title, mistakes, explained)
    path = Path(path)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def _page(run: Run, title: str, mistakes: int, explained: int) -> str:
    sections = [
        headline(run, title),
        figure_table(run),
        set_bars(run),
        fusions(run),
        score_charts(run),
        calibration(run),
        mistake_pictures(run, mistakes, explained) if mistakes else "",
        failure_list(run),
        provenance(run),
    ]
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escaped(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{chr(10).join(filter(None, sections))}
</main>
</body>
</html>
"""
