from __future__ import annotations

import plots

from pages import bounds, cell, hardware, table

TITLE = "Real photographs: protocol `tiny-imagenet-100`"


def section(results: dict) -> str:
    data = results["data"]
    sets = list(data["ood"])
    ordered = sorted(results["detectors"].items(), key=lambda item: -item[1]["average"]["auroc"])
    rows = [
        [name, cell(f["per_set"]["near"]), cell(f["far_mean"]), *(cell(f["per_set"][s]) for s in sets if s != "near")]
        for name, f in ordered
    ]
    backbone = results["environment"]["backbones"][0]
    notes = "\n".join(f"- {note}" for note in data["notes"])
    return f"""## {TITLE}

AUROC / FPR95 in percent (convention `{data["convention"]}`), in brackets half the width of the 95 % bootstrap interval
of the AUROC ({data["bootstrap"]} replicates). Backbone `{backbone["spec"]}` ({backbone["dtype"]}, fingerprint
`{backbone["fingerprint"][:12]}`), {data["id"]["scored"]:,} ID test images. Zero-shot top-1 of this backbone over all
200 classes: {100 * results["zero_shot_top1"]:.1f} %. Tiny is not CLIP: these numbers compare methods, not models.

![AUROC of every detector](auroc.svg)

{table(["detector", "near", "far mean", *(s for s in sets if s != "near")], rows)}
{notes}

Made by `uv run python benchmarks/tiny_imagenet_100.py --packs FOLDER`; {hardware(results["environment"])}.
"""


def picture(results: dict) -> str:
    """Every detector with its interval, as an SVG."""
    ranked = sorted(results["detectors"].items(), key=lambda item: -item[1]["far_mean"]["auroc"])
    rows = {name: {"near": bounds(of["per_set"]["near"]), "far, mean": bounds(of["far_mean"])} for name, of in ranked}
    return plots.dots(rows, "AUROC of every detector on tiny-imagenet-100")
