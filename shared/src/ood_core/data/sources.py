"""Where images come from: folders, manifests, parquet packs and lists, all seen as an `ImageSource`."""

from __future__ import annotations

__all__ = [
    "ImageFolder",
    "ImageSource",
    "Manifest",
    "PILImages",
    "ParquetImages",
    "ParquetShards",
    "match_labels",
    "open_source",
]

import copy
import hashlib
import json
import os
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Self, TypeAlias

import numpy as np
from PIL import Image

from ood_core.data import dicom
from ood_core.data.decode import (
    IMAGE_SUFFIXES,
    check_pixels,
    decode,
    image_suffixes,
    looks_like_image,
    named,
    printable,
    to_rgb,
)
from ood_core.data.depth import RULE, check_range
from ood_core.data.tables import class_label_names, clean_labels, image_columns, no_column, read_rows
from ood_core.errors import DataError, ImageError, MissingDataError, UsageError, unknown_name
from ood_core.labels import check_class_names, match_labels

PathLike = str | os.PathLike[str]


class ImageSource(ABC):
    """Images with stable ids and, where known, labels. A subclass says how to read one item.

    Attributes:
        ids: one printable, unique id per image; sorted, except in a subset, which keeps the order asked for.
        labels: int64 [N], index into `label_names`, -1 = unlabelled; None when no image has a label.
        label_names: one name per label.
        label_values: the labels as they stand in the data, one per label.
        place: the folder or file they were found in, for people; "" for images in memory.
        value_range: values to show black and white in images of more than 8 bits per sample, see
            `ood_core.data.depth`; None leaves it to the files.
        max_pixels: larger images are failures; None: 100 million.
        skipped: files that look like images and are none of this source.

    Example:
        >>> source = ImageFolder("photos")  # doctest: +SKIP
        >>> source.ids[0], source.open(0).size  # doctest: +SKIP
        ('cat/001.jpg', (640, 480))
    """

    place: str = ""
    value_range: tuple[float, float] | None = None
    max_pixels: int | None = None
    skipped: Sequence[str] = ()

    def __init__(self, ids: Sequence[str], items: Sequence[Any], labels: Sequence[Any] | None = None) -> None:
        """Sort `items` by id and number the values of `labels` (None: unlabelled) in sorted order."""
        if repeated := [id for id, count in Counter(ids).items() if count > 1]:
            raise DataError(f"The id {repeated[0]!r} occurs more than once; give every image an id of its own.")
        order = sorted(range(len(ids)), key=ids.__getitem__)
        self.ids = [ids[i] for i in order]
        self._items = [items[i] for i in order]
        values = [None] * len(order) if labels is None else [_label_value(labels[i]) for i in order]
        self.label_values = _sorted_values(set(values) - {None})
        self.label_names = [str(value) for value in self.label_values]
        number = {value: label for label, value in enumerate(self.label_values)}
        encoded = np.array([number.get(value, -1) for value in values], np.int64)
        self.labels: np.ndarray | None = encoded if number else None

    @abstractmethod
    def _read(self, item: Any, name: str, max_pixels: int | None) -> Image.Image:
        """The RGB image of one item, by `self.value_range`; an `ImageError` about the image `name` if that fails."""

    @abstractmethod
    def _stamp(self, item: Any) -> str:
        """A text that changes when the item's bytes or `self.value_range` change, without reading all bytes."""

    def _content(self, item: Any) -> str:
        """A text that says what the item's bytes are, wherever they lie; its stamp if that is all that is known."""
        return self._stamp(item)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
        """Yield (id, RGB image) in order."""
        for index, id in enumerate(self.ids):
            yield id, self.open(index)

    def open(
        self, index: int, *, max_pixels: int | None = None, value_range: Sequence[float] | None = None
    ) -> Image.Image:
        """Decode one image to upright RGB.

        Args:
            index: position in the source.
            max_pixels: instead of the source's.
            value_range: instead of the source's.

        Raises:
            ImageError: it cannot be decoded or has more than `max_pixels`; the message names it and says why.
        """
        source = self.reading(max_pixels=max_pixels, value_range=value_range)
        return source._read(self._items[index], self.ids[index], source.max_pixels)

    def reading(self, *, max_pixels: int | None = None, value_range: Sequence[float] | None = None) -> Self:
        """The same images, read with other options; None keeps the source's.

        Raises:
            UsageError: `max_pixels` below 1, or a `value_range` that is none.
        """
        if max_pixels is not None and max_pixels < 1:
            raise UsageError(f"max_pixels={max_pixels} must be at least 1.")
        wanted = {"max_pixels": max_pixels, "value_range": check_range(value_range)}
        changed = {name: value for name, value in wanted.items() if value not in (None, getattr(self, name))}
        if not changed:
            return self
        self.told  # noqa: B018  # the copy shares it
        part = copy.copy(self)
        part.__dict__ |= changed
        return part

    @property
    def told(self) -> list[str]:
        """What the user has been told of these images already; the same list for copies that are read otherwise."""
        return self.__dict__.setdefault("told_already", [])

    def _identity(self, item: Any) -> str:
        """A text that is the same for the same image in every source that holds it, and in no other image."""
        return self._stamp(item)

    def content_keys(self, rows: Iterable[int] | None = None) -> np.ndarray:
        """int64 [N], one number per image by which it is known again in other sources.

        Args:
            rows: which images; None for all.
        """
        chosen = range(len(self)) if rows is None else rows
        return np.array([short_hash(self._identity(self._items[row]).encode()) for row in chosen], np.int64)

    def subset(self, indices: Any) -> Self:
        """The images at `indices` (integers, a slice or a boolean mask), in that order, labels unchanged.

        Raises:
            IndexError: an index outside the source.
        """
        chosen = np.arange(len(self))[indices if isinstance(indices, slice) else _index_array(indices)]
        part = copy.copy(self)
        part.ids = [self.ids[i] for i in chosen]
        part._items = [self._items[i] for i in chosen]
        part.labels = None if self.labels is None else self.labels[chosen]
        return part

    def with_labels_from(self, class_names: Sequence[str]) -> Self:
        """The same images labelled by position in `class_names`; -1 where the name is not among them.

        Raises:
            DataError: the images have no labels.
            UsageError: a class name given twice.
        """
        check_class_names(class_names)
        if self.labels is None:
            raise DataError("The images have no labels to match with class names; use one folder per class.")
        mapping, _ = match_labels(self.label_names, class_names)
        return self.relabelled(class_names, np.append(mapping, -1)[self.labels])

    def relabelled(self, label_names: Sequence[str], labels: np.ndarray | None = None) -> Self:
        """The same images with labels of other names.

        Args:
            label_names: what the labels 0, 1, ... are called.
            labels: int64 [N], -1 for none; the present ones by default.
        """
        part = copy.copy(self)
        part.label_names = part.label_values = list(label_names)
        part.labels = self.labels if labels is None else np.asarray(labels, np.int64)
        return part

    def _number_names(self, names: Sequence[str], file: PathLike) -> None:
        """Call the labels, numbers, by their names."""
        known = range(len(names))
        if outside := [value for value in self.label_values if isinstance(value, str) or value not in known]:
            raise DataError(
                f"{printable(file)!r} has the label {outside[0]!r} and names for 0 to {len(names) - 1} only."
            )
        self.label_names = [names[value] for value in self.label_values]

    @property
    def fingerprint(self) -> str:
        """Hex digest over ids, labels, a stamp of every item's bytes (files: size and time of change) and how these
        are read: `value_range`, and the version of the rule for more than 8 bits."""
        return self._digest(self._stamp)

    @property
    def content(self) -> str:
        """Hex digest over ids, labels, every item's bytes and how these are read, the same for a copy elsewhere; reads
        all the bytes."""
        return self._digest(self._content)

    def _digest(self, describe: Callable[[Any], str]) -> str:
        labels = [-1] * len(self) if self.labels is None else self.labels.tolist()
        digest = hashlib.sha256(json.dumps([self.label_names, RULE, self.value_range]).encode())
        for id, item, label in zip(self.ids, self._items, labels, strict=True):
            digest.update(json.dumps([id, describe(item), label]).encode())
        return digest.hexdigest()


