from __future__ import annotations

from pages import hardware, table

TITLE = "Where HVL finds its unknowns"


def section(results: dict) -> str:
    settings = results["settings"]
    rows = [[name, *(f"{100 * share:.1f}" for share in row.values())] for name, row in results["results"].items()]
    places = list(next(iter(results["results"].values())))
    return f"""## {TITLE}

Share of fine tiles that lie on the boundary of a lesion, in it or beside it, in percent, on {settings["test_images"]}
generated lesions with known masks, {settings["n"]} partitions, mean over {len(settings["seeds"])} seeds.

{table(["tiles", *places], rows)}
Made by `uv run python benchmarks/hvl_boundary.py`; {hardware(results["environment"])}.
"""
