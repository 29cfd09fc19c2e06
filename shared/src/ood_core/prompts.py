"""Prompts: class names, templates and the text features made of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ood_core.backbones.base import Backbone
from ood_core.data.tables import read_text
from ood_core.errors import DataError, MissingDataError, UsageError, unknown_name

__all__ = ["TEMPLATES", "fill", "imagenet_names", "read_class_names", "resolve_templates", "text_features"]

log = logging.getLogger(__name__)

TEMPLATES: dict[str, list[str]] = {
    "photo": ["a photo of a {}"],
    "simple": [
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ],
}
"""Named sets of templates; "simple" is CLIP's seven for ImageNet, "imagenet" (all eighty) comes from open_clip."""


def resolve_templates(template: str | Sequence[str]) -> list[str]:
    """Templates of a named set, or the given one(s), checked.

    Raises:
        UsageError: a template without exactly one "{}", which is no name of a set either.
    """
    if template == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [make("{}") for make in OPENAI_IMAGENET_TEMPLATES]
    if isinstance(template, str):
        if "{" not in template and template not in TEMPLATES:
            raise unknown_name("template without {} or set of templates", template, [*TEMPLATES, "imagenet"])
        template = TEMPLATES.get(template, [template])
    if not template:
        raise UsageError("template=[] is empty: give at least one template such as 'a photo of a {}'.")
    for one in template:
        if one.count("{}") != 1:
            raise UsageError(f"Template {one!r} must hold {{}} once, where the class name goes.")
    return list(template)


def fill(template: str, name: str) -> str:
    """The prompt of a class; underscores are spaces.

    Example:
        >>> fill("a photo of a {}", "great_white shark")
        'a photo of a great white shark'
    """
    return template.replace("{}", name.replace("_", " "))


def text_features(backbone: Backbone, class_names: Sequence[str], template: str | Sequence[str]) -> Tensor:
    """Class text features, float32 [C, d], unit norm; several templates are averaged and normalised again.

    Args:
        backbone: with a text tower.
        class_names: C names.
        template: prompt with "{}", several of them, or the name of a set ("photo", "simple", "imagenet").

    Raises:
        UsageError: a backbone without a text tower, a template without "{}", or two different names that the text
            tower cannot tell apart.
        ValueError: no class name, or an empty one.

    Example:
        >>> text_features(create_backbone("tiny"), ["dog"], "a photo of a {}").shape  # doctest: +SKIP
        torch.Size([1, 192])
    """
    if empty := [index for index, name in enumerate(class_names) if not str(name).strip()]:
        raise ValueError(f"Class name {empty[0]} of {len(class_names)} is empty.")
    prompts = [[fill(one, name) for name in class_names] for one in resolve_templates(template)]
    parts = [backbone.encode_text(texts, warn=False) for texts in prompts]
    features = parts[0] if len(parts) == 1 else F.normalize(torch.stack(parts).mean(0), dim=-1)
    cut = {index for texts in prompts for index in backbone.cut_texts(texts)}
    _warn_of_cuts(backbone, [class_names[index] for index in sorted(cut)])
    for one, other in [*_same_tokens(backbone, prompts), *_same_rows(features)]:
        if class_names[one] != class_names[other]:
            raise UsageError(
                f"The text tower of {backbone.spec!r} cannot tell the classes {class_names[one]!r} and "
                f"{class_names[other]!r} apart: "
                f"{'what it reads of their prompts' if {one, other} <= cut else 'their prompt'} is the same to it. "
                "Give names that differ in letters, or a shorter template."
            )
    return features


def _warn_of_cuts(backbone: Backbone, names: list[str]) -> None:
    if names:
        log.warning(
            "The text tower of %s reads %d tokens; the end of the prompts of class %s%s is cut.",
            *(backbone.spec, backbone.context_length, ", class ".join(map(repr, names[:5]))),
            f" and of {len(names) - 5} more" if len(names) > 5 else "",
        )


def _same_tokens(backbone: Backbone, prompts: list[list[str]]) -> list[tuple[int, int]]:
    """Pairs of classes whose prompts are the same token by token, with every template."""
    pairs = backbone.same_texts(prompts[0])
    return [(i, j) for i, j in pairs if all(backbone.same_texts([texts[i], texts[j]]) for texts in prompts[1:])]


def _same_rows(features: Tensor) -> list[tuple[int, int]]:
    first: dict[bytes, int] = {}
    rows = [row.tobytes() for row in features.cpu().numpy()]
    return [(first[row], index) for index, row in enumerate(rows) if first.setdefault(row, index) != index]


# Of CLIP's list two names occur twice: the other class of each pair, by position, gets the name of its synset.
_TOLD_APART = {744: "projectile", 836: "sunglass"}


def imagenet_names() -> list[str]:
    """CLIP's 1,000 ImageNet class names in sorted wnid order, all different.

    CLIP's own list calls two classes "missile" and two "sunglasses"; here one is "projectile", one "sunglass", as
    ImageNet names them.
    """
    from open_clip import IMAGENET_CLASSNAMES

    return [_TOLD_APART.get(index, name) for index, name in enumerate(IMAGENET_CLASSNAMES)]


# n04008634 and n04355933, which CLIP's list calls "missile" and "sunglasses" like their neighbours: WordNet's names.
_TOLD_APART = {744: "projectile", 836: "sunglass"}


def read_class_names(source: str | Path, *, encoding: str | None = None) -> list[str]:
    """Class names from a text file, one per line, or "imagenet" for the built-in list.

    Args:
        source: the file.
        encoding: of the file; None: what its byte order mark says, else UTF-8.

    Raises:
        MissingDataError: no such file.
        DataError: an empty file, or one of another encoding.
        UsageError: an unknown encoding.
    """
    if str(source) == "imagenet":
        return imagenet_names()
    path = Path(source)
    if not path.is_file():
        raise MissingDataError(f"No class-name file {path}: give a text file with one name per line, or 'imagenet'.")
    names = [line.strip() for line in read_text(path, encoding).splitlines()]
    names = [name for name in names if name]
    if not names:
        raise DataError(f"{path} holds no class name.")
    return names
