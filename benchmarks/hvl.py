"""HVL on real dermoscopy (`ham-4`) and histology (`histology-5`), beside other methods on the same backbone.

    uv run python benchmarks/hvl.py --packs ../shared/data --work ~/.cache/ood-hvl

All images are embedded once for both protocols. Every run is kept in --work and read back. The tiny backbone saw no
medical image and is not CLIP: the table compares methods, not with the paper. Writes benchmarks/results/hvl.json,
which `tools/make_docs.py` turns into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import publish
from ood_core import ParquetImages, create_backbone, create_detector, evaluate
from ood_core.backbones.base import Backbone
from ood_core.data.joined import JoinedSources
from ood_core.data.sources import ImageSource
from ood_core.evaluation import environment
from ood_core.protocols.catalog import set_entry
from ood_core.reproduction.kept import Run, kept_runs
from ood_hvl.layouts import Layout, Task
from ood_hvl.reproduce import BASELINES, STUDIES, pyramid_features, run_layout, summarise
from ood_mofe.runner import variants

RESULT = Path(__file__).parent / "results" / "hvl.json"
# The protocols' own names of the classes, by the packs' labels.
TISSUE = set_entry("Histology-5")["classes"]
KNOWN = set_entry("HAM-4")["classes"]
SKIN = KNOWN | {
    label: name
    for title in ("actinic keratosis", "basal cell carcinoma", "benign keratosis")
    for label, name in set_entry(title)["classes"].items()
}
# As the usual fine-tuning of a last block has it: no experts, no mixed images.
FINE_TUNED = {"moe": False, "mixup": False, "epochs": 10, "batch_size": 64, "augment": False}
FINE_TUNED |= {"learning_rate": 1e-4, "head_learning_rate": 1e-2}
SHOWN = ("msp", "knn")


def open_packs(packs: Path) -> JoinedSources:
    """Every image of both protocols."""
    files = {"skin": "dermatology-ham10000", "tissue": "histology-colorectal"}
    parts = {
        f"{name}-{split}": ParquetImages(packs / f"{file}.parquet", split)
        for name, file in files.items()
        for split in ("train", "test")
    }
    return JoinedSources(parts | {"textures": ParquetImages(packs / "textures-dtd.parquet", "test")})


def _named(source: JoinedSources) -> ImageSource:
    names = [(SKIN | TISSUE).get(name, name) for name in source.label_names]
    return source.relabelled(names)


def ham_4(joined: JoinedSources) -> Layout:
    """Four lesions known, three unknown; far: histology and textures."""
    source, known = _named(joined), list(KNOWN.values())
    rest = [name for name in SKIN.values() if name not in known]
    rows = {part: _rows(joined, source, f"skin-{part}", known) for part in ("train", "test")}
    near = {name: _rows(joined, source, "skin-test", [name]) for name in rest}
    far = {"histology": joined.rows_of("tissue-test"), "textures": joined.rows_of("textures")}
    return Layout("ham-4", source, [Task("ham-4", known, source, rows | near | far)], [], [])


def histology_5(joined: JoinedSources) -> Layout:
    """Two of five tissues left out, in all ten ways; far: dermoscopy."""
    source, tasks = _named(joined), []
    for out in itertools.combinations(TISSUE.values(), 2):
        known = [name for name in TISSUE.values() if name not in out]
        rows = {part: _rows(joined, source, f"tissue-{part}", known) for part in ("train", "test")}
        rows |= {"left out": _rows(joined, source, "tissue-test", list(out)), "dermoscopy": joined.rows_of("skin-test")}
        tasks.append(Task(f"without {' and '.join(out)}", known, source, rows))
    return Layout("histology-5", source, tasks, [], [])


def _rows(joined: JoinedSources, source: ImageSource, part: str, names: list[str]) -> np.ndarray:
    rows, labels = joined.rows_of(part), np.asarray(source.labels)
    return rows[np.isin(labels[rows], [source.label_names.index(name) for name in names])]


def smaller(layout: Layout, count: int) -> Layout:
    """At most `count` images of every part, drawn with seed 0, in a source of their own."""
    rng = np.random.default_rng(0)
    (task,) = layout.tasks
    rows = {part: np.sort(rng.permutation(at)[:count]) for part, at in task.rows.items()}
    kept = np.unique(np.concatenate(list(rows.values())))
    source = task.source.subset(kept)
    rows = {part: np.searchsorted(kept, at) for part, at in rows.items()}
    return Layout(layout.name, source, [Task(task.name, task.class_names, source, rows)], [], [])


def fine_tuned(task: Task, backbone: Backbone, args: argparse.Namespace, folder: Path) -> list[Run]:
    """A uni-modal model: the last block of the image tower and a linear head, trained on the same images."""
    images = {part: task.source.subset(at) for part, at in task.rows.items()}
    unknown = {name: source for name, source in images.items() if name not in ("train", "test")}

    def make(seed: int) -> list[Run]:
        made = {"class_names": task.class_names, "seed": seed, **FINE_TUNED}
        detector: Any = create_detector("mofe", backbone=backbone, **made)
        detector.fit(images["train"], progress=False)
        scores = {f"last block fine-tuned, {name}": one for name, one in variants(detector).items() if name in SHOWN}
        found = evaluate(scores, id=images["test"], ood=unknown, bootstrap=args.bootstrap).results["detectors"]
        return [
            {"task": task.name, "seed": seed, "detector": name, "accuracy": of["accuracy"], "per_set": of["per_set"]}
            | {measure: of["average"][measure] for measure in ("auroc", "fpr95")}
            for name, of in found.items()
        ]

    recipe = {"options": FINE_TUNED, "backbone": backbone.fingerprint, "source": task.source.fingerprint}
    return [
        run for seed in args.seeds for run in kept_runs(folder / f"fine-tuned-{seed}.json", recipe, partial(make, seed))
    ]


def figures(runs: list[dict[str, Any]], layout: Layout) -> dict[str, Any]:
    """Summary by detector, the near sets (unknown of the same kind) and the far ones apart."""
    far = {"histology", "textures", "dermoscopy"}
    found = summarise(runs, layout)
    for kind, keep in (("near", lambda name: name not in far), ("far", lambda name: name in far)):
        apart = []
        for run in runs:
            chosen = [figure for name, figure in run["per_set"].items() if keep(name)]
            apart.append(run | {m: sum(f[m] for f in chosen) / len(chosen) for m in ("auroc", "fpr95")})
        for name, row in summarise(apart, layout).items():
            found[name][kind] = {measure: row[measure] for measure in ("auroc", "fpr95")}
    return found


def study(
    name: str, layout: Layout, backbone: Backbone, args: argparse.Namespace, seeds: list[int], wanted: list[str] | None
) -> dict[str, Any]:
    found = {}
    for label, options in STUDIES[name].items():
        if wanted and label not in wanted:
            continue
        features = pyramid_features(layout, backbone, options, cache=args.work / "features")
        folder = args.work / backbone.fingerprint[:12] / name / f"{layout.name}-{len(layout.source)}" / label
        runs = run_layout(layout, backbone, features, options=options, seeds=seeds, folder=folder)
        found[label] = figures(runs, layout)
        print(f"{layout.name} {label}: AUROC {found[label]['hvl']['auroc']['mean']:.3f}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--which", nargs="+", default=["main", "parts", "k", "epochs", "n"])
    parser.add_argument("--partitions", nargs="+", default=["n=1", "n=2", "n=3", "n=4"], help="of the study of n")
    parser.add_argument("--images", type=int, default=300, help="per part, in the study of n: an image costs 1 + 5 n^2")
    parser.add_argument("--bootstrap", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    backbone = create_backbone(args.backbone, dtype=args.dtype)
    joined, started = open_packs(args.packs), time.monotonic()
    layouts = [ham_4(joined), histology_5(joined)]
    results: dict[str, Any] = {}
    if "main" in args.which:
        features = pyramid_features(layouts[0], backbone, {}, cache=args.work / "features")
        for layout in layouts:
            folder = args.work / backbone.fingerprint[:12] / "main" / layout.name
            options = {"seeds": args.seeds, "baselines": BASELINES, "folder": folder, "bootstrap": args.bootstrap}
            runs = run_layout(layout, backbone, features, **options)
            runs += [run for task in layout.tasks for run in fine_tuned(task, backbone, args, folder / task.name)]
            results[layout.name] = figures(runs, layout)
            for name, row in results[layout.name].items():
                print(f"{layout.name} {name}: AUROC {row['auroc']['mean']:.3f}", flush=True)
    for name in ("parts", "k", "epochs"):
        if name in args.which:
            results[name] = {"ham-4": study(name, layouts[0], backbone, args, args.seeds[:1], None)}
    if "n" in args.which:
        few = smaller(layouts[0], args.images)
        results["n"] = {"ham-4": study("n", few, backbone, args, args.seeds[:1], args.partitions)}
    counts = {layout.name: {part: len(at) for part, at in layout.tasks[0].rows.items()} for layout in layouts}
    settings = {"images": counts, "seeds": args.seeds, "images_in_study_of_n": args.images}
    spent = {"minutes": round((time.monotonic() - started) / 60, 1)}
    described = {"spec": backbone.spec, "fingerprint": backbone.fingerprint, "dtype": str(backbone.dtype)}
    everything = {"results": results, "settings": settings, "environment": environment() | {"backbone": described}}
    publish(args.out, everything | spent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
