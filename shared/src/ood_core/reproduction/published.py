"""What known weights are known for: the zero-shot accuracy on ImageNet-1k, ours beside the published one.

Nobody notices a wrong activation or crop by looking at AUROC; the zero-shot accuracy of known weights tells.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ood_core.detectors.base import right_predictions
from ood_core.prompts import resolve_templates
from ood_core.reproduction.tables import MARGIN, Beside

if TYPE_CHECKING:
    from ood_core.backbones.base import Backbone
    from ood_core.data.sources import ImageSource

__all__ = ["IMAGENET_CLASSES", "accuracy_beside", "imagenet_accuracy", "zero_shot_beside"]


@cache
def _imagenet_rows() -> list[dict[str, Any]]:
    content = json.loads((files("ood_core.reproduction") / "imagenet_zero_shot.json").read_text(encoding="utf-8"))
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
