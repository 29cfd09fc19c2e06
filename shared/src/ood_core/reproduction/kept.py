"""Finished runs are kept under a recipe of all that their figures rest on."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ood_core.errors import UsageError
from ood_core.files import write_json

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from ood_core.backbones.base import Backbone
    from ood_core.data.sources import ImageSource
    from ood_core.features import FeatureSet

__all__ = ["Run", "UsedImages", "code_version", "kept_runs", "recipe"]

log = logging.getLogger(__name__)

Run = dict[str, Any]

# What every figure goes through; commands, reports and the search for data sets are not among it.
_CORE = (
    "ood_core.backbones",
    "ood_core.calibration",
    "ood_core.data",
    "ood_core.detectors",
    "ood_core.evaluation",
    "ood_core.features",
    "ood_core.functional",
    "ood_core.labels",
    "ood_core.metrics",
    "ood_core.ops",
    "ood_core.prompts",
    "ood_core.scores",
    "ood_core.training",
)


# ---- recipes


def recipe(
    backbone: Backbone,
    images: Mapping[str, ImageSource | FeatureSet | UsedImages | None],
    class_names: Sequence[str],
    *,
    code: Sequence[str],
    template: str | Sequence[str] | None = None,
    convention: str = "standard",
    options: Mapping[str, Any] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Everything that figures depend on, for `kept_runs`.

    Args:
        backbone: weights, precision and preprocessing.
        images: every set that is trained or judged on, by name; None is left out. `UsedImages` that are shared
            between recipes are read once.
        class_names: in the order of the labels.
        code: the method's modules, or packages, that compute the figures; those of the core come by themselves.
        template: prompt of the class names.
        convention: of the FPR.
        options: of the detector, the training or the search.
        **others: what else the figures depend on, such as seed and shots.

    Returns:
        Plain values, and `UsedImages` under "images".

    Example:
        >>> sets = {"train": train, "test": test, **ood}  # doctest: +SKIP
        >>> made = recipe(backbone, sets, names, code=["ood_iim"], options={"k": 16}, seed=1)  # doctest: +SKIP
        >>> runs = kept_runs(folder / "run.json", made, make)  # doctest: +SKIP
    """
    names = json.dumps(list(class_names)).encode()
    return {
        "backbone": {
            **backbone.record(),
            "device": backbone.device.type,
            "transform": backbone.transform.describe(),
        },
        "images": {name: _used(source) for name, source in images.items() if source is not None},
        "class_names": {"count": len(class_names), "sha256": hashlib.sha256(names).hexdigest()},
        "template": template,
        "convention": convention,
        "options": dict(options or {}),
        "code": code_version(*_CORE, *code),
        **others,
    }


def _used(images: ImageSource | FeatureSet | UsedImages) -> UsedImages:
    return images if isinstance(images, UsedImages) else UsedImages(images)


class UsedImages:
    """Images that figures rest on, known again by their bytes: wherever they lie, and whenever they were written.

    The bytes are read once all figures are there, and where file times have changed since.

    Args:
        images: a source, or its features.

    Example:
        >>> UsedImages(ImageFolder("a")).are(UsedImages(ImageFolder("copy_of_a")).record())  # doctest: +SKIP
        True
    """

    def __init__(self, images: ImageSource | FeatureSet) -> None:
        self._images = images

    @cached_property
    def stamp(self) -> str:
        """Fingerprint by file times, which is quick to have; of features, their content."""
        return self.content if _is_features(self._images) else self._images.fingerprint

    @cached_property
    def content(self) -> str:
        """Digest of ids, labels and bytes."""
        return _digest_of_features(self._images) if _is_features(self._images) else self._images.content

    def record(self) -> dict[str, Any]:
        """For JSON: "place", "images" (their number), "stamp" and "content"."""
        place = getattr(self._images, "place", "")
        return {"place": place, "images": len(self._images), "stamp": self.stamp, "content": self.content}

    def are(self, record: Any) -> bool:
        """Whether these are the images of a `record`."""
        if not isinstance(record, dict):
            return False
        return record.get("stamp") == self.stamp or record.get("content") == self.content


