"""Training: draws, schedule, losses and steps against plain loops; resumed and shared among processes."""

import copy
import itertools
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
from ood_core.backbones.timm import TimmBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.data import PILImages
from ood_core.errors import DataError
from ood_core.training import train
from ood_mofe import training
from ood_mofe.functional import beta_concentration, fold_lambda
from ood_mofe.model import MoFENetwork
from ood_mofe.training import (
    Crops,
    Objective,
    Split,
    class_accuracy,
    draw_lambda,
    draw_negatives,
    parameter_groups,
    schedule,
    split_validation,
    survey,
    train_network,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

SIDE, CLASSES = 16, 5
GROUP = torch.tensor([0, 1, 0, 2, 1])
LABELS = torch.arange(22) % CLASSES
NAMES = {
    "norm1_weight": "norm1.weight",
    "norm1_bias": "norm1.bias",
    "qkv_weight": "attn.qkv.weight",
    "qkv_bias": "attn.qkv.bias",
    "out_weight": "attn.proj.weight",
    "out_bias": "attn.proj.bias",
    "scale1": "ls1.gamma",
    "norm2_weight": "norm2.weight",
    "norm2_bias": "norm2.bias",
    "up_weight": "mlp.fc1.weight",
    "up_bias": "mlp.fc1.bias",
    "down_weight": "mlp.fc2.weight",
    "down_bias": "mlp.fc2.bias",
    "scale2": "ls2.gamma",
}
TRAINING = {
    "head": "global",
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "head_learning_rate": 1e-2,
    "weight_decay": 0.05,
    "clip": 1.0,
    "augment": False,
    "crop_scale": 0.5,
    "cache_limit": 1e9,
    "seed": 3,
    "checkpoint": None,
    "resume": True,
    "recipe": {},
    "progress": False,
    "reg_on": "pre_norm",
    "reg_weight": 0.1,
}


def small_vit(depth=2):
    model = VisionTransformer(SIDE, 8, embed_dim=16, depth=depth, num_heads=2, num_classes=0, init_values=1.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise / parameter[0].numel() ** 0.5)
        model.cls_token.zero_()  # what it becomes is then the images' alone
        model.pos_embed.zero_()
    transform = ImageTransform(crop=(SIDE, SIDE), resize=SIDE)
    return TimmBackbone(model.double().eval(), transform, spec="small-vit")


def photos(labels=LABELS, *, seed=0):
    """Noise around a colour of the class."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (CLASSES, 1, 1, 3))
    noise = rng.normal(0, 60, (len(labels), SIDE, SIDE, 3))
    pixels = (colours[labels.numpy()] + noise).clip(0, 255).astype(np.uint8)
    return PILImages([Image.fromarray(one) for one in pixels], labels.tolist())


def make_network(backbone, *, experts=3, **options):
    return MoFENetwork.from_backbone(backbone, GROUP, experts=experts, seed=1, **options)


def run(network, backbone, source, labels=LABELS, **changes):
    split = Split.of(source, labels, 0.1)
    found = survey(backbone, split, classes=CLASSES, progress=False)
    return train_network(network, backbone, split, found, **(TRAINING | changes))


@pytest.fixture(scope="module")
def backbone():
    return small_vit()


@pytest.fixture(scope="module")
def source():
    return photos()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- before the training


def test_a_tenth_of_each_class_at_least_one_and_at_most_fifty_is_held_out():
    labels = torch.tensor([0] * 25 + [1] * 3 + [2] + [3] * 900)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    rows, held = split_validation(labels, 0.1)
    assert sorted([*rows.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert torch.bincount(labels[held], minlength=4).tolist() == [2, 1, 0, 50]
    again = split_validation(labels, 0.1)
    assert torch.equal(again[1], held)
    assert held[:20].tolist() != list(range(20))
    assert len(split_validation(labels, 0)[1]) == 0


def test_accuracy_of_each_class():
    labels = torch.tensor([0, 0, 0, 2, 2])
    assert class_accuracy(torch.tensor([0, 1, 0, 2, 0]), labels, 4).tolist() == [2 / 3, 0, 0.5, 0]


def test_the_survey_is_a_plain_pass_over_the_centre_crops(backbone, source, tmp_path):
    split = Split.of(source, LABELS, 0.3)
    rows, held = split.rows, split.held
    found = survey(backbone, split, classes=CLASSES, cache=tmp_path, progress=False)
    z = backbone.prefix(torch.stack([backbone.transform(image) for _, image in source]).double())
    behind = backbone.last_block(z)[:, 0]
    routed, token = F.layer_norm(z[:, 0], (16,), eps=1e-6), backbone.model.norm(behind)
    for label in range(CLASSES):
        mine = rows[LABELS[rows] == label]
        torch.testing.assert_close(found.prototypes[label], routed[mine].mean(0), rtol=1e-6, atol=1e-6)
    assert found.mean_square == pytest.approx(behind[rows].square().mean().item(), rel=1e-6)
    means = torch.stack([token[rows[LABELS[rows] == label]].mean(0) for label in range(CLASSES)])
    nearest = F.cosine_similarity(token[held][:, None], means[None], dim=2).argmax(1)
    assert torch.equal(found.accuracy, class_accuracy(nearest, LABELS[held], CLASSES))
    assert 0 < found.accuracy.sum() < CLASSES
    again = survey(backbone, split, classes=CLASSES, cache=tmp_path, progress=False)
    assert torch.equal(again.prototypes, found.prototypes)
    nothing = survey(backbone, Split.of(source, LABELS, 0), classes=CLASSES, progress=False)
    assert not nothing.accuracy.any()


def test_the_survey_reads_before_the_first_layer_of_experts(source, tmp_path):
    backbone = small_vit(depth=3)
    split = Split.of(source, LABELS, 0.3)
    plain = survey(backbone, split, classes=CLASSES, cache=tmp_path, progress=False)
    found = survey(
        backbone, split, classes=CLASSES, cache=tmp_path, progress=False, expert_layers=2, router_reads="patches"
    )
    images = torch.stack([backbone.transform(image) for _, image in source]).double()
    z = backbone.model.blocks[0](backbone.embed(images))
    routed = F.layer_norm(z[:, 1:].mean(1), (16,), eps=1e-6)
    for label in range(CLASSES):
        mine = split.rows[LABELS[split.rows] == label]
        torch.testing.assert_close(found.prototypes[label], routed[mine].mean(0), rtol=1e-6, atol=1e-6)
    assert found.mean_square == pytest.approx(plain.mean_square, rel=1e-6)  # behind all blocks in either case
    torch.testing.assert_close(found.accuracy, plain.accuracy)


def test_crops_are_kept_only_if_they_fit_and_are_the_same_either_way(backbone, source):
    rows = torch.tensor([5, 0, 9])
    for tokens in (True, False):
        kept = Crops(source, backbone, tokens=tokens, limit=1e9)
        live = Crops(source, backbone, tokens=tokens, limit=kept.bytes - 1)
        assert (kept.bytes > 0, live.bytes) == (True, 0)
        assert kept.bytes == kept(torch.arange(22)).nbytes
        torch.testing.assert_close(kept(rows), live(rows), rtol=1e-12, atol=1e-12)
    pixels = torch.stack([backbone.transform(source.open(i)) for i in rows.tolist()])
    assert torch.equal(live(rows), pixels)


# ---- draws


def test_as_many_negatives_as_positives_all_of_other_experts():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        expert = torch.randint(4, (13,), generator=generator)
        image, chosen = draw_negatives(expert, generator)
        present = expert.unique()
        assert len(present) > 1
        assert torch.equal(torch.bincount(chosen, minlength=4), torch.bincount(expert, minlength=4))
        assert (expert[image] != chosen).all()
        for one in present:
            others, mine = int((expert != one).sum()), image[chosen == one]
            if len(mine) <= others:
                assert len(mine.unique()) == len(mine)


def test_negatives_repeat_where_there_are_too_few_and_are_missing_where_there_is_none():
    image, expert = draw_negatives(torch.tensor([0, 0, 0, 1]), torch.Generator().manual_seed(0))
    assert image[expert == 0].tolist() == [3, 3, 3]
    assert [len(part) for part in draw_negatives(torch.tensor([2, 2, 2]))] == [0, 0]


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.6, 1.0])
def test_the_mean_of_the_folded_share_is_the_closed_form(sigma):
    lam = draw_lambda(torch.full((200_000,), sigma), np.random.default_rng(0))
    folded = fold_lambda(lam)
    beta = math.exp(2 * math.lgamma(sigma) - math.lgamma(2 * sigma))
    expected = 0.5 + 4**-sigma / (sigma * beta)
    assert folded.mean().item() == pytest.approx(expected, abs=4 * folded.std().item() / 200_000**0.5)
    assert lam.mean().item() == pytest.approx(0.5, abs=4 * lam.std().item() / 200_000**0.5)
    assert lam.isfinite().all()


def test_every_image_is_mixed_by_the_accuracy_of_its_own_class(backbone):
    labels = torch.arange(1500) % CLASSES
    accuracy = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0]).double()
    network = make_network(backbone)
    objective = Objective(network, labels, None, None, accuracy=lambda epoch: accuracy, seed=5)
    batch = torch.arange(1500)
    draws = objective._draw(0, batch)
    assert ((draws.lam >= 0.5) & (draws.lam <= 1)).all()
    assert (labels[draws.partner] != labels).all()
    for label, expected in ((0, 0.75), (1, 0.9), (2, 0.5 + 4**-0.6 / (0.6 * math.gamma(0.6) ** 2 / math.gamma(1.2)))):
        assert draws.lam[labels == label].mean().item() == pytest.approx(expected, abs=0.03)
    again, later, other = objective._draw(0, batch), objective._draw(1, batch), objective._draw(0, batch.flip(0))
    for name in ("image", "expert", "lam", "partner"):
        assert torch.equal(getattr(again, name), getattr(draws, name))
    assert not torch.equal(later.lam, draws.lam)
    assert not torch.equal(other.lam, draws.lam)
    seeded = Objective(network, labels, None, None, accuracy=lambda epoch: accuracy, seed=6)._draw(0, batch)
    assert not torch.equal(seeded.lam, draws.lam)
    assert not torch.equal(seeded.partner, draws.partner)
    vanilla = Objective(network, labels, None, None, accuracy=lambda epoch: accuracy, dynamic=False, seed=5)
    lam = vanilla._draw(0, batch).lam
    assert lam.min() < 0.02
    assert lam[labels == 1].mean().item() == pytest.approx(0.5, abs=0.07)
    assert lam[labels == 1].std().item() == pytest.approx(12**-0.5, abs=0.04)  # uniform, whatever the accuracy


# ---- losses, against loops over single images and the library's own block


class Plain:
    """Experts as copies of the library's block, heads as separate layers; every image on its own."""

    def __init__(self, backbone, network):
        self.backbone = backbone
        self.blocks = nn.ModuleList(copy.deepcopy(backbone.last_block) for _ in range(len(network.experts)))
        self.norm = copy.deepcopy(backbone.model.norm)
        self.router = nn.Parameter(network.router.detach().clone())
        self.blocks.requires_grad_(True)
        self.norm.requires_grad_(True)
        heads, self.heads = network.readout.heads, nn.ModuleList()
        for group in range(0 if heads is None else len(heads)):
            rows = [*(group == GROUP).nonzero()[:, 0].tolist(), CLASSES + group]
            self.heads.append(linear(heads.weight[rows], heads.bias[rows]))
        head = network.readout.global_head
        self.head = None if head is None else linear(head.weight, head.bias)

    def modules(self):
        found = {"router": self.router}
        for name, module in (("blocks", self.blocks), ("norm", self.norm), ("heads", self.heads), ("head", self.head)):
            if module is not None:
                found |= {f"{name}.{key}": value for key, value in module.named_parameters()}
        return found

    def behind(self, pixels, expert):
        with torch.no_grad():
            z = self.backbone.prefix(pixels[None].double())
        return self.blocks[expert](z)[0, 0], z[0, 0]

    def losses(self, pixels, labels, draws, *, eta, reg="l2", reg_on="pre_norm"):
        """`pixels` and `labels` of the batch."""
        count, shared = len(labels), len(self.heads) != len(self.blocks)
        terms = {"experts": [], "routing": [], "classes": [], "groups": [], "mixup": [], "reg": []}
        for image, label in enumerate(labels.tolist()):
            own = 0 if shared else GROUP[label].item()
            behind, z = self.behind(pixels[image], own)
            token = self.norm(behind)
            if not len(self.heads):
                terms["classes"].append(nll(self.head(token), label))
            elif shared:
                places = [place(label, group) for group in range(len(self.heads))]
                terms["groups"].append(sum(nll(head(token), at) for head, at in zip(self.heads, places, strict=True)))
            else:
                terms["experts"].append(nll(self.heads[own](token), place(label, own)))
                routed = (z - z.mean()) / (z.var(correction=0) + 1e-6).sqrt() @ self.router
                terms["routing"].append(nll(routed, own))
        if not shared:
            for image, expert in zip(draws.image.tolist(), draws.expert.tolist(), strict=True):
                token = self.norm(self.behind(pixels[image], expert)[0])
                terms["experts"].append(nll(self.heads[expert](token), len(self.heads[expert].bias) - 1))
        for image in range(count if self.head is not None and eta is not None else 0):
            lam, partner = draws.lam[image].double(), draws.partner[image]
            i, j = labels[image].item(), labels[partner].item()
            own = 0 if shared else GROUP[i if lam >= 0.5 else j].item()
            mixed = lam.float() * pixels[image] + (1 - lam.float()) * pixels[partner]
            behind, _ = self.behind(mixed, own)
            token = self.norm(behind)
            log_p = self.head(token).log_softmax(0)
            loss = -lam * log_p[i] - (1 - lam) * log_p[j]
            terms["mixup"].append(0.9 * loss - 0.1 * log_p.mean() if reg == "ls" else loss)
            if reg == "l2":
                terms["reg"].append(eta * (behind if reg_on == "pre_norm" else token).square().mean())
        return {name: torch.stack(some).mean() for name, some in terms.items() if some}


def linear(weight, bias):
    made = nn.Linear(weight.shape[1], len(weight), dtype=weight.dtype)
    made.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    return made


def nll(logits, target):
    return logits.logsumexp(0) - logits[target]


def place(label, group):
    """Position among the classes of the group, "others" behind them."""
    members = (group == GROUP).nonzero()[:, 0].tolist()
    return members.index(label) if label in members else len(members)


MODES = {
    "MoFE": {},
    "MoFE without mixup": {"mixup": False},
    "reg_on post_norm": {"reg_on": "post_norm"},
    "label smoothing": {"reg": "ls"},
    "no reg": {"reg": "none"},
    "vanilla mixup": {"dynamic": False},
    "shared block, group heads": {"experts": 1},
    "shared block, one head": {"experts": 1, "group_heads": False},
    "naive fine-tuning": {"experts": 1, "group_heads": False, "mixup": False},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("kept", [True, False], ids=["tokens kept", "tokens computed"])
def test_losses_and_gradients_are_those_of_plain_loops(backbone, source, mode, kept):
    options = dict(mode)
    network = make_network(
        backbone,
        experts=options.pop("experts", 3),
        group_heads=options.pop("group_heads", True),
        global_head=mode.get("mixup", True) or mode.get("experts") == 1,
    )
    with torch.no_grad():
        for parameter in network.readout.parameters():
            parameter += 0.1  # heads of nearly 0 would hide the features
            parameter *= 1 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0))
    plain = Plain(backbone, network)
    pixels = Crops(source, backbone, tokens=False, limit=1e9)
    objective = Objective(
        network,
        LABELS,
        pixels,
        lambda x: backbone.prefix(x.double()),
        tokens=Crops(source, backbone, tokens=True, limit=1e9) if kept else None,
        accuracy=lambda epoch: torch.linspace(0, 1, CLASSES).double(),
        reg_weight=0.3,
        **options,
    )
    batch = torch.tensor([7, 3, 12, 0, 19, 4, 21])
    found = objective(batch, 2, batch=batch)
    reading = {name: options[name] for name in ("reg", "reg_on") if name in options}
    expected = plain.losses(
        pixels(batch), LABELS[batch], objective._draw(2, batch), eta=0.3 if mode.get("mixup", True) else None, **reading
    )
    means = {name: value[0] / value[1] if isinstance(value, tuple) else value for name, value in found.items()}
    assert set(means) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(means[name].double(), value, rtol=1e-6, atol=1e-9)
    sum(means.values()).backward()
    inputs = [value for value in plain.modules().values() if value.requires_grad]
    gradients = dict(
        zip(map(id, inputs), torch.autograd.grad(sum(expected.values()), inputs, allow_unused=True), strict=True)
    )

    def gradient_of(parameter):
        found = gradients[id(parameter)]
        return torch.zeros_like(parameter) if found is None else found

    for name, parameter in network.named_parameters():
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name.startswith("experts."):
            theirs = torch.stack([gradient_of(block.get_parameter(NAMES[name[8:]])) for block in plain.blocks])
        elif name.startswith("readout.heads"):
            kind = name.rpartition(".")[2]
            own = [gradient_of(plain.heads[g].get_parameter(kind))[place(c, g)] for c, g in enumerate(GROUP.tolist())]
            theirs = torch.stack(own + [gradient_of(head.get_parameter(kind))[-1] for head in plain.heads])
        else:
            theirs = gradient_of(plain.modules()[PLAIN[name]])
        scale = max(theirs.abs().max().item(), 1e-3)
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023


