"""Trials of IIM and the paper's studies: train on few shots, judge the six scores, average over seeds."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ood_core._files import write_json
from ood_core.backbones.base import Backbone
from ood_core.data import FewShot
from ood_core.data.sources import ImageSource
from ood_core.detectors.zero_shot import default_k
from ood_core.evaluation import evaluate
from ood_core.features import FeatureSet, extract, stream
from ood_core.metrics import evaluate_scores
from torch import Tensor

from ood_iim.detectors import IIM

__all__ = ["STUDIES", "Sets", "local_map", "prototypes", "summarise", "sweep", "trial"]

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
    # Fig. 5: training k; the test k are columns of the sweep of each run.
    "k": {f"train_k={value}": {"train_k": value} for value in (1, 5, 10, 20, 50, 90)},
    # Fig. 6: the six scores of the trained model.
    "scores": {"all": {}},
    # Fig. 3: likeness of class prototypes, and local features in two dimensions.
    "prototypes": {"all": {}},
}
"""Name -> label -> options that differ from the paper's defaults."""


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
    """Train once and judge the six scores; a finished trial is read back from its folder, an interrupted one resumes.

    Args:
        sets: the protocol's images.
        backbone: CLIP-like.
        shots: images per class.
        seed: of shots, start and order.
        folder: for the detector, results.json, scores.parquet and report.html.
        options: of `IIM`.
        convention: of the FPR.
        features: train on the plain features of the shots instead of augmented views.
        template: of the global term.
        **extraction: for `extract`.

    Returns:
        results.json with, besides, "shots", "seed", "options", "losses" of the last epoch and "epoch_seconds".
    """
    described = {"shots": shots, "seed": seed, "options": dict(options), "fingerprint": backbone.fingerprint}
    file = folder / "trial.json"
    if file.exists() and (found := json.loads(file.read_text()))["trial"] == described:
        return found
    detector = IIM(class_names=sets.class_names, template=template, seed=seed, **options)
    detector._set_backbone(backbone)
    few = FewShot(sets.train, shots, seed)
    started = time.monotonic()
    checkpoint = folder / "checkpoint.safetensors"
    images = extract(backbone, few, detector.needs, **extraction) if features else few
    detector.fit(images, checkpoint=checkpoint, cache=extraction.get("cache"))
    seconds = time.monotonic() - started
    results = evaluate(
        detector.variants(), id=sets.test, ood=sets.ood, convention=convention, out=folder, **extraction
    ).results
    detector.save_pretrained(folder / "detector")
    checkpoint.unlink(missing_ok=True)
    results |= {
        "trial": described,
        "losses": detector.history[-1],
        "epoch_seconds": seconds / detector.epochs,
    }
    write_json(file, results)
    return results


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
    """Judge every combination of k, alpha, temperature and negatives; images are encoded once.

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
        "per_set".
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
                        | {"per_set": judged["per_set"]}
                    )
    return rows


def _components(
    detector: IIM, data: Any, ks: Sequence[int] | None, temperatures: Sequence[float], extraction: dict[str, Any]
) -> Iterable[list[Any]]:
    features = (
        [data]
        if isinstance(data, FeatureSet)
        else stream(detector._required_backbone(), data, detector.needs, **extraction)
    )
    for part in features:
        if len(part):
            wanted = ks or _ladder(part.local.shape[1])
            yield [detector.components(part, ks=wanted, temperature=t) for t in temperatures]


def _ladder(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `most`, which is the last."""
    steps = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
    return sorted({most, *(step for step in steps if step < most)})


def prototypes(detector: IIM) -> dict[str, float]:
    """Mean and largest cosine between different class texts, hand-written and learned (Fig. 3).

    Args:
        detector: fitted.

    Returns:
        "template_mean", "template_max", "learned_mean", "learned_max", and "negatives_mean" if there are any: the
        mean of each negative's largest cosine with a learned class.
    """
    found: dict[str, float] = {}
    for name, key in (("template", "text"), ("learned", "local_text")):
        cosines = _off_diagonal(detector.state[key])
        found |= {f"{name}_mean": cosines.mean().item(), f"{name}_max": cosines.max().item()}
    if "negatives" in detector.state:
        nearest = (detector.state["negatives"] @ detector.state["local_text"].T).amax(1)
        found["negatives_mean"] = nearest.mean().item()
    return found


def local_map(detector: IIM, features: FeatureSet, *, most: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """Mined patches in two dimensions by t-SNE (Fig. 3): the k best of each image's class, and the k behind them.

    Args:
        detector: fitted.
        features: labelled, with local features.
        most: patches at most, taken evenly.
        seed: of the t-SNE.

    Returns:
        One row per patch: "x", "y", "class", "kind" ("positive" or "negative").
    """
    from sklearn.manifold import TSNE

    k = default_k(detector.train_k, features.local.shape[1])
    text = detector.state["local_text"][detector._class_labels(features)]
    order = (features.local @ text[..., None]).squeeze(-1).argsort(1, descending=True)[:, : 2 * k]
    patches = features.local.gather(1, order[..., None].expand(-1, -1, features.local.shape[2])).flatten(0, 1)
    chosen = torch.linspace(0, len(patches) - 1, min(most, len(patches))).long()
    perplexity = min(30.0, (len(chosen) - 1) / 3)
    flat = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed).fit_transform(
        patches[chosen].numpy()
    )
    width = order.shape[1]
    return [
        {
            "x": float(x),
            "y": float(y),
            "class": features.label_names[features.labels[index // width]],
            "kind": "positive" if index % width < k else "negative",
        }
        for (x, y), index in zip(flat, chosen.tolist(), strict=True)
    ]


def _off_diagonal(x: Tensor) -> Tensor:
    unit = F.normalize(x, dim=-1)
    return (unit @ unit.T)[~torch.eye(len(x), dtype=torch.bool)]