class Derived(ImageSource):
    """Images of other sources: each is read, known and described as it is there."""

    @abstractmethod
    def _origin(self, item: Any) -> tuple[ImageSource, int]:
        """The source of an item, and its position there."""

    def _read(self, item: Any, name: str, max_pixels: int | None) -> Image.Image:
        source, index = self._origin(item)
        return source.open(index, max_pixels=max_pixels, value_range=self.value_range)

    def _identity(self, item: Any) -> str:
        source, index = self._origin(item)
        return source._identity(source._items[index])

    def _stamp(self, item: Any) -> str:
        source, index = self._origin(item)
        return source._stamp(source._items[index])

    def _content(self, item: Any) -> str:
        source, index = self._origin(item)
        return source._content(source._items[index])


def _index_array(indices: Any) -> np.ndarray:
    indices = np.asarray(indices)
    return indices if indices.size else indices.astype(np.int64)


def _label_value(value: Any) -> Any:
    """None for an empty label; a float that stands for an integer (a column with gaps) as that integer."""
    if isinstance(value, list | dict | bytes):
        raise DataError(f"The label {value!r} is neither text nor an integer; an image has one label.")
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None if value != value else value
    return None if value == "" else value


def _sorted_values(values: set[Any]) -> list[Any]:
    """Numerical order if all are integers, be it as text ("2" before "10"), else the order of the texts."""
    try:
        return sorted(values, key=int if all(str(int(value)) == str(value) for value in values) else str)
    except (TypeError, ValueError):
        return sorted(values, key=str)


