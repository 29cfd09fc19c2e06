"""Put docs/ together from results: each benchmark's page says how its part reads, see benchmarks/pages.

uv run python tools/make_docs.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plots  # noqa: E402
from pages import RESULTS, extraction, read, table, tiny, tiny_imagenet_100  # noqa: E402

# In the order of the page.
PHOTOGRAPHS = ("tiny_imagenet_100", "together", "iim", "iim_localisation", "setar")
MEDICAL = ("setar_search", "hvl", "hvl_boundary", "hvl_cost")
REST = ("mofe", "mofe_training_step", "expert_dispatch", "bfloat16", "extraction", "topk_patch_softmax")
SECTIONS = (*PHOTOGRAPHS, *MEDICAL, *REST, "iim_training_step", "peers")
SPEED = (
    *("topk_patch_softmax", "iim_training_step", "setar_search", "hvl_cost", "mofe_training_step", "expert_dispatch"),
    "peers",
)
AWAITED = ("together", "setar", "hvl", "hvl_boundary", "mofe")
"""Sections on `tiny` that keep their place while nothing is measured on its present weights."""

OPENING = """# Benchmarks

The time of the usual way divided by ours, in every comparison below (logarithmic; below 1 the usual way is faster):

![time of the usual way divided by ours](speed.svg)
"""


def benchmarks_page() -> str:
    return "\n".join([OPENING, *filter(None, map(section, SECTIONS))])


def section(name: str) -> str:
    """A comparison's part of the page; where it is awaited, how to make it; nothing where it is optional."""
    results, page = read(name), import_module(f"pages.{name}")
    if results is not None:
        return page.section(results)
    if name not in AWAITED:
        return ""
    return (
        f"## {page.TITLE}\n\nNot measured with the present weights of `tiny` yet; those of earlier weights are left "
        f"out. Make it with `uv run python -m benchmarks {name} --packs FOLDER --work FOLDER`.\n"
    )


def speed_picture() -> str:
    rows: dict[str, float] = {}
    for name in SPEED:
        if results := read(name):
            rows |= import_module(f"pages.{name}").speed(results)
    return plots.ratios(rows, "time of the usual way divided by ours")


def scaling() -> str:
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("extraction*.json"))]
    return extraction.scaling(runs, read("topk_patch_softmax"), read("hvl_cost"))


# ---- the averages of a paper's first table, as it prints them

COLUMNS = {
    "iim": {"known": "id", "images per class": "shots", "method": "method"},
    "setar": {"known": "id", "backbone": "backbone", "score": "score", "method": "method", "origin": "origin"},
    "hvl": {"method": "method", "accuracy": "average.accuracy"},
    "mofe": {"backbone": "backbone", "method": "method"},
}
FIGURES = {"AUROC": "average.auroc", "FPR95": "average.fpr95"}
LAST = {"mofe": {"accuracy": "accuracy"}}


def published(name: str) -> str:
    found = json.loads(next((ROOT / "packages").glob(f"*/src/ood_{name}/published/table1.json")).read_text())
    columns = COLUMNS[name] | FIGURES | LAST.get(name, {})
    rows = [list(cells(row, columns.values())) for row in found["rows"]]
    return f"{found['source']}, percent:\n\n{table([*columns], rows)}"


def cells(row: dict, places: Iterator[str]) -> Iterator[str]:
    """What stands at "key" or "key.key" of a row; figures with two digits, "" for what a paper does not tell."""
    for place in places:
        key, _, inner = place.partition(".")
        value = row.get(key) if not inner else row[key].get(inner)
        yield "" if value is None else f"{value:.2f}" if place in FIGURED else f"{value}"


FIGURED = {*FIGURES.values(), "average.accuracy", "accuracy"}
FRAGMENTS: dict[str, Callable[[], str]] = {
    "scaling": scaling,
    **{name: lambda name=name: published(name) for name in COLUMNS},
}


def filled(text: str, name: str, fragment: str) -> str:
    """A page with what stands between its marks for `name` replaced."""
    start, end = f"<!-- made by tools/make_docs.py: {name} -->\n", "<!-- end -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{fragment}\n{end}{rest.split(end, 1)[1]}"


def made() -> dict[str, str]:
    """Everything in docs/ that comes from results, by file name."""
    found = {
        "benchmarks.md": benchmarks_page(),
        "tiny.md": tiny.page(),
        "tiny_curves.svg": tiny.curves(),
        "auroc.svg": tiny_imagenet_100.picture(read("tiny_imagenet_100") or {}),
        "speed.svg": speed_picture(),
    }
    for name, fragment in FRAGMENTS.items():
        page = f"{name}.md"
        found[page] = filled((ROOT / "docs" / page).read_text(), name, fragment())
    return found


def main() -> None:
    for name, content in made().items():
        (ROOT / "docs" / name).write_text(content)


if __name__ == "__main__":
    main()
