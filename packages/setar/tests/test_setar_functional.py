import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ood_setar.functional import dropped_rank, split_low_rank, truncate

FOLDER = Path(__file__).parent / "golden"
GOLDEN = {key: torch.from_numpy(value) for key, value in np.load(FOLDER / "setar_linear.npz").items()}
RANKS = json.loads((FOLDER / "setar_ranks.json").read_text())
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
