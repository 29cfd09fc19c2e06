"""The part of the report with a block per detector: settings, ROC, score densities, calibration."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ood_core.report.charts import calibration_chart, histogram_chart, roc_chart, swatch
from ood_core.report.figures import (
    Run,
    acceptance_band,
    flatten,
    fraction,
    roc_points,
    score_range,
    scored_rows,
    scores_by_source,
)
from ood_core.report.markup import NO_SCORES, escaped, percent, short, with_unit

_SHOWN_ELSEWHERE = ("average", "per_set", "convention", "accuracy", "acceptance", "against_members")


def score_charts(run: Run) -> str:
    """ROC curves and score densities of every detector."""
    blocks = [_detector(run, row, name, scores_by_source(run.table, name)) for row, name in enumerate(run.detectors)]
    return f"""<section><h2>Scores of each detector</h2><p>ROC curves, with the dashed line on which FPR95
is read, and the scores of each OOD set (coloured) against those of the <span class="key"></span> ID images.
Right is more in-distribution, the end bins hold all that lies beyond, the dashed line is the threshold.</p>
{"".join(blocks)}</section>"""


def _detector(run: Run, row: int, name: str, scores: Mapping[str, np.ndarray]) -> str:
    known, span = scores.get("id", np.empty(0)), score_range(scores.values())
    curves, legend, panels = {}, [], []
    for place, title in enumerate(run.sets):
        unknown = scores.get(title, np.empty(0))
        label = f"{swatch(place)} <span>{escaped(title)}</span>"
        legend.append(f"<li>{label} <b>{percent(fraction(run.on(name, title), 'auroc'))}</b></li>")
        if len(known) and len(unknown):
            curves[place] = roc_points(known, unknown)
        about = f"{name}: scores of ID against {title}"
        chart = histogram_chart(known, unknown, span, place, fraction(run.entry(name), "threshold"), about)
        panels.append(f"<figure><figcaption>{label}</figcaption>{chart if len(unknown) else NO_SCORES}</figure>")
    convention = run.data.get("convention", "standard")
    return f"""<article id="d{row}"><h3>{escaped(name)}</h3><p class="muted">{_settings(run, name)}</p>
<div class="panels">
<figure>{roc_chart(curves, convention, f"ROC curves of {name}")}<ul>
<li class="muted"><span>OOD set</span> AUROC, %</li>{"".join(legend)}</ul></figure>
<div class="grid{" large" * (len(run.sets) <= 6)}">{"".join(panels)}</div></div></article>"""


def _settings(run: Run, name: str) -> str:
    shown = {key: value for key, value in run.entry(name).items() if key not in _SHOWN_ELSEWHERE}
    return " · ".join(f"{escaped(key.removeprefix('params '))} {short(value, 60)}" for key, value in flatten(shown))


def calibration(run: Run) -> str:
    """Of every calibrated detector the share of ID test images accepted at each TPR; nothing if there is none."""
    charts = "".join(_calibration(run, name) for name in run.detectors if run.entry(name).get("acceptance"))
    if not charts:
        return ""
    return f"""<section><h2>Calibration</h2><p>The share of ID test images that a detector accepts (line) at the
threshold for each true positive rate (TPR). On the dashed diagonal a threshold keeps its promise. A point lies in
the <span class="key"></span> band with 95 % probability if the test images are like the calibration images; below the
band more ID images are refused than promised.</p><div class="grid">{charts}</div></section>"""


def _calibration(run: Run, name: str) -> str:
    entry = run.entry(name)
    curve, known = entry["acceptance"], entry.get("calibration") or {}
    rows = scored_rows(run.table, name)
    tested = int((rows["source"] == "id").sum())
    band = acceptance_band(curve["nominal"], known["n"], tested) if known.get("n") and tested else None
    chart = calibration_chart(curve["nominal"], curve["accepted"], band, f"Calibration curve of {name}")
    promised, accepted = fraction(entry, "tpr"), fraction(entry, "id_accepted")
    about = f"{with_unit(accepted)} accepted at {with_unit(promised)}"
    return f"<figure><figcaption>{escaped(name)} <small>{about}</small></figcaption>{chart}</figure>"
