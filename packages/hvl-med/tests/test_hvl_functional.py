import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_hvl.functional import adapt, entropy, fuse, parent_index, split_pyramid

GOLDEN = {
    key: torch.from_numpy(value) for key, value in np.load(Path(__file__).parent / "golden" / "hvl_pyramid.npz").items()
}
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
cases = pytest.mark.parametrize("case", ["a", "b"])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestSplitPyramid:
    @dtypes
    @pytest.mark.parametrize("n", [1, 2])
    def test_golden_crops(self, n, dtype):
        image = GOLDEN["pix/in"].to(dtype)
        ours = split_pyramid(image[None], n)
        assert ours.dtype == dtype
        assert torch.equal(ours[0, 0], image)
        fine = GOLDEN[f"pix/crops{2 * n}"].to(dtype)
        torch.testing.assert_close(ours[0, 1 + n * n :], fine, **CLOSE[dtype])
        if n == 2:
            torch.testing.assert_close(ours[0, 1:5], GOLDEN["pix/crops2"].to(dtype), **CLOSE[dtype])

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_tiles_put_together_are_the_enlarged_image(self, n):
        images = random(2, 3, 5, 5)
        ours = split_pyramid(images, n)
        assert ours.shape == (2, 1 + 5 * n * n, 3, 5, 5)
        for start, count in ((1, n), (1 + n * n, 2 * n)):
            tiles = ours[:, start : start + count * count].unflatten(1, (count, count))
            rows = torch.cat(list(torch.cat(list(tiles.unbind(2)), -1).unbind(1)), -2)
            expected = F.interpolate(images, size=(5 * count, 5 * count), mode="bicubic", align_corners=False)
            torch.testing.assert_close(rows, expected)

    def test_constant_images_give_equal_crops(self):
        value = torch.tensor([0.5, -2.0, 7.0]).double().view(1, 3, 1, 1)
        ours = split_pyramid(value.expand(2, 3, 6, 6), 2)
        torch.testing.assert_close(ours, value.expand(2, 21, 3, 6, 6))

    def test_with_one_partition_the_middle_tile_is_the_image(self):
        images = random(2, 3, 6, 6)
        assert torch.equal(split_pyramid(images, 1)[:, 1], images)

    def test_order_of_the_tiles(self):
        # A ramp along each axis: the mean of a tile tells its row and column.
        ramp = torch.arange(8).double()
        image = torch.stack([ramp[:, None].expand(8, 8), ramp.expand(8, 8), torch.zeros(8, 8).double()])
        mean = split_pyramid(image[None], 2)[0].mean((-1, -2))
        for start, count in ((1, 2), (5, 4)):
            rows, columns = mean[start : start + count * count, :2].T
            assert rows.view(count, count).diff(dim=0).min() > 1
            assert columns.view(count, count).diff(dim=1).min() > 1
            torch.testing.assert_close(rows.view(count, count).diff(dim=1), torch.zeros(count, count - 1).double())

    def test_images_do_not_see_each_other_and_may_be_non_contiguous(self):
        images = random(3, 3, 5, 5).transpose(-1, -2)
        alone = torch.cat([split_pyramid(image[None], 2) for image in images])
        torch.testing.assert_close(split_pyramid(images, 2), alone)

    def test_half_precision_is_computed_in_float32(self):
        images = random(1, 3, 5, 5).half()
        assert torch.equal(split_pyramid(images, 2), split_pyramid(images.float(), 2))

    @pytest.mark.parametrize(
        ("images", "n", "error", "words"),
        [
            (random(3, 8, 8), 2, ValueError, r"got \[3, 8, 8\]"),
            (random(1, 1, 8, 8), 2, ValueError, r"3 channels, got shape \[1, 1, 8, 8\]"),
            (random(1, 3, 8, 6), 2, ValueError, r"images has shape \[1, 3, 8, 6\], but S is 8"),
            (torch.zeros(0, 3, 8, 8), 2, ValueError, "images is empty"),
            (torch.full((1, 3, 2, 2), torch.nan), 2, ValueError, "NaN"),
            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 2, TypeError, "uint8"),
            (np.zeros((1, 3, 8, 8)), 2, TypeError, "ndarray"),
            (random(1, 3, 8, 8), 0, ValueError, "n=0"),
            (random(1, 3, 8, 8), 2.0, TypeError, r"2\.0"),
        ],
    )
    def test_bad_input(self, images, n, error, words):
        with pytest.raises(error, match=words):
            split_pyramid(images, n)


