"""Why an image got its S-MCM score: its terms, the patches that IIM would mine, and maps over the patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from ood_core.detectors.base import backbone_of
from ood_core.detectors.zero_shot import default_k
from ood_core.errors import UsageError
from ood_core.features import extract
from ood_core.functional import mcm
from ood_core.pictures import panels
from ood_core.pictures.panels import Drawable, Panel
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:  # they explain themselves by this module
    from ood_iim.detectors import IIM, SMCM

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True, eq=False)
class Explanation(Drawable):
    """What went into the score of one image.

    Patches are numbered row by row from 0; maps are [h, w], the grid of the backbone.

    Attributes:
        image: the RGB picture as the network sees it, resized and cropped.
        score: of the detector; higher = more in-distribution.
        threshold: of the detector, None if it is not calibrated.
        is_ood: the decision, None if the detector is not calibrated.
        mcm: first term of the score, the global match.
        image_to_text: second term, the best patch-to-class matches.
        text_to_image: third term, the best class-to-patch matches, times alpha.
        predicted: name of the most likely known class, by `detector.predict`.
        positive_patches: those of ranks 1 to k by their similarity to the predicted class, best first; k is the
            `train_k` of an `IIM` and the `k` of an `SMCM`, at most P.
        ood_patches: those of ranks k + 1 to 2k; fewer, or none, if the grid ends before.
        best_class: int64 [h, w], the most probable class of every patch, index into `class_names`.
        image_to_text_map: float64 [h, w] in (0, 1), the softmax probability of that class among all classes and
            the negatives.
        text_to_image_map: float64 [h, w] in (0, 1), the largest softmax probability of the patch among all
            patches, over classes.
        class_names: the known classes.
        negatives: negative prompts in the score, 0 for none.
    """

    image: Image.Image
    score: float
    threshold: float | None
    is_ood: bool | None
    mcm: float
    image_to_text: float
    text_to_image: float
    predicted: str
    positive_patches: list[int]
    ood_patches: list[int]
    best_class: Tensor
    image_to_text_map: Tensor
    text_to_image_map: Tensor
    class_names: list[str]
    negatives: int

    def to_dict(self) -> dict[str, Any]:
        """All but the picture as plain values for JSON; the best classes by name."""
        names = ("score", "threshold", "is_ood", "mcm", "image_to_text", "text_to_image", "predicted", "negatives")
        return {
            **{name: getattr(self, name) for name in names},
            "grid": list(self.best_class.shape),
            "positive_patches": list(self.positive_patches),
            "ood_patches": list(self.ood_patches),
            "best_class": [[self.class_names[index] for index in row] for row in self.best_class.tolist()],
            "image_to_text_map": self.image_to_text_map.tolist(),
            "text_to_image_map": self.text_to_image_map.tolist(),
        }

    def render(self) -> Image.Image:
        """Five panels of about 320 pixels side by side: image, mined patches, best classes and the two maps.

        The maps are scaled from their own minimum (dark) to their own maximum (light).
        """
        return panels.side_by_side(
            _headline(self), [_picture(self), _mined_patches(self), _best_classes(self), *_maps(self)]
        )


def explain(detector: SMCM | IIM, image: Image.Image) -> Explanation:
    """Take the S-MCM score of one image apart.

    Args:
        detector: an `SMCM`, or a fitted `IIM`, with a backbone.
        image: of any size and mode.

    Returns:
        An `Explanation`; its three terms sum to `detector.score(image)`.

    Raises:
        UsageError: another detector, or one without backbone.
        NotFittedError: an `IIM` before `fit`.
        ImageError: an image that cannot be decoded.

    Example:
        >>> explain(detector, Image.open("photo.jpg")).draw("why.png")  # doctest: +SKIP
    """
    if getattr(detector, "name", None) not in ("s_mcm", "iim"):
        name = getattr(detector, "name", type(detector).__name__)
        raise UsageError(f"explain takes an 's_mcm' or 'iim' detector, got {name!r}: its score has other parts.")
    backbone = backbone_of(detector)
    features = extract(backbone, [image], detector.needs, progress=False)
    # Both are there: these detectors read patches, and they classify.
    grid, predicted = cast(tuple[int, int], features.grid), int(cast(Tensor, detector.predict(features)))
    score, texts, transform = detector.score_features(features), _texts(detector), backbone.transform
    # In float64, so that the terms sum to the score in all its digits.
    whole, local = features.image.double(), features.local[0].double()
    p, q = _probabilities(local, texts, detector.scoring.temperature)
    (patches, classes), k = p.shape, default_k(detector.scoring.k, len(local))
    positive, ood = _mined(detector, local @ texts.local[predicted])
    return Explanation(
        image=transform.frame(image),
        score=float(score),
        threshold=detector.threshold,
        is_ood=None if detector.threshold is None else bool(detector.is_ood(score)),
        mcm=float(mcm(whole, texts.whole, temperature=detector.scoring.temperature)),
        image_to_text=_mean_of_largest(p, k),
        text_to_image=detector.scoring.alpha * patches / classes * _mean_of_largest(q, k),
        predicted=detector.class_names[predicted],
        positive_patches=positive,
        ood_patches=ood,
        best_class=p.argmax(1).view(grid),
        image_to_text_map=p.amax(1).view(grid),
        text_to_image_map=q.amax(1).view(grid),
        class_names=list(detector.class_names),
        negatives=0 if texts.negatives is None else len(texts.negatives),
    )


class _Texts(NamedTuple):
    """float64 text features that the score of a detector reads, and its form."""

    whole: Tensor
    local: Tensor
    negatives: Tensor | None = None
    form: str = "paper"


def _texts(detector: SMCM | IIM) -> _Texts:
    if "local_text" not in detector.state:
        text = detector.state["text"].double()
        return _Texts(text, text)
    whole, local = (detector.state[name].double() for name in ("text", "local_text"))
    trained = cast("IIM", detector)
    used = "negatives" in trained.state and trained.scoring.negatives == "use"
    return _Texts(whole, local, trained.state["negatives"].double() if used else None, trained.scoring.form)


def _probabilities(local: Tensor, texts: _Texts, temperature: float) -> tuple[Tensor, Tensor]:
    """p [P, C], softmax over classes and negatives, and q [P, C], softmax over patches (Eq. 3 and 4)."""
    logits = local @ texts.local.T / temperature
    together = logits
    if texts.negatives is not None:
        together = torch.cat([logits, local @ texts.negatives.T / temperature], 1)
        if texts.form == "released":
            together = together.exp() / temperature
    return together.softmax(1)[:, : logits.shape[1]], logits.softmax(0)


def _mined(detector: SMCM | IIM, similarity: Tensor) -> tuple[list[int], list[int]]:
    """Patches of ranks 1 to k and k + 1 to 2k of a class's similarities [P], with the k of the training of IIM."""
    patches = len(similarity)
    k = min(patches, default_k(getattr(detector, "train_k", detector.scoring.k), patches))
    ranked = similarity.argsort(descending=True, stable=True).tolist()
    return ranked[:k], ranked[k : 2 * k]


