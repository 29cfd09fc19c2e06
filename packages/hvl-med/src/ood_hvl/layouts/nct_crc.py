"""NCT-CRC-HE-100K and CRC-VAL-HE-7K: colorectal tissue in one folder per class, three classes unknown at a time."""

from __future__ import annotations

__all__ = ["OOD_TRIPLES", "look_for_nct_crc", "nct_crc"]

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ood_core.data.joined import JoinedSources
from ood_core.data.sources import ImageFolder, ImageSource, PathLike
from ood_core.errors import DataError, MissingDataError, UsageError, unknown_name
from ood_core.protocols import data_root

from ood_hvl.layouts.survey import Layout, Survey
from ood_hvl.layouts.tasks import split_task

OOD_TRIPLES = (("ADI", "BACK", "DEB"), ("LYM", "MUC", "MUS"), ("NORM", "STR", "TUM"))
"""The tissues unknown in each task: every tissue once. Our choice, the paper does not say which."""

_TRAIN, _TEST = "NCT-CRC-HE-100K", "CRC-VAL-HE-7K"
_COUNTS = {_TRAIN: 100_000, _TEST: 7_180}
_PUBLISHED = "https://zenodo.org/records/1214456"
_TISSUES = {
    "ADI": "adipose tissue",
    "BACK": "background",
    "DEB": "debris",
    "LYM": "lymphocytes",
    "MUC": "mucus",
    "MUS": "smooth muscle",
    "NORM": "normal colon mucosa",
    "STR": "cancer-associated stroma",
    "TUM": "colorectal adenocarcinoma epithelium",
}


def nct_crc(root: PathLike, *, ood_triples: Sequence[Sequence[str]] = OOD_TRIPLES) -> Layout:
    """Nine tissues; train on those known in NCT-CRC-HE-100K, test on known and unknown ones in CRC-VAL-HE-7K.

    Args:
        root: the folder with `NCT-CRC-HE-100K/<ADI|BACK|...>/*.tif` and `CRC-VAL-HE-7K/<the same>/*.tif`.
        ood_triples: the tissues unknown in each task; the paper averages over three tasks.

    Raises:
        UsageError: an unknown tissue, or fewer than two known ones.
        MissingDataError: no such folders.
        DataError: other folders than those of the tissues, or not all of them.

    Example:
        >>> [list(task.ood) for task in nct_crc("/data").tasks]  # doctest: +SKIP
        [['ADI+BACK+DEB'], ['LYM+MUC+MUS'], ['NORM+STR+TUM']]
    """
    triples = [_checked(triple) for triple in ood_triples]
    if not triples:
        raise UsageError("ood_triples=[] names no task: give at least one set of unknown tissues.")
    survey = look_for_nct_crc(data_root(root))
    notes = survey.notes()
    notes.append(f"Unknown tissues by task: {', '.join(map('+'.join, triples))}; the paper does not say which.")
    joined = JoinedSources({name: survey[name] for name in _COUNTS})
    codes = np.array([list(_TISSUES).index(name) for name in joined.label_names])
    source = joined.relabelled(list(_TISSUES.values()), codes[np.asarray(joined.labels)])
    rows, tasks = [joined.rows_of(name) for name in (_TRAIN, _TEST, _TEST)], []
    for triple in triples:
        known, ood = [name for code, name in _TISSUES.items() if code not in triple], "+".join(triple)
        tasks.append(split_task(f"nct-crc-{ood}", source, known, rows, ood, notes))
    return Layout("nct-crc", source, tasks, survey.found, notes)


def look_for_nct_crc(root: Path) -> Survey:
    """Both sets of images."""
    survey = Survey()
    for name, count in _COUNTS.items():
        survey.look(name, root / name, count, _read_images)
    return survey


def _checked(triple: Sequence[str]) -> tuple[str, ...]:
    """The codes in alphabetical order."""
    if isinstance(triple, str):
        raise UsageError(f"ood_triples holds {triple!r}: give a list of tissues for each task, as {OOD_TRIPLES[0]}.")
    for code in triple:
        if code not in _TISSUES:
            raise unknown_name("tissue", code, _TISSUES)
    codes = tuple(sorted(set(triple)))
    if not 1 <= len(codes) <= len(_TISSUES) - 2:
        raise UsageError(f"ood_triples holds {list(triple)}: one tissue must be unknown and two known at least.")
    return codes


def _read_images(folder: Path) -> ImageSource:
    if not folder.is_dir():
        raise MissingDataError(f"there is no folder {str(folder)!r}; get it: {_PUBLISHED}.")
    source = ImageFolder(folder)
    outside = [id for id in source.ids if id.partition("/")[0] not in _TISSUES]
    if outside:
        raise DataError(
            f"{str(folder)!r} holds {len(outside):,} images outside folders named {', '.join(_TISSUES)}; first "
            f"{outside[0]!r}. Move them away."
        )
    if absent := [code for code in _TISSUES if code not in source.label_names]:
        raise DataError(f"{str(folder)!r} lacks images of {', '.join(absent)}; each tissue has a folder of its own.")
    return source
