"""The paper's tables on the user's own data: search, train and judge once, beside what was published.

All is kept in OUT/PROTOCOL/BACKBONE: one folder per model ("vanilla", "SeTAR", "SeTAR+FT-seed-3"), in it one folder per
set of scores or data set of an accuracy. Each has a `run.json` with all that it rests on; other settings are refused.
"""

from __future__ import annotations

__all__ = [
    "PRESETS",
    "PROTOCOLS",
    "TABLES",
    "TRAINING",
    "Bench",
    "Model",
    "architecture",
    "default_scores",
    "describe_options",
    "find",
    "find_mistakes",
    "lines",
    "preset",
    "published_rows",
    "published_table",
    "reproduce",
    "table_of",
]

import argparse
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from ood_core import check
from ood_core.backbones.base import Backbone, hash_tensors
from ood_core.cli.common import (
    extraction_options,
    load_backbone,
    message,
    parse_pairs,
    parse_params,
    print_json,
    print_table,
)
from ood_core.data.sources import ImageSource
from ood_core.detectors import create_detector, detector_class, known_options
from ood_core.detectors.base import Detector
from ood_core.errors import MissingDataError, UsageError, unknown_name
from ood_core.evaluation import Evaluation, evaluate
from ood_core.metrics import evaluate_scores
from ood_core.options import method_options, option_names
from ood_core.protocols import FoundSet, Protocol, describe, find_protocol, inspect_protocol
from ood_core.reproduction import studies, tables
from ood_core.reproduction.command import print_differences
from ood_core.reproduction.kept import kept_runs
from ood_core.reproduction.studies import study_options
from ood_core.reproduction.tables import Beside, beside, figure_cell

from ood_setar.edit import SeTAREdit, read_edit
from ood_setar.finetune import finetune, lora, lora_start, train_in
from ood_setar.lists import accuracy, with_labels
from ood_setar.search import search, search_in

Row = dict[str, Any]

_IMAGENET, _VOC = "setar-imagenet-1k", "setar-voc"
_CLIP_B, _CLIP_L, _SWIN = "CLIP ViT-B/16", "CLIP ViT-L/14", "SwinV2-B"

TABLES = {
    1: ("vanilla", "SeTAR"),
    2: ("LoRA", "SeTAR+FT"),
    3: ("vanilla", "SeTAR"),
    4: ("vanilla", "LoRA", "SeTAR", "SeTAR+FT"),
}
"""Table -> the methods that we run."""

PROTOCOLS = {1: (_IMAGENET, _VOC), 2: (_IMAGENET,), 3: (_IMAGENET, _VOC), 4: (_IMAGENET,)}
"""Table -> the protocols that it has figures of."""

PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    (_CLIP_B, _IMAGENET): {"ood_weight": 0.1, "k": 300, "classes": 1000, "loss_batch": 512},
    (_CLIP_B, _VOC): {"ood_weight": 0.05, "k": 4, "classes": 14, "loss_batch": 512},
    (_CLIP_L, _IMAGENET): {"ood_weight": 0.5, "k": 300, "classes": 1000, "loss_batch": 512},
    (_CLIP_L, _VOC): {"ood_weight": 0.3, "k": 6, "classes": 14, "loss_batch": 512},
    (_SWIN, _IMAGENET): {"ood_weight": 0.01, "k": 700, "classes": 1000, "loss_batch": 384},
}
"""(architecture, protocol) -> the loss of the released code; its k is for so many classes."""

TRAINING: dict[str, dict[str, Any]] = {
    _CLIP_B: {"batch_size": 100, "rank": 32},
    _CLIP_L: {"batch_size": 20, "rank": 64},
    _SWIN: {"batch_size": 50, "rank": 112, "crop_scale": 0.08, "jitter": 0.4},
}
"""Architecture -> batches and views of the training, and the rank of LoRA."""

# Weights "up" of the towers, inputs of the lowest, width of the embedding, grid of patches.
_ARCHITECTURES: dict[tuple[Any, ...], str] = {
    (12, 12, 768, 512, (14, 14)): _CLIP_B,
    (24, 12, 1024, 768, (16, 16)): _CLIP_L,
    (24, 0, 128, 1024, (8, 8)): _SWIN,
}

