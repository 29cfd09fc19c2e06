"""Protocols: every layout in use is found, labels are ranks of wnids, and what is missing is named."""

import io
import json
import os
import pickle
import sys
import types
from importlib.metadata import EntryPoint
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ood_core import protocols
from ood_core.data.released_splits import ReleasedItem, read_released_split
from ood_core.errors import DataError, MissingDataError, UsageError
from ood_core.labels import plain_name
from ood_core.protocols import (
    ContributedProtocol,
    describe,
    find_protocol,
    find_tasks,
    inspect_protocol,
    list_protocols,
    summarise_protocol,
)
from ood_core.protocols.catalog import catalog
from ood_core.protocols.names import clip_names
from ood_core.registry import PROTOCOLS
from PIL import Image

WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"]
NAMES = ["tench", "goldfish", "great white shark", "tiger shark", "hammerhead shark"]
OOD = ["iNaturalist/images", "SUN/images", "Places/images", "dtd/images/banded"]
FAR = ["iNaturalist", "SUN", "Places", "Texture"]


def write_images(root, *names):
    """Image number i is the colour (i, 0, 0)."""
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (value % 256, 0, 0)).save(root / name)


def write_classes(root, folder, wnids=WNIDS, count=2):
    write_images(root, *(f"{folder}/{wnid}/{wnid}_{i}.png" for wnid in wnids for i in range(count)))


def write_ood(root, folders=OOD, count=1):
    write_images(root, *(f"{folder}/{i}.png" for folder in folders for i in range(count)))


@pytest.fixture
def data(tmp_path):
    """Five classes in the layout of the released IIM code, three training and two test images each."""
    write_classes(tmp_path, "imagenet/train", count=3)
    write_classes(tmp_path, "imagenet/val")
    write_ood(tmp_path)
    return tmp_path


def rows(name, root, overrides=None):
    return {row.name: row for row in inspect_protocol(name, root, overrides)}


# ---- the data files


def test_protocols_are_those_of_the_papers():
    assert list_protocols()[:17] == [
        "imagenet-1k", "imagenet-500-easy", "imagenet-500-hard", "imagenet-100", "imagenet-10", "imagenet-20",
        "imagenet-x", "imagenet-fs-x", "wilds-fs-x-iwildcam", "wilds-fs-x-fmow", "openood-imagenet", "imagenet-o",
        "tiny-imagenet-100", "ham-4", "histology-5", "setar-imagenet-1k", "setar-voc",
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"Unknown protocol 'imagenet100'\. Did you mean 'imagenet-100'"):
        inspect_protocol("imagenet100", ".")


def test_class_lists_are_sorted_parts_of_imagenet_and_as_long_as_they_say():
    clip = clip_names()
    assert (len(clip), clip[WNIDS[0]], [clip[wnid] for wnid in WNIDS]) == (1000, "tench", NAMES)
    sets = catalog()["sets"]
    listed = {name: list(entry["classes"]) for name, entry in sets.items() if "class_list" in entry}
    assert set(listed) == {"ImageNet-100", "ImageNet-10", "ImageNet-20", "ImageNet-X"}
    for name, classes in listed.items():
        assert all(one < other for one, other in pairwise(classes))
        assert set(classes) <= set(clip)
        assert len(classes) == sets[name]["class_count"]
        assert sets[name]["images"]["test"] == 50 * len(classes)
    assert not set(listed["ImageNet-10"]) & set(listed["ImageNet-20"])


# ---- layouts


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("imagenet/train", "imagenet/val"),
        ("imagenet/images/train", "imagenet/images/val"),
        ("ImageNet/train", "ImageNet/val"),
        ("ILSVRC-2012/train", "ILSVRC-2012/val"),
        (None, "ImageNet"),
        ("train", "val"),
    ],
)
def test_imagenet_layouts(tmp_path, train, test):
    write_classes(tmp_path, test)
    if train:
        write_classes(tmp_path, train, count=3)
    write_ood(tmp_path)
    found = find_protocol("imagenet-1k", tmp_path)
    assert (found.class_names, found.wnids, found.title) == (NAMES, WNIDS, "ImageNet-1k")
    assert found.test.ids == [f"{wnid}/{wnid}_{i}.png" for wnid in WNIDS for i in range(2)]
    assert found.test.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert found.test.label_names == NAMES
    assert found.test.open(7).getpixel((0, 0)) == (7, 0, 0)
    assert [row.path for row in found.found[:2]] == [tmp_path / train if train else None, tmp_path / test]
    if train:
        assert found.train.labels.tolist() == np.repeat(np.arange(5), 3).tolist()
        assert found.train.label_names == NAMES
    else:
        assert found.train is None
        assert any(note.startswith("train: none of") for note in found.notes)


@pytest.mark.parametrize("above", ["", "ImageNet_OOD_dataset/"])
@pytest.mark.parametrize(
    "texture",
    [
        "dtd/images",
        "Texture/images",
        "Texture",
        "ImageNet_OOD_dataset/dtd/images",
        "ImageNet_OOD_dataset/Texture",
    ],
)
def test_ood_layouts(tmp_path, above, texture):
    write_classes(tmp_path, "imagenet/val")
    places = [*(above + name for name in FAR[:3]), texture]
    write_ood(tmp_path, [f"{place}/deeper/still" for place in places], count=2)
    found = find_protocol("imagenet-1k", tmp_path)
    assert list(found.ood) == FAR
    assert [row.path for row in found.found[2:]] == [tmp_path / place for place in places]
    assert all(source.ids == ["deeper/still/0.png", "deeper/still/1.png"] for source in found.ood.values())


def test_the_first_layout_wins(data):
    write_classes(data, "ImageNet/val", WNIDS[:2])
    write_ood(data, ["Texture/images", "ImageNet_OOD_dataset/SUN"])
    found = rows("imagenet-1k", data)
    assert found["test"].path == data / "imagenet" / "val"
    assert found["SUN"].path == data / "SUN"
    assert found["Texture"].path == data / "dtd" / "images"


# ---- classes


def test_halves_are_the_first_and_last_wnids_with_labels_of_their_own(data):
    easy, hard = (find_protocol(f"imagenet-500-{half}", data) for half in ("easy", "hard"))
    assert (easy.class_names, hard.class_names) == (NAMES[:3], NAMES[3:])
    assert hard.test.labels.tolist() == [0, 0, 1, 1]
    assert hard.test.ids[0] == f"{WNIDS[3]}/{WNIDS[3]}_0.png"
    assert (len(easy.train), len(hard.train)) == (9, 6)
    assert "2 classes, not 500." in hard.notes
    assert set(easy.test.ids) | set(hard.test.ids) == set(find_protocol("imagenet-1k", data).test.ids)


