"""Peak memory of a job on the CPU, as Linux counts it, best in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
