"""The one loop that scores: detectors on an ID test set and OOD sets, to metrics, tables and a report."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ood_core.backbones.base import Backbone
from ood_core.calibration import features_hash
from ood_core.data import open_source
from ood_core.data.sources import ImageSource
from ood_core.detectors.base import Detector, backbone_of, leaves, right_predictions
from ood_core.detectors.given import Data
from ood_core.errors import DataError, NotFittedError, OODError, UsageError
from ood_core.features import FeatureSet, count_notes, stream
from ood_core.files import write_json
from ood_core.metrics import OODMetrics, evaluate_scores, paired_bootstrap
from ood_core.options import Options, flat_options
from ood_core.scores import ScoreTable

if TYPE_CHECKING:
    from typing_extensions import TypeIs

__all__ = ["Evaluation", "Remarks", "calibrate_detectors", "environment", "evaluate", "fit_detectors", "score"]

_NOMINAL = tuple(step / 40 for step in range(1, 41))
"""TPRs of the calibration curve: steps of 2.5 %, so that 95 % is among them."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        results: figures as fractions, environment and data, as written to results.json.
        scores: one row per image, one column per detector.
        metrics: detector name -> its `OODMetrics`.
        open_image: (set, id) -> the image, or None where only features are at hand.
        explain_image: (detector name, image) -> `Detector.explain_image`.
    """

    results: dict[str, Any]
    scores: ScoreTable
    metrics: dict[str, OODMetrics]
    open_image: Callable[[str, str], Image.Image | None] = field(repr=False, default=lambda *_: None)
    explain_image: Callable[[str, Image.Image], Image.Image | None] = field(repr=False, default=lambda *_: None)

    def to_frame(self) -> Any:
        """One row per detector and OOD set ("mean" included), metrics as fractions."""
        import pandas as pd

        frames = {name: metrics.to_frame() for name, metrics in self.metrics.items()}
        return pd.concat(frames, names=["detector"])

    def table(self) -> Any:
        """A rich table in percent: average AUROC and FPR95, then the AUROC of every OOD set."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        sets = list(self.results["data"]["ood"])
        title = f"percent; FPR95 {self.results['data']['convention']}; AUROC of each OOD set on the right"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, collapse_padding=True)
        table.add_column("detector", no_wrap=True)
        for name in ("AUROC", "FPR95", *sets):
            table.add_column(name, justify="right", overflow="fold")
        figures = self.results["detectors"].items()
        for name, figure in sorted(figures, key=lambda item: -item[1]["average"]["auroc"]):
            values = [figure["average"]["auroc"], figure["average"]["fpr95"]]
            values += [figure["per_set"][source]["auroc"] for source in sets]
            table.add_row(name, *(f"{100 * value:.1f}" for value in values))
        return table

    def write(self, folder: str | Path) -> Path:
        """Write results.json, scores.parquet and report.html.

        Returns:
            The folder.
        """
        from ood_core.report import write_report

        folder = Path(folder)
        self.scores.write(folder / "scores.parquet")
        write_json(folder / "results.json", self.results)
        page, table = folder / "report.html", self.scores.frame
        write_report(page, self.results, table, self.open_image, explain_image=self.explain_image)
        return folder


@dataclass(frozen=True)
class Remarks(Options):
    """What a report says of the data beside the figures.

    Attributes:
        set_kinds: OOD set -> "near" or "far".
        notes: sentences that belong to the results.
    """

    set_kinds: Mapping[str, str] | None = None
    notes: Sequence[str] = ()


