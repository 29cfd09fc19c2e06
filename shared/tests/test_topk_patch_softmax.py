"""Patch-to-class and class-to-patch matches: several k at once, both ways of summing, many classes, any norm."""

import pytest
import torch
import torch.nn.functional as F
from ood_core.ops import topk_patch_softmax
from ood_core.ops.topk_patch_softmax import torch as fast

BACKENDS = ("reference", "torch")
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def unit(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def inputs(images=3, patches=12, classes=8, negatives=3, width=16, dtype=torch.float64):
    return (
        unit(images, patches, width, seed=1, dtype=dtype),
        unit(classes, width, seed=2, dtype=dtype),
        unit(negatives, width, seed=3, dtype=dtype) if negatives else None,
    )


def written_out(local, text, negatives, k, temperature=1.0):
    """One image at a time in float64: every probability, all of them sorted."""
    local, text = local.double(), text.double()
    columns = text if negatives is None else torch.cat([text, negatives.double()])
    found = []
    for patches in local:
        logits = patches @ columns.T / temperature
        over_classes = torch.stack([row.softmax(0)[: len(text)] for row in logits])
        over_patches = torch.stack([column.softmax(0) for column in logits.T[: len(text)]])
        best = [p.flatten().sort(descending=True).values[:k].mean() for p in (over_classes, over_patches)]
        found.append(torch.stack([best[0], best[1] * len(patches) / len(text)]))
    return torch.stack(found).unbind(1)


@backends
@dtypes
@pytest.mark.parametrize("negatives", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_several_k_are_each_k_alone(backend, dtype, negatives, temperature):
    given = inputs(negatives=negatives, dtype=dtype)
    ks = [1, 2, 7, 12, 13, 50, 96]
    options = {"temperature": temperature, "backend": backend}
    together = topk_patch_softmax(*given, k=ks, **options)
    assert [match.shape for match in together] == [(3, 7)] * 2
    assert [match.dtype for match in together] == [dtype] * 2
    for column, k in enumerate(ks):
        alone = topk_patch_softmax(*given, k=k, **options)
        assert [match.shape for match in alone] == [(3,)] * 2
        rtol = 1e-13 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close([match[:, column] for match in together], list(alone), rtol=rtol, atol=0)


@backends
@pytest.mark.parametrize("ks", [(13, 2, 96, 1), (5, 5), (7,), range(1, 97, 19)])
def test_k_come_in_the_order_asked_for(backend, ks):
    given = inputs()
    found = topk_patch_softmax(*given, k=ks, backend=backend)
    for column, k in enumerate(ks):
        expected = written_out(*given, k)
        torch.testing.assert_close([match[:, column] for match in found], list(expected), rtol=1e-12, atol=0)
    assert found.image_to_text.shape == found.text_to_image.shape == (3, len(ks))


@backends
@pytest.mark.parametrize(
    ("k", "error", "words"),
    [
        ([], ValueError, r"k=\[\] is empty"),
        ((), ValueError, "give at least one number"),
        ([1, 0], ValueError, "k=0"),
        ([97, 1], ValueError, r"k=97 is outside \[1, 96\] \(patches x classes\)"),
        ([1, 2.0], TypeError, r"k must be an integer, got 2\.0"),
        ([True], TypeError, "k must be an integer, got True"),
        ("12", TypeError, "k must be an integer, got '1'"),
        (None, TypeError, "k must be an integer, got None"),
    ],
)
def test_bad_k(backend, k, error, words):
    with pytest.raises(error, match=words):
        topk_patch_softmax(*inputs(), k=k, backend=backend)


@pytest.mark.parametrize(("temperature", "safe"), [(1.0, True), (0.026, True), (0.024, False), (0.01, False)])
@dtypes
def test_both_ways_of_summing_agree(monkeypatch, temperature, safe, dtype):
    given = inputs(dtype=dtype)
    used = []
    for way in ("_safe_sums", "_stable_sums"):
        plain = getattr(fast, way)
        monkeypatch.setattr(fast, way, lambda *args, way=way, plain=plain: used.append(way) or plain(*args))
    rtol = 1e-12 if dtype == torch.float64 else 1e-6 + 2e-7 / temperature  # logits up to 1 / temperature
    expected = topk_patch_softmax(*(x.double() for x in given), k=[1, 9], temperature=temperature, backend="reference")
    for limit in (fast._SAFE, 0.0, 1e9):
        monkeypatch.setattr(fast, "_SAFE", limit)
        found = topk_patch_softmax(*given, k=[1, 9], temperature=temperature, backend="torch")
        if limit == 1e9 and temperature < 0.02 and dtype == torch.float32:
            break  # what the limit is there for: exp(100) is no float32
        torch.testing.assert_close([match.double() for match in found], list(expected), rtol=rtol, atol=0)
    assert used[:2] == ["_safe_sums" if safe else "_stable_sums", "_stable_sums"]
    assert used[2] == "_safe_sums"


@pytest.mark.parametrize("negatives", [0, 5])
def test_twenty_one_thousand_classes(monkeypatch, negatives):
    given = inputs(images=3, patches=4, classes=21_000, negatives=negatives, width=8, dtype=torch.float32)
    ks = [1, 50, 300]
    expected = topk_patch_softmax(*(x if x is None else x.double() for x in given), k=ks, backend="reference")
    whole = topk_patch_softmax(*given, k=ks, backend="torch")
    monkeypatch.setattr(fast, "_CHUNK", 2 * 4 * (21_000 + negatives))  # two images at a time
    parts = topk_patch_softmax(*given, k=ks, backend="torch")
    for found in (whole, parts):
        torch.testing.assert_close([match.double() for match in found], list(expected), rtol=2e-6, atol=0)
    by_hand = written_out(given[0][:1], *given[1:], 50)
    torch.testing.assert_close([match[:1, 1].double() for match in whole], list(by_hand), rtol=2e-6, atol=0)


@backends
@dtypes
@pytest.mark.parametrize("norm", [1e-3, 30.0, 1e4])
def test_inputs_need_not_be_of_unit_norm(backend, dtype, norm):
    local, text, negatives = inputs(dtype=dtype)
    given = (norm * local, text, negatives)
    found = topk_patch_softmax(*given, k=[1, 11, 96], backend=backend)
    # float32 logits of a size s are off by some 1e-7 s, and so are their exponentials, in relative terms.
    rtol = 1e-9 if dtype == torch.float64 else 1e-6 + 4e-7 * norm
    for column, k in enumerate([1, 11, 96]):
        expected = written_out(*given, k)
        found_k = [match[:, column].double() for match in found]
        torch.testing.assert_close(found_k, list(expected), rtol=rtol, atol=1e-30)
    assert all(match.isfinite().all() for match in found)


@backends
def test_one_patch_of_an_enormous_norm_harms_no_other_image(backend):
    local, text, negatives = inputs(dtype=torch.float32)
    expected = topk_patch_softmax(local[1:], text, negatives, k=5, backend=backend)
    local[0, 3] *= 1e6
    found = topk_patch_softmax(local, text, negatives, k=5, backend=backend)
    assert all(match.isfinite().all() for match in found)
    torch.testing.assert_close([match[1:] for match in found], list(expected), rtol=2e-6, atol=0)


@backends
def test_half_precision_is_computed_in_single(backend):
    given = inputs(dtype=torch.bfloat16)
    found = topk_patch_softmax(*given, k=[3], backend=backend)
    assert [match.dtype for match in found] == [torch.float32] * 2
    expected = written_out(*given, 3)
    torch.testing.assert_close([match[:, 0].double() for match in found], list(expected), rtol=1e-6, atol=0)


@backends
def test_gradients_are_those_of_the_reference(backend):
    given = [x.requires_grad_() for x in inputs(images=1, patches=3, classes=3, negatives=2, width=3)]
    assert torch.autograd.gradcheck(lambda *x: tuple(topk_patch_softmax(*x, k=[1, 5], backend=backend)), given)