def _unique(ids: Iterable[str]) -> list[str]:
    """Number repeated ids: the second "a" becomes "a#2"."""
    ids = list(ids)
    taken, seen = set(ids), Counter[str]()
    for position, id in enumerate(ids):
        seen[id] += 1
        while seen[id] > 1 and f"{id}#{seen[id]}" in taken:
            seen[id] += 1
        if seen[id] > 1:
            ids[position] = f"{id}#{seen[id]}"
            taken.add(ids[position])
    return ids


def short_hash(content: bytes) -> int:
    """64 bits of a digest, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def _real_path(path: PathLike) -> str:
    folder, name = os.path.split(os.fspath(path))
    return os.path.join(_real_folder(folder), name)


@cache
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _file_stamp(path: PathLike) -> str:
    try:
        info = os.stat(path)
    except OSError:
        return "missing"
    return f"{info.st_size} {info.st_mtime_ns}"


def _file_content(path: PathLike) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "missing"


def _existing(path: PathLike, kind: str) -> str:
    path = os.fspath(path)
    if not os.path.exists(path):
        raise MissingDataError(f"There is no {kind} {printable(path)!r}; check the path.")
    return path


class FileSource(ImageSource):
    """Images in files of their own: an item is a path."""

    def _read(self, item: str, name: str, max_pixels: int | None) -> Image.Image:
        return decode(item, max_pixels=max_pixels, value_range=self.value_range)

    def _identity(self, item: str) -> str:
        return f"{_real_path(item)} {_file_stamp(item)}"

    def _stamp(self, item: str) -> str:
        return _with_range(_file_stamp(item), self)

    def _content(self, item: str) -> str:
        return _with_range(_file_content(item), self)


def _with_range(stamp: str, source: ImageSource) -> str:
    return stamp if source.value_range is None else f"{stamp} {source.value_range}"


# fmt: off
# Files that stand beside images and need not be opened to be known for none.
_NO_IMAGES = frozenset({
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".html", ".htm", ".yaml", ".yml", ".toml", ".ini",
    ".cfg", ".log", ".py", ".ipynb", ".parquet", ".npy", ".npz", ".h5", ".hdf5", ".mat", ".pt", ".pth", ".pkl",
    ".onnx", ".safetensors", ".zip", ".gz", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".db", ".pdf", ".docx", ".xlsx",
})
# Pictures that need other libraries.
_UNREAD = dicom.DICOM_SUFFIXES | {
    ".heic", ".heif", ".avif", ".jxl", ".svg", ".exr", ".hdr", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".raf",
    ".rw2", ".nii", ".mha", ".mhd", ".nrrd", ".svs", ".ndpi", ".mrxs", ".czi", ".lif", ".eps",
}
# fmt: on


class ImageFolder(FileSource):
    """All images below a folder; the first folder below it, if any, is the label.

    Images are the files with a suffix that Pillow or a plug-in of it reads, and with pydicom DICOM files of whatever
    name. Other files that look like images by suffix or content are in `skipped`.
    Hidden files and folders are skipped, linked folders are followed. The id is the path below `root`, with
    "/"; bytes in it that are no UTF-8 are escaped. A broken link to an image is an item that fails at `open`.

    Args:
        root: the folder.
        value_range: values to show black and white in images of more than 8 bits per sample, e.g. (0, 4095) of 12-bit
            content in 16-bit files; None leaves it to the files, see `ood_core.data.depth`.

    Raises:
        MissingDataError: no such folder.
        DataError: a file, or a folder without any image.
        UsageError: `value_range` is no range.

    Example:
        >>> ImageFolder("photos").label_names  # doctest: +SKIP
        ['cat', 'dog']
    """

    def __init__(self, root: PathLike, *, value_range: Sequence[float] | None = None) -> None:
        root = _existing(root, "folder")
        if not os.path.isdir(root):
            raise DataError(f"{printable(root)!r} is a file, not a folder of images.")
        found = _scan(root)
        if not found[True]:
            raise DataError(_no_image_in(root, found[False]))
        start = len(os.path.join(root, ""))
        relative = [path[start:].replace(os.sep, "/") for path in found[True]]
        labels = [printable(path).partition("/")[0] if "/" in path else None for path in relative]
        super().__init__(_unique(map(printable, relative)), found[True], labels)
        self.place = printable(root)
        self.skipped = [printable(path[start:]) for path in found[False]]
        self.value_range = check_range(value_range)


def _no_image_in(root: str, skipped: Sequence[str]) -> str:
    hint = ""
    if skipped:
        hint = f" {len(skipped)} files look like images that cannot be read here, first {printable(skipped[0])!r}."
    if unread := [path for path in skipped if _suffix(path) in dicom.DICOM_SUFFIXES]:  # images with pydicom
        hint = f" It holds DICOM files as {printable(unread[0])!r}: {dicom.INSTALL}."
    suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
    return f"Folder {printable(root)!r} holds no image, no visible file with a suffix as {suffixes}.{hint}"


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _scan(root: str) -> dict[bool, list[str]]:
    """Image files below `root` (True) and files that only look like images (False), sorted."""
    suffixes = image_suffixes()
    found: dict[bool, list[str]] = {True: [], False: []}
    for entry in _files_below(root):
        if (readable := _kind(entry, suffixes)) is not None:
            found[readable].append(entry.path)
    return {readable: sorted(paths) for readable, paths in found.items()}


def _packs_below(root: str) -> list[str]:
    return sorted(entry.path for entry in _files_below(root) if _suffix(entry.name) == ".parquet")


def _files_below(root: str) -> Iterator[os.DirEntry[str]]:
    """The visible files below `root`; a link back to a folder above it is not followed."""
    todo: list[tuple[str, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while todo:
        folder, above = todo.pop()
        info = os.stat(folder)
        here = (info.st_dev, info.st_ino)
        if here in above:
            continue
        for entry in _visible_entries(folder):
            if entry.is_dir():
                todo.append((entry.path, above | {here}))
            else:
                yield entry


def _kind(entry: os.DirEntry[str], suffixes: frozenset[str]) -> bool | None:
    """Whether a file is an image (True), looks like one (False), or neither (None)."""
    suffix = _suffix(entry.name)
    if suffix in suffixes:
        return True
    if suffix in _NO_IMAGES or entry.name.upper() == "DICOMDIR" or not entry.is_file():
        return None
    if suffix in _UNREAD:
        return False
    try:
        with open(entry.path, "rb") as file:
            head = file.read(dicom.HEAD)
    except OSError:
        return None
    if dicom.is_dicom(head) or dicom.is_bare(head):
        return dicom.available()
    return False if looks_like_image(head) else None


def _visible_entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"Folder {printable(folder)!r} cannot be listed: {error.strerror}.") from error


class Manifest(FileSource):
    """A table of image files: a column of paths, and optionally `id` and labels; or a list of paths.

    Text may be in any encoding that its byte order mark or `encoding` names, else UTF-8, and gzipped. Cells are
    separated by commas, tabs, semicolons or bars, whichever the header shows; blanks around them do not count. In a
    list (.txt) a label may follow the path after a blank. Paths may be `file://` addresses, begin with `~` and have
    backslashes. An empty label, -1, nan, NA, None and null are none, in every kind of table.

    Args:
        path: a .csv, .tsv, .jsonl, .txt or .parquet file, text files also with .gz. The id defaults to the path as
            written.
        root: what relative paths are relative to; by default the manifest's folder.
        label: the column of labels, if there.
        path_column: the column of paths.
        encoding: of a text file; None: what its byte order mark says, else UTF-8.
        value_range: see `ImageFolder`.

    Raises:
        MissingDataError: no such file.
        DataError: not such a table, no column of paths or of the labels asked for, a row with too few or too many
            cells, an empty path, an id given twice, or no row.
        UsageError: an unknown encoding.

    Example:
        >>> Manifest("train.csv").ids  # doctest: +SKIP
        ['a.jpg', 'b.jpg']
    """

    def __init__(
        self,
        path: PathLike,
        *,
        root: PathLike | None = None,
        label: str = "label",
        path_column: str = "path",
        encoding: str | None = None,
        value_range: Sequence[float] | None = None,
    ) -> None:
        path = _existing(path, "manifest")
        base = os.path.dirname(path) if root is None else os.fspath(root)
        rows = read_rows(path, base, path_column=path_column, label=label, encoding=encoding)
        super().__init__(rows.ids, rows.files, rows.labels)
        if rows.names is not None:
            self._number_names(rows.names, path)
        self.place = printable(path)
        self.value_range = check_range(value_range)


class ParquetImages(ImageSource):
    """Encoded images in a column of a parquet file.

    Ids that repeat are numbered in row order ("a", "a#2"). The bytes are read once per process, at the first
    image; subsets share them, and a pickled source leaves them behind.

    Args:
        file: the parquet file.
        split: keep the rows with this value in the column `split`; None keeps all.
        image: the column of encoded bytes, or of structs with a field `bytes`, or `path` of an image file where there
            are no bytes. By default "image", else the one column that Hugging Face's metadata calls an image.
        label: the column of labels, if there. A column `name` with one name per label gives the label names, else
            Hugging Face's metadata.
        id: the column of ids; by default `id`, else `source`, else the row number.
        value_range: see `ImageFolder`.

    Raises:
        MissingDataError: no such file.
        DataError: no parquet file, no such column, or no row.
        UsageError: an unknown split.

    Example:
        >>> ParquetImages("pack.parquet", split="test").label_names  # doctest: +SKIP
        ['cat', 'dog']
    """

    def __init__(
        self,
        file: PathLike,
        split: str | None = None,
        *,
        image: str | None = None,
        label: str = "label",
        id: str | None = None,
        value_range: Sequence[float] | None = None,
    ) -> None:
        self.file, self.split = _existing(file, "parquet file"), split
        schema = _parquet_schema(self.file)
        image = image or _image_column(schema) or "image"
        names = _column_names(self.file, schema, image, label, id)
        self.has_ids = id is not None or bool({"id", "source"} & set(names))
        id = id or next((name for name in ("id", "source") if name in names), None)
        wanted = [name for name in names if name in {id, label, "name", "split"}]
        count, columns = _read_columns(self.file, wanted)
        rows = _rows_of_split(self.file, columns, split) if split else list(range(count))
        if not rows:
            raise DataError(f"{printable(self.file)!r} has no rows.")
        columns = {name: [values[row] for row in rows] for name, values in columns.items()}
        labels = clean_labels(columns[label]) if label in columns else None
        super().__init__(_row_ids(columns.get(id), rows, count), rows, labels)
        if labels is not None and self.labels is not None and "name" in columns:
            self._take_names(labels, columns["name"])
        elif (own := class_label_names(schema, label)) is not None:
            self._number_names(own, self.file)
        self._encoded = _EncodedColumn(self.file, image, rows)
        self.place = printable(self.file) + (f":{split}" if split else "")
        self.value_range = check_range(value_range)

    def _take_names(self, values: list[Any], names: list[Any]) -> None:
        """Call the labels by `names`, if these give one name to each."""
        pairs = set(zip(map(_label_value, values), names, strict=True))
        name_of = {value: name for value, name in pairs if value is not None and name}
        if len(name_of) == len({pair for pair in pairs if pair[0] is not None}):
            self.label_names = [str(name_of[value]) for value in self.label_values]

    def _read(self, item: int, name: str, max_pixels: int | None) -> Image.Image:
        name = f"{printable(self.file)}: {name}"
        data = self._encoded[item]
        if data is not None:
            return decode(data, name=name, max_pixels=max_pixels, value_range=self.value_range)
        path = self._encoded.paths.get(item)
        if path is None:
            raise ImageError(f"Image {name!r} cannot be read: row {item} holds no bytes.")
        if not os.path.exists(path):
            where = printable(path)
            raise ImageError(
                f"Image {name!r} cannot be read: row {item} holds no bytes, and there is no file {where!r}."
            )
        return decode(path, max_pixels=max_pixels, value_range=self.value_range)

    def _identity(self, item: int) -> str:
        return f"{_real_path(self.file)} {_file_stamp(self.file)} {item}"

    def _stamp(self, item: int) -> str:
        path = self._encoded.paths.get(item)
        outside = "" if path is None else f" {_file_stamp(path)}"
        return _with_range(f"{_file_stamp(self.file)} {self.split} {item}{outside}", self)

    def _content(self, item: int) -> str:
        data, path = self._encoded[item], self._encoded.paths.get(item)
        held = hashlib.sha256(data or b"").hexdigest() if path is None else _file_content(path)
        return _with_range(held, self)


def _image_column(schema: Any) -> str | None:
    """The column of images, if a parquet file has one."""
    declared = image_columns(schema)
    return "image" if "image" in schema.names else declared[0] if len(declared) == 1 else None


def _column_names(file: str, schema: Any, image: str, label: str, id: str | None) -> list[str]:
    """The file's columns, once it is sure that those asked for are there."""
    asked = {"image": image, **({"label": label} if label != "label" else {}), **({"id": id} if id else {})}
    for kind, name in asked.items():
        if name not in schema.names:
            raise no_column(file, name, schema.names, kind)
    for name in (*asked.values(), "label"):
        if schema.names.count(name) > 1:
            raise DataError(f"{printable(file)!r} has {schema.names.count(name)} columns {name!r}; rename all but one.")
    if not _holds_images(kind := schema.field(image).type):
        hint = f" For paths of image files say path_column={image!r} (--path-column {image})." * (str(kind) == "string")
        raise DataError(f"Column {image!r} of {printable(file)!r} holds {kind}, not encoded images as bytes.{hint}")
    return schema.names


