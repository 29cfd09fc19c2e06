from __future__ import annotations

from pages import cell, hardware, mean_of_kind, table

TITLE = "All methods together"


def section(results: dict) -> str:
    parts = [
        f"""## {TITLE}

Every detector with the options that the demo gives it, and fusions that were named in advance (`p_value` scale), on at
most {results["images"]:,} images per set: AUROC / FPR95 in percent, in brackets half the width of the 95 % bootstrap
interval of the AUROC. Backbone `{results["environment"]["backbone"]["spec"]}` (fingerprint
`{results["environment"]["backbone"]["fingerprint"][:12]}`): these numbers compare methods, not models.
"""
    ]
    for name, found in results["protocols"].items():
        ranked = sorted(found["detectors"].items(), key=lambda item: -item[1]["average"]["auroc"])
        kinds = sorted(set(found["data"]["set_kinds"].values()), reverse=True)
        rows = [[label, cell(f["average"]), *(mean_of_kind(f, found, kind) for kind in kinds)] for label, f in ranked]
        best = {what: next(row for row in ranked if ("fusion" in row[0]) == what) for what in (False, True)}
        gain = 100 * (best[True][1]["average"]["auroc"] - best[False][1]["average"]["auroc"])
        minus = best[True][1]["members_minus_this"][best[False][0]]
        parts.append(f"`{name}`:\n\n{table(['detector', 'average', *kinds], rows)}")
        parts.append(
            f"The best fusion here ({best[True][0]}) is {abs(gain):.1f} points {'above' if gain > 0 else 'below'} the "
            f"best member ({best[False][0]}), both picked by these very figures; 95 % interval of the difference "
            f"{-100 * minus['high']:+.1f} to {-100 * minus['low']:+.1f} (paired bootstrap).\n"
        )
    parts.append(
        "Made by `uv run python benchmarks/together.py --packs FOLDER --work FOLDER`; "
        + hardware(results["environment"])
        + "."
    )
    return "\n".join(parts) + "\n"
