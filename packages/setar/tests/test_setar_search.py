"""The search picks what a plain one picks that keeps nothing; its log, its record, and what it refuses.

The plain search here sets a weight, runs the whole network on all images and all prompts, and starts anew for the
next candidate. Models are float64, so that no near tie decides otherwise.
"""

import itertools
import json
import logging
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from ood_core import create_backbone
from ood_core.backbones.timm import TimmBackbone
from ood_core.backbones.timm import image_transform as timm_transform
from ood_core.backbones.transform import ImageTransform
from ood_core.data import PILImages
from ood_core.errors import DataError, ImageError, UsageError
from ood_setar.edit import draw
from ood_setar.functional import search_loss, truncate
from ood_setar.objective import Objective
from ood_setar.search import KINDS, ORDERS, RATIOS, Trials, search, visiting_order

# Names of different lengths, so that prompts end at different tokens.
LABELS = ["elephant", "catfish", "bee", "dog", "catfish", "elephant", "bee"]
CLASSES = ["bee", "catfish", "dog", "elephant"]  # as sources sort them
FEW = (0.1, 0.25, 0.4)
SETTINGS = {"k": 2, "ood_weight": 0.3, "loss_batch": 3}
REPLAY = json.loads((Path(__file__).parent / "golden" / "setar_replay.json").read_text())

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the plain search


def whole_pass(backbone, pixels, prompts):
    """Logits of all images, and of their cells, by one pass through everything."""
    pixels = pixels.to(backbone.dtype)
    with torch.no_grad():
        tokens = backbone.prefix(pixels)
        behind = backbone._run_last_block(tokens)
        image = backbone.image_embedding(behind)
        if backbone.pools_by_attention:
            pool = backbone.network.attn_pool
            patches = backbone.network.norm(behind).split(1, dim=1)
            local = torch.stack([pool(patch) for patch in patches], dim=1)  # each attended alone
        else:
            local = backbone.local_embedding(backbone.layers()[-1].parts.value_path(tokens))
        if prompts is None:
            return backbone.logits(image), backbone.logits(local)
        embeddings, end = backbone.embed_texts(prompts)
        x = backbone.add_positions(embeddings)
        for layer in backbone.layers("text", x.shape[1]):
            x = layer(x)
        text = F.normalize(backbone.project_text(backbone.text_norm(x[torch.arange(len(x)), end])), dim=-1)
        return tuple(backbone.logit_scale * F.normalize(x, dim=-1) @ text.T for x in (image, local))


class Plain:
    """A network whose weights are tried one by one; `value` runs all of it."""

    def __init__(self, backbone, source, classes, *, drop="minor", seed=5, template="a photo of a {}", figure=None):
        self.network, self.drop, self.seed = backbone.copy(), drop, seed
        self.original = {name: self.network.linear(name).weight.clone() for name in self.network.linears()}
        self.pixels = torch.stack([backbone.transform(image) for _, image in source])
        self.labels = torch.tensor([classes.index(source.label_names[label]) for label in source.labels])
        self.prompts = None
        if "prompts" in backbone.capabilities:
            self.prompts = [template.replace("{}", name) for name in classes]
        self.figure = figure or pooled_loss

    def put(self, name, ratio):
        weight = truncate(self.original[name], ratio, drop=self.drop, generator=draw(self.seed, name))
        self.network.linear(name).set(weight)

    def value(self, name, ratio):
        self.put(name, ratio)
        return self.figure(*whole_pass(self.network, self.pixels, self.prompts), self.labels)


def pooled_loss(logits, local, labels, *, k=2, ood_weight=0.3, loss_batch=3):
    """Losses of contiguous batches, weighted by their sizes."""
    total = 0.0
    for start in range(0, len(labels), loss_batch):
        rows = slice(start, start + loss_batch)
        loss = search_loss(logits[rows], local[rows], labels[rows], k=k, weight=ood_weight)
        total += len(labels[rows]) * loss.item()
    return total / len(labels)


def plain_greedy(plain, names, ratios):
    """[(name, ratio, {ratio: value})]: every candidate of every weight, the weight as it is among them."""
    incumbent, steps = math.inf, []
    for name in names:
        chosen, values = 0.0, {}
        for ratio in (0.0, *ratios):
            values[ratio] = plain.value(name, ratio)
            if values[ratio] < incumbent:
                incumbent, chosen = values[ratio], ratio
        plain.put(name, chosen)
        steps.append((name, chosen, values))
    return steps


def plain_exhaustive(plain, names, ratios):
    """The best pair of all undecided weights is decided; without an improvement the first weight stays as it is."""
    undecided, incumbent, steps = list(names), math.inf, []
    while undecided:
        best, sweep = (undecided[0], 0.0), {}
        for name in undecided:
            sweep[name] = {}
            for ratio in (0.0, *ratios):
                sweep[name][ratio] = plain.value(name, ratio)
                if sweep[name][ratio] < incumbent:
                    incumbent, best = sweep[name][ratio], (name, ratio)
            plain.put(name, 0.0)
        plain.put(*best)
        undecided.remove(best[0])
        steps.append((*best, sweep[best[0]]))
    return steps


def assert_same(edit, expected, *, figure="loss", sign=1, rel=1e-9):
    """The decisions, the value of every candidate, and what a step says about itself."""
    steps = edit.record["steps"]
    assert [(step["weight"], step["ratio"]) for step in steps] == [step[:2] for step in expected]
    assert edit.ratios == dict(step[:2] for step in expected)
    incumbent = math.inf
    for step, (name, ratio, values) in zip(steps, expected, strict=True):
        assert step["before"] == (None if incumbent == math.inf else pytest.approx(incumbent, rel=rel)), name
        for text, measured in step["candidates"].items():
            assert measured[figure] == pytest.approx(sign * values[float(text)], rel=rel, abs=1e-12), (name, text)
        assert set(values) - {float(text) for text in step["candidates"]} <= {0.0}
        incumbent = min(incumbent, values[ratio])
        assert step["value"] == pytest.approx(incumbent, rel=rel)


