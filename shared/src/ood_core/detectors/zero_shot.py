"""What detectors share that compare images with class texts."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ood_core.backbones.base import Backbone
from ood_core.detectors.base import Detector
from ood_core.features import FeatureSet

__all__ = ["ZeroShot", "default_k"]


def default_k(k: int | None, patches: int) -> int:
    """`k`, or for None 50 patches of at least 100, else a quarter of them."""
    return k if k is not None else 50 if patches >= 100 else max(1, patches // 4)


class ZeroShot(Detector):
    """Base of detectors that compare images with class texts.

    The text features are computed once, when the backbone is attached, and saved with the detector.
    """

    capabilities = frozenset({"image", "text"})
    remedy = "create it with backbone= and class_names= first"
    least_classes: ClassVar[int] = 2

    @property
    def fitted(self) -> bool:
        """Whether the class texts are encoded."""
        return "text" in self.state

    def _attach(self, backbone: Backbone) -> None:
        super()._attach(backbone)
        if "text" not in self.state:
            self.state["text"] = self._class_texts(backbone)

    def _predict(self, features: FeatureSet) -> Tensor | None:
        return (features.image @ self._text(features).T).argmax(1)

    def _text(self, features: FeatureSet) -> Tensor:
        return self.state["text"].to(features.image.device)