# What Table 2 has of a classifier was computed at temperature 100; the plain scores besides.
_CLASSIFIER_SCORES = ["msp@100", "gl_mcm@100", "msp", "energy"]

# With so many ID images the two rules of the FPR95 differ by less than 0.3 points.
_MANY = 10_000

# What the figures of a model go through.
_CODE = tuple(
    f"ood_setar.{name}" for name in ("edit", "finetune", "functional", "lists", "network", "objective", "search")
)

# What is not an option of a step: it comes from the protocol or the command line.
_OWN = (
    *("backbone", "images", "edit", "names", "class_names", "template", "seed", "self", "common"),
    *("log_file", "resume", "checkpoint", "on_error", "workers", "progress"),
)


def published_table(number: int) -> dict[str, Any]:
    """A table of the paper: where it comes from, what to know of it, and its rows.

    Every row has `method` (Table 3 has one row for vanilla and SeTAR) and, but for Table 4, figures of `fpr95` and
    `auroc` in percent: Table 1 by OOD set in `ood` (None: not given) with their `average`; Table 2 in `scores`, by
    score, some with `fpr95_std` and `auroc_std`; Table 3 in `average`, by method. Table 4 has `accuracy` by data
    set and their `average`. `inconsistent_averages` lists those that do not follow from their columns.

    Args:
        number: 1 without training, 2 fine-tuned, 3 other backbones and scores, 4 accuracies.

    Raises:
        UsageError: another number.

    Example:
        >>> published_table(4)["rows"][0]["average"]
        57.27
    """
    return tables.published_table("ood_setar", number)


# ---- the command


def reproduce(args: argparse.Namespace) -> None:
    """Run a table of the paper, our numbers beside the published ones."""
    names, overrides = args.protocol or PROTOCOLS[args.table], parse_pairs("--set", args.overrides, "NAME=PATH")
    if args.dry_run:
        _show_places(args, {name: inspect_protocol(name, args.root, overrides) for name in names})
        return
    benches, scores = _benches(args, names, overrides)
    labels = parse_pairs("--labels", args.labels, "NAME=PATH")
    results = [table_of(args.table, bench, scores, labels) for bench in benches]
    table = published_table(args.table)
    message(f"{table['source']}: {table['note']}")
    found = [compared(result) for result in results]
    if args.json:
        for result, own in zip(results, found, strict=True):
            result["differences"] = [one.to_dict() for one in own]
        print_json({"table": args.table, "unit": "percent", "note": table["note"], "results": results})
        return
    for result, own in zip(results, found, strict=True):
        print_table(*lines(result))
        print_differences(own, [*result["sets"], "average"], MEASURES)
        if sentence := result["zero_shot_accuracy"].get("sentence"):
            message(sentence)
    message(f"Every run: {args.out}")


def _benches(
    args: argparse.Namespace, names: Sequence[str], overrides: dict[str, str]
) -> tuple[list[Bench], list[str]]:
    """The protocols that are here with the backbone asked for, and the scores; mistakes are found before any work."""
    if bool(args.labels) != (args.table == 4) or (args.scores and args.table == 4):
        raise UsageError("Table 4 is of accuracies: it takes --labels NAME=FILE, the other tables --scores NAME.")
    places = {"overrides": overrides, "class_names_file": args.classes}
    protocols = find(names, args.root, skip=not args.protocol, say=message, **places)
    edit = _searched_elsewhere(args.edit, [protocol.name for protocol in protocols]) if args.edit else None
    backbone = load_backbone(args)
    scores = list(dict.fromkeys(args.scores or default_scores(args.table, backbone)))
    options = parse_params(args.param)
    common: dict[str, Any] = {"template": args.template, "seeds": args.seeds, "edit": edit, "say": message}
    common["extraction"] = extraction_options(args)
    benches = [Bench(protocol, backbone, Path(args.out), options, **common) for protocol in protocols]
    for bench in benches:
        message(f"{bench.protocol.describe()}\n{describe_options(bench)}")
        find_mistakes(args.table, bench, scores)
    return benches, scores


def _searched_elsewhere(path: str, protocols: Sequence[str]) -> SeTAREdit:
    edit = read_edit(path)
    if len(protocols) > 1:
        raise UsageError(f"--edit is of one ID set: choose it with --protocol, of {', '.join(protocols)}.")
    if edit.factors:
        raise UsageError(f"--edit {path!r} is fine-tuned: give the edit of the search that it started from.")
    return edit


