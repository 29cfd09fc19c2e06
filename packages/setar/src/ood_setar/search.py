"""The search: which weights lose how many of their small singular values."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from ood_core import check
from ood_core.backbones.base import Backbone
from ood_core.data import load_batches, open_source
from ood_core.data.sources import ImageSource
from ood_core.errors import DataError, UsageError, unknown_name
from ood_core.features import label_table
from ood_core.files import write_atomically
from ood_core.labels import check_class_names
from ood_core.options import flat_options
from ood_core.progress import progress_bar
from ood_core.prompts import fill, resolve_templates
from torch import Tensor

from ood_setar.edit import SeTAREdit, draw
from ood_setar.functional import accept, compose, dropped_rank
from ood_setar.network import Network
from ood_setar.objective import Objective, Terms
from ood_setar.options import KINDS, ORDERS, RATIOS, Candidates, Criterion, Passes

__all__ = [
    "KINDS",
    "ORDERS",
    "RATIOS",
    "LabelledImages",
    "Step",
    "default_cells_k",
    "label_images",
    "load_labelled",
    "search",
    "search_in",
    "visiting_order",
]

log = logging.getLogger(__name__)

# float32 sums in another order differ by about this share of their value: closer candidates may swap places.
_NEAR = 2e-6

Measured = dict[float, dict[str, float]]


@dataclass(frozen=True)
class Step:
    """The decision on one weight.

    Attributes:
        weight: its name.
        ratio: chosen.
        before: best value of the whole search before this step; infinity at its start.
        value: best value after it.
        margin: from the best value to the next best one, the value before among them; infinity if there is none.
        near_tie: the margin is within the noise of float32: another machine may choose otherwise.
        candidates: ratio -> what was measured.
    """

    weight: str
    ratio: float
    before: float
    value: float
    margin: float
    near_tie: bool
    candidates: Measured = field(repr=False)


@dataclass(frozen=True)
class LabelledImages:
    """Decoded images of a source with their classes.

    Attributes:
        pixels: transformed images [N, 3, H, W].
        labels: index into `class_names`, int64 [N].
        class_names: C names.
        source: fingerprint of the source.
        failures: (id, reason) of images that could not be decoded.
    """

    pixels: Tensor
    labels: Tensor
    class_names: list[str]
    source: str
    failures: list[tuple[str, str]]


@flat_options
def search(
    backbone: Backbone,
    images: Any,
    *,
    class_names: Sequence[str] | None = None,
    template: str = "a photo of a {}",
    candidates: Candidates = Candidates(),
    criterion: Criterion = Criterion(),
    passes: Passes = Passes(),
    log_file: str | Path | None = None,
    resume: bool = True,
    on_error: str = "raise",
    workers: int = 0,
    progress: bool | None = None,
) -> SeTAREdit:
    """Find the weights whose small singular values are better dropped, on labelled ID images alone.

    From the top block down, every ratio is tried for one weight; the one that lowers the objective below its best
    value so far is kept, and the search goes on with the network as it then is. Nothing is trained.

    Args:
        backbone: with known blocks, and a text tower or a classifier; it is not changed.
        images: about one labelled image per class or more (a source, a folder, ...).
        class_names: C names; None: those of the labels (of the classifier, for a backbone without texts).
        template: prompt of a class.
        candidates: what is tried, in which order, see `Candidates`.
        criterion: what is minimised, see `Criterion`.
        passes: images per pass, memory, see `Passes`.
        log_file: JSON lines, one per candidate, read back by a search that resumes.
        resume: use what `log_file` holds.
        on_error: images that cannot be decoded: "raise", or "record" and leave them out.
        workers: processes that decode.
        progress: a bar on stderr; None shows it on a terminal only.

    Returns:
        The edit; its `record` holds the settings and every `Step`.

    Raises:
        UsageError: a backbone without what is needed, an unknown or tied weight, or a log of another search.
        DataError: images without labels, or labels outside the class names.
        ValueError: an option out of range.

    Source: Li et al., NeurIPS 2024; the released code's "visual_text" search is the default.

    Example:
        >>> edit = search(create_backbone("tiny"), "train/")  # doctest: +SKIP
        >>> edit.ratios["visual.3.up"]  # doctest: +SKIP
        0.1
    """
    backbone.require("blocks", "local")
    if backbone.edits:
        raise UsageError(f"Backbone {backbone.spec!r} is edited already: an edit belongs on the original weights.")
    prompted, kind, drop, seed = "prompts" in backbone.capabilities, candidates.kind, candidates.drop, candidates.seed
    order, ratios = candidates.order or ("visual_text" if prompted else "visual_only"), list(candidates.ratios)
    projection = candidates.include_projection
    names = visiting_order(backbone.linears(), kind=kind, order=order, include_projection=projection)
    _check_weights(backbone, names, ratios)
    loading: dict[str, Any] = {"batch_size": passes.batch_size, "on_error": on_error, "workers": workers}
    data = load_labelled(backbone, images, class_names, **loading)
    scored = _objective(criterion, len(data.class_names), backbone.logit_scale if prompted else 1.0)
    settings = {
        "order": order,
        "kind": kind,
        "ratios": ratios,
        "drop": drop,
        "seed": seed,
        "objective": asdict(scored),
        "template": template,
        "class_names": data.class_names,
        "images": {"count": len(data.labels), "fingerprint": data.source, "failures": data.failures},
        "backbone": backbone.record(),
    }
    run = _Run(
        Trials(backbone, data, template, scored, drop, seed, batch_size=passes.batch_size, memory=passes.memory),
        _Log(log_file, settings, resume),
        scored,
        ratios,
    )
    walk = _exhaustive if order == "exhaustive" else _greedy
    total = len(names) * (len(names) + 1) // 2 if order == "exhaustive" else len(names)
    with progress_bar("weight", total, 0, progress) as tell:
        steps = list(walk(run, names, tell))
    _warn(steps)
    return SeTAREdit(
        ratios={step.weight: step.ratio for step in steps},
        fingerprint=backbone.fingerprint,
        drop=drop,
        seed=seed,
        record={"search": settings, "steps": [_plain(step) for step in steps]},
    )


# ---- what is searched


def visiting_order(
    linears: Sequence[str], *, kind: str = "up", order: str = "visual_text", include_projection: bool = False
) -> list[str]:
    """The weights of a search in the order in which they are decided.

    Args:
        linears: names of a backbone's weights, bottom layer first (`Backbone.linears()`).
        kind: of weight.
        order: see `search`; "exhaustive" starts from the order of "visual_text".
        include_projection: put a tower's projection before its blocks.

    Raises:
        UsageError: a kind that a tower does not have, or towers of different depth to interleave.

    Example:
        >>> visiting_order(["visual.0.up", "visual.1.up", "text.0.up"])
        ['visual.1.up', 'visual.0.up', 'text.0.up']
    """
    check.choice("kind", kind, KINDS)
    check.choice("order", order, ORDERS)
    towers = {"visual_only": ["visual"], "text_only": ["text"], "text_visual": ["text", "visual"]}
    found = []
    for tower in towers.get(order, ["visual", "text"]):
        names = [name for name in linears if name.startswith(f"{tower}.")]
        chosen = [name for name in reversed(names) if name.endswith(f".{kind}")]
        if not chosen:
            raise unknown_name("weight", f"{tower}.*.{kind}", names or ["none in this tower"])
        projection = f"{tower}.projection"
        if include_projection and projection in names and projection not in chosen:
            chosen.insert(0, projection)
        found.append(chosen)
    if order == "interleaved" and len({len(names) for names in found}) > 1:
        raise UsageError(
            f"Towers of {' and '.join(str(len(names)) for names in found)} weights cannot be interleaved: use "
            "order='visual_text'."
        )
    turns = zip_longest(*found) if order == "interleaved" else found
    return [name for turn in turns for name in turn]


def load_labelled(
    backbone: Backbone, images: Any, class_names: Sequence[str] | None, *, batch_size: int = 64, **loading: Any
) -> LabelledImages:
    """Decode all images of a source, their labels matched with the class names.

    Args:
        backbone: whose transform is used.
        images: a labelled source.
        class_names: C names; None: the classifier's, else those of the labels.
        batch_size: images per decoded chunk.
        **loading: `on_error`, `workers`.

    Raises:
        DataError: no labels, labels that are no class, or a classifier of other classes.
    """
    source = open_source(images)
    names, labels = label_images(backbone, source, class_names)
    batches = list(load_batches(source, backbone.transform, batch_size=batch_size, progress=False, **loading))
    good = [row for batch in batches for row in batch.indices.tolist()]
    if not good:
        raise DataError(f"None of the {len(source)} images could be decoded: {batches[0].failures[0][1]}")
    failures = [(source.ids[row], reason) for batch in batches for row, reason in batch.failures]
    pixels = torch.cat([batch.pixels for batch in batches if len(batch.pixels)])
    return LabelledImages(pixels, labels[good], names, source.fingerprint, failures)


def label_images(
    backbone: Backbone, source: ImageSource, class_names: Sequence[str] | None
) -> tuple[list[str], Tensor]:
    """Class names, and the labels [N] of a source as indices into them.

    Args:
        backbone: a classifier's own names are taken where none are given.
        source: labelled images.
        class_names: C names; None: the classifier's, else those of the labels.

    Raises:
        DataError: no labels, labels that are no class, a classifier of other classes, or one class only.
    """
    class_names = check_class_names(class_names)
    names = class_names or check_class_names(source.label_names, what="Labels")
    if "prompts" not in backbone.capabilities:
        names = _classes_of(backbone, source, class_names)
    labels = _labels(source, names)
    if len(names) < 2:
        raise DataError(f"There is one class only ({names}): a softmax over one is always 1. Give at least two.")
    return names, labels


def _classes_of(backbone: Backbone, source: ImageSource, class_names: Sequence[str] | None) -> list[str]:
    """The names given, or the classifier's own; where the library knows none, label i is the head's output i."""
    backbone.require("logits")
    names = list(class_names or backbone.label_names or source.label_names)
    blank = torch.zeros(1, backbone.width, device=backbone.device, dtype=backbone.dtype)
    with torch.no_grad():
        outputs = backbone.logits(blank).shape[-1]
    if len(names) != outputs:
        given = "class_names" if class_names else "labels of these images"
        raise DataError(
            f"{backbone.spec!r} tells {outputs} classes apart, and there are {len(names)} {given}. Give class_names, "
            "one per output, in their order."
        )
    return names


def _labels(source: ImageSource, names: list[str]) -> Tensor:
    if source.labels is None:
        raise DataError("The search needs labelled images, e.g. one folder per class; these have no labels.")
    labels = label_table(source.label_names, names)[torch.as_tensor(source.labels)]
    if (labels < 0).any():
        unknown = {source.label_names[i] if i >= 0 else "(none)" for i in source.labels[(labels < 0).numpy()].tolist()}
        raise DataError(
            f"Labels {sorted(unknown)[:5]} are not among the {len(names)} classes ({names[:5]} ...): give class_names "
            "that match the labels."
        )
    return labels


def _objective(criterion: Criterion, classes: int, temperature: float) -> Objective:
    """What is minimised, with this temperature where none is given."""
    return Objective(
        k=default_cells_k(criterion.k, classes),
        name=criterion.objective,
        weight=criterion.ood_weight,
        batch=criterion.loss_batch,
        scorer=criterion.scorer,
        temperature=temperature if criterion.temperature is None else criterion.temperature,
    )


def default_cells_k(k: int | None, classes: int) -> int:
    """`k`, or for None 0.3 C, rounded: 300 of 1,000 classes.

    Raises:
        ValueError: more than the classes; as many leave no pseudo-OOD cell, which is warned of.
    """
    k = max(1, round(0.3 * classes)) if k is None else check.integer("k", k, 1, classes, "the number of classes")
    if k == classes:
        log.warning("k=%d is the number of classes: no cell is pseudo-OOD, so the loss is the cross-entropy alone.", k)
    return k


def _check_weights(backbone: Backbone, names: Sequence[str], ratios: Sequence[float]) -> None:
    places: dict[Any, str] = {}
    for name in names:
        linear = backbone.linear(name)
        dropped_rank(linear.weight.shape, max(ratios))
        place = (linear.weight.data_ptr(), linear.weight.shape)
        if place in places:
            raise UsageError(f"Weights {places[place]} and {name} are one tensor: they cannot be edited apart.")
        places[place] = name


def class_prompts(template: str, class_names: Sequence[str]) -> list[str]:
    """The prompt of every class.

    Raises:
        UsageError: a template without "{}", or a set of several.
    """
    templates = resolve_templates(template)
    if len(templates) != 1:
        raise UsageError(f"template={template!r} is {len(templates)} templates: the search takes one with '{{}}'.")
    return [fill(templates[0], name) for name in class_names]


# ---- trying candidates


class Trials:
    """Figures of candidate ratios, on one network that follows the decisions.

    Args:
        backbone: is copied.
        data: images and labels.
        template: prompt of a class.
        objective: what is measured.
        drop: singular values to drop.
        seed: of `drop="random"`.
        batch_size: images per pass.
        memory: bytes for kept activations.
    """

    def __init__(
        self,
        backbone: Backbone,
        data: LabelledImages,
        template: str,
        objective: Objective,
        drop: str,
        seed: int,
        *,
        batch_size: int,
        memory: int,
    ) -> None:
        if backbone.dtype in (torch.float16, torch.bfloat16):
            log.warning("The weights were rounded to %s: load them in float32 to search exactly.", backbone.dtype)
        copy = backbone.copy()
        if backbone.dtype != torch.float64:
            copy.model.float()
        prompts = None
        if "prompts" in backbone.capabilities:
            prompts = class_prompts(template, data.class_names)
        self.network = Network(copy, data.pixels, prompts, batch_size=batch_size, memory=memory)
        self.labels = data.labels.to(copy.device)
        self.objective, self.drop, self.seed = objective, drop, seed
        self.decomposed: dict[str, tuple[Tensor, ...]] = {}

    def weight(self, name: str, ratio: float) -> Tensor:
        """The original weight without a share of its singular values; decomposed once."""
        original = self.network.backbone.linear(name).weight
        rank = dropped_rank(original.shape, ratio)
        if not rank:
            return original.clone()
        if name not in self.decomposed:
            self.decomposed[name] = torch.linalg.svd(original, full_matrices=False)
        return compose(self.decomposed[name], rank, drop=self.drop, generator=draw(self.seed, name))

    def measure(self, name: str, ratios: Sequence[float]) -> Measured:
        """The objective's figures for every ratio of a weight that is not decided yet."""
        weights = [self.weight(name, ratio) for ratio in ratios]

        def terms(global_logits: Tensor, local_logits: Tensor, rows: Tensor) -> Terms:
            return self.objective.terms(global_logits, local_logits, self.labels[rows])

        parts = self.network.evaluate(name, weights, terms)
        return {ratio: self.objective.measure(of_one) for ratio, of_one in zip(ratios, parts, strict=True)}

    def commit(self, name: str, ratio: float, *, refresh: bool = False) -> None:
        """Decide a weight."""
        if dropped_rank(self.network.backbone.linear(name).weight.shape, ratio):
            self.network.commit(name, self.weight(name, ratio), refresh=refresh)
        self.decomposed.pop(name, None)


