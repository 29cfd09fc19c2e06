"""Any image that Pillow can read, and DICOM, as 8-bit RGB; anything else as an `ImageError` that names the file."""

from __future__ import annotations

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "decode", "image_suffixes", "to_rgb"]

import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from ood_core.data import dicom, png, tiff
from ood_core.data.depth import NOTE, Depth, Range, check_range, check_size
from ood_core.errors import ImageError

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".ico", ".jp2", ".j2k", ".tga",
    ".pcx", ".sgi", ".psd",
})
# fmt: on
"""Suffixes, in lower case, of the files that a folder scan takes for images, whatever Pillow says of itself."""

MAX_PIXELS = 100_000_000
"""Largest width times height that is decoded unless the caller says otherwise."""

# Formats of Pillow that are no pictures of pixels, or need another program: Ghostscript, or Windows.
_NO_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
_SETTINGS = threading.RLock()
"""Held while warning filters or a setting of Pillow are others for a moment."""


def image_suffixes() -> frozenset[str]:
    """Suffixes of what Pillow and the plug-ins registered with it can read, and of DICOM files with pydicom."""
    formats = Image.registered_extensions()
    readable = {suffix for suffix, kind in formats.items() if kind in Image.OPEN and kind not in _NO_PICTURES}
    return IMAGE_SUFFIXES | readable | (dicom.DICOM_SUFFIXES if dicom.available() else frozenset())


# How files begin that are pictures whatever their name. TIFF is what raw files of cameras and slides are made of.
_BEGINNINGS = (b"\xff\xd8\xff", png.SIGNATURE, b"GIF8", b"\0\0\0\x0cjP  ", b"8BPS", b"\x76\x2f\x31\x01")
_BRANDS = (b"WEBP", b"avif", b"heic", b"heix", b"mif1")


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins so is a picture, be it one that cannot be read here.

    Example:
        >>> looks_like_image(b"GIF89a")
        True
    """
    return head.startswith(_BEGINNINGS) or head[8:12] in _BRANDS or tiff.is_tiff(head)


def to_rgb(image: Image.Image, *, value_range: Sequence[float] | None = None) -> Image.Image:
    """Convert an image of any mode to upright 8-bit RGB.

    The first frame counts (an animation is left at it), EXIF orientation is applied, transparency is shown
    over white. Samples of more than 8 bits follow one rule for every format, which `ood_core.data.depth` states:
    `value_range`, else what the file says, else all of unsigned 16 bits, and the range of the image for others.
    NaN is black. What is odd about the image then stands in `info[depth.NOTE]`.

    Args:
        image: of any mode; one that was just opened still knows the low bytes of 16-bit colour.
        value_range: the values to show black and white; images of 8 bits per sample do not heed it.

    Raises:
        OSError: the image is still on disk and its file is broken.
        UsageError: `value_range` is no range.

    Example:
        >>> to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    value_range = check_range(value_range)
    image.seek(0)
    depth = Depth.of(image)
    image.load()
    note = image.info.get(NOTE)
    image = _upright(image)
    if depth is not None:
        low_bytes = None if depth.low_bytes is None else _upright(depth.low_bytes)
        values = depth.values(image, low_bytes)
        image, note = depth.to_8_bit(values, value_range, image.info.get("transparency"))
    image = _over_white(image) if image.has_transparency_data else image.convert("RGB")
    if note:
        image.info[NOTE] = note
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Warning:
        raise
    except Exception:  # a broken EXIF block raises almost anything; the pixels are fine without it
        return image


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied grey has no direct way to RGBA
        image = image.convert("LA")
    layer = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(layer, mask=layer)
    return canvas


Encoded = bytes | bytearray | memoryview