def _show_places(args: argparse.Namespace, found: Mapping[str, Sequence[FoundSet]]) -> None:
    """What is found of the protocols, and where."""
    if args.json:
        print_json({name: [row.to_dict() for row in rows] for name, rows in found.items()})
        return
    for name, rows in found.items():
        print_table([name], [[line] for line in describe(rows).splitlines()])


# ---- models and figures


@dataclass(frozen=True)
class Model:
    """A backbone with an edit, or without one.

    Attributes:
        label: the method.
        folder: that keeps its edit and its figures.
        edit: None for the backbone as it is.
    """

    label: str
    folder: Path
    edit: SeTAREdit | None = None

    def on(self, backbone: Backbone) -> Backbone:
        """The backbone with the edit."""
        return backbone if self.edit is None else self.edit.apply(backbone)


@dataclass(frozen=True)
class Bench(studies.Bench):
    """A backbone on a protocol: makes models and judges them, once; `params` are of every step that has them.

    Attributes:
        edit: of a search made elsewhere.
    """

    template: str = "a photo of a {}"
    convention: str = "released"
    edit: SeTAREdit | None = None

    purpose = ", on which SeTAR searches"

    @cached_property
    def kind(self) -> str | None:
        """The paper's name of the backbone's architecture."""
        return architecture(self.backbone)

    @cached_property
    def options(self) -> dict[str, Any]:
        """The preset and what was given."""
        return preset(self.kind, self.protocol) | dict(self.params)

    # ---- models

    def models(self, label: str) -> list[Model]:
        """The models of a method: one per seed if it is trained.

        Args:
            label: "vanilla", "SeTAR", "LoRA" or "SeTAR+FT".
        """
        if label == "vanilla":
            return [Model(label, self.folder / label)]
        if label == "SeTAR":
            return [self.searched]
        return [self.trained(label, seed) for seed in self.seeds]

    @cached_property
    def searched(self) -> Model:
        """SeTAR: the edit that was given, that of an earlier search, or that of a new one."""
        if self.edit is not None:
            return Model("SeTAR", self.folder / "SeTAR-given", self.edit)
        options = {name: value for name, value in options_of(search, self.options).items() if name != "batch_size"}
        loading = {name: self.extraction[name] for name in ("batch_size", "workers", "on_error")}
        return self._made("SeTAR", options, partial(search_in, **options, **loading))

    def trained(self, label: str, seed: int) -> Model:
        """SeTAR+FT on the searched edit, or LoRA."""
        start = self.searched.edit if label == "SeTAR+FT" else self._lora(seed)
        assert start is not None
        options = options_of(finetune, self.options)
        train = partial(train_in, edit=start, seed=seed, workers=self.extraction["workers"], **options)
        return self._made(f"{label}-seed-{seed}", options, train, seed=seed, start=_identity(start))

    def _lora(self, seed: int) -> SeTAREdit:
        names = ("kind", "order", *inspect.signature(lora).parameters)
        return lora_start(self.backbone, seed=seed, **{k: v for k, v in self.options.items() if k in names})

    def _made(self, name: str, options: Mapping[str, Any], make: Callable[..., SeTAREdit], **others: Any) -> Model:
        """A model whose edit is read from its folder, or made there."""
        folder, names = self.folder / name, self.protocol.class_names
        made = self.recipe({"train": self.train()}, code=_CODE, options=options, **others)

        def edits() -> list[dict[str, Any]]:
            self.say(f"{self.protocol.name}, {name}: {folder}")
            edit = make(folder, self.backbone, self.train(), class_names=names, template=self.template)
            return [{"edit": "edit.json", "ratios": edit.ratios}]

        if not (folder / "edit.json").is_file():
            (folder / "run.json").unlink(missing_ok=True)
        kept_runs(folder / "run.json", made, edits)
        return Model(name, folder, SeTAREdit.from_pretrained(folder))

    # ---- figures

    def judge(self, model: Model, scores: Sequence[str]) -> dict[str, Any]:
        """results.json of an evaluation: released FPR95 in "detectors", the standard one in "standard"."""
        folder = model.folder / "+".join(scores)
        made = self.recipe(
            {"id": self.protocol.test, **self.protocol.ood},
            code=[*_CODE, *_code_of(scores)],
            options={score: self._options_of_score(score) for score in scores},
            edit=_identity(model.edit),
        )

        def runs() -> list[dict[str, Any]]:
            self.say(f"{self.protocol.name}, {model.label} by {', '.join(scores)}: {folder}")
            found = self._evaluate(model.on(self.backbone), scores)
            found.results.update(standard=_standard(found))
            found.write(folder)
            return [found.results]

        (found,) = kept_runs(folder / "run.json", made, runs)
        self._tell_failures(model, found["data"])
        return found

    def accuracies(self, model: Model, labelled: Mapping[str, ImageSource]) -> dict[str, float]:
        """Share of images whose label is the nearest of all label names, by data set."""
        edited = cache(lambda: model.on(self.backbone))

        def of_one(name: str, source: ImageSource) -> float:
            folder = model.folder / f"accuracy-{name}"
            edit = _identity(model.edit)
            made = self.recipe({name: source}, source.label_names, code=_CODE, edit=edit)

            def runs() -> list[dict[str, Any]]:
                self.say(f"{self.protocol.name}, {model.label}, accuracy on {name}: {folder}")
                return [{"accuracy": accuracy(edited(), source, self.template, **self.extraction)}]

            (found,) = kept_runs(folder / "run.json", made, runs)
            return float(found["accuracy"])

        return {name: of_one(name, source) for name, source in labelled.items()}

    def _evaluate(self, backbone: Backbone, scores: Sequence[str]) -> Evaluation:
        """The scores on one backbone; NegLabel's words are chosen with its text tower, edited or not."""
        names = self.protocol.class_names

        def detector(score: str) -> Detector:
            name = _fixed(score)[0]
            options = known_options(name, self._options_of_score(score))
            return create_detector(name, backbone=backbone, class_names=names, template=self._template(name), **options)

        return evaluate(
            {score: detector(score) for score in scores},
            id=self.protocol.test,
            ood=self.protocol.ood,
            convention=self.convention,
            **self.extraction,
        )

    def _options_of_score(self, score: str) -> dict[str, Any]:
        name, fixed = _fixed(score)
        return options_of(detector_class(name).__init__, self.params) | fixed

    def _tell_failures(self, model: Model, data: Mapping[str, Any]) -> None:
        sets = {"id": data["id"], **data["ood"]}
        if failed := [f"{name} {counts['failures']}" for name, counts in sets.items() if counts["failures"]]:
            self.say(f"{self.protocol.name}, {model.label}: images without a score: {', '.join(failed)}")

    def _template(self, score: str) -> str | None:
        """NegLabel has prompts of its own, those of its words."""
        return None if score == "neg_label" else self.template


