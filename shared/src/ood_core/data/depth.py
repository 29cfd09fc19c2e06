"""Samples of more than 8 bits: which values are black and white, by one rule for every format.

1. `value_range`, where it is given.
2. What the file states: TIFF SMinSampleValue and SMaxSampleValue, BitsPerSample below 16, MaxSampleValue of the form
   2**n - 1, SignificantBits of OME; PNG sBIT. A statement that the values contradict is none.
3. Unsigned 16 bits: all of them, from 0 to 65535. Whether they hold 12-bit content cannot be known; images with small
   values only are noted, and counted once per source.
4. All others (signed, 32 and 64 bits, floats): the range of the image, outliers left out (`robust_range`). Brightness
   is then relative to the image.
"""

from __future__ import annotations

__all__ = ["NOTE", "RULE", "Depth", "check_range", "check_size", "robust_range", "shares"]

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ood_core.data import png
from ood_core.errors import ImageError, UsageError

RULE = 2
"""Version of the rule above; features of images read by another must not mix."""

NOTE = "ood_core.note"
"""Key in `Image.info` of what is odd about a decoded image: "narrow:MAXIMUM", "channels:NUMBER"."""

_NARROW = 1 << 14
"""16-bit images without a value as large as this look like 10-, 12- or 14-bit content."""

Range = tuple[float, float]


