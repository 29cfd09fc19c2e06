"""The HTML report of an evaluation: one self-contained file, without script or outside resource.

First the data preparation (pure functions on scores, numbers out), then charts (inline SVG), then the page.
"""

from __future__ import annotations

__all__ = ["write_report"]

import base64
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from PIL import Image

from ood_core._files import write_atomically
from ood_core.errors import DataError, UsageError

OpenImage: TypeAlias = Callable[[str, str], Image.Image | None]
Figures: TypeAlias = Mapping[str, Any]

_THUMBNAIL = 192
_COLORS = 5
_DASHES = ("", "7 3", "2 2.5")
_SHOWN_ELSEWHERE = ("average", "per_set", "convention", "id_accuracy")
_CONVENTIONS = {
    "standard": "the share of OOD images accepted at the highest threshold that accepts at least 95 % of ID",
    "released": "the share of OOD images accepted at about 95 % of ID (rule of the released SeTAR code)",
    "openood": "the share of ID images rejected at the threshold that rejects 95 % of OOD",
}


def write_report(
    path: str | Path,
    results: Mapping[str, Any],
    table: pd.DataFrame,
    open_image: OpenImage | None = None,
    *,
    title: str = "Out-of-distribution detection report",
    mistakes: int = 8,
) -> Path:
    """Write the report of an evaluation as one HTML file (atomic).

    Detectors are listed by average AUROC, best first.

    Args:
        path: the file to write.
        results: the content of results.json; every figure a fraction.
        table: columns id, source, label, status and one float column per detector (higher = more ID).
        open_image: (source, id) -> the image for a thumbnail, or None; without it there are no thumbnails.
        title: heading of the page.
        mistakes: how many of the most confident mistakes to show of each kind; 0 leaves the section out.

    Returns:
        `path`.

    Raises:
        UsageError: `mistakes` below 0.
        DataError: no detector in `results`, or a column missing from `table`.

    Example:
        >>> write_report("report.html", results, table)  # doctest: +SKIP
    """
    if mistakes < 0:
        raise UsageError(f"mistakes={mistakes}: give 0 or more.")
    if not results.get("detectors"):
        raise DataError("These results hold no detector to report on.")
    if missing := [name for name in ("id", "source", "label", "status") if name not in table]:
        raise DataError(f"The score table lacks the columns {missing}.")
    page = _page(results, table, open_image, title, mistakes)
    path = Path(path)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


# Data preparation.


def rank_detectors(detectors: Figures) -> list[str]:
    """Names by average AUROC, best first; those without one last."""
    return sorted(detectors, key=lambda name: -np.nan_to_num(fraction(detectors[name].get("average"), "auroc"), nan=-1))


def set_names(results: Figures, table: pd.DataFrame) -> list[str]:
    """Every OOD set of the data, the figures or the table, in order of appearance."""
    described = (results.get("data") or {}).get("ood") or {}
    measured = [name for figures in results["detectors"].values() for name in figures.get("per_set") or {}]
    return [name for name in dict.fromkeys([*described, *measured, *table["source"].dropna()]) if name != "id"]


def fraction(figures: Figures | None, key: str) -> float:
    """A figure as float; NaN where there is none."""
    value = (figures or {}).get(key)
    return math.nan if value is None else float(value)


def best(values: Sequence[float], *, higher: bool) -> list[bool]:
    """Which figures are the best as printed (ties included); none without a rival."""
    shown = np.array([float(f"{100 * value:.1f}") for value in values])
    if np.isfinite(shown).sum() < 2:
        return [False] * len(shown)
    return list(shown == (np.nanmax(shown) if higher else np.nanmin(shown)))


def scored_rows(table: pd.DataFrame, detector: str) -> pd.DataFrame:
    """The rows with a score of this detector; none if the table has no such column."""
    if detector not in table:
        return table.iloc[:0].assign(**{detector: 0.0})
    return table[(table["status"] == "ok") & table[detector].notna()]


def scores_by_source(table: pd.DataFrame, detector: str) -> dict[str, np.ndarray]:
    """Scores of each set, float64 without NaN; infinities stay."""
    rows = scored_rows(table, detector)
    scores = rows[detector].to_numpy(np.float64)
    # On an array of objects: pandas' own strings, so its groups, cannot hold a lone surrogate.
    places, sources = pd.factorize(rows["source"].to_numpy(object))
    return {source: scores[places == place] for place, source in enumerate(sources)}


