"""Train MoFE and other methods on a benchmark and judge them; figures per run, finished ones kept.

All is kept in OUT/PROTOCOL/BACKBONE/SETTING: seed-0.json, ... or, where nothing is drawn, all.json, and beside each the
scores of all images (.parquet).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ood_core.detectors import create_detector
from ood_core.detectors.base import Detector
from ood_core.detectors.linear_probe import LinearProbe
from ood_core.evaluation import evaluate, fit_detectors
from ood_core.reproduction import studies
from ood_core.reproduction.kept import Run, kept_runs
from ood_core.reproduction.studies import spread
from ood_core.scores import ScoreTable

from ood_mofe.detectors import MoFE
from ood_mofe.options import Mixture
from ood_mofe.partition import initial_groups

__all__ = ["KS", "Bench", "Setting", "check_groups", "summarise", "variants"]

KS = (10, 50, 100, 200, 500, 1000)
"""Neighbours that every trained MoFE is judged with, as the scores "k=10", ..., as far as its banks reach."""

_CODE = (
    "ood_mofe.runner",
    *(f"ood_mofe.{name}" for name in ("detectors", "experts", "functional", "groups", "model", "ops")),
    *("ood_mofe.options", "ood_mofe.partition", "ood_mofe.training"),
)
"""What the figures are computed by; those of other methods by the first alone, and the core."""

_FEW = 3  # experts for the hundred classes of ImageNet-100


def variants(detector: MoFE) -> dict[str, MoFE]:
    """One training read in every way that it allows, which needs no other fit.

    Args:
        detector: fitted.

    Returns:
        Copies without calibration, but for itself where nothing differs: "knn" (bank of the expert) and, where there
        are several experts, "knn_global"; "msp", "max_logit" and "energy"; "others" with experts; "mos" with heads of
        groups; "atd" and "ctw" with texts.

    Example:
        >>> evaluate(variants(detector), id="test/", ood={"textures": "dtd/"})  # doctest: +SKIP
    """
    mixture = detector.mixture
    several, heads = mixture.moe and len(set(detector.group.tolist())) > 1, mixture.moe or mixture.group_heads
    ways: dict[str, dict[str, Any]] = {"knn": {"scorer": "knn", "bank": "expert"}}
    if several:
        ways["knn_global"] = {"scorer": "knn", "bank": "global"}
    names = ["msp", "max_logit", "energy", *["others"] * mixture.moe, *["mos"] * heads]
    names += ["atd", "ctw"] if detector.scoring.texts else []
    ways |= {name: {"scorer": name} for name in names}
    return {name: _changed(detector, **options) for name, options in ways.items()}


def _changed(detector: Any, **options: Any) -> Any:
    same = all(getattr(detector, name) == value for name, value in options.items())
    return detector if same else copy.copy(detector).set_params(**options)


def check_groups(detector: MoFE) -> None:
    """Refuse what no features will mend, as `partition.initial_groups` does, before any image is read."""
    mixture = detector.mixture
    if mixture.moe or mixture.group_heads:
        initial_groups(detector.class_names, mixture.experts, grouping=mixture.grouping, groups=mixture.groups)


class Setting(NamedTuple):
    """A row of a table: what is trained, with options that differ from the benchmark's, and the score that counts."""

    detector: str
    score: str
    options: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Bench(studies.Bench):
    """A backbone on a benchmark; `params` are of every MoFE, behind those of a setting and before the benchmark's.

    Attributes:
        keep: save every trained detector, too.
    """

    keep: bool = False

    def runs(self, setting: Setting) -> list[Run]:
        """A mapping per seed and score of the setting's training, all scores included.

        Each has "seed" (None where nothing is drawn), "score", "accuracy" (None where it is not known), "average" and
        "per_set" with "fpr95" and "auroc" as fractions, and "last_epoch" of the training.

        Raises:
            UsageError: an option that is not there or cannot work, or figures of other settings in the folder.
            MissingDataError: no training images.
        """
        return [run for seed in self._seeds(setting) for run in self._run(setting, seed)]

    def score_tables(self, setting: Setting) -> list[ScoreTable]:
        """The scores of all test images, one table per seed, a column per score; raises as `runs`."""
        self.runs(setting)
        return [ScoreTable.read(self._file(setting, seed).with_suffix(".parquet")) for seed in self._seeds(setting)]

    def check(self, setting: Setting) -> None:
        """Find mistakes before hours are spent: as `runs` raises."""
        detector = self._made(setting, None)
        if isinstance(detector, MoFE):
            check_groups(detector)
        self.train()

    def _seeds(self, setting: Setting) -> Sequence[int | None]:
        return self.seeds if setting.detector == "mofe" else (None,)

    def _file(self, setting: Setting, seed: int | None) -> Path:
        return self._folder(setting) / ("all.json" if seed is None else f"seed-{seed}.json")

    def _run(self, setting: Setting, seed: int | None) -> list[Run]:
        file = self._file(setting, seed)
        detector = self._made(setting, seed)
        return kept_runs(file, self._recipe(detector), partial(self._judge, detector, seed, file))

    # ---- what is made

    @cached_property
    def _preset(self) -> dict[str, Any]:
        """The paper's where it says so: groups from WordNet and features, and CLIP's classes told apart by texts.

        Fewer experts for a hundred classes are ours, see `notes`.
        """
        grouping = {"grouping": "both"} if self.protocol.wnids and "groups" not in self.params else {}
        texts = {"classifier": "text"} if "text" in self.backbone.capabilities else {}
        return grouping | texts | ({"experts": _FEW} if self.protocol.name == "imagenet-100" else {})

    @property
    def notes(self) -> list[str]:
        """What is chosen where the paper says nothing."""
        if "experts" in self.params or "experts" not in self._preset:
            return []
        return [
            f"{self.protocol.title} is divided among {_FEW} experts, which is ours: the paper gives no number for it, "
            f"and {Mixture().experts} is its best on ImageNet-1k; --param experts=N takes another."
        ]

    @cached_property
    def _common(self) -> dict[str, Any]:
        """Options of MoFE where a setting says nothing."""
        return self._preset | dict(self.params)

    def _made(self, setting: Setting, seed: int | None) -> Any:
        """A detector before its fit; MoFE knows classes by their WordNet ids, whose groups are those of WordNet."""
        mofe = setting.detector == "mofe"
        options = {**self._common, **setting.options} if mofe else setting.options
        if mofe and seed is not None:
            options = {**options, "seed": seed}
        names = (self.protocol.by_wnid() if mofe else self.protocol).class_names
        return create_detector(setting.detector, backbone=self.backbone, class_names=names, **options)

    def _folder(self, setting: Setting) -> Path:
        """Named after what differs, so that tables share trainings."""
        usual = {**MoFE().get_params(), **self._common} if setting.detector == "mofe" else {}
        other = [f"{name}={value}" for name, value in setting.options.items() if usual.get(name) != value]
        return self.folder / ",".join([setting.detector, *other])

    def _recipe(self, detector: Detector) -> dict[str, Any]:
        """Everything that the figures of a detector rest on."""
        options = detector.get_params()
        return self.recipe(
            {"train": self.protocol.train, "test": self.protocol.test, **self.protocol.ood},
            detector.class_names,
            code=_CODE if isinstance(detector, MoFE) else _CODE[:1],
            template=detector.template or detector.default_template,
            options=options,
            detector=detector.name,
            files=_digests(options),
        )

    # ---- figures

    def _judge(self, detector: Any, seed: int | None, file: Path) -> list[Run]:
        self.say(f"{self.protocol.name}, {file.parent.name}, {file.stem}: {file}")
        sets, extraction = self.protocol, dict(self.extraction)
        if isinstance(detector, MoFE):
            sets = sets.by_wnid()
            self._train(detector, sets.train, file)
            extraction["cache"] = None  # nothing else has the features of these experts
        else:
            fit_detectors({detector.name: detector}, sets.train, **extraction)
        options = {"convention": self.convention, **extraction}
        judged = evaluate(_scores(detector), id=sets.test, ood=sets.ood, **options)
        judged.scores.write(file.with_suffix(".parquet"))
        return [
            {"seed": seed, "score": score, "accuracy": figures.get("accuracy")}
            | {part: figures[part] for part in ("average", "per_set")}
            | {"last_epoch": detector.history[-1] if isinstance(detector, MoFE) else {}}
            for score, figures in judged.results["detectors"].items()
        ]

    def _train(self, detector: MoFE, images: Any, file: Path) -> None:
        """Go on from a checkpoint beside the figures, which is removed at the end."""
        checkpoint = file.with_suffix(".safetensors")
        loading = {name: self.extraction[name] for name in ("cache", "workers") if name in self.extraction}
        detector.fit(images, checkpoint=checkpoint, **loading)
        if self.keep:
            detector.save_pretrained(file.with_suffix(""))
        checkpoint.unlink(missing_ok=True)


