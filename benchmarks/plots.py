"""The pictures in docs/ that are drawn from benchmark results, as SVG without further libraries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#dddddd"


def svg(width: int, height: int, parts: Sequence[str], about: str) -> str:
    """A drawing on white: pages are shown in light and dark."""
    style = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12"'
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(about)}"'
    background = f'<rect width="{width}" height="{height}" fill="white"/>'
    body = "\n".join([background, *parts])
    return f"<svg {style} {box}>\n{body}\n</svg>\n"


def lines(x: Sequence[float], series: Mapping[str, Sequence[float]], unit: str, about: str) -> str:
    """Curves over x from 0, on an axis from 0."""
    width, height, edge = 640, 320, 48
    top = max(max(values) for values in series.values())
    parts = []
    for level in range(int(top) + 1):
        y = height - edge - level / top * (height - 2 * edge)
        parts.append(f'<path d="M{edge} {y:.1f}H{width - edge}" stroke="{GREY}"/>')
        parts.append(f'<text x="{edge - 16}" y="{y:.1f}">{level}</text>')
    for row, (name, values) in enumerate(series.items()):
        color = (BLUE, ORANGE)[row]
        places = " ".join(
            f"{edge + at / x[-1] * (width - 2 * edge):.1f},{height - edge - value / top * (height - 2 * edge):.1f}"
            for at, value in zip(x, values, strict=True)
        )
        parts.append(f'<polyline points="{places}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{width - edge - 150}" y="{edge + 16 * row}" fill="{color}">{escape(name)}</text>')
    parts.append(f'<text x="{edge}" y="{height - edge + 24}">0</text>')
    parts.append(f'<text x="{width - 2 * edge}" y="{height - edge + 24}">{x[-1]:,.0f} {escape(unit)}</text>')
    return svg(width, height, parts, about)


def dots(rows: Mapping[str, Mapping[str, tuple[float, float, float]]], about: str) -> str:
    """Per row and series a share with its interval, in percent; the axis spans the tens around all of them."""
    series = list(dict.fromkeys(name for row in rows.values() for name in row))
    ends = [end for row in rows.values() for found in row.values() for end in found]
    low, high = math.floor(10 * min(ends)), math.ceil(10 * max(ends))
    left, right, step, top = 290, 20, 20, 44
    width, height = 760, top + step * len(rows) + 12

    def place(value: float) -> float:
        return left + (10 * value - low) / (high - low) * (width - left - right)

    parts = [
        f'<circle cx="{left + 110 * at}" cy="10" r="4" fill="{(BLUE, ORANGE)[at]}"/>'
        f'<text x="{left + 110 * at + 9}" y="14">{escape(name)}</text>'
        for at, name in enumerate(series)
    ]
    for tick in (tenth / 10 for tenth in range(low, high + 1)):
        parts.append(f'<path d="M{place(tick):.1f} {top - 8}V{height - 8}" stroke="{GREY}"/>')
        parts.append(f'<text x="{place(tick):.1f}" y="{top - 14}" text-anchor="middle">{100 * tick:.0f}</text>')
    for at, (name, found) in enumerate(rows.items()):
        y = top + step * at + step / 2
        parts.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for color, label in zip((BLUE, ORANGE), series, strict=False):
            if label in found:
                value, start, end = map(place, found[label])
                parts.append(f'<path d="M{start:.1f} {y:.1f}H{end:.1f}" stroke="{color}" stroke-width="2"/>')
                parts.append(f'<circle cx="{value:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')
    return svg(width, height, parts, about)


def ratios(rows: Mapping[str, float], about: str) -> str:
    """Bars from 1 on a logarithmic axis; below 1 in the other colour."""
    left, right, step, top = 400, 60, 20, 28
    width, height = 760, top + step * len(rows) + 10
    powers = range(math.floor(math.log10(min(rows.values()))), math.ceil(math.log10(max(rows.values()))) + 1)

    def place(value: float) -> float:
        return left + (math.log10(value) - powers[0]) / (powers[-1] - powers[0]) * (width - left - right)

    parts = []
    for power in powers:
        x = place(10**power)
        parts.append(f'<path d="M{x:.1f} {top - 6}V{height - 6}" stroke="{GREY}"/>')
        parts.append(f'<text x="{x:.1f}" y="{top - 12}" text-anchor="middle">{10.0**power:,g}</text>')
    for at, (name, value) in enumerate(rows.items()):
        y, ends = top + step * at, sorted((place(1), place(value)))
        color = BLUE if value >= 1 else ORANGE
        parts.append(f'<text x="{left - 10}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect x="{ends[0]:.1f}" y="{y + 4}" width="{ends[1] - ends[0]:.1f}" height="12" fill="{color}"/>'
        )
        said = f"{value:,.2f}" if value < 10 else f"{value:,.0f}"
        parts.append(f'<text x="{ends[1] + 6:.1f}" y="{y + 14}">{said}</text>')
    return svg(width, height, parts, about)
