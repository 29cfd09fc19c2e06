"""`ood-setar reproduce` on a miniature of both protocols, to the printed tables and back from what it keeps."""

import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import timm
import torch
from ood_core import create_backbone, create_detector
from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.backbones.timm import TimmBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.data import ImageFolder, open_source, scenes
from ood_core.errors import MissingDataError, UsageError
from ood_core.protocols import find_protocol
from ood_core.scores import ScoreTable
from ood_setar import finetune, reproduce, search
from ood_setar.cli import main
from ood_setar.edit import SeTAREdit
from ood_setar.reproduce import published_table
from PIL import Image

FAR = ["iNaturalist", "SUN", "Places", "Texture"]
WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361"]
VOC = "aeroplane bicycle bird boat bottle cow diningtable dog horse motorbike sheep sofa train tvmonitor".split()  # noqa: SIM905
KINDS = [f"{material} {shape}" for shape in ("star", "ring") for material in scenes.MATERIALS]
QUICK = ["--backbone", "tiny", "--dtype", "float32", "--param", "ratios=[0,0.3]", "--param", "order=visual_only"]
TRAINED = ["--seeds", "3", "4", "--param", "epochs=1", "--param", "rank=2", "--param", "batch_size=3"]
TRAINED += ["--param", "learning_rate=1"]  # steps large enough to be seen in a rounded figure


def write(folder, images):
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")