PLAIN = {
    "router": "router",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "readout.global_head.weight": "head.weight",
    "readout.global_head.bias": "head.bias",
}


DEEPER = {"two layers of experts": {"expert_layers": 2}, "a block below": {"unfreeze_blocks": 1}}


@pytest.mark.parametrize("deeper", DEEPER.values(), ids=DEEPER)
@pytest.mark.parametrize("kept", [True, False], ids=["tokens kept", "tokens computed"])
def test_more_trained_blocks_change_no_loss_at_first_and_have_the_gradient_of_finite_differences(source, deeper, kept):
    backbone, batch = small_vit(depth=3), torch.tensor([7, 3, 12, 0, 19, 4, 21])

    def losses(network):
        images = {"backbone": backbone, "limit": 1e9, "blocks": network.blocks}
        objective = Objective(
            network,
            LABELS,
            Crops(source, tokens=False, **images),
            lambda x: backbone.prefix(x.double(), network.blocks),
            tokens=Crops(source, tokens=True, **images) if kept else None,
            accuracy=lambda epoch: torch.zeros(CLASSES),
        )
        terms = objective(batch, 0, batch=batch)
        return {name: value[0] / value[1] if isinstance(value, tuple) else value for name, value in terms.items()}

    network = make_network(backbone, **deeper)
    found, plain = losses(network), losses(make_network(backbone))
    for name in set(found) - ({"routing"} if "expert_layers" in deeper else set()):  # whose router reads further below
        torch.testing.assert_close(found[name], plain[name], rtol=1e-8, atol=0)
    below = [*network.lower.parameters(), *network.unfrozen.parameters()]
    gradients = torch.autograd.grad(sum(found.values()), below)
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(one.shape, generator=generator).double() for one in below]
    ends = []
    for size in (1e-5, -1e-5):
        with torch.no_grad():
            for one, step in zip(below, steps, strict=True):
                one += size * step
            ends.append(sum(losses(network).values()))
            for one, step in zip(below, steps, strict=True):
                one -= size * step
    expected = sum((gradient * step).sum() for gradient, step in zip(gradients, steps, strict=True))
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [{}, {"dynamic": False}], ids=["folded", "vanilla"])
def test_the_shares_of_a_batch_add_up_to_the_whole(backbone, source, mode):
    """What several processes compute: draws are those of the whole batch, partners may be in another share."""
    pixels = Crops(source, backbone, tokens=False, limit=1e9)
    objective = Objective(
        make_network(backbone),
        LABELS,
        pixels,
        lambda x: backbone.prefix(x.double()),
        accuracy=lambda epoch: torch.zeros(CLASSES),
        **mode,
    )
    batch = torch.tensor([7, 3, 12, 0, 19, 4, 21])
    whole = objective(batch, 1, batch=batch)
    shares = [objective(rows, 1, batch=batch) for rows in (batch[0::2], batch[1::2])]
    for name, value in whole.items():
        if name == "experts":
            ours = sum(share[name][0] for share in shares)
            torch.testing.assert_close(ours, value[0], rtol=1e-9, atol=0)
            assert sum(share[name][1] for share in shares) == value[1]
        else:
            torch.testing.assert_close((4 * shares[0][name] + 3 * shares[1][name]) / 7, value, rtol=1e-9, atol=0)


