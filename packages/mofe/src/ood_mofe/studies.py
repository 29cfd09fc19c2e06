"""Studies of the paper that look beyond one average per row: frozen backbones at their best, classes one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ood_core.metrics import auroc, fpr_at_tpr
from ood_core.scores import ScoreTable

from ood_mofe.runner import Bench, Setting, summarise

__all__ = ["by_class", "class_figures", "extremes", "pilot"]

_SHOWN = 5  # classes at either end


def pilot(benches: Sequence[Bench], settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Every backbone, frozen, with the score of the highest average AUROC.

    Args:
        benches: one per backbone.
        settings: methods that train nothing but a probe, by name.

    Returns:
        `summarise` of each backbone's best score, under "SPEC: NAME", with "backbone", "score" (the name), and
        "scores", the average figures of all.
    """
    results = {}
    for bench in benches:
        found = {name: summarise(bench.runs(setting), setting.score) for name, setting in settings.items()}
        best = max(found, key=lambda name: found[name]["average"]["auroc"]["mean"])
        spec = bench.backbone.spec
        averages = {name: row["average"] for name, row in found.items()}
        results[f"{spec}: {best}"] = {**found[best], "backbone": spec, "score": best, "scores": averages}
    return results


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


def class_figures(bench: Bench, setting: Setting) -> list[dict[str, Any]]:
    """`by_class` of a setting, means over its seeds, in the order of the classes.

    Args:
        bench: whose runs are finished or will be.
        setting: a row.

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
        for label in sorted(set.intersection(*map(set, found)))
    ]


def extremes(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The classes that the last row tells worst and best from OOD images, as a table of all rows.

    Args:
        results: rows with "classes", as `class_figures` gives them.

    Returns:
        The heading and the lines, in percent.
    """
    rows = [row["classes"] for row in results.values()]
    order = sorted(range(len(rows[-1])), key=lambda place: rows[-1][place]["auroc"])
    places = [("worst", place) for place in order[:_SHOWN]] + [("best", place) for place in order[_SHOWN:][-_SHOWN:]]
    lines = [
        [f"{end}: {rows[-1][place]['name']}"]
        + [f"{100 * row[place]['fpr95']:.2f} / {100 * row[place]['auroc']:.2f}" for row in rows]
        for end, place in places
    ]
    return ["FPR95 / AUROC of a class", *results], lines
