"""ViM: the part of a feature outside the principal space of ID images, as a logit of its own."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ood_core import check, functional
from ood_core.detectors.logits import LogitDetector
from ood_core.errors import DataError, UsageError
from ood_core.features import FeatureSet

__all__ = ["ViM"]

log = logging.getLogger(__name__)

# Of sums over float32 features, relative: less than this is no residual.
_ROUNDING = 1e-6
# Images per dimension of a principal space; with fewer it is a space of these images, not of their distribution.
_PER_DIMENSION = 4


class ViM(LogitDetector):
    """Virtual-logit matching.

    Args:
        dimension: of the principal space; None: 512 for features of 768 and more, 1000 from 2048 on, else half. Never
            more than a quarter of the images: directions fitted to few images leave these no residual, but every
            other image. A smaller one is used then, and that is said.
        head: "auto", "zero_shot" or "probe", see `LogitDetector`.
        probe_c: see `LogitDetector`.
        **common: see `create_detector`.
    """

    name = "vim"
    fit_options = LogitDetector.fit_options | {"dimension"}

    def __init__(
        self, *, dimension: int | None = None, head: str = "auto", probe_c: float = 10.0, **common: Any
    ) -> None:
        super().__init__(head=head, probe_c=probe_c, **common)
        if head == "classifier":
            raise UsageError("'vim' needs the head's weights: use head='zero_shot' or head='probe'.")
        self.dimension = dimension if dimension is None else check.integer("dimension", dimension, 1, 2**31)

    @property
    def fitted(self) -> bool:
        """Whether the residual space is known."""
        return "null_space" in self.state

    def _choose(self, backbone: Any) -> str:
        return "zero_shot" if "text" in backbone.capabilities and self.class_names else "probe"

    def _fit(self, features: FeatureSet) -> None:
        super()._fit(features)
        if "weight" not in self.state:
            raise UsageError("'vim' with head='zero_shot' takes its logits from a backbone: create it with backbone=.")
        x, width = features.image.double(), features.image.shape[1]
        dimension = self.dimension or (1000 if width >= 2048 else 512 if width >= 768 else width // 2)
        if dimension >= width:
            raise UsageError(f"dimension={dimension} leaves no residual space of {width}-dimensional features.")
        dimension = _supported(dimension, len(x))
        origin = -torch.linalg.pinv(self.state["weight"].double()) @ self.state["bias"].double()
        _, vectors = torch.linalg.eigh((x - origin).T @ (x - origin) / len(x))
        null_space = vectors[:, : width - dimension].contiguous()
        residual = ((x - origin) @ null_space).norm(dim=-1).mean()
        if not residual > _ROUNDING * (x - origin).norm(dim=-1).mean():
            raise DataError(
                f"The features of the {len(x)} images have no more than {dimension} dimensions, which leaves no "
                "residual: give other images (these may be copies of a few), or a smaller dimension."
            )
        alpha = _logit_scale(self.logits(features).double()) / residual
        self.state |= {"origin": origin, "null_space": null_space, "alpha": alpha}

    def _score(self, features: FeatureSet) -> Tensor:
        origin, null_space = (self.state[name].to(features.image.device) for name in ("origin", "null_space"))
        logits, alpha = self.logits(features).double(), float(self.state["alpha"])
        return functional.vim(features.image.double(), logits, origin, null_space, alpha=alpha)


def _supported(dimension: int, images: int) -> int:
    """The dimension of the principal space that so many images can tell."""
    most = max(1, images // _PER_DIMENSION)
    if most < dimension:
        log.warning(
            "vim: %d images support a principal space of %d dimensions, which is used instead of %d; give at least "
            "%d images for that.",
            images,
            most,
            dimension,
            _PER_DIMENSION * dimension,
        )
    return min(dimension, most)


def _logit_scale(logits: Tensor) -> Tensor:
    """The size of the largest logits [N, C], to which the residual is brought.

    The paper's is their mean. Softmax and the order of energies do not change with a constant added to all logits, but
    the mean does, and negative cosines or a negative bias would switch the residual off. Then it is how far the largest
    stands above the average of all.
    """
    largest, above_average = logits.amax(-1).mean(), (logits.amax(-1) - logits.mean(-1)).mean()
    if largest > above_average / 2:
        return largest
    if not above_average > 0:
        raise DataError(
            f"The logits of all {logits.shape[1]} classes are equal: they say nothing of the images. Check the class "
            "names, or use 'knn'."
        )
    log.warning(
        "vim: the mean of the largest logits is %.3g, which would switch the residual off: it is scaled by their mean "
        "height above the average logit, %.3g, instead.",
        largest,
        above_average,
    )
    return above_average