class TestOneClassInTheBatch:
    """Nothing to mix with: the mixed loss is that of the images themselves."""

    @pytest.mark.parametrize("reg", ["l2", "ls", "none"])
    def test_is_the_ordinary_loss(self, backbone, source, reg):
        network = make_network(backbone)
        with torch.no_grad():
            network.readout.global_head.weight += torch.randn(
                5, 16, generator=torch.Generator().manual_seed(0)
            ).double()
        pixels = Crops(source, backbone, tokens=False, limit=1e9)
        objective = Objective(
            network,
            LABELS,
            pixels,
            lambda x: backbone.prefix(x.double()),
            accuracy=lambda epoch: torch.zeros(CLASSES),
            reg=reg,
            smoothing=0.2,
        )
        batch = torch.tensor([3, 8, 13])
        found = objective(batch, 0, batch=batch)
        z = backbone.prefix(pixels(batch).double())
        behind = backbone.last_block(z)[:, 0]
        logits = network.readout.global_head(backbone.model.norm(behind))
        smoothing = 0.2 if reg == "ls" else 0.0
        expected = F.cross_entropy(logits, LABELS[batch], label_smoothing=smoothing)
        torch.testing.assert_close(found["mixup"], expected, rtol=1e-6, atol=0)
        assert ("reg" in found) == (reg == "l2")
        if reg == "l2":
            torch.testing.assert_close(found["reg"], 0.1 * behind.square().mean(), rtol=1e-6, atol=0)

    def test_has_no_negatives(self, backbone, source):
        network = make_network(backbone)
        tokens = Crops(source, backbone, tokens=True, limit=1e9)
        objective = Objective(
            network, LABELS, None, None, tokens=tokens, accuracy=lambda epoch: None, mixup=False, reg="none"
        )
        batch = torch.tensor([3, 8, 13])
        assert objective(batch, 0, batch=batch)["experts"][1] == 3