class TestParentIndex:
    @pytest.mark.parametrize("n", [1, 2, 3, 4])
    def test_golden(self, n):
        assert torch.equal(parent_index(n), GOLDEN[f"parent_n{n}"])

    @pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
    def test_is_nearest_neighbour_enlargement_and_every_parent_has_four_children(self, n):
        grid = torch.arange(n * n).view(1, 1, n, n).float()
        expected = F.interpolate(grid, scale_factor=2, mode="nearest").flatten().long()
        assert torch.equal(parent_index(n), expected)
        assert parent_index(n).bincount().tolist() == [4] * (n * n)

    @pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
    def test_bad_input(self, n, error):
        with pytest.raises(error, match=str(n)):
            parent_index(n)


class TestAdapt:
    @dtypes
    @cases
    def test_golden(self, case, dtype):
        v = F.normalize(GOLDEN[f"{case}/v"], dim=-1).to(dtype)
        u = adapt(v, GOLDEN[f"{case}/W"].to(dtype))
        expected = torch.cat([GOLDEN[f"{case}/u0"][:, None], GOLDEN[f"{case}/u1"], GOLDEN[f"{case}/u2"]], 1)
        assert u.dtype == dtype
        torch.testing.assert_close(u, expected.to(dtype), **CLOSE[dtype])

    def test_positively_homogeneous(self):
        v, weight = random(4, 6), random(6, 6, seed=1)
        torch.testing.assert_close(adapt(3 * v, weight), 3 * adapt(v, weight))

    def test_a_zero_weight_is_the_identity_and_has_no_gradient(self):
        v, weight = random(4, 6), torch.zeros(6, 6).double().requires_grad_()
        u = adapt(v, weight)
        assert torch.equal(u, v)
        u.square().sum().backward()
        assert torch.equal(weight.grad, torch.zeros(6, 6).double())

    def test_any_number_of_leading_dimensions(self):
        v, weight = random(2, 3, 4, 6), random(6, 6, seed=1)
        torch.testing.assert_close(adapt(v, weight).flatten(0, 2), adapt(v.flatten(0, 2), weight))
        torch.testing.assert_close(adapt(v[0, 0, 0], weight), adapt(v, weight)[0, 0, 0])

    @pytest.mark.parametrize(
        ("v", "weight", "error", "words"),
        [
            (random(4, 5), random(6, 6), ValueError, r"weight has shape \[6, 6\], but d is 5"),
            (random(4, 6), random(6, 5), ValueError, "but d is 6"),
            (torch.tensor(1.0), random(1, 1), ValueError, r"v must have shape \[d\], got \[\]"),
            (torch.full((2, 6), torch.nan), random(6, 6), ValueError, "v holds NaN"),
            (torch.zeros(0, 6), random(6, 6), ValueError, "v is empty"),
            (np.ones((4, 6)), random(6, 6), TypeError, "ndarray"),
            (torch.ones(4, 6, dtype=torch.int32), random(6, 6), TypeError, "int32"),
        ],
    )
    def test_bad_input(self, v, weight, error, words):
        with pytest.raises(error, match=words):
            adapt(v, weight)


