"""Turn the results of benchmarks into docs/benchmarks.md: no number there is typed by hand.

uv run python tools/make_docs.py
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


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


def protocol(results: dict) -> str:
    data = results["data"]
    sets = list(data["ood"])
    ordered = sorted(results["detectors"].items(), key=lambda item: -item[1]["average"]["auroc"])
    rows = [
        [name, cell(f["per_set"]["near"]), cell(f["far_mean"]), *(cell(f["per_set"][s]) for s in sets if s != "near")]
        for name, f in ordered
    ]
    backbone = results["environment"]["backbones"][0]
    notes = "\n".join(f"- {note}" for note in data["notes"])
    return f"""## Real photographs: protocol `tiny-imagenet-100`

AUROC / FPR95 in percent (convention `{data["convention"]}`), in brackets half the width of the 95 % bootstrap interval
of the AUROC ({data["bootstrap"]} replicates). Backbone `{backbone["spec"]}` ({backbone["dtype"]}, fingerprint
`{backbone["fingerprint"][:12]}`), {data["id"]["scored"]:,} ID test images. Zero-shot top-1 of this backbone over all
200 classes: {100 * results["zero_shot_top1"]:.1f} %. Tiny is not CLIP: these numbers compare methods, not models.

{table(["detector", "near", "far mean", *(s for s in sets if s != "near")], rows)}
{notes}

Made by `uv run python benchmarks/tiny_imagenet_100.py --packs FOLDER`; {hardware(results["environment"])}.
"""


def bfloat16(results: dict) -> str:
    rows = [
        [
            name,
            f"{100 * f['float32']:.2f}",
            f"{100 * f['bfloat16']:.2f}",
            f"{100 * (f['bfloat16'] - f['float32']):+.2f}",
        ]
        for name, f in results["detectors"].items()
    ]
    return f"""## What bfloat16 weights move

Average AUROC over the nine OOD sets of `tiny-imagenet-100`, in percent, with the weights of `tiny` in float32 and
bfloat16 (scores are float32 in both).

{table(["detector", "float32", "bfloat16", "difference"], rows)}
Made by `benchmarks/bfloat16.py` from two runs of the protocol.
"""


def extraction(results: dict) -> str:
    keys = [
        ("float32 bare images/s", "images/s"),
        ("float32 cold / bare", "cold / bare"),
        ("float32 cached / bare", "cached / bare"),
        ("bfloat16 bare images/s", "bf16 images/s"),
        ("bfloat16 cold / bare", "bf16 cold / bare"),
        ("bfloat16 bare / float32 bare", "bf16 / float32"),
    ]
    rows = [[name, *(f"{figures[key]:.3g}" for key, _ in keys)] for name, figures in results["results"].items()]
    return f"""## Extraction

`encode_dense` throughput: the bare model on images in memory, and the share of it that `extract` reaches from image
files (cold) and from its cache; medians over rounds in which the jobs alternate.

{table(["model, decoding processes", *(title for _, title in keys)], rows)}
Peak memory of the whole run {results["peak_mebibytes"]:,} MiB. Made by `uv run python benchmarks/extraction.py`;
{hardware(results["environment"])}.
"""


def main() -> None:
    sections = {"tiny_imagenet_100": protocol, "bfloat16": bfloat16, "extraction": extraction}
    parts = ["# Benchmarks\n"]
    parts += [render(results) for name, render in sections.items() if (results := read(name)) is not None]
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
