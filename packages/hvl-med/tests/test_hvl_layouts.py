"""Layouts: found as they lie on a disk, cut into tasks that are rows of one source, and every flaw named."""

import csv
import doctest
import importlib
import io
import pickle
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ood_core import extract
from ood_core.data import ImageFolder
from ood_core.data.joined import JoinedSources
from ood_core.errors import DataError, ImageError, MissingDataError, UsageError
from ood_core.features import FeatureSet
from ood_core.protocols import describe
from ood_hvl.layouts import (
    FOLDS,
    OOD_TRIPLES,
    Task,
    find_layout,
    folds,
    inspect_layout,
    isic_4,
    leave_classes_out,
    list_layouts,
    nct_crc,
    skin_40,
)
from PIL import Image


def picture(value=0, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, value // 256, 0)).save(buffer, kind)
    return buffer.getvalue()


PICTURE = picture()


def write(root, *names):
    """Image number i is the colour (i % 256, i // 256, 0)."""
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(value))


def read(source):
    return [image.getpixel((0, 0))[0] + 256 * image.getpixel((0, 0))[1] for _, image in source]


def assert_parts_are_rows_of_the_source(layout):
    """Whatever the task, its images are the rows it names of the one source of the layout."""
    for task in layout.tasks:
        assert task.source is layout.source
        sources = {"train": task.train, "test": task.test, **task.ood}
        assert list(sources) == list(task.rows)
        for part, rows in task.rows.items():
            assert rows.dtype == np.int64
            assert (np.diff(rows) > 0).all()
            assert sources[part].ids == [layout.source.ids[row] for row in rows]
        names = np.array(layout.source.label_names)
        for part in ("train", "test"):
            assert sources[part].label_names == task.class_names
            own = names[layout.source.labels[task.rows[part]]]
            assert [task.class_names[label] for label in sources[part].labels] == [n.replace("_", " ") for n in own]
        for name in task.ood:
            assert not set(names[layout.source.labels[task.rows[name]]]) & set(task.class_names)


# ---- folds

LABELS = np.repeat([0, 1, 2], [12, 9, 6])


def test_stratified_folds_are_these():
    cut = folds(LABELS, kind="stratified", count=3, seed=0)
    assert [test.tolist() for _, test in cut] == [
        [4, 6, 9, 10, 16, 17, 18, 24, 25], [0, 2, 7, 11, 14, 15, 19, 21, 22], [1, 3, 5, 8, 12, 13, 20, 23, 26],
    ]  # fmt: skip
    assert cut[0][0].tolist() == sorted(cut[1][1].tolist() + cut[2][1].tolist())
    assert [np.bincount(LABELS[test]).tolist() for _, test in cut] == [[4, 3, 2]] * 3
    other = folds(LABELS, kind="stratified", count=3, seed=1)
    assert other[0][1].tolist() != cut[0][1].tolist()
    again = folds(LABELS, list("ab" * 13 + "c"), kind="stratified", count=3, seed=0)
    assert [test.tolist() for _, test in again] == [test.tolist() for _, test in cut]


def test_grouped_folds_keep_groups_together_and_use_every_image_once():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 900)
    groups = [f"{label}-{rng.integers(60)}" for label in labels]
    for row in rng.choice(900, 100, replace=False):
        groups[row] = None
    cut = folds(labels, groups, count=5, seed=0)
    tested = [row for _, test in cut for row in test]
    assert sorted(tested) == list(range(900))
    for train, test in cut:
        assert sorted([*train, *test]) == list(range(900))
        assert not {groups[row] for row in train if groups[row]} & {groups[row] for row in test if groups[row]}
        share = np.bincount(labels[test]) / len(test) - np.bincount(labels) / 900
        assert abs(share).max() < 0.03
    alone = [row for row, group in enumerate(groups) if group is None]
    assert len({fold for row in alone for fold, (_, test) in enumerate(cut) if row in test}) == 5


def test_without_groups_grouped_folds_are_the_stratified_ones():
    grouped, stratified = (folds(LABELS, kind=kind, count=3) for kind in FOLDS)
    assert [test.tolist() for _, test in grouped] == [test.tolist() for _, test in stratified]


def test_impossible_folds_are_refused():
    with pytest.raises(UsageError, match=r"Unknown kind of folds 'group'\. Did you mean 'grouped'"):
        folds(LABELS, kind="group")
    with pytest.raises(UsageError, match="fold_count=1: at least 2"):
        folds(LABELS, count=1)
    with pytest.raises(DataError, match="Class 2 has 6 images, too few for 7 folds"):
        folds(LABELS, count=7)
    with pytest.raises(DataError, match=r"Class 'c' has 1 lesions \(groups of images\), too few for 3 folds"):
        folds(LABELS, [*range(21), *["x"] * 6], count=3, class_names=["a", "b", "c"])


# ---- tasks


def test_a_task_refuses_parts_that_overlap_or_are_empty(tmp_path):
    write(tmp_path, *(f"{name}/{i}.png" for name in "abc" for i in range(2)))
    source = ImageFolder(tmp_path)
    rows = {"train": np.array([0, 2]), "test": np.array([1, 3]), "c": np.array([4, 5])}
    assert Task("t", ["a", "b"], source, rows).labels.tolist() == [0, 0, 1, 1, -1, -1]
    with pytest.raises(DataError, match=r"t: 1 images are in 'train' and 'test', first 'b/0\.png'"):
        Task("t", ["a", "b"], source, rows | {"test": np.array([2, 3])})
    with pytest.raises(DataError, match="t: there is no image for 'c'"):
        Task("t", ["a", "b"], source, rows | {"c": np.array([], int)})
    with pytest.raises(DataError, match="t: there is no image of class 'b' to train on"):
        Task("t", ["a", "b"], source, rows | {"train": np.array([0])})


