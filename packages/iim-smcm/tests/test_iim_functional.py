from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_core.functional import gl_mcm, mcm, r_mcm
from ood_iim.functional import diversity_loss, id_logits, s_mcm

GOLDEN = {
    key: torch.from_numpy(value) for key, value in np.load(Path(__file__).parent / "golden" / "iim_scores.npz").items()
}
TEMPERATURES, KS, ALPHAS = (1.0, 0.5), (1, 5, 20, 49), (1.0, 0.5)
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 1e-5, "atol": 0.0}}
# Golden key -> (with negatives, form).
FORMS = {"star": (False, "paper"), "paper": (True, "paper"), "release": (True, "released")}

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def golden_inputs(dtype=torch.float64):
    return [GOLDEN[name].to(dtype) for name in ("image", "local", "global_text", "local_text", "negatives")]


def unit(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def inputs(images=3, patches=7, classes=5, negatives=4, width=6):
    return (
        unit(images, width, seed=1),
        unit(images, patches, width, seed=2),
        unit(classes, width, seed=3),
        unit(classes, width, seed=4),
        unit(negatives, width, seed=5),
    )


def by_hand(image, local, global_text, local_text, negatives, *, k, temperature, alpha, form):
    """The equations one image at a time, with explicit exponentials."""
    scores = []
    for g, v in zip(image, local, strict=True):
        first = (global_text @ g / temperature).softmax(0).max()
        positive = (v @ local_text.T / temperature).exp()
        negative = (v @ negatives.T / temperature).exp()
        if form == "released":
            numerator, rest = (positive / temperature).exp(), (negative / temperature).exp()
        else:
            numerator, rest = positive, negative
        p = numerator / (numerator.sum(1, keepdim=True) + rest.sum(1, keepdim=True))
        q = positive / positive.sum(0)
        largest = [m.flatten().sort(descending=True).values[:k].mean() for m in (p, q)]
        scores.append(first + largest[0] + alpha * len(v) / len(local_text) * largest[1])
    return torch.stack(scores)


class TestSMCM:
    @dtypes
    @pytest.mark.parametrize("key", FORMS)
    @pytest.mark.parametrize("t", range(2))
    @pytest.mark.parametrize("i", range(4))
    def test_golden(self, key, t, i, dtype):
        image, local, global_text, local_text, negatives = golden_inputs(dtype)
        with_negatives, form = FORMS[key]
        for a, alpha in enumerate(ALPHAS):
            ours = s_mcm(
                image,
                local,
                global_text,
                local_text,
                negatives if with_negatives else None,
                k=KS[i],
                temperature=TEMPERATURES[t],
                alpha=alpha,
                form=form,
            )
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, GOLDEN[f"s_mcm_{key}"][t, i, a].to(dtype), **TOLERANCE[dtype])

    @dtypes
    @pytest.mark.parametrize("key", FORMS)
    def test_golden_r_mcm_is_alpha_zero(self, key, dtype):
        *features, negatives = golden_inputs(dtype)
        with_negatives, form = FORMS[key]
        given = negatives if with_negatives else None
        for t, temperature in enumerate(TEMPERATURES):
            for i, k in enumerate(KS):
                ours = s_mcm(*features, given, k=k, temperature=temperature, alpha=0, form=form)
                torch.testing.assert_close(ours, GOLDEN[f"r_mcm_{key}"][t, i].to(dtype), **TOLERANCE[dtype])

    def test_golden_gl_mcm_is_k_one_and_alpha_zero(self):
        *features, _ = golden_inputs()
        for t, temperature in enumerate(TEMPERATURES):
            ours = s_mcm(*features, k=1, temperature=temperature, alpha=0)
            torch.testing.assert_close(ours, GOLDEN["gl_mcm_star"][t], **TOLERANCE[torch.float64])

    def test_quick_values_of_the_first_image(self):
        *features, negatives = golden_inputs()
        values = [
            s_mcm(*features, k=20)[0].item(),
            s_mcm(*features, negatives, k=20)[0].item(),
            s_mcm(*features, negatives, k=20, form="released")[0].item(),
        ]
        assert values == pytest.approx([0.35808802, 0.30953198, 0.31388300], abs=5e-9)

    @pytest.mark.parametrize("form", ["paper", "released"])
    @pytest.mark.parametrize("k", [1, 4, 35])
    @pytest.mark.parametrize("temperature", [1.0, 0.3])
    def test_equations_by_hand(self, form, k, temperature):
        options = {"k": k, "temperature": temperature, "alpha": 0.7, "form": form}
        torch.testing.assert_close(s_mcm(*inputs(), **options), by_hand(*inputs(), **options))

    @pytest.mark.parametrize("form", ["paper", "released"])
    @pytest.mark.parametrize("with_negatives", [False, True])
    def test_alpha_zero_is_r_mcm_of_the_core(self, form, with_negatives):
        image, local, text, _, negatives = inputs()
        given = negatives if with_negatives else None
        ours = s_mcm(image, local, text, text, given, k=6, alpha=0, form=form)
        assert torch.equal(ours, r_mcm(image, local, text, given, k=6, form=form))

    def test_k_one_and_alpha_zero_is_gl_mcm_of_the_core(self):
        image, local, text, _, _ = inputs()
        torch.testing.assert_close(s_mcm(image, local, text, text, k=1, alpha=0), gl_mcm(image, local, text))

    def test_all_entries_give_one_over_c_in_each_local_term(self):
        image, local, global_text, local_text, _ = inputs()
        ours = s_mcm(image, local, global_text, local_text, k=7 * 5, alpha=2.0)
        torch.testing.assert_close(ours, mcm(image, global_text) + 3 / 5)

    def test_all_entries_with_negatives_lose_the_negative_mass(self):
        image, local, global_text, local_text, negatives = inputs()
        mass = (local @ torch.cat([local_text, negatives]).T).softmax(-1)[..., 5:].sum(-1).mean(1)
        ours = s_mcm(image, local, global_text, local_text, negatives, k=35, alpha=0)
        torch.testing.assert_close(ours, mcm(image, global_text) + (1 - mass) / 5)

    def test_high_temperature_forgets_the_image(self):
        options = {"k": 6, "temperature": 1e9, "alpha": 1.0}
        *features, negatives = inputs()
        torch.testing.assert_close(s_mcm(*features, **options), torch.full((3,), 3 / 5).double())
        torch.testing.assert_close(s_mcm(*features, negatives, **options), torch.full((3,), 2 / 5 + 1 / 9).double())

    def test_one_patch_and_equal_patches_give_one_over_c(self):
        image, local, global_text, local_text, _ = inputs()
        one = local[:, :1]
        for patches, k in ((one, 1), (one.expand(-1, 7, -1), 4)):
            both = s_mcm(image, patches, global_text, local_text, k=k)
            without = s_mcm(image, patches, global_text, local_text, k=k, alpha=0)
            torch.testing.assert_close(both - without, torch.full((3,), 1 / 5).double())

    def test_falls_as_k_grows(self):
        values = torch.stack([s_mcm(*inputs(), k=k) for k in range(1, 36)])
        assert (values.diff(dim=0) <= 1e-12).all()

    def test_order_of_patches_classes_negatives_and_images_does_not_matter(self):
        image, local, global_text, local_text, negatives = inputs()
        patches, classes, images = torch.randperm(7), torch.randperm(5), torch.tensor([2, 0, 1])
        for form in ("paper", "released"):
            straight = s_mcm(image, local, global_text, local_text, negatives, k=6, form=form)
            mixed = s_mcm(
                image[images],
                local[images][:, patches],
                global_text[classes],
                local_text[classes],
                negatives.flip(0),
                k=6,
                form=form,
            )
            torch.testing.assert_close(mixed, straight[images])

    def test_an_image_does_not_see_the_others(self):
        image, local, *texts = inputs()
        whole = s_mcm(image, local, *texts, k=6)
        alone = torch.cat([s_mcm(image[i : i + 1], local[i : i + 1], *texts, k=6) for i in range(3)])
        torch.testing.assert_close(alone, whole, rtol=1e-13, atol=0)

    def test_another_negative_lowers_and_a_duplicate_counts_twice(self):
        *features, negatives = inputs()
        values = [
            s_mcm(*features, given, k=6)
            for given in (None, negatives[:3], negatives, torch.cat([negatives, negatives[:1]]))
        ]
        assert all((low < high).all() for high, low in pairwise(values))
        doubled = torch.cat([negatives, negatives[:1]])
        expected = by_hand(*features, doubled, k=6, temperature=1.0, alpha=1.0, form="paper")
        torch.testing.assert_close(values[3], expected)

    def test_the_forms_agree_without_negatives_only(self):
        *features, negatives = inputs()
        assert torch.equal(s_mcm(*features, k=6, form="released"), s_mcm(*features, k=6))
        with_negatives = [s_mcm(*features, negatives, k=6, form=form) for form in ("paper", "released")]
        assert (with_negatives[0] - with_negatives[1]).abs().min() > 1e-3

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        halves = [value.to(dtype) for value in inputs()]
        ours = s_mcm(*halves, k=6)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, s_mcm(*[value.float() for value in halves], k=6), rtol=0, atol=0)

    def test_non_contiguous_inputs(self):
        image, local, *texts = inputs()
        turned = local.transpose(1, 2).contiguous().transpose(1, 2)
        torch.testing.assert_close(s_mcm(image, turned, *texts, k=6), s_mcm(image, local, *texts, k=6))

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"image": unit(6)}, ValueError, r"image must have shape \[N, d\], got \[6\]"),
            ({"local": unit(3, 7, 8)}, ValueError, r"local has shape \[3, 7, 8\], but d is 6"),
            ({"local": unit(2, 7, 6)}, ValueError, "but N is 3"),
            ({"local_text": unit(4, 6)}, ValueError, r"local_text has shape \[4, 6\], but C is 5"),
            ({"negatives": torch.zeros(0, 6)}, ValueError, "negatives is empty"),
            ({"image": torch.full((3, 6), torch.nan)}, ValueError, "image holds NaN"),
            ({"image": np.zeros((3, 6))}, TypeError, "ndarray"),
            ({"local_text": torch.ones(5, 6, dtype=torch.int64)}, TypeError, "int64"),
            ({"k": 0}, ValueError, "k=0"),
            ({"k": 36}, ValueError, r"k=36 is outside \[1, 35\]"),
            ({"k": 2.0}, TypeError, r"2\.0"),
            ({"temperature": 0.0}, ValueError, r"temperature=0\.0"),
            ({"alpha": -0.5}, ValueError, r"alpha=-0\.5"),
            ({"alpha": float("nan")}, ValueError, "alpha=nan"),
            ({"alpha": "1"}, TypeError, "'1'"),
            ({"form": "release"}, ValueError, "form='release'"),
        ],
    )
    def test_bad_input(self, change, error, words):
        names = ("image", "local", "global_text", "local_text", "negatives")
        arguments = {**dict(zip(names, inputs(), strict=True)), "k": 6, **change}
        with pytest.raises(error, match=words):
            s_mcm(**arguments)


