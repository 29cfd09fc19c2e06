"""Why an image got its MoFE score: the expert it went to, the training images nearest to it, and how far they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from ood_core import explanation, functional
from ood_core.data import open_source
from ood_core.data.sources import ImageSource
from ood_core.detectors.base import backbone_of
from ood_core.errors import DataError
from ood_core.explanation import judged
from ood_core.features import FeatureSet, extract
from ood_core.pictures import panels
from ood_core.pictures.panels import Panel
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:  # it explains itself by this module
    from ood_mofe.detectors import MoFE

__all__ = ["Expert", "Explanation", "Neighbour", "explain"]

_MOST = 1000  # training images whose own distances are measured


class Expert(NamedTuple):
    """An expert and how probable the router finds it.

    Attributes:
        number: from 0.
        probability: by the router.
        classes: names of its classes.
    """

    number: int
    probability: float
    classes: list[str]


class Neighbour(NamedTuple):
    """A training image.

    Attributes:
        row: its place among the images that the detector was fitted on, from 0.
        distance: between unit-norm features, in [0, 2].
        id: and `label`, `image`: None without the training images; the label also where it has none.
        label: name of its class.
        image: itself.
    """

    row: int
    distance: float
    id: str | None = None
    label: str | None = None
    image: Image.Image | None = None

    @property
    def name(self) -> str:
        """What to call it."""
        return f"training image number {self.row}" if self.id is None else self.label or self.id


@dataclass(frozen=True, eq=False)
class Explanation(explanation.Explanation):
    """What went into the score of one image, besides what `ood_core.explanation.Explanation` holds.

    Attributes:
        experts: all, the most probable first: that one computed the features.
        neighbours: the nearest entries of the bank that the image is compared with, nearest first.
        k: rank of the neighbour that counts, no more than the bank has.
        distance: to that neighbour; 2 where the bank is empty.
        id_distances: the same of known images, sorted float32 [M].
        reference: which images these are, "calibration images" or "training images, each left out".
    """

    experts: list[Expert]
    neighbours: list[Neighbour]
    k: int
    distance: float
    id_distances: Tensor
    reference: str

    @property
    def farther(self) -> float | None:
        """Share of the known images that lie at least as far from their neighbours; None if there are none."""
        if not len(self.id_distances):
            return None
        return (self.id_distances >= self.distance).double().mean().item()

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures as plain values for JSON."""
        names = ("k", "distance", "reference", "farther")
        return {
            **super().to_dict(),
            **{name: getattr(self, name) for name in names},
            "experts": [expert._asdict() for expert in self.experts],
            "neighbours": [
                {name: getattr(one, name) for name in ("row", "distance", "id", "label")} for one in self.neighbours
            ],
            "id_distances": self.id_distances.tolist(),
        }

    def shown(self) -> list[Panel]:
        """Four panels: image, experts, nearest training images, distances of known images."""
        return [_whole(self), _experts(self), _neighbours(self), _distances(self)]


@torch.no_grad()
def explain(
    detector: MoFE, image: Image.Image, *, train: ImageSource | str | Path | None = None, neighbours: int = 6
) -> Explanation:
    """Take the score of one image apart.

    Args:
        detector: a fitted `MoFE` with a backbone.
        image: of any size and mode.
        train: the images it was fitted on, to show the nearest ones.
        neighbours: how many of them.

    Raises:
        UsageError: another detector, or one without backbone.
        NotFittedError: before `fit`.
        DataError: `train` are other images.

    Example:
        >>> explain(detector, Image.open("photo.jpg"), train="train/").draw("why.png")  # doctest: +SKIP
    """
    features, judgement = judged(detector, image, "a 'mofe' detector", "mofe")
    bank, rows = _compared_with(detector, features)
    k = min(detector.neighbour, len(bank))
    query = F.normalize(features.extra["token"], dim=1).to(bank)
    nearest = _nearest(query, bank, rows, neighbours)
    reference, distances = _known_distances(detector, bank)
    return Explanation(
        **judgement,
        experts=_ranked(detector, features.extra["router"][0]),
        neighbours=nearest if train is None else _shown(detector, open_source(train), nearest),
        k=k,
        distance=-float(functional.knn(query, bank, k=k)) if k else 2.0,
        id_distances=distances.sort().values,
        reference=reference,
    )


def _compared_with(detector: MoFE, features: FeatureSet) -> tuple[Tensor, Tensor]:
    """Entries of the bank [K, D] and their rows [K]."""
    bank, rows = detector.state["bank"], detector.state["bank_row"]
    if detector.scoring.bank == "global":
        return bank, rows
    mine = detector.state["bank_expert"] == features.extra["router"].argmax(1).cpu()
    return bank[mine], rows[mine]


def _nearest(query: Tensor, bank: Tensor, rows: Tensor, count: int) -> list[Neighbour]:
    found = (bank @ query[0]).topk(min(count, len(bank))).indices
    distances = (bank[found] - query).norm(dim=1)
    return sorted(map(Neighbour, rows[found].tolist(), distances.tolist()), key=lambda one: one.distance)


