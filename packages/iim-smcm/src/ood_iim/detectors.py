"""The zero-shot detector S-MCM* (no negative prompts)."""

from __future__ import annotations

from typing import Any, cast

from ood_core import _check
from ood_core.detectors.zero_shot import ZeroShot, default_k
from ood_core.features import FeatureSet
from torch import Tensor

from ood_iim import functional

__all__ = ["SMCM"]


class SMCM(ZeroShot):
    """Symmetric MCM without negatives (S-MCM*): global, patch-to-class and class-to-patch matches.

    Args:
        k: (patch, class) entries averaged; None: 50 if the grid has at least 100 patches, else a quarter of
            them.
        temperature: divides the cosines.
        alpha: factor of the class-to-patch term.
        **common: see `create_detector`.

    Example:
        >>> from ood_core import create_detector
        >>> detector = create_detector("s_mcm", backbone="tiny", class_names=["dog", "cat"])  # doctest: +SKIP
        >>> detector.score("photos/")  # doctest: +SKIP
    """

    name = "s_mcm"
    capabilities = frozenset({"image", "local", "text"})

    def __init__(self, *, k: int | None = None, temperature: float = 1.0, alpha: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        self.k = k if k is None else _check.integer("k", k, 1, 2**31)
        self.temperature = _check.positive("temperature", temperature)
        self.alpha = functional.check_alpha(alpha)

    @property
    def needs(self) -> frozenset[str]:
        """Image and local features."""
        return frozenset({"image", "local"})

    def _score(self, features: FeatureSet) -> Tensor:
        # Both are there: the base class has checked `needs`.
        image, local = cast(Tensor, features.image), cast(Tensor, features.local)
        text, k = self._text(features), default_k(self.k, local.shape[1])
        return functional.s_mcm(image, local, text, text, k=k, temperature=self.temperature, alpha=self.alpha)
