import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_hvl.functional import (
    adapt,
    combine,
    entropy,
    entropy_gain,
    fuse,
    id_loss,
    id_loss_from_log,
    keep_mask,
    log_pool,
    ood_loss,
    ood_loss_from_log,
    parent_index,
    patch_probabilities,
    pool,
    pseudo_ood,
)

GOLDEN = {
    key: torch.from_numpy(value) for key, value in np.load(Path(__file__).parent / "golden" / "hvl_losses.npz").items()
}
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
cases = pytest.mark.parametrize("case", ["a", "b", "c"])
means = pytest.mark.parametrize("mean", ["paper", "kept"])


def close(case, dtype):
    """Case c has a temperature of 0.01, which blows up float32's rounding."""
    if dtype == torch.float64:
        return {"rtol": 1e-10, "atol": 1e-10}
    return {"rtol": 1e-4, "atol": 1e-4} if case == "c" else {"rtol": 1e-5, "atol": 1e-5}


def golden(case, dtype, mean="paper"):
    """Inputs and results of a case by short name, in one precision."""
    found = {
        key.split("/", 2)[2]: value for key, value in GOLDEN.items() if key.startswith((f"{case}/in", f"{case}/paper"))
    }
    found |= {key.split("/", 2)[2]: value for key, value in GOLDEN.items() if key.startswith(f"{case}/{mean}")}
    return {name: v.to(dtype) if v.is_floating_point() and v.ndim else v for name, v in found.items()}


def texts(g):
    """t / |t| + b of the three scales."""
    t = F.normalize(g["t"], dim=-1)
    return t + g["b0"], t + (g["b0"] + g["b2"]) / 2, t + g["b2"]


def total_loss(v, weight, b0, b2, t, labels, n, k, tau):
    """The whole training loss, in the form used in training."""
    u = adapt(F.normalize(v, dim=-1), weight)
    u0, u1, u2 = u[:, 0], u[:, 1 : 1 + n * n], u[:, 1 + n * n :]
    h1, h2 = fuse(u0, u1, u2)
    t = F.normalize(t, dim=-1)
    text = (t + b0, t + (b0 + b2) / 2, t + b2)
    p1, p2 = patch_probabilities(h1, text[1], tau=tau), patch_probabilities(h2, text[2], tau=tau)
    e1, e2 = entropy(p1), entropy(p2)
    pooled = [patch_probabilities(u0, text[0], tau=tau).log()]
    pooled += [log_pool(p.log(), keep_mask(e)) for p, e in ((p1, e1), (p2, e2))]
    index = entropy_gain(e1, e2, parent_index(n)).detach().topk(k, dim=1).indices
    q = pseudo_ood(u0, h1, h2, index)
    logs = [patch_probabilities(x, one, tau=tau).log() for x, one in zip(q, text, strict=True)]
    return id_loss_from_log(*pooled, labels) + ood_loss_from_log(*logs)


class TestGolden:
    @dtypes
    @cases
    def test_probabilities_and_filter(self, case, dtype):
        g = golden(case, dtype)
        tau, (text0, text1, text2) = float(g["tau"]), texts(g)
        u0 = g["u0"]
        torch.testing.assert_close(patch_probabilities(u0, text0, tau=tau), g["p0"], **close(case, dtype))
        for h, text, p, e in (("h1", text1, "patch_p1", "H1"), ("h2", text2, "patch_p2", "H2")):
            ours = patch_probabilities(g[h], text, tau=tau)
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, g[p], **close(case, dtype))
            torch.testing.assert_close(entropy(g[p]), g[e], **close(case, dtype))
        if dtype == torch.float64:
            assert torch.equal(keep_mask(g["H1"]), g["keep1"].bool())
            assert torch.equal(keep_mask(g["H2"]), g["keep2"].bool())

    @dtypes
    @cases
    @means
    def test_pooled_probabilities(self, case, mean, dtype):
        g = golden(case, dtype, mean)
        for scale in (1, 2):
            ours = pool(g[f"patch_p{scale}"], g[f"keep{scale}"].bool(), mean=mean)
            torch.testing.assert_close(ours, g[f"p{scale}"], **close(case, dtype))

    @dtypes
    @cases
    def test_id_loss(self, case, dtype):
        g = golden(case, dtype)
        ours = id_loss(g["p0"], g["p1"], g["p2"], g["y"])
        torch.testing.assert_close(ours, g["L_id"].to(dtype), **close(case, dtype))
        torch.testing.assert_close(ours, g["nll"].sum(0).mean(), **close(case, dtype))

    @dtypes
    @cases
    def test_gain_and_pseudo_ood(self, case, dtype):
        g = golden(case, dtype)
        gain = entropy_gain(g["H1"], g["H2"], parent_index(int(g["n"])))
        torch.testing.assert_close(gain, g["gain"], **close(case, dtype))
        ours = pseudo_ood(g["u0"], g["h1"], g["h2"], g["topk"])
        for q, name in zip(ours, ("q0", "q1", "q2"), strict=True):
            torch.testing.assert_close(q, g[name], **close(case, dtype))

    @dtypes
    @cases
    def test_ood_loss(self, case, dtype):
        g = golden(case, dtype)
        p = [patch_probabilities(g[f"q{s}"], text, tau=float(g["tau"])) for s, text in enumerate(texts(g))]
        torch.testing.assert_close(torch.stack([entropy(x) for x in p]), g["Hq"], **close(case, dtype))
        torch.testing.assert_close(ood_loss(*p), g["L_ood"].to(dtype), **close(case, dtype))

    @dtypes
    @cases
    @means
    def test_combine(self, case, mean, dtype):
        g = golden(case, dtype, mean)
        p_id, score, prediction = combine(g["p0"], g["p1"], g["p2"])
        torch.testing.assert_close(p_id, g["p_id"], **close(case, dtype))
        torch.testing.assert_close(score, g["score"], **close(case, dtype))
        if dtype == torch.float64:
            assert torch.equal(prediction, g["pred"].long())

    @cases
    def test_gradients_of_the_whole_loss(self, case):
        g = golden(case, torch.float64)
        learned = {name: g[name].clone().requires_grad_() for name in ("W", "b0", "b2")}
        loss = total_loss(g["v"], *learned.values(), g["t"], g["y"], int(g["n"]), int(g["K"]), float(g["tau"]))
        torch.testing.assert_close(loss, g["L"].double(), rtol=1e-10, atol=1e-10)
        loss.backward()
        for name, value in learned.items():
            at = GOLDEN[f"{case}/fd/{'W' if name == 'W' else 'b'}_idx"].long()
            ours = value.grad[tuple(at.T)] if at.ndim == 2 else value.grad.flatten()[at]
            expected = GOLDEN[f"{case}/fd/{name}"]
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-8 * max(1.0, expected.abs().max().item()))