class TestFuse:
    @dtypes
    @cases
    def test_golden(self, case, dtype):
        h1, h2 = fuse(*(GOLDEN[f"{case}/u{s}"].to(dtype) for s in range(3)))
        assert h1.dtype == h2.dtype == dtype
        torch.testing.assert_close(h1, GOLDEN[f"{case}/h1"].to(dtype), **CLOSE[dtype])
        torch.testing.assert_close(h2, GOLDEN[f"{case}/h2"].to(dtype), **CLOSE[dtype])

    def test_golden_by_hand(self):
        u2 = torch.tensor([[[1.0, 1.0], [0.0, -1.0], [0.0, 2.0], [1.0, 0.0]]]).double()
        h1, h2 = fuse(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[[0.0, 1.0]]]).double(), u2)
        torch.testing.assert_close(h1, GOLDEN["hand/h1"])
        torch.testing.assert_close(h2, GOLDEN["hand/h2"])

    def test_equal_embeddings_add_up(self):
        u0 = random(2, 6)
        h1, h2 = fuse(u0, u0[:, None].expand(-1, 4, -1), u0[:, None].expand(-1, 16, -1))
        torch.testing.assert_close(h1, 2 * u0[:, None].expand(-1, 4, -1))
        torch.testing.assert_close(h2, 3 * u0[:, None].expand(-1, 16, -1))

    def test_orthogonal_tiles_stay_and_opposite_ones_double(self):
        u0 = torch.tensor([[2.0, 0.0]]).double()
        u1 = torch.tensor([[[0.0, 3.0], [-2.0, 0.0], [0.0, -1.0], [2.0, 0.0]]]).double()
        h1, _ = fuse(u0, u1, random(1, 16, 2))
        expected = torch.tensor([[[0.0, 3.0], [-4.0, 0.0], [0.0, -1.0], [4.0, 0.0]]]).double()
        torch.testing.assert_close(h1, expected)

    def test_a_fine_tile_sees_its_own_fused_parent_only(self):
        u0, u1, u2 = random(1, 6), random(1, 4, 6, seed=1), random(1, 16, 6, seed=2)
        changed = u1.clone()
        changed[:, 3] = random(6, seed=3)
        before, after = fuse(u0, u1, u2), fuse(u0, changed, u2)
        children = parent_index(2) == 3
        moved = (before[1] != after[1]).any(-1)[0]
        assert torch.equal(moved, children)
        h1 = before[0][:, parent_index(2)]
        cosine = F.cosine_similarity(u2, h1, dim=-1)[..., None]
        torch.testing.assert_close(before[1], u2 + cosine * h1)

    def test_zero_vectors_are_left_alone(self):
        u1, u2 = random(1, 1, 6), random(1, 4, 6, seed=1)
        u1[:] = 0
        h1, h2 = fuse(torch.zeros(1, 6).double(), u1, u2)
        assert torch.equal(h1, u1)
        assert torch.equal(h2, u2)

    def test_gradient(self):
        arguments = [random(1, 3), random(1, 1, 3, seed=1), random(1, 4, 3, seed=2)]
        assert torch.autograd.gradcheck(fuse, tuple(value.requires_grad_() for value in arguments))

    @pytest.mark.parametrize(
        ("shapes", "words"),
        [
            (((2, 6), (2, 3, 6), (2, 12, 6)), "got 3 and 12"),
            (((2, 6), (2, 4, 6), (2, 12, 6)), "got 4 and 12"),
            (((2, 6), (2, 4, 5), (2, 16, 6)), r"u1 has shape \[2, 4, 5\], but d is 6"),
            (((2, 6), (3, 4, 6), (2, 16, 6)), "but B is 2"),
            (((2, 1, 6), (2, 4, 6), (2, 16, 6)), r"u0 must have shape \[B, d\]"),
            (((0, 6), (0, 4, 6), (0, 16, 6)), "u0 is empty"),
        ],
    )
    def test_bad_shapes(self, shapes, words):
        with pytest.raises(ValueError, match=words):
            fuse(*(torch.ones(shape) for shape in shapes))

    def test_bad_values(self):
        with pytest.raises(ValueError, match="u2 holds NaN"):
            fuse(torch.ones(1, 2), torch.ones(1, 1, 2), torch.full((1, 4, 2), torch.nan))
        with pytest.raises(TypeError, match="u0"):
            fuse(1.0, torch.ones(1, 1, 2), torch.ones(1, 4, 2))


class TestEntropy:
    @dtypes
    @cases
    def test_golden(self, case, dtype):
        for scale in (1, 2):
            ours = entropy(GOLDEN[f"{case}/patch_p{scale}"].to(dtype))
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, GOLDEN[f"{case}/H{scale}"].to(dtype), **CLOSE[dtype])

    @pytest.mark.parametrize("classes", [1, 2, 7, 1000])
    def test_one_hot_is_zero_and_uniform_is_log_c(self, classes):
        assert entropy(torch.eye(classes).double()).abs().max() == 0
        uniform = torch.full((3, classes), 1 / classes).double()
        torch.testing.assert_close(entropy(uniform), torch.full((3,), math.log(classes)).double())

    def test_between_zero_and_log_c_whatever_the_order(self):
        p = random(50, 7).mul(5).softmax(-1)
        ours = entropy(p)
        assert ours.min() >= 0
        assert ours.max() <= math.log(7)
        torch.testing.assert_close(entropy(p.flip(-1)), ours)
        torch.testing.assert_close(ours, torch.distributions.Categorical(p).entropy())

    def test_gradient_is_finite_where_a_probability_underflows(self):
        logits = torch.tensor([[0.0, -200.0, -1.0]], requires_grad=True)
        p = logits.softmax(-1)
        assert p[0, 1] == 0
        entropy(p).sum().backward()
        assert logits.grad.isfinite().all()
        assert logits.grad[0, 1] == 0

    def test_gradient(self):
        p = random(3, 4).softmax(-1).mul(0.9).requires_grad_()
        assert torch.autograd.gradcheck(entropy, (p,))

    @pytest.mark.parametrize(
        ("p", "error", "words"),
        [
            (torch.tensor([[-0.1, 1.1]]), ValueError, r"got -0\.1 to 1\.1"),
            (torch.tensor([[3.0, 4.0]]), ValueError, "not logits"),
            (torch.full((2, 3), torch.nan), ValueError, "NaN"),
            (torch.zeros(2, 0), ValueError, "empty"),
            (torch.tensor(0.5), ValueError, r"p must have shape \[C\]"),
            (torch.ones(2, 1, dtype=torch.int64), TypeError, "int64"),
            ([0.5, 0.5], TypeError, "list"),
        ],
    )
    def test_bad_input(self, p, error, words):
        with pytest.raises(error, match=words):
            entropy(p)