def names_of(order, kind="up", visual=2, text=2, projection=False):
    """Written out: top to bottom, visual then text, or as the order says."""
    towers = {}
    for tower, depth in (("visual", visual), ("text", text)):
        blocks = [f"{tower}.{layer}.{kind}" for layer in range(depth - 1, -1, -1)]
        towers[tower] = [f"{tower}.projection"] * (projection or kind == "projection") + blocks * (kind != "projection")
    return {
        "visual_text": towers["visual"] + towers["text"],
        "text_visual": towers["text"] + towers["visual"],
        "visual_only": towers["visual"],
        "text_only": towers["text"],
        "interleaved": [name for pair in itertools.zip_longest(*towers.values()) for name in pair if name],
        "exhaustive": towers["visual"] + towers["text"],
    }[order]


@pytest.fixture
def photos(make):
    return make.photos(LABELS)


@pytest.fixture(scope="module")
def clip(make):
    return make.clip()


# ---- the same as the plain search


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_decides_as_the_plain_search(clip, photos, order):
    walk = plain_exhaustive if order == "exhaustive" else plain_greedy
    expected = walk(Plain(clip, photos, CLASSES), names_of(order), FEW)
    assert any(ratio for _, ratio, _ in expected)
    edit = search(clip, photos, order=order, ratios=FEW, batch_size=2, **SETTINGS)
    assert_same(edit, expected)