def probabilities(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


class TestInvariants:
    def test_equal_entropies_are_all_kept_and_at_least_one_always_is(self):
        # Repeated so often that the mean rounds below the value.
        assert keep_mask(torch.full((1, 7), 0.1)).all()
        rng = torch.Generator().manual_seed(0)
        kept = keep_mask(torch.rand(50, 9, generator=rng)).sum(1)
        assert kept.min() >= 1
        assert kept.max() < 9

    def test_permuting_patches_permutes_the_mask_and_leaves_the_pooled(self):
        p = probabilities(2, 6, 4)
        order = torch.tensor([3, 1, 5, 0, 2, 4])
        keep = keep_mask(entropy(p))
        assert torch.equal(keep_mask(entropy(p[:, order])), keep[:, order])
        torch.testing.assert_close(pool(p[:, order], keep[:, order]), pool(p, keep))

    def test_the_two_means_differ_by_the_kept_share_and_not_in_gradients(self):
        logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        keep = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]]).bool()
        gradients, labels = [], torch.tensor([0, 3, 2])
        for mean in ("paper", "kept"):
            x = logits.clone().requires_grad_()
            pooled = pool(x.softmax(-1), keep, mean=mean)
            id_loss(pooled, pooled, pooled, labels).backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
        p = logits.softmax(-1)
        torch.testing.assert_close(pool(p, keep) * 5 / keep.sum(1, keepdim=True), pool(p, keep, mean="kept"))
        torch.testing.assert_close(pool(p, keep).sum(-1), keep.double().mean(1))

    def test_the_log_forms_are_the_plain_ones_and_stay_finite(self):
        p, keep = probabilities(3, 5, 4), torch.tensor([[1, 0, 1, 1, 0]] * 3).bool()
        torch.testing.assert_close(log_pool(p.log(), keep).exp(), pool(p, keep))
        labels = torch.tensor([0, 1, 2])
        flat = [probabilities(3, 4, seed=s) for s in range(3)]
        torch.testing.assert_close(id_loss_from_log(*(x.log() for x in flat), labels), id_loss(*flat, labels))
        deep = [probabilities(3, 2, 4, seed=s) for s in range(3)]
        torch.testing.assert_close(ood_loss_from_log(*(x.log() for x in deep)), ood_loss(*deep))
        # cos / tau = 2,000 apart: probabilities underflow, logarithms do not.
        logs = torch.tensor([[[0.0, -2000.0], [-1500.0, 0.0]]]).log_softmax(-1).requires_grad_()
        loss = id_loss_from_log(*[log_pool(logs, torch.tensor([[True, False]]))] * 3, torch.tensor([1]))
        loss.backward()
        assert loss.item() == pytest.approx(3 * (2000 + math.log(2)))
        assert logs.grad.isfinite().all()
        zero = torch.tensor([[[0.0, -torch.inf]]])
        assert ood_loss_from_log(zero, zero, zero) == 0

    def test_bounds_of_the_losses(self):
        uniform = torch.full((2, 3, 4), 0.25, dtype=torch.float64)
        assert ood_loss(uniform, uniform, uniform).item() == pytest.approx(-3 * math.log(4))
        sure = F.one_hot(torch.tensor([[0, 1, 2]] * 2), 4).double()
        assert ood_loss(sure, sure, sure) == 0
        flat = uniform[:, 0]
        assert id_loss(flat, flat, flat, torch.tensor([0, 3])).item() == pytest.approx(3 * math.log(4))

    def test_patches_orthogonal_to_the_chosen_one_add_nothing(self):
        h2 = torch.eye(4)[None, :1].expand(1, 4, 4)
        h1 = torch.eye(4)[None, 1:2]
        u0 = torch.eye(4)[2:3]
        q0, q1, q2 = pseudo_ood(u0, h1, h2, torch.tensor([[0, 3]]))
        assert torch.equal(q2, h2[:, :2])
        torch.testing.assert_close(q1, q2)
        torch.testing.assert_close(q0, q1)

    def test_swapping_children_of_a_parent_swaps_their_gains(self):
        e1, e2 = torch.rand(2, 4), torch.rand(2, 16)
        parent = parent_index(2)
        swapped = e2.clone()
        swapped[:, [0, 1]] = e2[:, [1, 0]]
        gain = entropy_gain(e1, e2, parent)
        gain[:, [0, 1]] = gain[:, [1, 0]]
        assert torch.equal(entropy_gain(e1, swapped, parent), gain)

    def test_the_norm_of_embeddings_does_not_matter(self):
        h, text = torch.randn(3, 5), torch.randn(4, 5)
        torch.testing.assert_close(
            patch_probabilities(7 * h, 0.1 * text, tau=0.1), patch_probabilities(h, text, tau=0.1), rtol=1e-5, atol=1e-6
        )


