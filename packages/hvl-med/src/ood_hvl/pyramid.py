"""The embeddings of an image at three scales, as a feature that is extracted and cached once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from ood_core import check
from ood_core.backbones.base import Backbone
from ood_core.backbones.transform import ImageTransform
from ood_core.errors import UsageError
from torch import Tensor

from ood_hvl.functional import cut, split_pyramid

__all__ = ["FEATURE", "tiles_per_image", "with_pyramid"]

FEATURE = "pyramid"
"""Name of the feature: raw embeddings [N, 1 + 5 n^2, d] in the order whole, middle tiles, fine tiles."""


def tiles_per_image(n: int) -> int:
    """1 + 5 n^2: the whole image, n x n middle and 2n x 2n fine tiles.

    Example:
        >>> tiles_per_image(2)
        21
    """
    return 1 + 5 * check.integer("n", n, 1, 2**10) ** 2


def with_pyramid(
    backbone: Backbone,
    n: int = 2,
    *,
    source: str = "input",
    resize: str = "crop",
    chunk: int = 256,
    dtype: torch.dtype = torch.float16,
) -> Backbone:
    """The backbone with the feature "pyramid": raw embeddings of the image and its tiles, [B, 1 + 5 n^2, d].

    Every tile is enlarged to the encoder's full input, so an image costs 1 + 5 n^2 passes; half precision keeps
    them in 43 d bytes or less at n = 2 (its error in cos / 0.01 is about 1e-3).

    Args:
        backbone: any image encoder with square inputs.
        n: partitions of the middle scale.
        source: tiles are cut from the encoder's "input", enlarged, as the paper says; or from the "raw" file, which
            is decoded to 2 n times the input size and keeps the detail of large images.
        resize: "crop" as the backbone does (short side, then the middle), or "squash" both sides, which loses no
            border.
        chunk: tiles per pass.
        dtype: of the stored embeddings.

    Raises:
        UsageError: an encoder whose input is not square.
        ValueError: an option out of range.

    Example:
        >>> from ood_core import create_backbone, extract
        >>> backbone = with_pyramid(create_backbone("tiny"))
        >>> extract(backbone, "lesions/", {"pyramid"}).extra["pyramid"].shape  # doctest: +SKIP
        torch.Size([100, 21, 192])
    """
    tiles_per_image(n)
    check.choice("source", source, ("input", "raw"))
    check.choice("resize", resize, ("crop", "squash"))
    check.integer("chunk", chunk, 1, 2**31)
    if backbone.transform.crop[0] != backbone.transform.crop[1]:
        raise UsageError(
            f"Backbone {backbone.spec!r} reads {backbone.transform.crop} pixels: tiles must be square, so use a "
            "backbone with a square input."
        )
    return backbone.with_features(
        [FEATURE],
        partial(_embed, backbone, n, source, chunk, dtype),
        pyramid_key(n, source, resize, dtype),
        transform=_transform(backbone.transform, n, source, resize),
    )


def pyramid_key(n: int, source: str, resize: str, dtype: torch.dtype = torch.float16) -> str:
    """All that the feature depends on besides the backbone."""
    return f"pyramid n={n} source={source} resize={resize} bicubic {dtype}"


def _transform(transform: ImageTransform, n: int, source: str, resize: str) -> ImageTransform:
    whole = replace(transform, resize=None, fit="cover") if resize == "squash" else transform
    return whole.enlarged(2 * n if source == "raw" else 1)


def _embed(
    backbone: Backbone, n: int, source: str, chunk: int, dtype: torch.dtype, images: Tensor
) -> dict[str, Tensor]:
    # A few images at a time: enlarged tiles take 1 + 5 n^2 times the memory of the images.
    parts = [
        _embed_crops(backbone, _crops(part, n, source), chunk) for part in images.split(max(1, chunk // (5 * n * n)))
    ]
    embeddings = torch.cat(parts).to(dtype)
    if not embeddings.isfinite().all():
        raise UsageError(f"Embeddings of {backbone.spec!r} are too large for {dtype}: use dtype=torch.float32.")
    return {FEATURE: embeddings}


def _crops(images: Tensor, n: int, source: str) -> Tensor:
    if source == "input":
        return split_pyramid(images.float(), n)
    size = images.shape[-1] // (2 * n)
    smaller = partial(F.interpolate, images.float(), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([smaller(size=size)[:, None], cut(smaller(size=n * size), n), cut(images.float(), 2 * n)], 1)


def _embed_crops(backbone: Backbone, crops: Tensor, chunk: int) -> Tensor:
    flat = [backbone.encode_image(part, normalize=False) for part in crops.flatten(0, 1).split(chunk)]
    return torch.cat(flat).unflatten(0, crops.shape[:2])
