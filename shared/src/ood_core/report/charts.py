"""Charts: inline SVG whose colours follow the page's scheme, and bars that are text first."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ood_core.report.figures import histogram
from ood_core.report.markup import escaped, percent

_COLORS = 5
_DASHES = ("", "7 3", "2 2.5")


@dataclass(frozen=True)
class Axes:
    """A plot area in SVG units: the places of values, and ticks and labels around a drawing."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    left: int = 36
    right: int = 10
    top: int = 8
    bottom: int = 32

    def at_x(self, value: Any) -> Any:
        """Where a value, or an array of them, stands across."""
        share = (value - self.x[0]) / (self.x[1] - self.x[0])
        return self.left + share * (self.width - self.left - self.right)

    def at_y(self, value: Any) -> Any:
        """Where a value, or an array of them, stands upwards."""
        share = (value - self.y[0]) / (self.y[1] - self.y[0])
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def svg(self, drawing: str, x_label: str, y_label: str, about: str, *, x_scale: float = 1) -> str:
        """The drawing in its frame; y is a fraction shown as percent, x is too with `x_scale=100`."""
        base, right = self.height - self.bottom, self.width - self.right
        across = ticks(x_scale * self.x[0], x_scale * self.x[1], 5)
        every = math.ceil(sum(len(label) + 2 for _, label in across) * 6 / (right - self.left))
        marks = [
            f'<text x="{self.at_x(value / x_scale):.1f}" y="{base + 14}">{label}</text>'
            for value, label in across[::every]
        ]
        for value, label in ticks(100 * self.y[0], 100 * self.y[1], 4):
            y = self.at_y(value / 100)
            marks.append(f'<path class="line" d="M{self.left} {y:.1f}H{right}"/>')
            marks.append(f'<text class="end" x="{self.left - 5}" y="{y + 3.5:.1f}">{label}</text>')
        middle = (self.top + base) / 2
        marks.append(f'<text x="{(self.left + right) / 2:.0f}" y="{self.height - 4}">{x_label}</text>')
        marks.append(f'<text transform="translate(9 {middle:.0f}) rotate(-90)">{y_label}</text>')
        box = f'viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escaped(about)}"'
        return f"<svg {box}>{''.join(marks)}{drawing}</svg>"