def embeddings(source, without=()):
    """Features that tell the row of their image."""
    kept = [row for row in range(len(source)) if row not in without]
    return FeatureSet(
        ids=[source.ids[row] for row in kept],
        labels=torch.as_tensor(source.labels)[kept],
        label_names=source.label_names,
        image=torch.tensor(kept).float()[:, None],
        failures=[(source.ids[row], "broken") for row in without],
    )


def test_one_set_of_features_serves_every_task(tmp_path):
    write(tmp_path, *(f"{name}/{i}.png" for name in ("a_a", "b", "c", "d") for i in range(5)))
    layout = leave_classes_out(tmp_path, [["c"], ["a_a", "d"]], fold_count=5)
    assert len(layout.tasks) == 10
    broken = [7, 12]
    whole = embeddings(layout.source, broken)
    for task in layout.tasks:
        parts = task.features(whole)
        assert list(parts) == list(task.rows)
        for part, found in parts.items():
            rows = [row for row in task.rows[part] if row not in broken]
            assert found.image[:, 0].tolist() == rows
            assert [id for id, _ in found.failures] == [
                layout.source.ids[row] for row in broken if row in task.rows[part]
            ]
            known = part in ("train", "test")
            assert found.label_names == (task.class_names if known else layout.source.label_names)
            expected = task.labels if known else layout.source.labels
            assert found.labels.tolist() == expected[rows].tolist()
    with pytest.raises(DataError, match=r"leave-out-c-.*: the features lack 3 of its 20 images, first '"):
        layout.tasks[0].features(whole[1:])  # the failures are not of the part, either


def test_positions_among_other_ids_are_those_of_the_images(tmp_path):
    write(tmp_path, *(f"{name}/{i}.png" for name in "abc" for i in range(4)))
    task = leave_classes_out(tmp_path, ["c"], fold_count=2).tasks[0]
    ids = [id for id in reversed(task.source.ids) if id != "c/1.png"]
    at = task.rows_among(ids)
    assert {part: [ids[i] for i in rows] for part, rows in at.items()} == {
        part: [id for row in rows if (id := task.source.ids[row]) != "c/1.png"] for part, rows in task.rows.items()
    }
    assert len(at["c"]) == 3


@pytest.mark.filterwarnings("ignore")
def test_features_are_extracted_once_for_all_folds(tmp_path, small_backbone):
    write(tmp_path, *(f"{name}/{i}.png" for name in "abc" for i in range(4)))
    (tmp_path / "a" / "4.png").write_bytes(b"no image")
    layout = leave_classes_out(tmp_path, ["c"], fold_count=2)
    whole = extract(small_backbone, layout.source, {"image"}, on_error="record")
    for task in layout.tasks:
        parts = task.features(whole)
        alone = extract(small_backbone, task.train, {"image"}, on_error="record")
        assert parts["train"].ids == alone.ids
        assert parts["train"].labels.tolist() == alone.labels.tolist()
        assert parts["train"].failures == alone.failures
        torch.testing.assert_close(parts["train"].image, alone.image)
    assert sum(len(task.features(whole)["test"].failures) for task in layout.tasks) == 1


# ---- ISIC

CODES = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
NAMES = ["melanocytic nevus", "melanoma", "dermatofibroma", "vascular lesion"]
COUNTS = {"NV": 30, "MEL": 20, "DF": 10, "VASC": 10, "BCC": 6, "AK": 4, "BKL": 5, "SCC": 3}


def isic_rows():
    """(image, code, lesion): two images per lesion, every seventh image without one."""
    number = 0
    for code, count in COUNTS.items():
        for i in range(count):
            number += 1
            yield f"ISIC_{97 * number % 1000:07d}", code, "" if i % 7 == 6 else f"{code}_{i // 2}"


ROWS = list(isic_rows())