def score_range(groups: Iterable[np.ndarray]) -> tuple[float, float]:
    """A range that holds the middle 99 % of every group, never empty; infinities do not widen it."""
    finite = [kept for group in groups if len(kept := group[abs(group) < 1e300])]
    if not finite:
        return 0.0, 1.0
    low = min(float(np.quantile(group, 0.005)) for group in finite)
    high = max(float(np.quantile(group, 0.995)) for group in finite)
    if low == high:
        low, high = min(float(group.min()) for group in finite), max(float(group.max()) for group in finite)
    scale = max(abs(low), abs(high))
    pad = (0.01 * scale or 1.0) if high - low <= 1e-9 * scale else 0.0
    return low - pad, high + pad


def histogram(scores: np.ndarray, low: float, high: float, bins: int = 40) -> np.ndarray:
    """Counts in equal bins, int [bins]; the end bins also hold what lies beyond, so they sum to N."""
    place = (np.clip(scores, low, high) - low) / (high - low) * bins
    return np.bincount(np.minimum(place.astype(np.int64), bins - 1), minlength=bins)


def roc_points(known: np.ndarray, unknown: np.ndarray, limit: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """The ROC curve with ID positive as at most `limit` points, evenly spread along it.

    Returns:
        (share of OOD accepted, share of ID accepted), from (0, 0) to (1, 1).
    """
    thresholds = np.unique(np.concatenate([known, unknown]))[::-1]
    curve = np.zeros((2, len(thresholds) + 1))
    for row, scores in zip(curve, (unknown, known), strict=True):
        row[1:] = (len(scores) - np.searchsorted(np.sort(scores), thresholds)) / len(scores)
    kept = np.unique(np.searchsorted(curve.sum(axis=0), np.linspace(0, 2, limit)))
    return curve[0, kept], curve[1, kept]


def confident_mistakes(table: pd.DataFrame, detector: str, count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The `count` highest OOD rows and the `count` lowest ID rows; ties in table order."""
    rows = scored_rows(table, detector)
    known = rows["source"] == "id"
    highest = rows[~known].sort_values(detector, ascending=False, kind="stable").head(count)
    return highest, rows[known].sort_values(detector, kind="stable").head(count)


def failures(table: pd.DataFrame, detectors: Iterable[str]) -> list[tuple[str, str, int, str]]:
    """(source, reason, images, id of the first) of images without a score, most frequent first."""
    found: dict[tuple[str, str], list[str]] = {}
    failed = table["status"] != "ok"
    for row in table[failed].itertuples():
        found.setdefault((row.source, str(row.status)), []).append(row.id)
    for name in detectors:
        silent = table[~failed & table[name].isna()] if name in table else table.iloc[:0]
        for row in silent.itertuples():
            found.setdefault((row.source, f"no score from {name}"), []).append(row.id)
    counted = [(source, reason, len(ids), ids[0]) for (source, reason), ids in found.items()]
    return sorted(counted, key=lambda row: -row[2])


def ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Round values in [low, high] with their texts."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= (high - low) * 0.999)
    values = np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step + 0.0
    size = max(abs(low), abs(high))
    digits = math.floor(math.log10(size)) - math.floor(math.log10(step))
    style = f".{max(0, -math.floor(math.log10(step) + 1e-9))}f" if 1e-4 <= size < 1e6 else f".{max(digits, 0)}e"
    return [(float(value), re.sub(r"e([+-])0?", r"e\1", format(value, style))) for value in values]


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, text) pairs, the names of the levels joined; empty values are left out."""
    if isinstance(value, Mapping):
        return [pair for key, part in value.items() for pair in flatten(part, f"{name} {key}".strip())]
    if isinstance(value, list | tuple) and any(isinstance(part, Mapping | list | tuple) for part in value):
        return flatten({str(place): part for place, part in enumerate(value, 1)} if len(value) > 1 else value[0], name)
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return [] if value is None or value == "" else [(name, f"{value:.6g}" if isinstance(value, float) else str(value))]


# Text.

# Controls, lone surrogates and direction overrides: shown as escapes, for no page should hold them raw.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def _text(value: object) -> str:
    shown = _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))
    return html.escape(shown)


