"""Groups, experts, dispatch and the scores of MoFE."""

import itertools
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from ood_core import create_backbone
from ood_core.errors import UsageError
from ood_mofe import StackedExperts
from ood_mofe.functional import (
    atd,
    cluster_classes,
    ctw,
    draw_partners,
    expert_class_token,
    expert_loss,
    expert_tokens,
    mos,
    partition_classes,
    wordnet_groups,
)
from timm.models.vision_transformer import VisionTransformer
from torch import nn

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "mofe_experts.npz"))
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def golden(key, dtype=torch.float64):
    value = torch.from_numpy(np.asarray(GOLDEN[key]))
    return value.to(dtype) if value.is_floating_point() else value


def golden_experts(dtype=torch.float64):
    """Golden weights are for x @ W, ours for `linear`."""
    p = {key.rpartition("/")[2]: golden(key, dtype) for key in GOLDEN if key.startswith("in/expert/")}
    return StackedExperts(
        norm1_weight=p["g1"],
        norm1_bias=p["be1"],
        qkv_weight=p["Wqkv"].mT,
        qkv_bias=p["bqkv"],
        out_weight=p["Wo"].mT,
        out_bias=p["bo"],
        scale1=p["ls1"],
        norm2_weight=p["g2"],
        norm2_bias=p["be2"],
        up_weight=p["W1"].mT,
        up_bias=p["b1"],
        down_weight=p["W2"].mT,
        down_bias=p["b2"],
        scale2=p["ls2"],
        num_heads=4,
    )


