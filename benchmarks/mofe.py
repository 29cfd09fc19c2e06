"""MoFE and Dynamic-beta Mixup on the protocol `tiny-imagenet-100`, beside its baselines on the same image tower.

    uv run python benchmarks/mofe.py --packs ../shared/data --work ~/.cache/ood-mofe

Experts learn from the split `fit` (50 images per ID class). Every run is kept in --work and read back. The trunk below
the last block is the same for all: its tokens of the test sets are computed once. Writes benchmarks/results/mofe.json,
which `tools/make_docs.py` turns into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import publish
from ood_core import FeatureSet, create_backbone, create_detector, evaluate
from ood_core.backbones.base import Backbone
from ood_core.data import load_batches
from ood_core.data.sources import ImageSource
from ood_core.detectors.base import Detector
from ood_core.evaluation import environment
from ood_core.protocols import find_protocol
from ood_core.reproduction.kept import UsedImages, kept_runs, recipe
from ood_mofe.functional import wordnet_groups
from ood_mofe.partition import imagenet_edges
from ood_mofe.plot import draw_features
from ood_mofe.runner import variants
from tiny_imagenet_100 import fit_images, test_sets, with_far_mean

RESULT = Path(__file__).parent / "results" / "mofe.json"
PICTURE = Path(__file__).parents[1] / "docs" / "mofe_features.png"
MAIN: dict[str, dict[str, Any]] = {
    "naive fine-tuning": {"moe": False, "mixup": False},
    "MOS": {"moe": False, "mixup": False, "group_heads": True},
    "MoFE": {"mixup": False},
    # A control, at a rate that moves no weight: router, heads and the banks per expert alone. Its global bank is kNN on
    # the frozen backbone with the same images.
    "frozen blocks": {"mixup": False, "learning_rate": 1e-12},
    # Table 6 of the paper, "without D-beta" and "without Reg", beside the whole of it.
    "plain mixup": {"moe": False, "dynamic": False},
    "no regulariser": {"moe": False, "reg": "none"},
    "Dynamic-beta Mixup": {"moe": False},
    "MoFE + Dynamic-beta Mixup": {},
}
VARIATIONS: dict[str, dict[str, Any]] = {
    **{f"{e} experts": {"experts": e, "mixup": False} for e in (5, 1, 2, 3, 7, 8, 9)},
    "rates x 0.1": {"learning_rate": 1e-5, "head_learning_rate": 1e-3, "mixup": False},
    "rates x 3": {"learning_rate": 3e-4, "head_learning_rate": 3e-2, "mixup": False},
    "grouping by clustering alone": {"grouping": "clustering", "groups": None, "mixup": False},
    "grouping by WordNet alone": {"grouping": "given", "mixup": False},
    "router without norm": {"router_norm": "none", "mixup": False},
    "mixup as in the main rows": {"moe": False},
    "regulariser on the normed token": {"moe": False, "reg_on": "post_norm"},
}
K = 50  # neighbour of kNN, frozen and trained
SHOWN = "MoFE + Dynamic-beta Mixup"  # in the picture
FROZEN: dict[str, tuple[str, dict[str, Any]]] = {
    "knn": ("knn", {"k": K}),
    "msp of a linear probe": ("linear_probe", {}),
    "max_logit of a linear probe": ("linear_probe", {"scorer": "max_logit"}),
    "energy of a linear probe": ("linear_probe", {"scorer": "energy"}),
}


class Sets:
    """Tokens before the last block of every set."""

    def __init__(
        self, backbone: Backbone, fit: ImageSource, wnids: Sequence[str], tests: Mapping[str, ImageSource]
    ) -> None:
        self.backbone, self.fit, self.wnids = backbone, fit, list(wnids)
        self.used = {name: UsedImages(source) for name, source in {"fit": fit, **tests}.items()}
        self.kept = {name: self._read(source) for name, source in tests.items()}

    @classmethod
    def of_packs(cls, backbone: Backbone, packs: Path) -> Sets:
        """Those of the protocol."""
        wnids = find_protocol("tiny-imagenet-100", packs).wnids
        return cls(backbone, fit_images(packs), wnids, test_sets(packs))

    @torch.no_grad()
    def _read(self, source: ImageSource) -> tuple[FeatureSet, torch.Tensor]:
        batches = load_batches(source, self.backbone.transform, batch_size=100, progress=False)
        tokens = torch.cat([self.backbone.prefix(self.backbone.prepare(batch.pixels)) for batch in batches])
        labels = None if source.labels is None else torch.as_tensor(source.labels)
        return FeatureSet(list(source.ids), labels, list(source.label_names), source=source.fingerprint), tokens

    @torch.no_grad()
    def of_experts(self, detector: Any) -> dict[str, FeatureSet]:
        """What a fitted MoFE reads."""
        network, fingerprint = detector.network(), detector.backbone.fingerprint
        found = {}
        for name, (plain, tokens) in self.kept.items():
            parts = [network.features(part) for part in tokens.split(500)]
            extra = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            found[name] = replace(plain, extra=extra, fingerprint=fingerprint)
        return found

    def of_backbone(self) -> dict[str, FeatureSet]:
        """The class token behind the frozen last block and norm, as "image"."""
        return {name: replace(plain, image=self._token(tokens)) for name, (plain, tokens) in self.kept.items()}

    def frozen_fit(self) -> FeatureSet:
        """The same of the training images."""
        plain, tokens = self._read(self.fit)
        return replace(plain, image=self._token(tokens))

    @torch.no_grad()
    def _token(self, tokens: torch.Tensor) -> torch.Tensor:
        block, norm = self.backbone.last_block, self.backbone.final_norm
        return torch.cat([F.normalize(norm(block(part)[:, 0]).float(), dim=1) for part in tokens.split(500)])


def judge(detectors: Mapping[str, Detector], features: dict[str, FeatureSet]) -> dict[str, Any]:
    features = dict(features)
    return with_far_mean(evaluate(detectors, id=features.pop("id"), ood=features).results["detectors"])


def word_groups(sets: Sets, experts: int) -> dict[str, int]:
    """WordNet's groups of the ID classes by name: the pack's labels are names, WordNet's are ids."""
    groups = wordnet_groups(imagenet_edges(), sets.wnids, experts).tolist()
    return dict(zip(sets.fit.label_names, groups, strict=True))


