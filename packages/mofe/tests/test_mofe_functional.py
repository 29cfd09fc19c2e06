import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_mofe.functional import (
    beta_concentration,
    fold_lambda,
    mix_experts,
    mixup,
    mixup_loss,
    norm_regulariser,
    route,
    routing_loss,
)

GOLDEN = {
    key: torch.from_numpy(np.asarray(value))
    for name in ("mofe_router_mixup", "mofe_gate_loss")
    for key, value in np.load(Path(__file__).parent / "golden" / f"{name}.npz").items()
}
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestRoute:
    @dtypes
    def test_golden(self, dtype):
        expert, probability = route(GOLDEN["route/x"].to(dtype), GOLDEN["in/Wr"].to(dtype))
        assert torch.equal(expert, GOLDEN["route/expert"])
        assert probability.dtype == dtype
        torch.testing.assert_close(probability, GOLDEN["route/prob"].to(dtype), **CLOSE[dtype])

    def test_a_zero_router_is_uniform_and_chooses_the_first_expert(self):
        expert, probability = route(random(5, 4), torch.zeros(4, 3).double())
        assert expert.tolist() == [0] * 5
        assert expert.dtype == torch.int64
        torch.testing.assert_close(probability, torch.full((5, 3), 1 / 3).double())

    def test_ties_go_to_the_lowest_index(self):
        weight = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0]])
        assert route(torch.ones(1, 1), weight)[0].tolist() == [1]

    def test_near_ties_follow_the_logits(self):
        # In float32 both probabilities are 0.5, the second logit is larger all the same.
        weight = torch.tensor([[16.0, 16.000002]])
        expert, probability = route(torch.ones(1, 1), weight)
        assert weight[0, 0] < weight[0, 1]
        assert expert.tolist() == [1]
        torch.testing.assert_close(probability, torch.full((1, 2), 0.5))

    def test_one_expert_takes_everything(self):
        expert, probability = route(random(5, 4), random(4, 1))
        assert expert.tolist() == [0] * 5
        assert torch.equal(probability, torch.ones(5, 1).double())

    def test_a_shift_of_the_logits_changes_nothing(self):
        x, weight = random(6, 4), random(4, 3, seed=1)
        shifted = weight + random(4, 1, seed=2)
        before, after = route(x, weight), route(x, shifted)
        assert torch.equal(before[0], after[0])
        torch.testing.assert_close(before[1], after[1])

    def test_order_of_the_batch_and_half_precision(self):
        x, weight = random(6, 4), random(4, 3, seed=1)
        expert, probability = route(x, weight)
        assert torch.equal(route(x.flip(0), weight)[0], expert.flip(0))
        assert route(x.half(), weight.half())[1].dtype == torch.float32
        assert (probability.gather(1, expert[:, None]) >= probability).all()

    @pytest.mark.parametrize(
        ("x", "weight", "error", "words"),
        [
            (random(5, 4), random(3, 2), ValueError, r"weight has shape \[3, 2\], but D is 4"),
            (random(2, 5, 4), random(4, 2), ValueError, r"x must have shape \[B, D\]"),
            (torch.zeros(0, 4), random(4, 2), ValueError, "x is empty"),
            (random(5, 4), torch.full((4, 2), torch.nan), ValueError, "weight holds NaN"),
            (torch.ones(5, 4, dtype=torch.int64), random(4, 2), TypeError, "int64"),
            (np.ones((5, 4)), random(4, 2), TypeError, "ndarray"),
        ],
    )
    def test_bad_input(self, x, weight, error, words):
        with pytest.raises(error, match=words):
            route(x, weight)