@dataclass
class _Run:
    """What both kinds of search share: trials, their log, and the value they lower."""

    trials: Trials
    log: _Log
    objective: Objective
    ratios: list[float]

    def measure(self, step: int, name: str, ratios: Sequence[float]) -> Measured:
        known = {ratio: found for ratio in ratios if (found := self.log.get(step, name, ratio)) is not None}
        # All or none: candidates share passes, and the size of a pass shows in the last digits.
        measured = self.trials.measure(name, ratios) if len(known) < len(ratios) else {}
        for ratio in ratios:
            if ratio not in known:
                self.log.add(step, name, ratio, measured[ratio])
        return {ratio: known.get(ratio) or measured[ratio] for ratio in ratios}

    def values(self, measured: Measured) -> list[tuple[float, float]]:
        return [(ratio, self.objective.value(figures)) for ratio, figures in measured.items()]


Tell = Callable[[dict[str, float]], Any]


def _greedy(run: _Run, names: Sequence[str], tell: Tell) -> Iterator[Step]:
    incumbent = float("inf")
    for number, name in enumerate(names):
        # Once there is a best value, the weight as it is would only measure it again.
        measured = run.measure(number, name, run.ratios if number == 0 else run.ratios[1:])
        before = incumbent
        ratio, incumbent = accept(before, run.values(measured))
        run.trials.commit(name, ratio)
        tell({"best": incumbent})
        yield _step(name, ratio, before, incumbent, measured, run)


