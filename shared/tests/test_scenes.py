"""Generated images: deterministic, labelled, with masks that are where the object is."""

import numpy as np
import pytest
from ood_core.data import ImageFolder, scenes


def test_an_image_depends_on_seed_class_and_index_only():
    few = scenes.render(["brick circle", "dotted ring"], 3, size=48, seed=4)
    more = scenes.render(["dotted ring", "glossy star", "brick circle"], 5, size=48, seed=4)
    np.testing.assert_array_equal(few.images[:3], more.images[10:13])
    np.testing.assert_array_equal(few.masks[3:], more.masks[:3])
    other = scenes.render(["brick circle"], 3, size=48, seed=5)
    assert (few.images[:3] != other.images).mean() > 0.9


def test_every_class_renders_with_an_object_of_sensible_size():
    names = [f"{material} {shape}" for material in scenes.MATERIALS for shape in scenes.SHAPES]
    made = scenes.render(names, 2, size=40)
    share = made.masks.mean((1, 2))
    assert (share > 0.02).all()
    assert (share < 0.6).all()
    border = np.concatenate([made.masks[:, 0], made.masks[:, -1], made.masks[:, :, 0], made.masks[:, :, -1]], 1)
    assert border.mean() < 0.01  # objects lie inside the frame
    assert made.labels.tolist() == np.repeat(np.arange(64), 2).tolist()


def test_the_mask_is_where_the_object_is():
    """The same scene with another material differs inside the mask only."""
    rng = [np.random.default_rng(0) for _ in range(2)]
    flat, mask = scenes._scene("glossy square", 64, rng[0])
    background = scenes._background(64, rng[1])
    changed = abs(flat - background).max(-1) > 1e-6
    assert not changed[~mask].any()
    assert changed[mask].mean() > 0.95


def test_near_classes_are_unseen_combinations_of_seen_parts():
    known, near = set(scenes.ID_CLASSES), set(scenes.NEAR_OOD_CLASSES)
    assert not known & near
    for part in (0, 1):
        assert {name.split()[part] for name in near} <= {name.split()[part] for name in known}


@pytest.mark.parametrize("size", [16, 64, 101])
def test_far_sets_and_lesions(size):
    assert scenes.textures(3, size=size).images.shape == (3, size, size, 3)
    assert scenes.noise(3, size=size).images.std() > 5
    lesions = scenes.render_lesions(list(scenes.LESIONS), 2, size=size, seed=1)
    assert lesions.images.shape == (12, size, size, 3)
    assert (lesions.masks.mean((1, 2)) > 0.03).all()
    inside = np.array([image[mask].mean() for image, mask in zip(lesions.images, lesions.masks, strict=True)])
    outside = np.array([image[~mask].mean() for image, mask in zip(lesions.images, lesions.masks, strict=True)])
    assert abs(inside - outside).mean() > 10


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    made = scenes.digits(50, size=8, seed=3)
    scans, labels = load_digits(return_X_y=True)
    chosen = np.sort(np.random.default_rng(3).choice(len(scans), 50, replace=False))
    np.testing.assert_array_equal(made.labels, labels[chosen])
    np.testing.assert_array_equal(made.images[..., 0].reshape(50, 64), (scans[chosen] * 255 / 16).astype(np.uint8))
    assert len(scenes.digits(1797, size=8)) == 1797
    with pytest.raises(ValueError, match="count=1798"):
        scenes.digits(1798)


def test_written_folder_is_an_ordinary_image_folder(tmp_path):
    made = scenes.render(["brick circle", "dotted ring"], 3, size=24)
    source = ImageFolder(scenes.write_folder(made, tmp_path))
    assert source.label_names == ["brick circle", "dotted ring"]
    np.testing.assert_array_equal(np.asarray(source.open(4)), made.images[4])


def test_bad_requests():
    with pytest.raises(ValueError, match="'wooden star'"):
        scenes.render(["wooden star"], 1)
    with pytest.raises(ValueError, match="per_class=0"):
        scenes.render(["brick circle"], 0)
    with pytest.raises(ValueError, match="Unknown lesion 'wart'"):
        scenes.render_lesions(["wart"], 1)