def _short(value: object, length: int = 30) -> str:
    """Escaped, with hashes cut to 12 digits and a long text to its end; the whole in a tooltip."""
    whole = str(value)
    text = re.sub(r"[0-9a-f]{16,}", lambda found: f"{found[0][:12]}…", whole)
    text = text if len(text) <= length else f"…{text[1 - length :]}"
    return _text(text) if text == whole else f'<span title="{_text(whole)}">{_text(text)}</span>'


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else "–"


def _with_unit(value: float) -> str:
    return f"{_percent(value)}\u00a0%"


def _interval(figures: Figures | None, metric: str) -> str:
    low, high = fraction(figures, f"{metric}_low"), fraction(figures, f"{metric}_high")
    return f"<small>{_percent(low)}–{_percent(high)}</small>" if math.isfinite(low + high) else ""


# Charts.


@dataclass(frozen=True)
class _Axes:
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
        share = (value - self.x[0]) / (self.x[1] - self.x[0])
        return self.left + share * (self.width - self.left - self.right)

    def at_y(self, value: Any) -> Any:
        share = (value - self.y[0]) / (self.y[1] - self.y[0])
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def svg(self, drawing: str, x_label: str, y_label: str, about: str, *, x_scale: float = 1) -> str:
        """The drawing in its frame; y is a fraction shown as percent, x is too with `x_scale=100`."""
        base, right = self.height - self.bottom, self.width - self.right
        across = ticks(x_scale * self.x[0], x_scale * self.x[1], 5)
        every = math.ceil(sum(len(text) + 2 for _, text in across) * 6 / (right - self.left))
        marks = [
            f'<text x="{self.at_x(value / x_scale):.1f}" y="{base + 14}">{text}</text>'
            for value, text in across[::every]
        ]
        for value, text in ticks(100 * self.y[0], 100 * self.y[1], 4):
            y = self.at_y(value / 100)
            marks.append(f'<path class="line" d="M{self.left} {y:.1f}H{right}"/>')
            marks.append(f'<text class="end" x="{self.left - 5}" y="{y + 3.5:.1f}">{text}</text>')
        middle = (self.top + base) / 2
        marks.append(f'<text x="{(self.left + right) / 2:.0f}" y="{self.height - 4}">{x_label}</text>')
        marks.append(f'<text transform="translate(9 {middle:.0f}) rotate(-90)">{y_label}</text>')
        box = f'viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{_text(about)}"'
        return f"<svg {box}>{''.join(marks)}{drawing}</svg>"


