"""ISIC 2019 and its split ISIC-4: images in one folder, diagnoses and lesion ids in tables."""

from __future__ import annotations

__all__ = ["isic_4", "look_for_isic"]

from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from ood_core.data.sources import ImageFolder, ImageSource, PathLike
from ood_core.errors import DataError, MissingDataError
from ood_core.protocols import FoundSet, data_root

from ood_hvl.layouts.survey import Layout, Survey
from ood_hvl.layouts.tasks import fold_tasks

_IMAGES, _TRUTH, _LESIONS = (f"ISIC_2019_Training_{part}" for part in ("Input", "GroundTruth.csv", "Metadata.csv"))
_PUBLISHED = "https://challenge.isic-archive.com/data/#2019"

# Column of the ground truth: name in prompts, images of the published set. The first four are known in ISIC-4.
_DISEASES = {
    "NV": ("melanocytic nevus", 12875),
    "MEL": ("melanoma", 4522),
    "DF": ("dermatofibroma", 239),
    "VASC": ("vascular lesion", 253),
    "BCC": ("basal cell carcinoma", 3323),
    "AK": ("actinic keratosis", 867),
    "BKL": ("benign keratosis", 2624),
    "SCC": ("squamous cell carcinoma", 628),
}
_NAMES = [name for name, _ in _DISEASES.values()]
_TOTAL = sum(count for _, count in _DISEASES.values())
_KNOWN = 4


def isic_4(root: PathLike, *, folds: str = "grouped", fold_count: int = 5, seed: int = 0) -> Layout:
    """ISIC-4: nevus, melanoma, dermatofibroma and vascular lesion are known, the other four diseases unknown.

    Args:
        root: the folder with `ISIC_2019_Training_Input`, `ISIC_2019_Training_GroundTruth.csv` and, for grouped folds,
            `ISIC_2019_Training_Metadata.csv`.
        folds: "grouped": no lesion in two folds, where lesion ids are known; "stratified": the paper's.
        fold_count: number of folds, a task each, with all unknown images.
        seed: of the folds.

    Raises:
        UsageError: an unknown kind of folds.
        MissingDataError: no such folder or file, or images of the ground truth that are not in the folder.
        DataError: a table without its columns, or images of two diseases or none.

    Example:
        >>> layout = isic_4("/data")  # doctest: +SKIP
        >>> layout.tasks[0].class_names  # doctest: +SKIP
        ['melanocytic nevus', 'melanoma', 'dermatofibroma', 'vascular lesion']
    """
    survey = look_for_isic(data_root(root))
    notes = survey.notes() + _left_out(survey)
    source, lesions = survey["diagnosed images"], survey[_LESIONS]
    groups = None if lesions is None else [lesions.get(_plain(id)) for id in source.ids]
    known, unknown = _NAMES[:_KNOWN], "+".join(list(_DISEASES)[_KNOWN:])
    options: dict[str, Any] = {"kind": folds, "count": fold_count, "seed": seed}
    tasks = fold_tasks("isic-4", source, known, groups, unknown, notes, **options)
    return Layout("isic-4", source, tasks, survey.found, notes)


def look_for_isic(root: Path) -> Survey:
    """Images, tables, and how they fit together."""
    survey, folder = Survey(), root / _IMAGES
    images = survey.look(_IMAGES, folder, _TOTAL, _read_images)
    truth = survey.look(_TRUTH, root / _TRUTH, _TOTAL, _read_truth)
    survey.look(_LESIONS, root / _LESIONS, None, _read_lesions, optional=True)
    if images is None or truth is None:
        return survey
    if (source := survey.look("diagnosed images", folder, _TOTAL, partial(_join, images, truth))) is not None:
        for label, (code, (_, expected)) in enumerate(_DISEASES.items()):
            survey.found.append(FoundSet(code, folder, int((source.labels == label).sum()), expected))
    return survey


def _plain(image: str) -> str:
    """What an image is called everywhere: without folder, suffix and the mark of smaller copies."""
    name = PurePosixPath(image).name
    return name.removesuffix(PurePosixPath(name).suffix).removesuffix("_downsampled")


