"""Trials of IIM and the paper's studies: train on few shots, judge the six scores, average over seeds."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from ood_core.backbones.base import Backbone
from ood_core.data import FewShot
from ood_core.data.sources import ImageSource
from ood_core.detectors.base import backbone_of
from ood_core.evaluation import evaluate
from ood_core.features import FeatureSet, extract, stream
from ood_core.metrics import evaluate_scores
from ood_core.reproduction.kept import UsedImages, kept_runs, recipe

from ood_iim.detectors import IIM

__all__ = ["STUDIES", "Sets", "summarise", "sweep", "swept_trial", "trial", "within_grid"]

_NO_LOSSES = {"lambda_neg": 0.0, "lambda_div": 0.0}
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    # Table 2: hard negative mining (HNM), negative prompts (NP), and the losses.
    "losses": {
        "L_pos": {**_NO_LOSSES, "hard_negative_mining": False, "negative_prompts": 0},
        "+ HNM": {**_NO_LOSSES, "negative_prompts": 0},
        "+ HNM + NP": _NO_LOSSES,
        "+ HNM + NP + L_neg": {"lambda_div": 0.0},
        "+ HNM + NP + L_div": {"lambda_neg": 0.0},
        "+ HNM + NP + L_neg(all) + L_div": {"region": "all"},
        "all": {},
    },
    # Fig. 4: one setting at a time. alpha needs no training: `sweep`.
    "weights": {
        **{f"lambda_neg={value:g}": {"lambda_neg": value} for value in (0.0, 1.0, 5.0, 10.0)},
        **{f"lambda_div={value:g}": {"lambda_div": value} for value in (0.0, 0.1, 0.5, 1.0)},
        **{f"C_n={value}": {"negative_prompts": value} for value in (50, 100, 300, 500)},
    },
    # Fig. 5: training k, see `within_grid`; the test k are columns of the sweep of each run.
    "k": {f"train_k={value}": {"train_k": value} for value in (1, 5, 10, 20, 50, 90)},
    # Fig. 6: the six scores of the trained model.
    "scores": {"all": {}},
}
"""Name -> label -> options that differ from the defaults. Fig. 3 needs no training: `ood_iim.prototypes`."""

# What computes figures here; `recipe` adds the core's part.
_CODE = ("ood_iim.detectors", "ood_iim.functional", "ood_iim.learner", "ood_iim.options", "ood_iim.studies")


@dataclass(frozen=True)
class Sets:
    """The images of a protocol.

    Attributes:
        train: labelled ID images that shots are drawn from.
        test: ID test images.
        ood: OOD sets by name.
        class_names: in the order of the labels.
    """

    train: ImageSource
    test: ImageSource | FeatureSet
    ood: Mapping[str, ImageSource | FeatureSet]
    class_names: Sequence[str]

    @cached_property
    def judged(self) -> dict[str, UsedImages]:
        """Those that are judged on, for recipes."""
        return {"test": UsedImages(self.test), **{name: UsedImages(images) for name, images in self.ood.items()}}


def within_grid(rows: Mapping[str, Mapping[str, Any]], patches: int) -> dict[str, dict[str, Any]]:
    """A study of the training k on any grid: rows that its patches are too few for become one, at the largest k.

    Args:
        rows: label -> options of `IIM`.
        patches: of the grid.

    Example:
        >>> list(within_grid({"train_k=20": {"train_k": 20}, "train_k=90": {"train_k": 90}}, 64))
        ['train_k=20', 'train_k=32']
    """
    found: dict[str, dict[str, Any]] = {}
    for label, options in rows.items():
        most, _ = IIM(**options)._most_training_k(patches)
        fits = (options.get("train_k") or 0) <= most
        found[label if fits else f"train_k={most}"] = dict(options) if fits else {**options, "train_k": most}
    return found


def trial(
    sets: Sets,
    backbone: Backbone,
    *,
    shots: int,
    seed: int,
    folder: Path,
    options: Mapping[str, Any],
    convention: str = "standard",
    features: bool = False,
    template: str | None = None,
    **extraction: Any,
) -> dict[str, Any]:
    """Train once and judge the six scores; a finished trial is read back from its folder, an interrupted one goes on.

    Args:
        sets: the protocol's images.
        backbone: CLIP-like.
        shots: images per class.
        seed: of shots, start and order.
        folder: for the detector, results.json, scores.parquet, report.html, and trial.json with what all rests on.
        options: of `IIM`.
        convention: of the FPR.
        features: train on the plain features of the shots instead of augmented views.
        template: of the global term.
        **extraction: for `extract`.

    Returns:
        results.json with, besides, "trial" (shots, seed, options and fingerprint), "losses" of the last epoch and
        "epoch_seconds".

    Raises:
        UsageError: the folder has a trial of other settings or images.
    """
    detector = IIM(class_names=sets.class_names, template=template, seed=seed, **options)
    detector.attach(backbone)
    few = FewShot(sets.train, shots, seed)
    made = recipe(
        backbone,
        {"train": few, **sets.judged},
        sets.class_names,
        code=_CODE,
        template=template,
        convention=convention,
        options=detector.get_params(),
        shots=shots,
        features=features,
    )
    described = {"shots": shots, "seed": seed, "options": dict(options), "fingerprint": backbone.fingerprint}

    def make() -> list[dict[str, Any]]:
        results = _trained(detector, few, sets, folder, convention, features, **extraction)
        return [results | {"trial": described}]

    (found,) = kept_runs(folder / "trial.json", made, make)
    return found


def _trained(
    detector: IIM, few: FewShot, sets: Sets, folder: Path, convention: str, features: bool, **extraction: Any
) -> dict[str, Any]:
    """Train, judge and save."""
    started = time.monotonic()
    checkpoint = folder / "checkpoint.safetensors"
    images = extract(backbone_of(detector), few, detector.needs, **extraction) if features else few
    loading = {name: extraction[name] for name in ("cache", "workers") if name in extraction}
    detector.fit(images, checkpoint=checkpoint, **loading)
    seconds = time.monotonic() - started
    results = evaluate(
        detector.variants(), id=sets.test, ood=sets.ood, convention=convention, out=folder, **extraction
    ).results
    detector.save_pretrained(folder / "detector")
    checkpoint.unlink(missing_ok=True)
    return results | {"losses": detector.history[-1], "epoch_seconds": seconds / detector.training.epochs}


def swept_trial(
    sets: Sets,
    backbone: Backbone,
    folder: Path,
    *,
    ks: Sequence[int] | None = None,
    alphas: Sequence[float] = (1.0,),
    **extraction: Any,
) -> list[dict[str, Any]]:
    """`sweep` of a finished trial by the trial's rule of the FPR, kept beside it.

    Args:
        sets: as of the trial.
        backbone: as of the trial.
        folder: of the trial.
        ks: see `sweep`.
        alphas: see `sweep`.
        **extraction: for `extract`.
    """
    rests_on = json.loads((folder / "trial.json").read_text(encoding="utf-8"))["recipe"]

    def make() -> list[dict[str, Any]]:
        detector = IIM.from_pretrained(folder / "detector", backbone=backbone)
        given = {"ks": ks, "alphas": alphas, "convention": rests_on["convention"], **extraction}
        return sweep(detector, id=sets.test, ood=sets.ood, **given)

    return kept_runs(folder / "sweep.json", {"trial": rests_on, "ks": ks, "alphas": alphas}, make)


def summarise(trials: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and spread over trials, by score: "auroc" and "fpr95" of every set and "average", and "accuracy".

    Args:
        trials: results of `trial` that differ in their seed only.

    Returns:
        score -> set -> {"auroc": (mean, standard deviation), "fpr95": ...}; "accuracy" -> (mean, deviation).

    Example:
        >>> one = {"detectors": {"mcm": {"average": {"auroc": 0.9, "fpr95": 0.4}, "per_set": {}}}}
        >>> summarise([one, one])["mcm"]["average"]["auroc"]
        (0.9, 0.0)
    """
    found: dict[str, dict[str, Any]] = {}
    for name in trials[0]["detectors"]:
        figures = [one["detectors"][name] for one in trials]
        per_set = {"average": [f["average"] for f in figures]}
        per_set |= {key: [f["per_set"][key] for f in figures] for key in figures[0]["per_set"]}
        found[name] = {
            key: {measure: _mean_and_spread([f[measure] for f in values]) for measure in ("auroc", "fpr95")}
            for key, values in per_set.items()
        }
        if all("accuracy" in f for f in figures):
            found[name]["accuracy"] = _mean_and_spread([f["accuracy"] for f in figures])
    return found


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def sweep(
    detector: IIM,
    *,
    id: Any,
    ood: Mapping[str, Any],
    ks: Sequence[int] | None = None,
    alphas: Sequence[float] = (0.0, 0.5, 1.0, 1.5),
    temperatures: Sequence[float] = (1.0,),
    convention: str = "standard",
    **extraction: Any,
) -> list[dict[str, Any]]:
    """Judge every combination of k, alpha, temperature and negatives, in the detector's form; images are encoded once.

    Every k comes from one selection at the largest, every alpha from stored terms, every temperature costs one more
    reduction. Choosing by these figures is fair only where the OOD sets are declared as validation data.

    Args:
        detector: a fitted `IIM`.
        id: ID images or features.
        ood: OOD sets by name.
        ks: values of k; None: 1, 2, 5, 10, 20, 50, ... up to the number of patches.
        alphas: factors of the class-to-patch term.
        temperatures: of the score.
        convention: of the FPR.
        **extraction: for `extract`.

    Returns:
        One row per combination: "k", "alpha", "temperature", "negatives", "auroc" and "fpr95" (means over the sets),
        "convention" of the latter, and "per_set".
    """
    parts = {
        name: list(_components(detector, data, ks, temperatures, extraction)) for name, data in {"": id, **ood}.items()
    }
    rows = []
    for t, temperature in enumerate(temperatures):
        terms = {name: [part[t] for part in found] for name, found in parts.items()}
        for k in terms[""][0].ks:
            for alpha in alphas:
                for score, negatives in (("s_mcm", "use"), ("s_mcm*", "ignore")):
                    scores = {n: torch.cat([x.scores(k, alpha)[score] for x in found]) for n, found in terms.items()}
                    judged = evaluate_scores(scores.pop(""), scores, convention=convention).to_dict()
                    rows.append(
                        {"k": k, "alpha": alpha, "temperature": temperature, "negatives": negatives}
                        | {key: judged["average"][key] for key in ("auroc", "fpr95")}
                        | {"convention": convention, "per_set": judged["per_set"]}
                    )
    return rows


def _components(
    detector: IIM, data: Any, ks: Sequence[int] | None, temperatures: Sequence[float], extraction: dict[str, Any]
) -> Iterable[list[Any]]:
    features = (
        [data] if isinstance(data, FeatureSet) else stream(backbone_of(detector), data, detector.needs, **extraction)
    )
    for part in features:
        if len(part):
            wanted = ks or _ladder(part.local.shape[1])
            yield [detector.components(part, ks=wanted, temperature=t) for t in temperatures]


def _ladder(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `most`, which is the last."""
    steps = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
    return sorted({most, *(step for step in steps if step < most)})
