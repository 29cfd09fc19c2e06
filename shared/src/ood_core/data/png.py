"""What Pillow does not tell of a PNG file, or stumbles over: significant bits, and long texts and profiles."""

from __future__ import annotations

__all__ = ["is_png", "significant_bits", "without_long_texts"]

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})
_LONG = 1 << 20
"""A text that unfolds to more bytes than this is left out."""

_SEARCHED = 64 << 20
"""Bytes of a long text in which an orientation is looked for; nothing of it is kept in memory."""

_XMP = b"XML:com.adobe.xmp"
_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)[0-9]')  # the forms that Pillow reads, too


def is_png(head: bytes) -> bool:
    """Whether a file that begins so is a PNG file."""
    return head.startswith(SIGNATURE)


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(name, where its data start, their length) of every chunk up to the end, or to where the file is cut."""
    at = len(SIGNATURE)
    while len(head := _read_at(file, at, 8)) == 8:
        length, name = struct.unpack(">I4s", head)
        yield name, at + 8, length
        at += 12 + length


def _read_at(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def significant_bits(file: BinaryIO) -> int | None:
    """How many bits of each sample came from the camera (chunk sBIT), the most of several channels; None if unsaid."""
    channels = 1
    for name, start, length in _chunks(file):
        if name == b"IHDR":
            channels = 3 if _read_at(file, start + 9, 1) in (b"\x02", b"\x06") else 1
        if name == b"sBIT" and length >= channels:
            return max(_read_at(file, start, channels))
        if name == b"IDAT":
            break
    return None


def without_long_texts(file: BinaryIO) -> io.BytesIO | None:
    """The same PNG file without texts and colour profiles that unfold to more than 1 MiB; None if it has none.

    Pillow refuses such files although the pixels do not depend on them. The orientation in a long XMP text is kept.
    """
    kept, budget, at = io.BytesIO(), _SEARCHED // 2, 0
    for name, start, length in _chunks(file):
        if name not in _TEXTS:
            continue
        size, orientation = _survey(file, name, start, length)
        if size <= min(_LONG, budget):
            budget -= size
            continue
        kept.write(_read_at(file, at, start - 8 - at))
        if orientation:
            kept.write(_chunk(b"iTXt", _XMP + bytes(5) + orientation))
        at = start + length + 4
    if not at:
        return None
    file.seek(at)
    kept.write(file.read())
    kept.seek(0)
    return kept


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _survey(file: BinaryIO, name: bytes, start: int, length: int) -> tuple[int, bytes | None]:
    """Size of a text once unfolded, as far as it is followed, and the orientation that stands in it."""
    size, tail, orientation = 0, b"", None
    for piece in _unfolded(file, name, start, length):
        size += len(piece)
        if orientation is None and (found := _ORIENTATION.search(tail + piece)):
            orientation = found.group()
        tail = piece[-32:]
        if size > _SEARCHED:
            break
    return size, orientation


def _unfolded(file: BinaryIO, name: bytes, start: int, length: int) -> Iterator[bytes]:
    """The text in pieces of at most 1 MiB."""
    head = _read_at(file, start, min(length, 1024))
    skipped, folded = _preamble(name, head)
    if not folded:
        for at in range(start + skipped, start + length, _LONG):
            yield _read_at(file, at, min(_LONG, start + length - at))
        return
    unfold = zlib.decompressobj()
    try:
        for at in range(start + skipped, start + length, _LONG):
            rest = _read_at(file, at, min(_LONG, start + length - at))
            while rest:
                yield unfold.decompress(rest, _LONG)
                rest = unfold.unconsumed_tail
    except zlib.error:  # what cannot be unfolded has no text
        return


def _preamble(name: bytes, head: bytes) -> tuple[int, bool]:
    """How many bytes stand before the text, and whether it is compressed."""
    keyword = head.find(b"\0") + 1
    if name == b"tEXt":
        return keyword, False
    if name != b"iTXt":
        return keyword + 1, True
    language = head.find(b"\0", keyword + 2) + 1
    return head.find(b"\0", language) + 1, head[keyword : keyword + 1] == b"\1"
