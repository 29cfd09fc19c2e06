"""What benchmarks share: jobs timed against each other, peak memory, and results as they are published."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ood_core.files import write_atomically

# What no page shows; the folders of runs hold it.
_UNREAD = {"acceptance", "against_members", "aupr_in", "aupr_out", "calibration", "comparison", "prompt_hash"}


def publish(path: Path, results: Any) -> None:
    """Write results for the documents: what pages show, in as few bytes as it takes."""
    text = json.dumps(shown(results), separators=(",", ":"), ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def shown(results: Any) -> Any:
    """Results without what no page shows."""
    if isinstance(results, Mapping):
        return {key: shown(value) for key, value in results.items() if key not in _UNREAD}
    return [shown(one) for one in results] if isinstance(results, list | tuple) else results


def medians(jobs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each job; they take turns, and the first round only warms up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def added_at_peak(job: Callable[[], Any]) -> tuple[Any, float]:
    """What the job returns, and the MiB of resident memory that it adds to this process at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    before = _mebibytes("VmRSS")
    result = job()
    return result, max(0.0, _mebibytes("VmHWM") - before)


def in_own_process(module: str, expression: str) -> float:
    """The number that an expression of a benchmark gives in a process whose memory nothing else has touched."""
    code = f"import {module}; print(eval({expression!r}, vars({module})))"
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _mebibytes(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
