"""Where images come from: folders, manifests, parquet packs and lists, all seen as an `ImageSource`."""

from __future__ import annotations

__all__ = [
    "ImageFolder",
    "ImageSource",
    "Manifest",
    "PILImages",
    "ParquetImages",
    "match_labels",
    "open_source",
]

import copy
import csv
import hashlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Self

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
from ood_core.errors import DataError, ImageError, MissingDataError, UsageError, unknown_name

PathLike = str | os.PathLike[str]


class ImageSource(ABC):
    """Images with stable ids and, where known, labels. A subclass says how to read one item.

    Attributes:
        ids: one printable, unique id per image; sorted, except in a subset, which keeps the order asked for.
        labels: int64 [N], index into `label_names`, -1 = unlabelled; None when no image has a label.
        label_names: one name per label.
        label_values: the labels as they stand in the data, one per label.
        value_range: values to show black and white in images of more than 8 bits per sample, see
            `ood_core.data.depth`; None leaves it to the files.
        max_pixels: larger images are failures; None: 100 million.
        skipped: files that look like images and are none of this source.

    Example:
        >>> source = ImageFolder("photos")  # doctest: +SKIP
        >>> source.ids[0], source.open(0).size  # doctest: +SKIP
        ('cat/001.jpg', (640, 480))
    """

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
        """
        if self.labels is None:
            raise DataError("The images have no labels to match with class names; use one folder per class.")
        mapping, _ = match_labels(self.label_names, class_names)
        part = copy.copy(self)
        part.label_names = part.label_values = list(class_names)
        part.labels = np.append(mapping, -1)[self.labels]
        return part

    @property
    def fingerprint(self) -> str:
        """Hex digest over ids, labels, a stamp of every item's bytes (files: size and time of change) and how these
        are read: `value_range`, and the version of the rule for more than 8 bits."""
        labels = [-1] * len(self) if self.labels is None else self.labels.tolist()
        digest = hashlib.sha256(json.dumps([self.label_names, RULE, self.value_range]).encode())
        for id, item, label in zip(self.ids, self._items, labels, strict=True):
            digest.update(json.dumps([id, self._stamp(item), label]).encode())
        return digest.hexdigest()


def _index_array(indices: Any) -> np.ndarray:
    indices = np.asarray(indices)
    return indices if indices.size else indices.astype(np.int64)


def _label_value(value: Any) -> Any:
    """None for an empty label; a float that stands for an integer (a column with gaps) as that integer."""
    if isinstance(value, list | dict):
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


def _file_stamp(path: PathLike) -> str:
    try:
        info = os.stat(path)
    except OSError:
        return "missing"
    return f"{info.st_size} {info.st_mtime_ns}"


def _existing(path: PathLike, kind: str) -> str:
    path = os.fspath(path)
    if not os.path.exists(path):
        raise MissingDataError(f"There is no {kind} {printable(path)!r}; check the path.")
    return path


class _Files(ImageSource):
    """Images in files of their own: an item is a path."""

    def _read(self, item: str, name: str, max_pixels: int | None) -> Image.Image:
        return decode(item, max_pixels=max_pixels, value_range=self.value_range)

    def _stamp(self, item: str) -> str:
        return _with_range(_file_stamp(item), self)


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


class ImageFolder(_Files):
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
    """Image files below `root` (True) and files that only look like images (False), sorted.

    A link back to a folder above it is not followed.
    """
    suffixes = image_suffixes()
    found: dict[bool, list[str]] = {True: [], False: []}
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
            elif (readable := _kind(entry, suffixes)) is not None:
                found[readable].append(entry.path)
    return {readable: sorted(paths) for readable, paths in found.items()}


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


class Manifest(_Files):
    """A table of image files: column `path`, and optionally `id` and `label`.

    Args:
        path: a .csv, .tsv, .jsonl or .parquet file. The id defaults to the path as written.
        root: what relative paths are relative to; by default the manifest's folder.
        label: the column of labels, if there.
        value_range: see `ImageFolder`.

    Raises:
        MissingDataError: no such file.
        DataError: not such a table, no column `path` or of the labels asked for, an empty path, an id given twice,
            or no row.

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
        value_range: Sequence[float] | None = None,
    ) -> None:
        path = _existing(path, "manifest")
        rows = _read_rows(path, label)
        base = os.path.dirname(path) if root is None else os.fspath(root)
        items = [_path_of(row, number, path) for number, row in enumerate(rows, 1)]
        ids = [printable(str(_or(row.get("id"), item))) for row, item in zip(rows, items, strict=True)]
        labels = [_printable_label(row.get(label)) for row in rows]
        super().__init__(ids, [os.path.join(base, item) for item in items], labels)
        self.value_range = check_range(value_range)