def _digests(options: Mapping[str, Any]) -> dict[str, str]:
    """Of the files that options name: they may be written anew."""
    files = {name: options[name] for name in ("groups", "texts") if isinstance(options.get(name), str)}
    return {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items()}


def _scores(detector: Detector) -> dict[str, Detector]:
    """All scores of one fit."""
    if isinstance(detector, MoFE):
        largest = int(detector.state["bank_expert"].bincount().max())
        ks = [k for below, k in zip((0, *KS), KS, strict=False) if below < largest]
        return {**variants(detector), **{f"k={k}": _changed(detector, scorer="knn", k=k) for k in ks}}
    if isinstance(detector, LinearProbe):
        return {scorer: _changed(detector, scorer=scorer) for scorer in ("msp", "max_logit", "energy")}
    return {detector.name: detector}


def summarise(runs: Sequence[Run], score: str) -> dict[str, Any]:
    """The figures of one score over runs.

    Args:
        runs: of `Bench.runs`.
        score: one of theirs.

    Returns:
        "sets" (by name) and "average" with "fpr95" and "auroc", and "accuracy", each as `spread` gives it; "last_epoch"
        of each run.
    """
    chosen = [run for run in runs if run["score"] == score]
    return {
        "sets": {name: _spreads([run["per_set"][name] for run in chosen]) for name in chosen[0]["per_set"]},
        "average": _spreads([run["average"] for run in chosen]),
        "accuracy": spread([run["accuracy"] for run in chosen]),
        "last_epoch": [run["last_epoch"] for run in chosen],
    }


def _spreads(figures: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {measure: spread([figure[measure] for figure in figures]) for measure in ("fpr95", "auroc")}