def write_table(path, columns, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def truth_row(image, code):
    return [image, *("1.0" if code == column else "0.0" for column in CODES)]


def write_truth(root, rows):
    write_table(root / "ISIC_2019_Training_GroundTruth.csv", ["image", *CODES], rows)


def write_lesions(root, rows=ROWS):
    rows = [[image, "85", "anterior torso", lesion, "female"] for image, _, lesion in rows]
    columns = ["image", "age_approx", "anatom_site_general", "lesion_id", "sex"]
    write_table(root / "ISIC_2019_Training_Metadata.csv", columns, rows)


@pytest.fixture
def isic(tmp_path):
    """All eight diseases, images numbered in the order of `ROWS`."""
    write(tmp_path, *(f"ISIC_2019_Training_Input/{image}.jpg" for image, *_ in ROWS))
    write_truth(tmp_path, [truth_row(image, code) for image, code, _ in reversed(ROWS)])
    write_lesions(tmp_path)
    return tmp_path


def test_isic_4_knows_four_diseases_and_tests_every_fold_with_all_others(isic):
    layout = isic_4(isic)
    assert_parts_are_rows_of_the_source(layout)
    assert len(layout.source) == len(ROWS) == 88
    assert [task.name for task in layout.tasks] == [f"isic-4-grouped-{i}" for i in range(1, 6)]
    code = {f"{image}.jpg": code for image, code, _ in ROWS}
    number = {f"{image}.jpg": number for number, (image, *_) in enumerate(ROWS)}
    for task in layout.tasks:
        assert task.class_names == NAMES
        assert list(task.ood) == ["BCC+AK+BKL+SCC"]
        unknown = task.ood["BCC+AK+BKL+SCC"]
        assert Counter(code[id] for id in unknown.ids) == {"BCC": 6, "AK": 4, "BKL": 5, "SCC": 3}
        assert {unknown.label_names[label] for label in unknown.labels} == {
            "basal cell carcinoma", "actinic keratosis", "benign keratosis", "squamous cell carcinoma",
        }  # fmt: skip
        for part in (task.train, task.test):
            assert [["NV", "MEL", "DF", "VASC"][label] for label in part.labels] == [code[id] for id in part.ids]
    assert read(layout.tasks[0].test) == [number[id] for id in layout.tasks[0].test.ids]


def test_isic_folds_share_no_lesion_and_test_every_known_image_once(isic):
    lesion = {f"{image}.jpg": lesion for image, _, lesion in ROWS}
    tested = Counter()
    for task in isic_4(isic).tasks:
        train, test = ({lesion[id] for id in part.ids} - {""} for part in (task.train, task.test))
        assert not train & test
        assert len(task.train) + len(task.test) == 70
        assert min(np.bincount(task.test.labels, minlength=4)) > 0
        tested.update(task.test.ids)
        assert "The folds are grouped: no lesion is in both train and test." in task.notes
    assert sorted(tested.values()) == [1] * 70


def test_isic_stratified_folds_ignore_lesions_and_say_so(isic):
    layout = isic_4(isic, folds="stratified")
    assert [task.name for task in layout.tasks] == [f"isic-4-stratified-{i}" for i in range(1, 6)]
    for task in layout.tasks:
        assert np.bincount(task.test.labels).tolist() == [6, 4, 2, 2]
        assert any(note.startswith("The folds are stratified as in the paper") for note in task.notes)
    lesion = {f"{image}.jpg": lesion for image, _, lesion in ROWS}
    task = layout.tasks[0]
    assert {lesion[id] for id in task.train.ids} & ({lesion[id] for id in task.test.ids} - {""})


def test_isic_without_lesion_ids_is_stratified_and_says_so(isic):
    stratified = isic_4(isic, folds="stratified")
    (isic / "ISIC_2019_Training_Metadata.csv").unlink()
    layout = isic_4(isic)
    assert layout.tasks[4].name == "isic-4-stratified-5"
    for task, other in zip(layout.tasks, stratified.tasks, strict=True):
        assert task.rows["test"].tolist() == other.rows["test"].tolist()
        assert any(note.startswith("No lesion ids are known: the folds are stratified") for note in task.notes)
    assert any("Metadata.csv: there is no file" in note for note in layout.notes)


def test_isic_options(isic):
    assert len(isic_4(isic, fold_count=3).tasks) == 3
    first, other = (isic_4(isic, seed=seed).tasks[0].test.ids for seed in (0, 1))
    assert first == isic_4(isic).tasks[0].test.ids != other
    with pytest.raises(UsageError, match="kind of folds 'random'"):
        isic_4(isic, folds="random")


def test_the_order_of_the_table_does_not_matter(isic):
    before = [task.rows["test"].tolist() for task in isic_4(isic).tasks]
    write_truth(isic, [truth_row(image, code) for image, code, _ in ROWS[30:] + ROWS[:30]])
    write_lesions(isic, ROWS[::-1])
    assert [task.rows["test"].tolist() for task in isic_4(isic).tasks] == before


def test_smaller_copies_and_folders_in_the_folder_are_found(isic):
    folder = isic / "ISIC_2019_Training_Input"
    for image, *_ in ROWS[:40]:
        (folder / f"{image}.jpg").rename(folder / f"{image}_downsampled.jpg")
    whole = isic_4(isic)
    assert sum(id.endswith("_downsampled.jpg") for id in whole.source.ids) == 40
    write_truth(isic, [truth_row(image + "_downsampled" * (i % 2), code) for i, (image, code, _) in enumerate(ROWS)])
    (folder / "deeper").mkdir()
    for path in [*folder.glob("*.jpg")]:
        path.rename(folder / "deeper" / path.name)
    again = isic_4(isic)
    assert again.source.ids == [f"deeper/{id}" for id in whole.source.ids]
    assert [task.rows["test"].tolist() for task in again.tasks] == [task.rows["test"].tolist() for task in whole.tasks]


def test_images_of_no_row_and_of_no_known_disease_are_left_out(isic):
    write(isic, "ISIC_2019_Training_Input/ISIC_9999998.jpg", "ISIC_2019_Training_Input/ISIC_9999999.jpg")
    write_truth(isic, [*(truth_row(image, code) for image, code, _ in ROWS), truth_row("ISIC_9999999", "UNK")])
    layout = isic_4(isic)
    assert len(layout.source) == 88
    assert {"1 images of the class UNK are left out.", "images without a row"} & set(layout.notes)
    assert "1 images without a row in ISIC_2019_Training_GroundTruth.csv are left out." in layout.notes


def test_isic_missing_images_are_named(isic):
    (isic / "ISIC_2019_Training_Input" / f"{ROWS[3][0]}.jpg").unlink()
    with pytest.raises(MissingDataError, match=rf"1 of the 88 images of ISIC.*csv are not in .*first '{ROWS[3][0]}'"):
        isic_4(isic)
    assert [str(row.error)[:16] for row in inspect_layout("isic-4", isic) if row.error] == ["diagnosed images"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda row: [row[0], "1", "1.0", *row[3:]],
            r"more than one disease for 1 of 88 images, first .*NV=1.0, MEL=1;",
        ),
        (lambda row: [row[0], *["0"] * 9], r"no disease for 1 of 88 images, first image=ISIC_0000097;"),
        (lambda row: [row[0], "x", *row[2:]], r"something else than 0 and 1 for 1 of 88 images, .*NV=1.0, MEL=x;"),
        (lambda row: [row[0], "", *row[2:]], r"something else than 0 and 1 for 1 of 88 images"),
        (lambda row: [row[0], "0.5", "0.5", *row[3:]], r"something else than 0 and 1"),
        (lambda row: ["", *row[1:]], r"has no image in data row 1\."),
        (lambda row: [ROWS[1][0] + "_downsampled", *row[1:]], rf"lists '{ROWS[1][0]}' more than once"),
    ],
)
def test_isic_rows_that_make_no_sense_are_refused(isic, change, reason):
    rows = [truth_row(image, code) for image, code, _ in ROWS]
    write_truth(isic, [change(rows[0]), *rows[1:]])
    with pytest.raises(DataError, match=rf"^ISIC_2019_Training_GroundTruth.csv: .*GroundTruth\.csv' .*{reason}"):
        isic_4(isic)