@flat_options
def evaluate(
    detectors: Detector | Sequence[Detector] | Mapping[str, Detector],
    *,
    id: Data,
    ood: Mapping[str, Data],
    fit: Data | None = None,
    calibrate: Data | None = None,
    allow_overlap: bool = False,
    convention: str = "standard",
    bootstrap: int = 0,
    seed: int = 0,
    out: str | Path | None = None,
    remarks: Remarks = Remarks(),
    **extraction: Any,
) -> Evaluation:
    """Score an ID test set and OOD sets with detectors, images encoded once for all of them.

    Args:
        detectors: one, several, or by name.
        id: the ID test set.
        ood: name -> OOD set ("id" is taken).
        fit: labelled ID training images for detectors that are not fitted yet.
        calibrate: held-out ID images that set every detector's threshold.
        allow_overlap: let these be images that a detector was fitted on, too (see `Detector.calibrate`).
        convention: of the FPR, see `metrics.fpr_at_tpr`.
        bootstrap: replicates for 95 % intervals; 0 for none.
        seed: of the bootstrap.
        out: folder for results.json, scores.parquet and report.html.
        remarks: what the report says beside the figures, see `Remarks`.
        **extraction: for `extract`: `cache`, `on_error`, `batch_size`, `workers`, `progress`, `max_pixels`,
            `value_range`.

    Returns:
        An `Evaluation`.

    Raises:
        UsageError: no OOD set, a set named "id", or features a detector cannot read.
        NotFittedError: a detector that needs training, without `fit`.
        DataError: no detector, or a set of which no image can be decoded.

    Example:
        >>> evaluate(detector, id="test/", ood={"textures": "dtd/"}, out="results/")  # doctest: +SKIP
    """
    named = _by_name(detectors)
    sets = {name: _opened(data, extraction) for name, data in {"id": id, **ood}.items()}
    fit, calibrate = _opened(fit, extraction), _opened(calibrate, extraction)
    if not ood or len(sets) != len(ood) + 1:
        raise UsageError("Give at least one OOD set as ood={name: images}; the name 'id' is the ID test set's.")
    started = time.monotonic()
    fit_detectors(named, fit, **extraction)
    if calibrate is not None:
        calibrate_detectors(named, calibrate, allow_overlap=allow_overlap, **extraction)
    scored = {name: score(named, data, source=name, **extraction) for name, data in sets.items()}
    scores = ScoreTable.concatenate(table for table, _ in scored.values())
    metrics = {
        name: evaluate_scores(
            scores.scores(name, "id"),
            {source: scores.scores(name, source) for source in ood},
            convention=convention,
            bootstrap=bootstrap,
            seed=seed,
        )
        for name in named
    }
    accuracy = scored["id"][1]["accuracy"]
    shown = ("images", "scored", "failures", "fingerprint", "notes")
    described = {name: {key: counts[key] for key in shown} for name, (_, counts) in scored.items()}
    for name, given in sets.items():
        described[name]["skipped"] = list(getattr(given, "skipped", ()))
    data = {
        "id": described.pop("id"),
        "ood": described,
        "fit": _describe_data(fit),
        "calibration": _describe_data(calibrate),
        "convention": convention,
        "bootstrap": bootstrap,
        "set_kinds": dict(remarks.set_kinds or {}),
        "notes": list(remarks.notes),
    }
    results: dict[str, Any] = {
        "schema": 1,
        "detectors": {name: _figures(name, named[name], metrics[name], scores, accuracy) for name in named},
        "environment": environment(named.values()) | {"seconds": round(time.monotonic() - started, 2), "seed": seed},
        "data": data,
    }
    if bootstrap:
        results["comparison"] = _compared(scores, _by_auroc(metrics), bootstrap, seed)
        for name, detector in named.items():
            if members := [member for member in detector.members if member in named]:
                results["detectors"][name]["against_members"] = _compared(scores, [name, *members], bootstrap, seed)
    found = Evaluation(
        results,
        scores,
        metrics,
        open_image=image_opener(sets),
        explain_image=lambda name, image: named[name].explain_image(image),
    )
    if out is not None:
        found.write(out)
    return found


def score(
    detectors: Mapping[str, Detector], data: Data, *, source: str = "id", classify: bool = False, **extraction: Any
) -> tuple[ScoreTable, dict[str, Any]]:
    """Score one set with several detectors, images encoded once per backbone.

    Args:
        detectors: by name.
        data: the images or their features.
        source: name of the set in the table.
        classify: also tell what is predicted for images without labels.
        **extraction: for `extract`.

    Returns:
        The table, and what the set held: images scored, failures, fingerprint, notes (odd images by kind, see
        `FeatureSet.notes`), and of the detectors that classify
        "predicted" (class numbers of the scored images in the table's order) and "accuracy", where labels are known
        classes.
    """
    found = score_leaves(detectors.values(), data, source=source, classify=classify, **extraction)
    frame = found.rows.frame
    columns = {name: np.full(len(frame), np.nan, dtype=np.float32) for name in detectors}
    for name, detector in detectors.items():
        columns[name][frame["status"] == "ok"] = detector._assemble(found.scores.__getitem__).numpy()
    told = {
        "predicted": {name: found.predicted[one] for name, one in detectors.items() if one in found.predicted},
        "accuracy": {name: found.accuracy[one] for name, one in detectors.items() if one in found.accuracy},
    }
    return ScoreTable(frame.assign(**columns)), found.counts | told


