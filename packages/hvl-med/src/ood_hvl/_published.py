"""The paper's tables as data, in `published/*.json`."""

from __future__ import annotations

__all__ = ["published_table"]

import json
from importlib.resources import files
from typing import Any

from ood_core.errors import unknown_name


def published_table(number: int) -> dict[str, Any]:
    """A table of the paper: where it comes from, what to know of it, and its rows.

    Every row has figures of `accuracy`, `fpr95` and `auroc` in percent by benchmark in `sets`, under the names of
    `list_layouts`. Table 1 has `fpr95_std` and `auroc_std`, too, and the `average` of the columns;
    `inconsistent_averages` lists those that do not follow from them. Table 2 says what is on in `ood_loss`,
    `entropy_gain` and `csf` (cross-scale fusion).

    Args:
        number: 1 other methods and HVL, 2 parts of HVL.

    Raises:
        UsageError: another number.

    Example:
        >>> published_table(1)["rows"][-1]["average"]["auroc"]
        83.34
    """
    file = files("ood_hvl") / "published" / f"table{number}.json"
    if not file.is_file():
        raise unknown_name("table of the paper", str(number), "12")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