def test_isic_tables_need_their_columns(isic):
    path = isic / "ISIC_2019_Training_GroundTruth.csv"
    write_table(path, ["image", "MEL", "NV"], [["a", 1, 0]])
    with pytest.raises(DataError, match="has no column DF, VASC, BCC, AK, BKL, SCC; its columns are image, MEL, NV"):
        isic_4(isic)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"GroundTruth\.csv' cannot be read as CSV"):
        isic_4(isic)
    path.unlink()
    with pytest.raises(MissingDataError, match=r"there is no file .*GroundTruth\.csv'; get it: https"):
        isic_4(isic)


def test_a_table_of_eight_classes_without_unk_will_do(isic):
    rows = [truth_row(image, code)[:-1] for image, code, _ in ROWS]
    write_table(isic / "ISIC_2019_Training_GroundTruth.csv", ["image", *CODES[:-1]], rows)
    assert len(isic_4(isic).source) == 88


def test_metadata_without_lesions_is_an_error_not_a_leak(isic):
    write_table(isic / "ISIC_2019_Training_Metadata.csv", ["image", "sex"], [["a", "female"]])
    with pytest.raises(DataError, match=r"Metadata\.csv' has no column lesion_id; its columns are image, sex"):
        isic_4(isic)


def test_isic_copies_of_an_image_are_refused(isic):
    write(isic, f"ISIC_2019_Training_Input/copy/{ROWS[0][0]}_downsampled.jpg")
    with pytest.raises(DataError, match=rf"holds '{ROWS[0][0]}' more than once"):
        isic_4(isic)


def test_isic_with_too_few_lesions_of_a_disease_names_it(isic):
    write_lesions(isic, [(image, code, "one" if code == "DF" else lesion) for image, code, lesion in ROWS])
    with pytest.raises(DataError, match=r"Class 'dermatofibroma' has 1 lesions .* too few for 5 folds"):
        isic_4(isic)
    assert len(isic_4(isic, folds="stratified").tasks) == 5


def test_the_dry_run_counts_what_is_there(isic):
    found = {row.name: row for row in inspect_layout("isic-4", isic)}
    assert {name: (row.images, row.expected) for name, row in found.items()} == {
        "ISIC_2019_Training_Input": (88, 25_331), "ISIC_2019_Training_GroundTruth.csv": (88, 25_331),
        "ISIC_2019_Training_Metadata.csv": (80, None), "diagnosed images": (88, 25_331),
        "NV": (30, 12_875), "MEL": (20, 4_522), "DF": (10, 239), "VASC": (10, 253),
        "BCC": (6, 3_323), "AK": (4, 867), "BKL": (5, 2_624), "SCC": (3, 628),
    }  # fmt: skip
    assert found["NV"].path == isic / "ISIC_2019_Training_Input"
    layout = find_layout("isic-4", isic)
    assert {"NV: 30, not 12,875.", "ISIC_2019_Training_Input: 88, not 25,331."} < set(layout.notes)
    text = layout.describe()
    assert text.startswith("isic-4: 88 images, 5 tasks\n" + describe(layout.found))
    assert f"isic-4-grouped-1: 4 classes, train {len(layout.tasks[0].train)}, test " in text
    assert text.count("Note: The folds are grouped") == 1


def test_the_dry_run_of_an_empty_folder_names_everything(tmp_path):
    found = inspect_layout("isic-4", tmp_path)
    assert [(row.name, row.path, row.images) for row in found] == [
        ("ISIC_2019_Training_Input", None, 0), ("ISIC_2019_Training_GroundTruth.csv", None, 0),
        ("ISIC_2019_Training_Metadata.csv", None, 0),
    ]  # fmt: skip
    with pytest.raises(MissingDataError, match=r"Input: there is no folder .*GroundTruth\.csv: there is no file"):
        isic_4(tmp_path)
    for name in list_layouts():
        assert all(row.error for row in inspect_layout(name, tmp_path))
        with pytest.raises(MissingDataError, match=r"There is no folder .*nowhere'; give the folder that holds"):
            inspect_layout(name, tmp_path / "nowhere")


def test_unknown_layouts_are_refused(tmp_path):
    assert list_layouts() == ["isic-4", "skin-40", "nct-crc"]
    for function in (inspect_layout, find_layout):
        with pytest.raises(UsageError, match=r"Unknown layout 'isic4'\. Did you mean 'isic-4'"):
            function("isic4", tmp_path)


# ---- SD-198


def write_sd198(root, counts):
    """All images are the same."""
    for name, count in counts.items():
        folder = root / "SD-198/images" / name
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{name}_{i:03d}.jpg").write_bytes(PICTURE)


