"""Hierarchical vision-language learning (HVL): images of known diseases at three scales.

HVL looks at every image as a whole, as n x n and as 2n x 2n tiles, each enlarged to the encoder's full input,
and lets coarse context flow into fine tiles. `functional` holds the equations: the pyramid, the adapter, the
fusion across scales and the entropy of a tile's class probabilities.

Lai, Lu, Chen, Chen, Zheng & Wang, "Hierarchical vision-language learning for medical out-of-distribution
detection", MICCAI 2025.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ood_hvl import functional

__version__ = "0.1.0"

__all__ = ["functional"]


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module("ood_hvl.functional")
    raise AttributeError(f"module 'ood_hvl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
