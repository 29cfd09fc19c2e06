"""Tables and studies on a miniature of the benchmark's folders; the backbone is a few kilobytes where speed matters."""

import copy
import dataclasses
import json
import statistics

import numpy as np
import pytest
import torch
from ood_core import create_detector
from ood_core.backbones.timm import TimmBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.errors import MissingDataError, UsageError
from ood_core.metrics import auroc, fpr_at_tpr
from ood_core.protocols import find_protocol
from ood_core.scores import ScoreTable
from ood_mofe import reproduce as paper
from ood_mofe.cli import main
from ood_mofe.detectors import MoFE
from ood_mofe.groups import smallest_family
from ood_mofe.partition import imagenet_edges, imagenet_words
from ood_mofe.reproduce import STUDIES, TABLES
from ood_mofe.runner import KS, Bench, Setting, summarise, variants
from ood_mofe.studies import fine_labels
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

WNIDS = ["n01440764", "n01443537", "n01484850", "n01498041", "n01514668", "n02099601", "n02123597", "n03000684"]
WNIDS += ["n03417042", "n04285008"]
OOD = ["iNaturalist", "SUN", "Places", "Texture"]
QUICK = {"epochs": 1, "batch_size": 16, "augment": False, "head_learning_rate": 0.1, "k": 3}


