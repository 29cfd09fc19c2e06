"""Tables of image files as people write them: csv, tsv, jsonl, parquet and plain lists, read to paths and labels."""

from __future__ import annotations

__all__ = ["ImageRows", "class_label_names", "clean_labels", "image_columns", "no_column", "read_rows", "read_text"]

import codecs
import csv
import gzip
import io
import json
import logging
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ood_core.data.decode import image_suffixes, printable
from ood_core.errors import DataError, OODError, UsageError

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

_TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet")
_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What tables are written with that have no label somewhere: nothing, -1, and what pandas takes for nothing.
_MISSING = frozenset(
    {"", "-1", "-1.0", "nan", "NaN", "NAN", "-nan", "NA", "N/A", "n/a", "<NA>", "#N/A", "None", "null", "NULL"}
)
_WHOLE = re.compile(r"([+-]?\d+)(\.0*)?")
# Other names of these columns, for suggestions.
_LIKELY = {
    "path": frozenset(
        {"path", "paths", "image_path", "img_path", "filepath", "file_path", "filename", "file_name", "file", "files"}
        | {"image", "images", "img", "image_name", "img_name", "image_file", "imagepath", "uri", "url"}
    ),
    "label": frozenset(
        {"label", "labels", "class", "classes", "class_name", "classname", "category", "target", "y", "diagnosis"}
        | {"label_name", "class_id", "fine_label", "coarse_label"}
    ),
}
_OPTIONS = {"path": ("path_column", "--path-column"), "label": ("label", "--label-column")}


class ImageRows(NamedTuple):
    """The images of a table, in its order.

    Attributes:
        ids: the column `id`, else the path as written.
        files: where the images are.
        labels: a text, an integer or None each.
        names: what the labels 0, 1, ... are called, where the file says so.
    """

    ids: list[str]
    files: list[str]
    labels: list[Any]
    names: list[str] | None = None


class _Table(NamedTuple):
    columns: list[str]
    rows: list[dict[str, Any]]
    names: list[str] | None = None
    is_text: bool = False


def read_rows(
    path: str, base: str, *, path_column: str = "path", label: str = "label", encoding: str | None = None
) -> ImageRows:
    """Read a table, or a list of paths with labels behind them.

    Args:
        path: a .csv, .tsv, .jsonl or .txt file, these also with .gz, or a .parquet file.
        base: the folder that relative paths are relative to.
        path_column: the column of paths.
        label: the column of labels; it may be absent if this is "label".
        encoding: of a text file; None: what its byte order mark says, else UTF-8.

    Raises:
        DataError: a file that cannot be read as such a table, with the line where it goes wrong.
        UsageError: an unknown encoding.
    """
    try:
        table = _read(path, base, path_column, label, encoding)
    except OODError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(f"Manifest {printable(path)!r} cannot be read: {error}.") from error
    _check_columns(path, table, path_column, label)
    if not table.rows:
        raise DataError(f"Manifest {printable(path)!r} has no rows.")
    written = [_written(row.get(path_column), number, path, base) for number, row in enumerate(table.rows, 1)]
    used = [name for name in ("id", label) if name in table.columns]
    _check_decoded(path, base, written, [(name, row.get(name)) for row in table.rows for name in used])
    if table.is_text:
        _tell_blanks(path, table.rows, [path_column, *used])
    ids = [_id(row.get("id"), item) for row, item in zip(table.rows, written, strict=True)]
    files = [_file(item, number, path, base) for number, item in enumerate(written, 1)]
    return ImageRows(ids, files, clean_labels([row.get(label) for row in table.rows]), table.names)


