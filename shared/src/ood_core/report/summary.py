"""The first part of the report: the finding in words, the table of figures, bars, and fusions beside their members."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ood_core.report.charts import Bar, bars, swatch
from ood_core.report.figures import SIGNIFICANT, Figures, Run, bar_range, best, difference, distinguishable, fraction
from ood_core.report.markup import escaped, interval, percent, points, points_range, scroll_box, with_unit

_CONVENTIONS = {
    "standard": "the share of OOD images accepted at the highest threshold that accepts at least 95 % of ID",
    "released": "the share of OOD images accepted at about 95 % of ID (rule of the released SeTAR code)",
    "openood": "the share of ID images rejected at the threshold that rejects 95 % of OOD",
}


def headline(run: Run, title: str) -> str:
    """What was compared, what came out, and how to read it."""
    convention = run.data.get("convention", "standard")
    rule = _CONVENTIONS.get(convention, "the false positive rate at 95 % true positives")
    held = [(len(run.detectors), "detector"), (len(run.sets), "OOD set"), (len(run.table), "image")]
    counts = " · ".join(f"{count:,} {name}{'s' * (count != 1)}" for count, name in held)
    notes = "".join(f"<p>{escaped(note)}</p>" for note in run.data.get("notes") or ())
    return f"""<header><p class="muted">{counts}</p><h1>{escaped(title)}</h1>
<p class="lead">{_lead(run)} {_rivals(run)}</p>
<p>A higher score means more in-distribution (ID). AUROC is the chance that an ID image scores above an
out-of-distribution (OOD) image; 50 % is guessing. FPR95 is {rule} (convention “{escaped(convention)}”).</p>
{notes}</header>"""


def _lead(run: Run) -> str:
    """The best detector in a sentence or two."""
    name, entry = run.detectors[0], run.entry(run.detectors[0])
    auroc, fpr95 = (fraction(entry.get("average"), metric) for metric in ("auroc", "fpr95"))
    if not math.isfinite(auroc):
        return "No detector has an average AUROC."
    lead = f"<strong>{escaped(name)}</strong> has the best average AUROC, {with_unit(auroc)}"
    lead += f" (FPR95 {with_unit(fpr95)})."
    per_set = {key: fraction(figures, "auroc") for key, figures in (entry.get("per_set") or {}).items()}
    if len(per_set) < 2:
        return lead
    hardest = min(per_set, key=lambda key: np.nan_to_num(per_set[key], nan=2))
    return f"{lead} Its hardest set is <strong>{escaped(hardest)}</strong>, AUROC {with_unit(per_set[hardest])}."


def _rivals(run: Run) -> str:
    """The detectors that may be as good as the best."""
    comparison = run.results.get("comparison")
    found = {name: difference(comparison, name, None) for name in run.detectors}
    rivals = [f"<strong>{escaped(name)}</strong>" for name, own in found.items() if own and not distinguishable(own)]
    if rivals:
        return f"Not distinguishable from it on these images: {', '.join(rivals)}."
    return "Every other detector is below it by more than chance explains." if any(found.values()) else ""


# The table.


def figure_table(run: Run) -> str:
    """Every figure with its interval, and the differences to the best detector."""
    heads = ["Average"]
    columns: list[dict[str, Figures | None]] = [{name: run.on(name, None) for name in run.detectors}]
    for source in run.sets:
        own = {name: run.on(name, source) for name in run.detectors}
        heads.append(f"{escaped(source)}<small>{_about_set(run, source, own)}</small>")
        columns.append(own)
    accuracy = {name: run.entry(name).get("accuracy") for name in run.detectors}
    known = any(value is not None for value in accuracy.values())
    extra: list[dict[str, Figures | None]] = [{name: {"auroc": accuracy[name]} for name in accuracy}] if known else []
    heads += ["ID accuracy"] * len(extra)
    top = "".join(f'<th scope="col"><div>{head}</div></th>' for head in ["Detector", *heads])
    groups = _figure_rows("AUROC, %", "auroc", columns + extra, run.detectors, higher=True)
    groups += _figure_rows("FPR95, %", "fpr95", columns + [None] * len(extra), run.detectors, higher=False)
    intervals = " Small: 95 % bootstrap intervals." if "</small></td>" in groups else ""
    differences, about = _differences(run, len(extra))
    table = f'<table class="figures"><thead><tr>{top}</tr></thead>{groups}{differences}</table>'
    return f"""<section><h2>Results</h2>{scroll_box(table, "Results")}
