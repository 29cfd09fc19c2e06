from __future__ import annotations

from pages import hardware, table

TITLE = "Beside other libraries"


def off(row: dict) -> str:
    return f"{row['difference']:.1e}" if row["difference"] else "0"


def section(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["peers"].items())
    parts = [
        f"""## {TITLE}

The same job on the same random data, in one process; "difference" is the largest to our result ({versions}).
"""
    ]
    for task, found in results["results"].items():
        rows = [
            [name, f"{1000 * r['seconds']:,.0f} ms", f"{r['times_ours']:.2f}", f"{r['mebibytes']:,.0f} MiB", off(r)]
            for name, r in found.items()
        ]
        parts.append(f"{task}:\n\n{table(['library', 'time', 'times ours', 'memory added', 'difference'], rows)}")
    parts.append(f"Made by `uv run python benchmarks/peers.py`; {hardware(results['environment'])}.")
    return "\n".join(parts) + "\n"


def speed(results: dict) -> dict[str, float]:
    """What is compared -> its time divided by ours."""
    found = results["results"].items()
    rows = {f"{name}: {job.split(', ')[0]}": f["times_ours"] for job, ways in found for name, f in ways.items()}
    return {row: ratio for row, ratio in rows.items() if not row.startswith("ours: ")}