def _style(place: int) -> str:
    """Colour and dash of the set at this place of the list."""
    dash = _DASHES[place // _COLORS % len(_DASHES)]
    return f'class="set c{place % _COLORS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def swatch(place: int) -> str:
    """A piece of the line of the set at this place, for legends."""
    return f'<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true"><path {_style(place)} d="M0 4H22"/></svg>'


def _steps(axes: Axes, shares: np.ndarray) -> str:
    """The outline of a histogram as path data."""
    edges = axes.at_x(np.linspace(*axes.x, len(shares) + 1))
    body = "".join(f"V{y:.1f}H{x:.1f}" for y, x in zip(axes.at_y(shares), edges[1:], strict=True))
    return f"M{edges[0]:.1f} {axes.at_y(0):.1f}{body}V{axes.at_y(0):.1f}Z"


def histogram_chart(
    known: np.ndarray,
    unknown: np.ndarray,
    span: tuple[float, float],
    place: int,
    threshold: float,
    about: str,
) -> str:
    """Shares of ID and OOD scores, and the threshold if it lies between them."""
    shares = [histogram(scores, *span) / max(len(scores), 1) for scores in (known, unknown)]
    axes = Axes(200, 124, span, (0.0, max(float(np.max(shares)), 1e-3)))
    drawing = f'<path class="id" d="{_steps(axes, shares[0])}"/>'
    drawing += f'<path class="set c{place % _COLORS}" d="{_steps(axes, shares[1])}"/>'
    if span[0] <= threshold <= span[1]:
        drawing += f'<path class="threshold" d="M{axes.at_x(threshold):.1f} {axes.top}V{axes.at_y(0):.1f}"/>'
    return axes.svg(drawing, "score", "% of images", about)


def roc_chart(curves: Mapping[int, tuple[np.ndarray, np.ndarray]], convention: str, about: str) -> str:
    """The curves by place of the set, and the line on which FPR95 is read."""
    axes = Axes(300, 280, (0.0, 1.0), (0.0, 1.0))
    ends = [(0.05, 0.0), (0.05, 1.0)] if convention == "openood" else [(0.0, 0.95), (1.0, 0.95)]
    (x, y), (to_x, to_y) = [(axes.at_x(a), axes.at_y(b)) for a, b in ends]
    drawing = f'<path class="threshold" d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}"/>'
    for place, (shares, accepted) in curves.items():
        drawing += f'<polyline {_style(place)} points="{_points(axes, shares, accepted)}"/>'
    return axes.svg(drawing, "OOD accepted, %", "ID accepted, %", about, x_scale=100)


def calibration_chart(
    nominal: Sequence[float],
    accepted: Sequence[float],
    band: tuple[np.ndarray, np.ndarray] | None,
    about: str,
) -> str:
    """Share accepted against the TPR promised, the diagonal, and the band of what chance allows."""
    axes = Axes(200, 190, (0.0, 1.0), (0.0, 1.0))
    drawing = ""
    if band is not None:
        edges = _points(axes, nominal, band[0]), _points(axes, nominal[::-1], band[1][::-1])
        drawing = f'<path class="id" d="M{" ".join(edges)}Z"/>'
    drawing += f'<path class="threshold" d="M{_points(axes, (0, 1), (0, 1))}"/>'
    drawing += f'<polyline class="curve" points="{_points(axes, nominal, accepted)}"/>'
    return axes.svg(drawing, "TPR promised, %", "ID accepted, %", about, x_scale=100)


def _points(axes: Axes, x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> str:
    places = zip(axes.at_x(np.asarray(x)), axes.at_y(np.asarray(y)), strict=True)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in places)


class Bar(NamedTuple):
    """A named AUROC with the ends of its interval, NaN where there is none."""

    name: str
    value: float
    low: float
    high: float


def bars(rows: Sequence[Bar], place: int | None, left: float) -> str:
    """Bars from 50 % (guessing), with whiskers, on a scale from `left` to 100 %.

    A list of names and figures, which stays readable however narrow it is; the drawing is an ornament of it.
    """
    color = "mean" if place is None else f"c{place % _COLORS}"
    items = "".join(f"<li>{_name(row.name)}{_bar(row, left)}<b>{percent(row.value)}</b></li>" for row in rows)
    return f'<ul class="bars {color}" style="--guess:{_place(0.5, left):.1f}%">{items}</ul>'


def _name(name: str) -> str:
    return f'<span title="{escaped(name)}">{escaped(name)}</span>'


def _place(value: float, left: float) -> float:
    return 100 * (value - left) / (1 - left)


def _bar(row: Bar, left: float) -> str:
    if not math.isfinite(row.value):
        return '<span class="bar"></span>'
    spans = [("fill", min(0.5, row.value), max(0.5, row.value))]
    if math.isfinite(row.low + row.high):
        spans.append(("range", row.low, row.high))
    drawn = "".join(f'<i class="{kind}" style="{_extent(start, end, left)}"></i>' for kind, start, end in spans)
    return f'<span class="bar" aria-hidden="true">{drawn}</span>'


def _extent(start: float, end: float, left: float) -> str:
    begin = _place(start, left)
    return f"left:{begin:.1f}%;width:{_place(end, left) - begin:.1f}%"


def ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Round values in [low, high] with their texts."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= (high - low) * 0.999)
    values = np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step + 0.0
    size = max(abs(low), abs(high))
    digits = math.floor(math.log10(size)) - math.floor(math.log10(step))
    style = f".{max(0, -math.floor(math.log10(step) + 1e-9))}f" if 1e-4 <= size < 1e6 else f".{max(digits, 0)}e"
    return [(float(value), re.sub(r"e([+-])0?", r"e\1", format(value, style))) for value in values]