def _mean_of_largest(values: Tensor, count: int) -> float:
    return float(values.flatten().topk(count).values.mean())


# The picture. Panels are a whole number of pixels per patch, so that all edges fall on the same places.

_SIDE = 320
_POSITIVE, _OOD = panels.COLORS[0], panels.COLORS[5]


def _cell(found: Explanation) -> int:
    return max(1, round(_SIDE / max(found.best_class.shape)))


def _headline(found: Explanation) -> str:
    return panels.verdict(found.is_ood, found.score, found.threshold, found.predicted)


def _picture(found: Explanation) -> Panel:
    terms = {
        "score": found.score,
        "= MCM": found.mcm,
        "+ image to text": found.image_to_text,
        "+ text to image": found.text_to_image,
    }
    lines = [(None, f"{name} {value:.4f}") for name, value in terms.items()]
    return Panel("Image as the network sees it", _enlarged(found), lines)


def _enlarged(found: Explanation) -> Image.Image:
    rows, columns = found.best_class.shape
    return found.image.resize((columns * _cell(found), rows * _cell(found)), Image.Resampling.BICUBIC)


def _mined_patches(found: Explanation) -> Panel:
    picture, columns = _enlarged(found), found.best_class.shape[1]
    for patches, color in ((found.positive_patches, _POSITIVE), (found.ood_patches, _OOD)):
        panels.outline(picture, [divmod(patch, columns) for patch in patches], _cell(found), color)
    name = panels.printable(found.predicted)
    lines = [
        (_POSITIVE, f"positive: the {len(found.positive_patches)} most like {name}"),
        (_OOD, f"OOD: the next {len(found.ood_patches)}"),
    ]
    return Panel("Mined patches", picture, lines)


def _best_classes(found: Explanation) -> Panel:
    classes = found.best_class.numpy()
    return panels.class_map("Best class (number of patches)", classes, found.class_names, _cell(found))


def _maps(found: Explanation) -> list[Panel]:
    among = "classes and negatives" if found.negatives else "classes"
    maps = [
        ("Image to text", found.image_to_text_map, f"largest softmax over {among}"),
        ("Text to image", found.text_to_image_map, "largest softmax over patches"),
    ]
    return [panels.heat_map(title, values.numpy(), about, _cell(found)) for title, values, about in maps]