class TestMixExperts:
    @dtypes
    def test_golden_of_the_residual_branch(self, dtype):
        z, routed = GOLDEN["in/z"].to(dtype), GOLDEN["block/routed"].to(dtype)
        weight = GOLDEN["route/prob"].to(dtype).amax(1, keepdim=True)
        for token in range(z.shape[1]):
            ours = z[:, token] + mix_experts((routed - z)[:, token, None], weight)
            torch.testing.assert_close(ours, GOLDEN["block/routed_gate_prob"][:, token].to(dtype), **CLOSE[dtype])

    def test_is_the_weighted_sum(self):
        results, probability = random(5, 3, 4), random(5, 3, seed=1).softmax(1)
        expected = [
            [sum(float(probability[b, k] * results[b, k, d]) for k in range(3)) for d in range(4)] for b in range(5)
        ]
        torch.testing.assert_close(mix_experts(results, probability), torch.tensor(expected).double())

    def test_a_sure_router_takes_one_result_and_equal_results_stay(self):
        results = random(5, 3, 4)
        sure = F.one_hot(torch.arange(5) % 3, 3).double()
        assert torch.equal(mix_experts(results, sure), results[torch.arange(5), torch.arange(5) % 3])
        same = results[:, :1].expand(-1, 3, -1)
        torch.testing.assert_close(mix_experts(same, random(5, 3).softmax(1)), same[:, 0])

    @pytest.mark.parametrize(
        ("results", "probability", "error", "words"),
        [
            (random(5, 3, 4), random(5, 2).sigmoid(), ValueError, "K is 3"),
            (random(5, 4), random(5, 4).sigmoid(), ValueError, r"\[B, K, D\]"),
            (random(5, 1, 4), torch.full((5, 1), 1.5), ValueError, "probability must lie"),
            (random(5, 1, 4) * math.nan, torch.ones(5, 1), ValueError, "results holds NaN"),
            (random(5, 1, 4), torch.ones(5, 1, dtype=torch.int64), TypeError, "int64"),
        ],
    )
    def test_bad_input(self, results, probability, error, words):
        with pytest.raises(error, match=words):
            mix_experts(results, probability)


class TestRoutingLoss:
    @dtypes
    def test_golden_value_and_gradient(self, dtype):
        weight = GOLDEN["in/Wr"].to(dtype, copy=True).requires_grad_()
        loss = routing_loss(GOLDEN["route/x"].to(dtype) @ weight, GOLDEN["route/target"])
        loss.backward()
        assert loss.dtype == dtype
        torch.testing.assert_close(loss, GOLDEN["route/loss"].to(dtype), **CLOSE[dtype])
        torch.testing.assert_close(weight.grad, GOLDEN["route/dWr"].to(dtype), **CLOSE[dtype])

    def test_gradient_formula(self):
        x, weight, expert = (
            random(6, 4),
            random(4, 3, seed=1).requires_grad_(),
            torch.tensor([0, 2, 1, 1, 0, 2]),
        )
        routing_loss(x @ weight, expert).backward()
        probability = route(x, weight.detach())[1]
        expected = x.T @ (probability - F.one_hot(expert, 3)) / 6
        torch.testing.assert_close(weight.grad, expected)

    def test_uniform_logits_cost_log_e_and_one_expert_nothing(self):
        assert routing_loss(torch.zeros(4, 7), torch.tensor([0, 6, 3, 3])).item() == pytest.approx(math.log(7))
        assert routing_loss(random(4, 1), torch.zeros(4, dtype=torch.int64)).item() == 0

    def test_large_logits_stay_finite(self):
        loss = routing_loss(torch.tensor([[1e4, -1e4]]), torch.tensor([1]))
        assert loss.item() == pytest.approx(2e4)

    def test_any_integer_type(self):
        logits, expert = random(4, 3), torch.tensor([0, 2, 1, 1])
        assert torch.equal(routing_loss(logits, expert.to(torch.uint8)), routing_loss(logits, expert))

    @pytest.mark.parametrize(
        ("expert", "error", "words"),
        [
            (torch.tensor([0, 3]), ValueError, r"expert must lie in \[0, 3\), got 0 to 3"),
            (torch.tensor([-1, 0]), ValueError, "got -1 to 0"),
            (torch.tensor([0, 1, 2]), ValueError, r"shape \[2\], got \[3\]"),
            (torch.tensor([0.0, 1.0]), TypeError, "float32"),
            ([0, 1], TypeError, "list"),
            (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "expert is on meta"),
        ],
    )
    def test_bad_expert(self, expert, error, words):
        with pytest.raises(error, match=words):
            routing_loss(random(2, 3), expert)

    def test_bad_logits(self):
        with pytest.raises(ValueError, match="NaN"):
            routing_loss(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))
        with pytest.raises(ValueError, match=r"\[B, E\]"):
            routing_loss(random(3), torch.tensor([0]))