SMALL = {"Acne_Vulgaris": 6, "Blue Nevus": 5, "Eczema": 4, "Psoriasis": 6, "Tinea_Pedis": 3}


@pytest.fixture
def sd198(tmp_path):
    """Five classes and lists of two of them, train and test."""
    write_sd198(tmp_path, SMALL)
    (tmp_path / "skin40_classes.txt").write_text("Psoriasis\nBlue_Nevus\n")
    train = ["images/Psoriasis/Psoriasis_000.jpg 0", "images/Psoriasis/Psoriasis_004.jpg 0"]
    train += [f"images/Blue Nevus/Blue Nevus_{i:03d}.jpg 1" for i in (3, 1)]
    (tmp_path / "skin40_train.txt").write_text("\n".join(train) + "\n")
    test = ["images/Blue Nevus/Blue Nevus_000.jpg 1\n", "images/Psoriasis/Psoriasis_001.jpg 0\n\n"]
    (tmp_path / "skin40_test.txt").write_text("".join(test))
    return tmp_path


def test_skin_40_follows_its_lists(sd198):
    layout = skin_40(sd198)
    assert_parts_are_rows_of_the_source(layout)
    (task,) = layout.tasks
    assert (task.name, task.class_names) == ("skin-40", ["Psoriasis", "Blue Nevus"])
    assert task.train.ids == [
        "Blue Nevus/Blue Nevus_001.jpg", "Blue Nevus/Blue Nevus_003.jpg",
        "Psoriasis/Psoriasis_000.jpg", "Psoriasis/Psoriasis_004.jpg",
    ]  # fmt: skip
    assert task.train.labels.tolist() == [1, 1, 0, 0]
    assert task.test.ids == ["Blue Nevus/Blue Nevus_000.jpg", "Psoriasis/Psoriasis_001.jpg"]
    unknown = Counter(id.partition("/")[0] for id in task.ood["other classes"].ids)
    assert unknown == {"Acne_Vulgaris": 6, "Eczema": 4, "Tinea_Pedis": 3}
    assert not any("official" in note for note in task.notes)
    assert "skin40_classes.txt: 2, not 40." in task.notes


def test_lists_may_be_in_the_folder_and_their_paths_start_anywhere(sd198):
    before = skin_40(sd198).tasks[0]
    for name in ("skin40_classes.txt", "skin40_train.txt", "skin40_test.txt"):
        text = (sd198 / name).read_text().replace("images/", "C:\\x\\SD-198\\images\\" if "test" in name else "")
        (sd198 / name).unlink()
        (sd198 / "SD-198" / name).write_text(text)
    task = skin_40(sd198).tasks[0]
    assert {part: rows.tolist() for part, rows in task.rows.items()} == {
        part: rows.tolist() for part, rows in before.rows.items()
    }


def test_without_the_class_list_classes_are_in_the_order_of_their_labels(sd198):
    (sd198 / "skin40_classes.txt").unlink()
    assert skin_40(sd198).tasks[0].class_names == ["Psoriasis", "Blue Nevus"]
    for name in ("skin40_train.txt", "skin40_test.txt"):
        text = (sd198 / name).read_text()
        (sd198 / name).write_text(text.replace("jpg 0", "jpg 10").replace("jpg 1\n", "jpg 9\n"))
    assert skin_40(sd198).tasks[0].class_names == ["Blue Nevus", "Psoriasis"]
    for name in ("skin40_train.txt", "skin40_test.txt"):
        text = (sd198 / name).read_text()
        (sd198 / name).write_text(text.replace("jpg 10", "jpg a").replace("jpg 9", "jpg b"))
    assert skin_40(sd198).tasks[0].class_names == ["Blue Nevus", "Psoriasis"]


def test_lists_that_make_no_sense_are_refused(sd198):
    train, classes = sd198 / "skin40_train.txt", sd198 / "skin40_classes.txt"
    text = train.read_text()
    train.write_text(text + "images/Eczema/Eczema_000.jpg 2\n")
    with pytest.raises(DataError, match=r"hold 'Eczema/Eczema_000\.jpg', which is of none of the 2 classes"):
        skin_40(sd198)
    train.write_text(text + "images/Eczema/Eczema_099.jpg 2\n")
    with pytest.raises(MissingDataError, match=r"1 of the 5 images of .*are not there, first 'Eczema/Eczema_099\.jpg'"):
        skin_40(sd198)
    train.write_text(text + "Eczema\n")
    with pytest.raises(DataError, match=r"has the line 'Eczema'; write path, space, label"):
        skin_40(sd198)
    train.write_text(text + "images/Psoriasis/Psoriasis_001.jpg 0\n")
    with pytest.raises(DataError, match=r"1 images are in 'train' and 'test', first 'Psoriasis/Psoriasis_001\.jpg'"):
        skin_40(sd198)
    train.write_text(text)
    classes.write_text("Psoriasis\nPsoriosis\n")
    with pytest.raises(DataError, match=r"has 1 classes without a folder of images, first 'Psoriosis'"):
        skin_40(sd198)
    classes.write_text("Blue Nevus\nPsoriasis\nBlue_Nevus\n")
    with pytest.raises(DataError, match="names a class more than once"):
        skin_40(sd198)
    classes.unlink()
    train.write_text(text.replace("Psoriasis_004.jpg 0", "Psoriasis_004.jpg 1"))
    with pytest.raises(DataError, match="put '1' with both 'Blue Nevus' and 'Psoriasis'"):
        skin_40(sd198)
    train.write_text(text.replace("Psoriasis_004.jpg 0", "Psoriasis_004.jpg 3"))
    with pytest.raises(DataError, match="put 'Psoriasis' with both '0' and '3'"):
        skin_40(sd198)


