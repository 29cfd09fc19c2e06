from __future__ import annotations

from pages import hardware

TITLE = "What HVL costs"


def section(results: dict) -> str:
    r, s = results["results"], results["settings"]
    return f"""## {TITLE}

Backbone `{s["backbone"]}` (random weights, {s["dtype"]}), n = {s["n"]}, {s["classes"]} classes. A training step of
{s["batch"]} images takes {r["cached_step_ms"]:.0f} ms on cached embeddings and
{r["step_that_encodes_ms"] / 1000:,.0f} s when the tiles are encoded again: {r["ratio"]:,.0f} times as long. The cache
holds {r["cache_bytes_per_image"] / 1000:.1f} kB per image. Encoding runs at {r["encoded_images_per_second"]:.2f} images
({r["encoded_tiles_per_second"]:.1f} tiles) per second and takes {r["time_against_single_scale"]:.1f} times as long as
the whole image alone ({r["added_mib_three_scales"]:,.0f} against {r["added_mib_single_scale"]:,.0f} MiB); what HVL adds
behind the encoder takes {r["head_ms_per_image"]:.2f} ms per image.

Made by `uv run python benchmarks/hvl_cost.py`; {hardware(results["environment"])}.
"""


def speed(results: dict) -> dict[str, float]:
    """What is compared -> its time divided by ours."""
    return {"HVL step: tiles encoded again": results["results"]["ratio"]}
