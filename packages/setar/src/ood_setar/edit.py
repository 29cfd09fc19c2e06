"""What a search or a fine-tuning leaves behind: a short list of weights and ratios, small enough to mail."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from ood_core import check
from ood_core.backbones.base import Backbone, hash_tensors
from ood_core.errors import DataError, MissingDataError, OODError, UsageError
from ood_core.files import check_schema, json_writer, write_together
from safetensors.torch import load_file, save_file
from torch import Tensor

from ood_setar.functional import dropped_rank, truncate

__all__ = ["SeTAREdit", "apply_saved", "draw", "read_edit"]

# Our names of weights and those of the released code's lists.
_RELEASED = {
    "query": "W_q",
    "key": "W_k",
    "value": "W_v",
    "out": "W_o",
    "up": "W_up",
    "down": "W_down",
    "projection": "W_p",
}
_OURS = {released: ours for ours, released in _RELEASED.items()}


def draw(seed: int, name: str) -> torch.Generator:
    """The random numbers of one weight: the same for every ratio, so that candidates are nested."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass
class SeTAREdit:
    """Weights of a backbone without some of their singular values, perhaps with trained low-rank factors instead.

    Attributes:
        ratios: name of a weight ("visual.11.up") -> share of singular values dropped, in the order of the search.
        fingerprint: of the backbone it belongs to; empty if unknown (a list of the released code).
        drop: "minor", "principal" or "random", see `functional.truncate`.
        seed: of `drop="random"`.
        factors: name -> (B [out, r], A [r, in]) whose product is added to the truncated weight: SeTAR+FT or LoRA.
        scale: of these products.
        record: what is worth knowing about its making (settings, steps, margins), for people and `show`.
        folder: where it was saved or loaded.

    Example:
        >>> edit = SeTAREdit.from_pretrained("edit/")  # doctest: +SKIP
        >>> edited = edit.apply(create_backbone("tiny"))  # doctest: +SKIP
    """

    ratios: dict[str, float]
    fingerprint: str = ""
    drop: str = "minor"
    seed: int = 5
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    scale: float = 1.0
    record: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    # ---- use

    def apply(self, backbone: Backbone) -> Backbone:
        """A new backbone with this edit; the one given stays as it is.

        Raises:
            UsageError: another backbone, one that has this or another edit already, or one without these weights.
            ValueError: a ratio that would drop a whole weight.
        """
        self._check(backbone)
        edited = backbone.copy()
        for name, weight in self._weights(edited):
            edited.linear(name).set(weight)
            self._sign(edited, name)
        # What loads the same backbone again; an edit that was never saved cannot be found by anyone.
        edited.spec = f"{backbone.spec}+edit:{self.folder or 'unsaved'}"
        return edited

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[Backbone]:
        """Edit a backbone inside a `with` block; its weights come back bit by bit, also after an exception.

        Raises:
            UsageError, ValueError: as `apply`; nothing is then changed.

        Example:
            >>> with edit.applied(backbone):  # doctest: +SKIP
            ...     features = extract(backbone, "photos/")
        """
        self._check(backbone)
        weights = list(self._weights(backbone))
        with ExitStack() as undo:
            for name, weight in weights:
                undo.enter_context(backbone.linear(name).edited(weight))
                self._sign(backbone, name)
            yield backbone

    def weight(self, backbone: Backbone, name: str) -> Tensor:
        """The edited weight [out, in] of an unedited backbone: truncated, plus the product of the factors."""
        original = backbone.linear(name).weight
        kept = truncate(original, self.ratios[name], drop=self.drop, generator=draw(self.seed, name))
        if name in self.factors:
            b, a = (factor.to(kept) for factor in self.factors[name])
            kept = kept + self.scale * b @ a
        return kept

    def _weights(self, backbone: Backbone) -> Iterator[tuple[str, Tensor]]:
        """The weights that differ from the original."""
        for name, ratio in self.ratios.items():
            if name in self.factors or dropped_rank(backbone.linear(name).weight.shape, ratio):
                yield name, self.weight(backbone, name)

    def _sign(self, backbone: Backbone, name: str) -> None:
        """Fingerprint a changed weight by what was done to it: its bits depend on the machine and the precision."""
        if name in backbone.edits:  # else it is the same again, as at LoRA's start
            done: list[Any] = [dropped_rank(backbone.linear(name).weight.shape, self.ratios[name]), self.drop]
            done += [self.seed] * (self.drop == "random") + [self.scale] * (name in self.factors)
            factors = zip("BA", self.factors.get(name, ()), strict=False)
            original, _ = backbone.edits[name]
            backbone.edits[name] = (original, hash_tensors(factors, json.dumps(done)))

    def _check(self, backbone: Backbone) -> None:
        if backbone.edits:
            raise UsageError(
                f"Backbone {backbone.spec!r} is edited already ({', '.join(sorted(backbone.edits)[:3])}, ...): an "
                "edit belongs on the original weights."
            )
        if self.fingerprint and self.fingerprint != backbone.fingerprint:
            raise UsageError(
                f"This edit was made for a backbone with fingerprint {self.fingerprint[:12]}, not for "
                f"{backbone.spec!r} ({backbone.fingerprint[:12]}): use that backbone, or search again."
            )
        for name, ratio in self.ratios.items():
            dropped_rank(backbone.linear(name).weight.shape, ratio)
        for name, (b, a) in self.factors.items():
            rows, columns = backbone.linear(name).weight.shape
            if name not in self.ratios or list(b.shape) != [rows, len(a)] or list(a.shape) != [len(a), columns]:
                raise UsageError(
                    f"Factors {list(b.shape)} and {list(a.shape)} of {name} do not fit: the weight must have a ratio "
                    f"(0 drops nothing), and they must be [{rows}, r] and [r, {columns}]."
                )

    # ---- storage

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `edit.json` (names, ratios, record) and `edit.safetensors` (factors); atomic, no pickle."""
        self.folder = folder = Path(folder)
        tensors = {"ratios": torch.tensor(list(self.ratios.values()), dtype=torch.float64)}
        for name, pair in self.factors.items():
            tensors |= {f"{name}.{letter}": factor.contiguous() for letter, factor in zip("BA", pair, strict=True)}
        content = {"schema": 1, "kind": "setar", "ratios": self.ratios, "fingerprint": self.fingerprint}
        content |= {"drop": self.drop, "seed": self.seed, "factors": list(self.factors), "scale": self.scale}
        content["record"] = self.record
        files = {"edit.safetensors": lambda path: save_file(tensors, path), "edit.json": json_writer(content)}
        write_together(folder, files)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a saved edit.

        Raises:
            MissingDataError: no such folder or file.
            DataError: files that are no saved edit.
        """
        path = Path(folder)
        for name in ("edit.json", "edit.safetensors"):
            if not (path / name).is_file():
                raise MissingDataError(
                    f"{path} holds no saved edit: {name} is missing. `ood-setar search --out` makes one."
                )
        try:
            content = json.loads((path / "edit.json").read_text(encoding="utf-8"))
            check_schema(content, path / "edit.json", "ood-setar")
            tensors = load_file(path / "edit.safetensors")
            ratios = {str(name): _share(ratio) for name, ratio in content["ratios"].items()}
            factors = {name: (tensors[f"{name}.B"], tensors[f"{name}.A"]) for name in content["factors"]}
            return cls(
                ratios,
                content["fingerprint"],
                check.choice("drop", content["drop"], ("minor", "principal", "random")),
                content["seed"],
                factors,
                content["scale"],
                content["record"],
                folder=path,
            )
        except OODError:
            raise
        except Exception as error:
            raise DataError(f"{path} holds no readable edit ({type(error).__name__}: {error}).") from error

    # ---- the released code's lists

    def to_released(self) -> list[list[Any]]:
        """The `lora_settings` list of the released code: [tower, weight, layer or [stage, block], ratio].

        Example:
            >>> SeTAREdit({"visual.11.up": 0.15}).to_released()
            [['visual', 'W_up', 11, 0.15]]
        """
        rows = []
        for name, ratio in self.ratios.items():
            tower, *layer, kind = name.split(".")
            numbers = [int(number) for number in layer]
            place: Any = numbers[0] if len(numbers) == 1 else numbers or None
            rows.append([tower, _RELEASED[kind], place, ratio])
        return rows

    @classmethod
    def from_released(cls, settings: Sequence[Sequence[Any]] | Mapping[str, Any] | str | Path, **options: Any) -> Self:
        """An edit from the released code's list, its `config_best.json` or a file of either.

        Args:
            settings: rows [tower, weight, layer or [stage, block], ratio], a mapping with "lora_settings", or a path.
            **options: further attributes, such as `fingerprint`.

        Raises:
            MissingDataError: no such file.
            DataError: rows of another form, or a weight type that is not known.

        Example:
            >>> SeTAREdit.from_released([["visual", "W_up", [3, 1], 0.4]]).ratios
            {'visual.3.1.up': 0.4}
        """
        if isinstance(settings, str | Path):
            settings = _read_json(Path(settings))
        rows = settings.get("lora_settings") if isinstance(settings, Mapping) else settings
        if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
            raise DataError("There is no list 'lora_settings' with at least one row [tower, weight, layer, ratio].")
        ratios: dict[str, float] = {}
        for row in rows:
            name, ratio = _row(row)
            if name in ratios:
                raise DataError(f"{name} stands in the list twice ({row!r}): give every weight one ratio.")
            ratios[name] = ratio
        return cls(ratios, **options)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise MissingDataError(f"There is no file {path}: give the config_best.json of a search.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON file ({error}).") from error


