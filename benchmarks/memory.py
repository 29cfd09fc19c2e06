"""Peak memory of a job on the CPU, as Linux counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def added_at_peak(job: Callable[[], Any]) -> tuple[Any, float]:
    """What the job returns, and the MiB of resident memory that it adds to this process at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    before = _mebibytes("VmRSS")
    result = job()
    return result, max(0.0, _mebibytes("VmHWM") - before)


def _mebibytes(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
