"""Selective low-rank approximation (SeTAR) of a network's weights.

SeTAR makes a pretrained model's ordinary scores separate out-of-distribution images better by dropping the
smallest singular values of some weights. `functional` holds the operations on one weight: the rank that a
ratio drops, the truncation, and the split into a kept part and trainable low-rank factors.

Li, Xiong, Chen & Chen, "SeTAR: out-of-distribution detection with selective low-rank approximation", NeurIPS
2024.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ood_setar import functional

__version__ = "0.1.0"

__all__ = ["functional"]


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module("ood_setar.functional")
    raise AttributeError(f"module 'ood_setar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
