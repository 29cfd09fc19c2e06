"""Features of an image source: extracted once, cached on disk, shared by every detector."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ood_core.backbones.base import FEATURES, Backbone
from ood_core.data import load_batches, open_source
from ood_core.data.sources import Images, ImageSource, short_hash
from ood_core.errors import DataError, ImageError, UsageError
from ood_core.files import write_atomically, write_json
from ood_core.labels import match_labels

__all__ = ["FeatureSet", "extract", "label_table", "stream"]

log = logging.getLogger(__name__)

# Images per cache shard: what a killed run loses at most.
_SHARD = 512


@dataclass(frozen=True)
class FeatureSet:
    """Features of N images that could be decoded, and the record of those that could not.

    Attributes:
        ids: N image ids.
        labels: int64 [N], index into `label_names`, -1 without a label; None for an unlabelled source.
        label_names: names of the labels.
        image: float32 [N, d] unit norm, or None.
        local: float32 [N, P, d] unit norm in row-major order of `grid`, or None.
        logits: float32 [N, C] of the backbone's classifier head, or None.
        local_logits: float32 [N, P, C] of the head on every patch, or None.
        extra: features that a method added (`Backbone.with_features`), by name, N rows each.
        failures: (id, reason) of every image without features.
        notes: (id, note) of images that have features but are odd, see `data.ImageBatch`: "constant",
            "narrow:MAXIMUM", "channels:NUMBER".
        grid: patches (rows, columns).
        backbone: spec of the backbone.
        fingerprint: the backbone's.
        source: fingerprint of the image source.
        keys: int64 [N], by which an image is known again in other sets; None for features made by hand.
        dtype: precision of the backbone's weights, e.g. "bfloat16"; "" if unknown.

    Example:
        >>> features = FeatureSet(ids=["a", "b"], image=torch.eye(2))
        >>> len(features), features[[1]].ids
        (2, ['b'])
    """

    ids: list[str]
    labels: Any = None  # tensors or None: a reader knows which it asked for
    label_names: list[str] = field(default_factory=list)
    image: Any = None
    local: Any = None
    logits: Any = None
    local_logits: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    grid: tuple[int, int] | None = None
    backbone: str = ""
    fingerprint: str = ""
    source: str = ""
    keys: Any = None
    dtype: str = ""

    def __post_init__(self) -> None:
        for name, value in self._columns().items():
            if len(value) != len(self.ids):
                raise ValueError(f"{name} has {len(value)} rows for {len(self.ids)} ids.")

    def __len__(self) -> int:
        return len(self.ids)

    def get(self, name: str) -> Any:
        """A feature by name, added ones too; None if it is not there."""
        return self._columns().get(name)

    def _columns(self) -> dict[str, Any]:
        """Whatever has a row per image, by name."""
        own = {name: value for name in ("labels", "keys", *FEATURES) if (value := getattr(self, name)) is not None}
        return own | self.extra

    def _with_columns(self, columns: dict[str, Any], **others: Any) -> FeatureSet:
        own = {name: value for name, value in columns.items() if name not in self.extra}
        return replace(self, extra={name: columns[name] for name in self.extra}, **own, **others)

    def __getitem__(self, indices: slice | Sequence[int] | np.ndarray | Tensor) -> FeatureSet:
        """The rows at `indices` (a slice, integers or a boolean mask); failures stay with the whole set.

        Raises:
            TypeError: a single integer (use a slice, rows keep their dimension).
            IndexError: an index out of range.
        """
        if isinstance(indices, int):
            raise TypeError(f"Use features[{indices}:{indices + 1}]: the result is a FeatureSet, not a row.")
        rows = np.arange(len(self))[indices.numpy() if isinstance(indices, Tensor) else indices]
        # A slice keeps tensors as views (of a memory map, too); other indices copy.
        pick: Any = indices if isinstance(indices, slice) else torch.from_numpy(rows)
        chosen = {name: value[pick] for name, value in self._columns().items()}
        ids = [self.ids[row] for row in rows]
        held = set(ids) if self.notes else ()
        notes = [note for note in self.notes if note[0] in held]
        return self._with_columns(chosen, ids=ids, failures=[], notes=notes)

    @classmethod
    def concatenate(cls, parts: Sequence[FeatureSet]) -> FeatureSet:
        """The parts of one source, in order, as one set; a single part with features stays a memory map."""
        filled = [part for part in parts if len(part)] or parts[:1]
        tables = [part._columns() for part in filled]
        columns = {name: _concatenated([table[name] for table in tables]) for name in tables[0]}
        ids = [image_id for part in filled for image_id in part.ids]
        failures = [failure for part in parts for failure in part.failures]
        notes = [note for part in filled for note in part.notes]
        return filled[0]._with_columns(columns, ids=ids, failures=failures, notes=notes)


def extract(
    backbone: Backbone,
    source: Images,
    needs: Collection[str] = frozenset({"image", "local"}),
    cache: str | Path | None = None,
    resume: bool = True,
    on_error: str = "raise",
    batch_size: int = 64,
    workers: int = 0,
    *,
    local: str = "value",
    progress: bool | None = None,
    max_pixels: int | None = None,
    value_range: Sequence[float] | None = None,
) -> FeatureSet:
    """Run a backbone over an image source, once for all detectors.

    Args:
        backbone: from `create_backbone`.
        source: an image source, a folder, a manifest, "FILE.parquet[:split]" or a list of PIL images.
        needs: of "image", "local", "logits", "local_logits" and what the backbone was given `with_features`.
        cache: folder that keeps the features, under a key of everything they depend on; None keeps nothing.
        resume: use what the cache holds; a killed run goes on where it stopped and ends bit-identical.
        on_error: "raise" at the first image that cannot be decoded, or "record" it and go on.
        batch_size: images per forward pass.
        workers: processes that decode; 0 decodes in this one.
        local: "value" or "tokens", see `Backbone.encode`.
        progress: a bar on stderr; None shows it on a terminal only.
        max_pixels: larger images are failures; None: 100 million, unless the source has a limit of its own.
        value_range: the values to show black and white in images of more than 8 bits per sample; None leaves it to the
            source and the files, see `ood_core.data.depth`.

    Images that are odd (constant, 16 bits of which few are used) and files of a folder that were skipped are counted
    in one warning per source; `notes` of the result names them all.

    Returns:
        A `FeatureSet` in the order of the source.

    Raises:
        ImageError: an undecodable image with `on_error="raise"`.
        DataError: no image could be decoded.
        UsageError: a need the backbone does not have, an unknown `on_error`, or an option out of range.

    Example:
        >>> features = extract(create_backbone("tiny"), "photos/", needs={"image"}, cache="cache/")  # doctest: +SKIP
    """
    options: dict[str, Any] = {"max_pixels": max_pixels, "value_range": value_range}
    options |= {"local": local, "progress": progress}
    parts = list(stream(backbone, source, needs, cache, resume, on_error, batch_size, workers, **options))
    features = FeatureSet.concatenate(parts)
    if not len(features):
        raise DataError(
            f"None of {len(features.failures)} images could be decoded. The first: {features.failures[0][1]}"
        )
    return features


def stream(
    backbone: Backbone,
    source: Images,
    needs: Collection[str] = frozenset({"image", "local"}),
    cache: str | Path | None = None,
    resume: bool = True,
    on_error: str = "raise",
    batch_size: int = 64,
    workers: int = 0,
    *,
    local: str = "value",
    progress: bool | None = None,
    max_pixels: int | None = None,
    value_range: Sequence[float] | None = None,
) -> Iterator[FeatureSet]:
    """`extract` in parts of 512 images, so that the features of a large source need never be in memory together.

    Args and raises: as `extract`; a part of which no image could be decoded is empty.

    Yields:
        One `FeatureSet` per part, in the order of the source.

    Example:
        >>> for part in stream(backbone, "photos/"):  # doctest: +SKIP
        ...     scores.append(detector.score_features(part))
    """
    if on_error not in ("raise", "record"):
        raise UsageError(f"on_error={on_error!r} must be 'raise' or 'record'.")
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1.")
    needs = backbone.check_needs(needs)
    source = open_source(source, max_pixels=max_pixels, value_range=value_range)
    fingerprint = source.fingerprint
    folder = None if cache is None else _Cache(Path(cache), _describe(backbone, source, fingerprint, needs, local))
    cached: dict[int, _Shard] = {}
    count = -(-len(source) // _SHARD)
    if folder is not None and resume:
        cached = {i: shard for i in range(count) if (shard := folder.read(i)) is not None}
    missing = [i for i in range(count) if i not in cached]
    loading = {"on_error": on_error, "workers": workers, "progress": progress}
    computed = _compute(backbone, source, needs, local, missing, batch_size, **loading)
    notes: list[tuple[str, str]] = []
    for i in range(count):
        shard = cached.get(i)
        if shard is None:
            shard = next(computed)
            if folder is not None:
                folder.write(i, shard)
        if shard.failures and on_error == "raise":
            raise ImageError(shard.failures[0][1])
        part = _feature_set(backbone, source, fingerprint, _shard_range(i, len(source)), shard)
        notes += part.notes
        yield part
    tell_notes(source, notes)


@dataclass(frozen=True)
class _Shard:
    """Features of consecutive images of a source, (index, reason) of those without and (index, note) of odd ones."""

    tensors: dict[str, Tensor]
    failures: list[tuple[int, str]]
    notes: list[tuple[int, str]]


def _describe(
    backbone: Backbone, source: ImageSource, fingerprint: str, needs: frozenset[str], local: str
) -> dict[str, Any]:
    """Everything the features depend on."""
    return {
        "backbone": backbone.spec,
        "fingerprint": backbone.fingerprint,
        "transform": backbone.transform.describe(),
        "needs": sorted(needs),
        "local": None if needs.isdisjoint({"local", "local_logits"}) else local,
        "dtype": backbone.precision,
        "device": backbone.device.type,
        "source": fingerprint,
        "images": len(source),
        "max_pixels": source.max_pixels,
        "shard": _SHARD,
    }


def _shard_range(shard: int, count: int) -> range:
    return range(shard * _SHARD, min((shard + 1) * _SHARD, count))


def _compute(
    backbone: Backbone,
    source: ImageSource,
    needs: frozenset[str],
    local: str,
    missing: list[int],
    batch_size: int,
    **loading: Any,
) -> Iterator[_Shard]:
    """Encode the missing shards; batches never straddle two, so a resumed run forms the same batches."""
    batches = [_batches(_shard_range(i, len(source)), batch_size) for i in missing]
    flat = [batch for group in batches for batch in group]
    loaded = iter(load_batches(source, backbone.transform, flat, **loading))
    for group in batches:
        failures: list[tuple[int, str]] = []
        notes: list[tuple[int, str]] = []
        parts: list[dict[str, Tensor]] = []
        for batch in islice(loaded, len(group)):
            failures += batch.failures
            notes += batch.notes
            if len(batch.pixels):
                parts.append(backbone.encode(batch.pixels, needs, local=local))
        tensors = {name: torch.cat([part[name].cpu() for part in parts]) for name in sorted(needs) if parts}
        yield _Shard(tensors, failures, notes)


def _batches(rows: range, size: int) -> list[list[int]]:
    return [list(rows[at : at + size]) for at in range(0, len(rows), size)]


def _feature_set(backbone: Backbone, source: ImageSource, fingerprint: str, rows: range, shard: _Shard) -> FeatureSet:
    failures = dict(shard.failures)
    good = [row for row in rows if row not in failures]
    own = {name: value for name, value in shard.tensors.items() if name in FEATURES}
    return FeatureSet(
        ids=[source.ids[row] for row in good],
        labels=None if source.labels is None else torch.as_tensor(source.labels)[good],
        label_names=list(source.label_names),
        failures=[(source.ids[row], reason) for row, reason in failures.items()],
        notes=[(source.ids[row], note) for row, note in shard.notes],
        grid=backbone.grid,
        backbone=backbone.spec,
        fingerprint=backbone.fingerprint,
        source=fingerprint,
        keys=torch.from_numpy(source.content_keys(good)),
        dtype=backbone.precision,
        extra={name: value for name, value in shard.tensors.items() if name not in own},
        **own,
    )


def label_table(label_names: Sequence[str], class_names: Sequence[str]) -> Tensor:
    """`ood_core.labels.match_labels` as a tensor to be indexed by labels, of which -1 is none.

    Args:
        label_names: L names.
        class_names: C names.

    Returns:
        int64 [L + 1]: the position in `class_names` or -1; the last is -1.

    Example:
        >>> label_table(["great_dane", "cat"], ["cat", "great dane"])
        tensor([ 1,  0, -1])
    """
    return torch.from_numpy(np.append(match_labels(label_names, class_names)[0], -1))


def content_keys(images: FeatureSet | ImageSource) -> Tensor:
    """int64 [N], one number per image, the same for the same image in every set that holds it.

    Files are known by where they are, when and how large they were written; images in memory by their pixels; features
    made by hand by their source and id, or without a source by themselves.

    Example:
        >>> one = FeatureSet(ids=["a", "b"], image=torch.eye(2))
        >>> torch.isin(content_keys(one[1:]), content_keys(one))
        tensor([True])
    """
    if isinstance(images, ImageSource):
        return torch.from_numpy(images.content_keys())
    if images.keys is not None:
        return images.keys
    if images.source:
        texts = [f"{images.source} {one}".encode() for one in images.ids]
    else:
        features = [value for name, value in images._columns().items() if name != "labels"]
        texts = [features[0][row].float().cpu().numpy().tobytes() if features else b"" for row in range(len(images))]
    return torch.tensor([short_hash(text) for text in texts], dtype=torch.int64)


def count_notes(notes: Sequence[tuple[str, str]]) -> dict[str, int]:
    """How many images have a note of each kind: "constant", "narrow", "channels".

    Example:
        >>> count_notes([("a", "constant"), ("b", "narrow:4095"), ("c", "narrow:900")])
        {'constant': 1, 'narrow': 2}
    """
    return dict(sorted(Counter(note.partition(":")[0] for _, note in notes).items()))


_SENTENCES = {
    "constant": "{count} of {images} images are of one colour, first {first!r}: their scores say nothing.",
    "narrow": "{count} of {images} images have 16 bits per sample but no value above {largest}, first {first!r}. If it "
    "is 10-, 12- or 14-bit content, it is almost black: give value_range=(0, {full}), --value-range 0,{full} on a "
    "command line.",
    "channels": "{count} of {images} images have channels beyond their colours and alpha (up to {largest} in all), "
    "first {first!r}: those are left out.",
}


def tell_notes(source: ImageSource, notes: Sequence[tuple[str, str]]) -> None:
    """Warn of the odd images of a source and of files that it skipped: a sentence for each kind, once per source."""
    if source.told:
        return
    source.told.append("notes")
    for kind, count in count_notes(notes).items():
        own = [(id, note.partition(":")[2]) for id, note in notes if note.partition(":")[0] == kind]
        largest = max(int(value or 0) for _, value in own)
        full = 2 ** max(8, largest.bit_length()) - 1
        told = {"count": count, "images": len(source), "first": own[0][0], "largest": largest, "full": full}
        log.warning(_SENTENCES[kind].format(**told))
    if source.skipped:
        count, first = len(source.skipped), source.skipped[0]
        kinds = sorted({Path(name).suffix.lower() or "no suffix" for name in source.skipped})
        log.warning(
            "Skipped because they look like images but cannot be read here: %d (%s), first %r.",
            *(count, ", ".join(kinds[:5]), first),
        )


def _concatenated(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Cache:
    """The shards of one extraction: safetensors files and a manifest with their checksums."""

    def __init__(self, root: Path, description: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        self.folder = root / key[:24]
        self.manifest = self.folder / "manifest.json"
        self.content: dict[str, Any] = {"schema": 1, "description": description, "shards": {}}
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.manifest.exists():
            self._load()

    def _load(self) -> None:
        try:
            shards = json.loads(self.manifest.read_text())["shards"]
            self.content["shards"] = {
                index: {
                    "sha256": entry["sha256"],
                    "failures": [(int(i), str(why)) for i, why in entry["failures"]],
                    "notes": [(int(i), str(note)) for i, note in entry["notes"]],
                }
                for index, entry in shards.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s is damaged: its shards are computed again.", self.manifest)

    def read(self, index: int) -> _Shard | None:
        """The shard, or None if it is absent or its bytes are not those that were written."""
        entry = self.content["shards"].get(str(index))
        path = self.folder / f"{index:05d}.safetensors"
        if entry is None or not path.exists():
            return None
        if _checksum(path) != entry["sha256"]:
            log.warning("%s does not match its checksum: it is computed again.", path)
            return None
        return _Shard(load_file(path), entry["failures"], entry["notes"])

    def write(self, index: int, shard: _Shard) -> None:
        """Store the shard, then the manifest that vouches for it."""
        path = self.folder / f"{index:05d}.safetensors"
        write_atomically(path, lambda temporary: save_file(shard.tensors, temporary))
        entry = {"sha256": _checksum(path), "failures": shard.failures, "notes": shard.notes}
        self.content["shards"][str(index)] = entry
        write_json(self.manifest, self.content)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
