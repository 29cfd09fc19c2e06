"""Mixture of feature experts (MoFE) with Dynamic-beta Mixup.

MoFE copies the last block of a frozen vision model once per group of classes and routes each image to one
copy; Dynamic-beta Mixup blends images strongly where a class is still confused and hardly where it is easy.
`functional` holds the equations of the router and of the mixup.

Zhao, Liu, Wen, Tan & Qi, "Equipping vision foundation model with mixture of experts for out-of-distribution
detection", ICCV 2025.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ood_core.lazy import imported_when_used

if TYPE_CHECKING:
    from ood_mofe import functional
    from ood_mofe.detectors import MoFE
    from ood_mofe.experts import StackedExperts

__version__ = "0.1.0"

__all__ = ["MoFE", "StackedExperts", "functional"]

__getattr__, __dir__ = imported_when_used(
    __name__, {"MoFE": "detectors", "StackedExperts": "experts", "functional": None}
)
