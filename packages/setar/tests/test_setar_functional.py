import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ood_setar.functional import (
    LossTerms,
    accept,
    compose,
    dropped_rank,
    loss_terms,
    pseudo_ood_cells,
    search_loss,
    split_low_rank,
    truncate,
)

FOLDER = Path(__file__).parent / "golden"
GOLDEN = {key: torch.from_numpy(value) for key, value in np.load(FOLDER / "setar_linear.npz").items()}
RANKS = json.loads((FOLDER / "setar_ranks.json").read_text())
# Every candidate's loss of the five searches published with the released code, and the ratios they ended with.
REPLAY = json.loads((FOLDER / "setar_replay.json").read_text())
CLOSE = {"rtol": 0, "atol": 3e-5}

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
shapes = pytest.mark.parametrize("shape", [(9, 5), (5, 9), (7, 7), (1, 4)], ids=str)


def cells(kind):
    """(matrix, ratio) of the golden arrays of one kind."""
    return [(key.split("/")[0], key.split("/")[2]) for key in GOLDEN if key.split("/")[1] == kind]


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def singular_values(weight):
    return torch.linalg.svdvals(weight.double())


def batch(images=4, cells=5, classes=6, *, seed=0, scale=2.0):
    """Random global logits, local logits and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    return scale * matrix(images, classes, seed=seed), scale * matrix(images, cells, classes, seed=seed + 1), labels


def probabilities(logits):
    top = max(logits)
    powers = [math.exp(value - top) for value in logits]
    return [power / sum(powers) for power in powers]


def loss_by_loops(global_logits, local_logits, labels, *, k):
    """(L_ID, L_OOD, cells) in plain Python: the top k by a sort, every sum by a loop."""
    crossed, entropies = [], []
    for image, cells, label in zip(global_logits.tolist(), local_logits.tolist(), labels.tolist(), strict=True):
        crossed.append(-math.log(probabilities(image)[label]))
        for cell in cells:
            best = sorted(range(len(cell)), key=lambda c: -cell[c])[:k]
            if label not in best:
                entropies.append(sum(share * math.log(share + 1e-5) for share in probabilities(cell)))
    return sum(crossed) / len(crossed), sum(entropies) / max(1, len(entropies)), len(entropies)


class TestDroppedRank:
    @pytest.mark.parametrize("full", RANKS)
    def test_golden_table(self, full):
        for ratio, rank in RANKS[full].items():
            assert dropped_rank((int(full), 4096), float(ratio)) == rank
            assert dropped_rank((4096, int(full)), float(ratio)) == rank

    @pytest.mark.parametrize(
        ("full", "ratio", "rank"),
        [(50, 0.05, 2), (50, 0.25, 12), (70, 0.15, 10), (30, 0.15, 4), (10, 0, 0), (1, 0.5, 0)],
    )
    def test_ties_go_to_the_even_rank(self, full, ratio, rank):
        assert dropped_rank((full, full), ratio) == rank

    @pytest.mark.parametrize(
        ("full", "ranks"),
        [
            (512, [26, 51, 77, 102, 128, 154, 179, 205]),
            (768, [38, 77, 115, 154, 192, 230, 269, 307]),
            (1024, [51, 102, 154, 205, 256, 307, 358, 410]),
        ],
    )
    def test_widths_of_real_models(self, full, ranks):
        ratios = [0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40]
        assert [dropped_rank(torch.Size([4 * full, full]), ratio) for ratio in ratios] == ranks

    @pytest.mark.parametrize(
        ("shape", "ratio", "error", "words"),
        [
            ((4, 4), 1.0, ValueError, r"ratio=1\.0 is outside \[0, 1\)"),
            ((4, 4), 5, ValueError, "ratio=5"),
            ((4, 4), -0.1, ValueError, r"ratio=-0\.1"),
            ((4, 4), float("nan"), ValueError, "ratio=nan"),
            ((4, 9), 0.9, ValueError, "drops all 4 singular values of a 4x9 weight"),
            ((1, 9), 0.6, ValueError, "drops all 1"),
            ((4, 4), "0.1", TypeError, r"'0\.1'"),
            ((4, 4), True, TypeError, "True"),
            ((4,), 0.1, ValueError, r"\(4,\)"),
            ((4, 4, 4), 0.1, ValueError, r"\(4, 4, 4\)"),
            ((0, 4), 0.1, ValueError, "size=0"),
            ((4.0, 4), 0.1, TypeError, r"4\.0"),
        ],
    )
    def test_bad_input(self, shape, ratio, error, words):
        with pytest.raises(error, match=words):
            dropped_rank(shape, ratio)


class TestTruncate:
    @dtypes
    @pytest.mark.parametrize("drop", ["minor", "principal", "random"])
    def test_golden(self, drop, dtype):
        assert cells(drop)
        for name, ratio in cells(drop):
            generator = torch.Generator().manual_seed(5)
            ours = truncate(GOLDEN[f"{name}/W"].to(dtype), float(ratio), drop=drop, generator=generator)
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, GOLDEN[f"{name}/{drop}/{ratio}"].to(dtype), **CLOSE)

    def test_golden_random_drops_the_first_of_one_permutation(self):
        for name, ratio in cells("random_index"):
            weight, expected = GOLDEN[f"{name}/W"].double(), GOLDEN[f"{name}/random_index/{ratio}"]
            ours = truncate(weight, float(ratio), drop="random", generator=torch.Generator().manual_seed(5))
            u, _, vh = torch.linalg.svd(weight, full_matrices=False)
            left = torch.einsum("or,oi,ri->r", u, ours, vh)
            assert sorted(expected.tolist()) == (left.abs() < 1e-9).nonzero().flatten().tolist()

    @shapes
    @pytest.mark.parametrize("drop", ["minor", "principal", "random"])
    def test_ratio_zero_copies_bit_for_bit(self, shape, drop):
        weight = matrix(*shape).float()
        ours = truncate(weight, 0, drop=drop)
        assert torch.equal(ours, weight)
        assert ours.data_ptr() != weight.data_ptr()

    @pytest.mark.parametrize("shape", [(9, 5), (5, 9), (7, 7)], ids=str)
    @pytest.mark.parametrize("ratio", [0.2, 0.4, 0.7])
    def test_rank_error_and_order_of_the_three_ways(self, shape, ratio):
        weight = matrix(*shape)
        rank, values = dropped_rank(shape, ratio), singular_values(weight)
        errors = {}
        for drop in ("minor", "random", "principal"):
            ours = truncate(weight, ratio, drop=drop, generator=torch.Generator().manual_seed(1))
            assert torch.linalg.matrix_rank(ours) == min(shape) - rank
            errors[drop] = (weight - ours).square().sum()
        torch.testing.assert_close(errors["minor"], values[-rank:].square().sum())
        torch.testing.assert_close(errors["principal"], values[:rank].square().sum())
        assert errors["minor"] <= errors["random"] + 1e-12
        assert errors["random"] <= errors["principal"] + 1e-12

    @shapes
    def test_orthogonal_maps_pass_through(self, shape):
        weight = matrix(*shape)
        left = torch.linalg.qr(matrix(shape[0], shape[0], seed=1)).Q
        right = torch.linalg.qr(matrix(shape[1], shape[1], seed=2)).Q
        expected = left @ truncate(weight, 0.4) @ right
        torch.testing.assert_close(truncate(left @ weight @ right, 0.4), expected, rtol=0, atol=1e-12)

    def test_twice_is_once(self):
        once = truncate(matrix(9, 5), 0.4)
        torch.testing.assert_close(truncate(once, 0.4), once, rtol=0, atol=1e-12)

    def test_random_depends_only_on_its_generator(self):
        weight = matrix(12, 10)

        def draw(seed):
            return truncate(weight, 0.3, drop="random", generator=torch.Generator().manual_seed(seed))

        first = draw(3)
        torch.manual_seed(99)
        assert torch.equal(draw(3), first)
        assert not torch.allclose(draw(4), first)

    def test_random_without_a_generator_uses_torchs_own(self):
        weight = matrix(12, 10)
        torch.manual_seed(5)
        ours = truncate(weight, 0.3, drop="random")
        own = torch.Generator().manual_seed(5)
        assert torch.equal(ours, truncate(weight, 0.3, drop="random", generator=own))

    def test_the_weight_is_not_changed_and_may_be_non_contiguous(self):
        weight = matrix(9, 5)
        before, expected = weight.clone(), truncate(weight, 0.4)
        assert torch.equal(weight, before)
        torch.testing.assert_close(truncate(weight.T.contiguous().T, 0.4), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        weight = matrix(9, 5).to(dtype)
        ours = truncate(weight, 0.4)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, truncate(weight.float(), 0.4), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("weight", "options", "error", "words"),
        [
            (matrix(5), {"ratio": 0.2}, ValueError, r"weight must have shape \[out, in\], got \[5\]"),
            (torch.zeros(0, 5), {"ratio": 0.2}, ValueError, "weight is empty"),
            (torch.full((2, 3), torch.nan), {"ratio": 0.2}, ValueError, "NaN"),
            (torch.full((2, 3), torch.inf), {"ratio": 0.2}, ValueError, "6 infinite values"),
            (torch.ones(2, 3, dtype=torch.int64), {"ratio": 0.2}, TypeError, "int64"),
            (np.ones((2, 3)), {"ratio": 0.2}, TypeError, "ndarray"),
            (matrix(9, 5), {"ratio": 1.0}, ValueError, r"ratio=1\.0"),
            (matrix(9, 5), {"ratio": 0.95}, ValueError, "drops all 5"),
            (matrix(9, 5), {"ratio": 0.2, "drop": "small"}, ValueError, "drop='small'"),
        ],
    )
    def test_bad_input(self, weight, options, error, words):
        with pytest.raises(error, match=words):
            truncate(weight, **options)


class TestSplitLowRank:
    @dtypes
    def test_golden(self, dtype):
        assert cells("dropped")
        for name, ratio in cells("dropped"):
            kept, b, a = split_low_rank(GOLDEN[f"{name}/W"].to(dtype), float(ratio))
            torch.testing.assert_close(kept, GOLDEN[f"{name}/minor/{ratio}"].to(dtype), **CLOSE)
            torch.testing.assert_close(b @ a, GOLDEN[f"{name}/dropped/{ratio}"].to(dtype), **CLOSE)
            smallest = GOLDEN[f"{name}/svals"][-b.shape[1] :].to(dtype)
            torch.testing.assert_close(b.T @ b, smallest.diag(), **CLOSE)
            torch.testing.assert_close(a @ a.T, smallest.diag(), **CLOSE)

    @pytest.mark.parametrize("name", ["40x30", "24x96"])
    @pytest.mark.parametrize("ratio", [0.05, 0.25, 0.4])
    def test_the_parts_add_up_to_the_weight(self, name, ratio):
        weight = GOLDEN[f"{name}/W"]
        kept, b, a = split_low_rank(weight, ratio)
        torch.testing.assert_close(kept + b @ a, weight, rtol=0, atol=2e-6)
        assert torch.equal(kept, truncate(weight, ratio))

    @pytest.mark.parametrize("shape", [(9, 5), (5, 9), (7, 7)], ids=str)
    def test_shapes_and_balance_of_the_factors(self, shape):
        weight = matrix(*shape)
        kept, b, a = split_low_rank(weight, 0.4)
        rank = dropped_rank(shape, 0.4)
        assert (kept.shape, b.shape, a.shape) == (shape, (shape[0], rank), (rank, shape[1]))
        smallest = singular_values(weight)[-rank:].diag()
        torch.testing.assert_close(b.T @ b, smallest, rtol=0, atol=1e-12)
        torch.testing.assert_close(a @ a.T, smallest, rtol=0, atol=1e-12)
        torch.testing.assert_close(b.T @ kept, torch.zeros(rank, shape[1]).double(), rtol=0, atol=1e-12)

    @shapes
    def test_nothing_dropped_gives_empty_factors(self, shape):
        weight = matrix(*shape)
        kept, b, a = split_low_rank(weight, 0.0)
        assert torch.equal(kept, weight)
        assert (b.shape, a.shape) == ((shape[0], 0), (0, shape[1]))
        assert torch.equal(b @ a, torch.zeros(shape).double())

    @pytest.mark.parametrize(
        ("weight", "ratio", "error", "words"),
        [
            (matrix(2, 3, 4), 0.2, ValueError, r"\[2, 3, 4\]"),
            (matrix(9, 5), 1, ValueError, "ratio=1 "),
            (matrix(9, 5), None, TypeError, "None"),
            (torch.full((2, 3), -torch.inf), 0.2, ValueError, "infinite"),
            ([[1.0]], 0.2, TypeError, "list"),
        ],
    )
    def test_bad_input(self, weight, ratio, error, words):
        with pytest.raises(error, match=words):
            split_low_rank(weight, ratio)


class TestCompose:
    @pytest.mark.parametrize("shape", [(9, 5), (5, 9), (7, 7)], ids=str)
    @pytest.mark.parametrize("drop", ["minor", "principal", "random"])
    def test_is_truncate_with_the_decomposition_done(self, shape, drop):
        weight = matrix(*shape)
        factors = torch.linalg.svd(weight, full_matrices=False)
        for ratio in (0.2, 0.6):
            generators = [torch.Generator().manual_seed(3) for _ in range(2)]
            ours = compose(factors, dropped_rank(shape, ratio), drop=drop, generator=generators[0])
            assert torch.equal(ours, truncate(weight, ratio, drop=drop, generator=generators[1]))

    def test_dropping_nothing_is_the_matrix_and_keeps_the_factors(self):
        weight = matrix(9, 5)
        factors = torch.linalg.svd(weight, full_matrices=False)
        before = [factor.clone() for factor in factors]
        torch.testing.assert_close(compose(factors, 0), weight, rtol=0, atol=1e-12)
        compose(factors, 3)
        assert all(map(torch.equal, factors, before))

    def test_a_sum_over_the_singular_values_that_stay(self):
        u, s, vh = torch.linalg.svd(matrix(4, 6), full_matrices=False)
        expected = sum(s[i] * torch.outer(u[:, i], vh[i]) for i in (0, 1, 2))
        torch.testing.assert_close(compose((u, s, vh), 1), expected, rtol=0, atol=1e-12)
        expected = sum(s[i] * torch.outer(u[:, i], vh[i]) for i in (2, 3))
        torch.testing.assert_close(compose((u, s, vh), 2, drop="principal"), expected, rtol=0, atol=1e-12)


class TestSearchLoss:
    @pytest.mark.parametrize("k", [1, 2, 5, 6])
    @pytest.mark.parametrize("shape", [(4, 5, 6), (1, 5, 6), (4, 1, 6), (1, 1, 6), (3, 7, 9)], ids=str)
    def test_against_loops(self, shape, k):
        logits, local, labels = batch(*shape, seed=sum(shape) + k)
        id_loss, ood_loss, cells = loss_by_loops(logits, local, labels, k=k)
        terms = loss_terms(logits, local, labels, k=k)
        assert terms.id_loss().item() == pytest.approx(id_loss, abs=1e-12)
        assert terms.ood_loss().item() == pytest.approx(ood_loss, abs=1e-12)
        assert int(terms.cells.sum()) == cells
        rows = zip(logits.tolist(), labels.tolist(), strict=True)
        assert terms.correct.tolist() == [row.index(max(row)) == label for row, label in rows]
        for weight in (0, 0.1, -2.5):
            ours = search_loss(logits, local, labels, k=k, weight=weight).item()
            assert ours == pytest.approx(id_loss + weight * ood_loss, abs=1e-12)

    def test_rank_count_is_membership_of_the_top_k(self):
        _, local, labels = batch(6, 8, 7)
        own = labels[:, None, None]
        for k in range(1, 8):
            among = (local.topk(k, -1).indices == own).any(-1)
            assert torch.equal(pseudo_ood_cells(local, labels, k=k), ~among)

    def test_weight_zero_is_cross_entropy(self):
        logits, local, labels = batch()
        expected = torch.nn.functional.cross_entropy(logits, labels)
        assert search_loss(logits, local, labels, k=2, weight=0.0) == expected

    def test_k_of_all_classes_leaves_no_cell(self):
        logits, local, labels = batch(classes=6)
        assert not pseudo_ood_cells(local, labels, k=6).any()
        terms = loss_terms(logits, local, labels, k=6)
        assert terms.ood_loss() == 0
        assert search_loss(logits, local, labels, k=6, weight=3.0) == terms.id_loss()

    @pytest.mark.parametrize("classes", [2, 10, 1000])
    def test_even_cells_have_the_most_negative_loss(self, classes):
        """Logits equal but for the own class, which is a hair below: every cell counts, its softmax is uniform."""
        local = torch.zeros(3, 4, classes, dtype=torch.float64)
        local[..., 0] = -1e-9
        labels = torch.zeros(3, dtype=torch.int64)
        terms = loss_terms(local[:, 0], local, labels, k=1)
        assert terms.cells.tolist() == [4, 4, 4]
        assert terms.ood_loss().item() == pytest.approx(math.log(1 / classes + 1e-5), abs=1e-7)
        peaked = local.clone()
        peaked[..., 1] = 3
        assert loss_terms(local[:, 0], peaked, labels, k=1).ood_loss() > terms.ood_loss()

    def test_equal_logits_count_for_the_class(self):
        local = torch.zeros(1, 3, 4)
        local[0, 1, 2] = 1.0  # one class above the own one
        local[0, 2, 2:] = 1.0  # two
        label = torch.tensor([0])
        assert pseudo_ood_cells(local, label, k=1).tolist() == [[False, True, True]]
        assert pseudo_ood_cells(local, label, k=2).tolist() == [[False, False, True]]
        assert pseudo_ood_cells(local, label, k=3).tolist() == [[False, False, False]]

    def test_only_the_ood_part_depends_on_batching(self):
        logits, local, labels = batch(6, 5, 6)
        whole = loss_terms(logits, local, labels, k=3)
        parts = [loss_terms(logits[i : i + 2], local[i : i + 2], labels[i : i + 2], k=3) for i in (0, 2, 4)]
        torch.testing.assert_close(torch.stack([part.id_loss() for part in parts]).mean(), whole.id_loss())
        pooled = torch.stack([part.ood_loss() for part in parts]).mean()
        assert len({int(part.cells.sum()) for part in parts}) > 1
        assert abs(pooled - whole.ood_loss()) > 1e-3
        together = LossTerms(*map(torch.cat, zip(*parts, strict=True)))
        for ours, expected in zip(together, whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)

    def test_the_order_of_cells_and_of_images_does_not_matter(self):
        logits, local, labels = batch()
        expected = search_loss(logits, local, labels, k=2, weight=0.5)
        cells, images = torch.tensor([3, 0, 4, 2, 1]), torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(search_loss(logits, local[:, cells], labels, k=2, weight=0.5), expected)
        moved = search_loss(logits[images], local[images], labels[images], k=2, weight=0.5)
        torch.testing.assert_close(moved, expected)
        assert search_loss(logits, local[images], labels, k=2, weight=0.5) != expected

    def test_the_images_of_a_batch_keep_their_terms(self):
        logits, local, labels = batch()
        terms = loss_terms(logits, local, labels, k=2)
        for row in range(len(labels)):
            one = loss_terms(logits[row : row + 1], local[row : row + 1], labels[row : row + 1], k=2)
            for ours, expected in zip(one, terms, strict=True):
                torch.testing.assert_close(ours[0], expected[row])

    def test_adding_a_constant_to_all_logits_changes_nothing(self):
        logits, local, labels = batch()
        expected = search_loss(logits, local, labels, k=2, weight=0.5)
        torch.testing.assert_close(search_loss(logits + 7, local - 3, labels, k=2, weight=0.5), expected)

    @pytest.mark.parametrize("k", [1, 3, 6])
    def test_gradients(self, k):
        logits, local, labels = batch(3, 4, 6)

        def loss(one, other):
            return search_loss(one, other, labels, k=k, weight=0.7)

        assert torch.autograd.gradcheck(loss, (logits.requires_grad_(), local.requires_grad_()))
        loss(logits, local).backward()
        cells = pseudo_ood_cells(local, labels, k=k)
        assert torch.equal(local.grad.abs().sum(-1) > 0, cells)  # other cells do not count

    def test_large_logits(self):
        logits, local, labels = batch(scale=1e4)
        id_loss, ood_loss, _ = loss_by_loops(*batch(scale=100.0), k=2)
        assert search_loss(logits, local, labels, k=2, weight=0.5).isfinite()
        ours = search_loss(*batch(scale=100.0), k=2, weight=0.5).item()
        assert ours == pytest.approx(id_loss + 0.5 * ood_loss, rel=1e-12)

    def test_float32_is_close_and_half_is_computed_in_float32(self):
        logits, local, labels = batch(8, 16, 20)
        exact = search_loss(logits, local, labels, k=6, weight=0.3)
        single = search_loss(logits.float(), local.float(), labels, k=6, weight=0.3)
        assert (exact.dtype, single.dtype) == (torch.float64, torch.float32)
        assert single.item() == pytest.approx(exact.item(), rel=1e-5)
        for dtype in (torch.float16, torch.bfloat16):
            half = search_loss(logits.to(dtype), local.to(dtype), labels, k=6, weight=0.3)
            expected = search_loss(logits.to(dtype).float(), local.to(dtype).float(), labels, k=6, weight=0.3)
            assert half.dtype == torch.float32
            assert torch.equal(half, expected)

    def test_labels_of_any_integer_type(self):
        logits, local, labels = batch()
        expected = search_loss(logits, local, labels, k=2, weight=0.5)
        assert search_loss(logits, local, labels.int(), k=2, weight=0.5) == expected

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"k": 0}, ValueError, r"k=0 is outside \[1, 6\]"),
            ({"k": 7}, ValueError, r"k=7 .*number of classes"),
            ({"k": True}, TypeError, "k must be an integer"),
            ({"k": 2.0}, TypeError, r"2\.0"),
            ({"labels": torch.tensor([0, 1, 2, 6])}, ValueError, r"\[0, 6\), got 0 to 6"),
            ({"labels": torch.tensor([0, 1, -1, 2])}, ValueError, "got -1 to 2"),
            ({"labels": torch.zeros(4)}, TypeError, "float32"),
            ({"labels": torch.zeros(4, dtype=torch.bool)}, TypeError, "bool"),
            ({"labels": [0, 1, 2, 3]}, TypeError, "list"),
            ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"\[4\], got \[3\]"),
            ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, r"got \[4, 1\]"),
            ({"global_logits": torch.full((4, 6), torch.nan)}, ValueError, "global_logits holds NaN"),
            ({"local_logits": torch.full((4, 5, 6), torch.nan)}, ValueError, "local_logits holds NaN"),
            ({"global_logits": torch.zeros(6)}, ValueError, r"\[N, C\], got \[6\]"),
            ({"local_logits": torch.zeros(4, 6)}, ValueError, r"\[N, P, C\], got \[4, 6\]"),
            ({"local_logits": torch.zeros(3, 5, 6)}, ValueError, "N is 4"),
            ({"local_logits": torch.zeros(4, 5, 7)}, ValueError, "C is 6"),
            ({"local_logits": torch.zeros(4, 0, 6)}, ValueError, "empty"),
            ({"global_logits": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "int64"),
            ({"weight": torch.inf}, ValueError, "weight=inf"),
            ({"weight": torch.nan}, ValueError, "weight=nan"),
            ({"weight": "0.1"}, TypeError, r"'0\.1'"),
            ({"weight": True}, TypeError, "True"),
            ({"weight": None}, TypeError, "None"),
        ],
    )
    def test_bad_input(self, change, error, words):
        logits, local, labels = batch()
        given = {"global_logits": logits, "local_logits": local, "labels": labels, "k": 2, "weight": 0.1} | change
        with pytest.raises(error, match=words):
            search_loss(**given)


class TestAccept:
    @pytest.mark.parametrize("name", REPLAY)
    @pytest.mark.parametrize("baseline", ["every step", "first step"])
    def test_replay_of_the_published_searches(self, name, baseline):
        """The ratios follow from the losses, whether or not the weight as it is counts again at later steps."""
        search, incumbent, found = REPLAY[name], math.inf, []
        for losses in search["losses"]:
            candidates = list(zip(search["candidates"], losses, strict=True))
            assert candidates[0][0] == 0
            if found:
                assert losses[0] == incumbent  # measured again
            ratio, after = accept(incumbent, candidates[1:] if found and baseline == "first step" else candidates)
            assert after <= incumbent
            incumbent = after
            found.append(ratio)
        assert found == [ratio for _, _, ratio in search["ratios"]]
        assert incumbent == min(min(losses) for losses in search["losses"])

    @pytest.mark.parametrize(
        ("incumbent", "candidates", "expected"),
        [
            (math.inf, [(0.0, 1.0), (0.1, 2.0)], (0.0, 1.0)),
            (math.inf, [(0.0, 2.0), (0.1, 1.0), (0.2, 1.0)], (0.1, 1.0)),
            (math.inf, [(0.2, 1.0), (0.0, 2.0), (0.1, 1.0)], (0.1, 1.0)),
            (1.0, [(0.1, 1.0), (0.2, 1.0)], (0.0, 1.0)),
            (1.0, [(0.1, 1.5), (0.2, 1.2)], (0.0, 1.0)),
            (1.0, [(0.1, 0.9), (0.2, 0.95), (0.3, 0.8)], (0.3, 0.8)),
            (-0.5, [(0.3, -0.6), (0.1, -0.7), (0.2, -0.7)], (0.1, -0.7)),
            (1.0, [], (0.0, 1.0)),
            (math.inf, [(0.1, 5.0)], (0.1, 5.0)),
            (1.0, [(0.1, math.nan), (0.2, 0.5)], (0.2, 0.5)),
        ],
    )
    def test_the_first_of_the_best_if_strictly_better(self, incumbent, candidates, expected):
        before = list(candidates)
        assert accept(incumbent, candidates) == expected
        assert candidates == before

    def test_the_order_of_the_candidates_does_not_matter_and_the_value_never_rises(self):
        rng = np.random.default_rng(0)
        for _ in range(200):
            ratios = np.round(np.arange(9) * 0.05, 2)
            values = rng.integers(0, 6, 9) / 4  # many ties
            pairs = [(float(r), float(v)) for r, v in zip(ratios, values, strict=True)]
            incumbent = float(rng.integers(0, 6) / 4)
            chosen, after = accept(incumbent, pairs)
            assert after == min(incumbent, values.min())
            if after < incumbent:
                assert chosen == ratios[values.argmin()]
            else:
                assert chosen == 0
            assert accept(incumbent, [pairs[i] for i in rng.permutation(9)]) == (chosen, after)