def test_a_class_without_test_images_keeps_its_rank(data):
    for file in (data / "imagenet/val" / WNIDS[1]).iterdir():
        file.unlink()
    found = find_protocol("imagenet-1k", data)
    assert found.class_names == NAMES
    assert found.test.labels.tolist() == [0, 0, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("folder", ["imagenet100", "ImageNet100"])
def test_imagenet_100_in_a_folder_of_its_own(data, folder):
    write_classes(data, f"{folder}/train", WNIDS[1:4], count=4)
    write_classes(data, f"{folder}/val", WNIDS[1:4], count=1)
    (data / folder / "class_list.txt").write_text("\n".join(reversed(WNIDS[1:4])))
    found = find_protocol("imagenet-100", data)
    assert (found.class_names, found.wnids) == (NAMES[1:4], WNIDS[1:4])
    assert found.test.labels.tolist() == [0, 1, 2]
    assert [row.path for row in found.found[:2]] == [data / folder / "train", data / folder / "val"]


@pytest.mark.parametrize("place", ["imagenet100/class_list.txt", "ImageNet100/class_list.txt", "class_list.txt", None])
def test_imagenet_100_as_a_part_of_imagenet(data, place):
    file = data / (place or "elsewhere.txt")
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"{WNIDS[4]}\n{WNIDS[0]}\n")
    found = find_protocol("imagenet-100", data, overrides=None if place else {"class_list": file})
    assert found.class_names == [NAMES[0], NAMES[4]]
    assert found.test.ids == [f"{wnid}/{wnid}_{i}.png" for wnid in (WNIDS[0], WNIDS[4]) for i in range(2)]
    assert (found.test.labels.tolist(), len(found.train)) == ([0, 0, 1, 1], 6)
    assert found.found[1].path == data / "imagenet" / "val"


def test_other_classes_than_those_of_the_list_are_refused(data):
    with pytest.raises(DataError, match=r"lacks 100 of the 100 classes \(n01498041, .*data/ImageNet100/class_list.txt"):
        find_protocol("imagenet-100", data)
    (data / "class_list.txt").write_text(f"{WNIDS[0]}\ntench\n")
    with pytest.raises(DataError, match=r"class_list\.txt' is no class list: 'tench' is no wnid"):
        find_protocol("imagenet-100", data)
    with pytest.raises(MissingDataError, match=r"none\.txt"):
        find_protocol("imagenet-100", data, overrides={"class_list": data / "none.txt"})
    with pytest.raises(UsageError, match="class_list"):
        find_protocol("imagenet-1k", data, overrides={"class_list": data / "class_list.txt"})


def test_imagenet_10_and_20_are_each_other_s_ood_set(tmp_path):
    sets = catalog()["sets"]
    both = [*sets["ImageNet-10"]["classes"], *sets["ImageNet-20"]["classes"]]
    write_classes(tmp_path, "imagenet/train", [*both, WNIDS[0]], count=2)
    write_classes(tmp_path, "imagenet/val", [*both, WNIDS[0]], count=1)
    ten, twenty = find_protocol("imagenet-10", tmp_path), find_protocol("imagenet-20", tmp_path)
    assert ten.class_names == list(sets["ImageNet-10"]["classes"].values())
    assert {"horse", "antelope"} < set(ten.class_names)
    assert (len(ten.test), len(ten.train), len(twenty.test)) == (10, 20, 20)
    assert ten.ood["ImageNet-20"].ids == twenty.test.ids
    assert twenty.ood["ImageNet-10"].ids == ten.train.ids
    assert any("training images, as in MCM" in note for note in twenty.notes)
    write_classes(tmp_path, "imagenet20/val", sets["ImageNet-20"]["classes"], count=3)
    assert len(find_protocol("imagenet-10", tmp_path).ood["ImageNet-20"]) == 60


# ---- SeTAR's layout

VOC = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "cow", "diningtable", "dog", "horse", "motorbike", "sheep",
    "sofa", "train", "tvmonitor",
]  # fmt: skip
SETAR_OOD = [f"OOD_{name}/test/images" for name in ("iNaturalist", "Sun", "Places", "Texture")]
VOC_OOD = [*SETAR_OOD, "OOD_ImageNet22K/test/n12782915", "OOD_COCO/test/images"]


@pytest.fixture
def setar(tmp_path):
    """Both ID sets and all OOD sets where the released SeTAR code looks for them."""
    write_classes(tmp_path, "ID_ImageNet1K/val", count=1)
    write_classes(tmp_path, "ID_ImageNet1K/test")
    write_images(tmp_path, *(f"ID_VOC/val/{name}/2008_{i}.jpg" for i, name in enumerate(VOC)))
    write_images(tmp_path, *(f"ID_VOC/test/{name}/2009_{i}.jpg" for name in VOC for i in range(2)))
    write_ood(tmp_path, VOC_OOD)
    return tmp_path


