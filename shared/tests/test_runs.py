"""Finished runs are read back, others refused; figures over runs."""

import json
import shutil
import statistics

import numpy as np
import pytest
import torch
from ood_core import create_backbone
from ood_core.data import FewShot, open_source
from ood_core.data.augment import Views
from ood_core.data.joined import JoinedSources
from ood_core.errors import UsageError
from ood_core.features import FeatureSet
from ood_core.reproduction.kept import UsedImages, code_version, kept_runs, recipe
from ood_core.reproduction.studies import spread, study_options
from ood_core.reproduction.tables import percent
from PIL import Image

RECIPE = {"seeds": (0, 1), "options": {"k": 5}}


def never():
    raise AssertionError("it was made again")


def test_a_finished_run_is_read_back(tmp_path):
    file = tmp_path / "deep" / "run.json"
    runs = [{"auroc": 0.1 + 0.2}]
    assert kept_runs(file, RECIPE, lambda: runs) == runs
    assert kept_runs(file, RECIPE, never) == runs
    assert json.loads(file.read_text()) == {"recipe": {"seeds": [0, 1], "options": {"k": 5}}, "runs": runs}


def test_a_run_of_another_recipe_is_refused_and_a_damaged_one_made_again(tmp_path, caplog):
    file = tmp_path / "run.json"
    kept_runs(file, RECIPE, lambda: [])
    with pytest.raises(UsageError, match=r"run\.json is a run with other settings or images: remove it.*k was 5, is 6"):
        kept_runs(file, RECIPE | {"options": {"k": 6}}, never)
    for damage in ("{", "[]", '{"runs": []}', '{"recipe": [], "runs": []}', '{"recipe": {}, "runs": 1}'):
        file.write_text(damage)
        assert kept_runs(file, RECIPE, lambda: [{"x": 1}]) == [{"x": 1}]
        assert "is damaged" in caplog.messages[-1]
    assert kept_runs(file, RECIPE, never) == [{"x": 1}]


def test_nothing_is_kept_without_a_file(tmp_path):
    assert kept_runs(None, RECIPE, lambda: [{"x": 1}]) == [{"x": 1}]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_no_file(tmp_path):
    with pytest.raises(AssertionError, match="made again"):
        kept_runs(tmp_path / "run.json", RECIPE, never)
    assert list(tmp_path.iterdir()) == []


def test_spread():
    values = [0.5, 0.7, 0.9]
    found = spread(values)
    assert found["mean"] == pytest.approx(0.7)
    assert found["std"] == pytest.approx(statistics.stdev(values))
    assert found["high"] - found["mean"] == pytest.approx(4.3027 * 0.2 / 3**0.5, rel=1e-4)  # Student's t, 2 degrees
    assert found["mean"] - found["low"] == pytest.approx(found["high"] - found["mean"])
    assert found["runs"] == 3
    assert spread([0.5]) == {"mean": 0.5, "std": None, "low": None, "high": None, "runs": 1}
    assert spread([0.5, None]) is None


def test_percent():
    assert percent(spread([0.5, 0.7])) == "60.00±14.14"
    assert percent(spread([0.12345])) == "12.35"
    assert percent(None) == ""


# ---- recipes


@pytest.fixture
def folders(tmp_path):
    """ "train" and "test" with two classes of two images each."""
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 255, (9, 9, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / label / f"{number}.bmp")
    return tmp_path


@pytest.fixture(scope="module")
def tiny():
    return create_backbone("tiny")


def made(backbone, folder, **changed):
    given = {
        "code": ["ood_core.combination"],
        "options": {"k": 5, "views": {"count": 2}},
        "template": "a {}",
        "seed": 1,
    }
    names = changed.pop("class_names", ["cat", "dog"])
    images = {name: open_source(folder / name) for name in ("train", "test")} | {"none": None}
    return recipe(backbone, changed.pop("images", images), names, **given | changed)


def test_a_recipe_is_known_again_in_another_process(folders, tiny):
    file = folders / "run.json"
    kept_runs(file, made(tiny, folders), lambda: [{"x": 1}])
    assert kept_runs(file, made(create_backbone("tiny"), folders), never) == [{"x": 1}]
    saved = json.loads(file.read_text())["recipe"]
    assert saved["images"]["train"]["place"] == str(folders / "train")
    assert saved["images"]["train"]["images"] == 4
    assert "ood_core.evaluation" in saved["code"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"template": "no {}"}, r'template was "a \{\}", is "no \{\}"'),
        ({"convention": "released"}, 'convention was "standard", is "released"'),
        ({"options": {"k": 6, "views": {"count": 2}}}, r"options\.k was 5, is 6\."),
        ({"options": {"k": 5, "views": {"count": 3}}}, r"options\.views\.count was 2, is 3\."),
        ({"options": {"k": 5}}, r'options\.views was \{"count": 2\}, is absent'),
        ({"class_names": ["dog", "cat"]}, r"class_names\.sha256 was"),
        ({"class_names": ["cat", "dog", "cow"]}, r"class_names\.count was 2, is 3"),
        ({"code": ["ood_core.combination", "ood_core.errors"]}, r"code\.ood_core\.errors was absent"),
        ({"seed": 2}, r"seed was 1, is 2"),
        ({"shots": 4}, r"shots was absent, is 4"),
        ({"images": {}}, r"images\.test was .*/test \(4 images, .*is absent"),
    ],
)
def test_a_mismatch_says_what_differs(folders, tiny, changed, told):
    file = folders / "run.json"
    kept_runs(file, made(tiny, folders), list)
    with pytest.raises(UsageError, match=told) as caught:
        kept_runs(file, made(tiny, folders, **changed), never)
    assert len(str(caught.value)) < 900


