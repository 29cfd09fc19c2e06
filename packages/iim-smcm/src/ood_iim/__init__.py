"""S-MCM, and the loss and classifier of intra-image mining (IIM), for CLIP-like models.

Given an image, its patches and class texts, S-MCM adds three numbers: the global softmax (MCM), the best
patch-to-class matches and the best class-to-patch matches; higher = more in-distribution. Without negative
prompts it needs no training and is the detector `s_mcm`. `functional` holds the equations.

Chen, Fang & Xue, "Intra-image mining and symmetric maximum concept matching for few-shot out-of-distribution
detection", AAAI 2026.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ood_iim import functional
    from ood_iim.detectors import SMCM

__version__ = "0.1.0"

__all__ = ["SMCM", "functional"]


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module("ood_iim.functional")
    if name == "SMCM":
        return import_module("ood_iim.detectors").SMCM
    raise AttributeError(f"module 'ood_iim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
