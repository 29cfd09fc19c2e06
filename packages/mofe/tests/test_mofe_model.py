"""The network: the same as the backbone at first, whatever the library, the route and the way it is computed."""

import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from ood_core import create_backbone
from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.backbones.timm import TimmBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.errors import UsageError
from ood_mofe.model import GroupHeads, MoFENetwork, Readout, TextGroupHeads, TextHead
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from timm.layers import RmsNorm
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "mofe_experts.npz"))
SIDE, GROUP = 16, torch.tensor([0, 1, 0, 2, 1])
TRANSFORM = ImageTransform(crop=(SIDE, SIDE), resize=SIDE)
exact = {"rtol": 1e-10, "atol": 1e-10}


def randomized(model, seed=0):
    """Weights of the size of trained ones: with a fresh LayerScale of 1e-5 any block passes for the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and name.endswith(("weight", "gamma", "lambda1")):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim < 2 or "embed" in name or "token" in name:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.double().eval()


def vit(**options):
    options = {"num_classes": 0, "init_values": 1.0, "depth": 2} | options
    model = VisionTransformer(SIDE, 8, embed_dim=24, num_heads=2, **options)
    return TimmBackbone(randomized(model), TRANSFORM, spec="small-vit")


def clip():
    vision = CLIPVisionCfg(layers=2, width=24, head_width=12, patch_size=8, image_size=SIDE)
    text = CLIPTextCfg(context_length=8, vocab_size=259, width=16, heads=2, layers=1)
    model = randomized(open_clip.CLIP(12, vision, text, quick_gelu=True))
    return OpenCLIPBackbone(model, lambda texts: torch.zeros(len(texts), 8).long(), TRANSFORM, spec="small-clip")


def hf(kind):
    transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    from ood_core.backbones.transformers import TransformersBackbone

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
    if kind == "clip":
        sizes |= {"intermediate_size": 96}
        text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.CLIPConfig(vision_config=sizes, text_config=text, projection_dim=12)
        model = transformers.CLIPModel(config)
    elif kind == "dinov2":
        model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes))
    else:
        config = transformers.ViTConfig(intermediate_size=96, **sizes)
        model = transformers.ViTModel(config, add_pooling_layer=False)
    return TransformersBackbone(randomized(model), TRANSFORM, spec=f"small-hf-{kind}")


BACKBONES = {
    "timm": vit,
    "timm norm behind pooling": lambda: vit(fc_norm=True),
    "open_clip": clip,
    "transformers ViT": lambda: hf("vit"),
    "transformers DINOv2": lambda: hf("dinov2"),
    "transformers CLIP": lambda: hf("clip"),
    "tiny": lambda: create_backbone("tiny"),
}
backbones = pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)


def pixels(backbone, count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *backbone.transform.crop, generator=generator)


def tokens_of(backbone, **options):
    return backbone.prefix(pixels(backbone, **options).to(backbone.dtype))


def network_of(backbone, *, changed=True, **options):
    """Three experts; `changed`: each with weights of its own."""
    network = MoFENetwork.from_backbone(backbone, GROUP, experts=3, **options)
    if changed:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += 0.3 * parameter.abs().mean() * noise
    return network


@backbones
@pytest.mark.parametrize(
    "options", [{}, {"tokens": "all"}, {"gate": "renorm", "top_k": 2}], ids=["cls", "all", "top-2"]
)
def test_at_first_the_class_token_is_the_backbones_own(make, options):
    backbone = make()
    network = network_of(backbone, changed=False, **options)
    tokens = tokens_of(backbone)
    single = tokens.dtype == torch.float32
    project = getattr(backbone, "project", lambda x: x)
    expected = backbone.encode_image(pixels(backbone), normalize=False).to(tokens.dtype)
    for expert in (torch.zeros(5).long(), torch.tensor([2, 1, 0, 1, 2])):
        behind = network.class_token(tokens, expert, network.router_logits(tokens))
        ours = project(network.norm(behind))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        assert (behind - tokens[:, 0]).abs().max() > 0.1  # the block does something
    if not single:  # features are given in single precision
        full = backbone.last_block(tokens)[:, 0]
        torch.testing.assert_close(behind, full, **exact)


DEEPER = {
    "two layers of experts": {"expert_layers": 2},
    "a block below": {"unfreeze_blocks": 1},
    "two layers, top-2, all tokens": {"expert_layers": 2, "gate": "renorm", "top_k": 2, "tokens": "all"},
}


@backbones
@pytest.mark.parametrize("options", DEEPER.values(), ids=DEEPER)
def test_however_many_blocks_are_trained_at_first_they_are_the_backbones_own(make, options):
    backbone = make()
    network = network_of(backbone, changed=False, **options)
    tokens = backbone.prefix(pixels(backbone).to(backbone.dtype), network.blocks)
    assert (tokens - tokens_of(backbone)).abs().max() > 0.1  # a block less
    z = network.enter(tokens)
    behind = network.class_token(z, torch.tensor([2, 1, 0, 1, 2]), network.router_logits(z))
    full = backbone.last_block(tokens_of(backbone))[:, 0]
    torch.testing.assert_close(behind, full, **({"rtol": 1e-4, "atol": 1e-4} if make is BACKBONES["tiny"] else exact))


def test_an_image_goes_through_the_blocks_below_and_then_one_expert_of_every_layer():
    backbone = vit(depth=4)
    network = network_of(backbone, expert_layers=2, unfreeze_blocks=1)
    images = pixels(backbone).double()
    x = backbone.prefix(images, 3)
    torch.testing.assert_close(x, backbone.model.blocks[0](backbone.embed(images)), **exact)
    z = network.enter(x)
    torch.testing.assert_close(z, network.unfrozen[0].block(0, x), **exact)
    assert (z - backbone.prefix(images, 2)).abs().max() > 0.1  # it has other weights by now
    normed = torch.nn.functional.layer_norm(z[:, 0], (24,), eps=1e-6)
    torch.testing.assert_close(network.router_logits(z), normed @ network.router, **exact)
    found = network.features(x)
    found["token"].square().sum().backward()
    chosen = (normed @ network.router).argmax(1)
    for image, e in enumerate(chosen.tolist()):
        behind = network.experts.block(e, network.lower[0].block(e, z[image : image + 1]))[0, 0]
        torch.testing.assert_close(found["token"][image], network.norm(behind).float(), rtol=1e-5, atol=1e-5)
    for layer in (network.lower[0], network.experts):
        used = [e for e in range(3) if layer.qkv_weight.grad[e].any()]
        assert used == sorted(set(chosen.tolist()))
    assert network.unfrozen[0].down_weight.grad.any()
    assert (network.expert_layers, network.unfreeze_blocks, network.blocks) == (2, 1, 3)


def test_an_expert_of_two_layers_is_weighted_as_a_whole():
    backbone = vit(depth=3)
    network = network_of(backbone, expert_layers=2, gate="prob", top_k=2)
    z = backbone.prefix(pixels(backbone).double(), 2)
    logits = network.router_logits(z)
    probability, best = logits.softmax(1).topk(2)
    ours = network.class_token(z, best[:, 0], logits)
    for image in range(5):
        expected = z[image, 0].clone()
        for weight, e in zip(probability[image], best[image].tolist(), strict=True):
            behind = network.experts.block(e, network.lower[0].block(e, z[image : image + 1]))[0, 0]
            expected += weight * (behind - z[image, 0])
        torch.testing.assert_close(ours[image], expected, **exact)


@backbones
def test_the_folded_class_token_is_that_of_all_tokens_with_gradients(make):
    backbone = make()
    tokens = tokens_of(backbone)
    results = []
    for how in ("cls", "all"):
        network = network_of(backbone, tokens=how)
        found = network.features(tokens)
        found["token"].double().square().sum().backward()
        gradients = [parameter.grad for parameter in network.experts.parameters()]
        results.append([found["token"], found["router"], *gradients])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if tokens.dtype == torch.float32 else {"rtol": 1e-5, "atol": 1e-7}
    for folded, full in zip(*results, strict=True):
        scale = max(1.0, full.abs().max().item())
        torch.testing.assert_close(folded / scale, full / scale, **tolerance)


def test_the_router_reads_the_normalised_class_token():
    backbone = vit()
    tokens = 3 * tokens_of(backbone) + 1
    network = network_of(backbone)
    z = tokens[:, 0]
    normed = (z - z.mean(1, keepdim=True)) / (z.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(network.router_logits(tokens), normed @ network.router, **exact)
    plain = network_of(backbone, router_norm="none")
    torch.testing.assert_close(plain.router_logits(tokens), z @ plain.router, **exact)
    with torch.no_grad():
        network.router.zero_()
    found = network.features(tokens)
    assert not found["router"].any()
    first = network.class_token(tokens, torch.zeros(5).long(), network.router_logits(tokens))
    torch.testing.assert_close(found["token"], network.norm(first).float(), rtol=0, atol=0)  # a tie is the lowest's


def test_the_router_may_read_the_mean_of_the_patches():
    backbone = vit(reg_tokens=2)
    tokens = tokens_of(backbone)
    assert tokens.shape[1] == 1 + 2 + 4
    network = network_of(backbone, router_reads="patches", router_norm="none")
    torch.testing.assert_close(network.router_logits(tokens), tokens[:, 3:].mean(1) @ network.router, **exact)


class TestGates:
    def result(self, network, tokens):
        logits = network.router_logits(tokens)
        return network.class_token(tokens, logits.argmax(1), logits)

    def test_a_sure_router_needs_no_gate(self):
        backbone = vit()
        tokens = tokens_of(backbone)
        plain, gated = (network_of(backbone, gate=gate) for gate in ("none", "prob"))
        assert not torch.allclose(self.result(plain, tokens), self.result(gated, tokens), atol=1e-3)
        for network in (plain, gated):
            with torch.no_grad():
                network.router *= 1e6
        torch.testing.assert_close(self.result(plain, tokens), self.result(gated, tokens), **exact)

    def test_renormalised_over_one_expert_is_no_gate(self):
        backbone = vit()
        tokens = tokens_of(backbone)
        plain, gated = (network_of(backbone, gate=gate) for gate in ("none", "renorm"))
        torch.testing.assert_close(self.result(plain, tokens), self.result(gated, tokens), **exact)

    def test_the_literal_gate_weights_whole_results(self):
        backbone = vit()
        tokens = tokens_of(backbone)
        network = network_of(backbone, gate="literal", top_k=2)
        probability = network.router_logits(tokens).softmax(1)
        for image in range(len(tokens)):
            z = tokens[image : image + 1]
            best = probability[image].sort(descending=True).indices[:2].tolist()
            expected = sum(probability[image, e] * network.experts.block(e, z)[0, 0] for e in best)
            torch.testing.assert_close(self.result(network, tokens)[image], expected, **exact)

    def test_with_one_expert_the_literal_gate_ends_in_the_same_features(self):
        backbone = vit()
        tokens = tokens_of(backbone)
        plain, literal = (network_of(backbone, gate=gate) for gate in ("none", "literal"))
        ratio = self.result(literal, tokens) / self.result(plain, tokens)
        weight = plain.router_logits(tokens).softmax(1).amax(1, keepdim=True)
        torch.testing.assert_close(ratio, weight.expand_as(ratio), **exact)
        for network in (plain, literal):
            network.norm.eps = 0.0  # all that is left of a length
        found = [network.features(tokens)["token"] for network in (plain, literal)]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("gate", ["prob", "renorm"])
    def test_two_experts_are_weighted_by_their_probabilities(self, gate):
        backbone = vit()
        tokens = tokens_of(backbone)
        network = network_of(backbone, gate=gate, top_k=2)
        probability = network.router_logits(tokens).softmax(1)
        for image in range(len(tokens)):
            z = tokens[image : image + 1]
            best = probability[image].sort(descending=True).indices[:2].tolist()
            total = sum(probability[image, e] for e in best) if gate == "renorm" else 1
            added = sum(probability[image, e] / total * (network.experts.block(e, z)[0, 0] - z[0, 0]) for e in best)
            torch.testing.assert_close(self.result(network, tokens)[image], z[0, 0] + added, **exact)

    def test_a_given_first_expert_comes_with_the_best_of_the_others(self):
        backbone = vit()
        tokens = tokens_of(backbone)
        network = network_of(backbone, gate="renorm", top_k=2)
        logits = network.router_logits(tokens)
        worst = logits.argmin(1)
        probability = logits.softmax(1)
        best = logits.argmax(1)
        ours = network.class_token(tokens, worst, logits)
        for image in range(len(tokens)):
            z, pair = tokens[image : image + 1], [worst[image].item(), best[image].item()]
            weight = probability[image, pair] / probability[image, pair].sum()
            blocks = [network.experts.block(e, z)[0, 0] for e in pair]
            torch.testing.assert_close(ours[image], weight[0] * blocks[0] + weight[1] * blocks[1], **exact)


def test_other_experts_do_not_matter_and_get_no_gradient():
    backbone = vit()
    tokens = tokens_of(backbone)
    network = network_of(backbone)
    expert = torch.tensor([0, 2, 0, 2, 2])
    before = network.class_token(tokens, expert, network.router_logits(tokens))
    before.square().sum().backward()
    for name, parameter in network.experts.named_parameters():
        assert not parameter.grad[1].any(), name
    assert all(network.experts.qkv_weight.grad[e].any() for e in (0, 2))
    with torch.no_grad():
        for parameter in network.experts.parameters():
            parameter[2] *= 1.5
    after = network.class_token(tokens, expert, network.router_logits(tokens))
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[[1, 3, 4]], before[[1, 3, 4]])


def test_one_expert_is_the_plain_block_and_surely_chosen():
    backbone = vit()
    tokens = tokens_of(backbone)
    network = MoFENetwork.from_backbone(backbone, torch.zeros(5).long(), experts=1, gate="prob")
    logits = network.router_logits(tokens)
    assert torch.equal(logits.softmax(1), torch.ones(5, 1).double())
    torch.testing.assert_close(
        network.class_token(tokens, torch.zeros(5).long(), logits), backbone.last_block(tokens)[:, 0], **exact
    )


def test_weights_come_from_the_seed_and_not_from_the_callers_random_numbers():
    backbone = vit()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (network_of(backbone, changed=False, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.router, again.router)
    assert not torch.equal(first.router, other.router)
    assert first.router.std().item() == pytest.approx(0.02, rel=0.4)
    assert first.readout.heads.weight.std().item() == pytest.approx(0.01, rel=0.3)
    assert not first.readout.heads.bias.any()
    assert all(not parameter.requires_grad for parameter in backbone.model.parameters())
    assert all(parameter.requires_grad for parameter in first.parameters())


# ---- heads


def golden(key):
    return torch.from_numpy(np.asarray(GOLDEN[key]))


def golden_heads():
    """Rows of ours: all classes in their order, then every "others". The golden classes' groups are not in a row."""
    sizes = [GOLDEN[f"in/head{e}/b"].size - 1 for e in range(3)]
    group = torch.cat([torch.full((size,), e) for e, size in enumerate(sizes)])
    heads = [(golden(f"in/head{e}/W").T, golden(f"in/head{e}/b")) for e in range(3)]
    weight = torch.cat([w[:-1] for w, _ in heads] + [w[-1:] for w, _ in heads])
    bias = torch.cat([b[:-1] for _, b in heads] + [b[-1:] for _, b in heads])
    return GroupHeads(group, weight, bias)


