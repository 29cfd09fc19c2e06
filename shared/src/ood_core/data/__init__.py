"""Image input: sources, decoding, few-shot sets, batches, and generated scenes."""

from ood_core.data import scenes
from ood_core.data.decode import decode, to_rgb
from ood_core.data.fewshot import FewShot
from ood_core.data.loader import ImageBatch, load_batches
from ood_core.data.sources import (
    ImageFolder,
    ImageSource,
    Manifest,
    ParquetImages,
    PILImages,
    match_labels,
    open_source,
)

__all__ = [
    "FewShot",
    "ImageBatch",
    "ImageFolder",
    "ImageSource",
    "Manifest",
    "PILImages",
    "ParquetImages",
    "decode",
    "load_batches",
    "match_labels",
    "open_source",
    "scenes",
    "to_rgb",
]