def test_weights_and_precision_count(folders, tiny):
    file = folders / "run.json"
    kept_runs(file, made(tiny, folders), list)
    with pytest.raises(UsageError, match=r'backbone\.dtype was "float32", is "bfloat16"'):
        kept_runs(file, made(create_backbone("tiny", dtype="bfloat16"), folders), never)
    linear = tiny.linear(tiny.linears()[0])
    with linear.edited(linear.weight + 1), pytest.raises(UsageError, match=r"backbone\.fingerprint was"):
        kept_runs(file, made(tiny, folders), never)
    assert kept_runs(file, made(tiny, folders), never) == []


def test_a_copy_of_the_images_is_the_same_and_other_bytes_are_not(folders, tiny):
    file = folders / "run.json"
    kept_runs(file, made(tiny, folders), list)
    shutil.copytree(folders, folders / "copy", copy_function=shutil.copy)  # new file times
    assert kept_runs(file, made(tiny, folders / "copy"), never) == []
    image = folders / "copy" / "test" / "cat" / "0.bmp"
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)  # as long as before
    with pytest.raises(UsageError, match=r"images\.test was .*/test \(4 images, \w{12}\), is .*/copy/test \(4 images"):
        kept_runs(file, made(tiny, folders / "copy"), never)
    (folders / "test" / "cat" / "0.bmp").rename(folders / "test" / "dog" / "2.bmp")
    with pytest.raises(UsageError, match=r"images\.test was"):
        kept_runs(file, made(tiny, folders), never)


def test_bytes_are_read_only_where_file_times_differ(folders, tiny, monkeypatch):
    file = folders / "run.json"
    kept_runs(file, made(tiny, folders), list)
    monkeypatch.setattr("ood_core.data.sources._file_content", never)
    assert kept_runs(file, made(tiny, folders), never) == []


def test_content_of_every_kind_of_source(folders):
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = open_source(folders / "train")
    rows = [{"path": f"train/{id}", "label": id[:3]} for id in plain.ids]
    (folders / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = [(folders / "train" / id).read_bytes() for id in plain.ids]

    def pack(name, images):
        pq.write_table(pa.table({"image": images, "id": list(plain.ids)}), folders / name)
        return open_source(folders / name)

    def sources(folder):
        source = open_source(folder / "train")
        return [
            source,
            source.subset([2, 0]),
            FewShot(source, 1, seed=0),
            Views(source, 2, size=(8, 8)),
            JoinedSources({"a": source, "b": open_source(folder / "test")}),
            open_source(folder / "list.jsonl"),
        ]

    shutil.copytree(folders, folders / "copy", copy_function=shutil.copy)
    before = [source.content for source in sources(folders)]
    assert len(set(before)) == len(before)
    assert [source.content for source in sources(folders / "copy")] == before
    assert all(source.place for source in sources(folders))
    Image.new("RGB", (9, 9)).save(folders / "train" / "dog" / "0.bmp")
    Image.new("RGB", (9, 9)).save(folders / "train" / "dog" / "1.bmp")
    after = [source.content for source in sources(folders)]
    assert not {*before} & {*after}
    assert pack("a.parquet", images).content == pack("b.parquet", images).content
    assert pack("a.parquet", images).content != pack("b.parquet", [*images[:3], images[0]]).content


def test_features_are_known_by_their_values():
    x = torch.eye(2)
    one, other = (FeatureSet(ids=["a", "b"], image=value) for value in (x, x.flip(0)))
    assert UsedImages(one).are(UsedImages(FeatureSet(ids=["a", "b"], image=x.clone())).record())
    assert not UsedImages(one).are(UsedImages(other).record())
    assert not UsedImages(one).are("of an older version")


def test_code_counts_by_what_it_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "some_method"
    package.mkdir()
    (package / "__init__.py").write_text("")

    def version(text):
        (package / "score.py").write_text(text)
        return code_version("some_method")["some_method"]

    plain = version("X = 1\n\ndef f(a):\n    return a + 1\n")
    assert plain == version(
        '"""Of a module."""\nX = 1\n"""Of X."""\ndef f(a):  # why\n    """Adds."""\n\n    return (a + 1)\n'
    )
    assert plain != version("X = 1\n\ndef f(a):\n    return a + 2\n")
    assert plain != version("X = 1\n\ndef f(a):\n    return a - 1\n")
    assert plain != version("X = 1\n\ndef f(a, b=None):\n    return a + 1\n")
    assert code_version("some_method.score")["some_method.score"] != code_version("some_method")["some_method"]
    with pytest.raises(ModuleNotFoundError, match="no_such_method"):
        code_version("no_such_method")


# ---- studies


def test_what_a_study_varies_stands_and_is_said():
    said = []
    settings = {"few": {"prompts": 4}, "none": {"prompts": 0, "loss": 1}, "all": {}}
    rows = study_options(settings, {"prompts": 8, "epochs": 2}, said.append)
    assert rows == {
        "few": {"prompts": 4, "epochs": 2},
        "none": {"prompts": 0, "epochs": 2, "loss": 1},
        "all": {"prompts": 8, "epochs": 2},
    }
    assert said == ["prompts=8 holds in all; the study itself sets it in few, none."]


def test_an_option_that_every_row_sets_is_refused():
    settings = {"k=1": {"k": 1}, "k=2": {"k": 2}}
    with pytest.raises(
        UsageError, match=r"k=3 would count nowhere: the study itself sets it, in k=1, k=2\. Leave it out"
    ):
        study_options(settings, {"k": 3}, never)
    assert study_options({"": {}}, {"k": 3}, never) == {"": {"k": 3}}