def decode(
    file: str | os.PathLike[str] | Encoded,
    *,
    name: str | None = None,
    max_pixels: int | None = None,
    value_range: Sequence[float] | None = None,
) -> Image.Image:
    """Read one encoded image as upright 8-bit RGB.

    DICOM is known by its content, whatever the name of the file; `ood_core.data.dicom.read` says how it is shown.
    Neither Pillow's settings (`LOAD_TRUNCATED_IMAGES`) nor the warning filters change what is accepted.

    Args:
        file: a path, or the encoded bytes.
        name: what messages call the image; by default the path.
        max_pixels: more pixels than this, by the header, are refused before anything is decoded; None: `MAX_PIXELS`.
        value_range: see `to_rgb`; of a grey DICOM file of more than 8 bits, instead of its window.

    Raises:
        UsageError: `value_range` is no range.
        ImageError: missing, unreadable, empty, no image, too large or truncated; the message names the image.

    Example:
        >>> decode("photo.jpg").mode  # doctest: +SKIP
        'RGB'
    """
    if name is None:
        name = "<bytes>" if isinstance(file, Encoded) else printable(file)
    value_range = check_range(value_range)
    if max_pixels is None:
        return named(name, lambda: _decode(file, MAX_PIXELS, value_range))
    return named(name, lambda: _whatever_pillows_limit(lambda: _decode(file, max_pixels, value_range)))


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
        with _SETTINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()


def _whatever_pillows_limit(read: Callable[[], Image.Image]) -> Image.Image:
    """Pillow refuses about 179 million pixels; a caller that names a limit means that one."""
    try:
        return read()
    except Image.DecompressionBombError:
        with _SETTINGS:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return read()
            finally:
                Image.MAX_IMAGE_PIXELS = limit


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


def _decode(file: str | os.PathLike[str] | Encoded, max_pixels: int, value_range: Range | None) -> Image.Image:
    with _StrictReader(_raw(file)) as reader:
        head = reader.read(dicom.HEAD)
        if dicom.is_dicom(head):
            return to_rgb(dicom.read(reader, max_pixels, value_range))
        try:
            return _picture(reader, max_pixels, value_range)
        except ImageError:
            raise
        except Exception:
            reader.strict = False
            shorter = png.without_long_texts(reader) if png.is_png(head) else None
            if shorter is None:
                raise
        with _StrictReader(shorter) as reader:
            return _picture(reader, max_pixels, value_range)


def _picture(reader: _StrictReader, max_pixels: int, value_range: Range | None) -> Image.Image:
    reader.strict = False
    reader.seek(0)
    image = _identify(reader)
    if image is None or tiff.misread(image):
        return _unidentified(reader, max_pixels, value_range)
    check_pixels(image, max_pixels)
    tiles = getattr(image, "tile", None) or []  # Pillow 10 has None for formats without tiles, as ICNS
    reader.strict = any(tile[0] in _PUSHED_CODECS for tile in tiles)
    return to_rgb(image, value_range=value_range)


def _raw(file: str | os.PathLike[str] | Encoded) -> Any:
    if isinstance(file, Encoded):
        return io.BytesIO(file)
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise ImageError("it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")
    return io.FileIO(file)


def _identify(reader: _StrictReader) -> Image.Image | None:
    try:
        return Image.open(reader)
    except UnidentifiedImageError:
        return None


def _unidentified(reader: _StrictReader, max_pixels: int, value_range: Range | None) -> Image.Image:
    """What Pillow has no reader for."""
    reader.seek(0)
    head = reader.read(512)
    if tiff.is_tiff(head) and tiff.describe(reader):
        reader.strict = True
        return to_rgb(tiff.read(reader, max_pixels, value_range))
    if dicom.is_bare(head):
        return to_rgb(dicom.read(reader, max_pixels, value_range))
    raise ImageError(_what_it_is(head))


def _what_it_is(head: bytes) -> str:
    if not head:
        return "it is empty (0 bytes)"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "it is no image but looks like HTML or XML"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "it is no image but looks like text"
    return "it is no image that Pillow can identify, or its header is broken or cut off"


def check_pixels(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """The same image; refuse an image with no pixel, or with more than `max_pixels` (None: `MAX_PIXELS`)."""
    check_size(*image.size, MAX_PIXELS if max_pixels is None else max_pixels)
    return image