P, KEEP = torch.full((2, 3, 4), 0.25), torch.ones(2, 3, dtype=torch.bool)
FLAT, DEEP = torch.full((2, 4), 0.25), torch.full((2, 3, 4), 0.25)


class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "error", "words"),
        [
            (lambda: patch_probabilities(torch.ones(2, 3), torch.ones(4, 5), tau=1.0), ValueError, "d is 3"),
            (lambda: patch_probabilities(torch.ones(2, 3), torch.ones(4, 3), tau=0.0), ValueError, "tau=0"),
            (lambda: patch_probabilities(torch.ones(2, 3), torch.ones(4, 3), tau="1"), TypeError, "tau"),
            (lambda: patch_probabilities(torch.ones(3).int(), torch.ones(4, 3), tau=1), TypeError, "floating point"),
            (lambda: keep_mask(torch.ones(3)), ValueError, r"\[B, N\]"),
            (lambda: keep_mask(torch.tensor([[math.nan]])), ValueError, "NaN"),
            (lambda: pool(P, KEEP, mean="sum"), ValueError, "'sum'"),
            (lambda: pool(P, KEEP.float()), TypeError, "bool"),
            (lambda: pool(P, KEEP[:, :2]), ValueError, r"\[2, 3\]"),
            (lambda: pool(P, ~KEEP), ValueError, "no patch of image 0"),
            (lambda: pool(4 * P * 2, KEEP), ValueError, r"p must lie in \[0, 1\], got 2"),
            (lambda: log_pool(P, KEEP), ValueError, "at most 0, got 0.25"),
            (lambda: entropy_gain(torch.ones(2, 4), torch.ones(2, 16), torch.arange(16)), ValueError, "15"),
            (lambda: entropy_gain(torch.ones(2, 4), torch.ones(2, 15), parent_index(2)), ValueError, r"\[15\]"),
            (lambda: entropy_gain(torch.ones(2, 4), torch.ones(2, 16), torch.ones(16)), TypeError, "integer"),
            (lambda: pseudo_ood(FLAT, DEEP, DEEP, torch.tensor([[0], [3]])), ValueError, r"\[0, 3\), got 0 to 3"),
            (lambda: pseudo_ood(FLAT, DEEP, DEEP, torch.tensor([0, 1])), ValueError, r"\[2, K\]"),
            (lambda: pseudo_ood(FLAT, DEEP, DEEP, torch.ones(2, 1)), TypeError, "integer"),
            (lambda: id_loss(FLAT, FLAT, FLAT, torch.tensor([0, 4])), ValueError, r"\[0, 4\)"),
            (lambda: id_loss(FLAT, FLAT, FLAT[:, :3], torch.tensor([0, 1])), ValueError, "C is 4"),
            (lambda: id_loss(FLAT, FLAT, -FLAT, torch.tensor([0, 1])), ValueError, "p2 must lie"),
            (lambda: id_loss_from_log(FLAT, FLAT, FLAT, torch.tensor([0, 1])), ValueError, "log_p0 must be at most 0"),
            (lambda: ood_loss(DEEP, DEEP, DEEP[:, :2]), ValueError, "K is 3"),
            (lambda: ood_loss_from_log(DEEP, DEEP, DEEP), ValueError, "give log-probabilities"),
            (lambda: combine(FLAT, FLAT, 8 * FLAT), ValueError, "p2 must lie"),
        ],
    )
    def test_sentences(self, call, error, words):
        with pytest.raises(error, match=words):
            call()
