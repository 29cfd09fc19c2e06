"""The benchmarks by name."""

from __future__ import annotations

__all__ = ["find_layout", "inspect_layout", "list_layouts"]

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ood_core.data.sources import PathLike
from ood_core.errors import unknown_name
from ood_core.protocols import FoundSet

from ood_hvl.layouts.isic import isic_4, look_for_isic
from ood_hvl.layouts.nct_crc import look_for_nct_crc, nct_crc
from ood_hvl.layouts.sd198 import look_for_sd198, skin_40
from ood_hvl.layouts.survey import Layout, Survey, data_root

_LAYOUTS: dict[str, tuple[Callable[[Path], Survey], Callable[..., Layout]]] = {
    "isic-4": (look_for_isic, isic_4),
    "skin-40": (look_for_sd198, skin_40),
    "nct-crc": (look_for_nct_crc, nct_crc),
}


def list_layouts() -> list[str]:
    """The paper's benchmarks.

    Example:
        >>> list_layouts()
        ['isic-4', 'skin-40', 'nct-crc']
    """
    return list(_LAYOUTS)


def inspect_layout(name: str, root: PathLike) -> list[FoundSet]:
    """Look for the files of a benchmark without asking that they be there: the dry run of `find_layout`.

    Args:
        name: of `list_layouts`.
        root: the folder with all data.

    Returns:
        A line for each thing looked for, with what is expected; `ood_core.protocols.describe` shows them.

    Raises:
        UsageError: an unknown name.
        MissingDataError: no such root.

    Example:
        >>> print(describe(inspect_layout("nct-crc", "/data")))  # doctest: +SKIP
        NCT-CRC-HE-100K  100,000 of 100,000  /data/NCT-CRC-HE-100K
        CRC-VAL-HE-7K        7,180 of 7,180  /data/CRC-VAL-HE-7K
    """
    return _entry(name)[0](data_root(root)).found


def find_layout(name: str, root: PathLike, **options: Any) -> Layout:
    """Find a benchmark's images and make its tasks.

    Args:
        name: of `list_layouts`.
        root: the folder with all data.
        **options: those of `isic_4`, `skin_40` or `nct_crc`.

    Raises:
        UsageError: an unknown name, or an option out of range.
        MissingDataError: a file or folder that is not there.
        DataError: files that are not as they should be.

    Example:
        >>> find_layout("isic-4", "/data", folds="stratified").tasks[0].name  # doctest: +SKIP
        'isic-4-stratified-1'
    """
    return _entry(name)[1](root, **options)


def _entry(name: str) -> tuple[Callable[[Path], Survey], Callable[..., Layout]]:
    if name not in _LAYOUTS:
        raise unknown_name("layout", name, _LAYOUTS)
    return _LAYOUTS[name]