def _read_images(folder: Path) -> ImageSource:
    if not folder.is_dir():
        raise MissingDataError(f"there is no folder {str(folder)!r}; get it: {_PUBLISHED}.")
    source = ImageFolder(folder)
    names = pd.Series(source.ids).map(_plain)
    if (twice := names[names.duplicated()]).size:
        raise DataError(f"{str(folder)!r} holds {twice.iloc[0]!r} more than once; remove the copies.")
    return source


def _read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """All as text, empty cells missing; one row per image."""
    if not path.is_file():
        raise MissingDataError(f"there is no file {str(path)!r}; get it: {_PUBLISHED}.")
    try:
        table = pd.read_csv(path, dtype=str, skipinitialspace=True, encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise DataError(f"{str(path)!r} cannot be read as CSV: {error}.") from error
    if absent := [name for name in columns if name not in table.columns]:
        known = ", ".join(map(str, table.columns))
        raise DataError(f"{str(path)!r} has no column {', '.join(absent)}; its columns are {known}.")
    if table["image"].isna().any():
        raise DataError(f"{str(path)!r} has no image in data row {int(table['image'].isna().argmax()) + 1}.")
    table.index = pd.Index(table["image"].map(_plain))
    if (twice := table.index[table.index.duplicated()]).size:
        raise DataError(f"{str(path)!r} lists {twice[0]!r} more than once; leave one row per image.")
    return table


def _read_truth(path: Path) -> pd.Series:
    """The label of every image, -1 for UNK."""
    table = _read_table(path, ["image", *_DISEASES])
    codes = [*_DISEASES, *(["UNK"] if "UNK" in table.columns else [])]
    marks = table[codes].apply(pd.to_numeric, errors="coerce")
    _refuse(path, marks[~marks.isin([0, 1]).all(axis=1)], table, "something else than 0 and 1")
    _refuse(path, marks[marks.sum(axis=1) > 1], table, "more than one disease")
    _refuse(path, marks[marks.sum(axis=1) < 1], table, "no disease")
    labels = marks.to_numpy().argmax(axis=1)
    return pd.Series(np.where(labels < len(_DISEASES), labels, -1), table.index)


def _refuse(path: Path, wrong: pd.DataFrame, table: pd.DataFrame, what: str) -> None:
    if len(wrong):
        first = table.loc[wrong.index[0], ["image", *wrong.columns]]
        marked = ", ".join(f"{name}={value}" for name, value in first.items() if str(value) not in ("0", "0.0"))
        raise DataError(
            f"{str(path)!r} has {what} for {len(wrong)} of {len(table)} images, first {marked}; write 1 in one "
            "column and 0 in the others."
        )


def _read_lesions(path: Path) -> dict[str, str]:
    """The lesion of every image that has one."""
    lesions = _read_table(path, ["image", "lesion_id"])["lesion_id"].dropna()
    return dict(zip(lesions.index, lesions, strict=True))


def _join(images: ImageSource, truth: pd.Series, folder: Path) -> ImageSource:
    """The images with a diagnosis, in the order of their ids."""
    names = [_plain(id) for id in images.ids]
    if absent := sorted(set(truth.index) - set(names)):
        raise MissingDataError(
            f"{len(absent):,} of the {len(truth):,} images of {_TRUTH} are not in {str(folder)!r}, first "
            f"{absent[0]!r}; get them from {_PUBLISHED}, or remove their rows."
        )
    labels = truth.reindex(names, fill_value=-1).to_numpy()
    chosen = np.flatnonzero(labels >= 0)
    return images.subset(chosen).relabelled(_NAMES, labels[chosen])


def _left_out(survey: Survey) -> list[str]:
    images, truth = survey[_IMAGES], survey[_TRUTH]
    unknown, beside = int((truth < 0).sum()), len(images) - len(truth)
    notes = [f"{unknown} images of the class UNK are left out."] if unknown else []
    return notes + ([f"{beside} images without a row in {_TRUTH} are left out."] if beside else [])