def _row(row: Any) -> tuple[str, float]:
    try:
        tower, weight, place, ratio = row
        kind = _OURS.get(weight) or (weight if weight in _RELEASED else _OURS[weight])
        layer = [] if kind == "projection" else place if isinstance(place, list) else [place]
        check.choice("tower", tower, ("visual", "text"))
        return ".".join([tower, *(str(operator.index(number)) for number in layer), kind]), _share(ratio)
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"{row!r} is no row [tower, weight, layer or [stage, block], ratio] with a weight of {', '.join(_OURS)} "
            "and a ratio in [0, 1)."
        ) from error


def _share(ratio: Any) -> float:
    """A ratio as a file has it."""
    if not 0 <= float(ratio) < 1:
        raise ValueError(f"ratio={ratio} is outside [0, 1)")
    return float(ratio)


def apply_saved(backbone: Backbone, folder: str | Path) -> Backbone:
    """A copy of a backbone with the edit that is saved in a folder; what `create_backbone(edit=)` does.

    Example:
        >>> edited = apply_saved(backbone, "edit/")  # doctest: +SKIP
    """
    return SeTAREdit.from_pretrained(folder).apply(backbone)


def read_edit(path: str | Path) -> SeTAREdit:
    """A saved edit, or a config_best.json of the released code."""
    path = Path(path)
    return SeTAREdit.from_released(path) if path.suffix == ".json" else SeTAREdit.from_pretrained(path)
