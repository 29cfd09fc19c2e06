"""Mixture of feature experts (MoFE) with Dynamic-beta Mixup.

MoFE copies the last block of a frozen vision model once per group of classes and routes each image to one
copy; Dynamic-beta Mixup blends images strongly where a class is still confused and hardly where it is easy.
`functional` holds the equations of the router and of the mixup.

Zhao, Liu, Wen, Tan & Qi, "Equipping vision foundation model with mixture of experts for out-of-distribution
detection", ICCV 2025.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ood_mofe import functional
    from ood_mofe.detectors import MoFE
    from ood_mofe.experts import StackedExperts

__version__ = "0.1.0"

_HOMES = {"MoFE": "detectors", "StackedExperts": "experts"}
__all__ = ["MoFE", "StackedExperts", "functional"]


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module("ood_mofe.functional")
    if name in _HOMES:
        return getattr(import_module(f"ood_mofe.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ood_mofe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