# ---- tables


def table_of(number: int, bench: Bench, scores: Sequence[str], labels: Mapping[str, str]) -> dict[str, Any]:
    """A table of the paper on one protocol, in percent.

    Args:
        number: of the table.
        bench: backbone and images.
        scores: of Tables 1 to 3.
        labels: data set -> file of labels, of Table 4.

    Returns:
        "sets" (the columns) and "rows" with "method", "score", "origin", "sets" and "average", and what they rest on.
    """
    labelled = {name: with_labels(_image_set(bench.protocol, name), file) for name, file in labels.items()}
    zero_shot, sentence = bench.zero_shot()
    models = {label: bench.models(label) for label in TABLES[number]}
    ours = _accuracy_rows(bench, models, labelled) if number == 4 else _score_rows(bench, models, scores)
    edit = bench.searched.edit
    return {
        "protocol": bench.protocol.name,
        "id": bench.protocol.title,
        "backbone": bench.backbone.spec,
        "architecture": bench.kind,
        "options": bench.options,
        "ratios": edit.ratios if edit else {},
        "sets": list(labelled if number == 4 else bench.protocol.ood),
        "zero_shot_accuracy": zero_shot | ({"sentence": sentence} if sentence else {}),
        "rows": _beside(ours, published_rows(number, bench.protocol.title, bench.kind, scores)),
    }


def _image_set(protocol: Protocol, name: str) -> ImageSource:
    known = {protocol.title: protocol.test, **protocol.ood}
    if name not in known:
        raise unknown_name(f"image set of {protocol.name!r} with --labels", name, known)
    return known[name]


