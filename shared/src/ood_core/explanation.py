"""Why an image got its score: what the explanations of all methods share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ood_core.detectors.base import backbone_of
from ood_core.errors import UsageError
from ood_core.features import FeatureSet, extract
from ood_core.files import write_atomically
from ood_core.pictures import panels

if TYPE_CHECKING:
    from ood_core.detectors.base import Detector

__all__ = ["Explanation", "judged"]


@dataclass(frozen=True, eq=False)
class Explanation:
    """What went into the score of one image; a method adds its parts.

    Attributes:
        image: the RGB picture as the network sees it, resized and cropped.
        score: of the detector; higher = more in-distribution.
        threshold: of the detector, None if it is not calibrated.
        is_ood: the decision, None if the detector is not calibrated.
        predicted: name of the most likely known class.
    """

    image: Image.Image
    score: float
    threshold: float | None
    is_ood: bool | None
    predicted: str

    def shown(self) -> list[panels.Panel]:
        """The panels of the picture, from left to right."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """All but the picture as plain values for JSON."""
        return {name: getattr(self, name) for name in ("score", "threshold", "is_ood", "predicted")}

    def render(self) -> Image.Image:
        """The picture: `shown` side by side below the decision."""
        headline = panels.verdict(self.is_ood, self.score, self.threshold, self.predicted)
        return panels.side_by_side(headline, self.shown())

    def draw(self, path: str | Path) -> Path:
        """Write `render()` as a PNG file (atomic).

        Returns:
            `path`.

        Raises:
            UsageError: a file name that does not end in .png.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise UsageError(f"The picture is a PNG: {str(path)!r} must end in .png.")
        picture = self.render()
        write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))
        return path


def judged(detector: Detector, image: Image.Image, takes: str, *names: str) -> tuple[FeatureSet, dict[str, Any]]:
    """The features of an image, and what its `Explanation` says first.

    Args:
        detector: one that classifies, with a backbone.
        image: of any size and mode.
        takes: which detectors are explained, for the message, e.g. "an 'hvl' detector".
        *names: of these detectors.

    Raises:
        UsageError: another detector, or one without backbone.
        NotFittedError: before `fit`, for methods that need it.
        ImageError: an image that cannot be decoded.
    """
    name = getattr(detector, "name", type(detector).__name__)
    if name not in names:
        raise UsageError(f"explain takes {takes}, got {name!r}: its score has other parts.")
    backbone = backbone_of(detector)
    features = extract(backbone, [image], detector.needs, progress=False)
    score, predicted = detector.score_features(features), detector.predict(features)
    assert predicted is not None  # these classify
    return features, {
        "image": backbone.transform.frame(image),
        "score": float(score),
        "threshold": detector.threshold,
        "is_ood": None if detector.threshold is None else bool(detector.is_ood(score)),
        "predicted": detector.class_names[int(predicted)],
    }