class TestBetaConcentration:
    @dtypes
    def test_golden(self, dtype):
        ours = beta_concentration(GOLDEN["beta/s"].to(dtype), w=float(GOLDEN["beta/w"]))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, GOLDEN["beta/sigma"].to(dtype), **CLOSE[dtype])

    def test_golden_mean_of_the_folded_lambda(self):
        sigma = beta_concentration(GOLDEN["beta/s"], w=float(GOLDEN["beta/w"]))
        log_beta = 2 * torch.lgamma(sigma) - torch.lgamma(2 * sigma)
        mean = 0.5 + (-sigma * math.log(4) - sigma.log() - log_beta).exp()
        torch.testing.assert_close(mean, GOLDEN["beta/mean_lambda_hat"], rtol=0, atol=1e-12)

    def test_samples_have_the_mean_of_the_closed_form(self):
        sigma = beta_concentration(torch.tensor([0.0, 0.5, 1.0]).double(), w=0.8)
        rng, count = np.random.default_rng(0), 20000
        for value in sigma.tolist():
            folded = fold_lambda(torch.from_numpy(rng.beta(value, value, count)))
            mean = 0.5 + 4**-value / (value * math.gamma(value) ** 2 / math.gamma(2 * value))
            assert abs(folded.mean() - mean) < 4 * folded.std() / count**0.5

    def test_ends_floor_and_no_weight(self):
        accuracy = torch.tensor([0.0, 0.5, 1.0]).double()
        torch.testing.assert_close(beta_concentration(accuracy, w=0.8), torch.tensor([1.0, 0.6, 0.2]).double())
        assert beta_concentration(accuracy, w=1.0).tolist() == [1.0, 0.5, 0.05]
        assert beta_concentration(accuracy, w=3.0, floor=0.3).tolist() == [1.0, 0.3, 0.3]
        assert beta_concentration(accuracy, w=0).tolist() == [1.0, 1.0, 1.0]

    @pytest.mark.parametrize(
        ("accuracy", "options", "error", "words"),
        [
            (
                torch.tensor([0.5, 1.2]),
                {"w": 0.8},
                ValueError,
                r"accuracy must lie in \[0, 1\], got 0\.5 to 1\.2",
            ),
            (torch.tensor([-0.5]), {"w": 0.8}, ValueError, r"-0\.5"),
            (torch.tensor([torch.nan]), {"w": 0.8}, ValueError, "NaN"),
            (torch.zeros(2, 2), {"w": 0.8}, ValueError, r"\[C\]"),
            (torch.zeros(0), {"w": 0.8}, ValueError, "empty"),
            (torch.tensor([1]), {"w": 0.8}, TypeError, "int64"),
            ([0.5], {"w": 0.8}, TypeError, "list"),
            (torch.zeros(2), {"w": -0.1}, ValueError, r"w=-0\.1"),
            (torch.zeros(2), {"w": float("nan")}, ValueError, "w=nan"),
            (torch.zeros(2), {"w": "0.8"}, TypeError, r"'0\.8'"),
            (torch.zeros(2), {"w": 0.8, "floor": 0.0}, ValueError, r"floor=0\.0"),
        ],
    )
    def test_bad_input(self, accuracy, options, error, words):
        with pytest.raises(error, match=words):
            beta_concentration(accuracy, **options)


class TestFoldLambda:
    @dtypes
    def test_golden(self, dtype):
        ours = fold_lambda(GOLDEN["beta/lambda"].to(dtype))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, GOLDEN["beta/lambda_hat"].to(dtype), **CLOSE[dtype])

    @pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3)], ids=str)
    def test_symmetric_and_at_least_one_half(self, shape):
        lam = random(*shape).sigmoid()
        ours = fold_lambda(lam)
        assert ours.shape == shape
        assert ours.min() >= 0.5
        torch.testing.assert_close(fold_lambda(1 - lam), ours)

    def test_ends(self):
        assert fold_lambda(torch.tensor([0.0, 0.5, 1.0])).tolist() == [1.0, 0.5, 1.0]

    @pytest.mark.parametrize(
        ("lam", "error", "words"),
        [
            (torch.tensor([1.5]), ValueError, r"lam must lie in \[0, 1\]"),
            (torch.tensor([-0.1]), ValueError, r"-0\.1"),
            (torch.tensor([torch.nan]), ValueError, "NaN"),
            (torch.zeros(0), ValueError, "empty"),
            (torch.tensor([1]), TypeError, "int64"),
            (0.3, TypeError, "float"),
        ],
    )
    def test_bad_input(self, lam, error, words):
        with pytest.raises(error, match=words):
            fold_lambda(lam)