def _or(value: Any, default: Any) -> Any:
    return default if value is None or value == "" else value


def _printable_label(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def _path_of(row: dict[str, Any], number: int, manifest: str) -> str:
    path = row.get("path")
    if not isinstance(path, str) or not path:
        raise DataError(f"{printable(manifest)!r} has no path in data row {number} (it holds {path!r}).")
    return path


def _read_rows(path: str, label: str) -> list[dict[str, Any]]:
    suffix = os.path.splitext(path)[1].lower()
    readers: dict[str, Callable[[str], Table]] = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".jsonl": _read_jsonl,
        ".parquet": partial(_read_parquet_rows, label=label),
    }
    if suffix not in readers:
        raise DataError(f"{printable(path)!r} is no manifest: it must end in {', '.join(readers)}.")
    try:
        columns, rows = readers[suffix](path)
    except (ValueError, OSError, csv.Error) as error:
        raise DataError(f"Manifest {printable(path)!r} cannot be read: {error}.") from error
    if absent := [name for name in ("path", label) if name not in (*columns, "label")]:
        known = ", ".join(map(repr, columns))
        raise DataError(f"{printable(path)!r} has no column {absent[0]!r}; its columns are {known}.")
    if not rows:
        raise DataError(f"Manifest {printable(path)!r} has no rows.")
    return rows


Table = tuple[list[str], list[dict[str, Any]]]


def _read_csv(path: str) -> Table:
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        columns = [name.strip() for name in next(reader, [])]
        return columns, [dict(zip(columns, row, strict=False)) for row in reader if row]


def _read_jsonl(path: str) -> Table:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = [_json_object(line, number) for number, line in enumerate(file, 1) if line.strip()]
    return sorted({name for row in rows for name in row}), rows


