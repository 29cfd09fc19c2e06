"""Few-shot splits that released few-shot code has pickled, read without running anything in them."""

from __future__ import annotations

__all__ = ["ReleasedItem", "read_released_split"]

import os
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

from ood_core.errors import DataError, MissingDataError

_DATUM = ("dassl.data.datasets.base_dataset", "Datum")


class ReleasedItem(NamedTuple):
    """One image of a released split.

    Attributes:
        path: below the root, with "/": split folder, class folder, file.
        label: the number of its class.
        class_name: as the file has it.
    """

    path: str
    label: int
    class_name: str


def read_released_split(
    path: str | os.PathLike[str], root: str | os.PathLike[str], *, part: str = "train"
) -> list[ReleasedItem]:
    """Read a `split_fewshot/shot_{n}-seed_{s}.pkl` or `preprocessed.pkl` of CoOp, LoCoOp, Local-Prompt or IIM.

    The absolute paths in it are those of another machine: their last three components are looked up below `root`.

    Args:
        path: the pickle. Only `Datum` records of Dassl are read from it; nothing in it is executed.
        root: the folder that holds `train`, e.g. `{data}/imagenet`.
        part: "train", or "test" in a `preprocessed.pkl`.

    Returns:
        The images in the order of the file.

    Raises:
        MissingDataError: no such file, or an image that is not below `root`.
        DataError: a damaged file, one that asks for anything else than such records, or one without this part.

    Example:
        >>> read_released_split("shot_4-seed_1.pkl", "/data/imagenet")[0]  # doctest: +SKIP
        ReleasedItem(path='train/n01440764/n01440764_10026.JPEG', label=0, class_name='tench')
    """
    content = _load(path)
    if not isinstance(content, dict) or not isinstance(content.get(part), list):
        raise DataError(f"{os.fspath(path)!r} has no list of images under {part!r}; it is no split of released code.")
    items = [_item(record, path) for record in content[part]]
    if absent := [item.path for item in items if not (Path(root) / item.path).exists()]:
        raise MissingDataError(
            f"{len(absent)} of the {len(items)} images of {os.fspath(path)!r} are not below {os.fspath(root)!r}, "
            f"first {absent[0]!r}; give the folder that holds {absent[0].partition('/')[0]!r}."
        )
    return items


class _Datum:
    """Stands in for Dassl's record: keeps the attributes, does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Finds one class and no other, so that a pickle can neither import nor call anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != _DATUM:
            raise DataError(f"it asks for {module}.{name}, and only records of {'.'.join(_DATUM)} are read")
        return _Datum


def _load(path: str | os.PathLike[str]) -> Any:
    if not os.path.isfile(path):
        raise MissingDataError(f"There is no file {os.fspath(path)!r} with a released split; check the path.")
    try:
        with open(path, "rb") as file:
            return _Unpickler(file).load()
    # Damaged pickles raise nearly anything.
    except Exception as error:
        reason = str(error) if isinstance(error, DataError) else f"it is damaged ({type(error).__name__}: {error})"
        raise DataError(f"Split {os.fspath(path)!r} is refused: {reason}.") from error


def _item(record: Any, path: str | os.PathLike[str]) -> ReleasedItem:
    state: Any = record.state if isinstance(record, _Datum) else None
    image, label, name = map(state.get, ("_impath", "_label", "_classname")) if isinstance(state, dict) else (None,) * 3
    if not isinstance(image, str) or not isinstance(label, int) or not isinstance(name, str):
        raise DataError(f"{os.fspath(path)!r} holds {state or record!r} where an image, a label and a name should be.")
    parts = re.split(r"[/\\]", image)[-3:]
    if len(parts) < 3 or {"", ".", ".."} & set(parts):
        raise DataError(f"{os.fspath(path)!r} holds the path {image!r}, which does not end in split/class/file.")
    return ReleasedItem("/".join(parts), label, name)