def test_expert_logits_are_the_golden_ones():
    heads = golden_heads()
    token = golden("feat/F")
    rows, experts = golden("expert/rows_img"), golden("expert/rows_exp")
    # A row of the golden file is an image through its own expert or, as a negative, through another one's block.
    z = golden("block/all")[rows, experts][:, 0]
    normed = torch.nn.functional.layer_norm(z, (16,), golden("in/gF"), golden("in/bF"), 1e-6)
    expected = golden("expert/logits").nan_to_num(-math.inf, neginf=-math.inf)
    torch.testing.assert_close(heads(normed, experts), expected, **exact)
    by_group = heads.by_group(token)
    for e in range(3):
        torch.testing.assert_close(by_group[e], token @ golden(f"in/head{e}/W") + golden(f"in/head{e}/b"), **exact)


def test_classes_and_places_in_heads_are_one_to_one():
    group = torch.tensor([2, 0, 1, 0, 2, 2, 0])
    heads = GroupHeads(group, torch.randn(10, 4), torch.randn(10))
    assert heads.sizes.tolist() == [3, 1, 3]
    assert heads.position.tolist() == [0, 0, 0, 1, 1, 2, 2]
    labels = torch.arange(7)
    places = set(zip(group.tolist(), heads.target(labels, group).tolist(), strict=True))
    assert len(places) == 7
    for other in range(3):
        target = heads.target(labels, torch.full((7,), other))
        assert (target[group != other] == heads.sizes[other]).all()
    token = torch.randn(7, 4)
    logits = heads(token, group)
    every = token @ heads.weight.T + heads.bias
    for image in range(7):  # a class's logit is found at its target
        assert logits[image, heads.target(labels, group)[image]] == every[image, image]
        assert logits[image, heads.sizes[group[image]]] == every[image, 7 + group[image]]
    of_class = heads.class_logits(token, group)
    assert torch.equal(of_class.isfinite(), group == group[:, None])
    torch.testing.assert_close(heads.others(token, group), torch.stack([
        logits[i].softmax(0)[heads.sizes[group[i]]] for i in range(7)]))  # fmt: skip
    shared = heads.log_probabilities(token)
    for label in labels.tolist():
        head = heads.by_group(token)[group[label]].log_softmax(1)
        torch.testing.assert_close(shared[:, label], head[:, heads.position[label]])