def _style(place: int) -> str:
    """Colour and dash of the set at this place of the list."""
    dash = _DASHES[place // _COLORS % len(_DASHES)]
    return f'class="set c{place % _COLORS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _swatch(place: int) -> str:
    return f'<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true"><path {_style(place)} d="M0 4H22"/></svg>'


def _steps(axes: _Axes, shares: np.ndarray) -> str:
    """The outline of a histogram as path data."""
    edges = axes.at_x(np.linspace(*axes.x, len(shares) + 1))
    body = "".join(f"V{y:.1f}H{x:.1f}" for y, x in zip(axes.at_y(shares), edges[1:], strict=True))
    return f"M{edges[0]:.1f} {axes.at_y(0):.1f}{body}V{axes.at_y(0):.1f}Z"


def _histogram_chart(
    known: np.ndarray,
    unknown: np.ndarray,
    span: tuple[float, float],
    place: int,
    threshold: float,
    about: str,
) -> str:
    shares = [histogram(scores, *span) / max(len(scores), 1) for scores in (known, unknown)]
    axes = _Axes(200, 124, span, (0.0, max(float(np.max(shares)), 1e-3)))
    drawing = f'<path class="id" d="{_steps(axes, shares[0])}"/>'
    drawing += f'<path class="set c{place % _COLORS}" d="{_steps(axes, shares[1])}"/>'
    if span[0] <= threshold <= span[1]:
        drawing += f'<path class="threshold" d="M{axes.at_x(threshold):.1f} {axes.top}V{axes.at_y(0):.1f}"/>'
    return axes.svg(drawing, "score", "% of images", about)


def _roc_chart(curves: Mapping[int, tuple[np.ndarray, np.ndarray]], convention: str, about: str) -> str:
    """The curves by place of the set, and the line on which FPR95 is read."""
    axes = _Axes(300, 280, (0.0, 1.0), (0.0, 1.0))
    ends = [(0.05, 0.0), (0.05, 1.0)] if convention == "openood" else [(0.0, 0.95), (1.0, 0.95)]
    (x, y), (to_x, to_y) = [(axes.at_x(a), axes.at_y(b)) for a, b in ends]
    drawing = f'<path class="threshold" d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}"/>'
    for place, (shares, accepted) in curves.items():
        points = zip(axes.at_x(shares), axes.at_y(accepted), strict=True)
        drawing += f'<polyline {_style(place)} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>'
    return axes.svg(drawing, "OOD accepted, %", "ID accepted, %", about, x_scale=100)


# The page.


def _page(results: Figures, table: pd.DataFrame, open_image: OpenImage | None, title: str, mistakes: int) -> str:
    detectors, sets = rank_detectors(results["detectors"]), set_names(results, table)
    sections = [
        _headline(results, table, detectors, sets, title),
        _results(results, detectors, sets),
        _charts(results, table, detectors, sets),
        _mistakes(table, detectors[0], sets, open_image, mistakes) if mistakes else "",
        _failures(table, detectors),
        _provenance(results),
    ]
    return _HEAD.replace("TITLE", _text(title)) + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"


def _headline(results: Figures, table: pd.DataFrame, detectors: list[str], sets: list[str], title: str) -> str:
    data = results.get("data") or {}
    convention = data.get("convention", "standard")
    rule = _CONVENTIONS.get(convention, "the false positive rate at 95 % true positives")
    held = [(len(detectors), "detector"), (len(sets), "OOD set"), (len(table), "image")]
    counts = " · ".join(f"{count:,} {name}{'s' * (count != 1)}" for count, name in held)
    notes = "".join(f"<p>{_text(note)}</p>" for note in data.get("notes") or ())
    return f"""<header><p class="muted">{counts}</p><h1>{_text(title)}</h1>
<p class="lead">{_lead(detectors[0], results["detectors"][detectors[0]])}</p>
<p>A higher score means more in-distribution (ID). AUROC is the chance that an ID image scores above an
out-of-distribution (OOD) image; 50 % is guessing. FPR95 is {rule} (convention “{_text(convention)}”).</p>
{notes}</header>"""


def _lead(name: str, entry: Figures) -> str:
    """The best detector in a sentence or two."""
    auroc, fpr95 = (fraction(entry.get("average"), metric) for metric in ("auroc", "fpr95"))
    if not math.isfinite(auroc):
        return "No detector has an average AUROC."
    lead = f"<strong>{_text(name)}</strong> has the best average AUROC, {_with_unit(auroc)}"
    lead += f" (FPR95 {_with_unit(fpr95)})."
    per_set = {key: fraction(figures, "auroc") for key, figures in (entry.get("per_set") or {}).items()}
    if len(per_set) < 2:
        return lead
    hardest = min(per_set, key=lambda key: np.nan_to_num(per_set[key], nan=2))
    return f"{lead} Its hardest set is <strong>{_text(hardest)}</strong>, AUROC {_with_unit(per_set[hardest])}."


def _results(results: Figures, detectors: list[str], sets: list[str]) -> str:
    entries, data = results["detectors"], results.get("data") or {}
    heads, columns = ["Average"], [{name: entries[name].get("average") for name in detectors}]
    for name in sets:
        own = {detector: (entries[detector].get("per_set") or {}).get(name) for detector in detectors}
        size = next((f"{figures['n']:,}" for figures in own.values() if figures and "n" in figures), "")
        kind = _text((data.get("set_kinds") or {}).get(name, ""))
        heads.append(f"{_text(name)}<small>{' · '.join(filter(None, (kind, size)))}</small>")
        columns.append(own)
    accuracy = {name: {"auroc": entries[name].get("id_accuracy")} for name in detectors}
    extra = [accuracy] if any(figures["auroc"] is not None for figures in accuracy.values()) else []
    heads += ["ID accuracy"] * len(extra)
    top = "".join(f'<th scope="col"><div>{head}</div></th>' for head in ["Detector", *heads])
    groups = _figure_rows("AUROC, %", "auroc", columns + extra, detectors, higher=True)
    groups += _figure_rows("FPR95, %", "fpr95", columns + [None] * len(extra), detectors, higher=False)
    intervals = " Small: 95 % bootstrap intervals." if "</small></td>" in groups else ""
    return f"""<section><h2>Results</h2><div class="wide"><table class="figures"><thead><tr>{top}</tr></thead>
{groups}</table></div>
<p class="muted">Bold: best of the column. Under a set: its kind and size.{intervals}</p>
</section>"""


def _figure_rows(
    heading: str, metric: str, columns: Sequence[Figures | None], detectors: list[str], *, higher: bool
) -> str:
    """A group of rows, one per detector; a column of None stays empty."""
    rows = [f'<th scope="row"><a href="#d{row}">{_text(name)}</a></th>' for row, name in enumerate(detectors)]
    for figures in columns:
        values = [fraction((figures or {}).get(name), metric) for name in detectors]
        for row, top in enumerate(best(values, higher=higher)):
            own = (figures or {}).get(detectors[row])
            cell = _percent(values[row]) + _interval(own, metric) if figures else ""
            rows[row] += f'<td class="best">{cell}</td>' if top else f"<td>{cell}</td>"
    hint = f'<span class="muted">{"higher" if higher else "lower"} is better</span>'
    title = f'<tr><th scope="rowgroup" colspan="{len(columns) + 1}">{heading} {hint}</th></tr>'
    return f"<tbody>{title}{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody>"


def _charts(results: Figures, table: pd.DataFrame, detectors: list[str], sets: list[str]) -> str:
    convention = (results.get("data") or {}).get("convention", "standard")
    blocks = [
        _detector(row, name, results["detectors"][name], scores_by_source(table, name), sets, convention)
        for row, name in enumerate(detectors)
    ]
    return f"""<section><h2>Scores of each detector</h2><p>ROC curves, with the dashed line on which FPR95
is read, and the scores of each OOD set (coloured) against those of the <span class="key"></span> ID images.
Right is more in-distribution, the end bins hold all that lies beyond, the dashed line is the threshold.</p>
{"".join(blocks)}</section>"""


def _detector(
    row: int, name: str, entry: Figures, scores: Mapping[str, np.ndarray], sets: list[str], convention: str
) -> str:
    known, span = scores.get("id", np.empty(0)), score_range(scores.values())
    curves, legend, panels = {}, [], []
    for place, title in enumerate(sets):
        unknown = scores.get(title, np.empty(0))
        auroc = _percent(fraction((entry.get("per_set") or {}).get(title), "auroc"))
        label = f"{_swatch(place)} <span>{_text(title)}</span>"
        legend.append(f"<li>{label} <b>{auroc}</b></li>")
        if len(known) and len(unknown):
            curves[place] = roc_points(known, unknown)
        about = f"{name}: scores of ID against {title}"
        chart = _histogram_chart(known, unknown, span, place, fraction(entry, "threshold"), about)
        panels.append(f"<figure><figcaption>{label}</figcaption>{chart if len(unknown) else _NO_SCORES}</figure>")
    shown = {key: value for key, value in entry.items() if key not in _SHOWN_ELSEWHERE}
    settings = " · ".join(f"{_text(key.removeprefix('params '))} {_short(value, 60)}" for key, value in flatten(shown))
    return f"""<article id="d{row}"><h3>{_text(name)}</h3><p class="muted">{settings}</p><div class="panels">
<figure>{_roc_chart(curves, convention, f"ROC curves of {name}")}<ul>
<li class="muted"><span>OOD set</span> AUROC, %</li>{"".join(legend)}</ul></figure>
<div class="grid{" large" * (len(sets) <= 6)}">{"".join(panels)}</div></div></article>"""


def _mistakes(table: pd.DataFrame, detector: str, sets: list[str], open_image: OpenImage | None, count: int) -> str:
    scores = scores_by_source(table, detector)
    known = scores.pop("id", np.empty(0))
    unknown = np.concatenate([*scores.values(), np.empty(0)])
    highest, lowest = confident_mistakes(table, detector, count)
    above = [(row, f"above {_share(known < row[detector])} of ID") for _, row in highest.iterrows()]
    below = [(row, f"below {_share(unknown > row[detector])} of OOD") for _, row in lowest.iterrows()]
    body = ""
    for heading, found in (
        ("OOD images with the highest scores", above),
        ("ID images with the lowest scores", below),
    ):
        shots = "".join(_shot(row, row[detector], rank, sets, open_image) for row, rank in found)
        body += f'<h3>{heading}</h3><div class="shots">{shots or _NO_SCORES}</div>'
    return f"<section><h2>Most confident mistakes of {_text(detector)}</h2>{body}</section>"


def _share(mask: np.ndarray) -> str:
    return _with_unit(mask.mean()) if len(mask) else "none"


def _shot(row: pd.Series, score: float, rank: str, sets: list[str], open_image: OpenImage | None) -> str:
    picture = _thumbnail(open_image, row["source"], row["id"])
    image = f'<img src="{picture}" alt="{_text(row["id"])}">' if picture else '<div class="none">no image</div>'
    place = sets.index(row["source"]) if row["source"] in sets else None
    source = "ID" if place is None else f"{_swatch(place)} {_text(row['source'])}"
    label = "" if pd.isna(row["label"]) else f"<span>{_text(row['label'])}</span>"
    return f"""<figure>{image}<figcaption><b>{source}</b>{label}<span class="muted">{_short(row["id"])}</span>
<span>{score:.5g}</span><span class="muted">{rank}</span></figcaption></figure>"""


def _thumbnail(open_image: OpenImage | None, source: str, image_id: str) -> str | None:
    """A JPEG data URI, or None: an image that cannot be opened must not cost the report."""
    try:
        image = open_image(source, image_id) if open_image else None
        if image is None:
            return None
        small = image.convert("RGB")
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        small.save(memory := io.BytesIO(), "JPEG", quality=82)
    except Exception:
        return None
    return "data:image/jpeg;base64," + base64.b64encode(memory.getvalue()).decode()


def _failures(table: pd.DataFrame, detectors: list[str], most: int = 20) -> str:
    counted = failures(table, detectors)
    if not counted:
        return "<section><h2>Failures</h2><p>Every image has a score from every detector.</p></section>"
    rows = [
        [_set_name(source), f"{images:,}", _short(reason, 90), _short(example, 50)]
        for source, reason, images, example in counted[:most]
    ]
    hidden = [images for _, _, images, _ in counted[most:]]
    more = f'<p class="muted">And {sum(hidden):,} more, in {len(hidden):,} rows.</p>' if hidden else ""
    body = _plain_table(["Set", "Images", "Reason", "For example"], rows)
    return f"<section><h2>Failures</h2><p>No figure counts these images.</p>{body}{more}</section>"


def _set_name(source: object) -> str:
    return "ID" if source == "id" else _text(source)


def _plain_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{_text(head)}</th>' for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _provenance(results: Figures) -> str:
    data = dict(results.get("data") or {})
    kinds = data.pop("set_kinds", None) or {}
    sets = {"id": data.pop("id", None), **(data.pop("ood", None) or {})}
    data.pop("notes", None)
    held = {name: dict(flatten(value)) for name, value in sets.items()}
    columns = list(dict.fromkeys(key for pairs in held.values() for key in pairs))
    rows = [
        [_set_name(name), _text(kinds.get(name, "")), *(_short(pairs.get(key, "")) for key in columns)]
        for name, pairs in held.items()
    ]
    heads = ["Set", "Kind", *map(str.capitalize, columns)]
    pairs = flatten(data) + flatten(results.get("environment") or {})
    items = "".join(f"<div><dt>{_text(key)}</dt><dd>{_short(value, 60)}</dd></div>" for key, value in pairs)
    return f"""<section><h2>Data and environment</h2>{_plain_table(heads, rows)}
<dl>{items}</dl></section>"""


_NO_SCORES = '<p class="none">no scores</p>'

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --muted: #5d6670; --rule: #dfe3e8;
  --tint: #f4f6f8; --id: #9aa3ad; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #b98900; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e7eb; --muted: #98a2ad;
  --rule: #30363d; --tint: #1d2126; --id: #848f9b; --c0: #56b4e9; --c1: #f0813f; --c2: #2cc295;
  --c3: #e59fc6; --c4: #e3b23c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }
h1, h2, h3, p, dd, figcaption, li > span, article { overflow-wrap: anywhere; }
header, section > p { max-width: 78ch; }
p { margin: 0 0 12px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 12px; }
h2 { font-size: 19px; margin: 48px 0 12px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 28px 0 4px; }
.lead { font-size: 18px; line-height: 1.45; }
.muted, small, dt { color: var(--muted); font-size: 13px; font-weight: 400; }
small { display: block; font-size: 11px; line-height: 14px; white-space: nowrap; }
a { color: inherit; text-decoration-color: var(--muted); text-underline-offset: 3px; }
.wide { overflow-x: auto; margin: 0 0 12px; }
table { border-collapse: separate; border-spacing: 0; font-size: 14px; }
th, td { padding: 6px 16px 6px 0; text-align: left; vertical-align: top; }
th, td { border-bottom: 1px solid var(--rule); }
thead th { font-size: 13px; font-weight: 600; vertical-align: bottom; line-height: 17px; }
tbody th { font-weight: 400; }
th[scope="rowgroup"] { font-weight: 650; padding-top: 18px; line-height: 21px; }
.figures { width: 100%; }
.figures tr > :not(:first-child) { text-align: right; padding: 6px 0 6px 8px; }
.figures thead div { width: max-content; max-width: 8em; overflow-wrap: break-word; }
.figures thead :not(:first-child) > div { margin-left: auto; }
.figures tr > :first-child { position: sticky; left: 0; background: var(--paper); }
.figures tr > :nth-child(2) { border-right: 1px solid var(--rule); padding-right: 14px; }
.best { font-weight: 700; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
.panels { display: grid; grid-template-columns: 290px 1fr; gap: 20px 36px; align-items: start; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 16px 20px; }
svg { display: block; width: 100%; height: auto; font-size: 10.5px; overflow: visible; }
svg text { fill: var(--muted); text-anchor: middle; }
svg text.end { text-anchor: end; }
.line { stroke: var(--rule); fill: none; }
.threshold { stroke: var(--ink); stroke-dasharray: 3 3; fill: none; }
.id { fill: var(--id); fill-opacity: .45; }
.set { stroke: var(--c); stroke-width: 1.5; fill: none; stroke-linejoin: round; }
path.set[d$="Z"] { fill: var(--c); fill-opacity: .22; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
.swatch { display: inline-block; width: 22px; height: 8px; flex: none; vertical-align: middle; }
.swatch path { stroke-width: 2.5; }
.key { display: inline-block; width: 22px; height: 10px; background: var(--id); opacity: .6; }
ul { list-style: none; margin: 6px 0 0; padding: 0 10px 0 34px; font-size: 13px; }
li { display: flex; gap: 8px; align-items: baseline; }
li > span { flex: 1; }
li b { font-weight: 500; }
.grid figcaption { font-size: 13px; line-height: 1.3; margin-bottom: 2px; }
.shots { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: 16px; }
.shots img, .none { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--tint); }
.none { display: grid; place-items: center; color: var(--muted); font-size: 13px; }
.grid .none { aspect-ratio: 200 / 124; }
.shots figcaption { font-size: 12.5px; line-height: 1.4; margin-top: 4px; }
.shots figcaption > * { display: block; }
.shots .muted { font-size: 11.5px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 8px 24px; }
dd { margin: 0; }
@media (min-width: 761px) { .large { grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }
  .large svg { font-size: 8.5px; } }
@media (max-width: 760px) { main { padding: 24px 16px 48px; } .panels { grid-template-columns: 1fr; }
  .grid { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); } }
@media print { main { padding: 0; max-width: none; } .wide { overflow: visible; } body { font-size: 12px; }
  h2, h3 { break-after: avoid; } * { print-color-adjust: exact; } }
</style>
</head>
<body>
<main>
"""