def test_a_single_expert_has_nothing_to_route(backbone, source):
    network = MoFENetwork.from_backbone(backbone, torch.zeros(CLASSES).long(), experts=1)
    tokens = Crops(source, backbone, tokens=True, limit=1e9)
    objective = Objective(network, LABELS, None, None, tokens=tokens, accuracy=lambda epoch: None, mixup=False)
    batch = torch.arange(9)
    found = objective(batch, 0, batch=batch)
    assert found["routing"].item() == 0
    assert found["experts"][1] == 9
    found["routing"].backward()
    assert not network.router.grad.any()


# ---- steps


def test_the_rate_warms_up_and_ends_at_zero():
    rates = [schedule(step / 10, peak=2.0, epochs=4, steps=10) for step in range(40)]
    assert rates[:3] == [1.0, 2.0, pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi / 39)))]
    assert all(before > after for before, after in itertools.pairwise(rates[1:]))
    assert 0 < rates[-1] < 0.01
    assert schedule(0.0, peak=2.0, epochs=1, steps=1) == 2.0  # a single step is made at the full rate


def test_norms_biases_and_scales_are_not_decayed(backbone):
    network = make_network(backbone)
    groups = parameter_groups(network, weight_decay=0.05, lr_scale=100.0)
    of = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = {name: of[id(parameter)] for name, parameter in network.named_parameters()}
    assert len(of) == len(named) == sum(len(group["params"]) for group in groups)
    assert {name for name, (scale, _) in named.items() if scale == 100} == {
        "router",
        *(f"readout.{head}.{kind}" for head in ("heads", "global_head") for kind in ("weight", "bias")),
    }
    assert {name for name, (_, decay) in named.items() if decay} == {
        "router",
        "readout.heads.weight",
        "readout.global_head.weight",
        *(f"experts.{name}_weight" for name in ("qkv", "out", "up", "down")),
    }