def randomized(module, seed=0):
    """Weights of the size of trained ones: a fresh LayerScale of 1e-5 would let any block pass for the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = name.endswith(("weight", "gamma", "lambda1")) and parameter.ndim == 1
            parameter.copy_(
                1 + 0.2 * noise
                if scale
                else noise / max(1, parameter.numel() / max(1, len(parameter) if parameter.ndim else 1)) ** 0.5
            )
    return module.double().eval()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestGolden:
    @dtypes
    @pytest.mark.parametrize("backend", [None, "reference", "torch"])
    def test_routed_tokens(self, dtype, backend):
        experts = golden_experts(dtype)
        z, expert = golden("in/z", dtype), golden("route/expert")
        ours = expert_tokens(z, expert, experts, backend=backend)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, golden("block/routed", dtype), **CLOSE[dtype])
        token = expert_class_token(z, expert, experts, backend=backend)
        torch.testing.assert_close(token, golden("block/cls_fold", dtype), **CLOSE[dtype])

    def test_every_expert_on_every_image(self):
        experts, z = golden_experts(), golden("in/z")
        for e in range(3):
            ours = expert_tokens(z, torch.full((8,), e), experts)
            torch.testing.assert_close(ours, golden("block/all")[:, e], **CLOSE[torch.float64])

    def test_expert_loss(self):
        logits = golden("expert/logits").nan_to_num(-math.inf, neginf=-math.inf)
        torch.testing.assert_close(
            expert_loss(logits, golden("expert/target")), golden("expert/loss").double(), **CLOSE[torch.float64]
        )

    @dtypes
    def test_mos(self, dtype):
        feature = golden("feat/F", dtype)
        groups = [feature @ golden(f"in/head{e}/W", dtype) + golden(f"in/head{e}/b", dtype) for e in range(3)]
        torch.testing.assert_close(mos(groups), golden("mos/score", dtype), **CLOSE[dtype])

    def test_clipn(self):
        image = F.normalize(golden("feat/F"), dim=-1)
        yes, no = (F.normalize(golden(f"clipn/{name}"), dim=-1) for name in ("yes", "no"))
        torch.testing.assert_close(ctw(image, yes, no), golden("clipn/ctw"), **CLOSE[torch.float64])
        torch.testing.assert_close(atd(image, yes, no), golden("clipn/atd"), **CLOSE[torch.float64])

    @pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
    def test_wordnet_groups(self, n):
        edges = list(zip(GOLDEN["wn/parent"].tolist(), GOLDEN["wn/child"].tolist(), strict=True))
        classes = GOLDEN["wn/classes"].tolist()
        assert torch.equal(wordnet_groups(edges, classes, n), golden(f"wn/labels_E{n}"))

    def test_k_means(self):
        ours = partition_classes(golden("km/proto"), golden("km/init_labels"))
        assert torch.equal(ours, golden("km/labels"))


def blocks():
    """A block of every library, and what it gives as a function of tokens."""
    vit = randomized(VisionTransformer(28, 7, embed_dim=32, depth=1, num_heads=4, init_values=1.0)).blocks[0]
    plain = randomized(timm.models.vision_transformer.Block(24, 3, qkv_bias=False))
    clip = randomized(open_clip.transformer.ResidualAttentionBlock(32, 4, act_layer=open_clip.transformer.QuickGELU))
    found = [(vit, vit, 32), (plain, plain, 24), (clip, clip, 32)]
    transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "image_size": 28, "patch_size": 7}
    dino = randomized(transformers.Dinov2Model(transformers.Dinov2Config(**sizes)))
    hf_vit = randomized(transformers.ViTModel(transformers.ViTConfig(**sizes, intermediate_size=64)))
    text = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    hf_clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=sizes | {"intermediate_size": 64}, projection_dim=16)
    )
    for block in (dino.encoder.layer[0], hf_vit.layers[0], randomized(hf_clip).vision_model.encoder.layers[0]):
        found.append((block, lambda x, block=block: block(x, None), 32))
    return found


class TestFromBlock:
    @pytest.mark.parametrize("number", range(6))
    def test_copies_of_any_block_are_that_block_for_every_routing(self, number):
        block, run, width = blocks()[number]
        experts = StackedExperts.from_block(block, 3)
        x, expert = random(5, 7, width), torch.tensor([2, 0, 1, 1, 2])
        with torch.no_grad():
            expected = run(x)
            torch.testing.assert_close(expert_tokens(x, expert, experts), expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(expert_class_token(x, expert, experts), expected[:, 0], rtol=1e-9, atol=1e-9)
        assert (expected - x).abs().max() > 0.1  # else the identity would pass, too

    def test_the_last_block_of_a_backbone(self):
        backbone = create_backbone("tiny", dtype="float32")
        experts = StackedExperts.from_block(backbone.last_block, 2)
        x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            tokens = backbone.prefix(x)
            ours = expert_class_token(tokens, torch.tensor([0, 1, 0]), experts)
            torch.testing.assert_close(ours, backbone.last_block(tokens)[:, 0], rtol=1e-4, atol=1e-4)

    def test_copies_are_independent_of_the_block(self):
        block = randomized(timm.models.vision_transformer.Block(24, 3))
        experts = StackedExperts.from_block(block, 2)
        before = experts.up_weight.clone()
        with torch.no_grad():
            block.mlp.fc1.weight.zero_()
        assert torch.equal(experts.up_weight, before)

    @pytest.mark.parametrize(
        "block",
        [
            nn.Linear(2, 2),
            timm.create_model("swinv2_cr_tiny_ns_224").stages[0].blocks[0],
            timm.models.vision_transformer.Block(24, 3, act_layer=nn.ReLU),
            timm.models.vision_transformer.Block(24, 3, qk_norm=True),
        ],
    )
    def test_other_blocks_are_refused(self, block):
        with pytest.raises(UsageError, match=r"no pre-norm block|neither GELU"):
            StackedExperts.from_block(block, 2)


ROUTINGS = {
    "balanced": [0, 1, 2, 0, 1, 2],
    "all to one": [1] * 6,
    "an empty expert": [0, 2, 2, 0, 0, 2],
    "one image": [2],
}


class TestDispatch:
    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("scaled", [True, False])
    def test_backends_agree_forward_and_backward(self, routing, scaled):
        experts = golden_experts()
        if not scaled:
            experts.scale1 = experts.scale2 = None
        expert = torch.tensor(ROUTINGS[routing])
        z = random(len(expert), 9, 16, seed=3)
        for function, shape in ((expert_tokens, (9, 16)), (expert_class_token, (16,))):
            weights = random(len(expert), *shape, seed=4)
            results = []
            for backend in ("reference", "torch"):
                experts.zero_grad()
                x = z.clone().requires_grad_()
                out = function(x, expert, experts, backend=backend)
                (out * weights).sum().backward()
                gradients = {name: p.grad.clone() for name, p in experts.named_parameters()}
                results.append((out.detach(), x.grad, gradients))
            (a, da, ga), (b, db, gb) = results
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(da, db, rtol=1e-9, atol=1e-10)
            for name in ga:
                torch.testing.assert_close(ga[name], gb[name], rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("function", [expert_tokens, expert_class_token])
    def test_an_expert_without_images_has_no_say_and_no_gradient(self, function):
        experts, z = golden_experts(), random(4, 9, 16)
        expert = torch.tensor([0, 2, 2, 0])
        before = function(z, expert, experts)
        before.square().sum().backward()
        assert all(
            (p.grad[1] == 0).all() and (p.grad[0] != 0).any() for p in experts.parameters() if p.grad is not None
        )
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter[1] += 1
        assert torch.equal(function(z, expert, experts), before)

    @pytest.mark.parametrize("function", [expert_tokens, expert_class_token])
    def test_images_do_not_see_each_other(self, function):
        experts, z = golden_experts(), random(6, 9, 16)
        expert, order = torch.tensor([0, 2, 1, 1, 0, 2]), torch.tensor([3, 5, 0, 4, 2, 1])
        whole = function(z, expert, experts)
        torch.testing.assert_close(function(z[order], expert[order], experts), whole[order], rtol=1e-12, atol=1e-12)
        alone = torch.cat([function(z[i : i + 1], expert[i : i + 1], experts) for i in range(6)])
        torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)

    def test_under_autocast_and_in_half_precision(self):
        experts, z, expert = golden_experts(torch.float32), random(6, 9, 16).float(), torch.tensor([0, 2, 1, 1, 0, 2])
        expected = expert_tokens(z, expert, experts)
        with torch.autocast("cpu", torch.bfloat16):
            for function, whole in ((expert_tokens, expected), (expert_class_token, expected[:, 0])):
                ours = function(z, expert, experts)
                torch.testing.assert_close(ours.float(), whole, rtol=0.05, atol=0.1)
        torch.testing.assert_close(expert_tokens(z.bfloat16(), expert, experts), expected, rtol=0.02, atol=0.05)


class TestGroups:
    def edges(self):
        return list(zip(GOLDEN["wn/parent"].tolist(), GOLDEN["wn/child"].tolist(), strict=True))

    def test_every_number_of_groups_is_a_partition_whatever_the_order(self):
        edges, classes = self.edges(), GOLDEN["wn/classes"].tolist()
        rng = np.random.default_rng(0)
        for n in range(1, len(classes) + 1):
            group = wordnet_groups(edges, classes, n)
            assert set(group.tolist()) == set(range(n))
            order = rng.permutation(len(classes))
            shuffled = [edges[i] for i in rng.permutation(len(edges))]
            again = wordnet_groups(iter(shuffled), [classes[i] for i in order], n)
            assert torch.equal(again, group[torch.from_numpy(order)])
            firsts = [min(one for one, g in zip(classes, group.tolist(), strict=True) if g == e) for e in range(n)]
            assert firsts == sorted(firsts)

    def test_separated_clusters_are_recovered_from_perturbed_groups(self):
        centres = 20 * torch.eye(4, 6).double()
        true = torch.arange(40) % 4
        x = centres[true] + random(40, 6)
        start = true.clone()
        start[:8] = (start[:8] + 1) % 4
        assert torch.equal(partition_classes(x, start), true)
        found = cluster_classes(x, 4, seed=1)
        assert torch.equal(found, true)  # numbered by their smallest class, as `true` is
        assert torch.equal(cluster_classes(x, 4, seed=1), found)

    def test_an_emptied_group_takes_the_class_farthest_from_its_centre(self):
        # Group 1 starts between the others' classes and loses them; class 3 lies farthest from its own centre.
        x = torch.tensor([[0.0], [0.1], [10.0], [13.0], [10.1]])
        start = torch.tensor([0, 1, 2, 2, 1])
        ours = partition_classes(x, start)
        assert sorted(set(ours.tolist())) == [0, 1, 2]

    def test_inertia_never_exceeds_that_of_the_start(self):
        def inertia(x, group):
            return sum(((x[group == g] - x[group == g].mean(0)) ** 2).sum() for g in group.unique())

        for seed in range(5):
            x = random(30, 3, seed=seed)
            start = torch.arange(30) % 5
            assert inertia(x, partition_classes(x, start)) <= inertia(x, start) + 1e-12

    def test_duplicated_prototypes_and_as_many_groups_as_classes(self):
        assert sorted(cluster_classes(torch.ones(5, 2), 5, seed=0).tolist()) == [0, 1, 2, 3, 4]
        assert cluster_classes(torch.ones(5, 2), 1, seed=0).tolist() == [0] * 5


class TestPartners:
    def test_never_of_the_same_class_and_all_others_alike(self):
        labels = torch.tensor([0, 0, 1, 2])
        rng = torch.Generator().manual_seed(0)
        draws = torch.stack([draw_partners(labels, rng) for _ in range(3000)])
        assert (labels[draws] != labels).all()
        share = torch.bincount(draws[:, 0], minlength=4).double() / 3000
        assert share[2].item() == pytest.approx(0.5, abs=0.04)
        share = torch.bincount(draws[:, 2], minlength=4).double() / 3000
        assert share.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=0.04)

    def test_a_batch_of_one_class_keeps_to_itself(self):
        assert draw_partners(torch.tensor([4, 4, 4])).tolist() == [0, 1, 2]
        assert draw_partners(torch.tensor([7])).tolist() == [0]

    def test_only_the_generator_counts(self):
        labels = torch.arange(9) % 3
        first, second = (draw_partners(labels, torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(first, second)


class TestScores:
    def test_mos_is_between_minus_one_and_zero_and_shifts_do_not_matter(self):
        groups = [5 * random(6, 4, seed=1), 5 * random(6, 2, seed=2)]
        ours = mos(groups)
        assert ((ours >= -1) & (ours <= 0)).all()
        torch.testing.assert_close(mos([g + 7 for g in groups]), ours)
        assert (mos([*groups, 5 * random(6, 3, seed=3)]) >= ours).all()

    def test_yes_like_no_is_one_half(self):
        image, yes = (F.normalize(random(n, 8, seed=n), dim=-1) for n in (5, 4))
        half = torch.full((5,), 0.5).double()
        torch.testing.assert_close(atd(image, yes, yes), half)
        torch.testing.assert_close(ctw(image, yes, yes), half)
        no = F.normalize(random(4, 8, seed=9), dim=-1)
        assert (atd(image, yes, no) <= 1).all()

    def test_expert_loss_is_the_mean_cross_entropy(self):
        logits, targets = random(5, 4), torch.tensor([0, 3, 1, 2, 3])
        expected = sum(row.logsumexp(0) - row[t] for row, t in zip(logits, targets, strict=True)) / 5
        torch.testing.assert_close(expert_loss(logits, targets), expected)
        padded = torch.cat([logits, torch.full((5, 2), -math.inf).double()], 1)
        torch.testing.assert_close(expert_loss(padded, targets), expected)


Z = torch.zeros(2, 9, 16)
EDGES = [("root", "a"), ("root", "b"), ("a", "c")]


class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "error", "words"),
        [
            (lambda e: expert_tokens(Z, torch.tensor([0, 3]), e), ValueError, r"\[0, 3\), got 0 to 3"),
            (lambda e: expert_tokens(Z, torch.tensor([0.0, 1]), e), TypeError, "integer"),
            (lambda e: expert_class_token(Z[..., :8], torch.tensor([0, 1]), e), ValueError, "D is 8"),
            (lambda e: expert_class_token(Z, torch.tensor([0]), e), ValueError, r"\[2\]"),
            (lambda e: expert_class_token(Z * math.nan, torch.tensor([0, 1]), e), ValueError, "NaN"),
            (lambda e: expert_class_token(Z, torch.tensor([0, 1]), e, backend="cuda"), ValueError, "'cuda'"),
            (lambda e: expert_loss(torch.zeros(2, 3), torch.tensor([0, 3])), ValueError, "got 0 to 3"),
            (
                lambda e: expert_loss(torch.tensor([[0.0, -math.inf]]), torch.tensor([1])),
                ValueError,
                r"targets\[0\]=1 has the logit -inf",
            ),
            (lambda e: partition_classes(torch.zeros(3, 2), torch.tensor([0, 2, 2])), ValueError, "group 1 of 3"),
            (lambda e: partition_classes(torch.zeros(3, 2), torch.tensor([0, -1, 0])), ValueError, "-1"),
            (lambda e: cluster_classes(torch.zeros(3, 2), 4, 0), ValueError, "n=4"),
            (lambda e: wordnet_groups(EDGES, ["c", "x"], 1), ValueError, "first 'x'"),
            (lambda e: wordnet_groups(EDGES, ["c", "c"], 1), ValueError, "1 different"),
            (lambda e: wordnet_groups(EDGES, [], 1), ValueError, "at least one"),
            (lambda e: wordnet_groups(EDGES, ["c", "b"], 3), ValueError, "n=3"),
            (lambda e: wordnet_groups([("x", "y"), ("y", "x")], ["x"], 1), ValueError, "circle"),
            (lambda e: draw_partners(torch.tensor([0.0])), TypeError, "float32"),
            (lambda e: draw_partners(torch.zeros(0).long()), ValueError, "at least 1"),
            (lambda e: mos([]), ValueError, "at least one group"),
            (lambda e: mos([torch.zeros(2, 1)]), ValueError, "Group 0 has one output"),
            (lambda e: mos([torch.zeros(2, 3), torch.zeros(3, 3)]), ValueError, "N is 2"),
            (lambda e: atd(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(5, 3)), ValueError, "C is 4"),
            (lambda e: ctw(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4, 3), logit_scale=0), ValueError, "=0"),
        ],
    )
    def test_sentences(self, call, error, words):
        with pytest.raises(error, match=words):
            call(golden_experts())

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"num_heads": 3}, "num_heads=3 does not divide"),
            ({"qkv_weight": torch.zeros(2, 4, 4), "qkv_bias": torch.zeros(2, 4)}, "not 3 times"),
            ({"activation": "relu"}, "'relu'"),
            ({"scale1": torch.zeros(3, 4)}, "E is 2"),
            ({"up_bias": torch.full((2, 8), math.nan)}, "NaN"),
        ],
    )
    def test_parameters_that_do_not_fit(self, change, words):
        shapes = {
            **dict.fromkeys(itertools.product(("norm1", "norm2"), ("weight", "bias")), (2, 4)),
            ("qkv", "weight"): (2, 12, 4),
            ("qkv", "bias"): (2, 12),
            ("out", "weight"): (2, 4, 4),
            ("out", "bias"): (2, 4),
            ("up", "weight"): (2, 8, 4),
            ("up", "bias"): (2, 8),
            ("down", "weight"): (2, 4, 8),
            ("down", "bias"): (2, 4),
        }
        given = {"_".join(name): torch.zeros(shape) for name, shape in shapes.items()}
        given |= {"scale1": None, "scale2": None, "num_heads": 2}
        assert len(StackedExperts(**given)) == 2
        with pytest.raises(ValueError, match=words):
            StackedExperts(**(given | change))


def test_text_and_head_scores_keep_the_exact_order_where_float32_ends():
    from ood_mofe.functional import unsaturated_atd, unsaturated_ctw, unsaturated_mos

    gaps = torch.linspace(-150, 150, 61)
    groups = [torch.stack([gaps, torch.zeros(61)], 1), torch.tensor([[0.0, 200.0]]).repeat(61, 1)]
    plain, found = mos(groups), unsaturated_mos(groups)
    assert plain.unique().numel() < 40
    assert (found.diff() > 0).all()  # more logit of a class, less of "others"
    ordinary = (gaps > -6) & (gaps < 80)
    assert torch.equal(found[ordinary], plain[ordinary])
    # from 1/2 on to where float32 rounds to 1, by the sine of the angle between image and "no"
    angle = torch.linspace(0, 1.5, 40)
    image, yes = torch.tensor([[1.0, 0.0]]).repeat(40, 1), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for score, name in ((unsaturated_ctw, "ctw"), (unsaturated_atd, "atd")):
        found = torch.cat(
            [
                score(i[None], yes, torch.stack([torch.stack([a.cos(), a.sin()]), -yes[1]]))
                for i, a in zip(image, angle, strict=True)
            ]
        )
        assert (found.diff() > 0).all(), name
        assert found[0] == pytest.approx(0.5, abs=1e-6)
        assert found[-1] > 1
