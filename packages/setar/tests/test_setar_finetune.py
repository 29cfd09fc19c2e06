"""Fine-tuning against loops written out here: whole networks with merged weights, gradients by the chain rule.

Models are float64 where nothing else is said, so that a difference is an error and not rounding.
"""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_core.data.augment import Views
from ood_core.errors import DataError, UsageError
from ood_core.training import train
from ood_setar.edit import SeTAREdit
from ood_setar.finetune import Adapters, _forward, _TrainMode, finetune, lora
from ood_setar.functional import dropped_rank, search_loss
from ood_setar.search import search, visiting_order
from timm.layers import DropPath
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

LABELS = ["eel", "cat", "bee", "dog", "cat", "eel", "bee"]
CLASSES = ["bee", "cat", "dog", "eel"]
FUSED = ["visual.1.query", "visual.1.value", "visual.0.key", "text.1.query", "text.1.key", "text.1.value"]
QUICK = {"k": 2, "ood_weight": 0.3, "epochs": 2, "batch_size": 3, "progress": False}

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- a network written out


def pixels_of(backbone, source):
    return torch.stack([backbone.transform(image) for _, image in source])


def outputs(backbone, pixels):
    """Logits of images and cells by one plain pass through both towers; gradients flow."""
    tokens = backbone.prefix(pixels.to(backbone.dtype))
    image = backbone.image_embedding(backbone._run_last_block(tokens))
    local = backbone.local_embedding(backbone.layers()[-1].parts.value_path(tokens))
    if "prompts" not in backbone.capabilities:
        return backbone.logits(image), backbone.logits(local)
    text = whole_text_pass(backbone, [f"a photo of a {name}" for name in CLASSES])
    return tuple(backbone.logit_scale * F.normalize(x, dim=-1) @ text.T for x in (image, local))


def whole_text_pass(backbone, prompts):
    """Unit text features by every block on every token."""
    embeddings, end = backbone.embed_texts(prompts)
    x = backbone.add_positions(embeddings)
    for layer in backbone.layers("text", x.shape[1]):
        x = layer(x)
    return F.normalize(backbone.project_text(backbone.text_norm(x[torch.arange(len(x)), end])), dim=-1)


def targets_of(source):
    return torch.tensor([CLASSES.index(source.label_names[label]) for label in source.labels])


def truncating(backbone, names, ratio=0.3, **options):
    return SeTAREdit(dict.fromkeys(names, ratio), backbone.fingerprint, **options)


def up(backbone):
    order = "visual_text" if "prompts" in backbone.capabilities else "visual_only"
    return visiting_order(backbone.linears(), order=order)


def single(backbone):
    copy = backbone.copy()
    copy.model.float()
    return copy


def moved(edit, adapters, name, letter, change):
    """The edit with the factors of `adapters`, one of them moved."""
    factors = adapters.factors()
    b, a = factors[name]
    factors[name] = (b + change, a) if letter == "B" else (b, a + change)
    return SeTAREdit(edit.ratios, edit.fingerprint, factors=factors, scale=edit.scale)


def state(backbone):
    return {name: value.clone() for name, value in backbone.model.state_dict().items()}


def assert_untouched(backbone, before, fingerprint):
    assert backbone.fingerprint == fingerprint
    assert not backbone.edits
    now = backbone.model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.model.parameters())


def batches_of(size, epochs, batch_size, seed):
    """(epoch, rows) of a training, as the loop itself hands them out."""
    seen, nothing = [], nn.Parameter(torch.zeros(1))

    def losses(rows, epoch):
        seen.append((epoch, rows))
        return {"nothing": nothing.sum()}

    options = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "learning_rate": lambda epoch: 0.0}
    train({"nothing": nothing}, losses, size=size, optimizer=torch.optim.SGD([nothing], lr=0.0), **options)
    return seen