def test_blocks_below_are_trained_as_experts_are():
    network = make_network(small_vit(depth=3), expert_layers=2, unfreeze_blocks=1)
    groups = parameter_groups(network, weight_decay=0.05, lr_scale=100.0)
    of = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, parameter in network.experts.named_parameters():
        alike = [network.lower[0].get_parameter(name), network.unfrozen[0].get_parameter(name)]
        assert [of[id(one)] for one in alike] == 2 * [of[id(parameter)]]
        assert of[id(parameter)][0] == 1


def test_steps_are_those_of_adamw_with_clipped_gradients(backbone, source):
    """Three steps written out with a plain optimiser, losses and gradients from the objective tested above."""
    split = Split.of(source, LABELS, 0.1)
    rows = split.rows
    found = survey(backbone, split, classes=CLASSES, progress=False)
    network = make_network(backbone)
    expected = copy.deepcopy(network)
    history = run(network, backbone, source, epochs=1, batch_size=6, clip=0.05)
    assert len(rows) == 17
    images = source.subset(rows.numpy())
    objective = Objective(
        expected,
        LABELS[rows],
        Crops(images, backbone, tokens=False, limit=1e9),
        lambda x: backbone.prefix(x.double()),
        accuracy=lambda epoch: found.accuracy,
        reg_weight=0.1 / found.mean_square,
        seed=3,
    )
    fast = [expected.router, *expected.readout.parameters()]
    slow = [*expected.experts.parameters(), *expected.norm.parameters()]
    decayed = {"router", "readout.heads.weight", "readout.global_head.weight"}
    decayed |= {f"experts.{name}_weight" for name in ("qkv", "out", "up", "down")}
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.named_parameters()}
    order = torch.randperm(17, generator=torch.Generator().manual_seed(3 * 1_000_003))
    losses = []
    for step, batch in enumerate(order.split(6)):
        terms = objective(batch, 0, batch=batch)
        terms = {name: value[0] / value[1] if isinstance(value, tuple) else value for name, value in terms.items()}
        total = sum(terms.values())
        losses.append(total.item())
        gradients = torch.autograd.grad(total, [*fast, *slow])
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        assert norm > 0.05
        by_id = dict(zip(map(id, [*fast, *slow]), gradients, strict=True))
        base = [1e-3, 1e-3 * 0.5 * (1 + math.cos(math.pi / 3)), 1e-3 * 0.5 * (1 + math.cos(2 * math.pi / 3))][step]
        with torch.no_grad():
            for name, parameter in expected.named_parameters():
                rate = base * (10 if any(parameter is one for one in fast) else 1)
                gradient = by_id[id(parameter)] * 0.05 / norm
                first, second = state[name]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient.square())
                if name in decayed:
                    parameter.mul_(1 - rate * 0.05)
                corrected = first / (1 - 0.9 ** (step + 1))
                parameter -= rate * corrected / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=1e-5, atol=1e-6, msg=name)
    assert history[0]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_the_next_epochs_mixes_depend_on_the_accuracy_of_this_one(backbone, source, monkeypatch):
    seen = []

    def concentration(accuracy, **options):
        seen.append(accuracy.tolist())
        return beta_concentration(accuracy, **options)

    monkeypatch.setattr(training, "beta_concentration", concentration)
    network = make_network(backbone)
    history = run(network, backbone, source, epochs=3, batch_size=17, head_learning_rate=0.1)
    assert len(seen) == 3
    split = Split.of(source, LABELS, 0.1)
    held = split.held
    found = survey(backbone, split, classes=CLASSES, progress=False)
    assert seen[0] == found.accuracy.tolist()
    for epoch, accuracy in enumerate(seen[1:]):
        assert history[epoch]["validation_accuracy"] == pytest.approx(sum(accuracy) / CLASSES)
    tokens = Crops(source.subset(held.numpy()), backbone, tokens=True, limit=1e9)(torch.arange(len(held)))
    logits = network.router_logits(tokens)
    behind = network.class_token(tokens, logits.argmax(1), logits)
    predicted = network.readout.global_head(network.norm(behind)).argmax(1)
    right = (predicted == LABELS[held]).double().mean().item()  # one image per class
    assert history[2]["validation_accuracy"] == pytest.approx(right)
    assert history[2]["token_norm"] == pytest.approx(behind.norm(dim=1).mean().item())


