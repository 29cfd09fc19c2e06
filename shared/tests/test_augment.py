"""Augmented views: their order, their draws, and what a cache of them depends on."""

import random

import numpy as np
import pytest
import torch
from ood_core import create_backbone, extract
from ood_core.backbones.transform import ImageTransform
from ood_core.data import ImageFolder, PILImages
from ood_core.data.augment import LiveViews, Views, _random_box
from ood_core.errors import ImageError, UsageError
from PIL import Image

SIZE = (24, 32)


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def gradient(width, height):
    """Red is the column, green the row, of 256: pixels say where they come from, and flips show."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))


@pytest.fixture(scope="module")
def source():
    images = [noise(40 + 3 * i, 50 - 2 * i, seed=i) for i in range(5)]
    return PILImages(images, ["b", "a", "b", "c", "a"], ids=["e1", "e0", "e4", "e3", "e2"])


def pixels(views, index):
    return np.asarray(views.open(index))


def test_views_are_the_same_whenever_and_in_whatever_order_they_are_read(source):
    views, again = (Views(source, 3, size=SIZE, seed=7) for _ in range(2))
    first = [pixels(views, i) for i in range(15)]
    order = list(range(15))
    random.Random(0).shuffle(order)
    assert all(np.array_equal(pixels(again, i), first[i]) for i in order)
    assert len({image.tobytes() for image in first}) == 15
    other = Views(source, 3, size=SIZE, seed=8)
    assert not any(np.array_equal(pixels(other, i), first[i]) for i in range(15))


def test_view_v_of_image_i_is_item_v_n_plus_i(source):
    views = Views(source, 3, size=SIZE, seed=7)
    assert len(views) == 15
    assert views.ids == [f"e{i}@{v}" for v in range(3) for i in range(5)]
    assert views.label_names == ["a", "b", "c"]
    assert views.labels.tolist() == source.labels.tolist() * 3
    for index in (0, 4, 5, 14):
        alone = Views(source.subset([index % 5]), 1, size=SIZE, seed=7, first=index // 5)
        assert np.array_equal(pixels(alone, 0), pixels(views, index))


def test_first_goes_on_where_earlier_views_ended(source):
    views, later = Views(source, 4, size=SIZE, seed=7), Views(source, 2, size=SIZE, seed=7, first=2)
    assert later.ids == views.ids[10:]
    assert all(np.array_equal(pixels(later, i), pixels(views, 10 + i)) for i in range(10))


def test_draws_do_not_depend_on_the_position_in_the_source(source):
    views, reversed_views = (Views(s, 2, size=SIZE) for s in (source, source.subset(range(5)[::-1])))
    for id in views.ids:
        one, other = (pixels(v, v.ids.index(id)) for v in (views, reversed_views))
        assert np.array_equal(one, other)


def test_a_subset_of_views_is_those_views(source):
    views = Views(source, 2, size=SIZE)
    part = views.subset([9, 0, 3])
    assert part.ids == [views.ids[i] for i in (9, 0, 3)]
    assert part.labels.tolist() == views.labels[[9, 0, 3]].tolist()
    assert all(np.array_equal(pixels(part, i), pixels(views, j)) for i, j in enumerate((9, 0, 3)))


def test_unlabelled_images_give_unlabelled_views():
    assert Views(PILImages([noise(8, 8)]), 2, size=SIZE).labels is None


@pytest.mark.parametrize("size", [(24, 32), [32, 24], (7, 7), (224, 1)])
@pytest.mark.parametrize("shape", [(40, 30), (300, 2), (2, 300), (1, 1), (500, 333)])
def test_views_have_the_size_asked_for(size, shape):
    view = Views(PILImages([noise(*shape)]), 1, size=size).open(0)
    assert view.size == (size[1], size[0])
    assert view.mode == "RGB"


@pytest.mark.parametrize("scale", [(0.85, 1.0), (0.08, 0.2), (0.5, 0.5)])
@pytest.mark.parametrize("shape", [(400, 400), (500, 375), (333, 400)])
def test_crops_keep_the_bounds_of_area_and_aspect(scale, shape):
    draw = random.Random(0)
    boxes = np.array([_random_box(*shape, scale, draw) for _ in range(400)])
    left, top, right, bottom = boxes.T
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= shape).all()
    w, h = right - left, bottom - top
    share, aspect = w * h / (shape[0] * shape[1]), w / h
    assert scale[0] - 0.01 < share.min() <= share.max() < scale[1] + 0.01  # sides are whole pixels
    assert 3 / 4 - 0.02 < aspect.min() <= aspect.max() < 4 / 3 + 0.02
    if scale[0] < scale[1]:
        assert share.min() < scale[0] + 0.1 * (scale[1] - scale[0])
        assert len(np.unique(boxes, axis=0)) > 200


def test_crops_of_a_small_share_reach_every_corner():
    draw = random.Random(1)
    boxes = np.array([_random_box(100, 100, (0.1, 0.3), draw) for _ in range(500)])
    assert boxes.min(0)[:2].max() < 5
    assert boxes.max(0)[2:].min() > 95


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((1600, 900), (200, 0, 1400, 900)),  # no crop of 85 % is so narrow: 4:3 from the middle
        ((900, 1600), (0, 200, 900, 1400)),
        ((300, 2), (148, 0, 151, 2)),
        ((2, 300), (0, 148, 2, 151)),
        ((1000, 1), (499, 0, 500, 1)),
        ((1, 1000), (0, 499, 1, 500)),
    ],
)
def test_of_long_images_the_middle_is_taken(shape, box):
    assert _random_box(*shape, (0.85, 1.0), random.Random(0)) == box


def test_about_half_of_the_views_are_flipped():
    source = PILImages([gradient(60, 60)] * 20)
    views = Views(source, 20, size=(16, 16), seed=5)
    flipped = []
    for index in range(400):
        red, green = (pixels(views, index)[..., channel].astype(int) for channel in (0, 1))
        assert (green[-1] > green[0]).all()  # never upside down
        assert len({*np.sign(red[:, -1] - red[:, 0]).tolist()}) == 1
        flipped.append(red[0, -1] < red[0, 0])
    assert 160 < sum(flipped) < 240  # four standard deviations
    per_image = np.reshape(flipped, (20, 20)).mean(0)
    assert 0 < per_image.min() <= per_image.max() < 1


def test_a_view_is_the_resized_crop():
    image = gradient(90, 60)
    view = np.asarray(Views(PILImages([image]), 1, size=SIZE, seed=2).open(0)).astype(float)
    box = _random_box(90, 60, (0.85, 1.0), random.Random("2 0 0"))
    columns = (np.arange(SIZE[1]) + 0.5) / SIZE[1] * (box[2] - box[0]) + box[0] - 0.5
    rows = (np.arange(SIZE[0]) + 0.5) / SIZE[0] * (box[3] - box[1]) + box[1] - 0.5
    red = view[0, :, 0] if view[0, -1, 0] > view[0, 0, 0] else view[0, ::-1, 0]
    np.testing.assert_allclose(red[2:-2], columns[2:-2] * 255 / 89, atol=2)
    np.testing.assert_allclose(view[2:-2, 0, 1], rows[2:-2] * 255 / 59, atol=2)


def test_the_fingerprint_changes_with_everything_that_changes_a_view(source):
    usual = {"count": 2, "size": SIZE, "scale": (0.85, 1.0), "seed": 1, "first": 0}
    changes = [{"count": 3}, {"size": (32, 24)}, {"scale": (0.5, 1.0)}, {"seed": 2}, {"first": 1}]
    made = [Views(source, **usual | change).fingerprint for change in [{}, *changes]]
    made += [Views(source.subset([1, 0, 2, 3, 4]), **usual).fingerprint, source.fingerprint]
    other_pixels = PILImages([noise(40, 50, seed=9)] * 5, ["a", "b", "a", "c", "b"], ids=source.ids)
    assert other_pixels.labels.tolist() == source.labels.tolist()
    made.append(Views(other_pixels, **usual).fingerprint)
    assert len(set(made)) == len(made)
    assert Views(source, **usual).fingerprint == made[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "views=0"),
        ({"scale": (0.0, 1.0)}, r"\(0.0, 1.0\)"),
        ({"scale": (0.9, 0.8)}, "two rising numbers"),
        ({"scale": (0.5, 1.1)}, "at most 1"),
        ({"scale": (float("nan"), 1.0)}, "nan"),
    ],
)
def test_bad_options(source, options, words):
    with pytest.raises(UsageError, match=words):
        Views(source, **{"count": 1, "size": SIZE} | options)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    noise(20, 20).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    views = Views(ImageFolder(tmp_path), 2, size=SIZE)
    assert views.open(2).size == (32, 24)
    with pytest.raises(ImageError, match=r"b\.png"):
        views.open(3)


def test_extracted_views_are_cached(small_backbone, source, tmp_path, monkeypatch):
    views = Views(source, 2, size=small_backbone.transform.crop)
    made = extract(small_backbone, views, cache=tmp_path)
    assert made.ids == views.ids
    assert made.labels.tolist() == views.labels.tolist()
    stacked = torch.stack([small_backbone.transform(views.open(i)) for i in range(10)])
    torch.testing.assert_close(made.local, small_backbone.encode_dense(stacked)[1], rtol=1e-5, atol=1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(small_backbone, "encode", None)  # nothing is encoded again
        again = extract(small_backbone, Views(source, 2, size=small_backbone.transform.crop), cache=tmp_path)
        assert torch.equal(again.local, made.local)
        with pytest.raises(TypeError):
            extract(small_backbone, Views(source, 2, size=small_backbone.transform.crop, seed=1), cache=tmp_path)


def test_views_read_by_worker_processes_are_the_same(small_backbone, source):
    views = Views(source, 2, size=small_backbone.transform.crop)
    one, two = (extract(small_backbone, views, {"image"}, workers=n, batch_size=3) for n in (0, 1))
    assert torch.equal(one.image, two.image)


def test_the_transform_leaves_a_view_as_it_is():
    transform = ImageTransform(crop=(24, 24), resize=24, mean=(0, 0, 0), std=(1, 1, 1))
    view = Views(PILImages([noise(50, 40)]), 1, size=transform.crop).open(0)
    np.testing.assert_allclose(transform(view).permute(1, 2, 0).numpy() * 255, np.asarray(view), atol=1e-3)
    tiny = create_backbone("tiny").transform
    assert tiny.resize == tiny.crop[0] == tiny.crop[1]


def test_live_views_are_the_views_of_their_epoch(source):
    transform = ImageTransform(crop=SIZE, resize=None)
    live = LiveViews(source, transform, scale=(0.5, 1.0), seed=7)
    views = Views(source, 3, size=SIZE, scale=(0.5, 1.0), seed=7)
    rows = torch.tensor([4, 0, 2])
    for epoch in (2, 0):
        expected = torch.stack([transform(views.open(epoch * len(source) + row)) for row in rows.tolist()])
        assert torch.equal(live(rows, epoch), expected)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_live_views_are_the_same_with_workers_that_run_ahead(source, workers):
    transform = ImageTransform(crop=SIZE, resize=None)
    plain, ahead = (LiveViews(source, transform, seed=3, workers=n) for n in (0, workers))
    batches = [torch.tensor([4, 0]), torch.tensor([2]), torch.tensor([1, 3, 0])]
    for epoch in (0, 1):
        ahead.prepare(epoch, batches)
        for rows in batches:
            assert torch.equal(ahead(rows, epoch), plain(rows, epoch))
    ahead.prepare(2, batches)
    for rows, epoch in ((batches[1], 2), (batches[0], 2), (batches[1], 5)):  # other than announced
        assert torch.equal(ahead(rows, epoch), plain(rows, epoch))


def test_workers_say_which_image_cannot_be_read(tmp_path):
    noise(9, 9).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    live = LiveViews(ImageFolder(tmp_path), ImageTransform(crop=SIZE, resize=None), workers=1)
    batches = [torch.tensor([0]), torch.tensor([1])]
    live.prepare(0, batches)
    assert len(live(batches[0], 0)) == 1
    with pytest.raises(ImageError, match=r"b\.png"):
        live(batches[1], 0)