def _score_rows(bench: Bench, models: Mapping[str, list[Model]], scores: Sequence[str]) -> list[Row]:
    places = {"released": "detectors"} | ({"standard": "standard"} if len(bench.protocol.test) < _MANY else {})
    results = {label: [bench.judge(model, scores) for model in runs] for label, runs in models.items()}
    return [
        {"score": score, "convention": convention, **_row(bench, label, [run[place][score] for run in runs])}
        for score in scores
        for label, runs in results.items()
        for convention, place in places.items()
    ]


def _accuracy_rows(bench: Bench, models: Mapping[str, list[Model]], labelled: Mapping[str, ImageSource]) -> list[Row]:
    def figures(found: Mapping[str, float]) -> dict[str, Any]:
        per_set = {name: {"accuracy": value} for name, value in found.items()}
        return {"per_set": per_set, "average": {"accuracy": fmean(found.values())}}

    return [
        _row(bench, label, [figures(bench.accuracies(model, labelled)) for model in runs])
        for label, runs in models.items()
    ]


def _row(bench: Bench, label: str, runs: Sequence[Mapping[str, Any]]) -> Row:
    """Means over runs, in percent."""
    sets = {name: _summary([run["per_set"][name] for run in runs]) for name in runs[0]["per_set"]}
    return {
        "method": label,
        "origin": "ours",
        "backbone": bench.backbone.spec,
        "runs": len(runs),
        "sets": sets,
        "average": _summary([run["average"] for run in runs]),
    }


