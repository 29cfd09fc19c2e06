from __future__ import annotations

from pages import hardware, table

TITLE = "SeTAR's search"


def section(results: dict) -> str:
    search, blocks = results["search"], results["ViT-B/16"]
    seconds = search["seconds"]
    rows = [
        [name, f"{value:.1f}", f"{search['candidates'][name]}", f"{value / seconds['ours']:.1f}"]
        for name, value in seconds.items()
    ]
    single = [
        [
            name,
            f"{b['plain']:.2f}",
            f"{b['ours']:.2f}",
            f"{b['plain'] / b['ours']:.1f}",
            f"{b['largest difference']:.1e}",
        ]
        for name, b in blocks["blocks"].items()
    ]
    agreed = "the same" if search["same ratios"] else "not the same"
    return f"""## {TITLE}

The released way does for every candidate what the released code does: load the weights, decode the images, decompose
every weight that has a ratio, encode all prompts, run the whole image tower with the value path in all blocks. The
plain way is spared the loading, the decoding and the value path but in the last block. Random towers of 12 + 12 blocks,
{search["images"]} images, {search["classes"]} classes: all chose {agreed} ratios ({search["weights pruned"]} weights
pruned, smallest margin {search["smallest margin"]:.1e}); ours kept {search["mebibytes"]:,.0f} MiB.

{table(["search", "seconds", "candidates", "times ours"], rows)}
ViT-B/16 shapes, {blocks["images"]} images, {blocks["classes"]} classes: seconds for the eight ratios of one block
(its decomposition included), and the largest relative difference of a loss. Filling the caches takes
{blocks["preparing"]["seconds"]:.1f} s and {blocks["preparing"]["mebibytes"]:,.0f} MiB, once.

{table(["weight", "plain", "ours", "ratio", "difference"], single)}
Made by `uv run python benchmarks/setar_search.py`; {hardware(results["environment"])}.
"""


def speed(results: dict) -> dict[str, float]:
    """What is compared -> its time divided by ours."""
    times = results["search"]["seconds"]
    return {
        "SeTAR search: one forward per candidate": times["plain"] / times["ours"],
        "SeTAR search: as released": times["released"] / times["ours"],
    }
