"""Names and figures as escaped text, and tables of them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

from ood_core.report.figures import Figures, fraction

NO_SCORES = '<p class="none">no scores</p>'

# Controls, lone surrogates and direction overrides: shown as escapes, for no page should hold them raw.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def escaped(value: object) -> str:
    """Any value as text for a page."""
    shown = _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))
    return html.escape(shown)


def short(value: object, length: int = 30) -> str:
    """Escaped, with hashes cut to 12 digits and a long text to its end; the whole in a tooltip."""
    whole = str(value)
    kept = re.sub(r"[0-9a-f]{16,}", lambda found: f"{found[0][:12]}…", whole)
    kept = kept if len(kept) <= length else f"…{kept[1 - length :]}"
    return escaped(kept) if kept == whole else f'<span title="{escaped(whole)}">{escaped(kept)}</span>'


def percent(value: float) -> str:
    """A fraction in percent, a dash for NaN."""
    return f"{100 * value:.1f}" if math.isfinite(value) else "–"


def with_unit(value: float) -> str:
    """A fraction as "12.3 %"."""
    return f"{percent(value)}\u00a0%"


def interval(figures: Figures | None, metric: str) -> str:
    """The interval of a metric in small type; nothing without one."""
    low, high = fraction(figures, f"{metric}_low"), fraction(figures, f"{metric}_high")
    return f"<small>{percent(low)}–{percent(high)}</small>" if math.isfinite(low + high) else ""


def points(difference: float) -> str:
    """A difference of fractions in percentage points, with its sign."""
    shown = f"{100 * difference:+.1f}"
    return "0.0" if float(shown) == 0 else shown.replace("-", "−")


def points_range(low: float, high: float) -> str:
    """An interval of differences."""
    return f"{points(low)} to {points(high)}"


def set_name(source: object) -> str:
    """The name of a set, escaped."""
    return "ID" if source == "id" else escaped(source)


def scroll_box(content: str, about: str) -> str:
    """What may be wider than the page, in a box that scrolls by itself, by touch or by keys."""
    return f'<div class="wide" role="group" tabindex="0" aria-label="{escaped(about)}">{content}</div>'


def plain_table(heads: Sequence[str], rows: Iterable[Sequence[str]], about: str) -> str:
    """A table of escaped cells in a scroll box."""
    top = "".join(f'<th scope="col">{escaped(head)}</th>' for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return scroll_box(f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>", about)
