"""The paper's tables as data, in `published/*.json`."""

from __future__ import annotations

__all__ = ["published_table"]

import json
from importlib.resources import files
from typing import Any

from ood_core.errors import unknown_name


def published_table(number: int) -> dict[str, Any]:
    """A table of the paper: where it comes from, its ID set, what to know of it, and its rows.

    Figures are in percent. Rows have a `method` and its `average` over the OOD sets (`fpr95` and `auroc`); those of
    Tables 1 and 2 also a `backbone`, the figures of all `sets` and the `accuracy`, and `inconsistent_averages` lists
    those that follow from their columns neither rounded nor cut off. Table 4 has the `gain` in average FPR95 only.

    Args:
        number: 1 and 2 the paper's methods on ImageNet-1k and ImageNet-100, 3 the method's parts, 4 number of experts,
            5 grouping of the classes, 6 parts of the mixup.

    Raises:
        UsageError: another number.

    Example:
        >>> published_table(3)["rows"][-1]
        {'method': 'both', 'average': {'fpr95': 17.01, 'auroc': 95.89}}
    """
    file = files("ood_mofe") / "published" / f"table{number}.json"
    if not file.is_file():
        raise unknown_name("table of the paper", str(number), "123456")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
