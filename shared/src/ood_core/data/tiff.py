"""TIFF files that Pillow cannot read, or reads wrongly: float64, unusual numbers of channels (the extra `tiff`)."""

from __future__ import annotations

__all__ = ["available", "describe", "is_tiff", "misread", "read"]

from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin

from ood_core.data.depth import NOTE, Depth, Range, check_size
from ood_core.errors import ImageError

INSTALL = "pip install 'ood-core[tiff]'"
"""What a user without tifffile has to type."""

_KINDS = {1: "unsigned integers", 2: "signed integers", 3: "floats", 5: "complex integers", 6: "complex floats"}
_COLOURS = {0: 1, 1: 1, 2: 3, 6: 3}
"""Photometric interpretation -> channels that are colour: grey (either way round), RGB, YCbCr (decoded to RGB)."""


def available() -> bool:
    """Whether tifffile is installed."""
    return find_spec("tifffile") is not None


def is_tiff(head: bytes) -> bool:
    """Whether a file that begins so is a TIFF or BigTIFF file.

    Example:
        >>> is_tiff(b"II*\\0")
        True
    """
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def misread(image: Image.Image) -> bool:
    """Whether Pillow takes an opened TIFF for another: planes of 16-bit colour, of which it reads single bytes."""
    tags, tiles = getattr(image, "tag_v2", {}), getattr(image, "tile", None) or []
    raw = any(tile[0] == "raw" for tile in tiles)
    return raw and tags.get(284) == 2 and max(np.atleast_1d(tags.get(258, 8))) > 8


def describe(file: BinaryIO) -> str | None:
    """What the first image of a TIFF file is made of, from its tags; None if they cannot be read."""
    try:
        file.seek(0)
        head = file.read(8)
        head += file.read(8) if 43 in head[2:4] else b""  # BigTIFF
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        channels, bits = tags.get(277, 1), max(np.atleast_1d(tags.get(258, 1)))
        kind = _KINDS.get(int(np.atleast_1d(tags.get(339, 1))[0]), "samples of an unknown kind")
    except Warning:
        raise
    except Exception:  # broken tags raise almost anything
        return None
    return f"a TIFF file of {channels} channel{'s' * (channels != 1)} of {bits}-bit {kind}"


def read(file: BinaryIO, max_pixels: int, value_range: Range | None) -> Image.Image:
    """The first image of a TIFF file.

    Colour channels are those that the photometric interpretation names (one of grey, three of RGB), then alpha if the
    file says so; further channels are left out, and noted.

    Raises:
        ImageError: no tifffile, complex numbers, an unknown interpretation, or too many pixels. tifffile raises other
            errors, too.
    """
    what = describe(file) or "a TIFF file"
    if not available():
        raise ImageError(f"it is {what}, which needs tifffile: {INSTALL}")
    import tifffile

    file.seek(0)
    with tifffile.TiffFile(file, name="image") as opened:
        page: Any = opened.pages[0]
        _check(page, what, max_pixels)
        tags = {tag.code: tag.value for tag in page.tags}
        values = _channels_last(page.asarray(), page)
    picture = _picture(values, tags, value_range, what)
    picture.getexif()[0x0112] = int(tags.get(0x0112, 1))
    return picture


def _check(page: Any, what: str, max_pixels: int) -> None:
    check_size(page.imagewidth, page.imagelength, max_pixels)
    if page.dtype is None or page.dtype.kind not in "biuf":
        raise ImageError(f"it is {what}, which no rule turns into a picture: convert it to one of real numbers")
    if int(page.photometric) not in _COLOURS:
        raise ImageError(f"it is {what} with the photometric interpretation {int(page.photometric)}: convert it to RGB")


def _channels_last(values: np.ndarray, page: Any) -> np.ndarray:
    """[H, W, C] of a page whose channels stand first or last."""
    if page.samplesperpixel == 1:
        return values.reshape(page.imagelength, page.imagewidth, 1)
    return np.moveaxis(values, page.axes.index("S"), -1).reshape(page.imagelength, page.imagewidth, -1)


def _picture(values: np.ndarray, tags: dict[int, Any], value_range: Range | None, what: str) -> Image.Image:
    count = _COLOURS[int(tags.get(262, 1))]
    if values.shape[-1] < count:
        raise ImageError(f"it is {what}, too few for its colours")
    colour = values[..., 0] if count == 1 else values[..., :count]
    extra = values.shape[-1] - count
    alpha = values[..., count] if extra and int(np.atleast_1d(tags.get(338, 0))[0]) in (1, 2) else None
    if values.dtype.kind == "b":
        colour = colour.astype(np.uint8) * 255
    depth = Depth.of_tags(tags, None, full=values.dtype == np.uint16)
    if colour.dtype == np.uint8:
        picture, note = Image.fromarray(np.ascontiguousarray(255 - colour if depth.inverted else colour)), None
    else:
        picture, note = depth.to_8_bit(colour, value_range)
    if alpha is not None and alpha.dtype.kind == "u":
        opaque = alpha >> 8 * (alpha.dtype.itemsize - 1)
        picture.putalpha(Image.fromarray(opaque.astype(np.uint8)))
        extra -= 1
    if note or extra:
        picture.info[NOTE] = note or f"channels:{values.shape[-1]}"
    return picture
