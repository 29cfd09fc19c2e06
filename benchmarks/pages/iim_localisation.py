from __future__ import annotations

from pages import hardware, table

TITLE = "Where IIM mines"


def section(results: dict) -> str:
    rows = [
        [name, *(f"{100 * figures[key]:.1f}" for key in ("positive_on_object", "ood_beside_object"))]
        for name, figures in results["results"].items()
    ]
    return f"""## {TITLE}

Share of mined positive patches that lie on the object and of mined OOD patches that do not, in percent, on generated
scenes with known masks.

{table(["prompts", "positive on the object", "OOD beside it"], rows)}
Made by `uv run python benchmarks/iim_localisation.py`; {hardware(results["environment"])}.
"""
