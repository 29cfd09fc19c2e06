"""Why an image got its S-MCM score: its terms, the patches that IIM would mine, and maps over the patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from ood_core import explanation
from ood_core.detectors.zero_shot import default_k
from ood_core.explanation import judged
from ood_core.functional import mcm
from ood_core.pictures import panels
from ood_core.pictures.panels import Panel
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:  # they explain themselves by this module
    from ood_iim.detectors import IIM
    from ood_iim.s_mcm import SMCM

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True, eq=False)
class Explanation(explanation.Explanation):
    """What went into the score of one image, besides what `ood_core.explanation.Explanation` holds.

    Patches are numbered row by row from 0; maps are [h, w], the grid of the backbone.

    Attributes:
        mcm: first term of the score, the global match.
        image_to_text: second term, the best patch-to-class matches.
        text_to_image: third term, the best class-to-patch matches, times alpha.
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

    mcm: float
    image_to_text: float
    text_to_image: float
    positive_patches: list[int]
    ood_patches: list[int]
    best_class: Tensor
    image_to_text_map: Tensor
    text_to_image_map: Tensor
    class_names: list[str]
    negatives: int

    def to_dict(self) -> dict[str, Any]:
        """All but the picture as plain values for JSON; the best classes by name."""
        names = ("mcm", "image_to_text", "text_to_image", "negatives")
        return {
            **super().to_dict(),
            **{name: getattr(self, name) for name in names},
            "grid": list(self.best_class.shape),
            "positive_patches": list(self.positive_patches),
            "ood_patches": list(self.ood_patches),
            "best_class": [[self.class_names[index] for index in row] for row in self.best_class.tolist()],
            "image_to_text_map": self.image_to_text_map.tolist(),
            "text_to_image_map": self.text_to_image_map.tolist(),
        }

    def shown(self) -> list[Panel]:
        """Five panels of about 320 pixels: image, mined patches, best classes and the two maps.

        The maps are scaled from their own minimum (dark) to their own maximum (light).
        """
        return [_picture(self), _mined_patches(self), _best_classes(self), *_maps(self)]


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
    features, judgement = judged(detector, image, "an 's_mcm' or 'iim' detector", "s_mcm", "iim")
    grid = cast(tuple[int, int], features.grid)  # these detectors read patches
    predicted, texts = detector.class_names.index(judgement["predicted"]), _texts(detector)
    # In float64, so that the terms sum to the score in all its digits.
    whole, local = features.image.double(), features.local[0].double()
    p, q = _probabilities(local, texts, detector.scoring.temperature)
    (patches, classes), k = p.shape, default_k(detector.scoring.k, len(local))
    positive, ood = _mined(detector, local @ texts.local[predicted])
    return Explanation(
        **judgement,
        mcm=float(mcm(whole, texts.whole, temperature=detector.scoring.temperature)),
        image_to_text=_mean_of_largest(p, k),
        text_to_image=detector.scoring.alpha * patches / classes * _mean_of_largest(q, k),
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
