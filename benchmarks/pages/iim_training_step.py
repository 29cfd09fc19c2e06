from __future__ import annotations

from pages import hardware, table

TITLE = "A training step of IIM"


def section(results: dict) -> str:
    shapes = results["shapes"]
    small, *larger = shapes

    def prompts(shape: str) -> int:
        return sum(map(int, shape.split(" + ")))

    for shape in larger:
        if "usual" not in shapes[shape]:
            times = prompts(shape) / prompts(small)
            guess = {key: times * value for key, value in shapes[small]["usual"].items()}
            shapes[shape] = {f"usual, extrapolated: {times:g} x {small}": guess} | shapes[shape]
    rows = [
        [shape, name, f"{figures['seconds']:.2f}", f"{figures['mebibytes']:,.0f}"]
        for shape, jobs in shapes.items()
        for name, figures in jobs.items()
    ]
    return f"""## {TITLE}

Classes + negatives on the text tower of ViT-B/16, batch 32: the usual way encodes every prompt at 77 tokens; ours cuts
behind the end mark, and "recomputed" holds the activations of 64 prompts at a time. All run through the same blocks at
the precision that `dtype="auto"` gives on this machine.

{table(["shape", "job", "seconds per step", "peak MiB"], rows)}
Made by `uv run python benchmarks/iim_training_step.py`; {hardware(results["environment"])}.
"""


def speed(results: dict) -> dict[str, float]:
    """What is compared -> its time divided by ours."""
    shape = results["shapes"]["100 + 30"]
    return {"IIM step: 77 tokens, one batch": shape["usual"]["seconds"] / shape["ours"]["seconds"]}
