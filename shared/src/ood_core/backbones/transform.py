"""The one image transform of a backbone, for ID and OOD images alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ood_core.data.decode import to_rgb

__all__ = ["ImageTransform"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# An image longer than this many times its short side keeps its middle part only: without the cut, a
# 100,000 x 1 strip would be enlarged to gigabytes before the centre crop throws all of it away.
_LONGEST = 16


@dataclass(frozen=True)
class ImageTransform:
    """Resize, centre crop, normalise: PIL image of any size and mode to float32 [3, H, W].

    The same pixels as torchvision's Resize, CenterCrop, ToTensor, Normalize on a PIL image.

    Attributes:
        crop: height and width of the result in pixels.
        resize: short side before the crop; None resizes both sides to `crop` (no crop, aspect not kept).
        mean: per channel, of values in [0, 1].
        std: per channel.
        interpolation: "bicubic", "bilinear", "lanczos" or "nearest" (PIL's, with antialiasing).

    Example:
        >>> ImageTransform(crop=(64, 64), resize=64)(Image.new("L", (100, 80))).shape
        torch.Size([3, 64, 64])
    """

    crop: tuple[int, int]
    resize: int | None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    interpolation: str = "bicubic"

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform one image."""
        pixels = np.asarray(self._crop(self._resize(to_rgb(image))), dtype=np.float32)
        mean, std = (np.array(values, np.float32) * 255 for values in (self.mean, self.std))
        return torch.from_numpy(np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)))

    def describe(self) -> dict:
        """The settings as plain values, for cache keys and results."""
        return asdict(self)

    def _resize(self, image: Image.Image) -> Image.Image:
        method = Image.Resampling[self.interpolation.upper()]
        if self.resize is None:
            return image.resize(self.crop[::-1], method)
        image = _middle(image, _LONGEST)
        width, height = image.size
        if width <= height:
            size = (self.resize, int(self.resize * height / width))
        else:
            size = (int(self.resize * width / height), self.resize)
        return image if image.size == size else image.resize(size, method)

    def _crop(self, image: Image.Image) -> Image.Image:
        height, width = self.crop
        if image.size == (width, height):
            return image
        left = round((image.width - width) / 2.0)
        top = round((image.height - height) / 2.0)
        return image.crop((left, top, left + width, top + height))


def _middle(image: Image.Image, times: int) -> Image.Image:
    short = min(image.size)
    if max(image.size) <= times * short:
        return image
    width, height = (min(side, times * short) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
