"""Selective low-rank approximation (SeTAR) of a network's weights.

SeTAR makes a pretrained model's ordinary scores separate out-of-distribution images better by dropping the smallest
singular values of some weights, chosen by a search on labelled ID images; SeTAR+FT trains the dropped directions.
`functional` holds the equations; `search.search` and `finetune.finetune` make a `SeTAREdit`, which any detector's
backbone can carry.

Li, Xiong, Chen & Chen, "SeTAR: out-of-distribution detection with selective low-rank approximation", NeurIPS
2024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ood_core.lazy import imported_when_used

if TYPE_CHECKING:
    from ood_setar import functional
    from ood_setar.detectors import SeTAR
    from ood_setar.edit import SeTAREdit

__version__ = "0.1.0"

__all__ = ["SeTAR", "SeTAREdit", "functional"]

__getattr__, __dir__ = imported_when_used(__name__, {"SeTAR": "detectors", "SeTAREdit": "edit", "functional": None})
