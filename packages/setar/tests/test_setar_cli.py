"""The commands from search to show, on miniature image folders, in one process."""

import json

import numpy as np
import open_clip
import pandas as pd
import pytest
import timm
import torch
from ood_core import create_backbone, create_detector, extract
from ood_core.data import ImageFolder
from ood_core.detectors import list_detectors
from ood_setar.cli import main
from ood_setar.edit import SeTAREdit
from ood_setar.search import search
from PIL import Image
from safetensors.torch import load_file

CLASSES = ["apple", "guitar"]
QUICK = ["--param", "ratios=[0,0.3]", "--param", "order=visual_only"]
SHORT = ["--param", "epochs=2", "--param", "batch_size=4"]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:timm.*"),
]
registered = pytest.mark.skipif("mcm" not in list_detectors(), reason="ood-core is only on the path: no registry")


def images(folder, count, seed):
    """Smooth random colours, nothing of what they are called."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
        coarse.resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for number, name in enumerate(CLASSES):
        images(root / "train" / name, 3, number)
        images(root / "test" / name, 4, 10 + number)
    images(root / "ood", 5, 20)
    return root


@pytest.fixture(scope="module")
def tiny():
    return create_backbone("tiny")


@pytest.fixture(scope="module")
def edit(tiny, tmp_path_factory):
    """The folder of an edit whose ratios do not hang on a search."""
    folder = tmp_path_factory.mktemp("edit")
    SeTAREdit({"visual.2.up": 0.4, "text.1.up": 0.3}, tiny.fingerprint).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(data):
    """The folder of a search by the command."""
    folder = data / "found"
    assert main(["search", f"{data}/train", "--out", str(folder), *QUICK]) == 0
    return folder


def run(capsys, *arguments):
    """(stdout, stderr) of a command that succeeds."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out, captured.err


# ---- search


