"""Pictures side by side with titles and legends, drawn with Pillow alone."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

# Okabe and Ito's colours, which the colour-blind can tell apart; the first ones are those of the report.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#1b1f24")
OTHER = "#c3c9d0"
SCALE = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")  # viridis, dark to light
_PAPER, _INK, _MUTED = "#ffffff", "#1b1f24", "#5d6670"
_GAP, _HEADLINE, _TITLE, _ROW = 20, 34, 26, 20


class Panel(NamedTuple):
    """A picture, its title above it, and below it lines of (colour of a swatch or None, text)."""

    title: str
    picture: Image.Image
    lines: Sequence[tuple[str | None, str]]


def side_by_side(headline: str, panels: Sequence[Panel]) -> Image.Image:
    """All panels, of equal height, in a row under a headline; a text that is too long is cut."""
    rows = max(len(panel.lines) for panel in panels)
    top = _GAP + _HEADLINE + _TITLE
    bottom = top + panels[0].picture.height
    width = sum(panel.picture.width + _GAP for panel in panels) + _GAP
    page = Image.new("RGB", (width, bottom + _GAP // 2 + rows * _ROW + _GAP), _PAPER)
    draw = ImageDraw.Draw(page)
    _write(draw, (_GAP, _GAP), headline, width - 2 * _GAP, 20)
    left = _GAP
    for title, picture, lines in panels:
        page.paste(picture, (left, top))
        _write(draw, (left, top - _TITLE), title, picture.width, 15)
        for row, (color, text) in enumerate(lines):
            y, indent = bottom + _GAP // 2 + row * _ROW, 0
            if color:
                indent = 20
                draw.rectangle((left, y + 2, left + 12, y + 14), fill=color, outline=_MUTED)
            _write(draw, (left + indent, y), text, picture.width - indent, 14)
        left += picture.width + _GAP
    return page


def verdict(is_ood: bool | None, score: float, threshold: float | None, predicted: str) -> str:
    """The headline of an explanation: decision, score and class."""
    decision = {None: "No decision", False: "In-distribution", True: "Out-of-distribution"}[is_ood]
    limit = "not calibrated" if threshold is None else f"threshold {threshold:.4f}"
    return f"{decision}  ·  score {score:.4f} ({limit})  ·  predicted class: {printable(predicted)}"


def class_map(title: str, classes: np.ndarray, names: Sequence[str], cell: int) -> Panel:
    """A class number per patch [h, w] as colours, the most frequent classes in the legend."""
    counts = Counter(classes.flatten().tolist()).most_common()
    shown = dict(zip((index for index, _ in counts), COLORS, strict=False))
    lines: list[tuple[str | None, str]] = [
        (color, f"{count}  {printable(names[index])}") for (index, count), color in zip(counts, COLORS, strict=False)
    ]
    if rest := counts[len(shown) :]:
        lines.append((OTHER, f"{sum(count for _, count in rest)}  {len(rest)} others"))
    colors = [[shown.get(index, OTHER) for index in row] for row in classes.tolist()]
    return Panel(title, blocks(rgb(colors), cell), lines)


def heat_map(title: str, values: np.ndarray, about: str, cell: int) -> Panel:
    """A value per patch [h, w], from its own lowest (dark) to its own highest (light)."""
    lines = [(SCALE[-1], f"max {values.max():.4g}"), (SCALE[0], f"min {values.min():.4g}"), (None, about)]
    return Panel(title, blocks(heat(values), cell), lines)


def bars(values: Sequence[float], colors: Sequence[str], side: int) -> Image.Image:
    """A square picture of columns side by side, the largest as high as the picture; a value of 0 is a line."""
    picture = Image.new("RGB", (side, side), _PAPER)
    draw, width, top = ImageDraw.Draw(picture), side / len(values), max(values) or 1
    for place, (value, color) in enumerate(zip(values, colors, strict=True)):
        left, right = round(place * width), round((place + 1) * width)
        gap = min(8, (right - left) // 6)
        draw.rectangle((left + gap, side - 1 - round(value / top * (side - 1)), right - 1 - gap, side - 1), fill=color)
    return picture


def histogram(values: Sequence[float], marks: Sequence[tuple[str, float]], side: int, bins: int = 24) -> Image.Image:
    """How often values occur, as columns from the least to the largest, with lines (colour, value) across it."""
    low, high = (limit([*values, *(value for _, value in marks)]) for limit in (min, max))
    counts = np.histogram(np.asarray(values), bins=bins, range=(low, high if high > low else low + 1))[0].tolist()
    picture = bars(counts, [OTHER] * bins, side)
    draw = ImageDraw.Draw(picture)
    for color, value in marks:
        x = 2 + round((value - low) / (high - low or 1) * (side - 5))
        draw.rectangle((x - 2, 0, x + 2, side - 1), fill=_PAPER)
        draw.rectangle((x - 1, 0, x + 1, side - 1), fill=color)
    return picture


def grid(pictures: Sequence[Image.Image], side: int) -> Image.Image:
    """Pictures row by row in a square, each whole and centred in its place."""
    columns = math.ceil(math.sqrt(len(pictures)))
    page, cell = Image.new("RGB", (side, side), _PAPER), side // columns
    for place, picture in enumerate(pictures):
        small = ImageOps.contain(picture, (cell - 4, cell - 4))
        row, column = divmod(place, columns)
        page.paste(small, (column * cell + (cell - small.width) // 2, row * cell + (cell - small.height) // 2))
    return page


def blocks(colors: np.ndarray, cell: int) -> Image.Image:
    """A picture of one square of `cell` pixels per colour, [h, w, 3] in [0, 255]."""
    height, width = colors.shape[:2]
    small = Image.fromarray(np.rint(colors).astype(np.uint8))
    return small.resize((width * cell, height * cell), Image.Resampling.NEAREST)


def heat(values: np.ndarray) -> np.ndarray:
    """Colours [h, w, 3] from the lowest (dark) to the highest (light) of the values [h, w]."""
    low, high = values.min(), values.max()
    place = (values - low) / (high - low or 1) * (len(SCALE) - 1)
    return np.stack([np.interp(place, range(len(SCALE)), channel) for channel in rgb(SCALE).T], -1)


def rgb(colors: Any) -> np.ndarray:
    """[..., 3] in [0, 255] of nested lists of "#rrggbb"."""
    names = np.array(colors)
    return np.array([ImageColor.getrgb(name) for name in names.flat]).reshape(*names.shape, 3)


def outline(picture: Image.Image, places: Iterable[tuple[int, int]], cell: int, color: str) -> None:
    """Outline the patches at (row, column) with a hair of white around the colour, to be seen on any ground."""
    draw = ImageDraw.Draw(picture)
    for row, column in places:
        x, y = column * cell, row * cell
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=_PAPER)
        draw.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), outline=color, width=max(2, cell // 12))


def printable(name: str) -> str:
    """A name in ASCII on one line: Pillow's own font has no other letters."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return " ".join(letters.split()) or "?"


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, size: int) -> None:
    font = _font(size)
    if font.getlength(text) > width:
        while text and font.getlength(f"{text}…") > width:
            text = text[:-1]
        text += "…"
    draw.text(place, text, fill=_INK, font=font)
