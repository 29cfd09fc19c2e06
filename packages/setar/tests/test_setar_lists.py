"""The released code's lists: the same images as in the folders, labels in a fixed order, and what is wrong is named."""

import json
import logging

import numpy as np
import pytest
from ood_core.data import ImageFolder, open_source
from ood_core.errors import DataError, MissingDataError
from ood_setar.lists import read_list, with_labels
from PIL import Image


def write_images(root, *names):
    """Image number i is the colour (i, 0, 0)."""
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (value, 0, 0)).save(root / name)


@pytest.fixture
def write(tmp_path):
    """Write a JSON file and give its path."""

    def write(content):
        path = tmp_path / "file.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


# ---- lists


VOC = {"sofa": ["2008_2.png", "2008_1.png"], "bird": ["2009_7.png"], "empty": []}


def test_a_whole_list_is_the_folder(tmp_path, write):
    write_images(tmp_path / "voc", "sofa/2008_2.png", "sofa/2008_1.png", "bird/2009_7.png")
    source, folder = read_list(write(VOC), tmp_path / "voc"), ImageFolder(tmp_path / "voc")
    assert source.ids == folder.ids == ["bird/2009_7.png", "sofa/2008_1.png", "sofa/2008_2.png"]
    assert source.label_names == ["bird", "sofa"]
    assert source.fingerprint == folder.fingerprint
    assert [image.getpixel((0, 0))[0] for _, image in source] == [2, 1, 0]
    assert open_source(source) is source


def test_a_list_is_a_part_of_a_folder(tmp_path, write):
    names = ["sofa/2008_1.png", "sofa/2008_2.png", "sofa/2008_3.png", "bird/2009_7.png", "cow/1.png"]
    write_images(tmp_path, *names)
    source, folder = read_list(write(VOC), str(tmp_path)), ImageFolder(tmp_path)
    part = folder.subset([folder.ids.index(id) for id in source.ids]).with_labels_from(source.label_names)
    assert source.fingerprint == part.fingerprint


@pytest.mark.parametrize("folder", ["", ".", "./"])
def test_images_beside_the_folders(tmp_path, write, folder):
    write_images(tmp_path, "a.png", "images/banded/b.png")
    source = read_list(write({folder: ["a.png"], "images/banded": ["b.png"]}), tmp_path)
    assert source.ids == ["a.png", "images/banded/b.png"]
    assert (source.label_names, source.labels.tolist()) == (["images"], [-1, 0])