<p class="muted">Bold: best of the column. Under a set: its kind and size.{intervals}{about}</p>
</section>"""


def _about_set(run: Run, source: str, own: Figures) -> str:
    size = next((f"{figures['n']:,}" for figures in own.values() if figures and "n" in figures), "")
    kind = escaped((run.data.get("set_kinds") or {}).get(source, ""))
    return " · ".join(filter(None, (kind, size)))


def _figure_rows(
    heading: str, metric: str, columns: Sequence[Figures | None], detectors: list[str], *, higher: bool
) -> str:
    """A group of rows, one per detector; a column of None stays empty."""
    rows = [_row_head(row, name) for row, name in enumerate(detectors)]
    for figures in columns:
        values = [fraction((figures or {}).get(name), metric) for name in detectors]
        for row, top in enumerate(best(values, higher=higher)):
            own = (figures or {}).get(detectors[row])
            cell = percent(values[row]) + interval(own, metric) if figures else ""
            rows[row] += f'<td class="best">{cell}</td>' if top else f"<td>{cell}</td>"
    hint = "higher is better" if higher else "lower is better"
    return _group(heading, hint, rows, len(columns))


def _differences(run: Run, empty: int) -> tuple[str, str]:
    """Rows of the paired differences to the best detector, and how to read them; nothing without any."""
    comparison = run.results.get("comparison")
    if not comparison:
        return "", ""
    reference, rows = comparison["reference"], []
    for row, name in enumerate(run.detectors):
        if name != reference:
            found = [difference(comparison, name, source) for source in (None, *run.sets)]
            cells = [_difference(own, with_p=place == 0) for place, own in enumerate(found)] + [""] * empty
            rows.append(_row_head(row, name) + "".join(f"<td>{cell}</td>" for cell in cells))
    heading = f"AUROC minus that of {escaped(reference)}, percentage points"
    about = f""" The differences come from a paired bootstrap ({comparison["bootstrap"]:,} resamples, the same images
for both detectors), each tested on its own, not corrected for their number. “≈”: not distinguishable, p above
{SIGNIFICANT}."""
    return _group(heading, "below 0 is worse", rows, 1 + len(run.sets) + empty), about


def _difference(own: Figures | None, *, with_p: bool) -> str:
    if own is None:
        return "–"
    mark = "" if distinguishable(own) else '<span title="not distinguishable">≈</span> '
    chance = f"<small>p = {own['p_value']:.2g}</small>" if with_p else ""
    return f"{mark}{points(own['difference'])}<small>{points_range(own['low'], own['high'])}</small>{chance}"


def _row_head(row: int, name: str) -> str:
    return f'<th scope="row"><a href="#d{row}">{escaped(name)}</a></th>'


def _group(heading: str, hint: str, rows: Sequence[str], columns: int) -> str:
    about = f'{heading} <span class="muted">{hint}</span>'
    title = f'<tr><th scope="rowgroup" colspan="{columns + 1}"><div>{about}</div></th></tr>'
    return f"<tbody>{title}{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody>"


# Bars.


def set_bars(run: Run) -> str:
    """AUROC of every detector on every set."""
    left = bar_range(run.on(name, source) for name in run.detectors for source in (None, *run.sets))
    panels = _panels(run, run.detectors, left)
    return f"""<section><h2>AUROC on each set</h2><p>Bars start at 50 %, guessing, and end at 100 % on the right;
whiskers are the intervals of the table.</p><div class="grid bar-grid">{panels}</div></section>"""


def fusions(run: Run) -> str:
    """Every fusion beside those of its members that were evaluated, too; nothing if there is none."""
    found = {name: _members(run, name) for name in run.detectors}
    blocks = "".join(_fusion(run, name, members) for name, members in found.items() if members)
    return f"<section><h2>Fusions and their members</h2>{blocks}</section>" if blocks else ""


def _members(run: Run, name: str) -> list[str]:
    """The fusion's members among the detectors of this run, best first."""
    listed = (run.entry(name).get("params") or {}).get("members") or ()
    return [other for other in run.detectors if other in listed]


def _fusion(run: Run, name: str, members: list[str]) -> str:
    names = [name, *members]
    left = bar_range(run.on(other, source) for other in names for source in (None, *run.sets))
    return f"""<h3>{escaped(name)}</h3><p>{_gain(run, name, members[0])}</p>
<div class="grid bar-grid members">{_panels(run, names, left)}</div>"""


def _gain(run: Run, name: str, member: str) -> str:
    """The fusion against its best member in a sentence."""
    gain = fraction(run.on(name, None), "auroc") - fraction(run.on(member, None), "auroc")
    if not math.isfinite(gain):
        return ""
    own = difference(run.entry(name).get("against_members"), member, None)
    side = "above" if gain > 0 else "below"
    text = f"Its average AUROC is {points(abs(gain)).lstrip('+')} points {side} that of its best member"
    text += f" here, <strong>{escaped(member)}</strong>"
    if own is None:
        return f"{text}."
    # The record is of the member minus the fusion.
    spread = f"95 % interval of the difference {points_range(-own['high'], -own['low'])}, p = {own['p_value']:.2g}"
    return f"{text} ({spread}){'' if distinguishable(own) else ': not distinguishable'}."


def _panels(run: Run, names: Sequence[str], left: float) -> str:
    """A list of bars for the average and for every set."""
    panels = []
    for place, source in enumerate([None, *run.sets], -1):
        title = "Average" if source is None else f"{swatch(place)} <span>{escaped(source)}</span>"
        rows = [_bar(name, run.on(name, source)) for name in names]
        chart = bars(rows, None if source is None else place, left)
        panels.append(f"<figure><figcaption>{title}</figcaption>{chart}</figure>")
    return "".join(panels)


def _bar(name: str, figures: Figures | None) -> Bar:
    return Bar(name, *(fraction(figures, key) for key in ("auroc", "auroc_low", "auroc_high")))
