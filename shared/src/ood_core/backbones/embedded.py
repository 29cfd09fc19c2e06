"""The backbone that the package brings along."""

from __future__ import annotations

from ood_core.backbones.base import Decision
from ood_core.backbones.loading import activation_name, transform_decisions
from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.tiny import ByteTokenizer, load_model

__all__ = ["load_tiny"]


def load_tiny(name: str = "", *, spec: str = "tiny") -> OpenCLIPBackbone:
    """The embedded backbone, which needs no network.

    Args:
        name: there is one only.
        spec: name for messages and results.

    Example:
        >>> load_tiny().grid
        (8, 8)
    """
    transform = ImageTransform(crop=(64, 64), resize=64)
    backbone = OpenCLIPBackbone(load_model(), ByteTokenizer(), transform, spec=spec)
    backbone.decisions = _decisions(backbone)
    return backbone


def _decisions(backbone: OpenCLIPBackbone) -> tuple[Decision, ...]:
    package = "the package"
    return (
        Decision("architecture", "a CLIP of the package", package),
        Decision("weights", "embedded", package),
        Decision("activation", activation_name(backbone.visual), package),
        *transform_decisions(backbone.transform, size=package, rest=package),
        Decision("prefix tokens", "1 class, 0 register", package),
        Decision("pooling", "class token" if backbone.reads_class_token else "mean", package),
        Decision("tokenizer", "bytes", package),
        Decision("context length", str(backbone.context_length), package),
        Decision("logit scale", f"{backbone.logit_scale:.6g}", "the weights"),
    )