def _exhaustive(run: _Run, names: Sequence[str], tell: Tell) -> Iterator[Step]:
    """Decide the weight with the best candidate of all, and look at all the others again.

    A sweep without an improvement leaves everything as it is, and so would all later ones: the search ends.
    """
    undecided, incumbent, number = list(names), float("inf"), 0
    while undecided:
        before, best = incumbent, ("", 0.0)
        sweep: dict[str, Measured] = {}
        for name in undecided:
            first = number == 0 and name == undecided[0]
            sweep[name] = run.measure(number, name, run.ratios if first else run.ratios[1:])
            ratio, value = accept(incumbent, run.values(sweep[name]))
            if value < incumbent:
                best, incumbent = (name, ratio), value
            tell({"best": incumbent})
        name, ratio = best
        if not ratio:
            for rest in undecided:
                yield _step(rest, 0.0, before, incumbent, sweep[rest], run)
            return
        run.trials.commit(name, ratio, refresh=True)
        undecided.remove(name)
        number += 1
        yield _step(name, ratio, before, incumbent, sweep[name], run)


def _step(name: str, ratio: float, before: float, value: float, measured: Measured, run: _Run) -> Step:
    values = sorted([value for _, value in run.values(measured)] + ([before] if before < float("inf") else []))
    margin = values[1] - values[0] if len(values) > 1 else float("inf")
    return Step(name, ratio, before, value, margin, margin <= _NEAR * max(1.0, abs(values[0])), measured)


