"""The benchmarks by name, and as protocols: `ood evaluate --protocol isic-4`, or one fold, `isic-4-grouped-1`."""

from __future__ import annotations

__all__ = ["ISIC_4", "NCT_CRC", "SKIN_40", "find_layout", "inspect_layout", "list_layouts"]

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ood_core.data.sources import PathLike
from ood_core.errors import unknown_name
from ood_core.protocols import ContributedProtocol, FoundSet, Protocol, data_root

from ood_hvl.layouts.isic import isic_4, look_for_isic
from ood_hvl.layouts.nct_crc import OOD_TRIPLES, look_for_nct_crc, nct_crc
from ood_hvl.layouts.sd198 import look_for_sd198, skin_40
from ood_hvl.layouts.survey import Layout, Survey


def _protocol(
    title: str, ood: Iterable[str], look: Callable[[Path], Survey], make: Callable[[Path], Layout]
) -> ContributedProtocol:
    """A benchmark for the core's finder; what is unknown are diseases and tissues near the known ones."""

    def inspect(root: Path) -> list[FoundSet]:
        return look(data_root(root)).found

    def find(root: Path) -> list[Protocol]:
        layout = make(root)
        return [
            Protocol(
                name=task.name,
                title=title,
                class_names=task.class_names,
                wnids=[],
                train=task.train,
                test=task.test,
                ood=task.ood,
                found=layout.found,
                notes=task.notes,
                kinds=dict.fromkeys(task.ood, "near"),
            )
            for task in layout.tasks
        ]

    return ContributedProtocol(title, dict.fromkeys(ood, "near"), inspect, find)


ISIC_4 = _protocol("ISIC-4", ["BCC+AK+BKL+SCC"], look_for_isic, isic_4)
SKIN_40 = _protocol("Skin-40", ["other classes"], look_for_sd198, skin_40)
NCT_CRC = _protocol("NCT-CRC", map("+".join, OOD_TRIPLES), look_for_nct_crc, nct_crc)

_LAYOUTS: dict[str, tuple[ContributedProtocol, Callable[..., Layout]]] = {
    "isic-4": (ISIC_4, isic_4),
    "skin-40": (SKIN_40, skin_40),
    "nct-crc": (NCT_CRC, nct_crc),
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
    return _entry(name)[0].inspect(Path(root))


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


def _entry(name: str) -> tuple[ContributedProtocol, Callable[..., Layout]]:
    if name not in _LAYOUTS:
        raise unknown_name("layout", name, _LAYOUTS)
    return _LAYOUTS[name]