def _summary(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    found = {}
    for measure in (name for name in MEASURES if name in figures[0]):
        values = [100 * figure[measure] for figure in figures]
        found[measure] = fmean(values)
        if len(values) > 1:
            found[f"{measure}_std"] = stdev(values)
    return found


MEASURES = ("fpr95", "auroc", "accuracy")


def published_rows(number: int, title: str, kind: str | None, scores: Sequence[str]) -> list[Row]:
    """The paper's rows of an ID set, in the form of ours.

    Args:
        number: of the table.
        title: the ID set.
        kind: architecture whose rows are taken; if the table has none of it, all are.
        scores: those wanted.
    """
    table = published_table(number)
    rows = [row for row in table["rows"] if row["id"] == title]
    rows = [row for row in rows if row["backbone"] == kind] or rows
    plain = [one for row in rows for one in _plain_rows(row, table.get("computed_as", {}).get(row["backbone"], {}))]
    return [one for one in plain if one.get("score") in (None, *scores)]


def _plain_rows(row: Row, computed_as: Mapping[str, str]) -> list[Row]:
    """One row per method and score, whatever the table's form; under the names of scores as they were computed."""
    origin = "published" + (f", {row['origin']}" if row.get("origin") else "")
    common = {"origin": origin, "backbone": row["backbone"]}
    if "accuracy" in row:
        sets = {name: {"accuracy": value} for name, value in row["accuracy"].items()}
        return [{"method": row["method"], **common, "sets": sets, "average": {"accuracy": row["average"]}}]
    common |= {"convention": "released"}
    if "ood" in row:
        named = {"score": row["score"], "method": row["method"]}
        return [{**named, **common, "sets": row["ood"], "average": row["average"]}]
    if "scores" in row:
        figures = [(score, row["method"], average) for score, average in row["scores"].items()]
    else:
        figures = [(row["score"], method, average) for method, average in row["average"].items()]
    return [
        {"score": computed_as.get(score, score), "method": method, **common, "sets": {}, "average": average}
        | ({"origin": f"{origin} as {score}"} if score in computed_as else {})
        for score, method, average in figures
    ]


def _beside(ours: Sequence[Row], published: Sequence[Row]) -> list[Row]:
    """By score and method, ours first; methods that we do not run last."""
    scores, methods = ([*dict.fromkeys(row.get(name) for row in ours)] for name in ("score", "method"))

    def place(row: Row) -> tuple[int, int]:
        method = methods.index(row["method"]) if row["method"] in methods else len(methods)
        return scores.index(row.get("score")), method

    return sorted([*ours, *published], key=place)


def compared(result: Mapping[str, Any]) -> list[Beside]:
    """Our rows of `table_of` beside the published ones of the same architecture, score, method and FPR rule."""
    found = []
    for row in result["rows"]:
        if row["origin"] == "ours" or row["backbone"] != result["architecture"]:
            continue
        for ours in result["rows"]:
            same = all(ours.get(key) == row.get(key) for key in ("score", "method"))
            if ours["origin"] == "ours" and same and ours.get("convention") in (None, row.get("convention")):
                # An average over other sets says nothing.
                places = ["average"] if set(row["sets"]) in (set(), set(ours["sets"])) else []
                mine, theirs = ({**one["sets"], "average": one["average"]} for one in (ours, row))
                figures = {place: _figures(mine[place]) for place in [*ours["sets"], *places]}
                found += beside(_name(row, result["architecture"]), figures, theirs)
    return found


def _figures(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name in MEASURES}


def lines(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of `table_of` to print."""
    columns, kind = result["sets"], result["architecture"]
    measures = [name for name in MEASURES if name in result["rows"][0]["average"]]
    what = " / ".join({"fpr95": "released FPR95", "auroc": "AUROC"}.get(name, name) for name in measures)
    rows = []
    for row in result["rows"]:
        comparable = set(row["sets"]) <= set(columns)
        figures = [*(row["sets"].get(name) for name in columns), row["average"] if comparable else None]
        rows.append([_name(row, kind), *(figure_cell(figure, measures, apart="+-") for figure in figures)])
    return [f"{result['id']}, {result['backbone']}: {what}", *columns, "average"], rows


def _name(row: Row, kind: str | None) -> str:
    parts = [row.get("score"), row["method"], row["origin"]]
    if row.get("convention") == "standard":
        parts.append("standard FPR95")
    if row["origin"] != "ours" and row["backbone"] != kind:
        parts.append(row["backbone"])
    return ", ".join(part for part in parts if part)


# ---- what is run


def architecture(backbone: Backbone) -> str | None:
    """The paper's name for a backbone of this shape, whatever its weights; None if the paper has none like it."""
    ups = [name for name in backbone.linears() if name.endswith(".up")]
    if not ups:
        return None
    inputs = backbone.linear(ups[0]).weight.shape[1]
    depths = (sum(name.startswith(f"{tower}.") for name in ups) for tower in ("visual", "text"))
    return _ARCHITECTURES.get((*depths, inputs, backbone.width, backbone.grid))


def preset(kind: str | None, protocol: Protocol) -> dict[str, Any]:
    """The released code's options of search and training for an architecture on a protocol; empty if it has none.

    Args:
        kind: of `architecture`.
        protocol: with another number of classes, its `k` is left out.
    """
    loss = dict(PRESETS.get((kind or "", protocol.name), {}))
    if loss.pop("classes", None) != len(protocol.class_names):
        loss.pop("k", None)
    return TRAINING.get(kind or "", {}) | loss


def default_scores(number: int, backbone: Backbone) -> list[str]:
    """The scores of a table for a backbone: those that the paper has for its architecture, else all it allows."""
    if number == 4:
        return []
    if "prompts" not in backbone.capabilities:
        return _CLASSIFIER_SCORES if number == 2 and "local" in backbone.capabilities else ["msp", "energy"]
    if number != 3:
        return ["mcm", "gl_mcm"]
    kind = architecture(backbone)
    scores = [row["score"] for row in published_table(3)["rows"] if row["backbone"] == kind]
    return list(dict.fromkeys(scores)) or ["mcm", "gl_mcm", "neg_label"]


def find(names: Iterable[str], root: str, *, skip: bool, say: Callable[[str], None], **options: Any) -> list[Protocol]:
    """The protocols on this disk.

    Args:
        names: of protocols.
        root: the folder with all data.
        skip: leave out those that are not there, as long as one is.
        say: told of what is left out.
        **options: of `find_protocol`.

    Raises:
        MissingDataError: none is there, or not all.
    """
    found, missing = [], []
    for name in names:
        try:
            found.append(find_protocol(name, root, **options))
        except MissingDataError as error:
            missing.append(f"{name} is not complete: {error}")
    if missing and not (found and skip):
        raise MissingDataError(" ".join(missing))
    for sentence in missing:
        say(f"Left out: {sentence}")
    return found


def find_mistakes(number: int, bench: Bench, scores: Sequence[str]) -> None:
    """Find mistakes before hours are spent.

    Raises:
        UsageError: an option that no step has, or a classifier of other classes.
        MissingDataError: no images to search on.
    """
    known = [name for step in (search, finetune, lora) for name in option_names(step, *_OWN)]
    fixed = {score: _fixed(score) for score in scores}
    known += [option for name, _ in fixed.values() for option in method_options(detector_class(name))]
    known = [name for name in known if name not in _OWN]
    for name in bench.params:
        if name not in known:
            raise unknown_name("option of search, finetune, lora or the scores", name, sorted(set(known)))
    own = {score: options for score, (_, options) in fixed.items()}
    given = {name: value for name, value in bench.params.items() if any(name in options for options in own.values())}
    study_options(own, given, bench.say)
    _check_drop(number, bench)
    if bench.edit is None or set(TABLES[number]) - {"vanilla", "SeTAR"}:
        bench.train()
    if "prompts" not in bench.backbone.capabilities:
        _check_classes(bench)


def _check_drop(number: int, bench: Bench) -> None:
    drop = bench.edit.drop if bench.edit is not None else bench.options.get("drop", "minor")
    if "SeTAR+FT" in TABLES[number] and drop != "minor":
        raise UsageError(f"Only minor directions are trained: Table {number} goes with drop='minor', not {drop!r}.")


def _check_classes(bench: Bench) -> None:
    blank = torch.zeros(1, 3, *bench.backbone.transform.crop)
    outputs, classes = bench.backbone.encode_logits(blank).shape[1], len(bench.protocol.class_names)
    if outputs != classes:
        raise UsageError(
            f"{bench.backbone.spec!r} tells {outputs} classes apart, {bench.protocol.name} has {classes}: choose with "
            "--protocol the one of its classes, or a backbone with a text tower."
        )


def describe_options(bench: Bench) -> str:
    """A sentence on where the options come from."""
    own = (bench.kind, bench.protocol.name) in PRESETS
    source = (
        f"the released code's options for {bench.kind}" if own else "no published options for this, so our defaults"
    )
    options = {"k": "0.3 C"} | bench.options
    given = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{bench.backbone.spec} on {bench.protocol.title}: {source}; {given}"


def options_of(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that a step has."""
    return {name: options[name] for name in option_names(function, *_OWN) if name in options}


# ---- what is kept


def _standard(found: Evaluation) -> dict[str, Any]:
    """The figures by the standard rule, from the scores of an evaluation by another."""
    table, sets = found.scores, list(found.results["data"]["ood"])
    return {
        name: evaluate_scores(table.scores(name, "id"), {one: table.scores(name, one) for one in sets}).to_dict()
        for name in table.detectors
    }


def _identity(edit: SeTAREdit | None) -> dict[str, Any] | None:
    """What an edit is; None of the backbone as it is."""
    if edit is None:
        return None
    factors = hash_tensors((f"{name}.{i}", pair[i]) for name, pair in sorted(edit.factors.items()) for i in (0, 1))
    known = {
        "ratios": edit.ratios,
        "drop": edit.drop,
        "seed": edit.seed,
        "scale": edit.scale,
        "lora": edit.record.get("lora"),
    }
    return known | {"factors": factors if edit.factors else None}


def _fixed(score: str) -> tuple[str, dict[str, Any]]:
    """The detector of a score and the options that its name fixes: "gl_mcm@100" is `gl_mcm` at temperature 100.

    Raises:
        UsageError: an unknown detector, one without a temperature, or one that is no number above 0.
    """
    name, at, temperature = score.partition("@")
    known = method_options(detector_class(name))
    if not at:
        return name, {}
    try:
        value = check.positive("temperature", float(temperature))
    except ValueError as error:
        raise UsageError(f"Score {score!r}: behind the @ stands a temperature above 0, as in 'gl_mcm@100'.") from error
    if "temperature" not in known:
        raise UsageError(f"Score {score!r}: {name!r} has no temperature.")
    return name, {"temperature": value}


def _code_of(scores: Sequence[str]) -> list[str]:
    """The modules of the scores' detectors; of another package all of it."""
    modules = {detector_class(_fixed(score)[0]).__module__ for score in scores}
    return sorted(
        module if module.startswith(("ood_core.", "ood_setar.")) else module.partition(".")[0] for module in modules
    )