def _json_object(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object")
    return row


def _read_parquet_rows(path: str, label: str) -> Table:
    import pyarrow.parquet as pq

    columns = pq.read_schema(path).names
    wanted = [name for name in ("path", "id", label) if name in columns]
    return columns, pq.read_table(path, columns=wanted).to_pylist()


class ParquetImages(ImageSource):
    """Encoded images in a column of a parquet file.

    Ids that repeat are numbered in row order ("a", "a#2"). The bytes are read once per process, at the first
    image; subsets share them, and a pickled source leaves them behind.

    Args:
        file: the parquet file.
        split: keep the rows with this value in the column `split`; None keeps all.
        image: the column of encoded bytes, or of structs with a field `bytes`.
        label: the column of labels, if there. A column `name` with one name per label gives the label names.
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
        image: str = "image",
        label: str = "label",
        id: str | None = None,
        value_range: Sequence[float] | None = None,
    ) -> None:
        self.file, self.split = _existing(file, "parquet file"), split
        names = _column_names(self.file, image, label, id)
        id = id or next((name for name in ("id", "source") if name in names), None)
        wanted = [name for name in names if name in {id, label, "name", "split"}]
        count, columns = _read_columns(self.file, wanted)
        rows = _rows_of_split(self.file, columns, split) if split else list(range(count))
        if not rows:
            raise DataError(f"{printable(self.file)!r} has no rows.")
        columns = {name: [values[row] for row in rows] for name, values in columns.items()}
        super().__init__(_row_ids(columns.get(id), rows, count), rows, columns.get(label))
        if self.labels is not None and "name" in columns:
            self._take_names(columns[label], columns["name"])
        self._encoded = _EncodedColumn(self.file, image, rows)
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
        if data is None:
            raise ImageError(f"Image {name!r} cannot be read: row {item} holds no bytes.")
        return decode(data, name=name, max_pixels=max_pixels, value_range=self.value_range)

    def _stamp(self, item: int) -> str:
        return _with_range(f"{_file_stamp(self.file)} {self.split} {item}", self)


def _column_names(file: str, image: str, label: str, id: str | None) -> list[str]:
    """The file's columns, once it is sure that those asked for are there."""
    schema = _parquet_schema(file)
    asked = [image, *([label] if label != "label" else []), *([id] if id else [])]
    if missing := [name for name in asked if name not in schema.names]:
        known = ", ".join(map(repr, schema.names))
        raise DataError(f"{printable(file)!r} has no column {missing[0]!r}; its columns are {known}.")
    if not _holds_bytes(schema.field(image).type):
        kind = schema.field(image).type
        raise DataError(f"Column {image!r} of {printable(file)!r} holds {kind}, not encoded images as bytes.")
    return schema.names


def _parquet_schema(file: str) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except (ValueError, OSError) as error:
        raise DataError(f"{printable(file)!r} cannot be read as parquet: {error}.") from error


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
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
    """The bytes in some rows of a column, read at the first use and left behind when pickled."""

    def __init__(self, file: str, column: str, rows: list[int]) -> None:
        self.file, self.column, self.rows = file, column, np.array(rows)
        self._kept: Any = None

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

    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


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


def open_source(
    spec: ImageSource | PathLike | Sequence[Image.Image],
    *,
    max_pixels: int | None = None,
    value_range: Sequence[float] | None = None,
) -> ImageSource:
    """Open what a command line or a caller names as a source of images.

    Args:
        spec: a folder, a manifest (.csv, .tsv, .jsonl, .parquet with a column `path`), `FILE.parquet[:split]`
            with a column `image`, an image file, a list of PIL images, or an `ImageSource`, which is returned as it
            is.
        max_pixels: larger images are failures; None keeps the source's limit.
        value_range: see `ImageFolder`; None keeps the source's.

    Raises:
        MissingDataError: no such file or folder.
        DataError: it holds no images.
        UsageError: an unknown split, or one of the options out of range.

    Example:
        >>> len(open_source("pack.parquet:test"))  # doctest: +SKIP
        1000
    """
    return _opened(spec).reading(max_pixels=max_pixels, value_range=value_range)


def _opened(spec: ImageSource | PathLike | Sequence[Image.Image]) -> ImageSource:
    if isinstance(spec, ImageSource):
        return spec
    if not isinstance(spec, str | os.PathLike):
        return PILImages(spec)
    path, split = _path_and_split(os.fspath(spec))
    if os.path.isdir(path):
        return ImageFolder(path)
    _existing(path, "file or folder")
    if _is_image(path):
        return _Files([printable(os.path.basename(path))], [path])
    if path.lower().endswith(".parquet") and (split or "image" in _parquet_schema(path).names):
        return ParquetImages(path, split)
    return Manifest(path)


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
    if path.lower().endswith(".parquet") and not os.path.exists(spec):
        return path, split
    return spec, None


def match_labels(label_names: Sequence[str], class_names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Find each label among a detector's classes, by name; an underscore equals a space.

    Args:
        label_names: the labels of a source.
        class_names: the classes; where one occurs twice, the first counts.

    Returns:
        int64 [len(label_names)], the position in `class_names` or -1, and the names that are not there.

    Example:
        >>> match_labels(["ring_tail", "fox"], ["cat", "ring tail"])
        (array([ 1, -1]), ['fox'])
    """
    plain = {name.replace("_", " "): position for position, name in reversed([*enumerate(class_names)])}
    mapping = np.array([plain.get(name.replace("_", " "), -1) for name in label_names], np.int64)
    return mapping, [name for name, position in zip(label_names, mapping, strict=True) if position < 0]