def plain_finetune(backbone, edit, pixels, targets, *, seed=5, epochs=2, batch_size=3, k=2, ood_weight=0.3, rate=0.01):
    """(factors, loss of every step): whole weights in a copy of the network, the factors' gradients from theirs."""
    kept, factors = {}, {}
    for name, ratio in edit.ratios.items():
        u, s, vh = torch.linalg.svd(backbone.linear(name).weight.double())
        rank = round(min(backbone.linear(name).weight.shape) * ratio)
        s = torch.diag_embed(s)
        first, last = slice(0, len(s) - rank), slice(len(s) - rank, len(s))
        kept[name] = u[:, first] @ s[first, first] @ vh[first]
        root = s[last, last].sqrt()
        factors[name] = edit.factors.get(name) or (u[:, last] @ root, root @ vh[last])
        factors[name] = tuple(nn.Parameter(factor.double().clone()) for factor in factors[name])
    network = backbone.copy()
    optimizer = torch.optim.SGD([f for pair in factors.values() for f in pair], lr=1.0, momentum=0.9, weight_decay=5e-4)
    steps = batches_of(len(targets), epochs, batch_size, seed)
    losses = []
    for number, (epoch, rows) in enumerate(steps):
        with torch.no_grad():
            for name, (b, a) in factors.items():
                network.linear(name).weight.copy_(kept[name] + edit.scale * b @ a)
        whole = {name: network.linear(name).parameter.requires_grad_() for name in factors}
        loss = search_loss(*outputs(network, pixels(rows, epoch)), targets[rows], k=k, weight=ood_weight)
        network.model.zero_grad()
        loss.backward()
        for name, (b, a) in factors.items():
            linear = network.linear(name)
            gradient = whole[name].grad.T if linear.transposed else whole[name].grad
            gradient = gradient if linear.rows is None else gradient[linear.rows]
            b.grad, a.grad = edit.scale * gradient @ a.detach().T, edit.scale * b.detach().T @ gradient
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * number / len(steps))) / 2
        optimizer.step()
        losses.append((epoch, loss.item()))
    return {name: tuple(factor.detach() for factor in pair) for name, pair in factors.items()}, losses


def assert_factors(edit, expected, *, rtol=1e-8, atol=1e-10):
    """Singular vectors have no sign: products where the factors are those of a decomposition."""
    assert set(edit.factors) == set(expected)
    for name, (b, a) in expected.items():
        torch.testing.assert_close(edit.factors[name][0] @ edit.factors[name][1], b @ a, rtol=rtol, atol=atol)


# ---- models


@pytest.fixture(scope="module")
def clip(make):
    return make.clip()


@pytest.fixture
def photos(make):
    return make.photos(LABELS)


MODELS = {
    "clip": lambda make: make.clip(),
    "hf-clip": lambda make: make.as_transformers(make.clip()),
    "vit": lambda make: make.vit(seed=1),
    "vit-mean": lambda make: make.vit(seed=1, global_pool="avg", reg_tokens=2),
    "swin-1": lambda make: make.swin(1),
    "swin-2": lambda make: make.swin(2),
    "hf-swin": lambda make: make.hf_swin(),
}
models = pytest.mark.parametrize("model", MODELS)


# ---- where it starts


@models
def test_it_starts_from_the_original_network_not_from_the_truncated_one(make, photos, model):
    backbone = MODELS[model](make)
    edit = truncating(backbone, up(backbone))
    pixels = pixels_of(backbone, photos)
    expected = outputs(backbone, pixels)
    found = Adapters(backbone, edit)(outputs, backbone, pixels)
    truncated = outputs(edit.apply(backbone), pixels)
    for ours, original, without in zip(found, expected, truncated, strict=True):
        torch.testing.assert_close(ours, original, rtol=0, atol=1e-10)
        assert (ours - without).abs().max() > 1e-2


@models
def test_the_start_in_single_precision(make, photos, model):
    backbone = single(MODELS[model](make))
    pixels = pixels_of(backbone, photos)
    found = Adapters(backbone, truncating(backbone, up(backbone)))(outputs, backbone, pixels)
    for ours, original in zip(found, outputs(backbone, pixels), strict=True):
        torch.testing.assert_close(ours, original, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["clip", "hf-clip"])
