from __future__ import annotations

from pages import hardware, table

TITLE = "Experts: the class token alone, and dispatch"


def section(results: dict) -> str:
    c, memory, faster = results["case"], results["peak_mebibytes"], results["class_token_times_faster"]
    rows = [[name, f"{ms:,.1f} ms", f"{memory[name]:,.0f} MiB"] for name, ms in results["milliseconds"].items()]
    usual = [[name, f"{ratio:.2f}"] for name, ratio in results["usual_over_ours"].items()]
    return f"""## {TITLE}

{c["batch"]} images of {c["tokens"]} tokens, width {c["width"]}, {c["heads"]} heads, {c["experts"]} experts,
{c["dtype"]} on {c["device"]}; medians of {results["rounds"]} rounds. The class token alone is
{faster["one expert"]:.0f} times as fast as the block on all tokens with one expert, {faster["routed"]:.0f} times with
routing; all ways give the same.

{table(["way", "time", "memory added"], rows)}
{table(["usual way", "its time over ours"], usual)}
Made by `uv run python benchmarks/expert_dispatch.py`; {hardware(results["environment"])}.
"""


def speed(results: dict) -> dict[str, float]:
    """What is compared -> its time divided by ours."""
    lone = {"MoFE's last block: all tokens, one expert": results["class_token_times_faster"]["one expert"]}
    return lone | {f"MoFE's experts: {name}": ratio for name, ratio in results["usual_over_ours"].items()}