def batch(size=5, classes=3):
    y = F.one_hot(torch.arange(size) % classes, classes).double()
    return random(size, 2, 4), y, random(size, seed=1).sigmoid(), torch.arange(size).roll(1)


class TestMixup:
    @dtypes
    def test_golden(self, dtype):
        y = F.one_hot(GOLDEN["in/y"], 7).to(dtype)
        tokens, target = mixup(GOLDEN["in/z"].to(dtype), y, GOLDEN["mix/lambda_hat"].to(dtype), GOLDEN["mix/partner"])
        assert tokens.dtype == target.dtype == dtype
        torch.testing.assert_close(tokens, GOLDEN["mix/tokens"].to(dtype), **CLOSE[dtype])
        torch.testing.assert_close(target, GOLDEN["mix/target"].to(dtype), **CLOSE[dtype])

    def test_lambda_one_returns_the_inputs_and_zero_the_partners(self):
        x, y, lam, partner = batch()
        same = mixup(x, y, torch.ones_like(lam), partner)
        assert torch.equal(same[0], x)
        assert torch.equal(same[1], y)
        other = mixup(x, y, torch.zeros_like(lam), partner)
        assert torch.equal(other[0], x[partner])
        assert torch.equal(other[1], y[partner])

    def test_targets_sum_to_one_and_every_item_is_its_own_mix(self):
        x, y, lam, partner = batch()
        mixed, target = mixup(x, y, lam, partner)
        torch.testing.assert_close(target.sum(1), torch.ones(5).double())
        for i, j in enumerate(partner.tolist()):
            torch.testing.assert_close(mixed[i], lam[i] * x[i] + (1 - lam[i]) * x[j])
            assert target[i, i % 3] == pytest.approx(lam[i].item())

    def test_an_item_that_is_its_own_partner_stays(self):
        x, y, lam, _ = batch()
        mixed, target = mixup(x, y, lam, torch.arange(5))
        torch.testing.assert_close(mixed, x)
        torch.testing.assert_close(target, y)

    @pytest.mark.parametrize("shape", [(), (3,), (3, 4, 4)], ids=str)
    def test_any_shape_of_item_and_integer_targets(self, shape):
        x, (_, y, lam, partner) = random(5, *shape), batch()
        mixed, target = mixup(x, y.long(), lam, partner)
        assert mixed.shape == x.shape
        torch.testing.assert_close(mixed.flatten(), mixup(x.reshape(5, -1), y, lam, partner)[0].flatten())
        torch.testing.assert_close(target, mixup(x, y, lam, partner)[1])

    def test_the_inputs_are_not_changed(self):
        arguments = batch()
        copies = [value.clone() for value in arguments]
        mixup(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"lam": torch.full((5,), 1.5)}, ValueError, r"lam must lie in \[0, 1\], got 1\.5"),
            ({"lam": torch.ones(4)}, ValueError, r"lam has shape \[4\], but B is 5"),
            ({"lam": 0.5}, TypeError, "float"),
            ({"y_one_hot": torch.ones(4, 3)}, ValueError, "but B is 5"),
            ({"y_one_hot": torch.full((5, 3), 2)}, ValueError, "y_one_hot must lie"),
            ({"y_one_hot": torch.arange(5)}, ValueError, r"y_one_hot must have shape \[B, C\]"),
            (
                {"partner": torch.tensor([0, 1, 2, 3, 5])},
                ValueError,
                r"partner must lie in \[0, 5\), got 0 to 5",
            ),
            ({"partner": torch.tensor([0, 1])}, ValueError, r"\[5\], got \[2\]"),
            ({"partner": torch.zeros(5)}, TypeError, "float32"),
            ({"partner": torch.zeros(5, dtype=torch.int64, device="meta")}, ValueError, "partner is on meta"),
            ({"x": torch.full((5, 2), torch.nan)}, ValueError, "x holds NaN"),
            ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[B\], got \[\]"),
            ({"x": torch.zeros(5, 2, dtype=torch.uint8)}, TypeError, "uint8"),
            ({"x": np.zeros((5, 2))}, TypeError, "ndarray"),
        ],
    )
    def test_bad_input(self, change, error, words):
        arguments = {**dict(zip(("x", "y_one_hot", "lam", "partner"), batch(), strict=True)), **change}
        with pytest.raises(error, match=words):
            mixup(**arguments)