def test_a_readout_comes_back_from_its_state():
    network = network_of(vit())
    state = network.readout.state_dict()
    assert "heads.outputs" not in state
    twin = Readout.from_state(state)
    token, expert = torch.randn(6, 24).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    for head in ("global", "expert", "groups"):
        assert torch.equal(twin.class_logits(token, expert, head), network.readout.class_logits(token, expert, head))
    alone = Readout.from_state({name: value for name, value in state.items() if name.startswith("global_head")})
    assert alone.heads is None


def test_texts_as_heads():
    generator = torch.Generator().manual_seed(0)
    texts, projection, token = (torch.randn(n, 12, generator=generator).double() for n in (5, 24, 24))
    texts, token = texts / texts.norm(dim=1, keepdim=True), token.T[:6]
    image = token @ projection
    cosines = torch.nn.functional.cosine_similarity(image[:, None], texts[None], dim=2)
    head = TextHead(texts, projection)
    torch.testing.assert_close(head(token), 100 * cosines, **exact)
    heads = TextGroupHeads(GROUP, texts, projection)
    assert [name for name, _ in heads.named_parameters()] == ["others_weight"]
    assert not list(head.parameters())
    image = image / image.norm(dim=1, keepdim=True)
    for group, logits in enumerate(heads.by_group(token)):
        torch.testing.assert_close(logits[:, :-1], 100 * cosines[:, group == GROUP], **exact)
        torch.testing.assert_close(logits[:, -1], -100 * image @ texts[group == GROUP].mean(0), **exact)
    with torch.no_grad():
        heads.others_weight += 0.1
    twin = Readout.from_state(Readout(heads, head).state_dict())
    expert = torch.tensor([0, 1, 2, 0, 1, 2])
    torch.testing.assert_close(twin.heads(token, expert), heads(token, expert), **exact)
    torch.testing.assert_close(twin.class_logits(token, expert, "global"), head(token), **exact)
    colder = Readout(TextGroupHeads(GROUP, texts, projection, logit_scale=20.0), TextHead(texts, projection, 20.0))
    for one in (colder, Readout.from_state(colder.state_dict())):
        torch.testing.assert_close(one.global_head(token), head(token) / 5, **exact)
        others = TextGroupHeads(GROUP, texts, projection)(token, expert) / 5
        torch.testing.assert_close(one.heads(token, expert), others, **exact)
    with pytest.raises(ValueError, match="logit_scale=0"):
        TextHead(texts, projection, 0.0)


