"""DICOM files as 8-bit pictures, read through pydicom (the extra `dicom`)."""

from __future__ import annotations

__all__ = ["DICOM_SUFFIXES", "available", "is_dicom", "read"]

from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ood_core.errors import ImageError

DICOM_SUFFIXES = frozenset({".dcm"})
"""Suffixes, in lower case, that a folder scan takes for DICOM once pydicom is installed."""

HEAD = 132
"""Bytes of a file that tell whether it is DICOM: a preamble of any content, then "DICM"."""

INSTALL = "pip install 'ood-core[dicom]'"
"""What a user without pydicom has to type."""


def available() -> bool:
    """Whether pydicom is installed."""
    return find_spec("pydicom") is not None


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with these `HEAD` bytes is DICOM.

    Example:
        >>> is_dicom(bytes(128) + b"DICM")
        True
    """
    return head[128:HEAD] == b"DICM"


def read(file: BinaryIO, max_pixels: int) -> Image.Image:
    """The first frame of a DICOM file.

    Grey values are rescaled (slope and intercept), then shown in the file's window, the first if it has several.
    Without one, at most 8 stored bits are shown as they are, and more from the smallest to the largest value of the
    image. MONOCHROME1 is inverted, a palette applied, YBR turned to RGB. VOI lookup tables and the windows of
    enhanced multi-frame headers are not applied.

    Args:
        file: a binary file, readable from its start.
        max_pixels: more pixels per frame than this, by the header, are refused before any is read.

    Returns:
        An image of mode "L" or "RGB".

    Raises:
        ImageError: no pydicom, no pixels, too many, or fewer than the header says. pydicom raises other errors, too.
    """
    if not available():
        raise ImageError(f"it is a DICOM file, which needs pydicom: {INSTALL}")
    import pydicom
    from pydicom.pixels import pixel_array

    file.seek(0)
    header = pydicom.dcmread(file, stop_before_pixels=True)
    _check_size(header, max_pixels)
    deflated = header.file_meta.TransferSyntaxUID.is_deflated
    if not deflated:
        _check_length(header, file)
    file.seek(0)
    return _picture(pixel_array(pydicom.dcmread(file) if deflated else file, index=0), header)


def _check_size(header: Any, max_pixels: int) -> None:
    """As `check_pixels`, by the header."""
    if absent := [name for name in ("Rows", "Columns") if header.get(name) is None]:
        raise ImageError(f"it is a DICOM file without an image, or cut off before it: {absent[0]} is missing")
    if not 1 <= header.Rows * header.Columns <= max_pixels:
        raise ImageError(f"it has {header.Columns} x {header.Rows} pixels and max_pixels is {max_pixels}")


def _check_length(header: Any, file: BinaryIO) -> None:
    """Uncompressed pixels must all be there, also those of later frames, which nothing would miss."""
    from pydicom.pixels.utils import get_expected_length

    syntax = header.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        return
    start = file.tell() + (8 if syntax.is_implicit_VR else 12)  # tag, type and length stand before the pixels
    if file.seek(0, 2) - start < get_expected_length(header):
        raise ImageError("the file is truncated")


def _picture(values: np.ndarray, header: Any) -> Image.Image:
    if header.PhotometricInterpretation == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        values = apply_color_lut(values, header)
        return Image.fromarray((values >> 8 * (values.itemsize - 1)).astype(np.uint8))
    if values.ndim == 3:
        return Image.fromarray((values >> max(0, header.BitsStored - 8)).astype(np.uint8))
    share = _share(values, header)
    if header.PhotometricInterpretation == "MONOCHROME1":
        share = 1 - share
    return Image.fromarray(np.rint(share * 255).astype(np.uint8))


def _share(values: np.ndarray, header: Any) -> np.ndarray:
    """Grey values as shares of white in [0, 1]."""
    from pydicom.pixels import apply_modality_lut

    shown = np.asarray(apply_modality_lut(values, header), np.float64)
    center, width = (_first(header.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is not None and width is not None:
        return _window(shown, center, width, header.get("VOILUTFunction") or "LINEAR")
    bounds = shown
    if header.get("BitsStored", 64) <= 8:
        bounds = np.asarray(apply_modality_lut(_stored_bounds(header), header), np.float64)
    low, high = bounds.min(), bounds.max()
    return (shown - low) / (high - low) if high > low else np.zeros_like(shown)


def _first(value: Any) -> float | None:
    """A header's number, the first of several; None where it is empty."""
    values = np.atleast_1d(np.array([] if value in (None, "") else value, np.float64))
    return float(values[0]) if values.size else None


def _stored_bounds(header: Any) -> np.ndarray:
    """The smallest and largest value that the stored bits can hold."""
    values, signed = 2**header.BitsStored, header.get("PixelRepresentation", 0)
    return np.array([-(values // 2), values // 2 - 1] if signed else [0, values - 1])


def _window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """The functions of the standard, PS3.3 C.11.2.1."""
    if width < 1 if function == "LINEAR" else width <= 0:
        raise ImageError(f"its window width is {width:g}")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0, 1)
    # A width of 1 is a threshold: at and below center - 0.5 black, above it white.
    return np.clip((values - (center - 0.5)) / max(width - 1, 1e-9) + 0.5 * (width > 1), 0, 1)