def test_one_list_without_the_other_is_refused(sd198):
    (sd198 / "skin40_test.txt").unlink()
    with pytest.raises(MissingDataError, match=r"skin40_test\.txt: there is no file"):
        skin_40(sd198)


@pytest.fixture
def large(tmp_path):
    """42 classes: two of 66 images, 37 of 60, two of 30 and one of 12."""
    counts = {f"C{i:02d}": 60 for i in range(3, 40)}
    write_sd198(tmp_path, {"Z_z": 66, "Y": 66} | counts | {"B": 30, "A": 30, "D": 12})
    return tmp_path


def test_skin_40_without_lists_takes_the_largest_classes_and_says_so(large):
    layout = skin_40(large)
    assert_parts_are_rows_of_the_source(layout)
    (task,) = layout.tasks
    assert task.class_names == ["A", *(f"C{i:02d}" for i in range(3, 40)), "Y", "Z z"]
    assert Counter(id.partition("/")[0] for id in task.ood["other classes"].ids) == {"B": 30, "D": 12}
    train, test = (np.bincount(part.labels).tolist() for part in (task.train, task.test))
    assert (train, test) == ([25] + [50] * 39, [5] + [10] * 39)
    notes = [note for note in task.notes if "official" in note]
    assert notes == [
        "The classes are the 40 with most images: not the official choice of Skin-40.",
        "The images are drawn with seed 0: not the official split of Skin-40.",
    ]
    again, other = skin_40(large).tasks[0], skin_40(large, seed=1).tasks[0]
    assert again.test.ids == task.test.ids != other.test.ids
    assert "The images are drawn with seed 1: not the official split of Skin-40." in other.notes


def test_skin_40_with_the_class_list_alone_draws_from_these(large):
    (large / "skin40_classes.txt").write_text("D\nB\n")
    task = skin_40(large).tasks[0]
    assert (task.class_names, len(task.train), len(task.test)) == (["D", "B"], 10 + 25, 2 + 5)
    assert len(task.ood["other classes"]) == 2 * 66 + 37 * 60 + 30
    assert [note for note in task.notes if "official" in note] == [
        "The images are drawn with seed 0: not the official split of Skin-40."
    ]


def test_skin_40_refuses_too_few_classes_or_images(tmp_path):
    write_sd198(tmp_path, SMALL | {"One": 1})
    with pytest.raises(DataError, match="SD-198 has 6 class folders here, and 40 known ones leave none unknown"):
        skin_40(tmp_path)
    (tmp_path / "skin40_classes.txt").write_text("Eczema\nOne\n")
    with pytest.raises(DataError, match="Class 'One' has 1 images; at least 2"):
        skin_40(tmp_path)
    (tmp_path / "skin40_classes.txt").write_text("\n".join([*SMALL, "One"]))
    (tmp_path / "SD-198/images/One/b.jpg").write_bytes(picture())
    with pytest.raises(DataError, match="there is no image for 'other classes'"):
        skin_40(tmp_path)


def test_the_dry_run_of_skin_40(sd198):
    (sd198 / "skin40_test.txt").unlink()
    found = {row.name: row for row in inspect_layout("skin-40", sd198)}
    assert {name: (row.images, row.expected) for name, row in found.items()} == {
        "images": (24, 6584), "skin40_classes.txt": (2, 40), "skin40_train.txt": (4, None),
        "skin40_test.txt": (0, None),
    }  # fmt: skip
    assert found["skin40_train.txt"].path == sd198 / "skin40_train.txt"


# ---- NCT-CRC

TISSUES = ["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"]


@pytest.fixture
def nct(tmp_path):
    """Four training and two test images of every tissue, numbered throughout."""
    names = [f"NCT-CRC-HE-100K/{tissue}/{tissue}-{i}.tif" for tissue in TISSUES for i in range(4)]
    names += [f"CRC-VAL-HE-7K/{tissue}/{tissue}-TEST-{i}.tif" for tissue in TISSUES for i in range(2)]
    write(tmp_path, *names)
    return tmp_path


def test_nct_crc_has_three_tasks_that_leave_every_tissue_out_once(nct):
    layout = find_layout("nct-crc", nct)
    assert_parts_are_rows_of_the_source(layout)
    assert len(layout.source) == 54
    assert [task.name for task in layout.tasks] == [
        "nct-crc-ADI+BACK+DEB", "nct-crc-LYM+MUC+MUS", "nct-crc-NORM+STR+TUM",
    ]  # fmt: skip
    for task, triple in zip(layout.tasks, OOD_TRIPLES, strict=True):
        (unknown,) = task.ood.values()
        assert [id.split("/")[:2] for id in unknown.ids] == [["CRC-VAL-HE-7K", t] for t in triple for _ in range(2)]
        known = [tissue for tissue in TISSUES if tissue not in triple]
        assert [id.split("/")[:2] for id in task.train.ids] == [["NCT-CRC-HE-100K", t] for t in known for _ in range(4)]
        assert [id.split("/")[:2] for id in task.test.ids] == [["CRC-VAL-HE-7K", t] for t in known for _ in range(2)]
        assert task.train.labels.tolist() == np.repeat(np.arange(6), 4).tolist()
        assert any("ADI+BACK+DEB, LYM+MUC+MUS, NORM+STR+TUM; the paper does not say" in note for note in task.notes)
    assert layout.tasks[0].class_names == [
        "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa", "cancer-associated stroma",
        "colorectal adenocarcinoma epithelium",
    ]  # fmt: skip
    assert layout.tasks[1].class_names[:3] == ["adipose tissue", "background", "debris"]
    assert read(layout.tasks[2].test) == list(range(36, 48))