@pytest.mark.parametrize("make", [clip, lambda: hf("clip")], ids=["open_clip", "transformers"])
def test_at_first_the_texts_say_of_an_image_what_zero_shot_classification_says(make):
    backbone = make()
    texts = torch.nn.functional.normalize(torch.randn(5, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    network = MoFENetwork.from_backbone(backbone, GROUP, experts=3, texts=texts, global_head=False)
    token = network.features(tokens_of(backbone))["token"].double()
    assert backbone.logit_scale != 100
    expected = backbone.logit_scale * backbone.encode_image(pixels(backbone)).double() @ texts.double().T
    torch.testing.assert_close(network.readout.class_logits(token, None, "global"), expected, rtol=1e-5, atol=1e-4)
    assert {name for name, _ in network.named_parameters() if "readout" in name} == {"readout.heads.others_weight"}


# ---- bad input


def swin():
    options = {"window_size": 4, "depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16}
    model = SwinTransformerV2(img_size=SIDE, patch_size=2, num_classes=0, **options)
    return TimmBackbone(model, TRANSFORM, spec="small-swin")


class TestBadInput:
    @pytest.mark.parametrize("make", [swin, lambda: vit(global_pool="avg")], ids=["swin", "mean of patches"])
    def test_a_backbone_without_a_class_token(self, make):
        backbone = make()
        with pytest.raises(UsageError, match=r"'small-.*does not read its image embedding from a class token.*'tiny'"):
            MoFENetwork.from_backbone(backbone, GROUP, experts=3)

    def test_a_network_without_blocks(self):
        import timm

        backbone = TimmBackbone(timm.create_model("resnet10t", num_classes=0), TRANSFORM, spec="small-resnet")
        with pytest.raises(UsageError, match="has no 'blocks'"):
            MoFENetwork.from_backbone(backbone, GROUP, experts=3)
        with pytest.raises(UsageError, match="has no 'blocks'"):
            _ = backbone.final_norm

    def test_another_kind_of_norm(self):
        backbone = vit()
        backbone.network.norm = RmsNorm(24).double()
        with pytest.raises(UsageError, match=r"RmsNorm.*trains a LayerNorm"):
            MoFENetwork.from_backbone(backbone, GROUP, experts=3)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"router_norm": "batch"}, "'batch'"),
            ({"gate": "soft"}, "'soft'"),
            ({"tokens": "some"}, "'some'"),
            ({"top_k": 2}, "gate='renorm'"),
            ({"top_k": 4, "gate": "prob"}, r"top_k=4 is outside \[1, 3\]"),
            ({"experts": 2}, "2 experts for 3 groups"),
            ({"router_reads": "all"}, "'all'"),
            ({"expert_layers": 2, "unfreeze_blocks": 1}, "are 3 blocks, and 'small-vit' has 2: pass fewer"),
        ],
    )
    def test_options(self, options, words):
        with pytest.raises(ValueError, match=words):
            MoFENetwork.from_backbone(vit(), GROUP, **({"experts": 3} | options))

    def test_heads_that_do_not_fit_the_groups(self):
        with pytest.raises(ValueError, match=r"weight has 4 rows.*\[2, 1\]"):
            GroupHeads(torch.tensor([0, 1, 0]), torch.zeros(4, 2), torch.zeros(4))
        with pytest.raises(ValueError, match=r"\[2, 0, 1\]"):
            GroupHeads(torch.tensor([0, 2, 0]), torch.zeros(6, 2), torch.zeros(6))
