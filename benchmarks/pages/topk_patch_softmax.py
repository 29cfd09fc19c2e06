from __future__ import annotations

from pages import hardware, table

TITLE = "Patch matching on cached features"


def section(results: dict) -> str:
    shape = results["shape"]
    rows = [
        [
            name,
            f"{results['milliseconds_per_image'][name]:.2f}",
            f"{results['times_bare_matmul'][name]:.2f}",
            f"{results['peak_mebibytes'][name]:,.0f}",
        ]
        for name in results["milliseconds_per_image"]
    ]
    return f"""## {TITLE}

`topk_patch_softmax` at the shapes of CLIP ViT-B/16 on ImageNet-1k (P = {shape["P"]}, d = {shape["d"]}, C =
{shape["C"]:,}, M = {shape["M"]}, k = {shape["k"]}), {results["batch"]} images, against a bare matmul of the same
shapes, the plain way (two softmaxes over all entries) and six softmaxes as in the released code; medians of jobs that
alternate, memory in processes of their own.

{table(["job", "ms per image", "times the matmul", "peak MiB"], rows)}
Made by `uv run python benchmarks/topk_patch_softmax.py`; {hardware(results["environment"])}.
"""


def speed(results: dict) -> dict[str, float]:
    """What is compared -> its time divided by ours."""
    times = results["times_bare_matmul"]
    return {
        "S-MCM scores: two softmaxes in full": times["plain"] / times["ours"],
        "S-MCM scores: six softmaxes": times["released"] / times["ours"],
    }
