from __future__ import annotations

import json

from pages import ROOT, hardware, table

TITLE = "Extraction"


def section(results: dict) -> str:
    keys = [
        ("float32 bare images/s", "images/s"),
        ("float32 cold / bare", "cold / bare"),
        ("float32 cached / bare", "cached / bare"),
        ("bfloat16 bare images/s", "bf16 images/s"),
        ("bfloat16 cold / bare", "bf16 cold / bare"),
        ("bfloat16 bare / float32 bare", "bf16 / float32"),
    ]
    rows = [[name, *(f"{figures[key]:.3g}" for key, _ in keys)] for name, figures in results["results"].items()]
    return f"""## {TITLE}

`encode_dense` throughput: the bare model on images in memory, and the share of it that `extract` reaches from image
files (cold) and from its cache; medians over rounds in which the jobs alternate.

{table(["model, decoding processes", *(title for _, title in keys)], rows)}
Peak memory of the whole run {results["peak_mebibytes"]:,} MiB. Made by `uv run python benchmarks/extraction.py`;
{hardware(results["environment"])}.
"""


def scaling(runs: list[dict], step: dict | None, cost: dict | None) -> str:
    """What a billion images take at the rates that were measured.

    Args:
        runs: results of this benchmark, by machine.
        step: of `topk_patch_softmax`.
        cost: of `hvl_cost`.
    """
    parts = []
    for results in runs:
        rows = [
            [name, dtype, f"{rate:,.1f}", f"{1e9 / 3600 / rate:,.0f}"]
            for name, figures in results["results"].items()
            for dtype in ("float32", "bfloat16")
            if (rate := figures.get(f"{dtype} cold images/s"))
        ]
        rates = table(["backbone, decoding processes", "weights", "images per second", "machine-hours for 1e9"], rows)
        parts.append(
            f"From image files to features, image and local ones, on {hardware(results['environment'])}:\n\n{rates}"
        )
    parts.append(
        f"Kept features are float32, 4 d bytes for an image and 4 P d for its P patches:\n\n{stored(step, cost)}"
    )
    if step:
        shape, ours = step["shape"], step["milliseconds_per_image"]["ours"]
        parts.append(
            f"Behind the pass: the patch scores of {shape['C']:,} classes and {shape['M']} negatives take "
            f"{ours:.1f} ms per image on cached features of ViT-B/16, {1e9 / 3.6e6 * ours:,.0f} machine-hours for 1e9 "
            f"({hardware(step['environment'])}).\n"
        )
    return "\n".join(parts)


def stored(step: dict | None, cost: dict | None) -> str:
    """Bytes per image of kept features."""
    tiny = json.loads((ROOT / "shared/src/ood_core/tiny/config.json").read_text())["model"]
    shapes = {"tiny": (tiny["embed_dim"], (tiny["image_size"] // tiny["patch_size"]) ** 2)}
    if step:
        shapes["ViT-B/16 of CLIP"] = (step["shape"]["d"], step["shape"]["P"])
    sizes = {
        f"{name}, {what}": 4 * width * count
        for name, (width, patches) in shapes.items()
        for what, count in (("image", 1), (f"local ({patches} patches)", patches))
    }
    if cost:
        sizes[f"HVL's pyramid, n = {cost['settings']['n']}"] = cost["results"]["cache_bytes_per_image"]
    rows = [[name, f"{size:,}", f"{size / 1e3:,.1f}"] for name, size in sizes.items()]
    return table(["features", "bytes per image", "TB for 1e9"], rows)