def test_training_lowers_the_loss_with_augmentation(backbone, source):
    network = make_network(backbone)
    history = run(network, backbone, source, epochs=8, augment=True, head_learning_rate=0.2)
    for term in ("experts", "routing", "mixup"):
        assert history[-1][term] < 0.95 * history[0][term], term


@pytest.mark.parametrize("mixup", [False, True])
def test_processes_that_decode_change_nothing(backbone, source, mixup):
    def trained(workers):
        network = make_network(backbone)
        history = run(network, backbone, source, epochs=2, augment=True, mixup=mixup, workers=workers)
        return history, network.state_dict()

    (history, plain), (again, other) = trained(0), trained(2)
    assert history == again
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize("options", [{"augment": True}, {"cache_limit": 0}, {}], ids=["views", "nothing kept", "kept"])
def test_a_training_that_moves_nothing_has_one_history_with_any_number_of_trained_blocks(source, options):
    backbone = small_vit(depth=3)
    still = {"learning_rate": 1e-12, "head_learning_rate": 1e-12, "epochs": 1} | options
    plain, deeper = (
        run(make_network(backbone, unfreeze_blocks=count), backbone, source, **still)[0] for count in (0, 2)
    )
    assert deeper == pytest.approx(plain, rel=1e-6)
    assert plain["token_norm"] > 0


