from __future__ import annotations

from pages import hardware, table

TITLE = "A training step of MoFE"


def section(results: dict) -> str:
    s = results["settings"]
    rows = [
        [name, f"{r['seconds']:.2f} s", f"{r['times_ours']:.2f}", f"{r['mebibytes']:,.0f} MiB"]
        for name, r in results["results"].items()
    ]
    return f"""## {TITLE}

All losses and gradients of {s["batch"]} clean and as many mixed images, {s["experts"]} experts, `{s["backbone"]}`
(random weights); the losses agree.

{table(["way", "time", "times ours", "memory added"], rows)}
Made by `uv run python benchmarks/mofe_training_step.py`; {hardware(results["environment"])}.
"""


def speed(results: dict) -> dict[str, float]:
    """What is compared -> its time divided by ours."""
    return {"MoFE step: gradients of everything": results["results"]["full autograd"]["times_ours"]}
