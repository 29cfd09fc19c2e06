"""Augmented views of images: random crops, flips and colours that depend on (seed, view, image) only."""

from __future__ import annotations

__all__ = ["LiveViews", "Views"]

import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageEnhance

from ood_core.data.loader import ImageBatch, load_batches
from ood_core.data.sources import ImageSource
from ood_core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ood_core.backbones.transform import ImageTransform


class Views(ImageSource):
    """`count` augmented views of every image of a source: a random crop, resized, flipped half of the time.

    View `v` of image `i` is item `v * len(source) + i`. It is the same whenever and in whatever order it is read.

    Args:
        source: the images.
        count: views per image.
        size: (height, width) of the views, a backbone's `transform.crop`.
        scale: smallest and largest share of the image's area in a crop; its aspect lies between 3:4 and 4:3.
        seed: of all draws.
        first: number of the first view, to go on where earlier ones ended.
        jitter: brightness, contrast and saturation are changed by factors from 1 - jitter to 1 + jitter, in random
            order.

    Raises:
        UsageError: `count` below 1, or `scale` not in (0, 1], or `jitter` not in [0, 1].

    Example:
        >>> views = Views(ImageFolder("train"), 4, size=(224, 224), seed=1)  # doctest: +SKIP
        >>> features = extract(backbone, views, cache="cache/")  # doctest: +SKIP
    """

    def __init__(
        self,
        source: ImageSource,
        count: int,
        *,
        size: Sequence[int],
        scale: tuple[float, float] = (0.85, 1.0),
        seed: int = 0,
        first: int = 0,
        jitter: float = 0.0,
    ) -> None:
        if count < 1:
            raise UsageError(f"views={count}: at least 1 view per image is needed.")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UsageError(f"The crop scale {tuple(scale)} must be two rising numbers above 0 and at most 1.")
        if not 0 <= jitter <= 1:
            raise UsageError(f"jitter={jitter} must be from 0 to 1: factors lie between 1 - jitter and 1 + jitter.")
        self.jitter = jitter
        self.source, self.size, self.scale, self.seed = source, (int(size[0]), int(size[1])), tuple(scale), seed
        self.place = source.place
        self._items = [(view, index) for view in range(first, first + count) for index in range(len(source))]
        self.ids = [f"{source.ids[index]}@{view}" for view, index in self._items]
        self.labels = None if source.labels is None else np.tile(source.labels, count)
        self.label_names, self.label_values = source.label_names, source.label_values

    def _read(self, item: tuple[int, int], name: str, max_pixels: int | None) -> Image.Image:
        view, index = item
        image = self.source.open(index, max_pixels=max_pixels, value_range=self.value_range)
        draw = random.Random(f"{self.seed} {view} {self.source.ids[index]}")
        box = _random_box(*image.size, self.scale, draw)
        out = image.resize(self.size[::-1], Image.Resampling.BICUBIC, box=box)
        out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else out
        return _jittered(out, self.jitter, draw) if self.jitter else out

    def _stamp(self, item: tuple[int, int]) -> str:
        return f"{self.source._stamp(self.source._items[item[1]])} {self._drawing(item[0])}"

    def _content(self, item: tuple[int, int]) -> str:
        return f"{self.source._content(self.source._items[item[1]])} {self._drawing(item[0])}"

    def _drawing(self, view: int) -> str:
        return f"view {view} {self.seed} {self.size} {self.scale}" + (f" {self.jitter}" if self.jitter else "")


class LiveViews:
    """Views that are new in every epoch, decoded batch by batch: (rows [b], epoch) -> pixels [b, 3, H, W].

    They are the same for any number of workers, and with or without `prepare`.

    Args:
        source: the images.
        transform: a backbone's.
        scale: see `Views`.
        seed: see `Views`.
        workers: processes that decode what `prepare` announced; 0 decodes in this one.
        jitter: see `Views`.

    Example:
        >>> pixels = LiveViews(source, backbone.transform, scale=(0.9, 1.0), seed=1)(rows, epoch=0)  # doctest: +SKIP
    """

    def __init__(
        self,
        source: ImageSource,
        transform: ImageTransform,
        *,
        scale: tuple[float, float] = (0.85, 1.0),
        seed: int = 0,
        workers: int = 0,
        jitter: float = 0.0,
    ) -> None:
        self.source, self.transform, self.workers = source, transform, workers
        self._drawn: dict[str, Any] = {"scale": scale, "seed": seed, "jitter": jitter}
        self._announced: Iterator[tuple[tuple[int, list[int]], ImageBatch]] = iter(())

    def prepare(self, epoch: int, batches: Sequence[Tensor]) -> None:
        """Announce the batches of an epoch in the order they will be asked for: workers run ahead of them.

        Args:
            epoch: from 0.
            batches: row numbers, each int64 [b].
        """
        rows = [batch.tolist() for batch in batches]
        if self.workers:
            self._announced = zip([(epoch, one) for one in rows], self._load(epoch, rows, self.workers), strict=True)

    def __call__(self, rows: Tensor, epoch: int) -> Tensor:
        """Pixels of these images' views in this epoch."""
        wanted = (epoch, rows.tolist())
        announced, batch = next(self._announced, (None, None))
        if batch is None or announced != wanted:
            self._announced = iter(())
            (batch,) = self._load(epoch, [wanted[1]], 0)
        return batch.pixels

    def _load(self, epoch: int, batches: list[list[int]], workers: int) -> Iterator[ImageBatch]:
        views = Views(self.source, 1, size=self.transform.crop, first=epoch, **self._drawn)
        return load_batches(views, self.transform, batches, workers=workers, progress=False)


def _jittered(image: Image.Image, jitter: float, draw: random.Random) -> Image.Image:
    """Brightness, contrast and saturation changed, as torchvision's ColorJitter does."""
    kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for kind in draw.sample(kinds, len(kinds)):
        image = kind(image).enhance(draw.uniform(1 - jitter, 1 + jitter))
    return image


def _random_box(width: int, height: int, scale: tuple[float, ...], draw: random.Random) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): area and aspect drawn until they fit, ten times at most.

    Then the largest part from the middle whose aspect is allowed, as torchvision's RandomResizedCrop: an image wider
    than 3:2 hardly ever holds a crop of 85 % of its area, and squeezing all of it would distort it.
    """
    narrowest, widest = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(math.log(narrowest), math.log(widest)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= w <= width and 1 <= h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * widest)))
    h = min(height, max(1, round(width / narrowest)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