def write_classes(folder, classes, images):
    for name, own in zip(classes, np.split(images, len(classes)), strict=True):
        write(folder / name, own)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Both protocols as the official code expects them, and labels of two sets; ID scores are higher than most."""
    root = tmp_path_factory.mktemp("data")
    for name, classes, train, test in (("ImageNet1K", WNIDS, 2, 6), ("VOC", VOC, 1, 2)):
        objects = scenes.render(KINDS[: len(classes)], train, seed=train).images
        write_classes(root / f"ID_{name}/val", classes, objects)
        shown = scenes.render_lesions(list(scenes.LESIONS), 7, seed=1).images[: len(classes) * test]
        write_classes(root / f"ID_{name}/test", classes, shown)
    for seed, place in enumerate(
        ("iNaturalist/test/images", "Sun/test/images", "Places/test/images", "COCO/test/images")
    ):
        write(root / f"OOD_{place}", scenes.render([KINDS[-1 - seed]], 7, seed=seed).images)
    write(root / "OOD_Texture/test/images/banded", scenes.textures(8).images)
    write(root / "OOD_ImageNet22K/test/n00000001", scenes.render(["glossy cross"], 5).images)
    labels = {f"{wnid}/{number}.png": f"{wnid} thing" for wnid in WNIDS for number in range(5)}
    (root / "imagenet.json").write_text(json.dumps(labels))
    names = ["beach", "Beach", "forest", "river", "forest", "road", "river"]
    (root / "sun.json").write_text(json.dumps({f"images/{i}.png": name for i, name in enumerate(names)}))
    return root


def call(table, root, out, *arguments, code=0):
    """Run a table, give what it printed."""
    with redirect_stdout(StringIO()) as stdout, redirect_stderr(StringIO()) as stderr:
        common = ["reproduce", "--root", str(root), "--out", str(out), "--table", str(table)]
        assert main([*common, *QUICK, *map(str, arguments)]) == code, stderr.getvalue()
    return SimpleNamespace(out=stdout.getvalue(), err=stderr.getvalue())


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Tests add to it nothing but what the fixtures of the tables put there."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def table_1(root, out):
    """What Table 1 printed."""
    return call(1, root, out)


@pytest.fixture(scope="module")
def table_2(table_1, root, out):
    """What Table 2 printed, the edit that was searched for Table 1 at hand."""
    return call(2, root, out, *TRAINED)


@pytest.fixture
def run(root, out):
    """Run a table on the miniature."""

    def run(table, *arguments, code=0, place=root, into=out):
        return call(table, place, into, *arguments, code=code)

    return run


@pytest.fixture
def nothing_new(monkeypatch):
    """From now on nothing may be computed but what is named."""

    def forbid(*allowed):
        for module, name in (
            (search, "search"),
            (finetune, "finetune"),
            (reproduce, "evaluate"),
            (reproduce, "accuracy"),
        ):
            if name not in allowed:
                monkeypatch.setattr(module, name, refused(name))

    def refused(name):
        def call(*_, **__):
            raise AssertionError(f"{name} was called")

        return call

    return forbid


def rows_of(printed):
    """Label -> cells of a printed table."""
    return {cells[0]: cells[1:] for line in printed.splitlines() if len(cells := re.split(r"  +", line)) > 1}


def released_fpr(known, other):
    """The rule in words: of all values as thresholds the one whose recall is nearest 95 %, then the lowest."""
    values = np.unique(np.concatenate([known, other]))
    recall = np.array([(known >= value).mean() for value in values])
    distance = abs(recall - 0.95)
    best = np.flatnonzero(np.isclose(distance, distance.min(), rtol=0, atol=1e-12))
    best = best[recall[best] == recall[best].max()]
    return (other >= values[best].min()).mean()


def standard_fpr(known, other):
    accepting = [value for value in known if (known >= value).mean() >= 0.95 - 1e-12]
    return (other >= max(accepting)).mean()


def auroc(known, other):
    return ((known[:, None] > other).mean() + (known[:, None] == other).mean() / 2).item()


def figures(folder, score, sets, fpr=released_fpr):
    """FPR95 and AUROC in percent by set and on average, from the scores that were written."""
    table = ScoreTable.read(folder / "scores.parquet")
    known = table.scores(score, "id")
    found = {name: (fpr(known, table.scores(score, name)), auroc(known, table.scores(score, name))) for name in sets}
    found["average"] = tuple(np.mean(list(found.values()), 0))
    return {name: tuple(100 * value for value in pair) for name, pair in found.items()}


def printed(pairs):
    return [" / ".join(f"{value:.2f}" for value in pair) for pair in pairs.values()]


def as_published(row):
    shown = [row["ood"].get(name) for name in row["ood"]] + [row["average"]]
    return ["" if f is None else f"{f['fpr95']:.2f} / {f['auroc']:.2f}" for f in shown]


def single(paths):
    (path,) = paths
    return path


# ---- Table 1


def test_table_1_prints_both_protocols_beside_the_published_rows(table_1, out):
    found = table_1
    assert "no published options for this, so our defaults; k=0.3 C, ratios=[0, 0.3], order=visual_only" in found.err
    assert "an average FPR95 of 35.47 where its columns give 35.60" in found.err
    tables = re.split(r"(?=^Pascal-VOC)", found.out, flags=re.MULTILINE)
    for table, protocol, title in zip(
        tables, ("setar-imagenet-1k", "setar-voc"), ("ImageNet1K", "Pascal-VOC"), strict=True
    ):
        header = re.split(r"  +", table.splitlines()[0])
        assert header[0] == f"{title}, tiny: released FPR95 / AUROC"
        sets, rows = header[1:-1], rows_of(table)
        for method in ("vanilla", "SeTAR"):
            folder = single((out / protocol / "tiny").glob(f"{method}*")) / "mcm+gl_mcm"
            for score in ("mcm", "gl_mcm"):
                assert rows[f"{score}, {method}, ours"] == printed(figures(folder, score, sets))
                standard = figures(folder, score, sets, standard_fpr)
                assert rows[f"{score}, {method}, ours, standard FPR95"] == printed(standard)
        published = [row for row in published_table(1)["rows"] if row["id"] == title]
        for row in published:
            origin = "published" + (f", {row['origin']}" if row["origin"] else "")
            cells = rows[f"{row['score']}, {row['method']}, {origin}, CLIP ViT-B/16"]
            assert cells == [cell for cell in as_published(row) if cell]  # Places of two VOC rows is empty
        assert len(rows) == 1 + 2 * 2 * 2 + len(published)
    order = list(rows_of(tables[1]))[1:7]
    assert order == [
        "mcm, vanilla, ours",
        "mcm, vanilla, ours, standard FPR95",
        "mcm, vanilla, published, cited, CLIP ViT-B/16",
        "mcm, vanilla, published, rerun, CLIP ViT-B/16",
        "mcm, SeTAR, ours",
        "mcm, SeTAR, ours, standard FPR95",
    ]


def test_the_two_rules_differ_here(table_1, out):
    """So the figures above tell them apart."""
    folder = out / "setar-voc" / "tiny" / "vanilla" / "mcm+gl_mcm"
    sets = [*FAR, "ImageNet22K", "COCO"]
    both = [figures(folder, score, sets, rule) for rule in (released_fpr, standard_fpr) for score in ("mcm", "gl_mcm")]
    assert both[:2] != both[2:]


def test_the_edit_that_was_searched_is_kept_and_is_what_was_judged(table_1, out, root):
    folder = single((out / "setar-voc" / "tiny").glob("SeTAR"))
    edit = SeTAREdit.from_pretrained(folder)
    assert list(edit.ratios) == [f"visual.{layer}.up" for layer in (3, 2, 1, 0)]
    assert set(edit.ratios.values()) == {0.0, 0.3}
    settings = edit.record["search"]
    assert (settings["images"]["count"], settings["class_names"]) == (14, VOC)
    assert (settings["objective"]["k"], settings["objective"]["weight"]) == (4, 0.1)
    assert (folder / "search.jsonl").is_file()
    backbone = edit.apply(create_backbone("tiny", dtype="float32"))
    detector = create_detector("mcm", backbone=backbone, class_names=VOC, template="a photo of a {}")
    expected = detector.score(ImageFolder(root / "OOD_COCO/test/images"), progress=False)
    found = ScoreTable.read(folder / "mcm+gl_mcm" / "scores.parquet").scores("mcm", "COCO")
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_rerun_reads_everything_and_json_is_the_same_table(table_1, run, nothing_new):
    before = table_1.out
    nothing_new()
    assert run(1).out == before
    found = json.loads(run(1, "--json").out)
    assert (found["table"], found["unit"]) == (1, "percent")
    assert [(one["protocol"], one["id"]) for one in found["results"]] == [
        ("setar-imagenet-1k", "ImageNet1K"),
        ("setar-voc", "Pascal-VOC"),
    ]
    imagenet, voc = found["results"]
    assert (imagenet["backbone"], imagenet["architecture"], imagenet["sets"]) == ("tiny", None, FAR)
    assert voc["options"] == {"ratios": [0, 0.3], "order": "visual_only"}
    assert len(voc["ratios"]) == 4
    row = next(row for row in voc["rows"] if (row["score"], row["method"]) == ("gl_mcm", "SeTAR"))
    cells = rows_of(before.partition("Pascal-VOC")[2])["gl_mcm, SeTAR, ours"]
    assert cells == [f"{one['fpr95']:.2f} / {one['auroc']:.2f}" for one in (*row["sets"].values(), row["average"])]


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--param", "ratios=[0,0.2]"], "SeTAR/run.json .* options.ratios was [0, 0.3], is [0, 0.2]."),
        (["--param", "ood_weight=0.2"], "SeTAR/run.json .* options.ood_weight was absent, is 0.2."),
        (["--template", "a {}"], 'SeTAR/run.json .* template was "a photo of a {}", is "a {}".'),
        (["--param", "local_weight=0.5"], "mcm+gl_mcm/run.json .* options.gl_mcm.local_weight was absent, is 0.5."),
        (["--set", "COCO=ROOT/OOD_Texture/test/images"], "mcm+gl_mcm/run.json .* images.COCO was .* (7 images"),
        (["--set", "train=ROOT/ID_VOC/test"], "SeTAR/run.json .* images.train was .* (14 images"),
        (["--dtype", "bfloat16"], 'SeTAR/run.json .* backbone.dtype was "float32", is "bfloat16".'),
    ],
)
def test_kept_runs_of_other_settings_or_images_are_refused(arguments, difference, table_1, run, root, nothing_new):
    nothing_new()
    found = run(1, "--protocol", "setar-voc", *(one.replace("ROOT", str(root)) for one in arguments), code=2)
    assert re.search(re.escape(difference).replace(r"\.\*", ".*"), found.err.splitlines()[-1])
    assert "remove it, or give another folder" in found.err
    assert not found.out


def test_changed_code_is_refused_too(table_1, run, nothing_new, monkeypatch):
    nothing_new()
    monkeypatch.setattr(reproduce, "_CODE", (*reproduce._CODE, "ood_setar.plot"))
    assert "code.ood_setar.plot was absent" in run(1, "--protocol", "setar-voc", code=2).err


def test_what_figures_do_not_depend_on_computes_nothing_anew(table_1, run, root, tmp_path, nothing_new):
    """Options of the training, of reading images, and where the same images lie."""
    nothing_new()
    arguments = ["--protocol", "setar-voc", "--param", "batch_size=7", "--batch-size", "32", "--seeds", "9"]
    before = run(1, *arguments).out
    shutil.copytree(root / "OOD_COCO", tmp_path / "copy")
    assert run(1, *arguments, "--set", f"COCO={tmp_path}/copy/test/images").out == before


def test_other_scores_are_judged_beside_those_kept(table_1, run, nothing_new):
    nothing_new()
    with pytest.raises(AssertionError, match="evaluate was called"):
        run(1, "--protocol", "setar-voc", "--scores", "mcm")


def test_an_interrupted_search_goes_on_from_its_log(run, tmp_path, monkeypatch):
    arguments = [1, "--protocol", "setar-voc", "--scores", "mcm"]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(SeTAREdit, "save_pretrained", interrupted)
    run(*arguments, into=tmp_path, code=130)
    log = single(tmp_path.rglob("search.jsonl"))
    before = log.read_text()
    assert not (log.parent / "edit.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr("ood_setar.search.Trials.measure", interrupted)
    run(*arguments, into=tmp_path)
    assert log.read_text() == before
    assert (log.parent / "edit.json").is_file()


# ---- Tables 2 and 3


def test_table_2_is_mean_and_spread_over_the_seeds(table_2, out):
    rows = rows_of(table_2.out)
    for method in ("LoRA", "SeTAR+FT"):
        folders = sorted((out / "setar-imagenet-1k" / "tiny").glob(f"{method}-seed-*"))
        assert [folder.name.split("-")[2] for folder in folders] == ["3", "4"]
        assert not list(out.rglob("checkpoint.safetensors"))
        for score in ("mcm", "gl_mcm"):
            runs = [figures(folder / "mcm+gl_mcm", score, FAR) for folder in folders]
            cells = []
            for name in (*FAR, "average"):
                values = np.array([run[name] for run in runs])
                means, spreads = values.mean(0), values.std(0, ddof=1)
                cells.append(" / ".join(f"{m:.2f}+-{s:.2f}" for m, s in zip(means, spreads, strict=True)))
            assert rows[f"{score}, {method}, ours"] == cells
            assert spreads.max() > 0  # the FPR of a few images may be the same twice
    edits = [SeTAREdit.from_pretrained(folder) for folder in folders]
    assert [edit.record["finetune"]["seed"] for edit in edits] == [3, 4]
    assert {edit.record["finetune"]["batch_size"] for edit in edits} == {3}
    assert edits[0].ratios == SeTAREdit.from_pretrained(single(folders[0].parent.glob("SeTAR"))).ratios
    assert rows["mcm, SeTAR+FT, published, CLIP ViT-B/16"] == ["38.77+-0.22 / 91.55+-0.01"]
    assert rows["gl_mcm, LoCoOp, published, rerun, CLIP ViT-L/14"] == ["46.74+-4.19 / 89.32+-0.80"]
    assert list(rows)[-1].startswith("gl_mcm, LoCoOp")  # what we do not run comes last
    assert "Pascal-VOC" not in table_2.out


def test_trained_models_are_kept_by_seed_and_options(table_2, run, nothing_new):
    nothing_new()
    assert run(2, *TRAINED).out == table_2.out
    with pytest.raises(AssertionError, match="finetune was called"):
        run(2, *TRAINED, "--seeds", 3, 6)
    found = run(2, *TRAINED, "--param", "learning_rate=0.02", code=2)
    assert "LoRA-seed-3/run.json" in found.err
    assert "options.learning_rate was 1, is 0.02." in found.err
    assert "start.lora.rank was 2, is 3" in run(2, *TRAINED, "--param", "rank=3", code=2).err


def test_table_3_has_neg_label_and_published_averages(table_1, run, out):
    words = ["--param", "max_words=120", "--param", "groups=3"]
    rows = rows_of(run(3, "--protocol", "setar-voc", *words).out)
    sets = [*FAR, "ImageNet22K", "COCO"]
    for method in ("vanilla", "SeTAR"):
        folder = single((out / "setar-voc" / "tiny").glob(f"{method}*/mcm+gl_mcm+neg_label"))
        assert rows[f"neg_label, {method}, ours"] == printed(figures(folder, "neg_label", sets))
        results = json.loads((folder / "results.json").read_text())
        assert results["detectors"]["neg_label"]["params"]["groups"] == 3
        assert results["detectors"]["neg_label"]["template"] == "the nice {}"
        assert results["detectors"]["mcm"]["template"] == "a photo of a {}"
    assert rows["mcm, vanilla, published, CLIP ViT-L/14"] == ["52.21 / 91.68"]
    assert rows["gl_mcm, SeTAR, published, CLIP ViT-L/14"] == ["31.12 / 94.00"]
    assert not any(label.startswith("neg_label, ") and "published" in label for label in rows)


# ---- Table 4


def nearest_name_accuracy(backbone, source, ids, labels):
    """Each image by itself against the prompts of all names, capitals aside."""
    names = sorted({label.casefold() for label in labels.values()})
    text = backbone.encode_text([f"a photo of a {name}" for name in names])
    hits = []
    for id, image in source:
        if (path := ids(id)) in labels:
            best = (backbone.encode_image(backbone.transform(image)[None]) @ text.T).argmax().item()
            hits.append(names[best] == labels[path].casefold())
    return 100 * np.mean(hits)


def test_table_4_is_the_accuracy_on_labelled_sets(table_2, run, root, out, nothing_new):
    nothing_new("accuracy")
    labels = ["--labels", f"ImageNet1K={root}/imagenet.json", f"SUN={root}/sun.json"]
    found = run(4, *TRAINED, *labels)
    rows = rows_of(found.out)
    base = create_backbone("tiny", dtype="float32")
    imagenet, sun = open_source(root / "ID_ImageNet1K/test"), open_source(root / "OOD_Sun/test/images")
    contents = [json.loads((root / name).read_text()) for name in ("imagenet.json", "sun.json")]

    def accuracies(backbone):
        one = nearest_name_accuracy(backbone, imagenet, lambda id: id, contents[0])
        two = nearest_name_accuracy(backbone, sun, lambda id: f"images/{id}", contents[1])
        return np.array([one, two, (one + two) / 2])

    folder = out / "setar-imagenet-1k" / "tiny"
    edit = SeTAREdit.from_pretrained(single(folder.glob("SeTAR")))
    assert any(edit.ratios.values())
    assert rows["vanilla, ours"] == [f"{value:.2f}" for value in accuracies(base)]
    assert rows["SeTAR, ours"] == [f"{value:.2f}" for value in accuracies(edit.apply(base))]
    tuned = [SeTAREdit.from_pretrained(one).apply(base) for one in sorted(folder.glob("SeTAR+FT-seed-[34]"))]
    lora = [SeTAREdit.from_pretrained(one).apply(base) for one in sorted(folder.glob("LoRA-seed-[34]"))]
    for method, models in (("SeTAR+FT", tuned), ("LoRA", lora)):
        runs = np.array([accuracies(one) for one in models])
        cells = [f"{mean:.2f}+-{std:.2f}" for mean, std in zip(runs.mean(0), runs.std(0, ddof=1), strict=True)]
        assert rows[f"{method}, ours"] == cells
    assert rows["LoRA, published, CLIP ViT-B/16"] == ["65.43", "76.86"]
    assert rows["LoCoOp, published, CLIP ViT-B/16"] == ["64.93", "75.89"]  # its average is over four sets
    nothing_new()
    assert run(4, *TRAINED, *labels).out == found.out
    with pytest.raises(AssertionError, match="accuracy was called"):
        run(4, *TRAINED, *labels, f"Places={root}/sun.json")


# ---- what is given or missing


def test_a_dry_run_says_what_is_there(run, root):
    found = run(1, "--dry-run").out
    lines = found.splitlines()
    assert lines[0] == "setar-imagenet-1k"
    assert re.fullmatch(rf"train +8 of 1,000  {root}/ID_ImageNet1K/val  \(the count differs\)", lines[1])
    assert lines[7] == "setar-voc"
    assert "5 of 18,335" in found
    places = json.loads(run(1, "--dry-run", "--protocol", "setar-voc", "--set", f"COCO={root}/none", "--json").out)
    rows = {row["set"]: row for row in places["setar-voc"]}
    assert rows["train"] == {
        "set": "train", "path": f"{root}/ID_VOC/val", "images": 14, "expected": 94, "error": None
    }  # fmt: skip
    assert "There is no" in rows["COCO"]["error"]


def test_a_protocol_that_is_not_there_is_left_out_unless_asked_for(table_1, run, root, tmp_path, nothing_new):
    nothing_new()
    for folder in root.iterdir():
        if folder.is_dir() and folder.name != "ID_ImageNet1K":
            (tmp_path / folder.name).symlink_to(folder)
    found = run(1, place=tmp_path)  # links: the same images
    assert "Left out: setar-imagenet-1k is not complete: test: none of " in found.err
    assert found.out == table_1.out[table_1.out.index("Pascal-VOC, tiny") :]
    found = run(1, "--protocol", "setar-imagenet-1k", place=tmp_path, code=3)
    assert "setar-imagenet-1k is not complete: test: none of " in found.err
    found = run(2, place=tmp_path, code=3)
    assert "setar-imagenet-1k is not complete" in found.err


def test_missing_training_images_are_named_before_any_work(run, root, tmp_path, nothing_new):
    nothing_new()
    for folder in root.iterdir():
        if folder.is_dir() and folder.name != "ID_VOC":
            (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / "ID_VOC").mkdir()
    (tmp_path / "ID_VOC" / "test").symlink_to(root / "ID_VOC" / "test")
    error = run(1, place=tmp_path, code=3).err.splitlines()[-1]
    assert error.startswith("ood-setar: setar-voc has no training images, on which SeTAR searches: --set train=DIR.")
    assert f"none of {tmp_path}/ID_VOC/val is a folder with one folder per class" in error


@pytest.mark.parametrize("form", ["config_best.json", "folder"])
def test_an_edit_given_is_not_searched_for(form, run, tmp_path, nothing_new):
    rows = [["visual", "W_up", 3, 0.5], ["text", "W_up", 0, 0.25]]
    edit = tmp_path / form
    if form == "folder":
        SeTAREdit.from_released(rows).save_pretrained(edit)
    else:
        edit.write_text(json.dumps({"lora_settings": rows}))
    nothing_new("evaluate")
    write(tmp_path / "coco", scenes.textures(2).images)
    (tmp_path / "coco" / "1.png").write_bytes(b"no image")
    arguments = [1, "--protocol", "setar-voc", "--edit", edit, "--scores", "mcm"]
    arguments += ["--set", f"COCO={tmp_path}/coco", "--on-error", "record"]
    found = json.loads(run(*arguments, "--json", into=tmp_path).out)["results"][0]
    assert found["ratios"] == {"visual.3.up": 0.5, "text.0.up": 0.25}
    folder = single((tmp_path / "setar-voc" / "tiny").glob("SeTAR-given/mcm"))
    ours = next(row for row in found["rows"] if (row["method"], row["convention"]) == ("SeTAR", "released"))
    expected = figures(folder, "mcm", found["sets"])
    assert ours["average"] == pytest.approx(dict(zip(("fpr95", "auroc"), expected["average"], strict=True)))
    assert {path.name for path in folder.iterdir()} == {"run.json", "results.json", "scores.parquet", "report.html"}
    nothing_new()
    again = run(*arguments, into=tmp_path)
    assert "setar-voc, SeTAR: images without a score: COCO 1" in again.err


def test_an_edit_needs_no_training_images_and_is_of_one_protocol(run, root, tmp_path):
    (tmp_path / "best.json").write_text(json.dumps([["visual", "W_up", 3, 0.5]]))
    found = run(1, "--edit", tmp_path / "best.json", code=2)
    assert "choose it with --protocol, of setar-imagenet-1k, setar-voc" in found.err
    start = reproduce.lora_start(create_backbone("tiny"), rank=1, seed=3)
    start.save_pretrained(tmp_path / "tuned")
    found = run(1, "--edit", tmp_path / "tuned", "--protocol", "setar-voc", code=2)
    assert "is fine-tuned: give the edit of the search" in found.err
    protocol = find_protocol("setar-voc", root)
    edit = SeTAREdit({"visual.3.up": 0.5})
    bare = replace(protocol, train=None)
    bench = reproduce.Bench(bare, create_backbone("tiny"), tmp_path, {}, "a {}", [3], {}, edit=edit)
    reproduce.find_mistakes(1, bench, ["mcm"])
    with pytest.raises(MissingDataError, match="has no training images"):
        reproduce.find_mistakes(2, bench, ["mcm"])


@pytest.mark.parametrize(
    ("table", "arguments", "words"),
    [
        (1, ["--param", "lambda=3"], "Unknown option of search, finetune, lora or the scores 'lambda'"),
        (1, ["--param", "seed=3"], "'seed'"),
        (1, ["--scores", "mmc"], "Did you mean 'mcm'"),
        (1, ["--labels", "SUN=x.json"], "Table 4 is of accuracies"),
        (4, [], "it takes --labels NAME=FILE"),
        (4, ["--labels", "SUN=x.json", "--scores", "mcm"], "Table 4 is of accuracies"),
        (4, ["--labels", "x.json"], "--labels 'x.json' must be NAME=PATH"),
        (4, ["--labels", "Sun=x.json"], "Did you mean 'SUN'"),
        (1, ["--set", "COCO"], "--set 'COCO' must be NAME=PATH"),
        (1, ["--set", "COKO=x"], "'COKO'"),
    ],
)
def test_mistakes_are_one_sentence(table, arguments, words, run, nothing_new):
    nothing_new()
    found = run(table, *arguments, code=2)
    assert words in found.err.splitlines()[-1]
    assert not found.out


# ---- presets


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-16-quickgelu", "CLIP ViT-B/16"),
        ("ViT-L-14", "CLIP ViT-L/14"),
        ("ViT-B-32", None),
        ("swinv2_base_window16_256", "SwinV2-B"),
        ("vit_base_patch16_224", None),
    ],
)
def test_architectures_are_told_by_their_shape(name, expected, monkeypatch):
    monkeypatch.setattr("ood_core.backbones.base.hash_tensors", lambda *_: "")
    square = ImageTransform(crop=(256, 256), resize=256)
    with torch.device("meta"):  # no memory, no values
        config = open_clip.get_model_config(name)
        model = timm.create_model(name) if config is None else open_clip.CLIP(**config)
    if config is None:
        backbone = TimmBackbone(model, square)
    else:
        model.logit_scale = torch.nn.Parameter(torch.ones([]))
        backbone = OpenCLIPBackbone(model, None, square, spec=name)
    assert reproduce.architecture(backbone) == expected


def test_a_known_architecture_takes_the_papers_options(root, monkeypatch):
    backbone = create_backbone("tiny", dtype="float32")
    monkeypatch.setitem(reproduce._ARCHITECTURES, (4, 4, 192, 192, (8, 8)), "CLIP ViT-L/14")
    assert reproduce.architecture(backbone) == "CLIP ViT-L/14"
    voc, imagenet = (find_protocol(name, root) for name in ("setar-voc", "setar-imagenet-1k"))
    expected = {"ood_weight": 0.3, "k": 6, "loss_batch": 512, "batch_size": 20, "rank": 64}
    assert reproduce.preset("CLIP ViT-L/14", voc) == expected
    fewer = reproduce.preset("CLIP ViT-L/14", imagenet)  # of 4 classes, not 1,000
    assert fewer == {"ood_weight": 0.5, "loss_batch": 512, "batch_size": 20, "rank": 64}
    bench = reproduce.Bench(voc, backbone, root, {"k": 5}, "a {}", [3], {})
    assert bench.options == expected | {"k": 5}
    assert "the released code's options for CLIP ViT-L/14; k=5, batch_size=20" in reproduce.describe_options(bench)
    assert reproduce.default_scores(1, backbone) == reproduce.default_scores(3, backbone) == ["mcm", "gl_mcm"]
    rows = reproduce.published_rows(2, "ImageNet1K", "CLIP ViT-L/14", ["mcm"])
    assert [row["method"] for row in rows] == ["LoCoOp", "LoRA", "SeTAR+FT"]


def test_every_preset_is_of_a_published_model_and_benchmark():
    rows = [row for number in (1, 2, 3) for row in published_table(number)["rows"]]
    titles = {"ImageNet1K": "setar-imagenet-1k", "Pascal-VOC": "setar-voc"}
    assert set(reproduce.PRESETS) == {(row["backbone"], titles[row["id"]]) for row in rows}
    assert set(reproduce.TRAINING) == {row["backbone"] for row in rows} == set(reproduce._ARCHITECTURES.values())
    for options in reproduce.PRESETS.values():
        assert 0 < options["k"] < options["classes"]
    for number, protocols in reproduce.PROTOCOLS.items():
        ids = {row["id"] for row in published_table(number)["rows"]}
        assert {titles[one] for one in ids} == set(protocols)


@pytest.mark.parametrize("model", ["vit", "swin", "hf-swin"])
def test_a_classifier_is_judged_on_its_own_classes(model, make, root, tmp_path, one_thread):
    """Both columns of Table 2, as they were computed, and the plain scores."""
    builders = {"vit": lambda: make.vit(depth=2), "swin": lambda: make.swin(2, seed=1, drop=0.2)}
    backbone = builders.get(model, lambda: make.hf_swin(drop=0.2))()
    imagenet, voc = (find_protocol(name, root) for name in ("setar-imagenet-1k", "setar-voc"))
    assert reproduce.architecture(backbone) is None
    assert reproduce.default_scores(1, backbone) == reproduce.default_scores(3, backbone) == ["msp", "energy"]
    scores = reproduce.default_scores(2, backbone)
    assert scores == ["msp@100", "gl_mcm@100", "msp", "energy"]
    loading = {"cache": None, "on_error": "raise", "batch_size": 16, "workers": 0}
    params = {"ratios": [0, 0.3], "rank": 2, "epochs": 1, "jitter": 0.4}
    bench, other = (
        reproduce.Bench(one, backbone, tmp_path, params, "a photo of a {}", [3], loading) for one in (imagenet, voc)
    )
    reproduce.find_mistakes(2, bench, scores)
    with pytest.raises(UsageError, match="tells 4 classes apart, setar-voc has 14"):
        reproduce.find_mistakes(2, other, scores)
    rows = reproduce.table_of(2, bench, scores, {})["rows"]
    assert [(row["score"], row["method"]) for row in rows if row["origin"] == "ours"][::2] == [
        (score, method) for score in scores for method in ("LoRA", "SeTAR+FT")
    ]
    folder = single(tmp_path.rglob("SeTAR+FT*")) / "+".join(scores)
    results = json.loads((folder / "results.json").read_text())["detectors"]
    assert [one["params"]["temperature"] for one in results.values()] == [100.0, 100.0, 1.0, 1.0]
    # The scores by hand, from the edited network's own logits.
    edited = SeTAREdit.from_pretrained(folder.parent).apply(backbone)
    pixels = torch.stack([backbone.transform(image) for _, image in imagenet.ood["SUN"]])
    found = edited.encode(pixels, {"logits", "local_logits"})
    image, cells = ((found[name] / 100).softmax(-1).flatten(1) for name in ("logits", "local_logits"))
    table = ScoreTable.read(folder / "scores.parquet")
    np.testing.assert_allclose(table.scores("msp@100", "SUN"), image.amax(1), rtol=1e-5)
    np.testing.assert_allclose(table.scores("gl_mcm@100", "SUN"), image.amax(1) + cells.amax(1), rtol=1e-5)
    np.testing.assert_allclose(table.scores("energy", "SUN"), found["logits"].logsumexp(1), rtol=1e-5)
    # What was published as energy stands beside what it was computed as.
    second = [row for row in rows if row["origin"] != "ours" and row["score"] == "gl_mcm@100"]
    assert [(row["origin"], row["backbone"], row["average"]["fpr95"]) for row in second] == [
        ("published as energy", "SwinV2-B", 62.17),
        ("published as energy", "SwinV2-B", 39.29),
    ]
    assert not [row for row in rows if row["origin"] != "ours" and row["score"] in ("msp", "energy")]


@pytest.mark.parametrize("score", ["mcm@", "mcm@0", "mcm@hot", "mcm@-1", "max_logit@2"])
def test_scores_with_temperatures_that_are_none(score, run, nothing_new):
    nothing_new()
    error = run(1, "--scores", score, code=2).err.splitlines()[-1]
    assert f"Score '{score}'" in error
    assert "temperature" in error


def test_a_temperature_that_a_score_is_named_for_stays(run, nothing_new, table_1, tmp_path):
    """--param holds where the score leaves it open, and is said not to hold elsewhere."""
    arguments = [1, "--protocol", "setar-voc", "--param", "temperature=3", "--scores"]
    found = run(*arguments, "mcm", "mcm@2", into=tmp_path)
    assert "temperature=3 holds in mcm; the study itself sets it in mcm@2." in found.err
    folder = single(tmp_path.rglob("vanilla/mcm+mcm@2"))
    results = json.loads((folder / "results.json").read_text())["detectors"]
    assert [one["params"]["temperature"] for one in results.values()] == [3, 2.0]
    nothing_new()
    assert "temperature=3 would count nowhere" in run(*arguments, "mcm@2", into=tmp_path, code=2).err


def test_only_minor_directions_are_trained_and_that_is_said_first(run, nothing_new):
    nothing_new()
    assert "drop='minor', not 'random'" in run(2, *TRAINED, "--param", "drop=random", code=2).err


def test_differences_are_of_the_same_architecture_score_method_and_rule():
    figures = {"fpr95": 40.0, "auroc": 90.0, "auroc_std": 0.1}
    ours = [
        {"score": "mcm", "method": method, "origin": "ours", "backbone": "tiny", "convention": rule,
         "sets": dict.fromkeys(FAR, figures), "average": figures}
        for method in ("vanilla", "SeTAR") for rule in ("released", "standard")
    ]  # fmt: skip
    published = reproduce.published_rows(1, "ImageNet1K", "CLIP ViT-B/16", ["mcm"])
    result = {"architecture": "CLIP ViT-B/16", "sets": list(FAR), "rows": [*ours, *published]}
    found = reproduce.compared(result)
    assert len(found) == 3 * 2 * 5  # cited, rerun and SeTAR; two measures; four sets and their average
    one = next(one for one in found if "SeTAR" in one.row and (one.place, one.measure) == ("SUN", "auroc"))
    theirs = next(row for row in published if row["method"] == "SeTAR")["sets"]["SUN"]["auroc"]
    assert one.difference == pytest.approx(90 - theirs)
    assert reproduce.compared(result | {"architecture": None}) == []
    voc = reproduce.published_rows(1, "Pascal-VOC", "CLIP ViT-B/16", ["mcm"])
    found = reproduce.compared(result | {"rows": [*ours, *voc]})
    assert not any(one.place == "average" for one in found)  # over other sets
