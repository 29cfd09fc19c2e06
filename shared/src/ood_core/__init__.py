"""Out-of-distribution detection with vision foundation models: the core that every method plugs into.

Files become images (`ImageFolder`, `Manifest`, `ParquetImages`), a backbone turns them into features (`extract`), a
detector turns features into scores (`create_detector`; higher = more in-distribution), `evaluate` judges them.
Names are imported when first used: `import ood_core` itself loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ood_core.lazy import imported_when_used

if TYPE_CHECKING:
    from ood_core import functional, metrics, ops
    from ood_core.backbones import create_backbone, list_backbones
    from ood_core.data import FewShot, ImageFolder, Manifest, ParquetImages
    from ood_core.detectors import create_detector, list_detectors
    from ood_core.evaluation import evaluate
    from ood_core.features import FeatureSet, extract
    from ood_core.fusion import Fusion

__version__ = "0.1.0"

__all__ = [
    "FeatureSet",
    "FewShot",
    "Fusion",
    "ImageFolder",
    "Manifest",
    "ParquetImages",
    "create_backbone",
    "create_detector",
    "evaluate",
    "extract",
    "functional",
    "list_backbones",
    "list_detectors",
    "metrics",
    "ops",
]

__getattr__, __dir__ = imported_when_used(
    __name__,
    {
        "create_backbone": "backbones",
        "list_backbones": "backbones",
        "FewShot": "data",
        "ImageFolder": "data",
        "Manifest": "data",
        "ParquetImages": "data",
        "create_detector": "detectors",
        "list_detectors": "detectors",
        "evaluate": "evaluation",
        "FeatureSet": "features",
        "extract": "features",
        "Fusion": "fusion",
        "functional": None,
        "metrics": None,
        "ops": None,
    },
)
