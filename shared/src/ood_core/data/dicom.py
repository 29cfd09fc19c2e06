"""DICOM files as 8-bit pictures, read through pydicom (the extra `dicom`)."""

from __future__ import annotations

__all__ = ["DICOM_SUFFIXES", "available", "is_bare", "is_dicom", "read"]

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ood_core.data.depth import Range, check_size, robust_range, shares
from ood_core.errors import ImageError

DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
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


def is_bare(head: bytes) -> bool:
    """Whether a file that begins so looks like a DICOM data set that lacks the preamble.

    Example:
        >>> is_bare(bytes([8, 0, 5, 0]) + b"CS" + bytes([10, 0]) + b"ISO_")
        True
    """
    if head[:2] not in (b"\2\0", b"\b\0") or len(head) < 12:
        return False
    explicit = head[4:6] in (b"UL", b"CS", b"DA", b"UI", b"OB", b"SH", b"LO")
    implicit = head[8:12] != bytes(4) and int.from_bytes(head[4:8], "little") <= 64
    return explicit or (head[2:4] in (b"\0\0", b"\1\0", b"\5\0", b"\b\0", b"\x12\0", b"\x16\0") and implicit)


def read(file: BinaryIO, max_pixels: int, value_range: Range | None = None) -> Image.Image:
    """The first frame of a DICOM file, with or without preamble and meta header.

    Grey values are rescaled (slope and intercept), then shown in the file's window, the first if it has several; both
    are looked for in the functional groups of enhanced files, too. Without a window, at most 8 stored bits are shown
    as they are, and more over the range of the image, outliers left out (`depth.robust_range`). Padding counts for no
    range and is black. MONOCHROME1 or the presentation shape INVERSE inverts, a palette is applied, YBR turned to
    RGB. VOI lookup tables are not applied.

    Args:
        file: a binary file, readable from its start.
        max_pixels: more pixels per frame than this, by the header, are refused before any is read.
        value_range: black and white of grey images of more than 8 bits after rescaling, instead of the window.

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
    bare = not is_dicom(file.read(HEAD))
    file.seek(0)
    header = pydicom.dcmread(file, stop_before_pixels=True, force=bare)
    floats = _holds_floats(file)
    completed = _complete(header, floats)
    check_size(header.Columns, header.Rows, max_pixels)
    deflated = header.file_meta.TransferSyntaxUID.is_deflated
    if not deflated:
        _check_length(header, file)
    file.seek(0)
    if not (deflated or completed or bare):
        return _picture(pixel_array(file, index=0), header, value_range)
    whole = pydicom.dcmread(file, force=bare)
    _complete(whole, floats)
    return _picture(pixel_array(whole, index=0), header, value_range)


def _holds_floats(file: BinaryIO) -> bool:
    """Whether what stands here is the tag of float or double pixels."""
    here = file.tell()
    tag = file.read(4)
    file.seek(here)
    return tag in {b"\xe0\x7f\x08\0", b"\xe0\x7f\x09\0", b"\x7f\xe0\0\x08", b"\x7f\xe0\0\x09"}


def _complete(header: Any, floats: bool) -> bool:
    """Put in what the standard lets one conclude; whether there was anything. Refuse what lacks more."""
    if absent := [name for name in ("Rows", "Columns") if header.get(name) is None]:
        raise ImageError(f"it is a DICOM file without an image, or cut off before it: {absent[0]} is missing")
    for name in ("PhotometricInterpretation", "BitsAllocated", *([] if floats else ["PixelRepresentation"])):
        if header.get(name) in (None, ""):
            raise ImageError(
                f"it is a DICOM file whose header lacks {name}, without which its values have no meaning: add it"
            )
    known = {"SamplesPerPixel": 1} | ({} if floats else {"BitsStored": header.BitsAllocated})
    added = {name: value for name, value in known.items() if header.get(name) is None}
    for name, value in added.items():
        setattr(header, name, value)
    return _complete_syntax(header) or bool(added)


def _complete_syntax(header: Any) -> bool:
    from pydicom import uid
    from pydicom.dataset import FileMetaDataset

    if getattr(header, "file_meta", None) is None:
        header.file_meta = FileMetaDataset()
    if "TransferSyntaxUID" in header.file_meta:
        return False
    implicit, little = header.original_encoding
    plain = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
    header.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else plain
    return True


def _check_length(header: Any, file: BinaryIO) -> None:
    """Uncompressed pixels must all be there, also those of later frames, which nothing would miss."""
    from pydicom.pixels.utils import get_expected_length

    syntax = header.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        return
    start = file.tell() + (8 if syntax.is_implicit_VR else 12)  # tag, type and length stand before the pixels
    if file.seek(0, 2) - start < get_expected_length(header):
        raise ImageError("the file is truncated")


def _picture(values: np.ndarray, header: Any, value_range: Range | None) -> Image.Image:
    if header.PhotometricInterpretation == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        values = apply_color_lut(values, header)
        return Image.fromarray((values >> 8 * (values.itemsize - 1)).astype(np.uint8))
    if values.ndim == 3:
        return Image.fromarray((values >> max(0, header.BitsStored - 8)).astype(np.uint8))
    padding = _padding(values, header)
    share = _share(values, header, padding, value_range)
    # Both say the same of one image: of radiographs the standard wants them together.
    if header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE":
        share = 1 - share
    return Image.fromarray(np.rint(np.where(padding, 0, share) * 255).astype(np.uint8))


def _share(values: np.ndarray, header: Any, padding: np.ndarray, value_range: Range | None) -> np.ndarray:
    """Grey values as shares of white in [0, 1]."""
    shown = _rescaled(values, header)
    few = header.get("BitsStored", 64) <= 8
    if value_range is not None and not few:
        return shares(shown, value_range)
    center, width = (_first(_stated(header, name)) for name in ("WindowCenter", "WindowWidth"))
    if center is not None and width is not None:
        return _window(shown, center, width, _stated(header, "VOILUTFunction") or "LINEAR")
    if few:
        bounds = _rescaled(_stored_bounds(header), header)
        return shares(shown, (float(bounds.min()), float(bounds.max())))
    return shares(shown, robust_range(shown[~padding]))


def _rescaled(values: np.ndarray, header: Any) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut

    if "ModalityLUTSequence" in header:
        return np.asarray(apply_modality_lut(values, header), np.float64)
    slope, intercept = (_first(_stated(header, name)) for name in ("RescaleSlope", "RescaleIntercept"))
    if slope is None or intercept is None:
        return np.asarray(values, np.float64)
    return np.asarray(values, np.float64) * slope + intercept


def _stated(header: Any, name: str) -> Any:
    """An element of the first frame: from its own functional groups, the shared ones or the header; None if absent."""
    places = [*_groups(header, "PerFrameFunctionalGroupsSequence"), *_groups(header, "SharedFunctionalGroupsSequence")]
    return next((value for place in [*places, header] if (value := place.get(name)) not in (None, "", [])), None)


def _groups(header: Any, name: str) -> Iterator[Any]:
    """The first items of all sequences in the first item of a sequence of functional groups."""
    for group in (header.get(name) or [])[:1]:
        yield from (element.value[0] for element in group if element.VR == "SQ" and element.value)


def _padding(values: np.ndarray, header: Any) -> np.ndarray:
    """Which pixels only fill the frame: stored values from PixelPaddingValue to PixelPaddingRangeLimit."""
    names = ("PixelPaddingValue", "PixelPaddingRangeLimit")
    if values.dtype.kind == "f":
        names = ("FloatPixelPaddingValue", "FloatPixelPaddingRangeLimit")
        if values.itemsize == 8:
            names = ("DoubleFloatPixelPaddingValue", "DoubleFloatPixelPaddingRangeLimit")
    value, limit = (_first(header.get(name)) for name in names)
    if value is None:
        return np.zeros(values.shape, bool)
    low, high = sorted(_as_stored(bound, values.dtype) for bound in (value, value if limit is None else limit))
    return (values >= low) & (values <= high)


def _as_stored(value: float, kind: np.dtype) -> float:
    """A header's number as a pixel: files write the padding of signed pixels as unsigned, too."""
    if kind.kind == "f":
        return value
    bits, low = 8 * kind.itemsize, float(np.iinfo(kind).min)
    return (value - low) % 2**bits + low


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
