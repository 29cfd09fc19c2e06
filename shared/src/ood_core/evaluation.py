"""The one loop that scores: detectors on an ID test set and OOD sets, to metrics, tables and a report."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ood_core.backbones.base import Backbone
from ood_core.calibration import features_hash
from ood_core.data import open_source
from ood_core.data.sources import ImageSource
from ood_core.detectors.base import Detector
from ood_core.errors import DataError, NotFittedError, OODError, UsageError
from ood_core.features import FeatureSet, count_notes, stream
from ood_core.files import write_json
from ood_core.metrics import OODMetrics, evaluate_scores, paired_bootstrap
from ood_core.scores import ScoreTable

__all__ = ["Evaluation", "calibrate_detectors", "environment", "evaluate", "fit_detectors", "score"]

Data = Any
"""An image source, folder, manifest, parquet file, list of PIL images, or features extracted already; for detectors
of several backbones a list of features, one `FeatureSet` per backbone."""

_NOMINAL = tuple(step / 40 for step in range(1, 41))
"""TPRs of the calibration curve: steps of 2.5 %, so that 95 % is among them."""

MEMBER = " > "
"""Between the name of a fusion and that of its member, in the paths of `Detector._leaves`."""


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
    set_kinds: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
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
        set_kinds: OOD set -> "near" or "far", for the report.
        notes: sentences that belong to the results, for the report.
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
        "set_kinds": dict(set_kinds or {}),
        "notes": list(notes),
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
    leaves = _leaves(detectors)
    table, counts = score_leaves(leaves, data, source=source, judged=detectors, classify=classify, **extraction)
    return _assembled(table, detectors), counts


def score_leaves(
    leaves: Mapping[str, Detector],
    data: Data,
    *,
    source: str = "id",
    judged: Collection[str] = (),
    classify: bool = False,
    **extraction: Any,
) -> tuple[ScoreTable, dict[str, Any]]:
    """`score` for detectors that see images, a member of several fusions only once.

    Args:
        leaves: by path (`Detector._leaves`).
        data: the images or their features.
        source: name of the set in the table.
        judged: paths that are detectors of their own: what they predict for labelled images is told.
        classify: what they predict for other images too.
        **extraction: for `extract`.

    Returns:
        The table, one column per path, and what the set held.
    """
    unique = _unique(leaves, judged)
    tables: list[ScoreTable] = []
    correct: dict[str, list[Tensor]] = {}
    predicted: dict[str, list[Tensor]] = {}
    for group, parts in _features_per_backbone(unique, data, extraction):
        rows, counts, fingerprint = [], [0, 0], ""
        notes: list[tuple[str, str]] = []
        for part in parts:
            scores = {path: checked_scores(path, leaf, part) for path, leaf in group.items() if len(part)}
            rows.append(ScoreTable.of(part, scores, source=source))
            asked = judged if len(part) and (classify or part.labels is not None) else ()
            for path, leaf in group.items():
                if path in asked and (classes := leaf.predict(part)) is not None:
                    predicted.setdefault(path, []).append(classes)
                    if (hits := leaf._hits(part, classes)) is not None:
                        correct.setdefault(path, []).append(hits)
            counts = [counts[0] + len(part), counts[1] + len(part.failures)]
            notes += part.notes
            fingerprint = part.source
        tables.append(ScoreTable.concatenate(rows))
    if not counts[0]:
        raise DataError(f"None of the {counts[1]} images of {source!r} could be decoded: {rows[0].frame['status'][0]}")
    return _with_every_path(_joined(tables), leaves, unique), {
        "images": sum(counts),
        "scored": counts[0],
        "failures": counts[1],
        "fingerprint": fingerprint,
        "notes": count_notes(notes),
        "predicted": {name: torch.cat(classes) for name, classes in predicted.items()},
        "accuracy": {name: torch.cat(hits).double().mean().item() for name, hits in correct.items()},
    }


def _leaves(detectors: Mapping[str, Detector]) -> dict[str, Detector]:
    return {path: leaf for name, detector in detectors.items() for path, leaf in detector._leaves(name).items()}


def _unique(leaves: Mapping[str, Detector], judged: Collection[str]) -> dict[str, Detector]:
    """The detectors to run: all judged ones, and members that are neither among these nor a member twice."""
    chosen = {path: leaf for path, leaf in leaves.items() if path in judged}
    seen = set(map(id, chosen.values()))
    for path, leaf in leaves.items():
        if id(leaf) not in seen:
            chosen[path] = leaf
            seen.add(id(leaf))
    return chosen


def _with_every_path(table: ScoreTable, leaves: Mapping[str, Detector], unique: Mapping[str, Detector]) -> ScoreTable:
    own = {id(leaf): path for path, leaf in unique.items()}
    others = {path: table.frame[own[id(leaf)]] for path, leaf in leaves.items() if path not in unique}
    return ScoreTable(table.frame.assign(**others)) if others else table


def _joined(tables: Sequence[ScoreTable]) -> ScoreTable:
    table = tables[0]
    for other in tables[1:]:
        table = table.join(other)
    return table


def _assembled(table: ScoreTable, detectors: Mapping[str, Detector]) -> ScoreTable:
    """The table of the detectors from that of their leaves."""
    composed = {name: detector for name, detector in detectors.items() if detector.members}
    if not composed:
        return table
    columns, made = columns_of(table), {}
    for name, detector in composed.items():
        made[name] = np.full(len(table.frame), np.nan, dtype=np.float32)
        made[name][table.frame["status"] == "ok"] = detector._assemble(name, columns).numpy()
    return ScoreTable(table.frame.assign(**made)).select(detectors)


def columns_of(table: ScoreTable) -> dict[str, Tensor]:
    """The scores of every column, of the images that could be read."""
    frame = table.frame[table.frame["status"] == "ok"]
    return {name: torch.from_numpy(frame[name].to_numpy(np.float32, copy=True)) for name in table.detectors}


def checked_scores(path: str, detector: Detector, features: FeatureSet) -> Tensor:
    """Scores of a detector; what goes wrong in a member of a fusion is told with its name."""
    if MEMBER not in path:
        return detector.score_features(features)
    name = path.partition(MEMBER)[2]
    try:
        return detector.score_features(features)
    except OODError as error:
        raise type(error)(f"Member {name!r} cannot score: {error}") from error
    except Exception as error:
        raise DataError(f"Member {name!r} fails ({type(error).__name__}: {error}): leave it out.") from error


def fit_detectors(detectors: Mapping[str, Detector], data: Data | None, **extraction: Any) -> None:
    """Fit the detectors that need it, images encoded once per backbone.

    Args:
        detectors: by name; fitted ones are left as they are.
        data: labelled ID images or features; None if there are none.
        **extraction: for `extract`.

    Raises:
        NotFittedError: a detector needs training and `data` is None.
    """
    leaves = _unique(_leaves(detectors), detectors)
    raw = {name: detector for name, detector in leaves.items() if not detector.fitted}
    if raw and data is None:
        raise NotFittedError(f"{', '.join(map(repr, raw))} must be fitted: give labelled ID images (fit=, --fit).")
    for name in [name for name, detector in raw.items() if detector.fits_on_images]:
        if is_features(data):
            raise UsageError(f"{name!r} is fitted on images, not on features: give an image source (fit=, --fit).")
        raw.pop(name).fit(_opened(data, extraction))
    for group, parts in _features_per_backbone(raw, data, extraction) if raw else ():
        features = FeatureSet.concatenate(list(parts))
        for detector in group.values():
            detector.fit(features)


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
    leaves = _leaves(detectors)
    unique = _unique(leaves, detectors)
    shared = {id(leaf) for path, leaf in leaves.items() if path not in detectors}
    tables, data_hash = [], ""
    for group, parts in _features_per_backbone(unique, data, extraction):
        features = FeatureSet.concatenate(list(parts))
        for leaf in group.values() if not allow_overlap else ():
            leaf._check_held_out(features)
        for leaf in (leaf for path, leaf in group.items() if path in detectors):
            leaf.calibrate(features, tpr, allow_overlap=True)
        if members := [path for path, leaf in group.items() if id(leaf) in shared]:
            tables.append(ScoreTable.of(features, {p: checked_scores(p, group[p], features) for p in members}))
        data_hash = features_hash(features.source, features.ids)
    columns = columns_of(_with_every_path(_joined(tables), leaves, unique)) if shared else {}
    for name, detector in detectors.items():
        if detector.members:
            detector._calibrate_members(name, columns, tpr, data_hash)  # type: ignore[attr-defined]  # a Fusion


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


def _features_per_backbone(
    detectors: Mapping[str, Detector], data: Data, extraction: dict[str, Any]
) -> Iterator[tuple[dict[str, Detector], Iterable[FeatureSet]]]:
    """Groups of detectors that share a backbone, with the features all of a group need, in parts."""
    if isinstance(data, FeatureSet):
        yield dict(detectors), [data]
        return
    if is_features(data):
        yield from _features_by_fingerprint(detectors, data)
        return
    groups: dict[str, tuple[Backbone, dict[str, Detector]]] = {}
    for name, detector in detectors.items():
        backbone = detector.require_backbone()
        groups.setdefault(f"{backbone.fingerprint} {backbone.dtype}", (backbone, {}))[1][name] = detector
    source = open_source(data)
    for backbone, group in groups.values():
        needs = frozenset[str]().union(*(detector.needs for detector in group.values()))
        yield group, stream(backbone, source, needs=needs, **extraction)


def is_features(data: Data) -> bool:
    """Whether data are features, of one backbone or a list of several."""
    if isinstance(data, list | tuple):
        return bool(data) and all(isinstance(part, FeatureSet) for part in data)
    return isinstance(data, FeatureSet)


def _features_by_fingerprint(
    detectors: Mapping[str, Detector], sets: Sequence[FeatureSet]
) -> Iterator[tuple[dict[str, Detector], list[FeatureSet]]]:
    """Features of several backbones, each with the detectors of that backbone."""
    groups: dict[str, dict[str, Detector]] = {features.fingerprint: {} for features in sets}
    if len(groups) < len(sets):
        raise UsageError("Two of the feature sets are of the same backbone: give one per backbone.")
    for name, detector in detectors.items():
        fingerprint = detector._backbone_record.get("fingerprint", "")
        if fingerprint not in groups:
            wanted = detector._backbone_record.get("spec", "an unknown backbone")
            given = ", ".join(repr(features.backbone) for features in sets)
            raise UsageError(f"{name!r} is of {wanted!r}, of which there are no features: these are of {given}.")
        groups[fingerprint][name] = detector
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
    found = {}
    for detector in _leaves({str(i): detector for i, detector in enumerate(detectors)}).values():
        if detector._backbone is not None:
            backbone = detector._backbone
            found[backbone.fingerprint] = backbone.record() | {"device": str(backbone.device)}
    return list(found.values())


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
        if name not in sets or is_features(sets[name]):
            return None
        if name not in sources:
            source = open_source(sets[name])
            sources[name] = (source, {id: index for index, id in enumerate(source.ids)})
        source, index = sources[name]
        return source.open(index[image_id]) if image_id in index else None

    return open_image
