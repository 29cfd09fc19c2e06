"""The backbone of a detector: one that is loaded, or the record by which it is found again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from ood_core.backbones import create_backbone
from ood_core.backbones.base import Backbone
from ood_core.backbones.specs import located, lost_paths, relative_to
from ood_core.errors import MissingDataError, UsageError
from ood_core.features import FeatureSet

__all__ = ["Held"]

log = logging.getLogger(__name__)

# Largest shifts measured on photographs, in standard deviations of the ID scores: with the embedded backbone, and with
# larger ones.
_BATCH_MOVES = "by up to 0.03 to 0.28 standard deviations of the ID scores."
_PRECISION_MOVES = "scores move by up to 0.08 to 0.33 standard deviations of the ID scores, and some decisions change."


@dataclass(frozen=True)
class Held:
    """What a detector knows of its backbone; replaced as a whole when that changes.

    Attributes:
        owner: name of the detector.
        record: `Backbone.record` of the one it was made with ("dtype": what it was fitted in); empty before.
        backbone: the loaded one.
        told: what has been said once already.
    """

    owner: str
    record: Mapping[str, str] = field(default_factory=dict)
    backbone: Backbone | None = None
    told: set[str] = field(default_factory=set)

    def taking(self, backbone: Backbone) -> Self:
        """The same with this backbone loaded; the precision that the detector was fitted in stays."""
        dtype = self.record.get("dtype") or backbone.precision
        return replace(self, backbone=backbone, record=backbone.record() | {"dtype": dtype})

    def recording(self, **record: str) -> Self:
        """The same with entries of the record changed."""
        return replace(self, record={**self.record, **record})

    @property
    def precision(self) -> str:
        """What the detector was fitted in, e.g. "bfloat16"; "auto" if unknown."""
        return self.record.get("dtype") or "auto"

    @property
    def spec(self) -> str:
        """How to load the backbone that the detector was made with.

        Raises:
            MissingDataError: files or folders in it that are not there any more.
        """
        spec = self.record.get("spec", "tiny")
        if lost := lost_paths(spec):
            raise MissingDataError(
                f"Detector {self.owner!r} was made with backbone {spec!r}, and there is nothing at {lost[0]}: put it "
                "back, or pass backbone= (--backbone) with the place where it is now."
            )
        return spec

    def load(self) -> Backbone:
        """The recorded backbone, in the precision that the detector was fitted in."""
        return create_backbone(self.spec, dtype=self.precision)

    # ---- what fits and what does not

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse another backbone than the recorded one; another precision is said."""
        expected = self.record.get("fingerprint")
        if expected and expected != backbone.fingerprint:
            raise UsageError(
                f"Detector {self.owner!r} was made with backbone {self.record['spec']!r} "
                f"({expected[:12]}), not with {backbone.spec!r} ({backbone.fingerprint[:12]}). Fit it again."
            )
        self._tell_precision(backbone.precision, f"{backbone.spec!r} computes")

    def check_features(self, features: FeatureSet) -> None:
        """Refuse features of another backbone; another precision is said."""
        expected = self.record.get("fingerprint")
        if expected and features.fingerprint and expected != features.fingerprint:
            raise UsageError(
                f"These features are of backbone {features.backbone!r} ({features.fingerprint[:12]}), the detector "
                f"is of {self.record['spec']!r} ({expected[:12]}). Extract them again."
            )
        self._tell_precision(features.dtype, "these features are")

    def _tell_precision(self, now: str, who: str) -> None:
        """Say once that scores are compared across precisions."""
        fitted = self.record.get("dtype")
        if fitted and now and now != fitted and now not in self.told:
            self.told.add(now)
            log.warning(
                "%s was made in %s and %s in %s: %s Use dtype=%r (--dtype %s), or fit and calibrate again.",
                self.owner,
                fitted,
                who,
                now,
                _PRECISION_MOVES,
                fitted,
                fitted,
            )

    def tell_lone_image(self) -> None:
        """Say once that a lone image's score and a threshold from batches differ in half precision."""
        dtype = "" if self.backbone is None else self.backbone.precision
        if dtype in ("bfloat16", "float16") and "batch" not in self.told:
            self.told.add("batch")
            log.warning(
                "%s decides on a single image in %s, in which scores move with the batch size, %s Make the backbone "
                "with dtype='float32' (--dtype float32) for decisions on single images, and calibrate with it.",
                self.owner,
                dtype,
                _BATCH_MOVES,
            )

    # ---- storage

    def saved(self, folder: Path) -> dict[str, str]:
        """The record for a file in `folder`: seen from there, too, as both may move together."""
        spec = self.record.get("spec", "")
        relative = relative_to(spec, folder)
        return {**self.record} | ({} if relative == spec else {"relative": relative})

    @classmethod
    def read(cls, owner: str, saved: Mapping[str, str], folder: Path) -> Self:
        """From what was saved; its files are looked for where they were and then beside the detector."""
        record = {key: value for key, value in saved.items() if key != "relative"}
        moved = located(saved.get("relative", ""), folder)
        if moved and lost_paths(record["spec"]) and not lost_paths(moved):
            record["spec"] = moved
        return cls(owner, record)
