"""Published figures and ours beside them: the difference, and a flag where it is too large to be chance.

Nobody notices a wrong activation or crop by looking at AUROC; the zero-shot accuracy of known weights tells.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ood_core.detectors.base import right_predictions
from ood_core.prompts import resolve_templates

if TYPE_CHECKING:  # figures alone load no torch
    from ood_core.backbones.base import Backbone
    from ood_core.data.sources import ImageSource

__all__ = [
    "MARGIN",
    "Beside",
    "accuracy_beside",
    "beside",
    "difference_cells",
    "imagenet_accuracy",
    "legend",
    "zero_shot_beside",
]

MARGIN = 1.5
"""Percent points by which a figure may differ from the published one before it is flagged."""

Figures = Mapping[str, Mapping[str, float]]
"""Place (an OOD set, "average", ...) -> measure -> percent."""


@dataclass(frozen=True)
class Beside:
    """One of our figures beside the published one, in percent.

    Attributes:
        row: method or setting.
        place: OOD set, "average" or what else the table has columns for.
        measure: "auroc", "fpr95", "accuracy", ...
        ours: our figure.
        published: the published one.
    """

    row: str
    place: str
    measure: str
    ours: float
    published: float

    @property
    def difference(self) -> float:
        """Ours minus the published, percent points."""
        return self.ours - self.published

    @property
    def off(self) -> bool:
        """Whether it is further away than `MARGIN`."""
        return abs(self.difference) > MARGIN

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = {name: getattr(self, name) for name in ("row", "place", "measure", "ours", "published")}
        return own | {"difference": round(self.difference, 4), "off": self.off}


def beside(row: str, ours: Figures, published: Mapping[str, Mapping[str, float] | None]) -> list[Beside]:
    """The figures that both have; None are the published ones of a place that was left out there.

    Example:
        >>> beside("MCM", {"SUN": {"auroc": 92.0}}, {"SUN": {"auroc": 92.57, "fpr95": 37.6}})[0].difference
        -0.5699999999999932
    """
    known = {place: measures or {} for place, measures in published.items()}
    return [
        Beside(row, place, measure, value, known[place][measure])
        for place, measures in ours.items()
        for measure, value in measures.items()
        if known.get(place, {}).get(measure) is not None
    ]


def difference_cells(found: Sequence[Beside], places: Sequence[str], measures: Sequence[str]) -> list[str]:
    """A table row of differences, a cell per place, measures apart by " / ", figures that are off marked with "!".

    Example:
        >>> difference_cells([Beside("MCM", "SUN", "auroc", 90.0, 92.57)], ["SUN", "Places"], ["fpr95", "auroc"])
        ['- / -2.57!', '']
    """
    by_place = {place: {one.measure: one for one in found if one.place == place} for place in places}
    return [
        " / ".join(_cell(own[measure]) if measure in own else "-" for measure in measures) if own else ""
        for own in by_place.values()
    ]


def _cell(one: Beside) -> str:
    return f"{one.difference:+.2f}{'!' if one.off else ''}"


def legend(found: Sequence[Beside]) -> str:
    """How many figures are off, in a sentence.

    Example:
        >>> legend([Beside("MCM", "SUN", "auroc", 90.0, 92.57)])
        '1 of 1 figures is more than 1.5 points from the published one (marked !): MCM, SUN, auroc by -2.57.'
    """
    if not found:
        return "No published figure belongs to these rows."
    off = sorted((one for one in found if one.off), key=lambda one: -abs(one.difference))
    if not off:
        return f"All {len(found)} figures are within {MARGIN} points of the published ones."
    worst = off[0]
    return (
        f"{len(off)} of {len(found)} figures {'is' if len(off) == 1 else 'are'} more than {MARGIN} points from the "
        f"published one{'' if len(off) == 1 else 's'} (marked !)"
        f"{'' if len(off) == 1 else ', most'}: {worst.row}, {worst.place}, {worst.measure} by {worst.difference:+.2f}."
    )


# ---- zero-shot accuracy on ImageNet-1k


@cache
def _imagenet_rows() -> list[dict[str, Any]]:
    content = json.loads((files(__name__) / "imagenet_zero_shot.json").read_text(encoding="utf-8"))
    return [{"source": content["source"], **row} for row in content["rows"]]


def imagenet_accuracy(spec: str, template: str | Sequence[str] | None = None) -> dict[str, Any] | None:
    """The published zero-shot accuracy of a checkpoint on the validation images of ImageNet-1k.

    Args:
        spec: of the backbone.
        template: prompt, prompts or the name of a set; the figure of the same prompts is preferred.

    Returns:
        "accuracy" (percent), "templates" and "source", and "same_prompts": whether they are of `template`; None where
        nothing is known of the checkpoint.

    Example:
        >>> imagenet_accuracy("open_clip:ViT-B-16/openai", "imagenet")["accuracy"]
        68.34
    """
    rows = [row for row in _imagenet_rows() if spec in row["specs"]]
    own = None if template is None else resolve_templates(template)
    rows = [row | {"same_prompts": resolve_templates(row["templates"]) == own} for row in rows]
    rows.sort(key=lambda row: not row["same_prompts"])
    return {key: rows[0][key] for key in ("accuracy", "templates", "source", "same_prompts")} if rows else None


def accuracy_beside(spec: str, template: str | Sequence[str] | None, accuracy: float) -> tuple[dict[str, Any], str]:
    """A zero-shot ImageNet-1k accuracy beside the published one.

    Args:
        spec: of the backbone.
        template: that the class texts were made with.
        accuracy: measured on the validation images, a fraction.

    Returns:
        What is published (see `imagenet_accuracy`) with "measured", "difference" (percent points) and "off", and a
        sentence for people; ({}, "") where nothing is published.

    Example:
        >>> accuracy_beside("open_clip:ViT-B-16/openai", "imagenet", 0.6401)[0]["off"]
        True
    """
    known = imagenet_accuracy(spec, template)
    if known is None:
        return {}, ""
    found = Beside(spec, "ImageNet-1k", "accuracy", 100 * accuracy, known["accuracy"])
    record = known | {"measured": found.ours, "difference": round(found.difference, 4), "off": found.off}
    sentence = (
        f"Zero-shot accuracy of {spec}: {found.ours:.2f} %, published {found.published:.2f} % "
        f"(difference {found.difference:+.2f})."
    )
    if not known["same_prompts"]:
        sentence += f" The published figure is of other prompts (template {known['templates']!r})."
    if found.off:
        sentence += (
            f" That is more than {MARGIN} points: look at `ood doctor {spec}` (activation, image size, normalisation), "
            "at the class names and at the images before you trust the figures below."
        )
    return record, sentence


IMAGENET_CLASSES = 1000
"""Of the ID set that the published accuracies are of; part of the classes has another accuracy."""


def zero_shot_beside(
    backbone: Backbone,
    test: ImageSource,
    class_names: Sequence[str],
    template: str | Sequence[str] | None = None,
    *,
    needs: Collection[str] = frozenset({"image"}),
    **extraction: Any,
) -> tuple[dict[str, Any], str]:
    """`accuracy_beside` measured here: what a backbone is known for, before other figures are made with it.

    Nothing is computed where nothing is published for the backbone, or the classes are not the 1,000 of ImageNet-1k.

    Args:
        backbone: as it was published.
        test: the validation images, labelled.
        class_names: of the labels.
        template: prompt, prompts or the name of a set.
        needs: features to extract; more than "image" where a cache of them is used again.
        **extraction: of `stream`: cache, on_error, ...

    Returns:
        As `accuracy_beside`.

    Example:
        >>> zero_shot_beside(backbone, protocol.test, protocol.class_names)[1]  # doctest: +SKIP
        'Zero-shot accuracy of open_clip:ViT-B-16/openai: 66.70 %, published 66.73 % (difference -0.03).'
    """
    if len(class_names) != IMAGENET_CLASSES or imagenet_accuracy(backbone.spec) is None:
        return {}, ""
    from ood_core.detectors import create_detector
    from ood_core.features import stream

    options = {} if template is None else {"template": template}
    detector = create_detector("mcm", backbone=backbone, class_names=list(class_names), **options)
    right = [right_predictions(detector, part) for part in stream(backbone, test, {"image", *needs}, **extraction)]
    hits = [value for part in right if part is not None for value in part.tolist()]
    return accuracy_beside(backbone.spec, detector.template, sum(hits) / len(hits)) if hits else ({}, "")
