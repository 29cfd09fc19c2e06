"""What callers give a detector: images, features or scores, told apart and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ood_core.data import open_source
from ood_core.data.sources import Images, ImageSource
from ood_core.errors import DataError
from ood_core.features import FeatureSet, content_keys

__all__ = ["Data", "Observed", "Scorable", "Scores", "as_float32", "check_finite", "holds_images"]

Data: TypeAlias = Images | FeatureSet | Sequence[FeatureSet]
"""Images, or features extracted already; for detectors of several backbones one `FeatureSet` per backbone."""

Scores: TypeAlias = Tensor | np.ndarray | Sequence[float]
"""A vector of numbers, one per image."""

Scorable: TypeAlias = Scores | FeatureSet | Images
"""Scores, features or images."""

_IMAGES = "images: an image source, a folder, manifest or parquet file, a PIL image or a list of them"


class Observed(NamedTuple):
    """What a detector made of data: scores [N], the classes it predicted (None if not asked or none), their hash."""

    scores: Tensor
    classes: Tensor | None
    data_hash: str


def holds_images(data: object) -> bool:
    """Whether data are images, rather than features or scores."""
    if isinstance(data, ImageSource | str | os.PathLike | Image.Image):
        return True
    return isinstance(data, list | tuple) and bool(data) and isinstance(data[0], Image.Image)


def check_images(data: object, verb: str) -> None:
    """Refuse what cannot be images.

    Raises:
        TypeError: numbers, features, arrays, ...
    """
    if not holds_images(data) and not isinstance(data, list | tuple):
        raise TypeError(f"{verb} takes {_IMAGES}; got {_kind_of(data)}.")


def keys_of(data: Any) -> Tensor | None:
    """Content keys of features or images; None of scores, of which nobody knows whose they are."""
    if isinstance(data, list | tuple) and data and isinstance(data[0], FeatureSet):
        return keys_of(data[0])  # of several backbones, but the same images
    if isinstance(data, FeatureSet):
        return content_keys(data)
    return content_keys(open_source(data)) if holds_images(data) else None


def check_finite(name: str, need: str, features: FeatureSet) -> None:
    """Refuse features that are no numbers: scores would be none either, or wrong ones.

    Args:
        name: of the detector.
        need: the feature to look at.
        features: at least one image.

    Raises:
        DataError: NaN or infinite values.
    """
    values = features.get(need)
    if values.sum().isfinite():  # unlike a mask, takes no memory
        return
    broken = (~values.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
    if broken:  # else only the sum is too large for its precision
        raise DataError(
            f"{name!r} cannot read these features: {need!r} holds NaN or infinite values for {len(broken)} of "
            f"{len(values)} images, the first {features.ids[broken[0]]!r}. Extract them again, or leave these images "
            "out."
        )


def without_nan(scores: Tensor, name: str) -> Tensor:
    """NaN is below no threshold: without this check such an image would pass as ID."""
    if scores.isnan().any():
        raise DataError(f"{name!r} gave no number (NaN) for {int(scores.isnan().sum())} of {len(scores)} images.")
    return scores


def as_float32(scores: Scores) -> Tensor:
    """A tensor, array or list as a float32 tensor on the CPU."""
    return (
        (scores if isinstance(scores, Tensor) else torch.from_numpy(np.array(scores, dtype=np.float32))).float().cpu()
    )


def score_vector(data: Any) -> Tensor:
    """Scores as they were given, float32 [N].

    Raises:
        TypeError: no numbers; the sentence says what it is instead.
        ValueError: no vector, an empty one, or NaN.
    """
    takes = f"Give scores (a vector of numbers), a FeatureSet, or {_IMAGES}"
    if data is None or isinstance(data, Mapping | bytes):
        raise TypeError(f"{takes}; got {_kind_of(data)}.")
    try:
        scores = as_float32(data)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{takes}; got {_kind_of(data)}.") from error
    if scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"Scores must be a non-empty vector, got shape {list(scores.shape)}. {takes}; got {_kind_of(data)}."
        )
    if scores.isnan().any():
        raise ValueError(f"Scores hold NaN ({int(scores.isnan().sum())} of {len(scores)}).")
    return scores


def _kind_of(data: Any) -> str:
    """What was given instead, and what becomes an image or a score of it."""
    kind, shape = type(data).__name__, getattr(data, "shape", None)
    if isinstance(data, FeatureSet):
        return f"a {kind}, which score_features takes"
    if shape is not None:
        return f"a {kind} of shape {list(shape)}; pixels become images with PIL.Image.fromarray"
    if isinstance(data, list | tuple) and data:
        return f"a {kind} of {type(data[0]).__name__}; pixels become images with PIL.Image.fromarray"
    return repr(data) if data is None or isinstance(data, int | float) else f"a {kind}"
