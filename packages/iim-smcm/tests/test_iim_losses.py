import itertools

import pytest
import torch
import torch.nn.functional as F
from ood_iim.functional import diversity_loss, negative_loss, positive_loss

KS = (1, 5, 10, 24)
SCALE = 100.0
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}
FORMS = {"paper": "paper", "release": "released"}

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
ks = pytest.mark.parametrize("k", KS)


def inputs(batch=3, patches=10, classes=5, negatives=4, *, seed=0, spread=5.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(batch, patches, classes + negatives, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    return x[..., :classes].to(dtype), x[..., classes:].to(dtype), labels


def by_hand(classes, negatives, labels, k, *, form="paper", region="next", mining=True):
    """Both losses, one image at a time, by sorting and exponentials."""
    positive, negative = [], []
    for in_class, in_negative, y in zip(classes, negatives, labels.tolist(), strict=True):
        order = in_class[:, y].argsort(descending=True)
        own = in_class.sort(0, descending=True).values
        best = [column.sort(descending=True).values[:k] for column in (*in_class.T, *in_negative.T)]
        if not mining:
            best = [column[order[:k]] for column in (*in_class.T, *in_negative.T)]
        positive.append(-(best[y].exp().sum() / torch.cat(best).exp().sum()).log())
        last = 2 * k if region == "next" else len(order)
        hard = order[k:last]
        rest = in_class[hard] if form == "paper" else own[k:last]
        there = in_negative[hard].exp().sum()
        negative.append(-(there / (there + rest.exp().sum())).log())
    return torch.stack(positive).mean(), torch.stack(negative).mean()


@dtypes
@ks
def test_golden_losses(golden_losses, k, dtype):
    g = golden_losses
    classes, negatives, labels = SCALE * g["cos_local"].to(dtype), SCALE * g["cos_neg"].to(dtype), g["label"]
    torch.testing.assert_close(
        positive_loss(classes, negatives, labels, k=k), g[f"loss.pos.k{k}"].to(dtype), **TOLERANCE[dtype]
    )
    for key, form in FORMS.items():
        ours = negative_loss(classes, negatives, labels, k=k, form=form)
        torch.testing.assert_close(ours, g[f"loss.neg_{key}.k{k}"].to(dtype), **TOLERANCE[dtype])


@ks
@pytest.mark.parametrize("key", FORMS)
def test_golden_total_and_gradients(golden_losses, k, key):
    g = golden_losses
    text, negatives = (g[name].clone().requires_grad_() for name in ("text", "negatives"))
    logits, negative_logits = SCALE * g["local"] @ text.T, SCALE * g["local"] @ negatives.T
    total = (
        positive_loss(logits, negative_logits, g["label"], k=k)
        + 5 * negative_loss(logits, negative_logits, g["label"], k=k, form=FORMS[key])
        + 0.5 * diversity_loss(text, negatives)
    )
    diagonal = 0.5 * (1 / (len(text) - 1) + 1 / (len(negatives) - 1))  # the released L_div counts i = j
    torch.testing.assert_close(total + diagonal, g[f"loss.total_{key}.k{k}"], rtol=1e-9, atol=1e-11)
    total.backward()
    torch.testing.assert_close(text.grad, g[f"loss.grad_tl_{key}.k{k}"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(negatives.grad, g[f"loss.grad_tn_{key}.k{k}"], rtol=1e-9, atol=1e-9)


def test_golden_temperature(golden_losses):
    g = golden_losses
    halved = [SCALE * g[name] / 2 for name in ("cos_local", "cos_neg")]
    torch.testing.assert_close(positive_loss(*halved, g["label"], k=10), g["loss.pos.k10.T2"], rtol=1e-9, atol=1e-11)
    ours = negative_loss(*halved, g["label"], k=10, form="released")
    torch.testing.assert_close(ours, g["loss.neg_release.k10.T2"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("batch", "k"), [(3, 1), (3, 4), (1, 1), (1, 5), (4, 4)])
@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("region", ["next", "all"])
@pytest.mark.parametrize("mining", [True, False])
def test_both_losses_are_the_written_out_ones(batch, k, form, region, mining):
    classes, negatives, labels = inputs(batch, seed=batch + k)
    expected = by_hand(classes, negatives, labels, k, form=form, region=region, mining=mining)
    torch.testing.assert_close(positive_loss(classes, negatives, labels, k=k, hard_negative_mining=mining), expected[0])
    torch.testing.assert_close(negative_loss(classes, negatives, labels, k=k, form=form, region=region), expected[1])


def test_a_batch_is_the_mean_of_its_images():
    classes, negatives, labels = inputs(4)
    for loss in (positive_loss, negative_loss):
        parts = [loss(classes[i : i + 1], negatives[i : i + 1], labels[i : i + 1], k=3) for i in range(4)]
        torch.testing.assert_close(loss(classes, negatives, labels, k=3), torch.stack(parts).mean())


def test_no_negatives():
    classes, _, labels = inputs()
    for nothing in (None, classes[..., :0]):
        ours = positive_loss(classes, nothing, labels, k=2)
        torch.testing.assert_close(ours, by_hand(classes, classes[..., :0], labels, 2)[0])
    with pytest.raises(ValueError, match="at least one negative prompt"):
        negative_loss(classes, classes[..., :0], labels, k=2)


def test_a_single_class_without_negatives_has_nothing_to_learn():
    x = torch.randn(2, 6, 1, requires_grad=True)
    loss = positive_loss(x, None, torch.tensor([0, 0]), k=3)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()


@pytest.mark.parametrize("size", [1e4, 1e-30])
def test_extreme_logits_stay_finite(size):
    classes, negatives, labels = inputs(spread=size, dtype=torch.float32)
    classes.requires_grad_()
    negatives.requires_grad_()
    total = positive_loss(classes, negatives, labels, k=3) + negative_loss(classes, negatives, labels, k=3)
    total.backward()
    assert total.isfinite()
    assert classes.grad.isfinite().all()
    assert negatives.grad.isfinite().all()


def test_invariances():
    classes, negatives, labels = inputs(batch=2, patches=8, classes=4, negatives=3)
    patches, order, others = torch.randperm(8), torch.randperm(4), torch.randperm(3)
    for loss, forms in ((positive_loss, [{}]), (negative_loss, [{"form": "paper"}, {"form": "released"}])):
        for options in forms:
            value = loss(classes, negatives, labels, k=3, **options)
            assert value >= 0
            moved = loss(
                classes[:, patches][..., order],
                negatives[:, patches][..., others],
                order.argsort()[labels],
                k=3,
                **options,
            )
            torch.testing.assert_close(moved, value)
            shift = torch.randn(2, 1, 1, dtype=torch.float64)
            torch.testing.assert_close(loss(classes + shift, negatives + shift, labels, k=3, **options), value)


def test_the_forms_agree_when_all_classes_rank_the_patches_alike():
    column = torch.randn(2, 8, 1, dtype=torch.float64)
    classes, negatives = column.expand(-1, -1, 4), torch.randn(2, 8, 3, dtype=torch.float64)
    for labels in itertools.product(range(4), repeat=2):
        values = [
            negative_loss(classes, negatives, torch.tensor(labels), k=3, form=form) for form in ("paper", "released")
        ]
        torch.testing.assert_close(*values)


def test_gradients_are_the_central_differences():
    classes, negatives, labels = inputs(2, 6, 3, 2)
    classes.requires_grad_()
    negatives.requires_grad_()
    for loss, options in itertools.chain(
        [(positive_loss, {}), (positive_loss, {"hard_negative_mining": False})],
        ((negative_loss, {"form": f, "region": r}) for f in ("paper", "released") for r in ("next", "all")),
    ):
        assert torch.autograd.gradcheck(lambda a, b: loss(a, b, labels, k=2, **options), (classes, negatives))  # noqa: B023


def test_only_selected_patches_get_a_gradient():
    classes, negatives, labels = inputs(3, 12, 5, 4)
    classes.requires_grad_()
    negatives.requires_grad_()
    negative_loss(classes, negatives, labels, k=3).backward()
    order = F.one_hot(labels, 5).bool()[:, None].expand_as(classes)
    ranks = classes.detach()[order].view(3, 12).argsort(descending=True)
    for image in range(3):
        hard = set(ranks[image, 3:6].tolist())
        assert set(classes.grad[image].any(1).nonzero().flatten().tolist()) == hard
        assert set(negatives.grad[image].any(1).nonzero().flatten().tolist()) == hard
    classes.grad = None
    positive_loss(classes, negatives.detach(), labels, k=3).backward()
    assert (classes.grad != 0).sum() == 3 * 5 * 3  # every class at its own three best patches


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda c, n, y: positive_loss(c, n, y, k=0), ValueError, "k=0"),
        (lambda c, n, y: positive_loss(c, n, y, k=11), ValueError, r"k=11 is outside \[1, 10\]"),
        (lambda c, n, y: negative_loss(c, n, y, k=6), ValueError, r"k=6 is outside \[1, 5\]"),
        (lambda c, n, y: negative_loss(c, n, y, k=10, region="all"), ValueError, r"k=10 is outside \[1, 9\]"),
        (lambda c, n, y: negative_loss(c, n, y, k=2, form="mine"), ValueError, "'mine'"),
        (lambda c, n, y: negative_loss(c, n, y, k=2, region="far"), ValueError, "'far'"),
        (lambda c, n, y: positive_loss(c, n, y + 5, k=2), ValueError, "labels"),
        (lambda c, n, y: positive_loss(c, n, y[:2], k=2), ValueError, "labels"),
        (lambda c, n, y: positive_loss(c, n, y.float(), k=2), TypeError, "labels"),
        (lambda c, n, y: positive_loss(c, n[:, :4], y, k=2), ValueError, "negative_logits"),
        (lambda c, n, y: positive_loss(c * torch.nan, n, y, k=2), ValueError, "NaN"),
        (lambda c, n, y: positive_loss(c[0], n, y, k=2), ValueError, "local_logits"),
    ],
)
def test_bad_input(call, error, words):
    classes, negatives, labels = inputs()
    with pytest.raises(error, match=words):
        call(classes, negatives, labels)
