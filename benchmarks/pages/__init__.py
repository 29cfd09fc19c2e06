"""The part of docs/benchmarks.md that each benchmark owns: `pages/NAME.py` turns `results/NAME.json` into it.

`section(results)` is the text; `speed(results)`, where there is one, gives the ratios for the picture of all.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MEASURES = ("auroc", "fpr95")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(figure: dict[str, float]) -> str:
    text = f"{100 * figure['auroc']:.1f} / {100 * figure['fpr95']:.1f}"
    if "auroc_low" in figure:
        half = 50 * (figure["auroc_high"] - figure["auroc_low"])
        text += f" (±{half:.1f})"
    return text


def hardware(environment: dict) -> str:
    versions = environment["versions"]
    where = environment["gpu"] or f"{environment['threads']} {environment['machine']} CPU threads"
    return f"{where}, torch {versions['torch']}, open_clip {versions['open-clip-torch']}, {environment['date']}"


def over_seeds(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    around = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):{sign}.1f}{around}"


def seeds_cell(figures: list[dict]) -> str:
    return " / ".join(over_seeds([figure[measure] for figure in figures]) for measure in ("auroc", "fpr95"))


def spread(figure: dict | None) -> str:
    """Mean, and the standard deviation over runs where there are several, in percent."""
    if figure is None:
        return ""
    around = "" if figure["std"] is None else f" ± {100 * figure['std']:.1f}"
    return f"{100 * figure['mean']:.1f}{around}"


def interval(figure: dict) -> str:
    if figure["low"] is None:
        return spread(figure)
    return f"{spread(figure)} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def bounds(figures: dict) -> tuple[float, float, float]:
    value = figures["auroc"]
    return value, figures.get("auroc_low", value), figures.get("auroc_high", value)


def mean_of_kind(figures: dict, found: dict, kind: str) -> str:
    chosen = [f for name, f in figures["per_set"].items() if found["data"]["set_kinds"][name] == kind]
    return cell({m: statistics.fmean(f[m] for f in chosen) for m in ("auroc", "fpr95")})


def read(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
