"""Any image that Pillow can read, and DICOM, as 8-bit RGB; anything else as an `ImageError` that names the file."""

from __future__ import annotations

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "decode", "image_suffixes", "to_rgb"]

import io
import os
import stat
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ood_core.data import dicom
from ood_core.errors import ImageError

IMAGE_SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".png",
        ".gif",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".ico",
    }
)
"""Suffixes, in lower case, of the files that a folder scan takes for images."""

MAX_PIXELS = 100_000_000
"""Largest width times height that is decoded unless the caller says otherwise."""

_PLUGIN_SUFFIXES = frozenset({".avif", ".heic", ".heif", ".jxl"})
_QUIET = threading.Lock()


def image_suffixes() -> frozenset[str]:
    """`IMAGE_SUFFIXES`, those of AVIF, HEIF and JPEG XL plug-ins registered with Pillow, and .dcm with pydicom."""
    plugins = _PLUGIN_SUFFIXES & Image.registered_extensions().keys()
    return IMAGE_SUFFIXES | plugins | (dicom.DICOM_SUFFIXES if dicom.available() else frozenset())


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to upright 8-bit RGB.

    The first frame counts (an animation is left at it), EXIF orientation is applied, transparency is shown
    over white. 16-bit values lose their low byte; a 32-bit integer image with no value above 255 is taken as
    8-bit; floats in [0, 1] are scaled by 255, others clipped to [0, 255], NaN is black.

    Raises:
        OSError: the image is still on disk and its file is broken.

    Example:
        >>> to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    image.seek(0)
    image.load()
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        return _over_white(image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Warning:
        raise
    except Exception:  # a broken EXIF block raises almost anything; the pixels are fine without it
        return image


def _to_8_bit(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image), posinf=255, neginf=0)
    if image.mode == "F":
        unit = values.min() >= 0 and values.max() <= 1
        values = np.rint(values * 255) if unit else values
    elif image.mode != "I" or values.max() > 255:
        values = values >> 8
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied grey has no direct way to RGBA
        image = image.convert("LA")
    layer = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(layer, mask=layer)
    return canvas


Encoded = bytes | bytearray | memoryview


def decode(
    file: str | os.PathLike[str] | Encoded, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read one encoded image as upright 8-bit RGB.

    DICOM is known by its content, whatever the name of the file; `ood_core.data.dicom.read` says how it is shown.
    Neither Pillow's settings (`LOAD_TRUNCATED_IMAGES`) nor the warning filters change what is accepted.

    Args:
        file: a path, or the encoded bytes.
        name: what messages call the image; by default the path.
        max_pixels: more pixels than this, by the header, are refused before anything is decoded.

    Raises:
        ImageError: missing, unreadable, empty, no image, too large or truncated; the message names the image.

    Example:
        >>> decode("photo.jpg").mode  # doctest: +SKIP
        'RGB'
    """
    if name is None:
        name = "<bytes>" if isinstance(file, Encoded) else printable(file)
    return named(name, lambda: _decode(file, max_pixels))


def named(name: str, read: Callable[[], Image.Image]) -> Image.Image:
    """Call `read` and turn whatever goes wrong into an `ImageError` about the image `name`."""
    try:
        return _whatever_the_filters(read)
    except Exception as error:
        raise ImageError(f"Image {name!r} cannot be read: {_reason(error)}.") from error


def _whatever_the_filters(read: Callable[[], Image.Image]) -> Image.Image:
    try:
        return read()
    except Warning:  # the caller's filters make errors of Pillow's warnings: once more without them
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()


def printable(path: str | os.PathLike[str]) -> str:
    """A path as text that can be printed: bytes that are no UTF-8 become escapes."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file (or the link to it is broken)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).rstrip(".") or type(error).__name__


# Those of JPEG, PNG, GIF, BMP, PPM and plain TIFF: Pillow reads on only while they need more. Other codecs
# may read up to the end in good order, and report by themselves when something is missing.
_PUSHED_CODECS = frozenset({"jpeg", "zip", "gif", "raw"})


class _StrictReader(io.BufferedReader):
    """Fails at the end of the data where Pillow, if so set, would fill up a truncated image with grey."""

    strict = False
    name: Any = None  # pydicom asks for it, and bytes in memory have none

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self.strict and not data and size:
            raise ImageError("the file is truncated")
        return data


def _decode(file: str | os.PathLike[str] | Encoded, max_pixels: int) -> Image.Image:
    with _StrictReader(_raw(file)) as reader:
        if dicom.is_dicom(reader.read(dicom.HEAD)):
            return to_rgb(dicom.read(reader, max_pixels))
        image = check_pixels(_identify(reader), max_pixels)
        tiles = getattr(image, "tile", [])
        reader.strict = any(tile[0] in _PUSHED_CODECS for tile in tiles)
        return to_rgb(image)


def _raw(file: str | os.PathLike[str] | Encoded) -> Any:
    if isinstance(file, Encoded):
        return io.BytesIO(file)
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise ImageError("it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")
    return io.FileIO(file)


def _identify(reader: _StrictReader) -> Image.Image:
    try:
        return Image.open(reader)
    except UnidentifiedImageError:
        reader.seek(0)
        raise ImageError(_what_it_is(reader.read(512))) from None


def _what_it_is(head: bytes) -> str:
    if not head:
        return "it is empty (0 bytes)"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "it is no image but looks like HTML or XML"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "it is no image but looks like text"
    return "it is no image that Pillow can identify, or its header is broken or cut off"


def check_pixels(image: Image.Image, max_pixels: int) -> Image.Image:
    """The same image; refuse an image with no pixel, or with more than `max_pixels`."""
    width, height = image.size
    if not 1 <= width * height <= max_pixels:
        raise ImageError(f"it has {width} x {height} pixels and max_pixels is {max_pixels}")
    return image