def test_nct_triples_are_an_option(nct):
    layout = nct_crc(nct, ood_triples=[["TUM", "ADI"], ["DEB"]])
    assert [list(task.ood) for task in layout.tasks] == [["ADI+TUM"], ["DEB"]]
    assert [len(task.class_names) for task in layout.tasks] == [7, 8]
    for triples, reason in {
        (("ADI", "BAK", "DEB"),): "Unknown tissue 'BAK'. Did you mean 'BACK'",
        (): "names no task",
        ((),): "one tissue must be unknown",
        (tuple(TISSUES[:8]),): "two known at least",
        ("ADI",): "ood_triples holds 'ADI': give a list of tissues for each task",
    }.items():
        with pytest.raises(UsageError) as error:
            nct_crc(nct, ood_triples=triples)
        assert reason in str(error.value)


def test_nct_folders_that_are_missing_or_of_other_names_are_named(nct):
    write(nct, "CRC-VAL-HE-7K/OTHER/a.tif")
    with pytest.raises(DataError, match=r"^CRC-VAL-HE-7K: .*1 images outside folders named ADI, .*'OTHER/a\.tif'"):
        nct_crc(nct)
    (nct / "CRC-VAL-HE-7K/OTHER").rename(nct / "away")
    (nct / "CRC-VAL-HE-7K/MUS").rename(nct / "MUS")
    with pytest.raises(DataError, match=r"lacks images of MUS; each tissue has a folder"):
        nct_crc(nct)
    (nct / "NCT-CRC-HE-100K").rename(nct / "100K")
    with pytest.raises(MissingDataError, match=r"NCT-CRC-HE-100K: there is no folder .*zenodo.* CRC-VAL-HE-7K: .*MUS"):
        nct_crc(nct)
    found = inspect_layout("nct-crc", nct)
    assert [(row.name, row.images, row.expected) for row in found] == [
        ("NCT-CRC-HE-100K", 0, 100_000), ("CRC-VAL-HE-7K", 0, 7_180),
    ]  # fmt: skip


def test_joined_sources_read_stamp_and_pickle(nct):
    source = find_layout("nct-crc", nct).source
    assert pickle.loads(pickle.dumps(source)).open(0).getpixel((0, 0)) == (36, 0, 0)
    before = source.fingerprint
    (nct / "CRC-VAL-HE-7K/ADI/ADI-TEST-0.tif").write_bytes(b"broken")
    assert find_layout("nct-crc", nct).source.fingerprint != before
    with pytest.raises(ImageError, match=r"ADI-TEST-0\.tif' cannot be read"):
        source.open(0)


def test_joined_sources_keep_unlabelled_images(tmp_path):
    write(tmp_path, "a/x/1.png", "b/1.png", "b/y/2.png", "b/x/3.png")
    joined = JoinedSources({"one": ImageFolder(tmp_path / "a"), "two": ImageFolder(tmp_path / "b")})
    assert joined.ids == ["one/x/1.png", "two/1.png", "two/x/3.png", "two/y/2.png"]
    assert joined.label_names == ["x", "y"]
    assert joined.labels.tolist() == [0, -1, 0, 1]
    assert joined.rows_of("two").tolist() == [1, 2, 3]


# ---- any folder or manifest


@pytest.fixture
def lesions(tmp_path):
    """A manifest of four classes with two images per lesion."""
    rows = [(f"img/{name}/{i}.png", name, f"{name}-{i // 2}") for name in "abcd" for i in range(8)]
    write(tmp_path, *(path for path, *_ in rows))
    write_table(tmp_path / "all.csv", ["path", "label", "lesion_id"], rows)
    return tmp_path, rows


@pytest.mark.parametrize("kind", ["csv", "jsonl", "paths.parquet", "images.parquet"])
def test_lesion_ids_in_any_table_give_grouped_folds(lesions, kind):
    root, rows = lesions
    table = pa.table(dict(zip(["path", "label", "lesion_id"], map(list, zip(*rows, strict=True)), strict=True)))
    if kind == "jsonl":
        (root / "all.jsonl").write_text(table.to_pandas().to_json(orient="records", lines=True))
    elif kind == "images.parquet":
        encoded = pa.array([(root / path).read_bytes() for path, *_ in rows])
        pq.write_table(
            table.append_column("image", encoded).rename_columns(["id", "label", "lesion_id", "image"]),
            root / "all.images.parquet",
        )
    elif kind != "csv":
        pq.write_table(table, root / "all.paths.parquet")
    layout = leave_classes_out(root / f"all.{kind}", ["d"], fold_count=4)
    assert_parts_are_rows_of_the_source(layout)
    lesion = {path: lesion for path, _, lesion in rows}
    for task in layout.tasks:
        assert task.name.startswith("leave-out-d-grouped-")
        assert not {lesion[id] for id in task.train.ids} & {lesion[id] for id in task.test.ids}
        assert len(task.ood["d"]) == 8
    stratified = leave_classes_out(root / f"all.{kind}", ["d"], fold_count=4, folds="stratified").tasks
    assert [task.name for task in stratified] == [f"leave-out-d-stratified-{i}" for i in range(1, 5)]
    leaks = [{lesion[id] for id in task.train.ids} & {lesion[id] for id in task.test.ids} for task in stratified]
    assert any(leaks)


