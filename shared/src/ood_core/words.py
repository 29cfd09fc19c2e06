"""Lists of words: WordNet's nouns and adjectives (licence in `wordnet/LICENSE`), or a file of the user's."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from ood_core.errors import DataError, MissingDataError, unknown_name

__all__ = ["SHIPPED", "file_numbers", "read_words", "spaced", "words_of"]

SHIPPED = ("nouns", "adjectives")

# WordNet's lexicographer files of nouns have the numbers 3 to 28 in this order.
_NOUN_FILES = (  # noqa: SIM905
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
).split()

_FILES = {"adj.all": 0, "adj.pert": 1, "adj.ppl": 44} | {f"noun.{file}": 3 + i for i, file in enumerate(_NOUN_FILES)}


def read_words(name: str | Path, exclude: Sequence[str | int] = ()) -> list[str]:
    """Candidate words of a list, in its order, each once whatever its case, with spaces for underscores.

    Args:
        name: "nouns" or "adjectives" of WordNet 3.0, or a text file with one word per line.
        exclude: WordNet's lexicographer files to leave out, by name ("noun.animal") or number (5). A word that has
            a meaning in another file, too, stays. Of no effect on a text file.

    Returns:
        At least one word.

    Raises:
        TypeError: `exclude` is a string.
        UsageError: an unknown lexicographer file.
        MissingDataError: no such file.
        DataError: a file without words or that is no text, or nothing left by `exclude`.

    Example:
        >>> read_words("adjectives")[:3]
        ['able', 'unable', 'abaxial']
    """
    left_out = file_numbers(exclude)
    found = _shipped_words(str(name), left_out) if str(name) in SHIPPED else words_of(Path(name))
    words: dict[str, str] = {}
    for word in found:
        words.setdefault((plain := spaced(word)).casefold(), plain)
    words.pop("", None)
    if not words:
        raise DataError(f"{name} holds no word{f' outside exclude={list(exclude)}' if left_out else ''}: give some.")
    return list(words.values())


def file_numbers(exclude: Sequence[str | int]) -> frozenset[int]:
    """Numbers of WordNet's lexicographer files, given by name or number.

    Raises:
        TypeError: a string.
        UsageError: an unknown file.
    """
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a list such as ['noun.food'], got the string {exclude!r}.")
    return frozenset(_file_number(file) for file in exclude)


def _file_number(file: str | int) -> int:
    if isinstance(file, str) and file in _FILES:
        return _FILES[file]
    if type(file) is int and file in _FILES.values():
        return file
    raise unknown_name("lexicographer file", str(file), _FILES)


def _shipped_words(name: str, left_out: frozenset[int]) -> list[str]:
    source = resources.files("ood_core") / "wordnet" / f"{name}.csv.gz"
    with source.open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8", newline="") as table:
        rows = csv.reader(table)
        next(rows)  # names of the columns
        # The first lemma of a synset only, as in the authors' lists: the others mean the same.
        return [lemmas.partition("|")[0] for _, file, lemmas in rows if int(file) not in left_out]


def words_of(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        MissingDataError: no such file.
        DataError: no UTF-8 text.
    """
    if not path.is_file():
        raise MissingDataError(
            f"No word file {path}: give 'nouns', 'adjectives' or a text file with one word per line."
        )
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error}): give one word per line.") from error


def spaced(word: str) -> str:
    """The word with single spaces for underscores and blanks."""
    return " ".join(word.replace("_", " ").split())
