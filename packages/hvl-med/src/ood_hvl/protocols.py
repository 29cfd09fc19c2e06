"""The paper's benchmarks as protocols: `ood evaluate --protocol isic-4`, or one fold, `isic-4-grouped-1`."""

from __future__ import annotations

__all__ = ["ISIC_4", "NCT_CRC", "SKIN_40"]

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ood_core.protocols import ContributedProtocol, Protocol

from ood_hvl.layouts import OOD_TRIPLES, find_layout, inspect_layout


def _contribution(layout: str, title: str, ood: Iterable[str]) -> ContributedProtocol:
    kinds = dict.fromkeys(ood, "near")
    return ContributedProtocol(title, kinds, partial(inspect_layout, layout), partial(_tasks, layout, title))


def _tasks(name: str, title: str, root: Path) -> list[Protocol]:
    layout = find_layout(name, root)
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


ISIC_4 = _contribution("isic-4", "ISIC-4", ["BCC+AK+BKL+SCC"])
SKIN_40 = _contribution("skin-40", "Skin-40", ["other classes"])
NCT_CRC = _contribution("nct-crc", "NCT-CRC", map("+".join, OOD_TRIPLES))