def test_images_that_are_not_on_disk_are_counted_and_the_first_is_named(tmp_path, write):
    write_images(tmp_path / "voc", "sofa/2008_1.png")
    with pytest.raises(
        MissingDataError, match=r"^2 of the 3 images in '.*file\.json' are not below '.*voc', first 'so"
    ):
        read_list(write(VOC), tmp_path / "voc")
    write_images(tmp_path, "outside.png")
    with pytest.raises(MissingDataError, match=r"first '\.\./outside\.png'"):
        read_list(write({"..": ["outside.png"]}), tmp_path / "voc")
    with pytest.raises(MissingDataError, match=rf"first '{tmp_path}/outside\.png'"):
        read_list(write({str(tmp_path): ["outside.png"]}), tmp_path / "voc")
    with pytest.raises(MissingDataError, match=r"There is no file '.*none\.json'"):
        read_list(tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        (b"\xff{}".decode("latin-1"), "cannot be read as JSON"),
        ([["sofa"]], r"holds \[\['sofa'\]\], not an object of the form {folder: \[file, \.\.\.\]}"),
        ({}, "lists no image"),
        ({"sofa": []}, "lists no image"),
        ({"sofa": "1.png"}, r"has '1\.png' under 'sofa', not a list of file names"),
        ({"sofa": ["1.png", 2]}, r"has \['1\.png', 2\] under 'sofa'"),
        ({"sofa": ["1.png", "1.png"]}, r"The id 'sofa/1\.png' occurs more than once"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path, write, content, message):
    write_images(tmp_path, "sofa/1.png")
    with pytest.raises(DataError, match=message):
        read_list(write(content), tmp_path)


# ---- labels


@pytest.fixture
def sun(tmp_path):
    write_images(tmp_path / "OOD_Sun/test/images", *(f"sun_{letter}.png" for letter in "abcd"))
    return tmp_path / "OOD_Sun/test"


def test_labels_are_numbered_in_sorted_order_and_images_without_one_are_counted(sun, write, caplog):
    labels = write({"images/sun_d.png": "bayou", "images/sun_a.png": "wave", "images/sun_c.png": "bayou"})
    with caplog.at_level(logging.WARNING):
        source = with_labels(ImageFolder(sun), labels)
    assert source.ids == ["images/sun_a.png", "images/sun_c.png", "images/sun_d.png"]
    assert (source.label_names, source.label_values) == (["bayou", "wave"], ["bayou", "wave"])
    assert (source.labels.tolist(), source.labels.dtype) == ([1, 0, 0], np.int64)
    assert [image.getpixel((0, 0))[0] for _, image in source] == [0, 2, 3]
    (record,) = caplog.records
    assert record.getMessage().startswith("1 of 4 images have no label in ")


def test_complete_labels_are_taken_without_a_word(sun, write, caplog):
    labels = write({f"images/sun_{letter}.png": "wave" for letter in "abcd"})
    assert len(with_labels(ImageFolder(sun), labels)) == 4
    assert not caplog.records


def test_the_source_keeps_its_own_labels(sun, write):
    source = ImageFolder(sun)
    with_labels(source, write({"images/sun_a.png": "wave"}))
    assert (source.label_names, source.labels.tolist(), len(source)) == (["images"], [0, 0, 0, 0], 4)


def test_names_that_differ_in_capitals_are_one_and_unused_ones_are_kept(sun, write):
    letters = dict(zip("abcd", ["cardigan", "Cardigan", "crane", "CRANE"], strict=True))
    labels = {f"images/sun_{letter}.png": label for letter, label in letters.items()}
    source = with_labels(ImageFolder(sun), write(labels | {"images/elsewhere.png": "Zebra", "images/e.png": "apron"}))
    assert source.label_names == ["CRANE", "Cardigan", "Zebra", "apron"]
    assert source.labels.tolist() == [1, 1, 0, 0]


def test_the_folder_above_all_paths_may_be_missing_from_the_ids(sun, write):
    labels = write({"images/sun_a.png": "wave", "images/sun_b.png": "bayou"})
    below = with_labels(ImageFolder(sun / "images"), labels)
    assert (below.ids, below.labels.tolist()) == (["sun_a.png", "sun_b.png"], [1, 0])
    assert below.label_names == with_labels(ImageFolder(sun), labels).label_names


@pytest.mark.parametrize(
    "labels",
    [
        {"other/sun_a.png": "wave", "images/sun_b.png": "bayou"},
        {"sun_a.png.jpg": "wave"},
        {"deeper/images/sun_a.png": "wave"},
    ],
)
def test_labels_of_other_images_are_refused(sun, write, labels):
    with pytest.raises(DataError, match=r"has a label for none of the 4 images, as 'sun_a\.png': its paths are as '"):
        with_labels(ImageFolder(sun / "images"), write(labels))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read as JSON"),
        (["a"], r"holds \['a'\], not an object of the form {path of the image: label}"),
        ({}, "holds no label"),
        ({"a.png": 3}, r"has 3 under 'a\.png', not the name of a label"),
        ({"b.png": "wave", "a.png": ""}, r"has '' under 'a\.png'"),
    ],
)
def test_what_are_no_labels_is_refused(sun, write, content, message):
    with pytest.raises(DataError, match=message):
        with_labels(ImageFolder(sun), write(content))
    with pytest.raises(MissingDataError, match=r"none\.json"):
        with_labels(ImageFolder(sun), sun / "none.json")