def _is_features(images: ImageSource | FeatureSet) -> TypeIs[FeatureSet]:
    from ood_core.features import FeatureSet

    return isinstance(images, FeatureSet)


def _digest_of_features(features: FeatureSet) -> str:
    from ood_core.backbones.base import hash_tensors

    names = json.dumps([features.ids, features.label_names, features.fingerprint])
    return hash_tensors(sorted(features._columns().items()), names)


def code_version(*modules: str) -> dict[str, str]:
    """Digest of what modules do, by name: docstrings, comments and layout do not count.

    Args:
        modules: names; a package stands for all modules in it.

    Raises:
        ModuleNotFoundError: no such module.

    Example:
        >>> list(code_version("ood_core.metrics"))
        ['ood_core.metrics']
    """
    return {name: _digest_of_code(tuple(_sources(name))) for name in dict.fromkeys(modules)}


def _sources(module: str) -> Iterator[str]:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"There is no module {module!r} with source code.", name=module)
    file = Path(spec.origin)
    for path in sorted(file.parent.rglob("*.py")) if spec.submodule_search_locations else [file]:
        yield path.read_text(encoding="utf-8")


@cache
def _digest_of_code(sources: tuple[str, ...]) -> str:
    return hashlib.sha256(repr([_plain_syntax(ast.parse(text)) for text in sources]).encode()).hexdigest()[:16]


def _plain_syntax(node: Any) -> Any:
    """A syntax tree as nested lists, without texts that are statements; fields left empty are not named.

    `ast.dump` and `ast.unparse` differ between versions of Python.
    """
    if isinstance(node, list):
        return [_plain_syntax(one) for one in node if not _is_docstring(one)]
    if not isinstance(node, ast.AST):
        return repr(node)
    filled = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
    return [type(node).__name__, *([name, _plain_syntax(value)] for name, value in filled)]


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


# ---- runs


def kept_runs(file: Path | None, recipe: Mapping[str, Any], make: Callable[[], list[Run]]) -> list[Run]:
    """The runs of a recipe: those of the file if it holds them, else new ones, which are written there.

    Args:
        file: JSON; None keeps nothing. A damaged one is made again.
        recipe: everything the runs depend on, see `recipe`.
        make: makes them.

    Raises:
        UsageError: the file holds runs of another recipe; it says what differs.
    """
    found = None if file is None or not file.is_file() else _read(file, recipe)
    if found is None:
        found = make()
        if file is not None:
            write_json(file, {"recipe": _recorded(recipe), "runs": found})
    return found


def _read(file: Path, recipe: Mapping[str, Any]) -> list[Run] | None:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        old, runs = saved["recipe"], saved["runs"]
        if not isinstance(old, dict) or not isinstance(runs, list):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        log.warning("%s is damaged: it is computed again.", file)
        return None
    if differences := list(_differences(old, recipe)):
        more = f"; and {len(differences) - _MOST} more" if len(differences) > _MOST else ""
        raise UsageError(
            f"{file} is a run with other settings or images: remove it, or give another folder. "
            f"{'; '.join(differences[:_MOST])}{more}."
        )
    return runs


# Differences told, and characters of a value.
_MOST, _WIDTH = 8, 60


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Sentences on where a recorded recipe differs from a new one."""
    if isinstance(new, UsedImages):
        if not new.are(old):
            yield f"{path} was {_short(old)}, is {_short(new)}"
    elif isinstance(new, Mapping) and isinstance(old, dict):
        for name in sorted({*old, *map(str, new)}):
            here = {str(key): value for key, value in new.items()}.get(name, _ABSENT)
            yield from _differences(old.get(name, _ABSENT), here, f"{path}.{name}" if path else name)
    elif old is _ABSENT or new is _ABSENT or old != _recorded(new):
        yield f"{path} was {_short(old)}, is {_short(new)}"


_ABSENT = object()


def _recorded(recipe: Any) -> Any:
    """A recipe as it is read back from JSON."""
    return json.loads(json.dumps(recipe, default=UsedImages.record))


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    value = _recorded(value)
    if isinstance(value, dict) and {"place", "content"} <= value.keys():
        return f"{value['place']} ({value.get('images')} images, {str(value['content'])[:12]})".lstrip()
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