def _warn(steps: Sequence[Step]) -> None:
    if near := [step.weight for step in steps if step.near_tie]:
        log.warning(
            "%d of %d decisions were within the noise of float32 (%s): another machine may choose otherwise.",
            len(near),
            len(steps),
            ", ".join(near[:5]),
        )


def _plain(step: Step) -> dict[str, Any]:
    """The step as JSON can hold it: no infinities, keys as text."""
    content = asdict(step)
    content["candidates"] = {f"{ratio:g}": figures for ratio, figures in step.candidates.items()}
    return {name: None if value == float("inf") else value for name, value in content.items()}


# ---- the log


class _Log:
    """Every measured candidate as one JSON line behind a line with the search's settings; None keeps nothing."""

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any], resume: bool) -> None:
        self.path = None if path is None else Path(path)
        self.known: dict[tuple[int, str, float], dict[str, float]] = {}
        if self.path is None:
            return
        header = json.loads(json.dumps({"search": settings}))
        found = resume and self.path.exists() and self.path.stat().st_size
        text = "".join(json.dumps(line) + "\n" for line in (self._read(header) if found else [header]))
        write_atomically(self.path, lambda path: path.write_text(text, encoding="utf-8"))

    def _read(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        """The lines of a search with the same settings; one cut short by a killed process is left out."""
        assert self.path is not None
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        if not lines or lines[0] != header:
            first = lines[0] if lines and isinstance(lines[0], dict) else {}
            old, new = first.get("search"), header["search"]
            changed = ", ".join(name for name in new if not isinstance(old, dict) or old.get(name) != new[name])
            raise UsageError(
                f"{self.path} is the log of another search (other images, classes, weights or options: {changed}): "
                "remove it, or give another file."
            )
        for line in lines[1:]:
            self.known[line["step"], line["weight"], line["ratio"]] = line["measured"]
        return lines

    def get(self, step: int, weight: str, ratio: float) -> dict[str, float] | None:
        return self.known.get((step, weight, ratio))

    def add(self, step: int, weight: str, ratio: float, measured: dict[str, float]) -> None:
        if self.path is None:
            return
        line = {"step": step, "weight": weight, "ratio": ratio, "measured": measured}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def search_in(folder: str | Path, backbone: Backbone, images: Any, **options: Any) -> SeTAREdit:
    """Search and save; a search that was interrupted goes on from the log in `folder`.

    Args:
        folder: for the edit.
        backbone: unedited.
        images: labelled.
        **options: of `search`.
    """
    edit = search(backbone, images, log_file=Path(folder) / "search.jsonl", **options)
    edit.save_pretrained(folder)
    return edit
