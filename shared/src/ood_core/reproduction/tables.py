"""Published tables as data, and our figures beside them: the difference, and a flag where it is no chance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ood_core.errors import unknown_name

__all__ = ["MARGIN", "Beside", "beside", "difference_cells", "figure_cell", "legend", "percent", "published_table"]


def published_table(package: str, number: int) -> dict[str, Any]:
    """A table of a method's paper: `published/table<number>.json` of the method's package.

    Args:
        package: that has the tables.
        number: of the table.

    Raises:
        UsageError: the package has no table of this number.

    Example:
        >>> published_table("ood_setar", 4)["rows"][0]["average"]  # doctest: +SKIP
        57.27
    """
    folder = files(package) / "published"
    file = folder / f"table{number}.json"
    if not file.is_file():
        known = [name for name in sorted(one.name for one in folder.iterdir()) if name.startswith("table")]
        raise unknown_name("table of the paper", str(number), [name[5:-5] for name in known])
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


MARGIN = 1.5
"""Percent points by which a figure may differ from the published one before it is flagged."""

Figures = Mapping[str, Mapping[str, float]]
"""Place (an OOD set, "average", ...) -> measure -> percent."""


@dataclass(frozen=True)
class Beside:
    """One of our figures beside the published one, in percent.

    Attributes:
        row: method or setting.
        place: OOD set, "average" or what else the table has columns for.
        measure: "auroc", "fpr95", "accuracy", ...
        ours: our figure.
        published: the published one.
    """

    row: str
    place: str
    measure: str
    ours: float
    published: float

    @property
    def difference(self) -> float:
        """Ours minus the published, percent points."""
        return self.ours - self.published

    @property
    def off(self) -> bool:
        """Whether it is further away than `MARGIN`."""
        return abs(self.difference) > MARGIN

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = {name: getattr(self, name) for name in ("row", "place", "measure", "ours", "published")}
        return own | {"difference": round(self.difference, 4), "off": self.off}


def beside(row: str, ours: Figures, published: Mapping[str, Mapping[str, float] | None]) -> list[Beside]:
    """The figures that both have; None are the published ones of a place that was left out there.

    Example:
        >>> beside("MCM", {"SUN": {"auroc": 92.0}}, {"SUN": {"auroc": 92.57, "fpr95": 37.6}})[0].difference
        -0.5699999999999932
    """
    known = {place: measures or {} for place, measures in published.items()}
    return [
        Beside(row, place, measure, value, known[place][measure])
        for place, measures in ours.items()
        for measure, value in measures.items()
        if known.get(place, {}).get(measure) is not None
    ]


def difference_cells(found: Sequence[Beside], places: Sequence[str], measures: Sequence[str]) -> list[str]:
    """A table row of differences, a cell per place, measures apart by " / ", figures that are off marked with "!".

    Example:
        >>> difference_cells([Beside("MCM", "SUN", "auroc", 90.0, 92.57)], ["SUN", "Places"], ["fpr95", "auroc"])
        ['- / -2.57!', '']
    """
    by_place = {place: {one.measure: one for one in found if one.place == place} for place in places}
    return [
        " / ".join(_cell(own[measure]) if measure in own else "-" for measure in measures) if own else ""
        for own in by_place.values()
    ]


def _cell(one: Beside) -> str:
    return f"{one.difference:+.2f}{'!' if one.off else ''}"


def legend(found: Sequence[Beside]) -> str:
    """How many figures are off, in a sentence.

    Example:
        >>> legend([Beside("MCM", "SUN", "auroc", 90.0, 92.57)])
        '1 of 1 figures is more than 1.5 points from the published one (marked !): MCM, SUN, auroc by -2.57.'
    """
    if not found:
        return "No published figure belongs to these rows."
    off = sorted((one for one in found if one.off), key=lambda one: -abs(one.difference))
    if not off:
        return f"All {len(found)} figures are within {MARGIN} points of the published ones."
    worst = off[0]
    return (
        f"{len(off)} of {len(found)} figures {'is' if len(off) == 1 else 'are'} more than {MARGIN} points from the "
        f"published one{'' if len(off) == 1 else 's'} (marked !)"
        f"{'' if len(off) == 1 else ', most'}: {worst.row}, {worst.place}, {worst.measure} by {worst.difference:+.2f}."
    )


def figure_cell(
    figures: Mapping[str, float] | None, measures: Sequence[str] = ("fpr95", "auroc"), *, apart: str = "±"
) -> str:
    """Figures in percent as a cell of a table, with their standard deviations where there are any; "" for None.

    Args:
        figures: by measure, "auroc", and its deviation, "auroc_std".
        measures: those shown.
        apart: between a figure and its deviation.

    Example:
        >>> figure_cell({"fpr95": 30.0, "auroc": 92.5, "auroc_std": 0.25})
        '30.00 / 92.50±0.25'
    """
    if figures is None:
        return ""
    spreads = {
        name: f"{apart}{std:.2f}" if (std := figures.get(f"{name}_std")) is not None else "" for name in measures
    }
    return " / ".join(f"{figures[name]:.2f}{spreads[name]}" for name in measures)


def percent(figure: Mapping[str, Any] | None) -> str:
    """A `spread` of fractions for a table, in percent; "" for None.

    Example:
        >>> percent({"mean": 0.5, "std": 0.0123}), percent({"mean": 0.5, "std": None})
        ('50.00±1.23', '50.00')
    """
    if figure is None:
        return ""
    return f"{100 * figure['mean']:.2f}" + ("" if figure["std"] is None else f"±{100 * figure['std']:.2f}")
