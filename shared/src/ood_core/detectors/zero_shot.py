"""Zero-shot detectors of vision-language models: MCM, GL-MCM, R-MCM."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ood_core import _check, functional
from ood_core.backbones.base import Backbone
from ood_core.detectors.base import Detector
from ood_core.detectors.logits import unsaturated_msp
from ood_core.features import FeatureSet

__all__ = ["GLMCM", "MCM", "RMCM", "ZeroShot", "default_k"]


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

    def _predict(self, features: FeatureSet) -> Tensor:
        return (features.image @ self._text(features).T).argmax(1)

    def _text(self, features: FeatureSet) -> Tensor:
        return self.state["text"].to(features.image.device)


class MCM(ZeroShot):
    """Maximum concept matching; above .999 in the order of the log-odds (see `functional.unsaturated`).

    Args:
        temperature: divides the cosines.
        **common: see `create_detector`.
    """

    name = "mcm"

    def __init__(self, *, temperature: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        self.temperature = _check.positive("temperature", temperature)

    def _score(self, features: FeatureSet) -> Tensor:
        return unsaturated_msp(features.image @ self._text(features).T, temperature=self.temperature)


class GLMCM(ZeroShot):
    """Global-local maximum concept matching; near its bound in exact order (see `functional.unsaturated_match`).

    Args:
        temperature: divides the cosines.
        local_weight: factor of the local term, at least 0.
        **common: see `create_detector`.
    """

    name = "gl_mcm"
    capabilities = frozenset({"image", "local", "text"})

    def __init__(self, *, temperature: float = 1.0, local_weight: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        self.temperature = _check.positive("temperature", temperature)
        self.local_weight = 0.0 if local_weight == 0 else _check.positive("local_weight", local_weight)

    @property
    def needs(self) -> frozenset[str]:
        """Image and local features."""
        return frozenset({"image", "local"})

    def _score(self, features: FeatureSet) -> Tensor:
        matched = (features.image, features.local, self._text(features))
        options: dict[str, Any] = {"temperature": self.temperature, "local_weight": self.local_weight}
        return functional.unsaturated_match(functional.gl_mcm(*matched, **options), *matched, k=1, **options)


class RMCM(ZeroShot):
    """Regional MCM without negatives (R-MCM*); near its bound in exact order (see `functional.unsaturated_match`).

    Args:
        k: (patch, class) entries averaged; None: 50 if the grid has at least 100 patches, else a quarter of them.
        temperature: divides the cosines.
        **common: see `create_detector`.
    """

    name = "r_mcm"
    capabilities = frozenset({"image", "local", "text"})

    def __init__(self, *, k: int | None = None, temperature: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        self.k = k if k is None else _check.integer("k", k, 1, 2**31)
        self.temperature = _check.positive("temperature", temperature)

    @property
    def needs(self) -> frozenset[str]:
        """Image and local features."""
        return frozenset({"image", "local"})

    def _score(self, features: FeatureSet) -> Tensor:
        matched = (features.image, features.local, self._text(features))
        k = default_k(self.k, features.local.shape[1])
        score = functional.r_mcm(*matched, k=k, temperature=self.temperature)
        return functional.unsaturated_match(score, *matched, k=k, temperature=self.temperature)
