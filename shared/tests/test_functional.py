"""Scores against golden values, float64 references written out here, and invariants."""

from decimal import Decimal, localcontext
from itertools import pairwise
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from ood_core import functional
from ood_core.detectors.logits import unsaturated_msp
from ood_core.metrics import auroc
from ood_core.ops import topk_patch_softmax
from ood_core.ops.nearest import reference as plain_nearest
from ood_core.ops.nearest import torch as nearest
from scipy.stats import spearmanr

GOLDEN = np.load(Path(__file__).parent / "golden" / "scores.npz")
LOGITS = np.load(Path(__file__).parent / "golden" / "logits_knn.npz")
TEMPERATURES, KS = (1.0, 0.5), (1, 5, 20, 49)


def golden(key, dtype=torch.float64):
    return torch.from_numpy(GOLDEN[key.replace("/", "|")]).to(dtype)


def inputs(dtype=torch.float64):
    return [golden(f"in/{name}", dtype) for name in ("vg", "vl", "tg", "tl", "tn")]


def unit(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_mcm_and_gl_mcm_golden(dtype, temperature):
    image, local, text, local_text, _ = inputs(dtype)
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    expected = golden(f"score/mcm/T{temperature}", dtype)
    actual = functional.mcm(image, text, temperature=temperature)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-11)
    # The golden GL-MCM uses another text for the local term: swap the global one in.
    both = functional.gl_mcm(image, local, local_text, temperature=temperature)
    both = both - functional.mcm(image, local_text, temperature=temperature) + actual
    torch.testing.assert_close(both, golden(f"score/gl_mcm_star/T{temperature}", dtype), rtol=rtol, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_topk_patch_softmax_golden(backend, dtype, k, temperature):
    _, local, _, text, negatives = inputs(dtype)
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    for key, given in (("star", None), ("paper", negatives)):
        out = topk_patch_softmax(local, text, given, k=k, temperature=temperature, backend=backend)
        where = f"T{temperature}/k{k}"
        expected = golden(f"score/s_i2t_{key}/{where}", dtype)
        torch.testing.assert_close(out.image_to_text, expected, rtol=rtol, atol=1e-11)
        torch.testing.assert_close(out.text_to_image, golden(f"score/s_t2i/{where}", dtype), rtol=rtol, atol=1e-11)


@pytest.mark.parametrize(("form", "key"), [("paper", "paper"), ("released", "release")])
@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_r_mcm_golden(form, key, k, temperature):
    image, local, _, text, negatives = inputs()
    score = functional.r_mcm(image, local, text, negatives, k=k, temperature=temperature, form=form)
    matched = score - functional.mcm(image, text, temperature=temperature)
    torch.testing.assert_close(matched, golden(f"score/s_i2t_{key}/T{temperature}/k{k}"), rtol=1e-9, atol=1e-11)


def reference_r_mcm(image, local, text, negatives, k, temperature):
    """One image at a time, every probability written out."""
    scores = []
    for v, patches in zip(image, local, strict=True):
        p_global = (text @ v / temperature).softmax(0).max()
        columns = torch.cat([text, negatives])
        p = torch.stack([(columns @ patch / temperature).softmax(0)[: len(text)] for patch in patches])
        scores.append(p_global + p.flatten().sort(descending=True).values[:k].mean())
    return torch.stack(scores)


@pytest.mark.parametrize(("patches", "classes", "k"), [(1, 1, 1), (5, 1, 5), (7, 3, 21), (64, 10, 16), (6, 50, 7)])
def test_r_mcm_equals_the_written_out_form(patches, classes, k):
    image, local, text = unit(3, 8, seed=1), unit(3, patches, 8, seed=2), unit(classes, 8, seed=3)
    negatives = unit(4, 8, seed=4)
    expected = reference_r_mcm(image, local, text, negatives, k, 0.7)
    torch.testing.assert_close(functional.r_mcm(image, local, text, negatives, k=k, temperature=0.7), expected)


@pytest.mark.parametrize("k", [1, 3, 17, 96])
@pytest.mark.parametrize("case", ["random", "ties", "duplicates", "one hot", "large"])
def test_backends_agree(k, case):
    local, text, negatives = unit(5, 12, 16, seed=1), unit(8, 16, seed=2), unit(3, 16, seed=3)
    if case == "ties":
        local = local[:, :1].expand(-1, 12, -1)
    if case == "duplicates":
        text = torch.cat([text[:4], text[:4]])
    if case == "one hot":
        local[:, 3] = text[2]
    temperature = 0.01 if case == "large" else 1.0
    for given in (None, negatives):
        for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            args = (local.to(dtype), text.to(dtype), None if given is None else given.to(dtype))
            plain = topk_patch_softmax(*args, k=k, temperature=temperature, backend="reference")
            fast = topk_patch_softmax(*args, k=k, temperature=temperature, backend="torch")
            # at temperature 0.01 logits reach 100, whose float32 spacing alone moves a probability by 1e-5
            slack = 20 * rtol if case == "large" else rtol
            torch.testing.assert_close(fast.image_to_text, plain.image_to_text, rtol=slack, atol=0)
            torch.testing.assert_close(fast.text_to_image, plain.text_to_image, rtol=slack, atol=0)


def test_chunking_does_not_show(monkeypatch):
    from ood_core.ops.topk_patch_softmax import torch as fast

    local, text = unit(7, 9, 8, seed=1), unit(5, 8, seed=2)
    whole = topk_patch_softmax(local, text, k=4)
    monkeypatch.setattr(fast, "_CHUNK", 1)
    torch.testing.assert_close(topk_patch_softmax(local, text, k=4), whole, rtol=1e-14, atol=0)


def test_oracles_of_the_patch_softmax():
    image, local, text, negatives = unit(4, 8), unit(4, 10, 8, seed=1), unit(6, 8, seed=2), unit(3, 8, seed=3)
    patches, classes = 10, 6
    full = topk_patch_softmax(local, text, k=patches * classes)
    torch.testing.assert_close(full.image_to_text, torch.full((4,), 1 / classes, dtype=torch.float64))
    torch.testing.assert_close(full.text_to_image, torch.full((4,), 1 / classes, dtype=torch.float64))
    means = [topk_patch_softmax(local, text, negatives, k=k).image_to_text for k in range(1, 61)]
    assert all((a >= b).all() for a, b in pairwise(means))
    fewer = topk_patch_softmax(local, text, negatives[:2], k=7)
    more = topk_patch_softmax(local, text, negatives, k=7)
    assert (more.image_to_text < fewer.image_to_text).all()
    assert torch.equal(more.text_to_image, fewer.text_to_image)
    shuffle = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    moved = topk_patch_softmax(local[:, shuffle], text.flip(0), negatives.flip(0), k=7)
    torch.testing.assert_close(moved, more)
    one = functional.gl_mcm(image, local, text)
    torch.testing.assert_close(one, functional.r_mcm(image, local, text, k=1))
    assert ((functional.mcm(image, text) >= 1 / classes) & (functional.mcm(image, text) <= 1)).all()
    hot = functional.mcm(image, text, temperature=1e9)
    torch.testing.assert_close(hot, torch.full((4,), 1 / classes, dtype=torch.float64))


def test_a_score_never_depends_on_the_batch():
    image, local, text = unit(6, 8), unit(6, 10, 8, seed=1), unit(5, 8, seed=2)
    together = functional.r_mcm(image, local, text, k=3)
    alone = torch.cat([functional.r_mcm(image[i : i + 1], local[i : i + 1], text, k=3) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=0)


def test_logit_scores_golden():
    logits = torch.from_numpy(LOGITS["score|logits"])
    for key, score in (("msp", functional.msp), ("maxlogit", functional.max_logit), ("energy", functional.energy)):
        torch.testing.assert_close(score(logits), torch.from_numpy(LOGITS[f"score|{key}"]), rtol=1e-10, atol=1e-12)


def test_knn_golden():
    queries, bank = (F.normalize(torch.from_numpy(LOGITS[key]), dim=-1) for key in ("feat|F", "knn|bank"))
    k = int(LOGITS["knn|k"])
    expected = torch.from_numpy(LOGITS["knn|global"])
    torch.testing.assert_close(functional.knn(queries, bank, k=k), expected, rtol=1e-10, atol=1e-12)


def test_knn_brute_force_and_oracles():
    queries, bank = unit(30, 5), unit(40, 5, seed=1)
    distances = torch.cdist(queries, bank).sort().values
    for k in (1, 7, 40):
        torch.testing.assert_close(functional.knn(queries, bank, k=k), -distances[:, k - 1])
    assert functional.knn(bank[:3], bank, k=1).abs().max() == 0
    near = F.normalize(bank[:1].float() + 1e-6, dim=-1)
    exact = -(near.double() - F.normalize(bank[:1].float(), dim=-1).double()).norm(dim=-1)
    torch.testing.assert_close(
        functional.knn(near, F.normalize(bank.float(), dim=-1), k=1).double(), exact, rtol=1e-3, atol=1e-9
    )


@pytest.mark.parametrize("rows", [7, 64, 500, 10**6])
@pytest.mark.parametrize("k", [1, 5, 120])
def test_knn_reads_the_bank_in_parts(monkeypatch, rows, k):
    """Parts of any size find the same neighbours, also where many entries are equal."""
    monkeypatch.setattr(nearest, "_ROWS", rows)
    monkeypatch.setattr(nearest, "_QUERIES", 100)
    bank = torch.cat([unit(777, 6, seed=1), unit(1, 6, seed=2).expand(222, -1), unit(13, 6, seed=3)])
    queries = torch.cat([unit(270, 6), bank[777:779]])
    expected = plain_nearest.distance_to_kth(queries, bank, k)
    torch.testing.assert_close(functional.knn(queries, bank, k=k), -expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bank", ["spread", "close", "equal", "small"])
@pytest.mark.parametrize("k", [1, 10])
def test_a_first_pass_in_half_precision_changes_nothing(monkeypatch, precision, bank, k):
    """Where neighbours are too close for half precision, the queries are searched again; elsewhere they are not."""
    banks = {
        "spread": unit(4000, 12, seed=1),
        "close": F.normalize(unit(1, 12, seed=2) + 1e-3 * unit(4000, 12, seed=1), dim=1),
        "equal": unit(1, 12, seed=2).expand(4000, -1),
        "small": unit(12, 12, seed=1),
    }
    entries, queries = F.normalize(banks[bank].float(), dim=1), F.normalize(unit(70, 12).float(), dim=1)
    monkeypatch.setattr(nearest, "_ROWS", 1000)
    monkeypatch.setattr(nearest, "_QUERIES", 30)
    expected = -plain_nearest.distance_to_kth(queries.double(), entries.double(), k)
    monkeypatch.setattr(nearest, "_half_precision", lambda _: None)
    plain = functional.knn(queries, entries, k=k)
    searched, largest = [], nearest._largest
    monkeypatch.setattr(nearest, "_half_precision", lambda _: precision)
    monkeypatch.setattr(nearest, "_largest", lambda q, *rest: searched.append(len(q)) or largest(q, *rest))
    found = functional.knn(queries, entries, k=k)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    again = sum(searched) - len(queries)
    assert again == {"close": 70, "equal": 70, "small": 0}.get(bank, again)
    if bank == "spread" and k == 1:
        assert again < 35


def test_half_precision_is_used_where_the_hardware_has_it(monkeypatch):
    for has, dtype, expected in ((True, torch.float32, torch.bfloat16), (False, torch.float32, None)):
        monkeypatch.setattr(nearest, "cpu_has_bfloat16", lambda has=has: has)
        assert nearest._half_precision(torch.ones(1, 2, dtype=dtype)) is expected
        assert nearest._half_precision(torch.ones(1, 2).double()) is None


def test_knn_of_a_memory_mapped_bank(tmp_path):
    bank = F.normalize(unit(3000, 8, seed=1).float(), dim=1)
    np.save(tmp_path / "bank.npy", bank.half().numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "bank.npy", mmap_mode="r+"))
    queries = unit(20, 8).float()
    expected = -torch.cdist(queries.double(), bank.half().double()).sort().values[:, 9]
    torch.testing.assert_close(functional.knn(queries, mapped, k=10).double(), expected, rtol=1e-5, atol=1e-6)
    mapped[2999, 3] = torch.nan
    with pytest.raises(ValueError, match="bank holds NaN"):
        functional.knn(queries, mapped, k=10)


def test_gen_written_out_and_near_certainty():
    logits = 3 * unit(20, 12)
    p = logits.softmax(-1).sort(descending=True).values[:, :5]
    torch.testing.assert_close(functional.gen(logits, gamma=0.3, top=5), -(p**0.3 * (1 - p) ** 0.3).sum(-1))
    sure = torch.tensor([[60.0, 0.0, -3.0]])  # 1 - p is 9e-27, far below float32's resolution near 1
    torch.testing.assert_close(functional.gen(sure).double(), functional.gen(sure.double()), rtol=1e-5, atol=0)
    rest = np.exp(-60.0) + np.exp(-63.0)
    expected = -(rest**0.1 + np.exp(-60.0) ** 0.1 + np.exp(-63.0) ** 0.1)
    assert functional.gen(sure.double()).item() == pytest.approx(expected, rel=1e-9)


def test_energy_msp_and_max_logit_oracles():
    logits = 50 * unit(9, 4)
    torch.testing.assert_close(functional.msp(logits + 1e3), functional.msp(logits))
    torch.testing.assert_close(functional.energy(logits + 5), functional.energy(logits) + 5)
    assert functional.energy(torch.full((1, 3), 1e4)).isfinite().all()
    written = 2 * (logits / 2).exp().sum(-1).log()
    torch.testing.assert_close(functional.energy(logits, temperature=2.0), written)
    assert (functional.max_logit(logits) <= functional.energy(logits)).all()


def test_gl_mcm_logits_equals_gl_mcm_of_cosines():
    image, local, text = unit(4, 8), unit(4, 6, 8, seed=1), unit(5, 8, seed=2)
    by_logits = functional.gl_mcm_logits(image @ text.T, local @ text.T, temperature=0.3)
    torch.testing.assert_close(by_logits, functional.gl_mcm(image, local, text, temperature=0.3))


def test_mahalanobis_and_vim_written_out():
    x, means = unit(6, 4), unit(3, 4, seed=1)
    root = unit(4, 4, seed=2)
    precision = root @ root.T + torch.eye(4, dtype=torch.float64)
    written = torch.stack([torch.stack([(a - m) @ precision @ (a - m) for m in means]).min() for a in x])
    torch.testing.assert_close(functional.mahalanobis(x, means, precision), -written)
    basis = torch.linalg.qr(unit(4, 4, seed=3))[0][:, :2]
    logits, origin = x @ means.T, means[0]
    written = torch.stack(
        [torch.logsumexp(l, 0) - 0.5 * (basis @ basis.T @ (a - origin)).norm() for l, a in zip(logits, x, strict=True)]
    )
    torch.testing.assert_close(functional.vim(x, logits, origin, basis, alpha=0.5), written)


def test_half_precision_is_computed_in_float32():
    image, text = unit(3, 8, dtype=torch.float32).half(), unit(4, 8, seed=1, dtype=torch.float32).half()
    score = functional.mcm(image, text)
    assert score.dtype == torch.float32
    assert torch.equal(score, functional.mcm(image.float(), text.float()))
    strided = torch.stack([image, image], -1)[..., 0]
    assert torch.equal(functional.mcm(strided, text), score)


BAD = [
    (lambda: functional.mcm(unit(2, 4), unit(3, 5)), ValueError, "d is 4 in image"),
    (lambda: functional.mcm(unit(2, 4)[0], unit(3, 4)), ValueError, r"\[4\]"),
    (lambda: functional.mcm(unit(2, 4), unit(0, 4)), ValueError, "empty"),
    (lambda: functional.mcm(unit(2, 4) * float("nan"), unit(3, 4)), ValueError, "NaN"),
    (lambda: functional.mcm([[1.0]], unit(3, 1)), TypeError, "list"),
    (lambda: functional.mcm(torch.ones(2, 4, dtype=torch.int64), unit(3, 4)), TypeError, "int64"),
    (lambda: functional.mcm(unit(2, 4), unit(3, 4), temperature=0), ValueError, "temperature=0"),
    (lambda: functional.mcm(unit(2, 4), unit(3, 4), temperature=float("nan")), ValueError, "temperature=nan"),
    (lambda: functional.mcm(unit(2, 4), unit(3, 4).to("meta")), ValueError, "meta"),
    (lambda: functional.r_mcm(unit(2, 4), unit(3, 5, 4), unit(3, 4), k=1), ValueError, "N is 2 in image"),
    (lambda: functional.r_mcm(unit(2, 4), unit(2, 5, 4), unit(3, 4), k=16), ValueError, r"k=16 is outside \[1, 15\]"),
    (lambda: functional.r_mcm(unit(2, 4), unit(2, 5, 4), unit(3, 4), k=0), ValueError, "k=0"),
    (lambda: functional.r_mcm(unit(2, 4), unit(2, 5, 4), unit(3, 4), k=2.0), TypeError, "2.0"),
    (lambda: functional.r_mcm(unit(2, 4), unit(2, 5, 4), unit(3, 4), form="p"), ValueError, "'p'"),
    (lambda: functional.knn(unit(2, 4), unit(3, 4), k=4), ValueError, "k=4"),
    (lambda: functional.gen(unit(2, 4), gamma=1.5), ValueError, "gamma=1.5"),
    (lambda: topk_patch_softmax(unit(2, 5, 4), unit(3, 4), k=1, backend="cuda"), ValueError, "'cuda'"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input_is_refused_with_the_value(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# ---- bounded scores near their bound

SHAPES = [(9, 4, 0, 3), (9, 4, 5, 3), (4, 9, 3, 6), (9, 4, 0, 11), (3, 2, 2, 6)]


def exact_missing(logits, entries, k):
    """min(1, R/k) minus the mean of the k largest probabilities, with 250 digits."""
    with localcontext() as context:
        context.prec = 250
        found = []
        for image in logits.double():
            rows = [[Decimal(x).exp() for x in row] for row in image.tolist()]
            shares = [x / sum(row) for row in rows for x in row[:entries]]
            best = sum(sorted(shares, reverse=True)[:k])
            found.append((min(k, len(rows)) - best) / k)
        return found


def exact_score(remaining, bound):
    """The definition of `unsaturated`, from the exact remaining mass."""
    tail = 2.0**-10
    logs = np.array([float(r.ln()) for r in remaining])
    plain = np.array([bound - float(r) for r in remaining])
    return np.where(logs < np.log(tail), bound - tail + tail * (np.log(tail) - logs), plain)


@pytest.mark.parametrize(("patches", "classes", "negatives", "k"), SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.02, 0.002])
def test_sums_of_matches_keep_the_exact_order_up_to_their_bound(patches, classes, negatives, k, temperature):
    text, local_text, generator = unit(classes, 6), unit(classes, 6, seed=1), torch.Generator().manual_seed(2)
    chosen = torch.randint(classes, (6, patches), generator=generator)
    local = F.normalize(local_text[chosen] + 0.3 * unit(6, patches, 6, seed=3), dim=-1)
    image = F.normalize(text[chosen[:, 0]] + 0.3 * unit(6, 6, seed=4), dim=-1)
    others = unit(negatives, 6, seed=5) if negatives else None
    columns = local_text if others is None else torch.cat([local_text, others])
    match = topk_patch_softmax(local, local_text, others, k=k, temperature=temperature)
    score = functional.mcm(image, text, temperature=temperature) + match.image_to_text + 0.7 * match.text_to_image
    given = [x if x is None else x.float() for x in (score, image, local, text, others)]
    found = functional.unsaturated_match(*given, local_text=local_text.float(), k=k, temperature=temperature, alpha=0.7)
    assert found.dtype == torch.float32
    logits = local @ columns.T / temperature
    factor = Decimal(7) / 10 * patches / classes
    terms = (
        exact_missing((image @ text.T / temperature)[:, None], classes, 1),
        exact_missing(logits, classes, k),
        exact_missing(logits[..., :classes].mT, patches, k),
    )
    bound = 1 + min(1, patches / k) + float(factor) * min(1, classes / k)
    written = exact_score([a + b + factor * c for a, b, c in zip(*terms, strict=True)], bound)
    # one unit of what float32 resolves of a cosine moves the tail by 2^-10 * 1e-7 / T
    np.testing.assert_allclose(found.double().numpy(), written, rtol=0, atol=2e-6 + 1e-9 / temperature)
    if temperature == 1:
        assert torch.equal(found, given[0])


def test_the_released_form_and_both_terms_of_gl_mcm_reach_their_bound():
    eye, at = torch.eye(3), {"k": 1, "temperature": 0.02}
    score = functional.r_mcm(eye[:1], eye[None], eye, eye[:1] * 0 - eye[:1], form="released", **at)
    found = functional.unsaturated_match(score, eye[:1], eye[None], eye, -eye[:1], form="released", **at)
    assert 2 < float(found) < 2.1
    score = functional.gl_mcm(eye[:1], eye[None], eye, temperature=0.02, local_weight=0.5)
    found = functional.unsaturated_match(score, eye[:1], eye[None], eye, local_weight=0.5, **at)
    remaining = 1.5 * (2 * np.exp(-50) / (1 + 2 * np.exp(-50)))
    assert float(found) == pytest.approx(1.5 - 2**-10 + 2**-10 * (np.log(2**-10) - np.log(remaining)), abs=2e-7)


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.integers(0, 2**31), st.floats(-3, 6), st.integers(2, 30))
def test_unsaturated_msp_is_the_exact_order_at_every_scale_of_logits(seed, exponent, classes):
    logits = 10**exponent * torch.randn(40, classes, generator=torch.Generator().manual_seed(seed))
    plain = functional.msp(logits)
    found = functional.unsaturated(plain, functional.log_remaining(logits))
    wide = logits.double()
    top, index = wide.max(1, keepdim=True)
    odds = top[:, 0] - wide.scatter(1, index, -torch.inf).logsumexp(1)
    assert found.isfinite().all()
    ordinary = odds < np.log(999)
    assert torch.equal(found[ordinary], plain[ordinary])
    order = odds.argsort()
    assert (found[order].diff() >= -2e-7 * found[order][1:].abs()).all()  # rounding, and no more
    apart = odds[order].diff() > 1e-3 + 1e-5 * odds[order][1:]
    apart &= (odds[order][1:] > np.log(2000)) & (odds[order][1:] < 2**23)
    assert (found[order].diff()[apart] > 0).all()


def test_unsaturated_is_continuous_of_one_slope_and_finite():
    remaining = torch.tensor([0.5, 2.0**-10 * 1.001, 2.0**-10 * 0.999, 1e-12, 1e-300, 0.0], dtype=torch.float64)
    for bound in (1.0, 2.7, 19.6):
        found = functional.unsaturated(bound - remaining, remaining.log(), bound=bound)
        assert found[:2].tolist() == (bound - remaining[:2]).tolist()
        assert found[2] - found[1] == pytest.approx(float(remaining[1] - remaining[2]), rel=1e-3)
        assert (found.diff() > 0).all()
        assert found.isfinite().all()
    near_zero = functional.unsaturated(-remaining.float(), remaining.log().float(), bound=0.0)
    assert torch.equal(near_zero[:4], -remaining[:4].float())
    assert (near_zero.double().diff() > 0).all()


def test_confident_images_are_told_apart_as_by_their_log_odds():
    """Nine of ten ID images and four of ten OOD images have a probability that float32 rounds to 1."""
    rng = np.random.default_rng(0)

    def logits(count, mean):
        rest = rng.normal(size=(count, 10))
        return torch.from_numpy(np.concatenate([rng.normal(mean, 7, (count, 1)), rest], 1)).float()

    known, unknown = logits(3000, 28), logits(3000, 17)

    def scores(function):
        return function(known), function(unknown)

    def odds(x):
        top, index = x.double().max(1, keepdim=True)
        return top[:, 0] - x.double().scatter(1, index, -torch.inf).logsumexp(1)

    plain, spread = scores(functional.msp), scores(unsaturated_msp)
    assert 0.85 < (plain[0] == 1).double().mean() < 0.95
    assert 0.3 < (plain[1] == 1).double().mean() < 0.5
    expected = auroc(*scores(odds))
    assert auroc(*plain) < expected - 0.05
    assert auroc(*spread) == pytest.approx(expected, abs=1e-4)
    assert spearmanr(torch.cat(spread), torch.cat(scores(odds))).statistic > 1 - 1e-6
