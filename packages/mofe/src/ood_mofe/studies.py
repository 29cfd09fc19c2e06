"""Studies of the paper that look beyond one average per row: frozen backbones side by side, classes one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ood_core.errors import DataError, UsageError
from ood_core.metrics import auroc, fpr_at_tpr
from ood_core.prompts import read_class_names
from ood_core.protocols import Protocol
from ood_core.scores import ScoreTable

from ood_mofe.groups import smallest_family
from ood_mofe.partition import imagenet_edges
from ood_mofe.runner import Bench, Setting, summarise

__all__ = ["by_class", "class_figures", "every_class", "extremes", "fine_grained", "fine_labels", "pilot"]

_SHOWN = 5  # classes at either end
_FINE = 11  # classes of Fig. 3


def pilot(benches: Sequence[Bench], settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Every backbone, frozen, by each of some scores.

    Args:
        benches: one per protocol and backbone.
        settings: methods that train nothing but a probe, by name, the one that counts first.

    Returns:
        `summarise` of each under "SPEC: NAME", or with several protocols "PROTOCOL, SPEC: NAME", with "protocol",
        "backbone" and "score" (the name); all backbones by the first score, then by the next.
    """
    several = len({bench.protocol.name for bench in benches}) > 1
    return {
        f"{bench.protocol.name}, " * several + f"{bench.backbone.spec}: {name}": {
            **summarise(bench.runs(setting), setting.score),
            "protocol": bench.protocol.name,
            "backbone": bench.backbone.spec,
            "score": name,
        }
        for name, setting in settings.items()
        for bench in benches
    }


def fine_labels(protocol: Protocol, file: str | Path | None = None) -> list[int]:
    """Classes that are hard to tell apart.

    Args:
        protocol: whose ID classes they are.
        file: their names or WordNet ids, one per line; None takes the smallest family of WordNet with at least 11
            of the classes, and of these the first 11.

    Returns:
        Their labels.

    Raises:
        UsageError: no file, and classes that are not known by WordNet ids.
        DataError: a class that is not of the protocol.
    """
    if file is None:
        if not protocol.wnids:
            raise UsageError(f"The classes of {protocol.name} have no WordNet ids: name some with --fine-classes FILE.")
        family = smallest_family(imagenet_edges(), protocol.wnids, _FINE)
        return [protocol.wnids.index(wnid) for wnid in family[:_FINE]]
    names = read_class_names(file)
    known = [*protocol.class_names, *protocol.wnids]
    if strange := [name for name in names if name not in known]:
        raise DataError(f"{str(file)!r} names {strange[0]!r}, which is no class of {protocol.name}.")
    return [known.index(name) % len(protocol.class_names) for name in names]


def fine_grained(benches: Sequence[Bench], setting: Setting, labels: Sequence[int]) -> dict[str, Any]:
    """How well frozen backbones tell the images of a few classes from the OOD sets.

    Args:
        benches: one per backbone.
        setting: a method that trains nothing.
        labels: of the classes.

    Returns:
        By backbone `summarise` of all classes, with "backbone" and "classes", as `class_figures` gives them.

    Source: Fig. 3.
    """
    return {
        bench.backbone.spec: {
            **summarise(bench.runs(setting), setting.score),
            "backbone": bench.backbone.spec,
            "classes": class_figures(bench, setting, labels),
        }
        for bench in benches
    }


def by_class(
    table: ScoreTable, score: str, labels: Mapping[str, int], *, convention: str = "standard"
) -> dict[int, dict[str, float]]:
    """How well the images of each ID class are told from the OOD sets.

    Args:
        table: scores, "id" being the ID test set.
        score: one of its columns.
        labels: class of each ID image, by id.
        convention: of the FPR.

    Returns:
        By class "fpr95" and "auroc" as fractions, means over the OOD sets; classes without a scored image are left
        out.
    """
    known = table.frame[(table.frame["source"] == "id") & (table.frame["status"] == "ok")]
    ood = [table.scores(score, source) for source in table.sources if source != "id"]
    return {
        int(label): {
            "fpr95": fmean(fpr_at_tpr(own.to_numpy(), other, convention=convention) for other in ood),
            "auroc": fmean(auroc(own.to_numpy(), other) for other in ood),
        }
        for label, own in known[score].groupby(known["id"].map(labels))
    }


def class_figures(bench: Bench, setting: Setting, chosen: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """`by_class` of a setting, means over its seeds.

    Args:
        bench: whose runs are finished or will be.
        setting: a row.
        chosen: labels of some classes, in the order wanted; None are all.

    Returns:
        "name", "fpr95" and "auroc" of every class with test images.
    """
    test = bench.protocol.test
    labels = dict(zip(test.ids, map(int, test.labels), strict=True))  # type: ignore[arg-type]  # it has labels
    found = [
        by_class(table, setting.score, labels, convention=bench.convention) for table in bench.score_tables(setting)
    ]
    return [
        {"name": bench.protocol.class_names[label]}
        | {measure: fmean(one[label][measure] for one in found) for measure in ("fpr95", "auroc")}
        for label in (range(len(bench.protocol.class_names)) if chosen is None else chosen)
        if all(label in one for one in found)
    ]


def extremes(results: Mapping[str, Any], head: str = "FPR95 / AUROC") -> tuple[list[str], list[list[str]]]:
    """The classes that the last row tells worst and best from OOD images, as a table of all rows.

    Args:
        results: rows with "classes", as `class_figures` gives them.
        head: what the figures are.

    Returns:
        The heading and the lines, in percent.
    """
    rows = [row["classes"] for row in results.values()]
    order = sorted(range(len(rows[-1])), key=lambda place: rows[-1][place]["auroc"])
    places = [("worst", place) for place in order[:_SHOWN]] + [("best", place) for place in order[_SHOWN:][-_SHOWN:]]
    lines = [[f"{end}: {rows[-1][place]['name']}", *(_cell(row[place]) for row in rows)] for end, place in places]
    return [f"{head} of a class", *results], lines


def every_class(results: Mapping[str, Any], head: str = "FPR95 / AUROC") -> tuple[list[str], list[list[str]]]:
    """All classes of the rows, as a table; arguments and result as of `extremes`."""
    columns = [row["classes"] for row in results.values()]
    lines = [[of_class[0]["name"], *map(_cell, of_class)] for of_class in zip(*columns, strict=True)]
    return [f"{head} of a class", *results], lines


def _cell(figures: Mapping[str, float]) -> str:
    return f"{100 * figures['fpr95']:.2f} / {100 * figures['auroc']:.2f}"