def read_text(path: PathLike, encoding: str | None = None, *, keep_bytes: bool = False) -> str:
    """The text of a file, gzipped ones (.gz) too.

    Args:
        path: the file.
        encoding: None: what the byte order mark says, else UTF-8.
        keep_bytes: let bytes that are no UTF-8 pass as surrogates, as Python has them in file names.

    Raises:
        DataError: other bytes than the encoding's.
        UsageError: an unknown encoding.
    """
    data, name = _unpacked(path), printable(path)
    marked = next((own for mark, own in _BOMS if data.startswith(mark)), None)
    chosen = marked or encoding or "utf-8"
    try:
        text = data.decode(chosen, "surrogateescape" if keep_bytes and not (marked or encoding) else "strict")
    except LookupError as error:
        raise UsageError(f"Unknown encoding {chosen!r}: give one that Python knows, such as latin-1.") from error
    except UnicodeDecodeError as error:
        raise _wrong_encoding(name, chosen, data[: error.start].count(b"\n") + 1) from error
    if "\0" in text:
        order = "le" if data[1:2] == b"\0" else "be"
        raise DataError(
            f"{name!r} holds zero bytes, as UTF-16 does, and does not say so: name its encoding, "
            f"encoding='utf-16-{order}' (--encoding utf-16-{order})."
        )
    return text


def _wrong_encoding(name: str, encoding: str, line: int) -> DataError:
    return DataError(
        f"{name!r} is no {encoding.removesuffix('-sig').upper()} text (line {line}): name its encoding, for example "
        "encoding='latin-1' (--encoding latin-1), or save it as UTF-8."
    )


def _unpacked(path: PathLike) -> bytes:
    with open(path, "rb") as file:
        data = file.read()
    if not os.fspath(path).lower().endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{printable(path)!r} cannot be unpacked as gzip: {error}.") from error


# ---- files to tables


def _read(path: str, base: str, path_column: str, label: str, encoding: str | None) -> _Table:
    bare = path.lower().removesuffix(".gz")
    suffix = os.path.splitext(bare)[1]
    if suffix not in _SUFFIXES or (suffix == ".parquet" and bare != path.lower()):
        accepted = ", ".join(_SUFFIXES)
        raise DataError(f"{printable(path)!r} is no manifest: it must end in {accepted} (text files also with .gz).")
    if suffix == ".parquet":
        return _read_parquet(path, path_column, label)
    text = read_text(path, encoding, keep_bytes=True)
    if suffix == ".jsonl":
        return _read_jsonl(text, {path_column, label, "id"})
    if suffix == ".txt" and not _has_header(text, path_column):
        return _read_list(text, base, path_column, label)
    return _read_csv(text, "\t" if suffix == ".tsv" else ",", path_column)


def _read_csv(text: str, separator: str, path_column: str) -> _Table:
    said = re.match(r"sep=(.)\r?\n", text)  # Excel's own first line
    if said:
        separator, text = said[1], text[said.end() :]
    else:
        separator = _separator(text, separator, path_column)
    records = _records(text, separator, 2 if said else 1)
    if not records:
        return _Table([], [])
    columns = [name.strip() for name in records[0][1]]
    for line, cells in records[1:]:
        surplus = len(cells) > len(columns) and any(cell.strip() for cell in cells[len(columns) :])
        if surplus or len(cells) < len(columns):
            raise ValueError(
                f"line {line} has {len(cells)} cell{'s' * (len(cells) != 1)} for {len(columns)} columns; write an "
                f"empty cell where nothing is known, and quotes around a cell with {_SEPARATORS.get(separator, 'one')} "
                "in it"
            )
    return _Table(columns, [dict(zip(columns, cells, strict=False)) for _, cells in records[1:]], is_text=True)


def _records(text: str, separator: str, first_line: int = 1) -> list[tuple[int, list[str]]]:
    """Cells with the line each record begins in; blanks beside a quote do not hide it."""
    try:
        records = _parse(text, separator, first_line)
        hidden = any(re.match(r' +"', cell) for _, cells in records for cell in cells)
    except ValueError:
        hidden = True
    if hidden:
        text = re.sub(rf'"[ \t]+(?=[{re.escape(separator)}\r\n]|$)', '"', text)
        records = _parse(text, separator, first_line, skip_blanks=True)
    return records


def _parse(text: str, separator: str, first_line: int, *, skip_blanks: bool = False) -> list[tuple[int, list[str]]]:
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=skip_blanks)
    records, line = [], 0
    try:
        for cells in reader:
            if len(cells) > 1 or any(cell.strip() for cell in cells):
                records.append((line + first_line, cells))
            line = reader.line_num
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num + first_line - 1}: {error}") from error
    return records


def _header(text: str, separator: str) -> list[str]:
    line = next((line for line in io.StringIO(text) if line.strip()), "")
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])]
    except csv.Error:
        return []