class TestIDLogits:
    @dtypes
    def test_golden(self, dtype):
        *features, _ = golden_inputs(dtype)
        for t, temperature in enumerate(TEMPERATURES):
            for i, k in enumerate(KS):
                ours = id_logits(*features, k=k, temperature=temperature)
                torch.testing.assert_close(ours, GOLDEN["id_logits"][t, i].to(dtype), **TOLERANCE[dtype])

    def test_planted_class_wins(self):
        text = torch.eye(4)
        local = F.normalize(torch.full((4, 5, 4), 0.1), dim=-1)
        local[:, :2] = text[:, None]
        assert id_logits(text, local, text, text, k=2).argmax(1).tolist() == [0, 1, 2, 3]

    def test_all_patches_give_the_plain_mean(self):
        image, local, global_text, local_text, _ = inputs()
        expected = (image @ global_text.T).exp() * (local @ local_text.T).exp().mean(1)
        torch.testing.assert_close(id_logits(image, local, global_text, local_text, k=7), expected)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"k": 8}, ValueError, r"k=8 is outside \[1, 7\] \(patches\)"),
            ({"k": True}, TypeError, "True"),
            ({"temperature": -1.0}, ValueError, r"temperature=-1\.0"),
            ({"local": unit(3, 6)}, ValueError, r"\[N, P, d\]"),
            ({"global_text": unit(5, 7)}, ValueError, "but d is 6"),
        ],
    )
    def test_bad_input(self, change, error, words):
        names = ("image", "local", "global_text", "local_text")
        arguments = {**dict(zip(names, inputs(), strict=False)), "k": 3, **change}
        with pytest.raises(error, match=words):
            id_logits(**arguments)


