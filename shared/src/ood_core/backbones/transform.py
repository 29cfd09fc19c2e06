"""The one image transform of a backbone, for ID and OOD images alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ood_core.data.decode import to_rgb

__all__ = ["FITS", "ImageTransform"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

FITS = ("cover", "squash", "contain", "none")

# An image longer than this many times its short side keeps its middle part only: without the cut, a
# 100,000 x 1 strip would be enlarged to gigabytes before the centre crop throws all of it away.
_LONGEST = 16


@dataclass(frozen=True)
class ImageTransform:
    """Resize, centre crop, normalise: PIL image of any size and mode to float32 [3, H, W].

    The same pixels as torchvision's Resize, CenterCrop, ToTensor, Normalize on a PIL image.

    Attributes:
        crop: height and width of the result in pixels.
        resize: short side before the crop; (height, width) to be met as `fit` says; None: `crop`, both sides.
        mean: per channel, of values in [0, 1]; one number for networks that read grey images.
        std: per channel.
        interpolation: "bicubic", "bilinear", "lanczos", "nearest", "box" or "hamming" (PIL's, with antialiasing).
        fit: how an image meets a (height, width): "cover" (aspect kept, the rest is cropped), "squash" (aspect not
            kept), "contain" (aspect kept, the rest is filled) or "none" (never resized).
        fill: colour (RGB, 0 to 255) where the image is smaller than `crop`.

    Example:
        >>> ImageTransform(crop=(64, 64), resize=64)(Image.new("L", (100, 80))).shape
        torch.Size([3, 64, 64])
    """

    crop: tuple[int, int]
    resize: int | tuple[int, int] | None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    interpolation: str = "bicubic"
    fit: str = "cover"
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        """Refuse a way to fit that is not one."""
        if self.fit not in FITS:
            raise ValueError(f"fit={self.fit!r} must be one of {', '.join(map(repr, FITS))}.")

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform one image."""
        image = to_rgb(image)
        if len(self.mean) == 1:
            image = image.convert("L").convert("RGB")
        pixels = np.asarray(self.frame(image), dtype=np.float32)
        mean, std = (np.array(values, np.float32) * 255 for values in (self.mean, self.std))
        return torch.from_numpy(np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)))

    def frame(self, image: Image.Image) -> Image.Image:
        """What of an image the network sees, as a picture of `crop` pixels: resized and cut, not yet normalised."""
        return self._crop(self._resize(to_rgb(image)))

    def describe(self) -> dict:
        """The settings as plain values, for cache keys and results."""
        # The last two are told only where they are used: records of before they were there stay valid.
        usual = {field.name: field.default for field in fields(self) if field.name in ("fit", "fill")}
        return {name: value for name, value in asdict(self).items() if usual.get(name, ()) != value}

    def enlarged(self, times: int) -> ImageTransform:
        """The same part of an image at `times` as many pixels a side."""
        crop = (self.crop[0] * times, self.crop[1] * times)
        if isinstance(self.resize, tuple):
            return replace(self, crop=crop, resize=(self.resize[0] * times, self.resize[1] * times))
        return replace(self, crop=crop, resize=None if self.resize is None else self.resize * times)

    def _resize(self, image: Image.Image) -> Image.Image:
        if self.fit == "none":
            return image
        method = Image.Resampling[self.interpolation.upper()]
        target = self.crop if self.resize is None else self.resize
        if self.resize is None or (self.fit == "squash" and isinstance(target, tuple)):
            return image.resize(tuple(target)[::-1], method)  # type: ignore[arg-type]
        if self.fit != "contain":
            image = _middle(image, _LONGEST)
        size = _kept_aspect(image.size, target, self.fit)
        return image if image.size == size else image.resize(size, method)

    def _crop(self, image: Image.Image) -> Image.Image:
        height, width = self.crop
        if image.size == (width, height):
            return image
        across, down = max(width - image.width, 0), max(height - image.height, 0)
        if across or down:
            border = (across // 2, down // 2, (across + 1) // 2, (down + 1) // 2)
            image = ImageOps.expand(image, border, self.fill)
        left = round((image.width - width) / 2.0)
        top = round((image.height - height) / 2.0)
        return image.crop((left, top, left + width, top + height))


def _kept_aspect(size: tuple[int, int], target: int | tuple[int, int], fit: str) -> tuple[int, int]:
    """Width and height of an image that keeps its aspect: short side `target`, or over or within (height, width)."""
    width, height = size
    if isinstance(target, int):  # torchvision rounds down
        return (target, int(target * height / width)) if width <= height else (int(target * width / height), target)
    ratios = (height / target[0], width / target[1])
    ratio = max(ratios) if fit == "contain" else min(ratios)
    return max(round(width / ratio), 1), max(round(height / ratio), 1)


def _middle(image: Image.Image, times: int) -> Image.Image:
    short = min(image.size)
    if max(image.size) <= times * short:
        return image
    width, height = (min(side, times * short) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