@pytest.mark.parametrize("projection", [False, True], ids=["", "projection-first"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight_decides_as_the_plain_search(clip, photos, kind, projection):
    names = names_of("visual_text", kind, projection=projection)
    expected = plain_greedy(Plain(clip, photos, CLASSES), names, FEW)
    edit = search(clip, photos, kind=kind, include_projection=projection, ratios=FEW, batch_size=3, **SETTINGS)
    assert_same(edit, expected)


@pytest.mark.parametrize("kind", ["up", "down", "value", "query", "projection"])
def test_the_same_weights_in_the_other_library_give_the_same_search(make, clip, photos, kind):
    theirs = make.as_transformers(clip)
    edits = [search(one, photos, kind=kind, ratios=FEW, batch_size=3, **SETTINGS) for one in (clip, theirs)]
    names = names_of("visual_text", kind)
    for edit in edits:
        assert_same(edit, plain_greedy(Plain(theirs, photos, CLASSES), names, FEW))
    assert edits[0].ratios == edits[1].ratios
    assert edits[0].fingerprint != edits[1].fingerprint


SWIN = ["visual.1.1", "visual.1.0", "visual.0.1", "visual.0.0"]
CLASSIFIERS = {
    "vit": (lambda make: make.vit(seed=1), ["visual.2", "visual.1", "visual.0"]),
    "vit-mean": (lambda make: make.vit(seed=1, global_pool="avg", reg_tokens=2), ["visual.2", "visual.1", "visual.0"]),
    "swin-1": (lambda make: make.swin(1), SWIN),
    "swin-2": (lambda make: make.swin(2), SWIN),
}


@pytest.mark.parametrize("order", [None, "exhaustive"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_decide_as_the_plain_search(make, photos, name, order):
    build, layers = CLASSIFIERS[name]
    backbone = build(make)
    if order == "exhaustive":  # towers it does not have are refused, see below
        with pytest.raises(UsageError, match=r"text\.\*\.up"):
            search(backbone, photos, order=order, ratios=FEW)
        return
    for kind in ("up", "down", "out", "value"):
        expected = plain_greedy(Plain(backbone, photos, CLASSES), [f"{layer}.{kind}" for layer in layers], FEW)
        edit = search(backbone, photos, kind=kind, ratios=FEW, batch_size=3, **SETTINGS)
        assert_same(edit, expected)
        assert edit.record["search"]["order"] == "visual_only"


@pytest.mark.parametrize("drop", ["principal", "random"])
def test_other_singular_values_are_dropped_on_request(clip, photos, drop):
    for order, walk in (("visual_text", plain_greedy), ("exhaustive", plain_exhaustive)):
        expected = walk(Plain(clip, photos, CLASSES, drop=drop, seed=8), names_of(order), FEW)
        edit = search(clip, photos, order=order, drop=drop, seed=8, ratios=FEW, batch_size=3, **SETTINGS)
        assert_same(edit, expected)
        assert (edit.drop, edit.seed) == (drop, 8)


def test_the_random_draw_depends_on_the_seed_and_nothing_else(clip, photos):
    def losses(seed, kind="up"):
        torch.manual_seed(seed + 1)
        edit = search(clip, photos, drop="random", seed=seed, ratios=FEW, order="visual_only", kind=kind, **SETTINGS)
        return [step["candidates"]["0.4"]["loss"] for step in edit.record["steps"]]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


@pytest.mark.parametrize("order", ["visual_text", "interleaved", "exhaustive"])
@pytest.mark.parametrize(
    ("batch_size", "memory"),
    [(1, 0), (3, 30_000), (7, 30_000), (2, 80_000), (3, 1 << 30), (64, 1 << 30)],
)
def test_batches_and_memory_change_nothing(make, photos, order, memory, batch_size):
    backbone = make.clip((4, 4), seed=3)
    if order not in FOUND:
        walk = plain_exhaustive if order == "exhaustive" else plain_greedy
        FOUND[order] = walk(Plain(backbone, photos, CLASSES), names_of(order, visual=4, text=4), (0.2,))
    edit = search(backbone, photos, order=order, ratios=(0.2,), batch_size=batch_size, memory=memory, **SETTINGS)
    assert_same(edit, FOUND[order])


FOUND = {}  # by the plain search, which takes longest


def test_memory_decides_how_many_inputs_are_kept(make, photos):
    from ood_setar.network import Network

    backbone = make.clip((4, 4))
    pixels = torch.stack([backbone.transform(image) for _, image in photos])
    size = 7 * 17 * 24 * 8  # images, tokens, width, bytes
    for memory, kept in ((0, [0]), (size, [0, 2]), (3 * size - 1, [0, 2]), (3 * size, [0, 1, 2, 3])):
        network = Network(backbone.copy(), pixels, ["a cat", "an elephant"], batch_size=3, memory=memory)
        assert sorted(network.towers["visual"].kept) == kept


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("order", ["visual_text", "interleaved", "exhaustive"])
def test_one_layer_towers_and_one_image(make, order, count):
    backbone, source = make.clip((1, 1), seed=2), make.photos(LABELS[:count])
    for options in ({}, {"kind": "key"}, {"include_projection": True}):
        walk = plain_exhaustive if order == "exhaustive" else plain_greedy
        kind, projection = options.get("kind", "up"), options.get("include_projection", False)
        names = names_of(order, kind, visual=1, text=1, projection=projection)
        expected = walk(Plain(backbone, source, CLASSES), names, FEW)
        edit = search(backbone, source, class_names=CLASSES, order=order, ratios=FEW, **options, **SETTINGS)
        assert_same(edit, expected)


def test_in_float32_the_decisions_are_those_of_float64(make, clip, photos):
    single = clip.copy()
    single.model.float()
    expected = plain_greedy(Plain(clip, photos, CLASSES), names_of("visual_text"), FEW)
    edit = search(single, photos, ratios=FEW, batch_size=2, **SETTINGS)
    assert_same(edit, expected, rel=1e-5)
    assert_same(edit, plain_greedy(Plain(single, photos, CLASSES), names_of("visual_text"), FEW), rel=1e-5)


def test_half_precision_weights_are_searched_in_float32(clip, photos, caplog):
    half = clip.copy()
    half.model.bfloat16()
    rounded = half.copy()
    rounded.model.double()
    expected = plain_greedy(Plain(rounded, photos, CLASSES), names_of("visual_text"), FEW)
    with caplog.at_level(logging.WARNING):
        edit = search(half, photos, ratios=FEW, **SETTINGS)
    assert "rounded to torch.bfloat16" in caplog.text
    assert half.dtype == torch.bfloat16
    assert half.copy().logit_scale == rounded.logit_scale == clip.logit_scale  # read before the rounding
    assert_same(edit, expected, rel=1e-5)


def test_the_logits_are_those_of_the_library_itself(clip, photos):
    """open_clip's own encoders for images and texts, and the local features of the last block written out."""
    model = clip.model
    pixels = torch.stack([clip.transform(image) for _, image in photos]).double()
    with torch.no_grad():
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(clip.tokenizer(["a photo of a cat", "a photo of an elephant"]), normalize=True)
        block, visual = model.visual.transformer.resblocks[-1], model.visual
        seen = []
        hook = block.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        visual(pixels)
        hook.remove()
        (h,) = seen
        width = h.shape[-1]
        weight, bias = block.attn.in_proj_weight[2 * width :], block.attn.in_proj_bias[2 * width :]
        u = h + block.attn.out_proj(block.ln_1(h) @ weight.T + bias)
        w = u + block.mlp(block.ln_2(u))
        local = F.normalize((visual.ln_post(w) @ visual.proj)[:, 1:], dim=-1)
    found = whole_pass(clip, pixels, ["a photo of a cat", "a photo of an elephant"])
    for ours, features in zip(found, (image, local), strict=True):
        torch.testing.assert_close(ours, model.logit_scale.exp() * features @ text.T, rtol=1e-9, atol=1e-9)


def test_templates_and_class_names_make_the_prompts(clip, photos):
    renamed = PILImages(
        [photos.open(i) for i in range(7)], [label.replace("elephant", "sea_elephant") for label in LABELS]
    )
    classes = ["dog", "sea elephant", "bee", "catfish"]
    for template in ("a drawing of a {}", "photo"):
        written = "a photo of a {}" if template == "photo" else template
        plain = Plain(clip, photos, ["dog", "elephant", "bee", "catfish"], template=written)
        plain.prompts = [written.replace("{}", name) for name in classes]
        expected = plain_greedy(plain, names_of("text_only"), FEW)
        edit = search(clip, renamed, class_names=classes, template=template, order="text_only", ratios=FEW, **SETTINGS)
        assert_same(edit, expected)


def test_labels_that_a_source_has_in_another_order(make, photos):
    """A classifier's output i is class_names[i], whatever the order of the source's labels."""
    backbone = make.vit(seed=1)
    classes = ["dog", "elephant", "bee", "catfish"]
    expected = plain_greedy(Plain(backbone, photos, classes), ["visual.2.up", "visual.1.up", "visual.0.up"], FEW)
    assert_same(search(backbone, photos, class_names=classes, ratios=FEW, **SETTINGS), expected)
    backbone.label_names = classes
    assert_same(search(backbone, photos, ratios=FEW, **SETTINGS), expected)


def test_towers_that_pool_by_attention(make, photos):
    """Their local features come from the pool, behind the last block."""
    backbone = make.vit(class_token=False, global_pool="map")
    expected = plain_greedy(Plain(backbone, photos, CLASSES), ["visual.2.up", "visual.1.up", "visual.0.up"], FEW)
    assert_same(search(backbone, photos, ratios=FEW, **SETTINGS), expected)


def test_defaults(clip, photos):
    edit = search(clip, photos, order="visual_only")
    settings = edit.record["search"]
    assert settings["ratios"] == [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4] == list(RATIOS)
    assert (settings["kind"], settings["drop"], settings["seed"]) == ("up", "minor", 5)
    objective = settings["objective"]
    assert (objective["name"], objective["weight"], objective["batch"]) == ("loss", 0.1, 512)
    assert objective["k"] == round(0.3 * 4)
    assert objective["temperature"] == pytest.approx(20.0)
    assert settings["backbone"] == {"spec": "small-clip", "fingerprint": clip.fingerprint, "dtype": "float64"}
    assert settings["images"]["count"] == 7
    json.dumps(edit.record)  # plain values only


# ---- other objectives


def curve_metric(name, positive, negative):
    """AUROC, average precision or FPR95 by loops."""
    if name == "auroc":
        return np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])
    if name == "aupr":
        total, last = 0.0, 0.0
        for threshold in sorted(set(positive), reverse=True):
            recall = np.mean([p >= threshold for p in positive])
            kept = sum(p >= threshold for p in positive)
            total += (recall - last) * kept / (kept + sum(n >= threshold for n in negative))
            last = recall
        return total
    threshold = max(t for t in positive if np.mean([p >= t for p in positive]) >= 0.95)
    return np.mean([n >= threshold for n in negative])


def scores_by_loops(scorer, logits, local, labels, k, temperature):
    """Scores of the images, and of their pseudo-OOD cells taken as images whose cells are those cells."""

    def sure(row):
        return torch.softmax(row / temperature, -1).max().item()

    images, cells = [], []
    for whole, parts, label in zip(logits, local, labels.tolist(), strict=True):
        odd = [part for part in parts if label not in part.topk(k).indices.tolist()]
        if scorer == "energy":
            images.append(temperature * torch.logsumexp(whole / temperature, -1).item())
            cells += [temperature * torch.logsumexp(part / temperature, -1).item() for part in odd]
            continue
        own, others = (max(map(sure, parts)), max(map(sure, odd), default=0)) if scorer == "gl_mcm" else (0, 0)
        images.append(sure(whole) + own)
        cells += [sure(part) + others for part in odd]
    return images, cells


@pytest.mark.parametrize("scorer", ["mcm", "gl_mcm", "energy"])
@pytest.mark.parametrize("objective", ["auroc", "aupr", "fpr95"])
def test_a_search_by_a_score_decides_as_the_plain_search(make, clip, photos, objective, scorer):
    sign = 1 if objective == "fpr95" else -1

    for backbone, order, temperature in ((clip, "visual_text", 20.0), (make.vit(seed=1), "visual_only", 1.0)):

        def figure(logits, local, labels, temperature=temperature):
            return sign * curve_metric(objective, *scores_by_loops(scorer, logits, local, labels, 2, temperature))

        names = names_of(order) if order == "visual_text" else ["visual.2.up", "visual.1.up", "visual.0.up"]
        expected = plain_greedy(Plain(backbone, photos, CLASSES, figure=figure), names, FEW)
        edit = search(backbone, photos, objective=objective, scorer=scorer, ratios=FEW, batch_size=3, **SETTINGS)
        got = edit.record["steps"]
        assert [(step["weight"], step["ratio"]) for step in got] == [step[:2] for step in expected]
        for step, (_, _, values) in zip(got, expected, strict=True):
            for text, measured in step["candidates"].items():
                assert measured[objective] == pytest.approx(sign * values[float(text)], abs=1e-12)
                assert set(measured) > {"loss", "loss_id", "loss_ood", "accuracy", "pseudo_ood_cells"}


def test_the_temperature_divides_the_logits_in_scores_alone(clip, photos):
    options = {"ratios": FEW, "objective": "auroc", "scorer": "gl_mcm", "order": "visual_only"}

    def figure(logits, local, labels):
        return -curve_metric("auroc", *scores_by_loops("gl_mcm", logits, local, labels, 2, 3.0))

    expected = plain_greedy(Plain(clip, photos, CLASSES, figure=figure), names_of("visual_only"), FEW)
    edits = [search(clip, photos, temperature=t, **options, **SETTINGS).record["steps"] for t in (3.0, None)]
    for step, (_, _, values) in zip(edits[0], expected, strict=True):
        for text, measured in step["candidates"].items():
            assert measured["auroc"] == pytest.approx(-values[float(text)], abs=1e-12)
    first = [step[0]["candidates"]["0"] for step in edits]
    assert first[0]["auroc"] != first[1]["auroc"]
    assert first[0]["loss"] == first[1]["loss"]


@pytest.mark.parametrize("objective", ["auroc", "aupr", "fpr95"])
def test_without_pseudo_ood_cells_a_score_tells_nothing_and_nothing_is_pruned(clip, photos, objective, caplog):
    edit = search(clip, photos, objective=objective, ratios=FEW, k=4)
    assert set(edit.ratios.values()) == {0.0}
    assert "no cell is pseudo-OOD" in caplog.text


@pytest.mark.parametrize(("name", "worst"), [("auroc", 0.0), ("aupr", 0.0), ("fpr95", 1.0)])
def test_a_candidate_without_pseudo_ood_cells_is_no_better_than_one_with(name, worst):
    """Its score has nothing to be told apart from: that must not win."""
    objective = Objective(k=2, name=name)
    logits = torch.tensor([[3.0, 0.0, 0.0]])
    own_first, own_last = torch.tensor([[[2.0, 1.0, 0.0]]]), torch.tensor([[[-9.0, 0.0, 9.0]]])
    without, with_cells = (
        objective.measure([objective.terms(logits, local, torch.tensor([0]))]) for local in (own_first, own_last)
    )
    assert (without["pseudo_ood_cells"], with_cells["pseudo_ood_cells"]) == (0, 1)
    assert without[name] == worst
    assert objective.value(without) >= objective.value(with_cells)


def test_loss_figures_follow_from_each_other(clip, photos):
    edit = search(clip, photos, ratios=FEW, order="visual_only", **SETTINGS)
    first = edit.record["steps"][0]["candidates"]["0"]
    logits, local = whole_pass(clip, torch.stack([clip.transform(image) for _, image in photos]),
                               [f"a photo of a {name}" for name in CLASSES])  # fmt: skip
    labels = torch.tensor([CLASSES.index(label) for label in LABELS])
    assert first["loss_id"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-9)
    assert first["accuracy"] == (logits.argmax(-1) == labels).double().mean().item()
    own = local.gather(-1, labels[:, None, None].expand(-1, 16, 1))
    assert first["pseudo_ood_cells"] == int(((local > own).sum(-1) >= 2).sum())
    for step in edit.record["steps"]:
        for measured in step["candidates"].values():
            assert measured["loss"] == pytest.approx(measured["loss_id"] + 0.3 * measured["loss_ood"], rel=1e-12)


# ---- what a search leaves alone, and what it decides in planted cases


@pytest.mark.parametrize("order", ["visual_text", "exhaustive"])
def test_the_backbone_is_not_changed(clip, photos, order):
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    fingerprint, image = clip.fingerprint, clip.encode_image(clip.transform(photos.open(0))[None])
    edit = search(clip, photos, order=order, ratios=FEW, **SETTINGS)
    assert any(edit.ratios.values())
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())
    assert clip.fingerprint == fingerprint == edit.fingerprint
    assert torch.equal(clip.encode_image(clip.transform(photos.open(0))[None]), image)


def test_earlier_decisions_stay_applied(clip, photos):
    """The value at the end of the search is that of the network with all its decisions."""
    for order in ("visual_text", "interleaved", "exhaustive"):
        edit = search(clip, photos, order=order, ratios=FEW, **SETTINGS)
        edited = edit.apply(clip)
        logits = whole_pass(edited, torch.stack([clip.transform(image) for _, image in photos]),
                            [f"a photo of a {name}" for name in CLASSES])  # fmt: skip
        labels = torch.tensor([CLASSES.index(label) for label in LABELS])
        assert pooled_loss(*logits, labels) == pytest.approx(edit.record["steps"][-1]["value"], rel=1e-9)


def even(weight):
    """The matrix with singular values from 4 to 3."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u * torch.linspace(4, 3, len(s), dtype=s.dtype) @ vh


def fitted(make, photos, noisy=None):
    """A classifier whose head tells these images apart, its MLPs needing every direction that they have.

    `noisy` is a weight fitted without the smaller 40 % of its singular directions, then given noise there.
    """
    backbone = make.vit(seed=6)
    for name in backbone.linears():
        if name.endswith(".up"):
            weight = even(backbone.linear(name).weight)
            backbone.linear(name).set(truncate(weight, 0.4) if name == noisy else weight)
    pixels = torch.stack([backbone.transform(image) for _, image in photos]).double()
    wanted = 12.0 * F.one_hot(torch.tensor([CLASSES.index(label) for label in LABELS]), 4).double()
    with torch.no_grad():
        embedding = backbone.image_embedding(backbone._run_last_block(backbone.prefix(pixels)))
        head = torch.linalg.lstsq(embedding, wanted, driver="gelsd").solution
        backbone.model.head.weight.copy_(head.T)
        backbone.model.head.bias.zero_()
    if noisy is not None:
        clean = backbone.linear(noisy).weight.clone()
        u, s, vh = torch.linalg.svd(clean, full_matrices=False)
        rank = round(0.4 * len(s))
        assert s[-rank:].max() < 1e-9 < 3 < s[-rank - 1]
        noise = torch.linspace(0.9, 0.5, rank, dtype=s.dtype)
        backbone.linear(noisy).set(clean + u[:, -rank:] * noise @ vh[-rank:])
        torch.testing.assert_close(truncate(backbone.linear(noisy).weight, 0.4), clean)
    return TimmBackbone(backbone.model, backbone.transform, spec="fitted")


@pytest.mark.parametrize("noisy", ["visual.0.up", "visual.1.up", "visual.2.up"])
def test_noise_in_the_smallest_directions_is_found_and_nothing_else_is_pruned(make, photos, noisy):
    backbone = fitted(make, photos, noisy)
    edit = search(backbone, photos, ood_weight=0.0)
    assert {name: ratio for name, ratio in edit.ratios.items() if ratio} == {noisy: 0.4}
    clean = math.log(1 + 3 * math.exp(-12.0))  # the head gives 12 to the own class, 0 to three others
    assert edit.record["steps"][-1]["value"] == pytest.approx(clean, rel=1e-6)
    assert edit.record["steps"][0]["candidates"]["0"]["loss"] > 1.5 * clean


def test_a_model_that_needs_all_its_directions_is_left_as_it_is(make, photos):
    backbone = fitted(make, photos)
    edit = search(backbone, photos, ood_weight=0.0)
    assert set(edit.ratios.values()) == {0.0}
    first = edit.record["steps"][0]["candidates"]["0"]["loss"]
    assert {step["value"] for step in edit.record["steps"]} == {first}
    edited = edit.apply(backbone)
    assert edited.fingerprint == backbone.fingerprint
    x = torch.stack([backbone.transform(image) for _, image in photos])
    assert torch.equal(edited.encode_logits(x), backbone.encode_logits(x))


@pytest.mark.parametrize("order", ["visual_text", "exhaustive"])
def test_equal_losses_keep_the_weight_as_it_is(make, photos, order):
    """Weights of zeros: every truncation of them is the same weight, bit by bit."""
    backbone = make.clip()
    for name in backbone.linears():
        if name.endswith(".up"):
            backbone.linear(name).set(torch.zeros_like(backbone.linear(name).weight))
    backbone = type(backbone)(backbone.model, backbone.tokenizer, backbone.transform)
    edit = search(backbone, photos, order=order, ratios=FEW, batch_size=7, **SETTINGS)
    assert set(edit.ratios.values()) == {0.0}
    losses = {measured["loss"] for step in edit.record["steps"] for measured in step["candidates"].values()}
    assert len(losses) == 1
    assert all(step["margin"] == 0 and step["near_tie"] for step in edit.record["steps"])


# ---- acceptance, on tables of losses instead of a network


@pytest.fixture
def table(monkeypatch):
    """Let searches read losses from a table {weight: [losses of the ratios 0, ...]}; notes what they ask for."""
    asked = []

    def use(losses, ratios):
        def measure(self, name, wanted):
            asked.append((name, list(wanted)))
            return {ratio: {"loss": losses[name][[0.0, *ratios].index(ratio)]} for ratio in wanted}

        monkeypatch.setattr(Trials, "measure", measure)
        return asked

    return use


def searched(clip, photos, ratios, **options):
    edit = search(clip, photos, ratios=ratios, order=options.pop("order", "visual_text"), **options)
    return edit.ratios, edit.record["steps"]


def test_the_weight_as_it_is_is_measured_once_and_added_where_it_is_missing(clip, photos, table):
    losses = {name: [1.0, 2.0, 3.0] for name in names_of("visual_text")}
    asked = table(losses, (0.1, 0.2))
    ratios, _ = searched(clip, photos, (0.2, 0.1))
    assert set(ratios.values()) == {0.0}
    assert asked == [
        ("visual.1.up", [0.0, 0.1, 0.2]),
        ("visual.0.up", [0.1, 0.2]),
        ("text.1.up", [0.1, 0.2]),
        ("text.0.up", [0.1, 0.2]),
    ]


def test_equal_losses_keep_the_smaller_ratio_and_margins_are_recorded(clip, photos, table, caplog):
    table(
        {
            "visual.1.up": [1.0, 0.9, 0.9, 1.5],
            "visual.0.up": [0.9, 0.95, 0.9, 0.7],
            "text.1.up": [0.7, 0.7, 0.700001, 0.8],
            "text.0.up": [0.7, 0.5, 0.9, 0.6],
        },
        FEW,
    )
    with caplog.at_level(logging.WARNING):
        ratios, steps = searched(clip, photos, FEW)
    assert ratios == {"visual.1.up": 0.1, "visual.0.up": 0.4, "text.1.up": 0.0, "text.0.up": 0.1}
    assert [step["before"] for step in steps] == [None, 0.9, 0.7, 0.7]
    assert [step["value"] for step in steps] == [0.9, 0.7, 0.7, 0.5]
    assert [step["margin"] for step in steps] == pytest.approx([0.0, 0.2, 0.0, 0.1])
    assert [step["near_tie"] for step in steps] == [True, False, True, False]
    assert "2 of 4 decisions were within the noise of float32 (visual.1.up, text.1.up)" in caplog.text


@pytest.mark.parametrize(("gap", "near"), [(1e-6, True), (1e-5, False), (3e-5, False)])
def test_near_ties(clip, photos, table, gap, near):
    losses = {name: [1.0, 1.5] for name in names_of("visual_text")} | {"visual.0.up": [1.0, 1.0 - gap]}
    table(losses, (0.1,))
    _, steps = searched(clip, photos, (0.1,))
    assert steps[1]["margin"] == pytest.approx(gap)
    assert [step["near_tie"] for step in steps] == [False, near, False, False]


@pytest.mark.parametrize("order", ["visual_text", "exhaustive"])
def test_where_all_candidates_are_worse_nothing_is_pruned(clip, photos, monkeypatch, order):
    def worse(self, measured):
        worse.calls += 1
        return float(worse.calls)

    worse.calls = 0
    monkeypatch.setattr(Objective, "value", worse)
    edit = search(clip, photos, order=order, ratios=FEW, **SETTINGS)
    assert set(edit.ratios.values()) == {0.0}
    edited = edit.apply(clip)
    x = torch.stack([clip.transform(image) for _, image in photos])
    for ours, vanilla in zip(edited.encode_dense(x), clip.encode_dense(x), strict=True):
        assert torch.equal(ours, vanilla)
    assert torch.equal(edited.encode_text(["a cat"]), clip.encode_text(["a cat"]))
    assert edited.fingerprint == clip.fingerprint


def test_exhaustive_takes_the_best_weight_first_and_ends_with_the_first_sweep_without_gain(clip, photos, monkeypatch):
    gains = {"visual.1.up": 0.1, "visual.0.up": 0.0, "text.1.up": 0.3, "text.0.up": -0.1}
    done, sweeps = [], []

    def measure(self, name, ratios):
        sweeps.append((len(done), name))
        base = 1.0 - sum(max(0.0, gains[other]) for other in done)
        return {ratio: {"loss": base - gains[name] * (ratio > 0) + 0.01 * (ratio > 0.1)} for ratio in ratios}

    def commit(self, name, ratio, **_):
        done.append(name)

    monkeypatch.setattr(Trials, "measure", measure)
    monkeypatch.setattr(Trials, "commit", commit)
    ratios, steps = searched(clip, photos, FEW, order="exhaustive")
    assert [step["weight"] for step in steps] == ["text.1.up", "visual.1.up", "visual.0.up", "text.0.up"]
    assert ratios == {"text.1.up": 0.1, "visual.1.up": 0.1, "visual.0.up": 0.0, "text.0.up": 0.0}
    order = names_of("visual_text")
    rest = [name for name in order if name != "text.1.up"]
    assert sweeps == [(0, n) for n in order] + [(1, n) for n in rest] + [(2, n) for n in rest if n != "visual.1.up"]


@pytest.mark.parametrize("name", REPLAY)
def test_blocks_are_visited_as_in_the_published_searches(name):
    layers = [".".join(map(str, [tower, *np.atleast_1d(layer)])) for tower, layer, _ in REPLAY[name]["ratios"]]
    names = [f"{layer}.{kind}" for layer in sorted(layers, key=place) for kind in ("query", "up", "down")]
    names += ["visual.projection", "text.projection"]
    order = "visual_only" if "swin" in name else "visual_text"
    assert visiting_order(names, order=order) == [f"{layer}.up" for layer in layers]


def place(layer):
    tower, *numbers = layer.split(".")
    return tower == "text", [int(number) for number in numbers]


def test_projections_come_before_the_blocks_of_their_tower():
    names = ["visual.0.up", "visual.1.up", "text.0.up", "text.1.up", "visual.projection", "text.projection"]
    for order in ORDERS:
        assert visiting_order(names, order=order, include_projection=True) == names_of(order, projection=True)
    found = visiting_order(names, kind="projection", include_projection=True)
    assert found == ["visual.projection", "text.projection"]


# ---- the log


OPTIONS = {"ratios": FEW, "batch_size": 2, **SETTINGS}


@pytest.mark.parametrize("order", ["visual_text", "exhaustive"])
def test_two_searches_give_the_same_record_bit_by_bit(clip, photos, order):
    backbone = clip.copy()
    backbone.model.float()
    for drop in ("minor", "random"):
        edits = [search(backbone, photos, order=order, drop=drop, **OPTIONS) for _ in range(2)]
        assert asdict(edits[0]) == asdict(edits[1])


@pytest.mark.parametrize("batch_size", [2, 64])
@pytest.mark.parametrize("order", ["visual_text", "exhaustive"])
def test_a_killed_search_resumes_to_the_identical_record(clip, photos, tmp_path, order, batch_size, monkeypatch):
    """In float32, where the size of a batch shows in the last digits."""
    options = OPTIONS | {"order": order, "batch_size": batch_size, "ratios": (0.1, 0.4)}
    backbone = clip.copy()
    backbone.model.float()
    whole = tmp_path / "whole.jsonl"
    edit = search(backbone, photos, log_file=whole, **options)
    assert asdict(edit) == asdict(search(backbone, photos, **options))
    lines = whole.read_text().splitlines(keepends=True)
    measured = sum(len(json.loads(line).get("measured", {})) > 0 for line in lines)
    assert measured == len(lines) - 1

    calls = []
    plain = Trials.measure

    def counted(self, name, ratios):
        calls.append(len(ratios))
        return plain(self, name, ratios)

    monkeypatch.setattr(Trials, "measure", counted)
    for kept in [*range(1, len(lines), 3 if order == "exhaustive" else 1), len(lines)]:
        tail = lines[kept][:25] if kept < len(lines) and kept % 2 else ""  # in the middle of a line, or behind one
        cut = tmp_path / "cut.jsonl"
        cut.write_text("".join(lines[:kept]) + tail)
        calls.clear()
        resumed = search(backbone, photos, log_file=cut, **options)
        assert asdict(resumed) == asdict(edit)
        assert sorted(cut.read_text().splitlines()) == sorted(line.rstrip("\n") for line in lines)
        assert sum(calls) <= measured - (kept - 1) + len(options["ratios"])
    assert not calls  # nothing was left to measure


def test_resuming_is_a_choice_and_a_log_may_lie_in_a_new_folder(clip, photos, tmp_path, monkeypatch):
    log = tmp_path / "new" / "log.jsonl"
    edit = search(clip, photos, log_file=log, **OPTIONS)
    text = log.read_text()
    other = search(clip, photos, log_file=log, resume=False, **OPTIONS | {"ood_weight": 0.9})
    assert other.record != edit.record
    assert log.read_text() != text
    assert asdict(search(clip, photos, log_file=log, resume=False, **OPTIONS)) == asdict(edit)
    assert log.read_text() == text


@pytest.mark.parametrize(
    "change",
    [
        {"ood_weight": 0.31},
        {"k": 1},
        {"ratios": (0.1, 0.25)},
        {"kind": "down"},
        {"order": "text_visual"},
        {"drop": "random"},
        {"seed": 6},
        {"loss_batch": 4},
        {"objective": "auroc"},
        {"template": "a {}"},
        {"class_names": ["bee", "catfish", "dog", "elephant", "fox"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_log_of_another_search_is_refused_and_kept(clip, photos, tmp_path, change):
    log = tmp_path / "log.jsonl"
    search(clip, photos, log_file=log, **OPTIONS)
    text = log.read_text()
    with pytest.raises(UsageError, match="log of another search"):
        search(clip, photos, log_file=log, **OPTIONS | change)
    assert log.read_text() == text


def test_a_log_of_other_images_or_of_another_backbone_or_no_log_is_refused(make, clip, photos, tmp_path):
    log = tmp_path / "log.jsonl"
    search(clip, photos, log_file=log, **OPTIONS)
    for backbone, source, word in (
        (clip, make.photos(LABELS, seed=1), "images"),
        (make.clip(seed=1), photos, "backbone"),
    ):
        with pytest.raises(UsageError, match=rf"log of another search.*: {word}\)"):
            search(backbone, source, log_file=log, **OPTIONS)
    for text in ("no log\n", '{"search": {}}\n', "[1, 2]\n"):
        log.write_text(text)
        with pytest.raises(UsageError, match="log of another search"):
            search(clip, photos, log_file=log, **OPTIONS)
        assert log.read_text() == text


def test_an_empty_log_is_one_that_was_killed_before_its_first_line(clip, photos, tmp_path):
    log, whole = tmp_path / "log.jsonl", tmp_path / "whole.jsonl"
    log.touch()
    edit = search(clip, photos, log_file=log, **OPTIONS)
    assert edit.record == search(clip, photos, log_file=whole, **OPTIONS).record
    assert log.read_text() == whole.read_text()


def test_batches_and_memory_may_differ_between_the_runs_of_a_log(clip, photos, tmp_path):
    log = tmp_path / "log.jsonl"
    edit = search(clip, photos, log_file=log, **OPTIONS)
    again = search(clip, photos, log_file=log, **OPTIONS | {"batch_size": 5, "memory": 0})
    assert again.record == edit.record


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ratios": (0.1, 1.0)}, ValueError, r"ratio=1 is outside \[0, 1\).*5 % is 0\.05"),
        ({"ratios": (0, 5, 10)}, ValueError, "ratio=5"),
        ({"ratios": (-0.1, 0.1)}, ValueError, r"ratio=-0\.1"),
        ({"ratios": (math.nan, 0.1)}, ValueError, "ratio=nan"),
        ({"ratios": (0.0,)}, ValueError, "nothing but 0"),
        ({"ratios": ()}, ValueError, "nothing but 0"),
        ({"ratios": (0.99,)}, ValueError, "drops all 24 singular values of a 96x24"),
        ({"k": 5}, ValueError, r"k=5 is outside \[1, 4\]"),
        ({"k": 0}, ValueError, "k=0"),
        ({"k": True}, TypeError, "k must be an integer"),
        ({"k": 2.0}, TypeError, r"2\.0"),
        ({"kind": "mlp"}, ValueError, "kind='mlp' must be one of 'query'"),
        ({"order": "visual"}, ValueError, "order='visual'"),
        ({"drop": "small"}, ValueError, "drop='small'"),
        ({"objective": "f1"}, ValueError, "objective='f1'"),
        ({"scorer": "msp"}, ValueError, "scorer='msp'"),
        ({"loss_batch": 0}, ValueError, "loss_batch=0"),
        ({"loss_batch": 2.5}, TypeError, "loss_batch"),
        ({"temperature": 0}, ValueError, "temperature=0"),
        ({"temperature": -1.0}, ValueError, r"temperature=-1\.0"),
        ({"ood_weight": math.inf}, ValueError, "weight=inf"),
        ({"ood_weight": math.nan}, ValueError, "weight=nan"),
        ({"ood_weight": "0.1"}, TypeError, r"'0\.1'"),
        ({"ood_weight": True}, TypeError, "True"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"on_error": "skip"}, UsageError, "'skip'"),
        ({"template": "no place"}, UsageError, "no place"),
        ({"class_names": ["bee", "catfish", "dog"]}, DataError, r"\['elephant'\] are not among the 3 classes"),
        ({"class_names": ["elephant"]}, DataError, "are not among the 1 classes"),
    ],
)
def test_bad_options(clip, photos, options, error, words):
    with pytest.raises(error, match=words):
        search(clip, photos, **{"ratios": FEW} | options)


def test_k_of_all_classes_warns_and_leaves_the_cross_entropy(clip, photos, caplog):
    with caplog.at_level(logging.WARNING):
        edit = search(clip, photos, ratios=FEW, k=4, order="visual_only")
    assert "k=4 is the number of classes" in caplog.text
    for step in edit.record["steps"]:
        for measured in step["candidates"].values():
            assert (measured["pseudo_ood_cells"], measured["loss_ood"]) == (0, 0)
            assert measured["loss"] == measured["loss_id"]


def test_images_that_cannot_be_searched_on(make, clip, photos):
    plain = PILImages([photos.open(i) for i in range(7)])
    with pytest.raises(DataError, match="needs labelled images"):
        search(clip, plain, ratios=FEW)
    some = PILImages(
        [photos.open(i) for i in range(7)], [0, 1, 2, -1, 0, 1, 2], label_names=["bee", "catfish", "elephant"]
    )
    with pytest.raises(DataError, match=r"\(none\)"):
        search(clip, some, ratios=FEW)
    with pytest.raises(DataError, match="one class only"):
        search(clip, make.photos(["elephant", "elephant"]), ratios=FEW)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        search(clip, "nowhere/", ratios=FEW)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "projection"}, r"Unknown weight 'visual\.\*\.projection'"),
        ({"order": "visual_text"}, r"Unknown weight 'text\.\*\.up'.*none in this tower"),
        ({"order": "text_only"}, r"Unknown weight 'text\.\*\.up'"),
        ({"order": "interleaved"}, r"Unknown weight 'text\.\*\.up'"),
    ],
)
def test_weights_that_a_classifier_does_not_have(make, photos, options, words):
    with pytest.raises(UsageError, match=words):
        search(make.vit(), photos, ratios=FEW, **options)


def test_towers_of_different_depth_are_not_interleaved(make, photos):
    with pytest.raises(UsageError, match=r"Towers of 3 and 2 weights cannot be interleaved.*visual_text"):
        search(make.clip((3, 2)), photos, ratios=FEW, order="interleaved")


def test_tied_weights_are_refused(make, photos):
    backbone = make.clip()
    blocks = backbone.model.visual.transformer.resblocks
    blocks[1].mlp.c_fc.weight = blocks[0].mlp.c_fc.weight
    with pytest.raises(UsageError, match=r"visual\.1\.up and visual\.0\.up are one tensor"):
        search(backbone, photos, ratios=FEW)
    assert search(backbone, photos, ratios=FEW, kind="down", order="visual_only", **SETTINGS).ratios


def resnet():
    model = timm.create_model("test_resnet", num_classes=4)
    return TimmBackbone(model, timm_transform(model), spec="timm:test_resnet")


def dino_classifier():
    """Its head reads the class token and the mean patch together: no single patch has logits."""
    transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    from ood_core.backbones.transformers import TransformersBackbone

    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7, mlp_ratio=2,
        num_labels=4,
    )  # fmt: skip
    model = transformers.Dinov2ForImageClassification(config)
    return TransformersBackbone(model, ImageTransform(crop=(28, 28), resize=28), spec="hf:dino")


WITHOUT = {
    "timm-resnet": (resnet, {}, "weight|blocks"),
    "open-clip-resnet": ("clip-resnet", {}, "weight|blocks"),
    "open-clip-resnet-text": ("clip-resnet", {"order": "text_only"}, "blocks"),
    "dinov2-classifier": (dino_classifier, {}, "'local'"),
    "no-head": ("no-head", {}, "'logits'"),
    "no-head-with-names": ("no-head", {"class_names": CLASSES}, "'logits'"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_backbones_without_what_a_search_needs(make, photos, name):
    build, options, words = WITHOUT[name]
    if build == "clip-resnet":
        backbone = make.clip(vision={"layers": (1, 1, 1, 1), "width": 8, "head_width": 8})
    elif build == "no-head":
        backbone = make.vit(num_classes=0)
    else:
        backbone = build()
    with pytest.raises(UsageError, match=words):
        search(backbone, photos, ratios=FEW, **options)


def test_a_classifier_of_other_classes(make, photos):
    with pytest.raises(DataError, match="4 classes apart, and there are 3 labels of these images"):
        search(make.vit(), make.photos(["bee", "catfish", "elephant"]), ratios=FEW)
    for names in (["bee", "catfish", "dog", "elephant", "fox"], ["bee", "catfish", "elephant"]):
        with pytest.raises(DataError, match=f"4 classes apart, and there are {len(names)} class_names"):
            search(make.vit(), make.photos(["bee", "catfish", "elephant"]), class_names=names, ratios=FEW)
    known = make.vit()
    known.label_names = ["ant", "bee", "catfish", "dog"]
    with pytest.raises(DataError, match="elephant"):
        search(known, photos, ratios=FEW)


def test_an_edited_backbone_is_not_searched(clip, photos):
    """No edit could be applied to it afterwards."""
    edited = clip.copy()
    edited.linear("visual.0.down").set(torch.zeros_like(edited.linear("visual.0.down").weight))
    with pytest.raises(UsageError, match="edited already"):
        search(edited, photos, ratios=FEW)


def test_images_that_cannot_be_decoded(clip, photos, tmp_path):
    for index, label in enumerate(LABELS):
        (tmp_path / label).mkdir(exist_ok=True)
        photos.open(index).save(tmp_path / label / f"{index}.png")
    expected = search(clip, tmp_path, **OPTIONS)
    (tmp_path / "catfish" / "0.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"0\.png.*on_error='record'"):
        search(clip, tmp_path, **OPTIONS)
    edit = search(clip, tmp_path, on_error="record", **OPTIONS)
    assert edit.ratios == expected.ratios
    for ours, theirs in zip(edit.record["steps"], expected.record["steps"], strict=True):
        for text, measured in theirs["candidates"].items():
            assert ours["candidates"][text] == pytest.approx(measured, rel=1e-12)
    images = edit.record["search"]["images"]
    assert images["count"] == 7
    ((name, reason),) = images["failures"]
    assert name == "catfish/0.png"
    assert "0.png" in reason
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="None of the 8 images could be decoded"):
        search(clip, tmp_path, on_error="record", **OPTIONS)


def test_a_progress_bar_on_request(clip, photos, capsys):
    search(clip, photos, order="visual_only", progress=True, **OPTIONS)
    assert "2/2" in capsys.readouterr().err
    search(clip, photos, order="visual_only", **OPTIONS)
    assert not capsys.readouterr().err


def test_the_embedded_backbone(photos):
    """A trained model: the best value never rises, and the edit is of this backbone."""
    backbone = create_backbone("tiny", dtype="float32")
    edit = search(backbone, photos, ratios=(0.1, 0.3), order="visual_only")
    values = [step["value"] for step in edit.record["steps"]]
    assert values == sorted(values, reverse=True)
    assert list(edit.ratios) == [f"visual.{layer}.up" for layer in (3, 2, 1, 0)]
    assert edit.fingerprint == backbone.fingerprint
