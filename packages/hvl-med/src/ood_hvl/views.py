"""Views of images that change no pixel: mirrored and turned."""

from __future__ import annotations

import numpy as np
from ood_core.data.sources import ImageSource
from ood_core.errors import UsageError
from PIL import Image

__all__ = ["TurnedViews"]

_Turn = Image.Transpose
# The first is the image itself; all eight are the symmetries of the square.
_TURNS = (
    None,
    _Turn.FLIP_LEFT_RIGHT,
    _Turn.ROTATE_90,
    _Turn.ROTATE_180,
    _Turn.ROTATE_270,
    _Turn.FLIP_TOP_BOTTOM,
    _Turn.TRANSPOSE,
    _Turn.TRANSVERSE,
)


class TurnedViews(ImageSource):
    """Every image of a source in `count` orientations; view `v` of image `i` is item `v * len(source) + i`.

    Args:
        source: the images.
        count: 1 (as they are), 2 (mirrored, too) or 8 (all turns, for slides that have no upright).

    Raises:
        UsageError: another count.

    Example:
        >>> views = TurnedViews(ImageFolder("slides"), 8)  # doctest: +SKIP
    """

    def __init__(self, source: ImageSource, count: int) -> None:
        if count not in (1, 2, 8):
            raise UsageError(f"views={count} must be 1 (none), 2 (mirrored) or 8 (mirrored and turned).")
        self.source = source
        self._items = [(view, index) for view in range(count) for index in range(len(source))]
        self.ids = [f"{source.ids[index]}@{view}" for view, index in self._items]
        self.labels = None if source.labels is None else np.tile(source.labels, count)
        self.label_names, self.label_values = source.label_names, source.label_values

    def _read(self, item: tuple[int, int], name: str, max_pixels: int | None) -> Image.Image:
        view, index = item
        image = self.source.open(index, max_pixels=max_pixels, value_range=self.value_range)
        turn = _TURNS[view]
        return image if turn is None else image.transpose(turn)

    def _stamp(self, item: tuple[int, int]) -> str:
        view, index = item
        return f"{self.source._stamp(self.source._items[index])} turn {view}"