def _separator(text: str, usual: str, path_column: str) -> str:
    """The usual one, or, if that leaves one column, or none of paths, another that does better."""
    headers = {usual: _header(text, usual)} | {other: _header(text, other) for other in _SEPARATORS}
    if path_column in headers[usual]:
        return usual
    if holding := [separator for separator, names in headers.items() if path_column in names]:
        return holding[0]
    return max(headers, key=lambda separator: len(headers[separator])) if len(headers[usual]) < 2 else usual


def _has_header(text: str, path_column: str) -> bool:
    return any(len(names) > 1 and path_column in names for names in (_header(text, one) for one in _SEPARATORS))


def _read_list(text: str, base: str, path_column: str, label: str) -> _Table:
    """One image per line, its label behind it; paths may hold blanks."""
    suffixes = "|".join(re.escape(suffix) for suffix in sorted(image_suffixes()))
    ends = re.compile(rf"(?:{suffixes})(?=\s|$)", re.IGNORECASE)
    pairs = [_path_and_label(line.strip(), base, ends) for line in io.StringIO(text) if line.strip()]
    rows = [{path_column: path, label: name} for path, name in pairs]
    return _Table([path_column, label], rows[1:] if pairs[:1] == [(path_column, label)] else rows, is_text=True)


def _path_and_label(line: str, base: str, ends: re.Pattern[str]) -> tuple[str, str | None]:
    """The path ends with an image's suffix before a blank, the first such ("a b.jpg dog"), or where a file is."""
    if "\t" in line:
        path, _, label = line.rpartition("\t")
        return path.strip(), label
    places = [found.end() for found in ends.finditer(line)]
    if not places:
        path, _, label = line.rpartition(" ")
        return (path.strip(), label) if path and not _lies(base, line) else (line, None)
    at = next((end for end in reversed(places) if _lies(base, line[:end])), places[0]) if places[1:] else places[0]
    return line[:at], line[at:].strip() or None


def _lies(base: str, path: str) -> bool:
    return os.path.lexists(os.path.join(base, path))


def _read_jsonl(text: str, used: set[str]) -> _Table:
    lines = enumerate(io.StringIO(text), 1)
    rows = [_json_object(line, number, used) for number, line in lines if line.strip()]
    return _Table(sorted({name for row in rows for name in row}), rows)


def _json_object(line: str, number: int, used: set[str]) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_Object)
    except ValueError:
        row = None
    if not isinstance(row, _Object):
        raise ValueError(f"line {number} is no JSON object")
    if twice := sorted(used & row.twice):
        raise ValueError(f"line {number} has {twice[0]!r} twice")
    return row