def _parquet_schema(file: str) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except (ValueError, OSError) as error:
        raise DataError(f"{printable(file)!r} cannot be read as parquet: {error}.") from error


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 or kind.get_field_index("path") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _read_columns(file: str, names: list[str]) -> tuple[int, dict[str | None, list[Any]]]:
    import pyarrow.parquet as pq

    table = pq.read_table(file, columns=names)
    return pq.read_metadata(file).num_rows, {name: table[name].to_pylist() for name in names}


def _rows_of_split(file: str, columns: dict[str | None, list[Any]], split: str) -> list[int]:
    if "split" not in columns:
        raise UsageError(f"{printable(file)!r} has no column 'split'; leave out the split {split!r}.")
    if rows := [row for row, value in enumerate(columns["split"]) if value == split]:
        return rows
    raise unknown_name(f"split of {printable(file)}", split, {str(value) for value in columns["split"]})


def _row_ids(values: list[Any] | None, rows: list[int], count: int) -> list[str]:
    """The column's values, else the row numbers, with zeros before them so that they sort in row order."""
    numbers = [str(row).zfill(len(str(count - 1))) for row in rows]
    if values is None:
        return numbers
    return _unique(number if value is None else str(value) for number, value in zip(numbers, values, strict=True))


class _EncodedColumn:
    """The bytes in some rows of a column, read at the first use and left behind when pickled.

    Attributes:
        paths: of the images of rows without bytes, by row.
    """

    def __init__(self, file: str, column: str, rows: list[int]) -> None:
        self.file, self.column, self.rows = file, column, np.array(rows)
        self._kept: Any = None
        wanted = set(rows)
        self.paths = {row: path for row, path in _outside_paths(file, column).items() if row in wanted}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def __getitem__(self, row: int) -> bytes | None:
        if self._kept is None:
            self._kept = self._read()
        return self._kept[int(np.searchsorted(self.rows, row))].as_py()

    def _read(self) -> Any:
        """The wanted rows, kept batch by batch from the mapped file, so that no others are ever held."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.file, memory_map=True) as reader:
            wanted = np.zeros(reader.metadata.num_rows, bool)
            wanted[self.rows] = True
            kept, start = [], 0
            for batch in reader.iter_batches(4096, columns=[self.column], use_threads=False):
                rows = pa.array(wanted[start : start + len(batch)])
                kept.append(_bytes_of(batch.column(0).filter(rows)))
                start += len(batch)
        return pa.chunked_array(kept)


def _bytes_of(column: Any) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_struct(column.type):
        return column
    has_bytes = column.type.get_field_index("bytes") >= 0
    return pc.struct_field(column, "bytes") if has_bytes else pa.nulls(len(column), pa.binary())


def _outside_paths(file: str, column: str) -> dict[int, str]:
    """Row -> path of the image file, where a struct has a path and no bytes; relative ones are beside the pack."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pq.read_schema(file).field(column).type
    if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0 or not _may_lack_bytes(file, f"{column}.bytes"):
        return {}
    folder, found, start = os.path.dirname(file), {}, 0
    with pq.ParquetFile(file, memory_map=True) as reader:
        for batch in reader.iter_batches(4096, columns=[column], use_threads=False):
            absent = _bytes_of(batch.column(0)).is_null().to_pylist()
            paths = batch.column(0).field("path").to_pylist()
            pairs = enumerate(zip(absent, paths, strict=True), start)
            found.update({row: os.path.join(folder, path) for row, (no_bytes, path) in pairs if no_bytes and path})
            start += len(batch)
    return found