def test_setar_imagenet(setar):
    found = find_protocol("setar-imagenet-1k", setar)
    assert (found.title, found.class_names, found.wnids) == ("ImageNet1K", NAMES, WNIDS)
    assert found.train.ids == [f"{wnid}/{wnid}_0.png" for wnid in WNIDS]
    assert (found.train.labels.tolist(), found.test.labels.tolist()) == (list(range(5)), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    assert list(found.ood) == FAR
    places = ["ID_ImageNet1K/val", "ID_ImageNet1K/test", *SETAR_OOD]
    assert [row.path for row in found.found] == [setar / place for place in places]
    assert [row.expected for row in found.found] == [1000, 50_000, 10_000, 10_000, 10_000, 5640]
    assert {"train: 5 images, not 1,000.", "test: 10 images, not 50,000."} < set(found.notes)


def test_setar_voc(setar):
    found = find_protocol("setar-voc", setar)
    assert (found.title, found.class_names, found.wnids) == ("Pascal-VOC", VOC, [])
    assert found.train.label_names == found.test.label_names == VOC
    assert (found.train.labels.tolist(), found.train.ids[6]) == (list(range(14)), "diningtable/2008_6.jpg")
    assert found.test.labels.tolist() == np.repeat(np.arange(14), 2).tolist()
    assert list(found.ood) == [*FAR, "ImageNet22K", "COCO"]
    places = ["ID_VOC/val", "ID_VOC/test", *SETAR_OOD, "OOD_ImageNet22K/test", "OOD_COCO/test/images"]
    assert [row.path for row in found.found] == [setar / place for place in places]
    assert found.ood["ImageNet22K"].ids == ["n12782915/0.png"]
    assert found.describe().startswith("setar-voc: 14 classes, 'aeroplane' to 'tvmonitor'")


def test_setar_voc_is_complete_with_the_counts_of_its_lists(setar, monkeypatch):
    counts = [row.expected for row in inspect_protocol("setar-voc", setar)]
    assert counts == [94, 906, 10_000, 10_000, 10_000, 5640, 18_335, 1000]
    assert all("(the count differs)" in line for line in describe(inspect_protocol("setar-voc", setar)).splitlines())
    sets = catalog()["sets"]
    monkeypatch.setitem(sets["Pascal-VOC"], "images", {"train": 14, "test": 28})
    for name in [*FAR, "ImageNet22K", "COCO"]:
        monkeypatch.setitem(sets[name], "images", {"test": 1})
    assert find_protocol("setar-voc", setar).notes == []


def test_a_missing_voc_set_is_named_with_the_folders_tried_and_the_source(setar):
    os.rename(setar / "OOD_COCO", setar / "COCO")
    os.rename(setar / "ID_VOC/test", setar / "ID_VOC/all")
    found = rows("setar-voc", setar)
    assert [name for name, row in found.items() if row.error] == ["test", "COCO"]
    assert "named as one of aeroplane, bicycle, " in str(found["test"].error)
    with pytest.raises(MissingDataError, match=r"test: none of .*ID_VOC/test is.*COCO: none of .*OOD_COCO/test/images"):
        find_protocol("setar-voc", setar)
    overrides = {"test": setar / "ID_VOC/all", "COCO": setar / "COCO"}
    assert len(find_protocol("setar-voc", setar, overrides=overrides).ood["COCO"]) == 1


def test_voc_without_validation_images_is_found_all_the_same(setar):
    os.rename(setar / "ID_VOC/val", setar / "ID_VOC/validation")
    found = find_protocol("setar-voc", setar)
    assert found.train is None
    assert any(note.startswith("train: none of") and "data/ID_VOC" in note for note in found.notes)


def test_voc_classes_are_the_fourteen(setar):
    write_images(setar, "ID_VOC/test/person/a.jpg")
    with pytest.raises(DataError, match=r"test: .*holds 1 images outside class folders named as one .*'person/a.jpg'"):
        find_protocol("setar-voc", setar)
    (setar / "ID_VOC/test/person/a.jpg").unlink()
    os.rename(setar / "ID_VOC/test/sofa", setar / "sofa")
    with pytest.raises(DataError, match=r"test: .*lacks 1 of the 14 classes \(sofa\)\.$"):
        find_protocol("setar-voc", setar)
    with pytest.raises(UsageError, match="class_list"):
        find_protocol("setar-voc", setar, overrides={"class_list": setar / "list.txt"})


def test_voc_prompts_may_have_other_names(setar):
    (setar / "names.txt").write_text("\n".join(["dining table" if name == "diningtable" else name for name in VOC]))
    found = find_protocol("setar-voc", setar, class_names_file=setar / "names.txt")
    assert found.class_names[6] == found.test.label_names[6] == "dining table"
    assert found.test.labels.tolist() == np.repeat(np.arange(14), 2).tolist()
    (setar / "names.txt").write_text("dining table\n")
    with pytest.raises(DataError, match=r"names\.txt' has 1 names for 14 classes; .* 'aeroplane' to that of 'tvmon"):
        find_protocol("setar-voc", setar, class_names_file=setar / "names.txt")


def test_the_layouts_serve_each_other_s_protocols(setar, data):
    """Both fixtures write below the same folder, the older layout over that of SeTAR."""
    assert [row.path for row in find_protocol("setar-imagenet-1k", data).found[2:]] == [
        data / place for place in (*FAR[:3], "dtd/images")
    ]
    for folder in ("imagenet", *FAR[:3], "dtd"):
        os.rename(data / folder, data / f"old {folder}")
    older = find_protocol("imagenet-500-hard", data)
    assert [row.path for row in older.found] == [None, *(data / p for p in ("ID_ImageNet1K/test", *SETAR_OOD))]
    assert (older.class_names, older.train) == (NAMES[3:], None)
    os.rename(data / "ID_ImageNet1K/test", data / "val")
    newer = find_protocol("setar-imagenet-1k", data)
    assert [row.path for row in newer.found[:2]] == [data / "ID_ImageNet1K/val", data / "val"]


def test_whole_imagenet_is_not_taken_for_setar_s_thousand_images(data):
    assert find_protocol("setar-imagenet-1k", data).train is None


def test_setar_takes_clip_s_names_whatever_lies_beside_the_images(data):
    (data / "imagenet/classnames.txt").write_text("\n".join(f"{wnid} fish" for wnid in WNIDS))
    assert find_protocol("setar-imagenet-1k", data).class_names == NAMES


# ---- OpenOOD's lists

FLAT = "images_largescale/imagenet_1k/val"
OPENOOD = {
    "SSB-hard": ("test_ssb_hard.txt", "images_largescale", "ssb_hard/n01575401/n01575401_1010.JPEG"),
    "NINCO": ("test_ninco.txt", "images_largescale", "ninco/lathyrus_odoratus/lathyrus odoratus_1.jpg"),
    "iNaturalist": ("test_inaturalist.txt", "images_largescale", "inaturalist/images/0a.jpg"),
    "Textures": ("test_textures.txt", "images_classic", "texture/banded/banded_0002.jpg"),
    "OpenImage-O": ("test_openimage_o.txt", "images_largescale", "openimage_o/images/27439d0af65ca73e.jpg"),
}


def write_list(root, name, lines):
    path = root / "benchmark_imglist/imagenet" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def openood_lines(first, count):
    return [f"imagenet_1k/val/ILSVRC2012_val_{first + i:08d}.JPEG {i % 5}" for i in range(count)]


def write_openood(root):
    """Ten test and five validation images of the first five classes, one image of every OOD set."""
    lists = {"val_imagenet.txt": openood_lines(0, 5), "test_imagenet.txt": openood_lines(5, 10)}
    for name, lines in lists.items():
        write_list(root, name, lines)
        write_images(root, *(f"images_largescale/{line.split()[0]}" for line in lines))
    for name, folder, image in OPENOOD.values():
        write_list(root, name, [f"{image} -1"])
        write_images(root, f"{folder}/{image}")


def test_openood_takes_the_images_of_its_lists(tmp_path):
    write_openood(tmp_path)
    write_images(tmp_path, f"{FLAT}/not_listed.JPEG", "images_classic/texture/banded/not_listed.jpg")
    found = find_protocol("openood-imagenet", tmp_path)
    assert (found.convention, found.train, found.class_names) == ("openood", None, NAMES)
    assert found.test.ids == sorted(line.split()[0] for line in openood_lines(5, 10))
    assert found.test.labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert found.calibration.labels.tolist() == list(range(5))
    assert not set(found.calibration.ids) & set(found.test.ids)
    assert found.calibration.label_names == found.test.label_names == NAMES
    assert {name: source.ids for name, source in found.ood.items()} == {
        name: [image] for name, (_, _, image) in OPENOOD.items()
    }
    assert all(source.labels is None for source in found.ood.values())
    assert [found.kinds[name] for name in found.ood] == ["near", "near", "far", "far", "far"]
    assert [row.expected for row in found.found] == [1281167, 5000, 45000, 49000, 5879, 10000, 5160, 15869]
    assert all(source.open(0).size == (8, 8) for source in (found.test, *found.ood.values()))


def test_openood_s_images_may_lie_as_other_code_wants_them(tmp_path):
    write_openood(tmp_path)
    for wnid in WNIDS:
        (tmp_path / "imagenet/val" / wnid).mkdir(parents=True)
    for line in [*openood_lines(0, 5), *openood_lines(5, 10)]:
        path, label = line.split()
        name = path.rpartition("/")[2]
        os.rename(tmp_path / FLAT / name, tmp_path / "imagenet/val" / WNIDS[int(label)] / name)
    for old, new in {
        "images_classic/texture": "dtd/images",
        "images_largescale/inaturalist": "iNaturalist",
        "images_largescale/ninco": "NINCO_OOD_classes",
    }.items():
        (tmp_path / new).parent.mkdir(exist_ok=True)
        os.rename(tmp_path / old, tmp_path / new)
    found = find_protocol("openood-imagenet", tmp_path)
    assert found.test.labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert found.ood["Textures"].ids == ["texture/banded/banded_0002.jpg"]
    assert found.ood["Textures"].open(0).size == (8, 8)


def test_openood_without_its_lists_says_where_they_are(tmp_path):
    write_openood(tmp_path)
    (tmp_path / "benchmark_imglist/imagenet/test_ninco.txt").unlink()
    (tmp_path / "benchmark_imglist/imagenet/val_imagenet.txt").unlink()
    with pytest.raises(MissingDataError, match=r"^NINCO: none of .*test_ninco\.txt is a file; .*Jingkang50/OpenOOD"):
        find_protocol("openood-imagenet", tmp_path)
    write_list(tmp_path, "mine.txt", [f"{OPENOOD['NINCO'][2]} -1"])
    places = {"NINCO": tmp_path / "benchmark_imglist/imagenet/mine.txt"}
    found = find_protocol("openood-imagenet", tmp_path, overrides=places)
    assert (found.ood["NINCO"].ids, found.calibration) == ([OPENOOD["NINCO"][2]], None)
    assert any(note.startswith("calibration: none of") for note in found.notes)
    with pytest.raises(MissingDataError, match=r"calibration: .*nowhere"):
        find_protocol("openood-imagenet", tmp_path, overrides=places | {"calibration": tmp_path / "nowhere"})


def test_listed_images_that_are_not_there_are_counted(tmp_path):
    write_openood(tmp_path)
    write_list(tmp_path, "test_ninco.txt", ["ninco/a.jpg -1", "ninco/b.jpg -1"])
    row = rows("openood-imagenet", tmp_path)["NINCO"]
    assert (row.images, row.expected) == (0, 5879)
    assert "test_ninco.txt' is at none of" in str(row.error)
    write_images(tmp_path, "images_largescale/ninco/a.jpg")
    with pytest.raises(MissingDataError, match=r"NINCO: 1 of the 2 images of .*test_ninco\.txt' are not there"):
        find_protocol("openood-imagenet", tmp_path)


@pytest.mark.parametrize("line", ["imagenet_1k/val/a.JPEG 1000", "imagenet_1k/val/a.JPEG tench"])
def test_labels_of_a_list_are_ranks_of_wnids(tmp_path, line):
    write_openood(tmp_path)
    write_list(tmp_path, "test_imagenet.txt", [line])
    with pytest.raises(DataError, match=r"test: .* has the label '(1000|tench)'; it must be -1 or one of 0 to 999"):
        find_protocol("openood-imagenet", tmp_path)


def test_imagenet_o_and_ninco(data):
    write_images(data, f"imagenet-o/{WNIDS[0]}/a.jpg", "NINCO/NINCO_OOD_classes/caracal/b.jpg")
    found = find_protocol("imagenet-o", data)
    assert {name: source.ids for name, source in found.ood.items()} == {
        "ImageNet-O": [f"{WNIDS[0]}/a.jpg"],
        "NINCO": ["caracal/b.jpg"],
    }
    assert [row.expected for row in found.found[2:]] == [2000, 5879]
    assert (found.class_names, found.convention) == (NAMES, "standard")


# ---- the OOD-X family


def write_x(root):
    """Ten classes, ranks 0 to 9, of which 0, 2, 4, 5 and 7 are known."""
    ranked = list(clip_names())[:10]
    write_classes(root, "imagenet/images/train", ranked, count=2)
    write_classes(root, "imagenet/images/val", ranked, count=1)
    (root / "class_splits/imagenet/x").mkdir(parents=True)
    (root / "class_splits/imagenet/x/id_data.txt").write_text("0\n4\n2\n5\n7\n")
    return ranked


def test_imagenet_x_parts_imagenet(tmp_path):
    ranked = write_x(tmp_path)
    found = find_protocol("imagenet-x", tmp_path)
    assert found.wnids == [ranked[i] for i in (0, 2, 4, 5, 7)]
    assert (found.test.labels.tolist(), len(found.train)) == ([0, 1, 2, 3, 4], 10)
    assert {id.partition("/")[0] for id in found.ood["ImageNet-X others"].ids} == {ranked[i] for i in (1, 3, 6, 8, 9)}
    (tmp_path / "mine.txt").write_text(f"{ranked[9]}\n{ranked[0]}\n")
    other = find_protocol("imagenet-x", tmp_path, overrides={"class_list": tmp_path / "mine.txt"})
    assert other.wnids == [ranked[0], ranked[9]]
    assert len(other.ood["ImageNet-X others"]) == 8
    (tmp_path / "mine.txt").write_text("0\n1000\n")
    with pytest.raises(DataError, match=r"'1000' is no wnid\. See .*OOD-X-Benchmarks"):
        find_protocol("imagenet-x", tmp_path, overrides={"class_list": tmp_path / "mine.txt"})


def test_imagenet_x_knows_its_published_half(tmp_path):
    known = catalog()["sets"]["ImageNet-X"]["classes"]
    ranks = [rank for rank, wnid in enumerate(clip_names()) if wnid in set(known)]
    assert (len(ranks), ranks[:12], ranks[-3:], sum(ranks)) == (500, [0, 2, 4, 5, 7, 10, 11, 14, 16, 17, 20, 22],
                                                               [992, 993, 994], 233691)  # fmt: skip
    write_classes(tmp_path, "imagenet/val", list(clip_names()), count=1)
    found = find_protocol("imagenet-x", tmp_path)
    assert (len(found.test), len(found.ood["ImageNet-X others"])) == (500, 500)
    assert not set(found.test.ids) & set(found.ood["ImageNet-X others"].ids)


def write_fs_x(root):
    """ImageNet-X with one shifted image of ranks 0 and 1 in each of V2, R and C; V2 as OpenOOD has it, R as OOD-X."""
    ranked = write_x(root)
    shifted = {
        "imagenet_v2": [f"{rank}/a.jpeg" for rank in (0, 1)],
        "imagenet_r": [f"{ranked[rank]}/art_1.jpg" for rank in (0, 1)],
        "imagenet_c": [f"frost/2/ILSVRC2012_val_0000000{rank}.JPEG" for rank in (0, 1)],
    }
    for name, images in shifted.items():
        write_list(root, f"test_{name}.txt", [f"{name}/{image} {rank}" for rank, image in enumerate(images)])
        folder = f"images_largescale/{name}" if name == "imagenet_v2" else f"{name}/images"
        write_images(root, *(f"{folder}/{image}" for image in images))
    (root / "imagenet_r").mkdir(exist_ok=True)
    os.rename(root / "benchmark_imglist/imagenet/test_imagenet_r.txt", root / "imagenet_r/test_imagenet_r.txt")
    return ranked


def test_full_spectrum_known_images_are_tested_on_together(tmp_path):
    write_fs_x(tmp_path)
    found = find_protocol("imagenet-fs-x", tmp_path)
    assert (found.title, len(found.test)) == ("ImageNet-FS-X", 8)
    shifted = [id for id in found.test.ids if not id.startswith("test/")]
    assert shifted == [
        "ImageNet-C/imagenet_c/frost/2/ILSVRC2012_val_00000000.JPEG",
        f"ImageNet-R/imagenet_r/{WNIDS[0]}/art_1.jpg",
        "ImageNet-V2/imagenet_v2/0/a.jpeg",
    ]
    assert found.test.labels.tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    assert found.test.label_names == found.class_names
    assert {name: len(source) for name, source in found.ood.items()} == {
        "ImageNet-X others": 5, "ImageNet-V2 others": 1, "ImageNet-R others": 1, "ImageNet-C others": 1,
    }  # fmt: skip
    assert found.ood["ImageNet-R others"].ids == [f"imagenet_r/{WNIDS[1]}/art_1.jpg"]
    assert any("here each set is judged on its own" in note for note in found.notes)


def write_wilds(root, folder="iwildcam_v2.0"):
    tables = {
        "train": ["elephant", "zebra", "buffalo"], "test": ["elephant", "zebra"], "test_shifted": ["zebra", "elephant"],
        "ood": ["lion"], "ood_shifted": ["lion", "cow"],
    }  # fmt: skip
    for part, labels in tables.items():
        images = [f"train/{part}_{i}.jpg" for i in range(len(labels))]
        write_images(root / folder, *images)
        lines = ["path,label", *(f"{image},{label}" for image, label in zip(images, labels, strict=True))]
        (root / folder / f"x_{part}.csv").write_text("\n".join(lines))


@pytest.mark.parametrize("folder", ["iwildcam_v2.0", "iwildcam/iwildcam_v2.0"])
def test_wilds_takes_the_user_s_tables(tmp_path, folder):
    write_wilds(tmp_path, folder)
    found = find_protocol("wilds-fs-x-iwildcam", tmp_path)
    assert (found.class_names, found.wnids) == (["buffalo", "elephant", "zebra"], [])
    assert found.title == "Wilds-FS-X (iWildCam)"
    assert (found.test.labels.tolist(), found.train.labels.tolist()) == ([2, 1, 1, 2], [1, 2, 0])
    assert [len(source) for source in found.ood.values()] == [1, 2]
    assert [row.expected for row in found.found] == [None] * 5
    (tmp_path / folder / "x_test.csv").write_text("path\ntrain/test_0.jpg\n")
    with pytest.raises(DataError, match=r"test: the images in .*x_test\.csv' have no labels; add a column"):
        find_protocol("wilds-fs-x-iwildcam", tmp_path)
    (tmp_path / folder / "x_test.csv").unlink()
    with pytest.raises(
        MissingDataError, match=r"x_test\.csv is a file; .*columns path .* split id_test .*id_data\.txt"
    ):
        find_protocol("wilds-fs-x-iwildcam", tmp_path)


# ---- packs


def encoded():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pack(root, name, counts, names=None):
    """A pack with so many images of each (split, label)."""
    root.mkdir(exist_ok=True)
    pairs = [pair for pair, count in counts.items() for _ in range(count)]
    columns = {
        "image": [encoded()] * len(pairs),
        "label": [label for _, label in pairs],
        "split": [split for split, _ in pairs],
        "source": [f"{name}/{split}/{label}/{i}.png" for i, (split, label) in enumerate(pairs)],
    }
    if names:
        columns["name"] = [names[label] for _, label in pairs]
    pq.write_table(pa.table(columns), root / f"{name}.parquet")


SKIN = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
TISSUE = ["AC", "H", "S", "T", "V"]


def write_packs(root):
    """All packs: 17 images to learn from per class, 2 to test on."""
    wnids = [*WNIDS[::-1], "n09999999"]
    names = {wnid: f"name_{i}" for i, wnid in enumerate(sorted(wnids))}
    write_pack(
        root, "tiny-imagenet", {(s, w): n for s, n in (("train", 1), ("fit", 17), ("val", 2)) for w in wnids}, names
    )
    skin = {(split, label): 2 for split in ("train", "val", "test") for label in SKIN}
    write_pack(root, "dermatology-ham10000", skin)
    write_pack(root, "histology-colorectal", {(split, label): 2 for split in ("train", "test") for label in TISSUE})
    for name in ("textures-dtd", "flowers", "mnist", "fashion-mnist", "chest-xray"):
        write_pack(root, name, {("test", "a"): 2, ("test", "b"): 1, ("other", "a"): 1})
    write_pack(root, "scenes-15", {("train", "a"): 1, ("test", "a"): 1})


def test_tiny_imagenet_100(tmp_path):
    write_packs(tmp_path)
    found = find_protocol("tiny-imagenet-100", tmp_path)
    assert (found.wnids, found.class_names) == (WNIDS[:3], ["name 0", "name 1", "name 2"])
    assert found.train.labels.tolist() == np.repeat(np.arange(3), 16).tolist()
    assert found.calibration.labels.tolist() == [0, 1, 2]
    assert not set(found.train.ids) & set(found.calibration.ids)
    assert all("/fit/" in id for id in [*found.train.ids, *found.calibration.ids])
    assert [WNIDS.index(id.split("/")[2]) for id in found.test.ids] == found.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert {id.split("/")[2] for id in found.ood["near"].ids} == {*WNIDS[3:], "n09999999"}
    assert {name: len(source) for name, source in found.ood.items()} == {
        "near": 6, "textures": 3, "scenes": 2, "flowers": 3, "mnist": 3, "fashion-mnist": 3, "dermatology": 14,
        "histology": 10, "chest-xray": 3,
    }  # fmt: skip
    assert found.kinds == {name: "near" if name == "near" else "far" for name in found.ood}
    assert "test: 6 images, not 5,000." in found.notes
    again, other = (find_protocol("tiny-imagenet-100", tmp_path, seed=seed) for seed in (0, 1))
    assert (again.train.ids == found.train.ids, other.train.ids == found.train.ids) == (True, False)


def test_ham_4(tmp_path):
    write_packs(tmp_path)
    found = find_protocol("ham-4", tmp_path)
    names = ["melanocytic nevus", "melanoma", "dermatofibroma", "vascular lesion"]
    assert found.class_names == found.test.label_names == found.calibration.label_names == names
    codes = ["nv", "mel", "df", "vasc"]
    for split, source in (("train", found.train), ("val", found.calibration), ("test", found.test)):
        assert all(f"/{split}/" in id for id in source.ids)
        assert [codes[label] for label in source.labels] == [id.split("/")[2] for id in source.ids]
    near = {name: {id.split("/")[2] for id in source.ids} for name, source in list(found.ood.items())[:3]}
    assert near == {"actinic keratosis": {"akiec"}, "basal cell carcinoma": {"bcc"}, "benign keratosis": {"bkl"}}
    assert [row.expected for row in found.found] == [1732, 249, 489, 64, 102, 218, 150, 400]
    assert list(found.kinds.values()) == ["near"] * 3 + ["far"] * 2


def test_histology_5_leaves_out_every_pair(tmp_path):
    write_packs(tmp_path)
    tasks = find_tasks("histology-5", tmp_path)
    assert len({task.name for task in tasks}) == 10
    for task in tasks:
        out = task.name.removeprefix("histology-5-").split("+")
        assert {id.split("/")[2] for id in task.ood["left out"].ids} == set(out)
        known = [code for code in TISSUE if code not in out]
        for source in (task.train, task.test):
            assert [known[label] for label in source.labels] == [id.split("/")[2] for id in source.ids]
        assert (len(task.class_names), list(task.ood)) == (3, ["left out", "dermoscopy"])
        assert task.kinds == {"left out": "near", "dermoscopy": "far"}
        assert [row.expected for row in task.found] == [240, 90, 60, 873]
    one = find_protocol("histology-5-S+V", tmp_path)
    assert one.class_names == ["colorectal adenocarcinoma", "healthy colon tissue", "tubular adenoma"]
    assert [row.expected for row in inspect_protocol("histology-5", tmp_path)] == [400, 150, 873]
    with pytest.raises(UsageError, match=r"'histology-5' has 10 tasks; find one of them: histology-5-AC\+H, "):
        find_protocol("histology-5", tmp_path)


def test_a_pack_without_the_split_or_the_classes_is_refused(tmp_path):
    write_packs(tmp_path)
    write_pack(tmp_path, "textures-dtd", {("train", "a"): 1})
    write_pack(tmp_path, "dermatology-ham10000", {(s, "nv"): 1 for s in ("train", "val", "test")})
    found = rows("ham-4", tmp_path)
    assert "Unknown split of" in str(found["textures"].error)
    assert "lacks 3 of the 4 classes (df, mel, vasc)." in str(found["test"].error)
    with pytest.raises(DataError, match="lacks 3 of the 4"):
        find_protocol("ham-4", tmp_path)


# ---- every protocol


def write_imagenet(root):
    write_classes(root, "imagenet/val")
    write_ood(root)
    write_images(root, "imagenet-o/a.jpg", "NINCO_OOD_classes/b.jpg")


MINIATURES = {
    "imagenet-1k": write_imagenet,
    "imagenet-500-easy": write_imagenet,
    "imagenet-o": write_imagenet,
    "openood-imagenet": write_openood,
    "imagenet-x": write_x,
    "imagenet-fs-x": write_fs_x,
    "wilds-fs-x-iwildcam": write_wilds,
    "wilds-fs-x-fmow": lambda root: write_wilds(root, "fmow_v1.1"),
    "tiny-imagenet-100": write_packs,
    "ham-4": write_packs,
    "histology-5": write_packs,
}


@pytest.mark.parametrize("name", MINIATURES)
def test_every_protocol_is_found_as_it_is_summarised(tmp_path, name):
    MINIATURES[name](tmp_path)
    about = summarise_protocol(name)
    tasks = find_tasks(name, tmp_path)
    assert [task.name for task in tasks] == about.get("tasks", [name])
    for task in tasks:
        assert list(task.ood) == list(about["sets"])
        assert {other: task.kinds.get(other, "") for other in task.ood} == about["sets"]
        assert task.convention == about.get("convention", "standard")
        assert about.get("notes", []) == task.notes[: len(about.get("notes", []))]
        labels = task.test.labels
        assert labels.min() >= 0
        assert (labels.max(), len(labels)) == (len(task.class_names) - 1, len(task.test.ids))
        assert all(source.open(0).size == (8, 8) for source in (task.test, *task.ood.values()))
        assert task.describe().startswith(f"{task.name}: {len(task.class_names)} classes")


@pytest.mark.parametrize("name", list_protocols()[:17])
def test_nothing_of_a_protocol_is_found_in_an_empty_folder(tmp_path, name):
    found = inspect_protocol(name, tmp_path)
    assert all(row.path is None and row.images == 0 and row.error is not None for row in found)
    assert {row.name for row in found} >= {"train", "test", *catalog()["protocols"][name]["ood"]}
    for row in found:
        assert f"; give another place as an override of '{row.name}', or get it: " in str(row.error)
        assert any(where in str(row.error) for where in ("get it: http", "get it: a table that you make"))
    with pytest.raises(MissingDataError, match="test: none of"):
        find_tasks(name, tmp_path)


# ---- protocols of other packages


def plug_in(root):
    write_classes(root, "mine", WNIDS[:2])
    protocol = find_protocol("imagenet-1k", root, overrides={"test": root / "mine"})
    return [protocols.replace(protocol, name=f"mine-{i}") for i in (1, 2)]


MINE = ContributedProtocol("Mine", {"others": "near"}, inspect=lambda root: [], find=plug_in)


@pytest.fixture
def added(monkeypatch):
    """Two protocols of other packages, one of which cannot be imported."""
    mine = EntryPoint("mine", f"{__name__}:MINE", "ood.protocols")
    broken = EntryPoint("broken", "no_such_module:NOTHING", "ood.protocols")
    monkeypatch.setitem(PROTOCOLS.__dict__, "entries", {"mine": mine, "broken": broken})
    monkeypatch.setitem(sys.modules, __name__, types.SimpleNamespace(MINE=MINE))


def test_packages_add_protocols_and_a_broken_one_hides_nothing(added, data):
    assert list_protocols()[17:] == ["broken", "mine"]
    assert summarise_protocol("mine") == {"name": "mine", "title": "Mine", "sets": {"others": "near"}}
    assert "no_such_module" in summarise_protocol("broken")["error"]
    assert [task.name for task in find_tasks("mine", data)] == ["mine-1", "mine-2"]
    assert find_protocol("mine-2", data).name == "mine-2"
    assert inspect_protocol("mine-2", data) == []
    with pytest.raises(UsageError, match="Protocol 'mine' has 2 tasks; find one of them: mine-1, mine-2"):
        find_protocol("mine", data)
    with pytest.raises(UsageError, match=r"Unknown task of protocol 'mine' 'mine-3'\. Did you mean"):
        find_protocol("mine-3", data)
    with pytest.raises(UsageError, match=r"'broken' \(no_such_module:NOTHING\) cannot be imported"):
        find_tasks("broken", data)
    with pytest.raises(UsageError, match=r"Unknown protocol 'mined'\. Did you mean 'mine'"):
        find_tasks("mined", data)
    with pytest.raises(UsageError, match="takes no other places or class names, but got test"):
        find_tasks("mine", data, overrides={"test": data})


# ---- class names


def test_class_names_come_from_a_file_beside_the_images(data):
    lines = [f"{wnid} class_{i} of five" for i, wnid in enumerate(WNIDS)]
    (data / "imagenet/imagenet-classes.txt").write_text("\n".join(lines).replace("class", "other"))
    assert find_protocol("imagenet-1k", data).class_names[1] == "other 1 of five"
    (data / "imagenet/classnames.txt").write_text("\n".join([*reversed(lines), "n09999999 unused"]))
    assert find_protocol("imagenet-1k", data).class_names == [f"class {i} of five" for i in range(5)]
    assert find_protocol("imagenet-500-hard", data).class_names == ["class 3 of five", "class 4 of five"]
    (data / "mine.csv").write_text("\n".join(f"{wnid},name{i}" for i, wnid in enumerate(WNIDS)))
    found = find_protocol("imagenet-1k", data, class_names_file=data / "mine.csv")
    assert found.class_names == found.test.label_names == ["name0", "name1", "name2", "name3", "name4"]


def test_names_without_wnids_are_those_of_the_classes_or_of_all_imagenet(data):
    (data / "names.txt").write_text("a\nb_c\nd\ne\nf\n")
    assert find_protocol("imagenet-1k", data, class_names_file=data / "names.txt").class_names[:2] == ["a", "b c"]
    (data / "all.txt").write_text("\n".join(f"name {i}" for i in range(1000)))
    hard = find_protocol("imagenet-500-hard", data, class_names_file=data / "all.txt")
    assert hard.class_names == ["name 3", "name 4"]
    (data / "names.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="2 names without wnids for 5 classes"):
        find_protocol("imagenet-1k", data, class_names_file=data / "names.txt")


def test_classes_without_a_name_are_refused(data):
    (data / "imagenet/classnames.txt").write_text(f"{WNIDS[0]} tench\n")
    with pytest.raises(DataError, match=rf"4 of the 5 classes, first '{WNIDS[1]}', have no name in .*classnames\.txt"):
        find_protocol("imagenet-1k", data)
    (data / "imagenet/classnames.txt").write_text(f"{WNIDS[0]} tench\ngoldfish\n")
    with pytest.raises(DataError, match="line 'goldfish'"):
        find_protocol("imagenet-1k", data)
    (data / "imagenet/classnames.txt").unlink()
    write_classes(data, "imagenet/val", ["n99999999"])
    with pytest.raises(DataError, match=r"'n99999999', have no name among the 1,000.*class_names_file"):
        find_protocol("imagenet-1k", data)
    with pytest.raises(MissingDataError, match=r"none\.txt"):
        find_protocol("imagenet-1k", data, class_names_file=data / "none.txt")


def test_a_name_that_two_classes_share_is_that_of_the_built_in_list(data):
    names = ["fish", "fish", *WNIDS[2:]]
    (data / "imagenet/classnames.txt").write_text("\n".join(map(" ".join, zip(WNIDS, names, strict=True))))
    found = find_protocol("imagenet-1k", data)
    assert found.test.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    clip = clip_names()
    assert found.class_names == [clip[WNIDS[0]], clip[WNIDS[1]], *WNIDS[2:]]
    assert len(set(map(plain_name, clip.values()))) == 1000


# ---- overrides


def test_overrides_name_other_places(data):
    write_images(data, "my sun/a.png", "my sun/b.png")
    write_classes(data, "my val", WNIDS[:2], count=1)
    (data / "train.csv").write_text(f"path,label\nmy sun/a.png,{WNIDS[0]}\nmy sun/b.png,{WNIDS[1]}\n")
    overrides = {"SUN": data / "my sun", "test": str(data / "my val"), "train": data / "train.csv"}
    found = find_protocol("imagenet-1k", data, overrides=overrides)
    assert found.ood["SUN"].ids == ["a.png", "b.png"]
    assert (found.class_names, found.test.labels.tolist()) == (NAMES[:2], [0, 1])
    assert (found.train.ids, found.train.labels.tolist()) == (["my sun/a.png", "my sun/b.png"], [0, 1])
    assert list(found.ood) == FAR


def test_an_override_must_name_a_set_and_exist(data):
    with pytest.raises(UsageError, match=r"Unknown image set of protocol 'imagenet-1k' 'Textures'\. .*'Texture'"):
        find_protocol("imagenet-1k", data, overrides={"Textures": data})
    for name in ("SUN", "train"):
        with pytest.raises(MissingDataError, match=f"{name}: .*nowhere"):
            find_protocol("imagenet-1k", data, overrides={name: data / "nowhere"})


# ---- what is missing or wrong


def test_missing_sets_are_all_named_with_the_folders_tried_and_the_source(tmp_path):
    write_classes(tmp_path, "imagenet/val")
    write_ood(tmp_path, ["SUN", "Places"])
    with pytest.raises(MissingDataError) as error:
        find_protocol("imagenet-1k", tmp_path)
    for part in ("iNaturalist: none of", str(tmp_path / "ImageNet_OOD_dataset/iNaturalist"), "large_scale_ood"):
        assert part in str(error.value)
    for part in ("Texture: none of", str(tmp_path / "Texture/images"), "vgg/data/dtd"):
        assert part in str(error.value)
    assert "train" not in str(error.value)
    with pytest.raises(MissingDataError, match=r"There is no folder .*nowhere"):
        inspect_protocol("imagenet-1k", tmp_path / "nowhere")


def test_folders_that_are_not_wnids_are_no_classes(data):
    write_images(data, "other/imagenet/val/tench/a.png", "flat/imagenet/val/b.png")
    for root in ("other", "flat"):
        with pytest.raises(MissingDataError, match=r"test: none of .* named by wnid as n01440764.*image-net\.org"):
            find_protocol("imagenet-1k", data / root)


@pytest.mark.parametrize("stray", ["tench/a.png", "n0144076/a.png", "n014407640/a.png", "a.png"])
def test_images_beside_the_class_folders_are_refused(data, stray):
    write_images(data, f"imagenet/val/{stray}")
    with pytest.raises(DataError, match=rf"test: .*val' holds 1 images outside .*wnid.*first '{stray}'"):
        find_protocol("imagenet-1k", data)


def test_an_empty_folder_is_an_error_not_an_empty_set(data):
    (data / "SUN/images/0.png").unlink()
    with pytest.raises(DataError, match=r"SUN: .*holds no image"):
        find_protocol("imagenet-1k", data)


# ---- the dry run


def test_the_dry_run_counts_what_is_there_and_says_what_is_not(data):
    os.rename(data / "Places", data / "Plaetze")
    found = rows("imagenet-500-easy", data)
    assert list(found) == ["train", "test", *FAR]
    counts = {name: (row.images, row.expected) for name, row in found.items()}
    assert counts == {
        "train": (9, None), "test": (6, 25_000), "iNaturalist": (1, 10_000), "SUN": (1, 10_000),
        "Places": (0, 10_000), "Texture": (1, 5640),
    }  # fmt: skip
    assert found["Places"].path is None
    lines = describe(list(found.values())).splitlines()
    assert lines[1] == f"test         6 of 25,000  {data / 'imagenet/val'}  (the count differs)"
    assert lines[4].startswith("Places       0 of 10,000  Places: none of ")
    assert "differs" not in lines[0] + lines[4]


def test_a_protocol_describes_itself(data, monkeypatch):
    whole = catalog()["sets"]["ImageNet-1k"]
    monkeypatch.setitem(whole, "images", {"train": 15, "test": 11})
    found = find_protocol("imagenet-1k", data)
    assert "test: 10 images, not 11." in found.notes
    assert not any(note.startswith("train") for note in found.notes)
    assert found.describe().splitlines()[0] == "imagenet-1k: 5 classes, 'tench' to 'hammerhead shark'"
    assert describe(found.found) in found.describe()
    assert "Note: 5 classes, not 1000." in found.describe()


# ---- released few-shot splits


class Datum:
    """As in Dassl: four attributes behind properties."""

    def __init__(self, impath, label, classname, domain=0):
        self._impath, self._label, self._classname, self._domain = impath, label, classname, domain


@pytest.fixture
def dump(tmp_path, monkeypatch):
    """Pickle to a file, with `Datum` under the name that Dassl gives it."""
    monkeypatch.setattr(Datum, "__module__", "dassl.data.datasets.base_dataset")
    for name in ("dassl", "dassl.data", "dassl.data.datasets", "dassl.data.datasets.base_dataset"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["dassl.data.datasets.base_dataset"].Datum = Datum

    def write(content, protocol=pickle.HIGHEST_PROTOCOL):
        path = tmp_path / "shot_1-seed_1.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
        return path

    return write


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_released_split_is_read_and_moved_to_this_disk(data, dump, protocol):
    drawn = [(1, "goldfish", 2), (0, "tench", 0)]
    paths = [f"/data/ood/imagenet/train/{WNIDS[label]}/{WNIDS[label]}_{i}.png" for label, _, i in drawn]
    content = {"train": [Datum(path, label, name) for path, (label, name, _) in zip(paths, drawn, strict=True)]}
    items = read_released_split(dump(content, protocol), data / "imagenet")
    assert items == [
        ReleasedItem(f"train/{WNIDS[1]}/{WNIDS[1]}_2.png", 1, "goldfish"),
        ReleasedItem(f"train/{WNIDS[0]}/{WNIDS[0]}_0.png", 0, "tench"),
    ]
    source = find_protocol("imagenet-1k", data).train
    assert {item.path.partition("/")[2] for item in items} < set(source.ids)


def test_paths_of_another_system_and_other_parts(data, dump):
    path = dump({"train": [], "test": [Datum(rf"D:\x\val\{WNIDS[0]}\{WNIDS[0]}_1.png", 0, "tench")]})
    assert read_released_split(path, data / "imagenet") == []
    assert read_released_split(path, data / "imagenet", part="test")[0].path == f"val/{WNIDS[0]}/{WNIDS[0]}_1.png"


class Attack:
    """Runs a command where unpickling runs anything."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"train": [x]}, lambda x: {"train": [Datum(x, 0, "a")]}])
def test_a_malicious_split_is_refused_and_not_run(tmp_path, dump, wrap):
    path = dump(wrap(Attack(tmp_path / "ran")))
    with pytest.raises(DataError, match=r"shot_1-seed_1\.pkl' is refused: it asks for (posix|nt)\.system, and only"):
        read_released_split(path, tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists()


def test_nothing_else_of_the_known_module_is_reached(tmp_path):
    path = tmp_path / "split.pkl"
    for name in ("Datum.__init__", "DatasetBase", "__builtins__"):
        path.write_bytes(b"\x80\x04" + b"cdassl.data.datasets.base_dataset\n" + name.encode() + b"\n.")
        with pytest.raises(DataError, match=f"asks for dassl.data.datasets.base_dataset.{name}"):
            read_released_split(path, tmp_path)


def test_damaged_splits_are_refused(tmp_path, dump):
    whole = dump({"train": [Datum("/a/b/c/d.png", 0, "tench")] * 3}).read_bytes()
    path = tmp_path / "damaged.pkl"
    for content in (b"", b"no pickle", whole[:-20], b"\x80\x04" + b"." * 9, json.dumps({"train": []}).encode()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"damaged\.pkl' is refused: it is damaged"):
            read_released_split(path, tmp_path)
    with pytest.raises(MissingDataError, match=r"none\.pkl"):
        read_released_split(tmp_path / "none.pkl", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "no list of images under 'train'"),
        ({"test": []}, "no list of images under 'train'"),
        ({"train": ["a/b/c"]}, "holds 'a/b/c' where an image"),
        ({"train": [Datum(None, 0, "a")]}, "where an image"),
        ({"train": [Datum("a/b/c.png", "0", "a")]}, "where an image"),
        ({"train": [Datum("b/c.png", 0, "a")]}, "'b/c.png', which does not end in"),
        ({"train": [Datum("/a/../c.png", 0, "a")]}, "which does not end in"),
    ],
)
def test_pickles_of_another_content_are_refused(tmp_path, dump, content, message):
    with pytest.raises(DataError, match=message):
        read_released_split(dump(content), tmp_path)


def test_images_that_are_not_on_this_disk_are_named(data, dump):
    path = dump({"train": [Datum(f"/x/train/{WNIDS[0]}/{name}.png", 0, "tench") for name in (f"{WNIDS[0]}_0", "new")]})
    with pytest.raises(MissingDataError, match=rf"1 of the 2 images .* first 'train/{WNIDS[0]}/new\.png'"):
        read_released_split(path, data / "imagenet")