class _Object(dict[str, Any]):
    """A JSON object that knows which names it was written with twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.twice = {name for name in names if names.count(name) > 1} if len(self) < len(names) else set()


def _read_parquet(path: str, path_column: str, label: str) -> _Table:
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    wanted = [name for name in dict.fromkeys((path_column, "id", label)) if schema.names.count(name) == 1]
    rows = pq.read_table(path, columns=wanted).to_pylist() if wanted else []
    return _Table(schema.names, rows, class_label_names(schema, label))


# ---- columns


def _check_columns(path: str, table: _Table, path_column: str, label: str) -> None:
    for name in (path_column, label, "id"):
        if table.columns.count(name) > 1:
            raise DataError(
                f"{printable(path)!r} has {table.columns.count(name)} columns {name!r}; rename all but one."
            )
    if path_column not in table.columns:
        raise no_column(path, path_column, table.columns, "path")
    if label not in table.columns and label != "label":
        raise no_column(path, label, table.columns, "label")
    if label not in table.columns and (likely := _likely("label", table.columns)):
        log.warning(
            "%r has no column 'label', so its images have no labels; if its column %r holds them, say label=%r "
            "(--label-column %s).",
            printable(path),
            likely[0],
            likely[0],
            likely[0],
        )


def no_column(path: PathLike, name: str, columns: Sequence[str], kind: str) -> DataError:
    """The error for a column that is not there, with one that may be meant.

    Args:
        path: of the file.
        name: of the column.
        columns: that it has.
        kind: "path", "label" or another, what the column holds.
    """
    known = ", ".join(map(repr, columns)) or "none"
    hint = ""
    if likely := [other for other in _likely(kind, columns) if other != name]:
        keyword, option = _OPTIONS[kind]
        hint = f" Column {likely[0]!r} may hold the {kind}s: say {keyword}={likely[0]!r} ({option} {likely[0]})."
    return DataError(f"{printable(path)!r} has no column {name!r}; its columns are {known}.{hint}")


def _likely(kind: str, columns: Iterable[str]) -> list[str]:
    names = _LIKELY.get(kind, frozenset())
    return [name for name in columns if re.sub(r"[\s-]+", "_", name.strip().lower()) in names]


def class_label_names(schema: Any, column: str) -> list[str] | None:
    """What the data sets of Hugging Face call the labels 0, 1, ..., from a parquet schema; None if it does not say."""
    feature = _features(schema).get(column)
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return list(map(str, names)) if isinstance(names, list) else None


def image_columns(schema: Any) -> list[str]:
    """The columns that the data sets of Hugging Face declare to be images."""
    found = _features(schema).items()
    return [name for name, feature in found if isinstance(feature, dict) and feature.get("_type") == "Image"]


def _features(schema: Any) -> dict[str, Any]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


# ---- cells


def clean_labels(values: Sequence[Any]) -> list[Any]:
    """Labels as every kind of table has them: None where there is none, whole numbers as such, composed characters."""
    found = [None if _is_missing(value) else value for value in values]
    texts = [value.strip() for value in found if isinstance(value, str)]
    if texts and all(map(_WHOLE.fullmatch, texts)):  # with gaps, spreadsheets and pandas write 3 as 3.0
        return [value.strip().partition(".")[0] if isinstance(value, str) else value for value in found]
    return [_printable_text(value.strip()) if isinstance(value, str) else value for value in found]


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() in _MISSING
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value == -1)


def _printable_text(text: str) -> str:
    return printable(unicodedata.normalize("NFC", text))


def _written(value: Any, number: int, manifest: str, base: str) -> str:
    """The path as it stands in the table; blanks around it count only where there is such a file."""
    path = value
    if isinstance(value, str) and value != value.strip() and not _lies(base, value):
        path = value.strip()
    if not isinstance(path, str) or not path:
        raise DataError(f"{printable(manifest)!r} has no path in data row {number} (it holds {value!r}).")
    return path


def _id(value: Any, path: str) -> str:
    value = value.strip() if isinstance(value, str) else value
    return printable(str(path if value is None or value == "" else value))


def _file(path: str, number: int, manifest: str, base: str) -> str:
    """Where an image is: file:// addresses, ~ and the backslashes of Windows are understood."""
    if address := re.match(r"([a-zA-Z][\w+.-]+)://", path):
        parts = urlsplit(path)
        if address[1].lower() != "file" or parts.netloc not in ("", "localhost"):
            raise DataError(
                f"{printable(manifest)!r} has the address {printable(path)!r} in data row {number}: images are read "
                "from files. Download them, and write their paths."
            )
        return url2pathname(parts.path)
    file = os.path.join(base, path)
    if os.path.lexists(file) or not (path.startswith("~") or "\\" in path):
        return file
    return os.path.expanduser(path) if path.startswith("~") else os.path.join(base, path.replace("\\", "/"))


def _check_decoded(path: str, base: str, written: Sequence[str], others: Iterable[tuple[str, Any]]) -> None:
    """Bytes that are no UTF-8 may be those of a file's name; anything else was written in another encoding."""
    paths = (item for item in written if _undecoded(item) and not _lies(base, item))
    cells = (value for _, value in others if isinstance(value, str) and _undecoded(value))
    if (wrong := next(paths, None) or next(cells, None)) is not None:
        raise DataError(
            f"{printable(path)!r} is no UTF-8 text (it holds {printable(wrong)!r}): name its encoding, for example "
            "encoding='latin-1' (--encoding latin-1), or save it as UTF-8."
        )


def _undecoded(text: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in text)


def _tell_blanks(path: str, rows: Sequence[dict[str, Any]], used: Sequence[str]) -> None:
    cells = (value for row in rows for name in used if isinstance(value := row.get(name), str))
    if any(cell != cell.strip() for cell in cells):
        log.warning("%r has blanks around its cells: they are left out.", printable(path))