def _known_distances(detector: MoFE, bank: Tensor) -> tuple[str, Tensor]:
    """What is known of the same distance for ID images; entries of the bank are compared with the others."""
    if detector.scoring.scorer == "knn" and detector.calibration is not None:
        return "calibration images", -detector.calibration.scores
    few = bank[torch.linspace(0, max(len(bank) - 1, 0), min(len(bank), _MOST)).round().long()]
    if len(bank) < 2:
        return "training images, each left out", bank.new_zeros(0)
    # An entry's nearest is itself, so that its k-th other one is the k + 1st.
    return "training images, each left out", -functional.knn(few, bank, k=min(detector.neighbour + 1, len(bank)))


def _ranked(detector: MoFE, logits: Tensor) -> list[Expert]:
    probability = logits.softmax(0).tolist()
    names = [detector.class_names] if len(probability) == 1 else map(detector._classes_of, range(len(probability)))
    experts = map(Expert, range(len(probability)), probability, map(list, names))
    return sorted(experts, key=lambda expert: -expert.probability)


def _shown(detector: MoFE, train: ImageSource, nearest: list[Neighbour]) -> list[Neighbour]:
    """The neighbours with their images."""
    _check_same(detector, train, nearest)
    labels = [-1] * len(train) if train.labels is None else train.labels.tolist()
    return [
        Neighbour(
            one.row,
            one.distance,
            train.ids[one.row],
            train.label_names[labels[one.row]] if labels[one.row] >= 0 else None,
            train.open(one.row),
        )
        for one in nearest
    ]


# Another precision changes a feature by a few hundredths, and may send one image or another to another expert.
_SAME = 0.1


def _check_same(detector: MoFE, train: ImageSource, nearest: list[Neighbour]) -> None:
    """The images must be those of the bank: a number alone would find some picture in any source."""
    if len(train) <= (most := int(detector.state["bank_row"].max())):
        raise DataError(
            f"The detector was fitted on at least {most + 1} images, {len(train)} are given: give the same."
        )
    rows = [one.row for one in nearest]
    if not rows:
        return
    found = extract(backbone_of(detector), train.subset(rows), detector.needs, progress=False)
    place = (detector.state["bank_row"] == torch.tensor(rows)[:, None]).int().argmax(1)
    known = detector.state["bank"][place]
    if (F.normalize(found.extra["token"].cpu(), dim=1) - known).norm(dim=1).median() > _SAME:
        raise DataError(
            f"Image {train.ids[rows[0]]!r} is not number {rows[0]} of those the detector was fitted on: give the same."
        )


# The picture.

_SIDE = 320
_HERE, _LIMIT = panels.COLORS[5], panels.COLORS[0]
_NAMES = 3  # classes named per expert


def _whole(found: Explanation) -> Panel:
    lines = [(None, f"predicted class: {panels.printable(found.predicted)}"), (None, f"score {found.score:.4f}")]
    return Panel("Image as the network sees it", found.image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), lines)


def _experts(found: Explanation) -> Panel:
    """A column per expert, at most as many as there are colours."""
    shown = list(zip(found.experts, panels.COLORS, strict=False))
    picture = panels.bars([expert.probability for expert, _ in shown], [color for _, color in shown], _SIDE)
    return Panel("Experts by the router's probability", picture, [(color, _about(expert)) for expert, color in shown])


def _about(expert: Expert) -> str:
    names = ", ".join(map(panels.printable, expert.classes[:_NAMES]))
    count = len(expert.classes)
    return f"{100 * expert.probability:.0f} %  expert {expert.number}, {count} classes: {names}"


def _neighbours(found: Explanation) -> Panel:
    """Their pictures, or where they are not at hand their distances as columns."""
    lines = [(None, f"{one.distance:.3f}  {panels.printable(one.name)}") for one in found.neighbours]
    pictures = [one.image for one in found.neighbours if one.image is not None]
    if pictures:
        return Panel("Nearest training images", panels.grid(pictures, _SIDE), lines)
    distances = [one.distance for one in found.neighbours] or [0.0]
    columns = panels.bars(distances, [panels.COLORS[4]] * len(distances), _SIDE)
    return Panel("Nearest training images by distance", columns, lines)


def _distances(found: Explanation) -> Panel:
    marks = [(_HERE, found.distance)]
    lines: list[tuple[str | None, str]] = [(_HERE, f"this image: {found.distance:.4f} (neighbour number {found.k})")]
    if found.reference == "calibration images" and found.threshold is not None:
        marks.append((_LIMIT, -found.threshold))
        lines.append((_LIMIT, f"threshold: {-found.threshold:.4f}"))
    known = found.id_distances
    if found.farther is not None:
        lines += [
            (panels.OTHER, f"{known[0]:.4f} to {known[-1]:.4f}: {len(known)} {found.reference}"),
            (None, f"{100 * found.farther:.1f} % of them are as far or farther"),
        ]
    return Panel("Distances of known images", panels.histogram(known.tolist(), marks, _SIDE), lines)