@dataclass(frozen=True)
class Scored:
    """One set as detectors, and the members of fusions, see it.

    Attributes:
        rows: of all images, without scores.
        scores: detector -> [N], of the images that could be read, in the order of `rows`.
        predicted: detector -> class numbers [N], of those that classify.
        accuracy: detector -> share of right predictions, where labels are known classes.
        counts: "images", "scored", "failures", "fingerprint" and "notes".
    """

    rows: ScoreTable
    scores: dict[Detector, Tensor]
    predicted: dict[Detector, Tensor]
    accuracy: dict[Detector, float]
    counts: dict[str, Any]


def score_leaves(
    detectors: Iterable[Detector], data: Data, *, source: str = "id", classify: bool = False, **extraction: Any
) -> Scored:
    """`score` of all detectors that see images: these, and the members of fusions, each once.

    Args:
        detectors: of those that were given themselves it is also told what they predict for labelled images.
        data: the images or their features.
        source: name of the set in the table.
        classify: also tell what is predicted for other images.
        **extraction: for `extract`.
    """
    found = leaves(*detectors)
    tables: list[ScoreTable] = []
    right: dict[Detector, list[Tensor]] = {}
    predicted: dict[Detector, list[Tensor]] = {}
    for group, parts in _features_per_backbone(found, data, extraction):
        rows, counts, fingerprint = [], [0, 0], ""
        notes: list[tuple[str, str]] = []
        for part in parts:
            rows.append(_scored_rows(group, found, part, source))
            counts = [counts[0] + len(part), counts[1] + len(part.failures)]
            notes += part.notes
            fingerprint = part.source
            asked = [leaf for leaf in group if not found[leaf]] if classify or part.labels is not None else []
            for leaf in asked if len(part) else ():
                if (classes := leaf.predict(part)) is not None:
                    predicted.setdefault(leaf, []).append(classes)
                    if (hits := right_predictions(leaf, part, classes)) is not None:
                        right.setdefault(leaf, []).append(hits)
        tables.append(ScoreTable.concatenate(rows))
    if not counts[0]:
        raise DataError(f"None of the {counts[1]} images of {source!r} could be decoded: {rows[0].frame['status'][0]}")
    return Scored(
        *_joined(tables, found),
        {leaf: torch.cat(classes) for leaf, classes in predicted.items()},
        {leaf: torch.cat(hits).double().mean().item() for leaf, hits in right.items()},
        {
            "images": sum(counts),
            "scored": counts[0],
            "failures": counts[1],
            "fingerprint": fingerprint,
            "notes": count_notes(notes),
        },
    )


def _scored_rows(
    group: Iterable[Detector], found: Mapping[Detector, str], features: FeatureSet, source: str = "id"
) -> ScoreTable:
    """Scores of some leaves; a column is named by the leaf's place among all."""
    places = {leaf: str(place) for place, leaf in enumerate(found)}
    scores = {places[leaf]: _checked_scores(leaf, found[leaf], features) for leaf in group if len(features)}
    return ScoreTable.of(features, scores, source=source)


def _joined(tables: Sequence[ScoreTable], found: Mapping[Detector, str]) -> tuple[ScoreTable, dict[Detector, Tensor]]:
    """The rows of all backbones' tables, and every leaf's scores of the images that could be read."""
    table = reduce(ScoreTable.join, tables)
    good = table.frame[table.frame["status"] == "ok"]
    columns = {leaf: str(place) for place, leaf in enumerate(found)}
    scores = {
        leaf: torch.from_numpy(good[name].to_numpy(np.float32, copy=True))
        for leaf, name in columns.items()
        if name in good
    }
    return table.select(()), scores


def _checked_scores(detector: Detector, way: str, features: FeatureSet) -> Tensor:
    """Scores of a detector; what goes wrong in a member of a fusion is told with the way to it."""
    if not way:
        return detector.score_features(features)
    try:
        return detector.score_features(features)
    except OODError as error:
        raise type(error)(f"Member {way!r} cannot score: {error}") from error
    except Exception as error:
        raise DataError(f"Member {way!r} fails ({type(error).__name__}: {error}): leave it out.") from error


def fit_detectors(detectors: Mapping[str, Detector], data: Data | None, **extraction: Any) -> None:
    """Fit the detectors that need it, images encoded once per backbone.

    Args:
        detectors: by name; fitted ones are left as they are.
        data: labelled ID images or features; None if there are none.
        **extraction: for `extract`.

    Raises:
        NotFittedError: a detector needs training and `data` is None.
    """
    found = _named_leaves(detectors)
    raw = {detector: name for detector, name in found.items() if not detector.fitted}
    if raw and data is None:
        names = ", ".join(map(repr, raw.values()))
        raise NotFittedError(f"{names} must be fitted: give labelled ID images (fit=, --fit).")
    for detector in [detector for detector in raw if detector.changes_backbone]:
        name = raw.pop(detector)
        if is_features(data):
            raise UsageError(f"{name!r} is fitted on images, not on features: give an image source (fit=, --fit).")
        detector.fit_images(_opened(data, extraction))
    for group, parts in _features_per_backbone(raw, data, extraction) if raw and data is not None else ():
        features = FeatureSet.concatenate(list(parts))
        for detector in group:
            detector.fit_features(features)