def test_groups_may_be_another_column_or_given(lesions):
    root, rows = lesions
    write_table(root / "p.csv", ["path", "label", "patient"], rows)
    assert leave_classes_out(root / "p.csv", ["d"], fold_count=2).tasks[0].name == "leave-out-d-stratified-1"
    named = leave_classes_out(root / "p.csv", ["d"], groups="patient", fold_count=2).tasks
    given = leave_classes_out(
        root / "p.csv", ["d"], groups={path: lesion for path, _, lesion in rows}, fold_count=2
    ).tasks
    assert named[0].name == given[0].name == "leave-out-d-grouped-1"
    assert named[0].test.ids == given[0].test.ids
    with pytest.raises(
        DataError, match=r"p\.csv' has no column 'patients'; its columns are 'path', 'label', 'patient'"
    ):
        leave_classes_out(root / "p.csv", ["d"], groups="patients")
    with pytest.raises(UsageError, match="groups='patient' names a column, which only a manifest"):
        leave_classes_out(root / "img", ["d"], groups="patient")


def test_held_out_classes_of_a_folder(tmp_path):
    write(tmp_path, *(f"{name}/{i}.png" for name in ("big_cat", "cow", "dog", "eel") for i in range(4)), "stray.png")
    layout = leave_classes_out(tmp_path, ["eel", "big cat"], fold_count=2)
    assert_parts_are_rows_of_the_source(layout)
    assert [task.name for task in layout.tasks] == [f"leave-out-big_cat+eel-stratified-{i}" for i in (1, 2)]
    assert layout.tasks[0].class_names == ["cow", "dog"]
    assert list(layout.tasks[0].ood) == ["big_cat+eel"]
    assert "1 images without a label are left out." in layout.tasks[0].notes
    assert layout.describe().splitlines()[1] == f"images  17  {tmp_path}"
    assert leave_classes_out(ImageFolder(tmp_path), ["eel"], fold_count=2).describe().count("None") == 0


def test_a_list_of_classes_for_each_of_several_tasks(tmp_path):
    write(tmp_path, *(f"{name}/{i}.png" for name in "0123" for i in range(2)))
    pairs = [["0", "1"], ["2"]]
    layout = leave_classes_out(tmp_path, pairs, fold_count=2)
    assert [task.name for task in layout.tasks] == [
        "leave-out-0+1-stratified-1", "leave-out-0+1-stratified-2",
        "leave-out-2-stratified-1", "leave-out-2-stratified-2",
    ]  # fmt: skip
    numbered = leave_classes_out(tmp_path, [[0, 1], [2]], fold_count=2)
    assert [task.rows["test"].tolist() for task in numbered.tasks] == [
        task.rows["test"].tolist() for task in layout.tasks
    ]


def test_a_test_set_of_its_own_makes_one_task(tmp_path):
    write(tmp_path, *(f"train/{name}/{i}.png" for name in "abc" for i in range(3)))
    write(tmp_path, *(f"test/{name}/{i}.png" for name in "abc" for i in range(2)))
    layout = leave_classes_out(tmp_path / "train", [["b"], ["c"]], test=tmp_path / "test")
    assert_parts_are_rows_of_the_source(layout)
    assert [task.name for task in layout.tasks] == ["leave-out-b", "leave-out-c"]
    task = layout.tasks[0]
    assert task.train.ids == [f"train/{name}/{i}.png" for name in "ac" for i in range(3)]
    assert task.test.ids == [f"test/{name}/{i}.png" for name in "ac" for i in range(2)]
    assert task.ood["b"].ids == ["test/b/0.png", "test/b/1.png"]
    with pytest.raises(UsageError, match=r"groups= keeps lesions together in folds, and test= leaves nothing to cut"):
        leave_classes_out(tmp_path / "train", ["b"], test=tmp_path / "test", groups={})
    write(tmp_path, "test/new/1.png")
    with pytest.raises(DataError, match="there is no image of class 'new' to train on"):
        leave_classes_out(tmp_path / "train", ["b"], test=tmp_path / "test")
    assert len(leave_classes_out(tmp_path / "train", ["b", "new"], test=tmp_path / "test").tasks[0].ood["b+new"]) == 3


@pytest.mark.parametrize(
    ("held_out", "reason"),
    [
        (["z"], "Unknown class 'z'. Known: a, b, c."),
        (["a", "b"], "Without a, b there are 1 classes to tell apart; at least 2"),
        ("a", "held_out='a' must be a list of classes, as ['a']"),
        ([], "must name at least one class"),
        ([["a"], []], "must name at least one class"),
        ([["a"], "b"], "mixes classes and lists of classes"),
    ],
)
def test_what_cannot_be_held_out(tmp_path, held_out, reason):
    write(tmp_path, *(f"{name}/{i}.png" for name in "abc" for i in range(5)))
    with pytest.raises(UsageError) as error:
        leave_classes_out(tmp_path, held_out)
    assert reason in str(error.value)


def test_classes_that_cannot_be_cut_into_folds(tmp_path):
    write(tmp_path, *(f"{name}/{i}.png" for name in "abc" for i in range(5)), "d/1.png")
    with pytest.raises(DataError, match="Class 'd' has 1 images, too few for 5 folds"):
        leave_classes_out(tmp_path, ["a"])
    with pytest.raises(UsageError, match="kind of folds 'random'"):
        leave_classes_out(tmp_path, ["d"], test=tmp_path, folds="random")
    (tmp_path / "flat").mkdir()
    write(tmp_path / "flat", "1.png")
    with pytest.raises(DataError, match="no labels to hold classes out of"):
        leave_classes_out(tmp_path / "flat", ["a"])


@pytest.mark.parametrize("name", ["isic", "leave_out", "nct_crc", "registry", "sd198", "survey", "tasks"])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"ood_hvl.layouts.{name}")).failed == 0
