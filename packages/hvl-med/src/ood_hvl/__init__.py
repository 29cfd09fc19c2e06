"""Hierarchical vision-language learning (HVL): images of known diseases at three scales.

HVL looks at every image as a whole, as n x n and as 2n x 2n tiles, each enlarged to the encoder's full input, lets
coarse context flow into fine tiles and leaves tiles out whose class distribution is flat. An adapter and two biases of
the class texts are trained on embeddings that are computed once; the fine tiles that are least sure beside the tile
they lie in serve as pseudo-OOD. The trained detector is `hvl`; `functional` holds the equations.

Lai, Lu, Chen, Chen, Zheng & Wang, "Hierarchical vision-language learning for medical out-of-distribution
detection", MICCAI 2025.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ood_core.lazy import imported_when_used

if TYPE_CHECKING:
    from ood_hvl import functional
    from ood_hvl.detectors import HVL
    from ood_hvl.model import HVLModel
    from ood_hvl.pyramid import with_pyramid

__version__ = "0.1.0"

__all__ = ["HVL", "HVLModel", "functional", "with_pyramid"]

__getattr__, __dir__ = imported_when_used(
    __name__, {"HVL": "detectors", "HVLModel": "model", "with_pyramid": "pyramid", "functional": None}
)
