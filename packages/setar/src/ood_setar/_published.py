"""The paper's tables as data, in `published/*.json`."""

from __future__ import annotations

__all__ = ["published_table"]

import json
from importlib.resources import files
from typing import Any

from ood_core.errors import unknown_name


def published_table(number: int) -> dict[str, Any]:
    """A table of the paper: where it comes from, what to know of it, and its rows.

    Every row has `method` (Table 3 has one row for vanilla and SeTAR) and, but for Table 4, figures of `fpr95` and
    `auroc` in percent: Table 1 by OOD set in `ood` (None: not given) with their `average`; Table 2 in `scores`, by
    score, some with `fpr95_std` and `auroc_std`; Table 3 in `average`, by method. Table 4 has `accuracy` by data
    set and their `average`. `inconsistent_averages` lists those that do not follow from their columns.

    Args:
        number: 1 without training, 2 fine-tuned, 3 other backbones and scores, 4 accuracies.

    Raises:
        UsageError: another number.

    Example:
        >>> published_table(4)["rows"][0]["average"]
        57.27
    """
    file = files("ood_setar") / "published" / f"table{number}.json"
    if not file.is_file():
        raise unknown_name("table of the paper", str(number), "1234")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