def _may_lack_bytes(file: str, field: str) -> bool:
    """Whether a row may have no bytes; the statistics of a file mostly tell without reading these."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(file)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    own = [chunk.statistics for chunk in chunks if chunk.path_in_schema == field]
    return not own or any(one is None or not one.has_null_count or one.null_count > 0 for one in own)


class PILImages(ImageSource):
    """Images in memory.

    Args:
        images: PIL images of any mode.
        labels: one per image: a text, or an integer; -1 is unlabelled.
        label_names: the names of the labels 0, 1, ...; by default the sorted values of `labels` are numbered.
        ids: one per image; by default their numbers, with zeros before them.

    Raises:
        TypeError: something else than PIL images.
        DataError: no image, another number of labels or ids than of images, or an id given twice.

    Example:
        >>> PILImages([Image.new("L", (4, 4))], ["grey"]).label_names
        ['grey']
    """

    def __init__(
        self,
        images: Sequence[Image.Image],
        labels: Sequence[Any] | np.ndarray | None = None,
        *,
        label_names: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        images = list(images)
        _check_images(images, ids=ids, labels=labels)
        ids = _row_ids(None, list(range(len(images))), len(images)) if ids is None else list(ids)
        known = None if labels is None else [None if label == -1 else label for label in np.asarray(labels).tolist()]
        super().__init__(ids, images, known)
        if label_names is not None:
            self._take_names(list(label_names))

    def _take_names(self, names: list[str]) -> None:
        if outside := [value for value in self.label_values if value not in range(len(names))]:
            raise DataError(f"Label {outside[0]!r} is no index into the {len(names)} label_names.")
        if self.labels is not None:
            self.labels = np.array([*self.label_values, -1])[self.labels]
        self.label_names = self.label_values = names

    def _read(self, item: Image.Image, name: str, max_pixels: int | None) -> Image.Image:
        return named(name, lambda: to_rgb(check_pixels(item, max_pixels), value_range=self.value_range))

    def _stamp(self, item: Image.Image) -> str:
        try:
            image = self._read(item, "", sys.maxsize)
        except ImageError as error:
            return str(error)
        return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _check_images(images: list[Any], **per_image: Sequence[Any] | np.ndarray | None) -> None:
    if not images:
        raise DataError("An empty list of images was given; give at least one.")
    if others := [image for image in images if not isinstance(image, Image.Image)]:
        raise TypeError(f"images must be PIL images, got {type(others[0]).__name__}; see PIL.Image.fromarray.")
    for name, values in per_image.items():
        if values is not None and len(values) != len(images):
            raise DataError(f"{len(images)} images were given with {len(values)} {name}; give one per image.")


class ParquetShards(Derived):
    """The parquet packs below a folder as one source, as the data sets of Hugging Face come.

    Ids are those of the packs where they have such a column, else the pack's path below the folder, without suffix,
    and the row. Ids that repeat are numbered ("a", "a#2"), in the order of the packs' names. Labels are the same where
    their names are.

    Args:
        folder: with .parquet files, hidden ones left out.
        split: keep the rows with this value in the column `split`, or, where there is no such column, the packs whose
            names begin with it ("train-00000-of-00002.parquet"); None keeps all.
        image: see `ParquetImages`.
        label: see `ParquetImages`.
        value_range: see `ImageFolder`.

    Raises:
        MissingDataError: no such folder.
        DataError: no parquet file below it, or one that is no pack.
        UsageError: an unknown split.

    Example:
        >>> ParquetShards("data/").ids[0]  # doctest: +SKIP
        'train-00000-of-00002/0000'
    """

    def __init__(
        self,
        folder: PathLike,
        split: str | None = None,
        *,
        image: str | None = None,
        label: str = "label",
        value_range: Sequence[float] | None = None,
    ) -> None:
        folder = _existing(folder, "folder")
        files = _packs_below(folder)
        if not files:
            raise DataError(f"Folder {printable(folder)!r} holds no parquet file.")
        start = len(os.path.join(folder, ""))
        bare = [printable(os.path.splitext(file[start:])[0]).replace(os.sep, "/") for file in files]
        chosen = _of_split(folder, dict(zip(bare, files, strict=True)), split)
        self.shards = [ParquetImages(file, own, image=image, label=label) for file, own in chosen.values()]
        ids: list[str] = []
        items: list[tuple[int, int]] = []
        labels: list[str | None] = []
        for number, (name, shard) in enumerate(zip(chosen, self.shards, strict=True)):
            ids += shard.ids if shard.has_ids else [f"{name}/{id}" for id in shard.ids]
            items += [(number, index) for index in range(len(shard))]
            names = np.array([*shard.label_names, None], dtype=object)
            labels += [None] * len(shard) if shard.labels is None else names[shard.labels].tolist()
        super().__init__(_unique(ids), items, labels)
        self.place = printable(folder) + (f":{split}" if split else "")
        self.value_range = check_range(value_range)

    def _origin(self, item: tuple[int, int]) -> tuple[ImageSource, int]:
        return self.shards[item[0]], item[1]


def _of_split(folder: str, files: dict[str, str], split: str | None) -> dict[str, tuple[str, str | None]]:
    """The packs with images of a split, by name, each with its value of the column `split`."""
    if split is None:
        return {name: (file, None) for name, file in files.items()}
    named, columns = {}, set[str]()
    for name, file in files.items():
        own = _read_columns(file, ["split"])[1]["split"] if "split" in _parquet_schema(file).names else None
        columns |= set(map(str, own or [_split_in_name(name)]))
        if split in own if own else split == _split_in_name(name):
            named[name] = (file, split if own else None)
    if not named:
        raise unknown_name(f"split of {printable(folder)}", split, columns)
    return named


def _split_in_name(name: str) -> str:
    return re.split(r"[-.]", name.rpartition("/")[2])[0]


Images: TypeAlias = ImageSource | PathLike | Image.Image | Sequence[Image.Image]
"""What `open_source` opens: an image source, folder, manifest, parquet file, a PIL image or a list of them."""


def open_source(
    spec: Images,
    *,
    max_pixels: int | None = None,
    value_range: Sequence[float] | None = None,
    path_column: str | None = None,
    label: str | None = None,
    encoding: str | None = None,
) -> ImageSource:
    """Open what a command line or a caller names as a source of images.

    Args:
        spec: a folder of images or of parquet packs, a manifest (.csv, .tsv, .jsonl, .txt, .parquet),
            `FILE.parquet[:split]` with a column of images, an image file, a PIL image or a list of them, or an
            `ImageSource`, which is returned as it is.
        max_pixels: larger images are failures; None keeps the source's limit.
        value_range: see `ImageFolder`; None keeps the source's.
        path_column: of a manifest, the column of paths; None: "path".
        label: of a manifest or pack, the column of labels; None: "label".
        encoding: of a manifest; None: what its byte order mark says, else UTF-8.

    Raises:
        MissingDataError: no such file or folder.
        DataError: it holds no images.
        UsageError: an unknown split or encoding, or one of the options out of range.

    Example:
        >>> len(open_source("pack.parquet:test"))  # doctest: +SKIP
        1000
    """
    opened = _opened(spec, path_column, label, encoding)
    return opened.reading(max_pixels=max_pixels, value_range=value_range)


def _opened(
    spec: Images,
    path_column: str | None,
    label: str | None,
    encoding: str | None,
) -> ImageSource:
    if isinstance(spec, ImageSource):
        return spec
    if not isinstance(spec, str | os.PathLike):
        return PILImages([spec] if isinstance(spec, Image.Image) else spec)
    path, split = _path_and_split(os.fspath(spec))
    column = label or "label"
    if os.path.isdir(path):
        return ParquetShards(path, split, label=column) if split or _holds_packs(path) else ImageFolder(path)
    _existing(path, "file or folder")
    if _is_image(path):
        return FileSource([printable(os.path.basename(path))], [path])
    is_parquet = path.lower().endswith(".parquet")
    if is_parquet and path_column is None and (split or _image_column(_parquet_schema(path))):
        return ParquetImages(path, split, label=column)
    return Manifest(path, label=column, path_column=path_column or "path", encoding=encoding)


def _holds_packs(folder: str) -> bool:
    """Whether a folder without images holds parquet files."""
    suffixes = image_suffixes()
    return not any(_kind(entry, suffixes) for entry in _files_below(folder)) and bool(_packs_below(folder))


def _is_image(path: str) -> bool:
    """Whether a file is a picture, by its suffix or else by its content."""
    if _suffix(path) in image_suffixes():
        return True
    if _suffix(path) in _NO_IMAGES or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        head = file.read(dicom.HEAD)
    return _suffix(path) in _UNREAD or looks_like_image(head) or dicom.is_dicom(head) or dicom.is_bare(head)


def _path_and_split(spec: str) -> tuple[str, str | None]:
    path, _, split = spec.rpartition(":")
    if (path.lower().endswith(".parquet") or os.path.isdir(path)) and not os.path.exists(spec):
        return path, split
    return spec, None
