"""Few-shot sets: the published draw, independent of listing order, saved and found again."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from ood_core.data import FewShot, PILImages
from ood_core.errors import DataError, MissingDataError, UsageError
from PIL import Image

GOLDEN = Path(__file__).parent / "golden" / "fewshot.npz"


def images_of(counts, order=None):
    """A source with `counts[c]` images of class "class c"; their ids sort by class, then number."""
    pairs = [(label, number) for label, count in enumerate(counts) for number in range(count)]
    pairs = pairs if order is None else [pairs[i] for i in order]
    ids = [f"{label}/{number:03d}" for label, number in pairs]
    images = [Image.new("RGB", (1, 1), (label, number, 0)) for label, number in pairs]
    return PILImages(images, [f"class {label}" for label, _ in pairs], ids=ids)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_draw_is_the_published_one(seed):
    few = FewShot(images_of([20] * 5), shots=4, seed=seed)
    golden = np.load(GOLDEN)[f"seed{seed}"]
    assert few.ids == [f"{label}/{number:03d}" for label, row in enumerate(golden) for number in row]
    assert few.labels.tolist() == np.repeat(np.arange(5), 4).tolist()
    assert [few.open(i).getpixel((0, 0))[:2] for i in (0, 19)] == [(0, golden[0, 0]), (4, golden[4, 3])]


def test_the_draw_does_not_depend_on_the_order_of_the_source():
    shuffled = np.random.default_rng(0).permutation(60)
    source = images_of([20] * 3)
    expected = FewShot(source, 4, seed=5).ids
    assert FewShot(images_of([20] * 3, shuffled), 4, seed=5).ids == expected
    assert FewShot(source.subset(shuffled), 4, seed=5).ids == expected
    assert FewShot(source, 4, seed=6).ids != expected


def test_only_classes_with_enough_images_are_drawn_from():
    few = FewShot(images_of([3, 4, 20]), shots=4, seed=1)
    generator = random.Random(1)
    drawn = [[0, 1, 2], generator.sample(range(4), 4), generator.sample(range(20), 4)]
    assert few.ids == [f"{label}/{number:03d}" for label, row in enumerate(drawn) for number in row]


def test_small_classes_are_kept_whole_and_recorded():
    few = FewShot(images_of([9, 2, 4]), shots=4, seed=1)
    assert few.short_classes == {"class 1": 2}
    assert np.bincount(few.labels).tolist() == [4, 2, 4]


def test_unlabelled_images_are_left_out():
    source = PILImages([Image.new("L", (1, 1))] * 4, ["a", "", "a", ""])
    assert sorted(FewShot(source, 2, seed=1).ids) == ["0", "2"]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UsageError, match="shots=0"):
        FewShot(images_of([2]), 0, seed=1)
    with pytest.raises(DataError, match="labelled"):
        FewShot(PILImages([Image.new("L", (1, 1))]), 1, seed=1)
    with pytest.raises(DataError, match="'class 1' has no image"):
        FewShot(images_of([2, 2]).subset([0, 1]), 1, seed=1)


def test_a_saved_set_is_the_same_when_loaded(tmp_path):
    source = images_of([20, 3, 20])
    few = FewShot(source, 4, seed=2)
    few.save(tmp_path / "shots.json")
    saved = json.loads((tmp_path / "shots.json").read_text())
    assert (saved["seed"], saved["shots"], saved["classes"][0]["ids"]) == (2, 4, few.ids[:4])
    again = FewShot.load(tmp_path / "shots.json", images_of([20, 3, 20], range(42, -1, -1)))
    assert (again.ids, again.short_classes, again.seed, again.shots) == (few.ids, {"class 1": 3}, 2, 4)
    assert again.fingerprint == few.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["shots.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    few = FewShot(images_of([4]), 1, seed=1)
    few.save(tmp_path / "shots.json")
    before = (tmp_path / "shots.json").read_bytes()

    def fail(self, *args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        FewShot(images_of([4]), 2, seed=1).save(tmp_path / "shots.json")
    assert (tmp_path / "shots.json").read_bytes() == before


def test_loading_names_what_does_not_fit(tmp_path):
    few = FewShot(images_of([5, 5]), 3, seed=1)
    few.save(tmp_path / "shots.json")
    with pytest.raises(DataError, match=rf"3 images .* first {few.ids[3]!r}"):
        FewShot.load(tmp_path / "shots.json", images_of([5]))
    other = PILImages([Image.new("L", (1, 1))] * 10, ["cat"] * 10, ids=images_of([5, 5]).ids)
    with pytest.raises(DataError, match=r"'class 0'.*'cat'"):
        FewShot.load(tmp_path / "shots.json", other)
    with pytest.raises(MissingDataError, match=r"none\.json"):
        FewShot.load(tmp_path / "none.json", other)
    (tmp_path / "bad.json").write_text('{"seed": 1}')
    with pytest.raises(DataError, match=r"bad\.json"):
        FewShot.load(tmp_path / "bad.json", other)