def calibrate_detectors(
    detectors: Mapping[str, Detector],
    data: Data,
    *,
    tpr: float = 0.95,
    allow_overlap: bool = False,
    **extraction: Any,
) -> None:
    """Set every detector's threshold on held-out ID images, encoded once per backbone.

    Args:
        detectors: by name, fitted.
        data: ID images or features.
        tpr: share of them to accept.
        allow_overlap: take images that a detector was fitted on, too (see `Detector.calibrate`).
        **extraction: for `extract`.

    Raises:
        DataError: images that a detector was fitted on, or what `Detector.calibrate` raises.
    """
    found = leaves(*detectors.values())
    fusions = [detector for detector in detectors.values() if detector.members]
    shared = leaves(*(member for fusion in fusions for member in fusion.members.values()))
    tables, data_hash = [], ""
    for group, parts in _features_per_backbone(found, data, extraction):
        features = FeatureSet.concatenate(list(parts))
        for leaf in group if not allow_overlap else ():
            leaf._check_held_out(features)
        for leaf in (leaf for leaf in group if not found[leaf]):
            leaf.calibrate(features, tpr, allow_overlap=True)
        if members := [leaf for leaf in group if leaf in shared]:
            tables.append(_scored_rows(members, found, features))
        data_hash = features_hash(features.source, features.ids)
    scores = _joined(tables, found)[1] if shared else {}
    for fusion in fusions:
        fusion._calibrate_members(scores.__getitem__, tpr, data_hash)  # type: ignore[attr-defined]  # a Fusion


def _opened(data: Data | None, extraction: Mapping[str, Any]) -> Any:
    """Images as a source that is read as the options of `extract` say; features, and None, as they are."""
    if data is None or is_features(data):
        return data
    return open_source(data, **{name: extraction.get(name) for name in ("max_pixels", "value_range")})


def _by_name(detectors: Detector | Sequence[Detector] | Mapping[str, Detector]) -> dict[str, Detector]:
    if isinstance(detectors, Detector):
        detectors = [detectors]
    if not isinstance(detectors, Mapping):
        names = [detector.name for detector in detectors]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise UsageError(f"Two detectors are named {doubled.pop()!r}: give a mapping of names to detectors.")
        detectors = dict(zip(names, detectors, strict=True))
    if not detectors:
        raise DataError("There is no detector to evaluate.")
    return dict(detectors)


def _named_leaves(detectors: Mapping[str, Detector]) -> dict[Detector, str]:
    """The detectors that see images, each with its name for messages."""
    own = {detector: name for name, detector in detectors.items()}
    return {leaf: own.get(leaf, way) for leaf, way in leaves(*detectors.values()).items()}


def _features_per_backbone(
    detectors: Mapping[Detector, str], data: Data, extraction: dict[str, Any]
) -> Iterator[tuple[list[Detector], Iterable[FeatureSet]]]:
    """Groups of detectors that share a backbone, with the features all of a group need, in parts."""
    if isinstance(data, FeatureSet):
        yield list(detectors), [data]
        return
    if is_features(data):
        yield from _features_by_fingerprint(detectors, data)
        return
    groups: dict[str, tuple[Backbone, list[Detector]]] = {}
    for detector in detectors:
        backbone = backbone_of(detector)
        groups.setdefault(f"{backbone.fingerprint} {backbone.dtype}", (backbone, []))[1].append(detector)
    source = open_source(data)
    for backbone, group in groups.values():
        needs = frozenset[str]().union(*(detector.needs for detector in group))
        yield group, stream(backbone, source, needs=needs, **extraction)


def is_features(data: object) -> TypeIs[FeatureSet | Sequence[FeatureSet]]:
    """Whether data are features, of one backbone or a list of several."""
    if isinstance(data, list | tuple):
        return bool(data) and all(isinstance(part, FeatureSet) for part in data)
    return isinstance(data, FeatureSet)


