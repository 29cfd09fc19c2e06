"""Fig. 3: how alike the text prototypes of class lists are, and where they lie in two dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ood_core.backbones.base import Backbone
from ood_core.errors import UsageError
from ood_core.prompts import read_class_names, text_features
from torch import Tensor

from ood_iim.detectors import IIM

__all__ = ["imagenet_halves", "pair_similarities", "prototypes", "text_map"]


def imagenet_halves() -> dict[str, list[str]]:
    """CLIP's names of ImageNet's first and last 500 classes, ImageNet-500-Easy and -Hard.

    Example:
        >>> [len(names) for names in imagenet_halves().values()]
        [500, 500]
    """
    names = read_class_names("imagenet")
    return {"ImageNet-500-Easy": names[:500], "ImageNet-500-Hard": names[500:]}


def pair_similarities(text: Tensor) -> Tensor:
    """Cosines of all pairs i < j.

    Args:
        text: [C, d] unit norm.

    Returns:
        [C (C - 1) / 2], row by row.

    Example:
        >>> pair_similarities(torch.eye(3))
        tensor([0., 0., 0.])
    """
    rows, columns = torch.triu_indices(len(text), len(text), 1)
    return (text @ text.T)[rows, columns]


def text_map(texts: Mapping[str, Tensor], *, seed: int = 0) -> dict[str, Tensor]:
    """All prototypes together in two dimensions, by t-SNE on their cosines.

    Args:
        texts: list -> [C, d] unit norm, at least three in all.
        seed: of the t-SNE.

    Returns:
        list -> [C, 2].
    """
    from sklearn.manifold import TSNE

    whole = torch.cat([*texts.values()]).numpy()
    perplexity = min(30.0, (len(whole) - 1) / 3)
    places = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed).fit_transform(whole)
    sizes = [len(text) for text in texts.values()]
    return dict(zip(texts, torch.from_numpy(places).split(sizes), strict=True))


def prototypes(
    backbone: Backbone, lists: Mapping[str, Sequence[str]], *, template: str | None = None, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """The figure as numbers.

    Args:
        backbone: CLIP-like.
        lists: name -> class names, at least two each.
        template: None: that of the global term of IIM.
        seed: of the t-SNE.

    Returns:
        list -> "classes" (their number), "mean", "std" and "quantiles" (of 0, 5, 25, 50, 75, 95 and 100 %) of the
        cosines of pairs, "similarities" (all of them), and "map": "class", "x", "y" of every prototype.

    Raises:
        UsageError: a list of fewer than two classes, or fewer than three classes in all.

    Example:
        >>> found = prototypes(backbone, {"pets": ["cat", "dog"], "cars": ["van", "bus"]})  # doctest: +SKIP
    """
    if short := [name for name, names in lists.items() if len(names) < 2]:
        raise UsageError(f"List {short[0]!r} has {len(lists[short[0]])} classes: at least two make a pair.")
    if sum(map(len, lists.values())) < 3:
        raise UsageError("Two classes in all have no map: give longer lists, or more of them.")
    prompt = IIM.default_template if template is None else template
    texts = {name: text_features(backbone, list(names), prompt).float().cpu() for name, names in lists.items()}
    places = text_map(texts, seed=seed)
    return {
        name: _described(pair_similarities(texts[name]), names, places[name].tolist()) for name, names in lists.items()
    }


_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def _described(cosines: Tensor, names: Sequence[str], places: Sequence[Sequence[float]]) -> dict[str, Any]:
    values = cosines.double().numpy()
    return {
        "classes": len(names),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "quantiles": {
            f"{q:g}": float(value) for q, value in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True)
        },
        "similarities": cosines.tolist(),
        "map": [{"class": name, "x": x, "y": y} for name, (x, y) in zip(names, places, strict=True)],
    }