RESUMED = {"views": {"augment": True}, "nothing kept": {"cache_limit": 0}, "kept": {}, "a block below": {"below": 1}}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_ends_bit_identical(backbone, source, tmp_path, monkeypatch, options):
    options = {"epochs": 4, "head_learning_rate": 0.05} | options
    deeper = {"unfreeze_blocks": options.pop("below", 0)}
    whole, resumed = make_network(backbone, **deeper), make_network(backbone, **deeper)
    expected = run(whole, backbone, source, **options)
    steps = training.Objective.__call__
    assert len({epoch["validation_accuracy"] for epoch in expected}) > 1  # or resuming would not be tested

    def stop(self, rows, epoch, *, batch):
        if epoch == 2 and len(batch) == 1:
            raise KeyboardInterrupt
        return steps(self, rows, epoch, batch=batch)

    file = tmp_path / "checkpoint.safetensors"
    monkeypatch.setattr(training.Objective, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        run(resumed, backbone, source, checkpoint=file, **options)
    monkeypatch.setattr(training.Objective, "__call__", steps)
    resumed = make_network(backbone, **deeper)
    history = run(resumed, backbone, source, checkpoint=file, **options)
    assert history == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("mode", [{}, {"experts": 1}])
def test_a_rate_that_is_too_high_is_said(backbone, source, mode):
    network = make_network(backbone, **mode)
    with pytest.raises(DataError, match="lower the learning rate"):
        run(network, backbone, source, learning_rate=1e160, head_learning_rate=1e160)


# ---- what the loop learned for this


def test_groups_have_rates_of_their_own_and_figures_join_the_history():
    weights = {name: nn.Parameter(torch.zeros(1)) for name in ("slow", "fast")}
    groups = [{"params": [weights["slow"]]}, {"params": [weights["fast"]], "lr_scale": 10.0}]
    seen = []

    def losses(rows, epoch, *, batch):
        seen.append((rows.tolist(), batch.tolist()))
        return {"sum": weights["slow"].sum() + weights["fast"].sum()}

    history = train(
        weights,
        losses,
        size=5,
        epochs=2,
        batch_size=3,
        optimizer=torch.optim.SGD(groups, lr=1.0),
        learning_rate=lambda epoch: 0.1,
        seed=0,
        whole_batch=True,
        after_epoch=lambda epoch: {"seen": float(len(seen)), "weight": weights["fast"].item()},
    )
    assert weights["slow"].item() == pytest.approx(-0.4)
    assert weights["fast"].item() == pytest.approx(-4.0)
    assert [(epoch["seen"], epoch["weight"]) for epoch in history] == [(2.0, -2.0), (4.0, pytest.approx(-4.0))]
    assert all(rows == batch for rows, batch in seen)


# ---- several processes

_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import torch.distributed as dist
from test_mofe_training import shared_run

shared_run(sys.argv[2])
dist.barrier()
dist.destroy_process_group()
"""


def shared_run(file):
    """17 images in batches of 8, 8 and 1: shares differ, and the last has fewer images than processes."""
    backbone, network = small_vit(), None
    network = make_network(backbone)
    history = run(network, backbone, photos(), augment=True)
    losses = [[epoch[name] for name in sorted(epoch)] for epoch in history]
    save_file(network.state_dict() | {"history": torch.tensor(losses, dtype=torch.float64)}, file)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    environment = os.environ | address | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, Path(__file__).parent]
    runs = [
        subprocess.Popen(
            [*command, tmp_path / rank], env=environment | {"RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    shared_run(tmp_path / "alone")
    for one in runs:
        _, error = one.communicate(timeout=600)
        assert one.returncode == 0, error[-3000:]
    alone = load_file(tmp_path / "alone")
    for rank in "01":
        torch.testing.assert_close(load_file(tmp_path / rank), alone, rtol=1e-5, atol=1e-7)