def test_search_saves_what_the_function_finds_beside_its_log(found, tiny, data):
    assert {path.name for path in found.iterdir()} == {"edit.json", "edit.safetensors", "search.jsonl"}
    expected = search(tiny, data / "train", ratios=[0, 0.3], order="visual_only", progress=False)
    edit = SeTAREdit.from_pretrained(found)
    assert edit.ratios == expected.ratios
    assert edit.record == expected.record
    assert edit.fingerprint == tiny.fingerprint
    lines = [json.loads(line) for line in (found / "search.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 2 + 3  # the first weight is measured as it is, too


def test_a_rerun_goes_on_from_the_log(found, data, tmp_path, capsys):
    """A measured value that no search would find decides the rerun: it was read and not measured again."""
    lines = [json.loads(line) for line in (found / "search.jsonl").read_text().splitlines()]
    place = next(i for i, line in enumerate(lines) if line.get("weight") == "visual.1.up")
    lines[place]["measured"]["loss"] = -1000.0
    out = tmp_path / "again"
    out.mkdir()
    (out / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[: place + 1]))
    text, _ = run(capsys, "search", f"{data}/train", "--out", out, *QUICK, "--json")
    ratios = json.loads(text)["ratios"]
    assert ratios["visual.1.up"] == 0.3
    assert ratios["visual.0.up"] == 0.0
    assert len((out / "search.jsonl").read_text().splitlines()) == len(lines)  # what was missing is measured


def test_search_prints_a_table_or_one_json_value(found, data, tmp_path, capsys):
    ratios = SeTAREdit.from_pretrained(found).ratios
    text, error = run(capsys, "search", f"{data}/train", "--out", found, *QUICK)
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["weight", "ratio"]
    assert {name: float(ratio) for name, ratio in rows[1:]} == ratios
    dropping = sum(map(bool, ratios.values()))
    assert f"SeTAR: {dropping} of 4 weights lose singular values" in error
    assert f"Saved: {found}" in error
    text, _ = run(capsys, "search", f"{data}/train", "--out", found, *QUICK, "--json")
    assert json.loads(text) == {"edit": str(found), "ratios": ratios, "history": []}


def test_options_reach_the_search(data, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("pear\nguitar\napple\n")
    options = ["--classes", names, "--template", "{}.", "--shots", 1, "--seed", 7, "--param", "ratios=[0.3]"]
    options += ["--param", "order=visual_only", "--param", "kind=value", "--param", "drop=random"]
    run(capsys, "search", f"{data}/train", "--out", tmp_path / "edit", *options, "--param", "ood_weight=0.7")
    edit = SeTAREdit.from_pretrained(tmp_path / "edit")
    settings = edit.record["search"]
    assert settings["class_names"] == ["pear", "guitar", "apple"]
    assert (settings["template"], settings["kind"], settings["objective"]["weight"]) == ("{}.", "value", 0.7)
    assert settings["images"]["count"] == 2
    assert (edit.drop, edit.seed) == ("random", 7)
    assert list(edit.ratios) == [f"visual.{layer}.value" for layer in (3, 2, 1, 0)]


# ---- finetune


def test_finetune_from_an_edit(edit, tiny, data, tmp_path, capsys):
    out = tmp_path / "tuned"
    text, error = run(capsys, "finetune", f"{data}/train", "--edit", edit, "--out", out, *SHORT, "--json")
    assert {path.name for path in out.iterdir()} == {"edit.json", "edit.safetensors"}
    tuned = SeTAREdit.from_pretrained(out)
    printed = json.loads(text)
    assert printed == {"edit": str(out), "ratios": tuned.ratios, "history": tuned.record["history"]}
    assert len(printed["history"]) == 2
    assert tuned.ratios == SeTAREdit.from_pretrained(edit).ratios
    assert set(tuned.factors) == set(tuned.ratios)
    settings = tuned.record["finetune"]
    assert (settings["epochs"], settings["batch_size"], settings["seed"]) == (2, 4, 5)
    assert tuned.apply(tiny).fingerprint != SeTAREdit.from_pretrained(edit).apply(tiny).fingerprint
    assert "SeTAR+FT: 2 of 2 weights" in error
    assert "Last epoch: loss_id" in error


def test_an_interrupted_training_goes_on(edit, data, tmp_path, capsys, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["finetune", f"{data}/train", "--edit", edit, "--workers", 0, *SHORT, "--out"]
    run(capsys, *arguments, whole)
    calls, opened = [], ImageFolder.open

    def stopping(self, index, **options):
        calls.append(index)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return opened(self, index, **options)

    monkeypatch.setattr(ImageFolder, "open", stopping)
    assert main([*map(str, arguments), str(parts)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {path.name for path in parts.iterdir()} == {"checkpoint.safetensors"}
    calls.clear()
    run(capsys, *arguments, parts)
    assert len(calls) == 6  # one epoch was left
    assert {path.name for path in parts.iterdir()} == {"edit.json", "edit.safetensors"}
    ours, expected = (load_file(folder / "edit.safetensors") for folder in (parts, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_finetune_without_an_edit_is_lora(tiny, data, tmp_path, capsys):
    arguments = ["finetune", f"{data}/train", "--out", tmp_path / "lora", "--rank", 2, *SHORT]
    text, error = run(capsys, *arguments)
    tuned = SeTAREdit.from_pretrained(tmp_path / "lora")
    assert list(tuned.ratios) == [f"{tower}.{layer}.up" for tower in ("visual", "text") for layer in (3, 2, 1, 0)]
    assert not any(tuned.ratios.values())
    assert tuned.scale == 8 / 2
    assert tuned.record["lora"] == {"rank": 2, "alpha": 8.0, "seed": 5}
    assert all(b.shape[1] == 2 and b.any() for b, _ in tuned.factors.values())
    assert "LoRA: 0 of 8 weights lose" in error
    assert text.splitlines()[0].split() == ["weight", "ratio"]


# ---- apply


def test_apply_writes_weights_that_the_same_architecture_takes(edit, tiny, tmp_path, capsys):
    text, error = run(capsys, "apply", "--edit", edit, "--out", tmp_path)
    assert not text
    assert f"Saved: {tmp_path / 'model.safetensors'}" in error
    copy = create_backbone("tiny")
    copy.model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    expected = SeTAREdit.from_pretrained(edit).apply(tiny)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(copy.encode_image(x), expected.encode_image(x))
    assert torch.equal(copy.encode_text(CLASSES), expected.encode_text(CLASSES))
    assert not torch.equal(copy.encode_image(x), tiny.encode_image(x))


@pytest.fixture(scope="module")
def hf_clip(tmp_path_factory):
    """A folder with a CLIP of the transformers library and its tokenizer."""
    transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    folder = tmp_path_factory.mktemp("hf")
    both = {"num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 96, "projection_dim": 16}
    tokens = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=both | tokens | {"hidden_size": 16},
        vision_config=both | {"hidden_size": 24, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    source = open_clip.tokenizer.SimpleTokenizer()
    merges = [pair for pair, _ in sorted(source.bpe_ranks.items(), key=lambda item: item[1])]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in source.encoder.items()}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77).save_pretrained(folder)
    return folder


def test_apply_writes_a_transformers_folder(hf_clip, data, tmp_path, capsys):
    spec = f"hf:{hf_clip}"
    vanilla = create_backbone(spec)
    made = SeTAREdit({"visual.1.up": 0.4, "text.0.up": 0.3}, vanilla.fingerprint)
    made.save_pretrained(tmp_path / "edit")
    _, error = run(capsys, "apply", "--edit", tmp_path / "edit", "--backbone", spec, "--out", tmp_path / "model")
    assert f"'hf:{tmp_path / 'model'}'" in error
    loaded, expected = create_backbone(f"hf:{tmp_path / 'model'}"), made.apply(vanilla)
    assert loaded.transform == expected.transform
    ours, theirs, plain = (extract(one, data / "test") for one in (loaded, expected, vanilla))
    assert torch.equal(ours.image, theirs.image)
    assert torch.equal(ours.local, theirs.local)
    assert not torch.equal(ours.image, plain.image)
    assert torch.equal(loaded.encode_text(CLASSES), expected.encode_text(CLASSES))
    assert not torch.equal(loaded.encode_text(CLASSES), vanilla.encode_text(CLASSES))


@pytest.fixture(scope="module")
def timm_vit(tmp_path_factory):
    """A folder with a classifier of the timm library."""
    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=2)
    config = {"num_classes": 2, "label_names": CLASSES, "pretrained_cfg": {"mean": [0.4, 0.5, 0.6]}}
    timm.models.save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
    return folder


def test_apply_writes_a_timm_folder(timm_vit, data, tmp_path, capsys):
    spec = f"timm:local-dir:{timm_vit}"
    vanilla = create_backbone(spec)
    assert vanilla.label_names == CLASSES
    made = SeTAREdit({"visual.1.up": 0.4}, vanilla.fingerprint)
    made.save_pretrained(tmp_path / "edit")
    _, error = run(capsys, "apply", "--edit", tmp_path / "edit", "--backbone", spec, "--out", tmp_path / "model")
    assert f"'timm:local-dir:{tmp_path / 'model'}'" in error
    loaded, expected = create_backbone(f"timm:local-dir:{tmp_path / 'model'}"), made.apply(vanilla)
    assert loaded.transform == expected.transform
    assert loaded.label_names == expected.label_names
    needs = {"image", "local", "logits"}
    ours, theirs, plain = (extract(one, data / "test", needs) for one in (loaded, expected, vanilla))
    for name in needs:
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert not torch.equal(getattr(ours, name), getattr(plain, name))


# ---- evaluate


@registered
def test_evaluate_stands_vanilla_beside_the_edit(edit, tiny, data, tmp_path, capsys):
    arguments = ["evaluate", "--edit", edit, "--id", f"{data}/test", "--ood", f"far={data}/ood"]
    text, error = run(capsys, *arguments, "--out", tmp_path, "--json")
    results = json.loads(text)
    labels = ["mcm, vanilla", "mcm, SeTAR", "gl_mcm, vanilla", "gl_mcm, SeTAR"]
    assert list(results["detectors"]) == labels
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert {"results.json", "scores.parquet", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    assert f"Results: {tmp_path}" in error
    table = pd.read_parquet(tmp_path / "scores.parquet")
    edited = SeTAREdit.from_pretrained(edit).apply(tiny)
    for label in labels:
        name, _, which = label.partition(", ")
        backbone = edited if which == "SeTAR" else tiny
        detector = create_detector(name, backbone=backbone, class_names=CLASSES)
        for source, folder in (("id", "test"), ("far", "ood")):
            rows = table[table["source"] == source]
            np.testing.assert_array_equal(rows[label], detector.score(data / folder))
    assert not np.allclose(table["mcm, vanilla"], table["mcm, SeTAR"], rtol=1e-4)
    specs = {one["fingerprint"]: one["spec"] for one in results["environment"]["backbones"]}
    assert specs == {tiny.fingerprint: "tiny", edited.fingerprint: f"tiny+edit:{edit}"}


@registered
def test_evaluate_prints_a_table_of_the_detectors_asked_for(edit, data, tmp_path, capsys):
    edits = SeTAREdit.from_pretrained(edit)
    edits.factors = {"visual.2.up": (torch.zeros(768, 1), torch.zeros(1, 192))}
    edits.save_pretrained(tmp_path)
    arguments = ["evaluate", "--edit", tmp_path, "--id", f"{data}/test", "--ood", f"{data}/ood", "--detector", "energy"]
    text, _ = run(capsys, *arguments, "--param", "temperature=2")
    assert "energy, vanilla" in text
    assert "energy, SeTAR+FT" in text
    assert "mcm" not in text
    assert "ood" in text  # the set is named after its folder


@registered
def test_evaluate_calibrates_with_the_options_of_the_detectors(edit, data, tmp_path, capsys):
    for number, name in enumerate(CLASSES):
        images(tmp_path / "calibration" / name, 10, 30 + number)
    arguments = ["evaluate", "--edit", edit, "--id", f"{data}/test", "--ood", f"far={data}/ood", "--detector", "mcm"]
    arguments += ["r_mcm", "--calibrate", tmp_path / "calibration", "--param", "k=3", "--json"]
    results = json.loads(run(capsys, *arguments)[0])["detectors"]
    assert results["r_mcm, SeTAR"]["params"]["k"] == 3
    assert results["mcm, SeTAR"]["threshold"] != results["mcm, vanilla"]["threshold"]


def test_evaluate_classify_counts_nearest_labels(edit, tiny, data, tmp_path, capsys):
    """Labels of the file's own, over all of its names, also those without an image here."""
    labels = {"apple/0.png": "Guitar", "apple/1.png": "pear", "guitar/0.png": "guitar", "elsewhere/9.png": "whale"}
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(labels))
    arguments = ["evaluate", "--edit", edit, "--id", f"{data}/test", "--classify", file]
    text, _ = run(capsys, *arguments, "--json")
    printed = json.loads(text)
    names = ["Guitar", "pear", "whale"]
    expected = {}
    for label, backbone in {"vanilla": tiny, "SeTAR": SeTAREdit.from_pretrained(edit).apply(tiny)}.items():
        features = extract(backbone, data / "test", {"image"})
        text = backbone.encode_text([f"a photo of a {name}" for name in names])
        nearest = dict(zip(features.ids, (features.image @ text.T).argmax(1).tolist(), strict=True))
        right = [names[nearest[path]].lower() == labels[path].lower() for path in labels if path in nearest]
        expected[label] = sum(right) / 3
    assert printed == {"images": 3, "classes": 3, "accuracy": expected}
    rows = [line.split() for line in run(capsys, *arguments)[0].splitlines()]
    assert rows == [["accuracy"], *[[label, f"{100 * value:.2f}"] for label, value in expected.items()]]


# ---- show


def test_show_prints_the_path_of_the_search(found, capsys):
    edit = SeTAREdit.from_pretrained(found)
    text, _ = run(capsys, "show", found)
    lines = text.splitlines()
    assert lines[0].split() == ["weight", "ratio", "best", "so", "far", "margin"]
    for line, step in zip(lines[1:], edit.record["steps"], strict=True):
        name, ratio, value, margin, *tie = line.split()
        assert (name, float(ratio)) == (step["weight"], step["ratio"])
        assert float(value) == pytest.approx(step["value"], rel=1e-5)
        assert float(margin) == pytest.approx(step["margin"], rel=0.06)
        assert bool(tie) == step["near_tie"]
    printed = json.loads(run(capsys, "show", found, "--json")[0])
    assert printed["ratios"] == edit.ratios
    assert printed["released"] == edit.to_released()
    assert printed["record"] == edit.record


@pytest.mark.parametrize("which", ["found", "edit", "released"])
def test_show_draws(which, request, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    if which == "released":
        path = tmp_path / "config_best.json"
        path.write_text(json.dumps({"lora_settings": [["visual", "W_up", 1, 0.3], ["text", "W_up", 0, 0.1]]}))
    else:
        path = request.getfixturevalue(which)
    out = tmp_path / "deep" / "picture.png"
    text, error = run(capsys, "show", path, "--out", out, "--json")
    assert json.loads(text)["ratios"]
    assert f"Picture: {out}" in error
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB"), float)
    assert pixels.shape[0] > (800 if which == "found" else 400)  # the search's path stands below
    assert pixels.std() > 10
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    if any(json.loads(text)["ratios"].values()):
        bars = np.abs(pixels - [0x2B, 0x6C, 0xB0]).max(-1) < 30, np.abs(pixels - [0xC0, 0x56, 0x21]).max(-1) < 30
        assert bars[0].sum() + bars[1].sum() > 500


def test_show_of_a_released_list(tmp_path, capsys):
    path = tmp_path / "config_best.json"
    rows = [["visual", "W_up", 11, 0.15], ["visual", "W_up", [3, 1], 0.4], ["text", "W_up", 0, 0.0]]
    path.write_text(json.dumps({"lora_settings": rows, "seed": 5}))
    printed = json.loads(run(capsys, "show", path, "--json")[0])
    assert printed["ratios"] == {"visual.11.up": 0.15, "visual.3.1.up": 0.4, "text.0.up": 0.0}
    assert printed["released"] == rows
    assert printed["record"] == {}
    lines = run(capsys, "show", path)[0].splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["visual.11.up", "0.15"],
        ["visual.3.1.up", "0.4"],
        ["text.0.up", "0"],
    ]


# ---- precision and prompts


def test_edits_are_made_on_weights_that_are_not_rounded(edit, data, tmp_path, capsys, monkeypatch, caplog):
    """Whatever precision the machine prefers for scores."""
    monkeypatch.delenv("OOD_DTYPE")
    monkeypatch.setattr("ood_core.devices.cpu_has_bfloat16", lambda: True)
    assert create_backbone("tiny").dtype == torch.bfloat16
    run(capsys, "apply", "--edit", edit, "--out", tmp_path / "model")
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.float32}
    run(capsys, "search", f"{data}/train", "--out", tmp_path / "edit", *QUICK)
    run(capsys, "finetune", f"{data}/train", "--edit", edit, "--out", tmp_path / "tuned", *SHORT)
    assert "rounded" not in caplog.text


@registered
def test_detectors_have_their_own_prompts_unless_one_is_given(edit, data, capsys):
    arguments = ["evaluate", "--edit", edit, "--id", f"{data}/test", "--ood", f"far={data}/ood", "--json"]
    arguments += ["--detector", "neg_label", "mcm", "--param", "max_words=30", "--param", "groups=2"]
    for options, templates in (([], ["the nice {}", "a photo of a {}"]), (["--template", "{}!"], ["{}!", "{}!"])):
        found = json.loads(run(capsys, *arguments, *options)[0])["detectors"]
        for name, template in zip(("neg_label", "mcm"), templates, strict=True):
            for label in ("vanilla", "SeTAR"):
                assert found[f"{name}, {label}"]["template"] == template


# ---- mistakes

SEARCH = ["search", "{data}/train", "--out", "{tmp}/x", *QUICK]
TUNE = ["finetune", "{data}/train", "--out", "{tmp}/x", "--edit", "{edit}", *SHORT]
JUDGE = ["evaluate", "--edit", "{edit}", "--id", "{data}/test"]
OOD = ["--ood", "far={data}/ood"]
MISTAKES = [
    ([*SEARCH, "--param", "ratio=[0.1]"], 2, "Unknown option of search 'ratio'. Did you mean 'ratios'"),
    ([*SEARCH, "--param", "ratios"], 2, "must be KEY=VALUE"),
    ([*SEARCH, "--param", "ratios=[0, 5]"], 2, "ratio=5 is outside [0, 1)"),
    ([*SEARCH, "--param", "order=visual"], 2, "order='visual'"),
    ([*SEARCH, "--param", "log_file=x"], 2, "Unknown option of search 'log_file'"),
    ([*SEARCH, "--shots", "0"], 2, "shots=0"),
    ([*SEARCH, "--backbone", "timm:vit_tiny_patch16_224?num_classes=0"], 2, "has no 'logits'"),
    ([*SEARCH, "--backbone", "tyni"], 2, "Did you mean 'tiny'"),
    ([*SEARCH, "--classes", "{tmp}/none.txt"], 3, "No class-name file"),
    (["search", "{data}/nothing", "--out", "{tmp}/x"], 3, "There is no"),
    (["search", "{data}/ood", "--out", "{tmp}/x", *QUICK], 3, "have no labels"),
    (["search", "{data}/train", "--out", "{found}", "--param", "ratios=[0.2]"], 2, "log of another search"),
    ([*TUNE, "--param", "rank=3"], 2, "Unknown option of finetune 'rank'"),
    ([*TUNE, "--param", "edit=x"], 2, "Unknown option of finetune 'edit'"),
    ([*TUNE, "--param", "learning_rate=1e30"], 3, "no longer finite"),
    ([*TUNE, "--backbone", "hf:{hf}"], 2, "made for a backbone with fingerprint"),
    (["finetune", "{data}/train", "--out", "{tmp}/x", "--edit", "{data}/none"], 3, "holds no saved edit"),
    (["finetune", "{data}/train", "--out", "{tmp}/x", "--rank", "1000"], 2, "rank=1000"),
    (["apply", "--edit", "{data}/none", "--out", "{tmp}"], 3, "`ood-setar search --out` makes one"),
    (
        ["apply", "--edit", "{edit}", "--out", "{tmp}", "--backbone", "hf:{hf}"],
        2,
        "made for a backbone with fingerprint",
    ),
    (["evaluate", "--edit", "{edit}", *OOD], 2, "Give --id SOURCE"),
    (JUDGE, 2, "--ood NAME=SOURCE ... or --classify LABELS.json"),
    ([*JUDGE, *OOD, "--param", "temprature=2"], 2, "'temprature'"),
    ([*JUDGE, *OOD, "--detector", "mmc"], 2, "Unknown detector 'mmc'. Did you mean 'mcm'"),
    ([*JUDGE, *OOD, "--detector", "knn"], 4, "must be fitted"),
    ([*JUDGE, "--ood", "far={data}/none"], 3, "There is no"),
    ([*JUDGE, *OOD, "--backbone", "hf:{hf}"], 2, "made for a backbone with fingerprint"),
    ([*JUDGE, "--classify", "{data}/none.json"], 3, "There is no file"),
    (["show", "{edit}", "--out", "{tmp}/picture.txt"], 2, "must end in .png, .pdf or .svg"),
    (["show", "{data}/none"], 3, "holds no saved edit"),
    (["show", "{data}/none.json"], 3, "There is no file"),
    (["show", "{edit}/edit.json"], 3, "lora_settings"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), MISTAKES, ids=[words for *_, words in MISTAKES])
def test_mistakes_are_one_sentence(arguments, code, words, data, edit, found, hf_clip, tmp_path, capsys):
    if arguments[0] == "evaluate" and "mcm" not in list_detectors():
        pytest.skip("ood-core is only on the path: no registry")
    places = {"data": data, "tmp": tmp_path, "edit": edit, "found": found, "hf": hf_clip}
    capsys.readouterr()
    assert main([one.format(**places) if "{" in one else one for one in arguments]) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    sentence = captured.err.strip().splitlines()[-1]
    assert sentence.startswith("ood-setar: ")
    assert len(sentence) < 600


def test_debug_shows_the_traceback(data, tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["search", f"{data}/nothing", "--out", str(tmp_path), "--debug"])


@pytest.mark.parametrize("arguments", [["search"], ["apply", "--out", "x"], ["show"], ["find"], []])
def test_missing_arguments_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: ood-setar" in capsys.readouterr().err