def check_range(value_range: Sequence[float] | None) -> Range | None:
    """A value range as two floats.

    Raises:
        UsageError: not two finite numbers of which the second is larger.
    """
    if value_range is None:
        return None
    try:
        low, high = map(float, value_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"value_range={value_range!r} must be two numbers, black before white, e.g. (0, 4095).")
    return low, high


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse an image with no pixel, or with more than `max_pixels`."""
    if not 1 <= width * height <= max_pixels:
        raise ImageError(f"it has {width} x {height} pixels and max_pixels is {max_pixels}")


def robust_range(values: np.ndarray) -> Range:
    """The smallest and the largest value, outliers left out: what lies off the middle 99 % by more than their width.

    NaN and infinite values do not count. Without any value (0, 0).

    Example:
        >>> robust_range(np.array([*range(1000), 30000]))
        (0.0, 999.0)
    """
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 0.0
    cut = max(values.size // 200, int(values.size >= 20))
    ends = np.partition(values, (cut, values.size - 1 - cut))
    low, high = float(ends[cut]), float(ends[values.size - 1 - cut])
    if low < high:  # else most of the image has one value, and what differs is no outlier
        values = values[(values >= low - (high - low)) & (values <= high + (high - low))]
    return float(values.min()), float(values.max())


def shares(values: np.ndarray, bounds: Range) -> np.ndarray:
    """Where values lie between black and white, float64 in [0, 1]; NaN is black, and so is all without a range."""
    low, high = bounds
    if not low < high:
        return np.zeros(values.shape)
    with np.errstate(all="ignore"):  # the range of float64 itself overflows
        return np.nan_to_num(np.clip((values.astype(np.float64) - low) / (high - low), 0, 1))


@dataclass(frozen=True)
class Depth:
    """What a file says of its samples.

    Attributes:
        stated: black and white, as the file states them.
        full: whether unsigned 16 bits are the whole range.
        inverted: the smallest value is white.
        spread: a statement of n bits may mean values spread over 16 bits, too (PNG).
        low_bytes: of 16-bit colour, of which Pillow keeps the high bytes: the other half.
        dtype: what the samples are, where Pillow keeps them as another type.
    """

    stated: Range | None = None
    full: bool = False
    inverted: bool = False
    spread: bool = False
    low_bytes: Image.Image | None = None
    dtype: Any = None

    @classmethod
    def of(cls, image: Image.Image) -> Depth | None:
        """Of an image that has just been opened; None if its samples have 8 bits."""
        tags = getattr(image, "tag_v2", {})
        low_bytes = _low_bytes(image)
        words = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        if image.mode == "L" and _signed(tags):  # Pillow takes them for unsigned
            return cls.of_tags(tags, np.dtype(np.int8))
        if not words and image.mode not in ("I", "F") and low_bytes is None:
            return None
        if tags:
            kind = np.uint32 if image.mode == "I" and not _signed(tags) else None
            return cls.of_tags(tags, np.dtype(kind) if kind else None, words or low_bytes is not None, low_bytes)
        bits = _png_bits(image)
        stated = (0.0, 2.0**bits - 1) if bits and bits < 16 else None
        return cls(stated, full=words or low_bytes is not None, spread=True, low_bytes=low_bytes)

    @classmethod
    def of_tags(
        cls, tags: Mapping[int, Any], dtype: Any, full: bool = False, low_bytes: Image.Image | None = None
    ) -> Depth:
        """Of a TIFF file with these tags."""
        return cls(_stated(tags), full, tags.get(262) == 0, low_bytes=low_bytes, dtype=dtype)

    def values(self, image: Image.Image, low_bytes: Image.Image | None) -> np.ndarray:
        """The samples of an image, [H, W] or [H, W, C]."""
        values = np.asarray(image)
        if low_bytes is None:
            return values.view(self.dtype) if self.dtype is not None else values
        low = np.asarray(low_bytes)
        if image.mode == "RGBA" and low_bytes.info.get(_GREY_ALPHA):
            pair = low.astype(np.uint16)
            grey, alpha = pair[..., 0] << 8 | pair[..., 1], pair[..., 2] << 8 | pair[..., 3]
            return np.stack([grey, grey, grey, alpha], -1)
        return values.astype(np.uint16) << 8 | low

    def to_8_bit(
        self, values: np.ndarray, value_range: Range | None, transparency: Any = None
    ) -> tuple[Image.Image, str | None]:
        """The samples by the module's rule, and what is odd about them.

        Args:
            values: [H, W], [H, W, 3] or, with alpha, [H, W, 4].
            value_range: black and white, whatever the file says.
            transparency: the one value (or colour) that is transparent.
        """
        colour, alpha = values, None
        if values.ndim == 3 and values.shape[-1] == 4:
            colour, alpha = values[..., :3], values[..., 3]
        if transparency is not None:
            clear = colour == np.asarray(transparency)
            alpha = np.where(clear if clear.ndim == 2 else clear.all(-1), 0, 65535)
        shown, note = self._shown(colour, value_range)
        picture = Image.fromarray(255 - shown if self.inverted else shown)
        if alpha is not None:
            picture.putalpha(Image.fromarray((alpha >> 8).astype(np.uint8)))
        return picture, note

    def _shown(self, values: np.ndarray, value_range: Range | None) -> tuple[np.ndarray, str | None]:
        bounds = value_range or self._believed(values)
        if bounds is None and self.full:
            low, high = int(values.min()), int(values.max())
            return (values >> 8).astype(np.uint8), f"narrow:{high}" if low < high < _NARROW else None
        return np.rint(shares(values, bounds or robust_range(values)) * 255).astype(np.uint8), None

    def _believed(self, values: np.ndarray) -> Range | None:
        """What the file states, unless the values contradict it."""
        if self.stated is None:
            return None
        known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        low, high = self.stated
        if known.size and not low <= known.min() <= known.max() <= high:
            return None
        return None if self.spread and _spread_over_16(values, int(high).bit_length()) else self.stated


def _spread_over_16(values: np.ndarray, bits: int) -> bool:
    """Whether all values are n-bit numbers moved to the top of 16 bits, as the PNG standard wants them."""
    number = values.astype(np.uint32) >> (16 - bits)
    moved = number << (16 - bits)
    repeated = moved
    for shift in range(bits, 16, bits):
        repeated = repeated | moved >> shift
    return bool((values == moved).all() or (values == repeated).all())


def _signed(tags: Mapping[int, Any]) -> bool:
    return 2 in np.atleast_1d(tags.get(339, 1))


def _stated(tags: Mapping[int, Any]) -> Range | None:
    """Black and white of a TIFF file, as its tags have them."""
    high = _number(tags.get(341), max)  # SMaxSampleValue
    low = _number(tags.get(340), min)  # SMinSampleValue
    unsigned = 1 in np.atleast_1d(tags.get(339, 1))
    if low is None and unsigned:
        low = 0.0
    if low is not None and high is not None and low < high:
        return low, high
    stored = int(_number(tags.get(258), max) or 1)
    bits = [n for n in _stated_bits(tags, stored) if 8 < n < max(stored, 16)]
    return (0.0, 2.0 ** bits[0] - 1) if bits and unsigned else None


def _stated_bits(tags: Mapping[int, Any], stored: int) -> list[int]:
    found = [stored] if stored < 16 else []
    if said := re.search(r'SignificantBits="(\d{1,2})"', str(tags.get(270, ""))):
        found.append(int(said[1]))
    largest = int(_number(tags.get(281), max) or 0)  # a statistic, unless it is all ones
    if largest & (largest + 1) == 0:
        found.append(largest.bit_length())
    return found


def _number(value: Any, pick: Any) -> float | None:
    """One number of those that a tag holds."""
    try:
        numbers = [float(one) for one in np.atleast_1d(value)] if value is not None else []
    except (TypeError, ValueError):
        return None
    return pick(numbers) if numbers and all(map(math.isfinite, numbers)) else None


def _png_bits(image: Image.Image) -> int | None:
    file = getattr(image, "fp", None)
    return png.significant_bits(file) if image.format == "PNG" and file is not None else None


# Pillow has no mode for 16-bit colour and keeps every high byte. Told that the other end comes first, it gives the low
# ones; of grey with alpha it gives all four bytes of a pixel as if they were four channels.
_GREY_ALPHA = "ood_core.grey_alpha"
_NATIVE = {"little": "B", "big": "L"}[sys.byteorder]
_OTHER_HALF = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order, other in {"B": "L", "L": "B", "N": _NATIVE}.items()
}


def _low_bytes(image: Image.Image) -> Image.Image | None:
    """The low bytes of 16-bit colour, decoded from the file that the image is still to be decoded from."""
    file, tiles = getattr(image, "fp", None), getattr(image, "tile", None) or []
    codecs = {tile[0] for tile in tiles}
    raw = {tile[3] if isinstance(tile[3], str) else tile[3][0] for tile in tiles if tile[3]}
    if file is None or len(raw) != 1 or not codecs <= {"zip", "raw", "libtiff"}:
        return None
    (mode,) = raw
    other = "RGBA" if mode == "LA;16B" and image.mode == "RGBA" else _OTHER_HALF.get(mode)
    if other is None:
        return None
    file.seek(0)
    half = Image.open(file)
    half.tile = [_with_raw_mode(tile, other) for tile in half.tile]
    half.load()
    half.info[_GREY_ALPHA] = mode == "LA;16B"
    return half


def _with_raw_mode(tile: Any, mode: str) -> Any:
    arguments = mode if isinstance(tile[3], str) else (mode, *tile[3][1:])
    return type(tile)(*tile[:3], arguments) if hasattr(tile, "_fields") else (*tile[:3], arguments)