class TestMixupLoss:
    @dtypes
    def test_golden(self, dtype):
        features = GOLDEN["mix/F"].to(dtype)
        logits = features @ GOLDEN["mix/Wg"].to(dtype) + GOLDEN["mix/bg"].to(dtype)
        target = GOLDEN["mix/target"].to(dtype)
        found = {
            "mix/ce": mixup_loss(logits, target, reg="none"),
            "mix/l2_unit": norm_regulariser(features, weight=1.0),
            "mix/loss_l2_eta0.1": mixup_loss(logits, target, features),
            "mix/loss_ls_eps0.1": mixup_loss(logits, target, reg="ls"),
        }
        for name, value in found.items():
            assert value.dtype == dtype
            torch.testing.assert_close(value, GOLDEN[name].to(dtype), **CLOSE[dtype])

    def test_by_hand(self):
        logits, target, features = random(6, 4), random(6, 4, seed=1).softmax(1), random(6, 3, seed=2)
        total = 0.0
        for row in range(6):
            chances = [math.exp(float(x)) for x in logits[row]]
            total -= sum(float(target[row, c]) * math.log(chances[c] / sum(chances)) for c in range(4)) / 6
        reg = sum(float(x) ** 2 for x in features.flatten()) / 18
        assert mixup_loss(logits, target, features, reg_weight=0.3).item() == pytest.approx(total + 0.3 * reg, 1e-12)
        uniform = -logits.log_softmax(1).mean().item()
        smoothed = mixup_loss(logits, target, reg="ls", smoothing=0.2).item()
        assert smoothed == pytest.approx(total + 0.2 * (uniform - total), 1e-12)

    def test_hard_targets_and_no_weight_give_ordinary_cross_entropy(self):
        logits, labels = random(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
        target = F.one_hot(labels, 4).double()
        expected = F.cross_entropy(logits, labels)
        torch.testing.assert_close(mixup_loss(logits, target, random(6, 2), reg_weight=0), expected)
        smooth = F.cross_entropy(logits, labels, label_smoothing=0.1)
        torch.testing.assert_close(mixup_loss(logits, target, reg="ls"), smooth)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"features": None}, ValueError, "pass features"),
            ({"features": torch.ones(5, 2)}, ValueError, "but B is 6"),
            ({"target": torch.ones(6, 4) / 2}, ValueError, "sum to 1, got sums from 2 to 2"),
            ({"target": torch.tensor([[2.0, -1, 0, 0]] * 6)}, ValueError, "target must lie"),
            ({"target": torch.ones(6, 3) / 3}, ValueError, "C is 4"),
            ({"logits": torch.full((6, 4), math.nan)}, ValueError, "logits holds NaN"),
            ({"reg": "l1"}, ValueError, "'l1'"),
            ({"smoothing": 1.0, "reg": "ls"}, ValueError, "smoothing=1.0"),
            ({"reg_weight": -1.0}, ValueError, "weight=-1.0"),
            ({"reg_weight": "much"}, TypeError, "'much'"),
        ],
    )
    def test_bad_input(self, change, error, words):
        arguments = {"logits": torch.zeros(6, 4), "target": torch.ones(6, 4) / 4, "features": torch.ones(6, 2)}
        with pytest.raises(error, match=words):
            mixup_loss(**(arguments | change))