def fill(folder, count, hue, seed):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = rng.normal(hue, 30, (20, 20, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    hues = np.random.default_rng(0).integers(0, 256, (len(WNIDS) + 6, 3))
    for number, wnid in enumerate(WNIDS):
        fill(folder / "imagenet/train" / wnid, 3, hues[number], number)
        fill(folder / "imagenet/val" / wnid, 2, hues[number], 100 + number)
    unknown = ["iNaturalist/images", "SUN/images", "Places/images", "dtd/images/banded"]
    for number, name in enumerate([*unknown, "imagenet-o/n00000001", "NINCO/NINCO_OOD_classes/moss"]):
        fill(folder / name, 3, hues[len(WNIDS) + number], 200 + number)
    return folder


@pytest.fixture(scope="module")
def backbone():
    return small("small/vit")


def small(spec):
    torch.manual_seed(len(spec))
    model = VisionTransformer(16, 8, embed_dim=16, depth=3, num_heads=2, num_classes=0, init_values=1.0)
    return TimmBackbone(model.eval(), ImageTransform(crop=(16, 16), resize=16), spec=spec)


@pytest.fixture(scope="module")
def protocol(root):
    return find_protocol("imagenet-1k", root)


@pytest.fixture
def bench(protocol, backbone, tmp_path):
    return Bench(protocol, backbone, tmp_path, params=QUICK | {"experts": 3}, seeds=[1])


def trained(protocol, backbone, **options):
    made = MoFE(class_names=protocol.wnids, **(QUICK | {"experts": 3} | options))
    made.attach(backbone)
    return made.fit(protocol.by_wnid().train, progress=False)


# ---- one training


def test_runs_are_those_of_the_detector(bench, protocol, backbone):
    runs = {run["score"]: run for run in bench.runs(Setting("mofe", "knn", {"mixup": False}))}
    detector = trained(protocol, backbone, mixup=False, seed=1, grouping="both")
    ladder = {f"k={k}": copy.copy(detector).set_params(k=k) for k in KS[:2]}
    assert len(detector.state["bank"]) < 50
    assert set(runs) == {"knn", "knn_global", "msp", "max_logit", "energy", "others", "mos"} | set(runs) & set(ladder)
    assert "k=10" in runs
    named = protocol.by_wnid()
    for name, made in {**variants(detector), "k=10": ladder["k=10"]}.items():
        known = made.score(named.test)
        for ood, source in named.ood.items():
            assert runs[name]["per_set"][ood]["auroc"] == pytest.approx(auroc(known, made.score(source)), abs=1e-6)
    assert runs["knn"]["seed"] == 1
    assert runs["knn"]["accuracy"] > 0
    assert runs["knn"]["last_epoch"].keys() >= {"experts", "routing", "token_norm"}
    (folder,) = (bench.out / "imagenet-1k").iterdir()
    assert [path.name for path in folder.iterdir()] == ["mofe,mixup=False"]
    files = {path.name for path in (folder / "mofe,mixup=False").iterdir()}
    assert files == {"seed-1.json", "seed-1.parquet"}  # no checkpoint


def test_groups_come_from_wordnet_for_classes_with_ids(bench, protocol, backbone):
    assert protocol.class_names[0] == "tench"
    made = bench._made(Setting("mofe", "knn"), 0)
    assert (made.class_names, made.grouping) == (WNIDS, "both")
    assert (made.experts, made.epochs) == (3, 1)
    assert bench._made(Setting("mofe", "knn", {"experts": 5}), 0).experts == 5  # a row's own come before those given
    given = dict.fromkeys(WNIDS[:5], "a") | dict.fromkeys(WNIDS[5:], "b")
    own = Bench(protocol, backbone, bench.out, params={"groups": given, "experts": 2})
    assert own._made(Setting("mofe", "knn"), 0).grouping == "auto"
    own.check(Setting("mofe", "knn"))


@pytest.mark.parametrize("name", ["mcm", "linear_probe", "knn"])
def test_other_methods_run_once_on_the_frozen_backbone(bench, protocol, backbone, name):
    if name == "mcm":
        bench = Bench(protocol, create_detector("mcm", backbone="tiny", class_names=["a", "b"]).backbone, bench.out)
    runs = bench.runs(Setting(name, "knn"))
    scores = {"linear_probe": ["msp", "max_logit", "energy"]}.get(name, [name])
    assert [(run["score"], run["seed"]) for run in runs] == [(score, None) for score in scores]
    if name != "knn":
        assert all(run["accuracy"] is not None for run in runs)
        return
    from ood_core import extract

    detector = create_detector("knn", backbone=backbone).fit(extract(backbone, protocol.train, {"image"}))
    expected = auroc(detector.score(protocol.test), detector.score(protocol.ood["SUN"]))
    assert runs[0]["per_set"]["SUN"]["auroc"] == pytest.approx(expected)
    assert runs[0]["accuracy"] is None


def test_finished_runs_are_read_back_and_shared_by_tables(bench, protocol, backbone, monkeypatch):
    first = bench.runs(Setting("mofe", "knn", {"experts": 3}))  # experts=3 is what the bench has anyway
    monkeypatch.setattr(Bench, "_judge", lambda *_: pytest.fail("it was computed again"))
    assert bench.runs(Setting("mofe", "mos")) == first
    other = Bench(protocol, backbone, bench.out, params=QUICK | {"experts": 3, "epochs": 2}, seeds=[1])
    with pytest.raises(UsageError, match=r"other settings or images.* options\.epochs was 1, is 2\."):
        other.runs(Setting("mofe", "knn"))
    same = {"params": bench.params, "seeds": [1]}
    with pytest.raises(UsageError, match='convention was "standard", is "openood"'):
        Bench(protocol, backbone, bench.out, **same, convention="openood").runs(Setting("mofe", "knn"))
    moved = dataclasses.replace(protocol, ood=protocol.ood | {"SUN": protocol.ood["Places"]})
    with pytest.raises(UsageError, match=r"images\.SUN was .*SUN.*, is .*Places"):
        Bench(moved, backbone, bench.out, **same).runs(Setting("mofe", "knn"))
    renamed = dataclasses.replace(protocol, class_names=["shark", *protocol.class_names[1:]])
    assert Bench(renamed, backbone, bench.out, **same).runs(Setting("mofe", "knn")) == first  # it knows wnids only
    monkeypatch.setattr("ood_core.reproduction.kept._digest_of_code", lambda sources: f"{len(sources)} others")
    with pytest.raises(UsageError, match=r"code\.ood_core\.backbones was"):
        bench.runs(Setting("mofe", "knn"))


def test_the_prompts_of_the_classes_are_part_of_a_run(protocol, tmp_path):
    tiny = create_detector("mcm", backbone="tiny", class_names=["a", "b"]).backbone
    run = Bench(protocol, tiny, tmp_path)
    made = {name: run._recipe(run._made(Setting(name, name), None)) for name in ("mcm", "knn", "mofe")}
    assert {name: found["template"] for name, found in made.items()} == dict.fromkeys(made, "a photo of a {}")
    assert made["mofe"]["options"]["classifier"] == "text"
    assert {name for name in made["mofe"]["code"] if name not in made["knn"]["code"]} >= {"ood_mofe.training"}
    names = [*protocol.class_names[:-1], "sports car, red"]
    renamed = Bench(dataclasses.replace(protocol, class_names=names), tiny, tmp_path)
    assert renamed._recipe(renamed._made(Setting("mcm", "mcm"), None))["class_names"] != made["mcm"]["class_names"]


def test_an_interrupted_training_goes_on(bench, monkeypatch):
    from ood_mofe import runner

    judged = runner.evaluate
    monkeypatch.setattr(runner, "evaluate", lambda *_, **__: 1 / 0)
    kept = Bench(bench.protocol, bench.backbone, bench.out, params=bench.params, seeds=[1], keep=True)
    with pytest.raises(ZeroDivisionError):
        kept.runs(Setting("mofe", "knn"))
    monkeypatch.setattr(runner, "evaluate", judged)
    (folder,) = bench.out.glob("imagenet-1k/*/mofe")
    assert folder.parent.name == "small-vit"
    assert [path.name for path in folder.iterdir()] == ["seed-1"]
    detector = MoFE.from_pretrained(folder / "seed-1", backbone=bench.backbone)
    expected = auroc(detector.score(bench.protocol.test), detector.score(bench.protocol.ood["Places"]))
    (knn,) = (run for run in bench.runs(Setting("mofe", "knn")) if run["score"] == "knn")
    assert knn["per_set"]["Places"]["auroc"] == pytest.approx(expected)


def test_groups_files_are_read_again(bench, protocol, backbone, tmp_path):
    file = tmp_path / "groups.csv"
    file.write_text("".join(f"{wnid},{number % 3}\n" for number, wnid in enumerate(WNIDS)))
    params = QUICK | {"experts": 3, "groups": str(file)}
    Bench(protocol, backbone, tmp_path, params=params, seeds=[0]).runs(Setting("mofe", "knn"))
    file.write_text("".join(f"{wnid},{number % 2 + number // 9}\n" for number, wnid in enumerate(WNIDS)))
    with pytest.raises(UsageError, match="other settings"):
        Bench(protocol, backbone, tmp_path, params=params, seeds=[0]).runs(Setting("mofe", "knn"))


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        (Setting("mofe", "knn", {"experts": 11}), UsageError, "11 experts are more than the 10 classes"),
        (Setting("mofe", "knn", {"expert": 3}), UsageError, "Did you mean 'experts'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(bench, setting, error, words):
    with pytest.raises(error, match=words):
        bench.check(setting)


def test_no_training_images(root, backbone, tmp_path):
    for name in ("imagenet/val", "iNaturalist", "SUN", "Places", "dtd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(root / name)
    bench = Bench(find_protocol("imagenet-1k", tmp_path), backbone, tmp_path / "out")
    with pytest.raises(MissingDataError, match="no training images: --set train=DIR"):
        bench.check(Setting("knn", "knn"))


# ---- variants and summaries


def test_variants_are_as_many_as_the_training_allows(protocol, backbone):
    whole = trained(protocol, backbone)
    found = variants(whole)
    assert found["knn"] is whole
    assert (found["knn_global"].bank, whole.bank, found["mos"].scorer) == ("global", "expert", "mos")
    assert not {"atd", "ctw"} & set(found)
    naive = trained(protocol, backbone, moe=False, mixup=False)
    assert set(variants(naive)) == {"knn", "msp", "max_logit", "energy"}
    groups = trained(protocol, backbone, moe=False, mixup=False, group_heads=True)
    assert set(variants(groups)) == {"knn", "msp", "max_logit", "energy", "mos"}
    alone = trained(protocol, backbone, experts=1)
    assert set(variants(alone)) == {"knn", "msp", "max_logit", "energy", "others", "mos"}


def test_summaries_are_over_seeds():
    def run(seed, score, fpr95, accuracy):
        figures = {"fpr95": fpr95, "auroc": 1 - fpr95}
        one = {"seed": seed, "score": score, "accuracy": accuracy, "average": figures, "last_epoch": {"loss": seed}}
        return one | {"per_set": {"SUN": {"fpr95": 2 * fpr95, "auroc": 0.5}}}

    runs = [run(0, "knn", 0.1, 0.8), run(0, "mos", 0.4, 0.8), run(1, "knn", 0.2, 0.9)]
    found = summarise(runs, "knn")
    assert found["average"]["fpr95"]["mean"] == pytest.approx(0.15)
    assert found["average"]["auroc"]["std"] == pytest.approx(statistics.stdev([0.9, 0.8]))
    assert found["sets"]["SUN"]["fpr95"]["mean"] == pytest.approx(0.3)
    assert found["accuracy"]["runs"] == 2
    assert found["last_epoch"] == [{"loss": 0}, {"loss": 1}]
    assert summarise(runs, "mos")["average"]["fpr95"]["std"] is None


# ---- rows


def options(settings):
    return {name: MoFE(**setting.options) for name, setting in settings.items() if setting.detector == "mofe"}


def test_rows_switch_what_they_say():
    parts = {name: (made.moe, made.mixup) for name, made in options(TABLES[3]).items()}
    expected = {
        "naive fine-tuning": (False, False),
        "+ MoFE": (True, False),
        "+ D-beta": (False, True),
        "both": (True, True),
    }
    assert parts == expected
    assert [made.experts for made in options(TABLES[4]).values()] == [2, 3, 5, 7, 8, 9]
    assert all(made.mixup for made in options(TABLES[4]).values())
    grouping = options(TABLES[5])
    assert {made.mixup for made in grouping.values()} == {False}
    assert [made.grouping for made in grouping.values()] == ["wordnet", "clustering", "both"]
    mixup = options(TABLES[6])
    assert {made.moe for made in mixup.values()} == {False}
    assert [(made.reg, made.dynamic) for made in mixup.values()] == [("none", True), ("l2", False), ("l2", True)]
    assert TABLES[1]["MOS"].score == "mos"
    assert options(TABLES[1])["MOS"].group_heads
    assert all(TABLES[number]["baseline"] == Setting("knn", "knn") for number in (3, 4, 5, 6))
    router = options(STUDIES["router"])
    assert [(m.router_norm, m.router_reads, m.gate, m.top_k) for m in router.values()] == [
        ("layer_norm", "class", "none", 1), ("none", "class", "none", 1), ("layer_norm", "patches", "none", 1),
        ("layer_norm", "class", "prob", 1), ("layer_norm", "class", "renorm", 2),
    ]  # fmt: skip
    assert [made.expert_layers for made in options(STUDIES["layers"]).values()] == [1, 2, 3]
    reg = options(STUDIES["reg_on"])
    assert [(m.reg, m.reg_on) for m in list(reg.values())[:3]] == [
        ("l2", "pre_norm"),
        ("l2", "post_norm"),
        ("ls", "pre_norm"),
    ]
    assert reg["none"].reg == "none"


# ---- the command


@pytest.fixture
def run(root, backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper, "load_backbone", lambda args, spec: small(spec) if args.backbones else backbone)

    def command(*arguments, leave_out=()):
        options = {name: value for name, value in ({"experts": 3} | QUICK).items() if name not in leave_out}
        given = [part for name, value in options.items() for part in ("--param", f"{name}={json.dumps(value)}")]
        assert main(list(map(str, ["reproduce", "--root", root, "--out", tmp_path, *given, *arguments]))) == 0
        return capsys.readouterr()

    return command


def test_a_table_has_ours_beside_the_papers(run):
    printed = run("--table", 3, "--seeds", 0, 1)
    lines = [line.split("  ") for line in printed.out.splitlines()]
    header, *rows = ([cell.strip() for cell in line if cell.strip()] for line in lines)
    at = next(place for place, row in enumerate(rows) if row[0] == "ours - published, points")
    rows, differences = rows[:at], rows[at:]
    assert header == ["FPR95 (standard) / AUROC", *OOD, "average", "accuracy"]
    names = [row[0] for row in rows]
    assert names == [
        "baseline", "published on DINOv2: baseline", "naive fine-tuning", "+ MoFE", "published on DINOv2: + MoFE",
        "+ D-beta", "published on DINOv2: + D-beta", "both", "published on DINOv2: both",
    ]  # fmt: skip
    assert rows[1][1:] == ["29.27 / 92.67"]
    assert "±" not in rows[0][1]
    assert all("±" in cell for cell in rows[3][1:])
    assert differences[0][1:] == ["average: fpr95 / auroc"]
    assert [row[0] for row in differences[1:]] == ["baseline", "+ MoFE", "+ D-beta", "both"]
    ours, theirs, difference = (
        [float(number.strip("!").partition("±")[0]) for number in row.split(" / ")]
        for row in (rows[0][-2 if len(rows[0]) > len(OOD) + 2 else -1], rows[1][1], differences[1][1])
    )
    assert difference == pytest.approx([a - b for a, b in zip(ours, theirs, strict=True)], abs=0.011)
    assert "figures are more than 1.5 points from the published ones (marked !)" in printed.err
    assert "Table 1 has it as 28.34/92.18" in printed.err
    assert "by the rule 'standard'" in printed.err


def test_every_row_has_the_fpr_rule_that_is_named(run, tmp_path):
    one, other = (
        run("--table", 3, "--seeds", 0, "--out", tmp_path / rule, "--convention", rule, "--json")
        for rule in ("openood", "standard")
    )
    found = [json.loads(printed.out) for printed in (one, other)]
    assert [one["convention"] for one in found] == ["openood", "standard"]
    for one in found:
        assert sum(f"by the rule '{one['convention']}'" in note for note in one["notes"]) == 1
    for label, folder in {"baseline": "knn", "both": "mofe"}.items():
        table = ScoreTable.read(next((tmp_path / "openood/imagenet-1k/small-vit" / folder).glob("*.parquet")))
        known = table.scores("knn", "id")
        for name, row in found[0]["results"][label]["sets"].items():
            expected = fpr_at_tpr(known, table.scores("knn", name), convention="openood")
            assert row["fpr95"]["mean"] == pytest.approx(expected)


def test_an_option_that_a_table_varies_is_refused_or_said(run, bench):
    printed = run("--study", "router", "--seeds", 0, "--param", "gate=literal")
    assert "gate='literal' holds in normalised class token, raw class token, mean of patches" in printed.err
    assert "the study itself sets it in gate by probability, two experts" in printed.err
    found = json.loads((bench.out / "imagenet-1k/small-vit/mofe,gate=prob/seed-0.json").read_text())
    assert found["recipe"]["options"]["gate"] == "prob"
    found = json.loads((bench.out / "imagenet-1k/small-vit/mofe/seed-0.json").read_text())
    assert found["recipe"]["options"]["gate"] == "literal"


def test_gains_are_over_the_baseline(run):
    found = json.loads(run("--table", 4, "--seeds", 0, "--json", leave_out=["experts"]).out)
    fpr95 = {name: row["average"]["fpr95"]["mean"] for name, row in found["results"].items()}
    assert list(fpr95) == ["baseline", *(f"{n} experts" for n in (2, 3, 5, 7, 8, 9))]
    for name, row in found["results"].items():
        assert row["gain"]["mean"] == pytest.approx(fpr95["baseline"] - fpr95[name])
    assert found["published"][3]["gain"] == 12.26
    gains = {one["row"]: one for one in found["differences"] if one["measure"] == "gain"}
    assert gains["7 experts"]["published"] == 12.26
    assert gains["7 experts"]["ours"] == pytest.approx(100 * found["results"]["7 experts"]["gain"]["mean"])
    assert (found["table"], found["protocol"], found["backbone"]) == (4, "imagenet-1k", "small/vit")
    lines = run("--table", 4, "--seeds", 0, leave_out=["experts"]).out.splitlines()
    assert lines[0].split()[-2:] == ["accuracy", "gain"]
    (published,) = (line for line in lines if line.startswith("published on DINOv2: 7 experts"))
    assert published.split()[-1] == "12.26"


@pytest.mark.parametrize(
    ("study", "column"),
    [("k", "accuracy"), ("reg_on", "norm"), ("scores", "accuracy"), ("layers", "accuracy"), ("router", "accuracy")],
)
def test_studies(run, study, column):
    printed = run("--study", study, "--seeds", 0, leave_out=["k"] * (study == "k"))
    header, *rows = printed.out.splitlines()
    assert header.split()[-1] == column
    names = [row.split("  ")[0] for row in rows]
    assert ("chosen on the OOD sets" in printed.err) == (study == "k")
    if study == "k":
        assert names[0] == "k=10"
        assert "k=100" not in names  # the banks are smaller
    else:
        assert names == list(STUDIES[study])
    if study == "reg_on":
        assert all(float(row.split()[-1]) > 0 for row in rows)


def test_the_pilot_judges_every_backbone_by_knn_with_other_scores_besides(run, tmp_path):
    printed = run("--study", "pilot", "--backbones", "one", "other", "--json")
    found = json.loads(printed.out)
    assert any("by KNN" in note for note in found["notes"])
    assert (found["backbone"], found["study"], found["table"]) == (["one", "other"], "pilot", None)
    assert found["protocol"] == ["imagenet-1k", "imagenet-o"]
    labels = [
        f"{protocol}, {spec}: {name}"
        for name in ("KNN", "MSP", "MaxLogit", "Energy")
        for protocol in ("imagenet-1k", "imagenet-o")
        for spec in ("one", "other")
    ]
    assert list(found["results"]) == labels
    for label, row in found["results"].items():
        assert label == f"{row['protocol']}, {row['backbone']}: {row['score']}"
        assert list(row["sets"]) == (OOD if row["protocol"] == "imagenet-1k" else ["ImageNet-O", "NINCO"])
        method = "knn" if row["score"] == "KNN" else "linear_probe"
        (file,) = (tmp_path / row["protocol"] / row["backbone"] / method).glob("*.json")
        runs = {run["score"]: run for run in json.loads(file.read_text())["runs"]}
        figures = runs[{"KNN": "knn", "MaxLogit": "max_logit"}.get(row["score"], row["score"].lower())]["average"]
        assert row["average"]["auroc"]["mean"] == figures["auroc"]
    lines = run("--study", "pilot", "--backbones", "one", "other").out.splitlines()
    names = [line.split("  ")[0] for line in lines if not line.startswith("FPR95 (standard)")]
    assert names == [label for protocol in found["protocol"] for label in labels if label.startswith(protocol)]
    alone = json.loads(run("--study", "pilot", "--protocol", "imagenet-o", "--backbones", "one", "--json").out)
    assert list(alone["results"]) == ["one: KNN", "one: MSP", "one: MaxLogit", "one: Energy"]


def test_other_places_go_to_the_protocol_that_has_the_set(run, root):
    printed = run("--study", "pilot", "--backbones", "one", "--set", f"NINCO={root}/SUN", "--dry-run", "--json")
    rows = {row["set"]: row for row in json.loads(printed.out)}
    assert list(rows) == ["train", "test", *OOD, "ImageNet-O", "NINCO"]
    assert rows["NINCO"]["path"].endswith("SUN")


def test_fine_grained_classes_of_every_backbone(run, root, protocol, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("n03417042\ntench\n")
    arguments = ("--study", "fine_grained", "--backbones", "one", "other", "--fine-classes", names)
    found = json.loads(run(*arguments, "--json").out)
    assert list(found["results"]) == ["one", "other"]
    for spec, row in found["results"].items():
        assert [one["name"] for one in row["classes"]] == ["garbage truck", "tench"]
        table = ScoreTable.read(tmp_path / "imagenet-1k" / spec / "knn" / "all.parquet")
        mine = table.frame[(table.frame["source"] == "id") & table.frame["id"].str.contains("n03417042")]["knn"]
        expected = statistics.mean(auroc(mine.to_numpy(), table.scores("knn", name)) for name in OOD)
        assert row["classes"][0]["auroc"] == pytest.approx(expected)
    lines = run(*arguments).out.splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith("FPR95 (standard) / AUROC of a class"))
    assert [line.split("  ")[0] for line in lines[start + 1 :]] == ["garbage truck", "tench"]
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    picture = tmp_path / "fine.svg"
    run(*arguments, "--plot", picture)
    drawn = picture.read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("garbage truck", "tench", "one", "other", "AUROC, percent"))


def test_without_names_the_fine_classes_are_the_smallest_family(protocol):
    edges = imagenet_edges()
    every = sorted({child for _, child in edges} - {parent for parent, _ in edges})
    family = smallest_family(edges, every, 11)
    assert len(family) == 11
    assert {"agama", "Gila monster", "Komodo dragon"} < set(imagenet_words(family))  # lizards
    assert set(smallest_family(edges, every, 2)) <= set(every)
    assert smallest_family(edges, every[:3], 11) == every[:3]
    assert [protocol.wnids[label] for label in fine_labels(protocol)] == WNIDS  # fewer than 11 are all


def test_classes_one_by_one(run, protocol, tmp_path):
    found = json.loads(run("--study", "classes", "--seeds", 0, 1, "--json").out)["results"]
    assert list(found) == ["baseline", "MoFE + D-beta Mixup"]
    folder = tmp_path / "imagenet-1k" / "small-vit"
    for row, files in (("baseline", ["knn/all"]), ("MoFE + D-beta Mixup", ["mofe/seed-0", "mofe/seed-1"])):
        tables = [ScoreTable.read(folder / f"{file}.parquet") for file in files]
        assert [one["name"] for one in found[row]["classes"]] == protocol.class_names
        for label, wnid in enumerate(WNIDS):
            expected = []
            for table in tables:
                mine = table.frame[(table.frame["source"] == "id") & table.frame["id"].str.contains(wnid)]["knn"]
                assert len(mine) == 2
                expected += [
                    (np.subtract.outer(mine.to_numpy(), other) > 0).mean()
                    + (np.subtract.outer(mine.to_numpy(), other) == 0).mean() / 2
                    for other in (table.scores("knn", name) for name in OOD)
                ]
            assert found[row]["classes"][label]["auroc"] == pytest.approx(statistics.mean(expected), abs=1e-9)
    printed = run("--study", "classes", "--seeds", 0, 1).out.splitlines()
    (start,) = (n for n, line in enumerate(printed) if line.startswith("FPR95 (standard) / AUROC of a class"))
    lines = [line.split("  ")[0] for line in printed[start + 1 :]]
    order = sorted(found["MoFE + D-beta Mixup"]["classes"], key=lambda one: one["auroc"])
    assert lines == [f"{'worst' if n < 5 else 'best'}: {one['name']}" for n, one in enumerate(order)]


def test_a_backbone_with_texts_has_the_papers_rows_of_clip(root, tmp_path, capsys):
    quick = [part for name in ("epochs=1", "batch_size=32", "augment=false", "experts=2") for part in ("--param", name)]
    arguments = [
        "--root",
        str(root),
        "--out",
        str(tmp_path),
        "--backbone",
        "tiny",
        "--dtype",
        "float32",
        "--seeds",
        "0",
    ]
    assert main(["reproduce", *arguments, *quick, "--json", "--keep"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["results"]) == [
        "MCM", "MSP", "MaxLogit", "Energy", "KNN", "MOS", "naive fine-tuning", "MoFE + D-beta Mixup",
        "MoFE + D-beta Mixup, knn",
    ]  # fmt: skip
    assert found["table"] == 1
    assert {row["backbone"] for row in found["published"]} == {"CLIP"}
    assert [row["method"] for row in found["published"]][-1] == "MoFE + D-beta Mixup"
    assert found["results"]["MCM"]["accuracy"]["mean"] <= 1
    assert found["results"]["KNN"]["accuracy"] is None
    one, other = (found["results"][f"MoFE + D-beta Mixup{name}"]["average"] for name in ("", ", knn"))
    assert one != other
    folder = tmp_path / "imagenet-1k" / "tiny"
    kept = {
        file.parent.parent.name: json.loads(file.read_text())["params"] for file in folder.glob("*/seed-0/config.json")
    }
    assert {name: options["classifier"] for name, options in kept.items()} == {
        "mofe": "text", "mofe,moe=False,mixup=False,classifier=linear": "linear",
        "mofe,moe=False,mixup=False,classifier=linear,group_heads=True": "linear",
    }  # fmt: skip
    detector = MoFE.from_pretrained(folder / "mofe" / "seed-0")
    words = detector.backbone.encode_text([f"a photo of a {name}" for name in imagenet_words(WNIDS)])
    torch.testing.assert_close(detector.state["model.readout.global_head.weight"], words, rtol=0, atol=1e-6)
    assert sum("not 1,281,167" in note for note in found["notes"]) == 1


def test_a_dry_run_says_what_is_there(run, root, tmp_path):
    assert "30 of 1,281,167" in run("--dry-run").out
    rows = json.loads(run("--dry-run", "--json", "--set", f"SUN={root}/Places").out)
    assert [row["set"] for row in rows] == ["train", "test", *OOD]
    assert rows[3]["path"].endswith("Places")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--study", "q"], 2, "Unknown study 'q'"),
        (["--study", "k", "--table", "3"], 2, "--table 3 or --study k, not both"),
        (["--study", "pilot"], 2, "--backbones SPEC"),
        (["--study", "fine_grained"], 2, "--backbones SPEC"),
        (["--study", "k", "--plot", "x.png"], 2, "belong to --study fine_grained"),
        (["--study", "fine_grained", "--backbones", "tiny", "--plot", "x.gif"], 2, "must end in .png"),
        (["--study", "fine_grained", "--backbones", "tiny", "--fine-classes", "{root}/x.txt"], 3, "No class-name file"),
        (["--study", "pilot", "--backbones", "tiny", "--set", "Sun={root}/SUN"], 2, "Sun"),
        (["--param", "seed=3"], 2, "give --seeds"),
        (["--table", "4", "--param", "experts=3"], 2, "experts=3 would count nowhere"),
        (["--study", "k", "--param", "k=3"], 2, "k=3 would count nowhere"),
        (["--param", "scorer=energy"], 2, "--study scores"),
        (["--backbones", "tiny"], 2, "--study pilot"),
        (["--study", "layers", "--param", "unfreeze_blocks=1"], 2, "are 4 blocks, and 'small/vit' has 3"),
        (["--protocol", "imagenet-101"], 2, "Unknown protocol 'imagenet-101'"),
        (["--protocol", "imagenet-100"], 3, "lacks"),
        (["--param", "expert=3"], 2, "Did you mean 'experts'"),
        (["--table", "4", "--set", "train={root}/SUN"], 3, "train"),
    ],
)
def test_mistakes_are_one_sentence(root, tmp_path, backbone, monkeypatch, capsys, arguments, code, words):
    monkeypatch.setattr(paper, "load_backbone", lambda args, spec: backbone)
    fixed = ["reproduce", "--root", str(root), "--out", str(tmp_path)]
    assert main([*fixed, *(argument.format(root=root) for argument in arguments)]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ood-mofe: ")
    assert words in error
    assert list(tmp_path.iterdir()) == []