class TestDiversityLoss:
    @dtypes
    def test_golden(self, dtype):
        *_, text, negatives = golden_inputs(dtype)
        expected = GOLDEN["div_local_paper"] + GOLDEN["div_neg_paper"]
        torch.testing.assert_close(diversity_loss(text, negatives), expected.to(dtype), **TOLERANCE[dtype])
        torch.testing.assert_close(diversity_loss(text), GOLDEN["div_local_paper"].to(dtype), **TOLERANCE[dtype])

    def test_golden_released_counts_the_diagonal(self):
        *_, text, negatives = golden_inputs()
        released = GOLDEN["div_local_release"] + GOLDEN["div_neg_release"]
        diagonal = 1 / (len(text) - 1) + 1 / (len(negatives) - 1)
        torch.testing.assert_close(diversity_loss(text, negatives) + diagonal, released, **TOLERANCE[torch.float64])

    def test_orthogonal_is_zero_and_equal_is_one(self):
        equal = unit(1, 6).expand(4, -1)
        torch.testing.assert_close(diversity_loss(torch.eye(6).double(), equal), torch.tensor(1.0).double())
        torch.testing.assert_close(diversity_loss(equal, equal), torch.tensor(2.0).double())
        assert diversity_loss(torch.eye(6)).item() == pytest.approx(0, abs=1e-7)

    def test_explicit_pairs(self):
        text, negatives = 3 * unit(5, 6, seed=1), unit(4, 6, seed=2)
        pairs = [
            torch.stack([F.cosine_similarity(a, b, dim=0) for i, a in enumerate(x) for b in x[i + 1 :]])
            for x in (text, negatives)
        ]
        torch.testing.assert_close(diversity_loss(text, negatives), pairs[0].mean() + pairs[1].mean())

    def test_a_single_vector_contributes_nothing(self):
        text = unit(5, 6)
        assert diversity_loss(unit(1, 6), unit(1, 6)).item() == 0
        assert torch.equal(diversity_loss(text, unit(1, 6, seed=3)), diversity_loss(text))

    def test_gradient_and_scale(self):
        text, negatives = unit(3, 4, seed=1).requires_grad_(), unit(2, 4, seed=2).requires_grad_()
        assert torch.autograd.gradcheck(diversity_loss, (text, negatives))
        torch.testing.assert_close(diversity_loss(7 * text, negatives / 3), diversity_loss(text, negatives))

    @pytest.mark.parametrize(
        ("text", "negatives", "error", "words"),
        [
            (unit(5), None, ValueError, r"text must have shape \[C, d\]"),
            (unit(5, 6), unit(4, 7), ValueError, r"negatives has shape \[4, 7\], but d is 6"),
            (torch.zeros(0, 6), None, ValueError, "text is empty"),
            (torch.full((2, 3), torch.nan), None, ValueError, "NaN"),
            ([[1.0, 0.0]], None, TypeError, "list"),
        ],
    )
    def test_bad_input(self, text, negatives, error, words):
        with pytest.raises(error, match=words):
            diversity_loss(text, negatives)