def _features_by_fingerprint(
    detectors: Mapping[Detector, str], sets: Sequence[FeatureSet]
) -> Iterator[tuple[list[Detector], list[FeatureSet]]]:
    """Features of several backbones, each with the detectors of that backbone."""
    groups: dict[str, list[Detector]] = {features.fingerprint: [] for features in sets}
    if len(groups) < len(sets):
        raise UsageError("Two of the feature sets are of the same backbone: give one per backbone.")
    for detector, way in detectors.items():
        record = detector._held.record
        if record.get("fingerprint", "") not in groups:
            given = ", ".join(repr(features.backbone) for features in sets)
            raise UsageError(
                f"{way or detector.name!r} is of {record.get('spec', 'an unknown backbone')!r}, of which there are no "
                f"features: these are of {given}."
            )
        groups[record["fingerprint"]].append(detector)
    yield from ((groups[features.fingerprint], [features]) for features in sets if groups[features.fingerprint])


def _by_auroc(metrics: Mapping[str, OODMetrics]) -> list[str]:
    return sorted(metrics, key=lambda name: -metrics[name].mean.auroc)


def _compared(scores: ScoreTable, names: Sequence[str], bootstrap: int, seed: int) -> dict[str, Any] | None:
    """The other detectors against the first, on images that all have scored; None if there is nothing to compare."""
    frame = scores.frame[scores.frame["status"] == "ok"].dropna(subset=list(names))
    parts = {source: frame[frame["source"] == source] for source in scores.sources}
    if len(names) < 2 or not all(len(part) for part in parts.values()):
        return None
    columns = {source: {name: part[name].to_numpy() for name in names} for source, part in parts.items()}
    known = columns.pop("id")
    return paired_bootstrap(known, columns, reference=names[0], bootstrap=bootstrap, seed=seed).to_dict()


def _figures(
    name: str, detector: Detector, metrics: OODMetrics, scores: ScoreTable, accuracy: dict[str, float]
) -> dict[str, Any]:
    content = metrics.to_dict()
    figures = {
        "average": content["average"],
        "per_set": content["per_set"],
        "params": detector.get_params() | detector.stamps,
        "template": detector.template,
        "prompt_hash": _prompt_hash(detector),
    }
    if name in accuracy:
        figures["accuracy"] = accuracy[name]
    if detector.threshold is not None:
        figures |= {"threshold": detector.threshold, "tpr": detector.tpr}
        if detector.calibration is not None:
            figures["calibration"] = detector.calibration.describe()
            accepted = detector.calibration.accepted(torch.from_numpy(scores.scores(name, "id").copy()), _NOMINAL)
            figures["acceptance"] = {"nominal": list(_NOMINAL), "accepted": accepted}
        figures["id_accepted"] = float((scores.scores(name, "id") >= detector.threshold).mean())
    return figures


def _prompt_hash(detector: Detector) -> str | None:
    if not detector.class_names:
        return None
    return hashlib.sha256(json.dumps([detector.template, detector.class_names]).encode()).hexdigest()[:16]


def environment(detectors: Iterable[Detector] = ()) -> dict[str, Any]:
    """Versions, hardware and backbones, for results."""
    names = ("ood-core", "ood-iim", "ood-setar", "ood-hvl", "ood-mofe", "torch", "open-clip-torch", "timm", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {n: v for n in names if (v := _version(n))},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backbones": _backbones(detectors),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _backbones(detectors: Iterable[Detector]) -> list[dict[str, str]]:
    held = [leaf._held.backbone for leaf in leaves(*detectors)]
    loaded = {backbone.fingerprint: backbone for backbone in held if backbone is not None}
    return [backbone.record() | {"device": str(backbone.device)} for backbone in loaded.values()]


def _describe_data(data: Data | None) -> dict[str, Any] | None:
    if data is None:
        return None
    if is_features(data):
        features = data if isinstance(data, FeatureSet) else data[0]
        return {"images": len(features), "fingerprint": features.source}
    source = open_source(data)
    return {"images": len(source), "fingerprint": source.fingerprint}


def image_opener(sets: Mapping[str, Data]) -> Callable[[str, str], Image.Image | None]:
    """(set, id) -> the image, for thumbnails; None where only features are at hand, and in sets that are not given."""
    sources: dict[str, tuple[ImageSource, dict[str, int]]] = {}

    def open_image(name: str, image_id: str) -> Image.Image | None:
        data = sets.get(name)
        if data is None or is_features(data):
            return None
        if name not in sources:
            source = open_source(data)
            sources[name] = (source, {id: index for index, id in enumerate(source.ids)})
        source, index = sources[name]
        return source.open(index[image_id]) if image_id in index else None

    return open_image
