"""One score from several detectors, each brought to the same scale on ID images only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ood_core import _check
from ood_core.backbones.base import Backbone
from ood_core.detectors.base import Detector
from ood_core.errors import DataError, NotFittedError, UsageError
from ood_core.features import FeatureSet, extract

__all__ = ["Fusion"]

_COMBINE = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0), "min": lambda x: x.amin(0)}


class Fusion(Detector):
    """Several detectors as one, on features of one backbone.

    `fit` fits the members that need it, `calibrate` learns every member's ID distribution and then the threshold of
    the combined score.

    Args:
        members: detectors, or name -> detector.
        normalize: "ecdf" (share of calibration scores at or below) or "zscore".
        combine: "mean", "max" or "min" of the normalised scores.

    Raises:
        UsageError: fewer than two members, or two of the same name.

    Example:
        >>> fused = Fusion([create_detector("mcm", ...), create_detector("knn", ...)])  # doctest: +SKIP
        >>> fused.fit(train).calibrate(val).is_ood(test)  # doctest: +SKIP
    """

    name = "fusion"

    def __init__(
        self,
        members: Sequence[Detector] | Mapping[str, Detector],
        *,
        normalize: str = "ecdf",
        combine: str = "mean",
    ) -> None:
        super().__init__()
        named = members if isinstance(members, Mapping) else {member.name: member for member in members}
        if len(named) < 2 or len(named) != len(members):
            raise UsageError(f"Fusion needs two or more detectors of different names, got {[*named]}.")
        self.members = dict(named)
        self.normalize = _check.choice("normalize", normalize, ("ecdf", "zscore"))
        self.combine = _check.choice("combine", combine, tuple(_COMBINE))

    @property
    def needs(self) -> frozenset[str]:
        """What the members need together."""
        return frozenset[str]().union(*(member.needs for member in self.members.values()))

    @property
    def fitted(self) -> bool:
        """Whether every member can score."""
        return all(member.fitted for member in self.members.values())

    @property
    def backbone(self) -> Backbone | None:
        """The members' backbone."""
        return next((member.backbone for member in self.members.values() if member.backbone), None)

    def _check_features(self, features: FeatureSet) -> None:
        for member in self.members.values():
            member._check_features(features)

    def _fit(self, features: FeatureSet) -> None:
        for member in self.members.values():
            if not member.fitted:
                member.fit(features)

    def calibrate(self, id_scores: Any, tpr: float = 0.95) -> Self:
        """Learn the members' ID distributions from features or images, then the threshold (see `Detector`).

        Raises:
            DataError: a member whose scores are constant; the message names it.
        """
        features = id_scores
        if not isinstance(features, FeatureSet):
            features = extract(self._required_backbone(), id_scores, needs=self.needs)
        scores = {name: member.score_features(features) for name, member in self.members.items()}
        for name, values in scores.items():
            if not values.std() > 0:
                raise DataError(f"Member {name!r} gives every calibration image the same score: leave it out.")
        self.state = {name: values.sort().values for name, values in scores.items()}
        return super().calibrate(self.score_features(features), tpr)

    def _score(self, features: FeatureSet) -> Tensor:
        if not self.state:
            raise NotFittedError("The fusion does not know its members' ID scores: call calibrate(id_features) first.")
        return _COMBINE[self.combine](
            torch.stack([self._normalized(name, member._score(features)) for name, member in self.members.items()])
        )

    def _normalized(self, name: str, scores: Tensor) -> Tensor:
        reference, scores = self.state[name], scores.float().cpu()
        if self.normalize == "ecdf":
            return torch.searchsorted(reference, scores, right=True).float() / len(reference)
        return (scores - reference.mean()) / reference.std()

    @classmethod
    def _option_names(cls) -> list[str]:
        return ["normalize", "combine"]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the fusion and its members (subfolders `members/NAME`)."""
        for name, member in self.members.items():
            member.save_pretrained(Path(folder) / "members" / name)
        super().save_pretrained(folder)

    @classmethod
    def _empty(cls, path: Path, config: dict[str, Any]) -> Self:
        folders = sorted((path / "members").iterdir())
        members = {folder.name: Detector.from_pretrained(folder) for folder in folders}
        return cls(members, **config["params"])

    def _set_backbone(self, backbone: Backbone | str) -> None:
        for member in self.members.values():
            member._set_backbone(backbone)