def options_of(sets: Sets, row: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a row's MoFE: what it varies, and WordNet's groups where it has any."""
    chosen = {**common, **row}
    if "groups" not in chosen and (chosen.get("moe", True) or chosen.get("group_heads")):
        chosen = {"grouping": "both", **chosen, "groups": word_groups(sets, chosen["experts"])}
    return {name: value for name, value in chosen.items() if value is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--sweep-epochs", type=int, default=5, help="of the variations, one seed each")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--head-learning-rate", type=float, default=1e-2)
    parser.add_argument("--augment", action="store_true", help="new crops in every epoch; else tokens are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mixed-seeds", type=int, help="as many where images are mixed, which takes minutes")
    parser.add_argument("--which", nargs="+", default=["frozen", "main", "variations"])
    parser.add_argument("--only", nargs="+", help="of the rows")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PICTURE, help="picture of the features")
    args = parser.parse_args()
    backbone = create_backbone(args.backbone, dtype="float32")
    work, sets = args.work.expanduser() / backbone.fingerprint[:12], Sets.of_packs(backbone, args.packs)
    common = {name: getattr(args, name) for name in ("batch_size", "learning_rate", "head_learning_rate", "augment")}
    common |= {"k": K}
    runs: dict[str, list[dict[str, Any]]] = {}
    swept: dict[str, list[dict[str, Any]]] = {}
    dimensions = {"frozen": effective_dimensions(sets.of_backbone()["id"].image)}
    if "frozen" in args.which:
        train = sets.frozen_fit()
        made = {name: create_detector(method, **options).fit(train) for name, (method, options) in FROZEN.items()}
        runs["frozen"] = [{"seed": None, "scores": judge(made, sets.of_backbone())}]
        _tell("frozen", runs["frozen"][-1])
    seeds_of = {False: args.seeds, True: args.seeds[: args.mixed_seeds]}
    rows = [(runs, label, of, args.epochs, seeds_of[of.get("mixup", True)]) for label, of in MAIN.items()]
    sweeps = [(swept, label, of, args.sweep_epochs, args.seeds[:1]) for label, of in VARIATIONS.items()]
    for found, label, options, epochs, seeds in rows * ("main" in args.which) + sweeps * ("variations" in args.which):
        if args.only and label not in args.only:
            continue
        for seed in seeds:
            chosen = options_of(sets, options, common | {"experts": args.experts, "epochs": epochs, "seed": seed})
            kind = f"{label}-{epochs}-{'augment' if args.augment else 'plain'}".replace(" ", "-")
            folder = work / kind / f"{seed}"
            found.setdefault(label, []).append(_run(folder, sets, backbone, chosen))
            _tell(label, found[label][-1])
            if found is runs and seed == seeds[0]:
                detector = fitted(folder, sets, backbone, chosen)
                dimensions[label] = effective_dimensions(sets.of_experts(detector)["id"].extra["token"])
                if label == SHOWN and args.plot:
                    plot(sets, detector, args.plot)
    settings = common | {"epochs": args.epochs, "sweep_epochs": args.sweep_epochs, "experts": args.experts}
    settings |= {"images": len(sets.fit)}
    about = environment() | {"backbone": {"spec": args.backbone, "fingerprint": backbone.fingerprint}}
    for run in (run for made in (*runs.values(), *swept.values()) for run in made):
        run.pop("history", None)  # long, as the options are; both in --work
        for figures in run["scores"].values():
            figures.pop("params", None)
    results = {"protocol": "tiny-imagenet-100", "runs": runs, "variations": swept, "dimensions": dimensions}
    publish(args.out, results | {"settings": settings, "environment": about})
    return 0


def effective_dimensions(features: torch.Tensor) -> float:
    """Participation ratio of the variances of unit features [N, d] along their principal directions, in [1, d]."""
    unit = F.normalize(features.double(), dim=1)
    variances = torch.linalg.svdvals(unit - unit.mean(0)).square()
    return float(variances.sum().square() / variances.square().sum())


def fitted(folder: Path, sets: Sets, backbone: Backbone, options: dict[str, Any]) -> Any:
    detector: Any = create_detector("mofe", backbone=backbone, class_names=sets.fit.label_names, **options)
    return detector.fit(sets.fit, checkpoint=folder / "checkpoint.safetensors", progress=False)


def plot(sets: Sets, detector: Any, path: Path) -> None:
    """Features before and after of some sets, 500 images of each at most."""
    rows = {
        name: torch.randperm(len(sets.kept[name][0]), generator=torch.Generator().manual_seed(0))[:500]
        for name in ("id", "near", "textures", "flowers", "mnist", "histology")
    }
    before = {name: found.image for name, found in sets.of_backbone().items()}
    after = {name: F.normalize(found.extra["token"], dim=1) for name, found in sets.of_experts(detector).items()}
    panels = {"frozen backbone": before, SHOWN: after}
    draw_features({title: {name: of[name][at] for name, at in rows.items()} for title, of in panels.items()}, path)


def _run(folder: Path, sets: Sets, backbone: Backbone, options: dict[str, Any]) -> dict[str, Any]:
    """A training and its figures, read back if it is finished."""

    def make() -> list[dict[str, Any]]:
        started = time.perf_counter()
        detector = fitted(folder, sets, backbone, options)
        minutes = (time.perf_counter() - started) / 60
        scores = judge(variants(detector), sets.of_experts(detector))
        return [{"seed": options["seed"], "minutes": minutes, "scores": scores, "history": detector.history}]

    made = recipe(backbone, sets.used, sets.fit.label_names, code=["ood_mofe"], options=options)
    return kept_runs(folder / "results.json", made, make)[0]


def _tell(label: str, run: dict[str, Any]) -> None:
    for name, figures in run["scores"].items():
        near, far, accuracy = figures["per_set"]["near"]["auroc"], figures["far_mean"]["auroc"], figures.get("accuracy")
        print(f"{label}, {name}: near {near:.3f} far {far:.3f} accuracy {accuracy}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