def test_of_the_last_text_block_only_the_end_marks_pass_the_mlp(make, photos, model):
    """The values and gradients of a whole pass are those of the tests below."""
    backbone = MODELS[model](make)
    last = backbone.layers("text", 4)[-1].module
    tokens, whole = [], backbone.layers("text", 4)[0].module
    for module in (last, whole):
        module.mlp.register_forward_pre_hook(lambda _, received: tokens.append(received[0].numel() // 20))
    finetune(backbone, photos, truncating(backbone, ["text.1.up"]), **QUICK | {"epochs": 1, "batch_size": 7})
    below, above = tokens
    assert above == len(CLASSES) < below


KINDS = {
    "fused": FUSED,
    "one row block": ["visual.1.value"],
    "projections": ["visual.projection", "text.projection"],
    "out and down": ["visual.0.out", "text.1.down"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_beside_the_weights_are_one_network(clip, photos, kind):
    """Factors off their start, so that every adapted row block counts."""
    edit, pixels = truncating(clip, KINDS[kind]), pixels_of(clip, photos)
    adapters = Adapters(clip, edit)
    for original, ours in zip(outputs(clip, pixels), adapters(outputs, clip, pixels), strict=True):
        torch.testing.assert_close(ours, original, rtol=0, atol=1e-10)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in adapters.learned.values():
            factor.add_(0.3 * torch.randn(factor.shape, generator=generator, dtype=factor.dtype))
    merged = SeTAREdit(edit.ratios, edit.fingerprint, factors=adapters.factors()).apply(clip)
    found = adapters(outputs, clip, pixels)
    for ours, expected, original in zip(found, outputs(merged, pixels), outputs(clip, pixels), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
        assert (ours - original).abs().max() > 1e-2


def test_weights_that_lose_nothing_have_no_adapter(clip):
    names = up(clip)
    edit = SeTAREdit({names[0]: 0.25, names[1]: 0.0, names[2]: 0.01}, clip.fingerprint)  # 0.01 of 20 rounds to 0
    adapters = Adapters(clip, edit)
    assert list(adapters.base) == [names[0]]
    assert {name: list(value.shape) for name, value in adapters.learned.items()} == {
        f"{names[0]}.B": [96, 6],
        f"{names[0]}.A": [6, 24],
    }


def test_an_edit_with_factors_goes_on_from_them(clip, photos):
    edit, pixels = truncating(clip, up(clip)), pixels_of(clip, photos)
    tuned = finetune(clip, photos, edit, **QUICK)
    found = Adapters(clip, tuned)(outputs, clip, pixels)
    for ours, expected in zip(found, outputs(tuned.apply(clip), pixels), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    again = finetune(clip, photos, tuned, **QUICK)
    assert again.record["history"][0]["loss"] < tuned.record["history"][0]["loss"]


def test_the_papers_numbers_of_trained_parameters():
    """Of the searched ratios for ImageNet, counted from the weights' shapes alone."""
    clip_base = [(768, 0.15)] * 3 + [(768, 0.05)]
    clip_base += [(512, ratio) for ratio in (0.25, 0.1, 0.2, 0.05, 0.05, 0.2)]
    clip_large = [(1024, ratio) for ratio in (0.05, 0.15, 0.1, 0.05, 0.1, 0.2, 0.15, 0.1, 0.05, 0.15, 0.4)]
    clip_large += [(768, ratio) for ratio in (0.35, 0.1, 0.05, 0.35, 0.2, 0.05, 0.2)]
    swin_base = [(1024, 0.4)] * 2 + [(512, ratio) for ratio in (0.4, 0.4, 0.4, 0.1, 0.25)]
    swin_base += [(256, 0.4), (256, 0.3), (128, 0.1)]
    expected = {"clip base": 2_584_320, "clip large": 11_700_480, "swin base": 6_468_480}
    for name, weights in zip(expected, (clip_base, clip_large, swin_base), strict=True):
        count = sum(dropped_rank((4 * width, width), ratio) * 5 * width for width, ratio in weights)
        assert count == expected[name]


# ---- gradients


@pytest.mark.parametrize("names", [None, FUSED], ids=["up", "fused"])
def test_gradients_are_differences_of_the_merged_networks(clip, photos, names):
    edit, pixels, targets = truncating(clip, names or up(clip)), pixels_of(clip, photos), targets_of(photos)
    adapters = Adapters(clip, edit)

    def loss_of(network):
        with torch.no_grad():
            return search_loss(*outputs(network, pixels), targets, k=2, weight=0.3).item()

    search_loss(*adapters(outputs, clip, pixels), targets, k=2, weight=0.3).backward()
    generator = torch.Generator().manual_seed(1)
    for name in edit.ratios:
        for letter in "BA":
            factor = adapters.learned[f"{name}.{letter}"]
            direction = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
            ahead, behind = (
                loss_of(moved(edit, adapters, name, letter, change).apply(clip))
                for change in (1e-5 * direction, -1e-5 * direction)
            )
            expected = (ahead - behind) / 2e-5
            assert abs(expected) > 1e-4
            assert (factor.grad * direction).sum().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model", ["clip", "vit", "swin-2"])
def test_nothing_but_the_factors_learns(make, photos, model):
    backbone = MODELS[model](make)
    before, fingerprint = state(backbone), backbone.fingerprint
    edit = truncating(backbone, up(backbone))
    adapters = Adapters(backbone, edit)
    targets = targets_of(photos)
    search_loss(*adapters(outputs, backbone, pixels_of(backbone, photos)), targets, k=2, weight=0.3).backward()
    assert all(factor.grad.abs().max() > 0 for factor in adapters.learned.values())
    assert {id(parameter) for parameter in adapters.learned.values()}.isdisjoint(
        id(parameter) for parameter in backbone.model.parameters()
    )
    assert not any(base.requires_grad for base in adapters.base.values())
    tuned = finetune(backbone, photos, edit, **QUICK)
    assert_untouched(backbone, before, fingerprint)
    merged = tuned.apply(backbone)
    assert_untouched(backbone, before, fingerprint)
    changed = {name for name, value in merged.model.state_dict().items() if not torch.equal(value, before[name])}
    assert len(changed) == len(edit.ratios)
    assert merged.fingerprint != fingerprint


# ---- training


PLAIN = {
    "clip": (lambda make: make.clip(), None),
    "clip-fused": (lambda make: make.clip(), FUSED),
    "clip-projections": (lambda make: make.clip(), ["visual.projection", "text.projection", "text.0.down"]),
    "hf-clip": (lambda make: make.as_transformers(make.clip()), None),
    "vit": (lambda make: make.vit(seed=1), None),
    "vit-mean": (lambda make: make.vit(seed=1, global_pool="avg", reg_tokens=2), ["visual.2.value", "visual.2.up"]),
    "swin-1": (lambda make: make.swin(1), None),
    "swin-2": (lambda make: make.swin(2), None),
}


@pytest.mark.parametrize("name", PLAIN)
def test_it_is_the_plain_loop(make, photos, name):
    build, names = PLAIN[name]
    backbone = build(make)
    edit, pixels, targets = truncating(backbone, names or up(backbone)), pixels_of(backbone, photos), targets_of(photos)
    expected, losses = plain_finetune(backbone, edit, lambda rows, epoch: pixels[rows], targets)
    tuned = finetune(backbone, photos, edit, augment=False, **QUICK)
    assert_factors(tuned, expected)
    history = tuned.record["history"]
    for epoch in range(2):
        steps = [loss for at, loss in losses if at == epoch]
        assert len(steps) == 3
        assert history[epoch]["loss"] == pytest.approx(sum(steps) / 3, rel=1e-9)
    # Both epochs differ from the start: a step that did nothing would be seen.
    for weight, (b, a) in expected.items():
        assert (tuned.weight(backbone, weight) - backbone.linear(weight).weight).abs().max() > 1e-5
        merged = SeTAREdit(edit.ratios, factors={weight: (b, a)}).weight(backbone, weight)
        torch.testing.assert_close(tuned.weight(backbone, weight), merged, rtol=0, atol=1e-9)


def test_augmented_views_are_new_in_every_epoch(clip, photos):
    edit, targets = truncating(clip, up(clip)), targets_of(photos)

    def views(rows, epoch):
        made = Views(photos, 1, size=clip.transform.crop, scale=(0.5, 1.0), seed=9, first=epoch)
        return torch.stack([clip.transform(made.open(row)) for row in rows.tolist()])

    expected, _ = plain_finetune(clip, edit, views, targets, seed=9)
    options = QUICK | {"seed": 9, "crop_scale": 0.5}
    tuned = finetune(clip, photos, edit, **options)
    assert_factors(tuned, expected)
    decoded_by_others = finetune(clip, photos, edit, workers=2, **options)
    assert all(torch.equal(decoded_by_others.weight(clip, name), tuned.weight(clip, name)) for name in edit.ratios)
    still = finetune(clip, photos, edit, augment=False, **options)
    for name in edit.ratios:
        assert (still.weight(clip, name) - tuned.weight(clip, name)).abs().max() > 1e-6


def test_images_are_read_once_without_augmentation_and_in_every_epoch_with_it(clip, photos, monkeypatch):
    opened = []
    read = photos.open
    monkeypatch.setattr(photos, "open", lambda index, **options: opened.append(index) or read(index, **options))
    for augment, times in ((False, 1), (True, 2)):
        finetune(clip, photos, truncating(clip, up(clip)), augment=augment, **QUICK)
        assert sorted(opened) == sorted(list(range(len(LABELS))) * times)
        opened.clear()


# ---- train mode

SWINS = {
    "timm-1": lambda make, drop: make.swin(1, drop=drop),
    "timm-2": lambda make, drop: make.swin(2, drop=drop),
    "hf": lambda make, drop: make.hf_swin(drop=drop),
}
swins = pytest.mark.parametrize("model", SWINS)


def drop_paths(backbone):
    return [module for module in backbone.model.modules() if type(module).__name__.endswith("DropPath")]


def test_stochastic_depth_drops_whole_images_at_its_rate():
    model, rows, images = nn.Sequential(DropPath(0.2), DropPath(0.5)), torch.arange(400), torch.ones(400, 2, 3)
    depth = _TrainMode(model, seed=1)
    assert depth.rate == 0.5
    with depth(rows, 0):
        first, second, again = model[0](images), model[1](images), model[1](images)
    for found, rate in ((first, 0.2), (second, 0.5), (again, 0.5)):
        assert torch.equal(found, found[:, :1, :1].expand_as(found))
        assert {round(value, 6) for value in found.unique().tolist()} == {0.0, round(1 / (1 - rate), 6)}
        assert (found[:, 0, 0] == 0).double().mean().item() == pytest.approx(rate, abs=0.07)
    assert 0.3 < ((second == 0) == (again == 0)).double().mean() < 0.7  # every branch has draws of its own
    assert torch.equal(model(images), images)


@swins
def test_swin_is_trained_in_train_mode_and_left_as_it_was(make, photos, model):
    backbone = SWINS[model](make, 0.5)
    before, fingerprint, modes = state(backbone), backbone.fingerprint, []
    assert [module.drop_prob for module in drop_paths(backbone)][-1] == 0.5
    for module in drop_paths(backbone):
        module.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    edit, options = truncating(backbone, up(backbone)), QUICK | {"augment": False}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tuned = finetune(backbone, photos, edit, **options)
    assert torch.equal(torch.rand(4), expected)  # others' random numbers stay as they are
    assert len(modes) > 6
    assert all(modes)
    assert not any(module.training for module in backbone.model.modules())
    assert_untouched(backbone, before, fingerprint)
    assert tuned.record["finetune"]["stochastic_depth"] == 0.5
    quiet = SWINS[model](make, 0.0)
    other = finetune(quiet, photos, truncating(quiet, up(quiet)), **options)
    assert abs(tuned.record["history"][0]["loss"] - other.record["history"][0]["loss"]) > 0.01


@swins
def test_what_is_dropped_depends_on_seed_epoch_and_image_alone(make, photos, model):
    """So a run that goes on, or that several processes share, drops the same."""
    backbone = SWINS[model](make, 0.5)
    pixels, forward, rows = pixels_of(backbone, photos), _forward(backbone, None), torch.arange(len(LABELS))

    def run(rows, epoch=0, seed=1):
        with _TrainMode(backbone.model, seed)(rows, epoch), torch.no_grad():
            return forward(pixels[rows])

    whole, again, quiet = run(rows), run(rows), forward(pixels)
    for part in (rows[2:5], rows.flip(0)):
        for ours, expected in zip(run(part), whole, strict=True):
            torch.testing.assert_close(ours, expected[part], rtol=0, atol=1e-10)
    for logits, same, without in zip(whole, again, quiet, strict=True):
        assert torch.equal(logits, same)
        assert (logits - without).abs().max() > 0.01
    with _TrainMode(backbone.model, 1)(rows, 0), torch.no_grad():
        own = backbone.network(pixels.double())
    torch.testing.assert_close(whole[0], own if model != "hf" else own.logits, rtol=0, atol=1e-10)
    for other in (run(rows, epoch=1), run(rows, seed=2)):
        assert (other[0] - whole[0]).abs().max() > 0.01


def test_batch_norms_keep_their_statistics():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with _TrainMode(model.eval(), seed=1)(torch.arange(8), 0):
        found = model(torch.randn(8, 3))
        assert model[1].training
    assert (found == 0).any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_colours_are_changed_where_asked(clip, make):
    grey = make.photos(LABELS)
    view = Views(grey, 1, size=(32, 32), scale=(1.0, 1.0), seed=1)
    coloured = Views(grey, 1, size=(32, 32), scale=(1.0, 1.0), seed=1, jitter=0.4)
    pairs = [(np.asarray(view.open(i)).astype(float), np.asarray(coloured.open(i)).astype(float)) for i in range(7)]
    ratios = [second.mean() / first.mean() for first, second in pairs]
    assert all(0.55 < ratio < 1.45 for ratio in ratios)
    assert max(ratios) - min(ratios) > 0.1
    assert view.fingerprint != coloured.fingerprint
    with pytest.raises(UsageError, match=r"jitter=1\.5"):
        finetune(clip, grey, truncating(clip, ["text.1.up"]), **QUICK | {"jitter": 1.5})
    plain, other = (finetune(clip, grey, truncating(clip, ["text.1.up"]), **QUICK | {"jitter": j}) for j in (0.0, 0.4))
    assert plain.record["history"] != other.record["history"]


def test_the_rate_is_a_cosine_of_the_step(clip, photos):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        options = QUICK | {"epochs": 4, "batch_size": 2, "augment": False, "learning_rate": 0.02}
        tuned = finetune(clip, photos, truncating(clip, ["text.0.up"]), **options)
    finally:
        hook.remove()
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * step / 16)) for step in range(16)], rel=1e-9)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 0.02
    assert rates[-1] < 0.0002
    assert [epoch["learning_rate"] for epoch in tuned.record["history"]] == rates[3::4]


def test_the_record_says_how_it_was_made(clip, photos):
    found = search(clip, photos, ratios=(0.2, 0.4), order="visual_only", k=2, progress=False)
    edit = SeTAREdit(dict.fromkeys(found.ratios, 0.3), found.fingerprint, record=found.record)
    tuned = finetune(clip, photos, edit, **QUICK)
    assert tuned.record["search"] == found.record["search"]
    assert tuned.ratios == edit.ratios
    assert edit.factors == {}  # the edit given stays as it was
    assert "finetune" not in edit.record
    settings = tuned.record["finetune"]
    expected = {"ood_weight": 0.3, "k": 2, "epochs": 2, "batch_size": 3, "learning_rate": 0.01, "momentum": 0.9}
    expected |= {"weight_decay": 5e-4, "crop_scale": 0.9, "seed": 5, "class_names": CLASSES}
    assert expected.items() <= settings.items()
    assert settings["images"] == {"count": len(LABELS), "fingerprint": photos.fingerprint}
    assert len(tuned.record["history"]) == 2
    for epoch in tuned.record["history"]:
        assert epoch["loss"] == pytest.approx(epoch["loss_id"] + epoch["loss_ood"])


def test_seeds_matter(clip, photos):
    edit = truncating(clip, ["visual.1.up", "text.1.up"])
    first, again, other = (finetune(clip, photos, edit, **QUICK | {"seed": seed}) for seed in (1, 1, 2))
    for name in edit.ratios:
        assert torch.equal(first.factors[name][0], again.factors[name][0])
        assert not torch.equal(first.factors[name][0], other.factors[name][0])


def test_the_loss_falls(clip, photos):
    """Without the cells, which change sides: the cross-entropy alone is smooth."""
    edit = truncating(clip, up(clip))
    options = QUICK | {
        "ood_weight": 0.0,
        "epochs": 10,
        "batch_size": 7,
        "augment": False,
        "momentum": 0.0,
        "learning_rate": 0.1,
    }
    history = finetune(clip, photos, edit, **options).record["history"]
    losses = [epoch["loss"] for epoch in history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.98 * losses[0]
    assert {epoch["loss_ood"] for epoch in history} == {0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_weights_have_factors_in_single_precision(make, photos, dtype):
    backbone = make.clip()
    backbone.model.to(dtype)
    tuned = finetune(backbone, photos, truncating(backbone, up(backbone)), **QUICK | {"augment": False})
    exact = finetune(make.clip(), photos, truncating(backbone, up(backbone)), **QUICK | {"augment": False})
    for name, pair in tuned.factors.items():
        assert {factor.dtype for factor in pair} == {torch.float32}
        assert exact.factors[name][0].dtype == torch.float64
    losses = [edit.record["history"][0]["loss"] for edit in (tuned, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == torch.float32 else 0.1)


def test_save_and_load(clip, photos, tmp_path):
    tuned = finetune(single(clip), photos, truncating(clip, up(clip)), **QUICK)
    tuned.save_pretrained(tmp_path / "edit")
    loaded = SeTAREdit.from_pretrained(tmp_path / "edit")
    first, second = tuned.apply(single(clip)), loaded.apply(single(clip))
    assert first.fingerprint == second.fingerprint
    assert all(torch.equal(*pair) for pair in zip(state(first).values(), state(second).values(), strict=True))
    assert loaded.record == tuned.record


# ---- interrupted


def test_a_resumed_run_ends_bit_identical(clip, photos, tmp_path, monkeypatch):
    edit, file = truncating(clip, up(clip)), tmp_path / "checkpoint.safetensors"
    options = QUICK | {"epochs": 3}
    whole = finetune(clip, photos, edit, **options)
    opened, read = [], photos.open

    def stopping(index, **kinds):
        opened.append(index)
        if len(opened) > 2 * len(LABELS) + 1:
            raise KeyboardInterrupt
        return read(index, **kinds)

    monkeypatch.setattr(photos, "open", stopping)
    with pytest.raises(KeyboardInterrupt):
        finetune(clip, photos, edit, checkpoint=file, **options)
    opened.clear()
    resumed = finetune(clip, photos, edit, checkpoint=file, **options)
    assert len(opened) == len(LABELS)  # one epoch was left
    assert resumed.record["history"] == whole.record["history"]
    for name, pair in whole.factors.items():
        assert all(torch.equal(*both) for both in zip(pair, resumed.factors[name], strict=True))
    opened.clear()
    monkeypatch.setattr(photos, "open", read)
    afresh = finetune(clip, photos, edit, checkpoint=file, resume=False, **options)
    assert afresh.record["history"] == whole.record["history"]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"ood_weight": 0.4}, "ood_weight"),
        ({"augment": False}, "crop_scale"),
        ({"class_names": [*CLASSES, "fox"]}, "class_names"),
        ({"template": "{}"}, "template"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(clip, photos, tmp_path, changed, word):
    edit, file = truncating(clip, ["text.1.up"]), tmp_path / "checkpoint"
    finetune(clip, photos, edit, checkpoint=file, **QUICK | {"epochs": 1})
    with pytest.raises(UsageError, match=f"other settings.*{word}"):
        finetune(clip, photos, edit, checkpoint=file, **QUICK | {"epochs": 1} | changed)


def test_a_checkpoint_of_another_start_is_refused(clip, photos, tmp_path):
    file, options = tmp_path / "checkpoint", QUICK | {"epochs": 1}
    names = ["visual.1.up", "text.1.up"]
    finetune(clip, photos, lora(clip, names, rank=2), checkpoint=file, **options)
    others = {
        "alpha": lora(clip, names, rank=2, alpha=16),
        "seed": lora(clip, names, rank=2, seed=6),
        "ratios": truncating(clip, names, 0.1),  # the same ranks
    }
    assert {pair[0].shape[1] for pair in Adapters(clip, others["ratios"]).factors().values()} == {2}
    for edit in others.values():
        with pytest.raises(UsageError, match="other settings"):
            finetune(clip, photos, edit, checkpoint=file, **options)


# ---- several processes

_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import conftest
from test_setar_finetune import LABELS, shared_run
import torch.distributed as dist

tuned = shared_run(conftest.clip(), conftest.photos(LABELS))
tuned.save_pretrained(f"{sys.argv[2]}/{dist.get_rank()}")
dist.barrier()
dist.destroy_process_group()
"""


def shared_run(backbone, photos):
    """Batches of 3, 3 and 1 image: shares differ, and the last has fewer images than processes."""
    return finetune(backbone, photos, truncating(backbone, up(backbone)), **QUICK)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(clip, photos, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    environment = os.environ | address | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, Path(__file__).parent, tmp_path]
    runs = [
        subprocess.Popen(command, env=environment | {"RANK": rank}, stderr=subprocess.PIPE, text=True) for rank in "01"
    ]
    alone = shared_run(clip, photos)
    for run in runs:
        _, error = run.communicate(timeout=600)
        assert run.returncode == 0, error[-3000:]
    for rank in range(2):
        shared = SeTAREdit.from_pretrained(tmp_path / str(rank))
        for name, pair in alone.factors.items():
            for ours, expected in zip(shared.factors[name], pair, strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
        for ours, expected in zip(shared.record["history"], alone.record["history"], strict=True):
            assert ours == pytest.approx(expected, rel=1e-6)


# ---- LoRA


def test_lora_starts_as_the_backbone_is(clip, photos):
    names = up(clip)
    start = lora(clip, names, rank=3, alpha=6.0, seed=1)
    assert start.ratios == dict.fromkeys(names, 0.0)
    assert start.scale == 2.0
    edited = start.apply(clip)
    assert edited.fingerprint == clip.fingerprint
    assert all(torch.equal(*pair) for pair in zip(state(edited).values(), state(clip).values(), strict=True))
    pixels = pixels_of(clip, photos)
    for ours, original in zip(Adapters(clip, start)(outputs, clip, pixels), outputs(clip, pixels), strict=True):
        torch.testing.assert_close(ours, original, rtol=0, atol=1e-12)


def test_loras_start_is_drawn_from_its_seed(clip):
    names = up(clip)
    first, again, other = (lora(clip, names, rank=8, seed=seed) for seed in (1, 1, 2))
    for name in names:
        b, a = first.factors[name]
        bound = clip.linear(name).weight.shape[1] ** -0.5  # torch's initial weights of a linear layer
        assert not b.any()
        assert a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
        assert torch.equal(a, again.factors[name][1])
        assert not torch.equal(a, other.factors[name][1])
    assert not torch.equal(first.factors[names[0]][1], first.factors[names[1]][1])
    alone = lora(clip, names[-1:], rank=8, seed=1)  # a weight's draw does not depend on the others
    assert torch.equal(alone.factors[names[-1]][1], first.factors[names[-1]][1])
    assert alone.scale == 1.0  # alpha is 8 unless told otherwise


def test_lora_trains_with_its_scale_and_keeps_it(clip, photos, tmp_path):
    names = ["visual.1.up", "visual.0.value", "visual.0.query", "text.1.up"]
    start = lora(clip, names, rank=2, alpha=6.0)
    pixels, targets = pixels_of(clip, photos), targets_of(photos)
    expected, _ = plain_finetune(clip, start, lambda rows, epoch: pixels[rows], targets)
    tuned = finetune(clip, photos, start, augment=False, **QUICK)
    for name, pair in expected.items():
        for ours, theirs in zip(tuned.factors[name], pair, strict=True):  # here the factors themselves are known
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert pair[0].abs().max() > 1e-4
        weight = clip.linear(name).weight + 3.0 * pair[0] @ pair[1]
        torch.testing.assert_close(tuned.apply(clip).linear(name).weight, weight, rtol=0, atol=1e-10)
    tuned.save_pretrained(tmp_path)
    loaded = SeTAREdit.from_pretrained(tmp_path)
    assert loaded.scale == 3.0
    assert loaded.record["lora"] == {"rank": 2, "alpha": 6.0, "seed": 5}
    assert loaded.apply(clip).fingerprint == tuned.apply(clip).fingerprint != clip.fingerprint


# ---- what is refused


def test_edits_that_cannot_be_trained(clip, make, photos):
    with pytest.raises(UsageError, match=r"drops nothing.*`lora`"):
        finetune(clip, photos, truncating(clip, up(clip), 0.0), **QUICK)
    with pytest.raises(UsageError, match="made for a backbone with fingerprint"):
        finetune(make.clip(seed=9), photos, truncating(clip, up(clip)), **QUICK)
    with pytest.raises(UsageError, match="edited already"):
        finetune(truncating(clip, up(clip)).apply(clip), photos, truncating(clip, up(clip)), **QUICK)
    for drop in ("random", "principal"):
        with pytest.raises(UsageError, match=f"drops '{drop}' ones"):
            finetune(clip, photos, truncating(clip, up(clip), drop=drop), **QUICK)
    with pytest.raises(UsageError, match=r"Unknown weight 'visual\.7\.up'"):
        finetune(clip, photos, SeTAREdit({"visual.7.up": 0.3}), **QUICK)


def test_ranks_that_do_not_fit(clip):
    with pytest.raises(ValueError, match=r"rank=21.*text\.1\.up is \[80, 20\]"):
        lora(clip, ["visual.1.up", "text.1.up"], rank=21)
    with pytest.raises(ValueError, match="rank=0"):
        lora(clip, ["text.1.up"], rank=0)
    with pytest.raises(ValueError, match="alpha=0"):
        lora(clip, ["text.1.up"], rank=2, alpha=0)
    with pytest.raises(UsageError, match=r"Unknown weight 'text\.1\.upp'\. Did you mean 'text\.1\.up'"):
        lora(clip, ["text.1.upp"], rank=2)


def test_images_that_cannot_be_trained_on(clip, make, photos):
    edit = truncating(clip, up(clip))
    with pytest.raises(DataError, match=r"'eel'.*not among the 3 classes"):
        finetune(clip, photos, edit, class_names=["bee", "cat", "dog"], **QUICK)
    with pytest.raises(DataError, match="one class only"):
        finetune(clip, make.photos(["bee", "bee"]), edit, **QUICK)
    with pytest.raises(DataError, match="have no labels"):
        finetune(clip, make.photos([-1, -1]), edit, **QUICK)
    vit = make.vit(seed=1)
    with pytest.raises(DataError, match=r"4 classes apart.*2 labels"):
        finetune(vit, make.photos(["bee", "cat"]), truncating(vit, up(vit)), **QUICK)


def test_more_classes_than_labels(clip, photos):
    """Classes without an image count in the softmax: the first loss tells."""
    edit, options = truncating(clip, up(clip)), QUICK | {"batch_size": 7, "epochs": 1, "augment": False}
    few, many = (
        finetune(clip, photos, edit, class_names=names, **options) for names in (CLASSES, [*CLASSES, "fox", "gnu"])
    )
    assert many.record["history"][0]["loss_id"] > few.record["history"][0]["loss_id"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"k": 5}, "k=5"),
        ({"learning_rate": -1.0}, "learning rate"),
        ({"momentum": -1.0}, "momentum"),
        ({"crop_scale": 0.0}, "crop scale"),
        ({"template": "photo of a thing"}, "template"),
    ],
)
def test_options_out_of_range(clip, photos, options, words):
    with pytest.raises(ValueError, match=words):
        finetune(clip, photos, truncating(clip, ["text.1.up"]), **QUICK | options)


@pytest.mark.parametrize("rate", [1e6, 1e30, 1e200])
def test_a_rate_that_is_too_large_stops_the_run(clip, photos, rate):
    with pytest.raises(DataError, match=r"no longer finite.*lower the learning rate"):
        finetune(clip, photos, truncating(clip, up(clip)), **QUICK | {"epochs": 20, "learning_rate": rate})
