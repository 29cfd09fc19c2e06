"""S-MCM without training (S-MCM*): matches in both directions between patches and the class texts."""

from __future__ import annotations

from typing import Any, cast

from ood_core.detectors.zero_shot import ZeroShot, default_k
from ood_core.features import FeatureSet
from ood_core.functional import unsaturated_match
from ood_core.options import flat_options
from PIL import Image
from torch import Tensor

from ood_iim import functional
from ood_iim.options import Matching

__all__ = ["SMCM"]


class SMCM(ZeroShot):
    """Symmetric MCM without negatives (S-MCM*): global, patch-to-class and class-to-patch matches.

    Args:
        scoring: how matches become a score, see `Matching`.
        **common: options of this group by their own names (`k=16`); and see `create_detector`.

    Example:
        >>> from ood_core import create_detector
        >>> detector = create_detector("s_mcm", backbone="tiny", class_names=["dog", "cat"])  # doctest: +SKIP
        >>> detector.score("photos/")  # doctest: +SKIP
    """

    name = "s_mcm"
    capabilities = frozenset({"image", "local", "text"})

    @flat_options
    def __init__(self, *, scoring: Matching = Matching(), **common: Any) -> None:
        super().__init__(**common)
        self.scoring = scoring

    @property
    def needs(self) -> frozenset[str]:
        """Image and local features."""
        return frozenset({"image", "local"})

    def _score(self, features: FeatureSet) -> Tensor:
        # Both are there: the base class has checked `needs`.
        image, local = cast(Tensor, features.image), cast(Tensor, features.local)
        text, k = self._text(features), default_k(self.scoring.k, local.shape[1])
        options: dict[str, Any] = {"k": k, "temperature": self.scoring.temperature, "alpha": self.scoring.alpha}
        score = functional.s_mcm(image, local, text, text, **options)
        return unsaturated_match(score, image, local, text, **options)

    def explain_image(self, image: Image.Image) -> Image.Image:
        """The picture of `ood_iim.explain`.

        Args:
            image: of any size and mode.
        """
        from ood_iim.explain import explain

        return explain(self, image).render()
