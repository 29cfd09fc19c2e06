from __future__ import annotations

from pages import table

TITLE = "What bfloat16 weights move"


def section(results: dict) -> str:
    rows = [
        [
            name,
            f"{100 * f['float32']:.2f}",
            f"{100 * f['bfloat16']:.2f}",
            f"{100 * (f['bfloat16'] - f['float32']):+.2f}",
        ]
        for name, f in results["detectors"].items()
    ]
    return f"""## {TITLE}

Average AUROC over the nine OOD sets of `tiny-imagenet-100`, in percent, with the weights of `tiny` in float32 and
bfloat16 (scores are float32 in both; backbone fingerprint
`{results["environment"]["backbones"][0]["fingerprint"][:12]}`).

{table(["detector", "float32", "bfloat16", "difference"], rows)}
Made by `uv run python benchmarks/bfloat16.py --packs FOLDER`.
"""
