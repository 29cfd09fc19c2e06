"""The rows of benchmarks/mofe.py on a few scenes: each trains what it says, and is judged as the page needs it."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ood_core import create_backbone, create_detector
from ood_core.data import PILImages, scenes
from PIL import Image

FILE = Path(__file__).parents[1] / "benchmarks" / "mofe.py"
WNIDS = ["n01440764", "n02099601", "n03417042", "n04285008"]
COMMON = {"experts": 2, "epochs": 1, "batch_size": 12, "augment": False, "seed": 0, "k": 2}
COMMON |= {"learning_rate": 1e-3, "head_learning_rate": 1e-2}


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(FILE.parent))
    spec = importlib.util.spec_from_file_location("benchmark_mofe", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FILE.parent))


def rendered(count, seed):
    found = scenes.render(scenes.ID_CLASSES[:4], count, size=64, seed=seed)
    return PILImages([Image.fromarray(i) for i in found.images], found.labels, label_names=scenes.ID_CLASSES[:4])


@pytest.fixture(scope="module")
def sets(benchmark):
    noise = np.random.default_rng(0).integers(0, 256, (2, 4, 64, 64, 3)).astype(np.uint8)
    unknown = {
        name: PILImages([Image.fromarray(i) for i in of]) for name, of in zip(("near", "noise"), noise, strict=True)
    }
    backbone = create_backbone("tiny", dtype="float32")
    return benchmark.Sets(backbone, rendered(4, 0), WNIDS, {"id": rendered(2, 1), **unknown})


def made(benchmark, sets, row, folder):
    options = benchmark.options_of(sets, row, COMMON)
    return benchmark._run(folder, sets, sets.backbone, options), benchmark.fitted(folder, sets, sets.backbone, options)


def test_rows_of_table_6_and_the_controls(benchmark, sets, tmp_path):
    found = {label: made(benchmark, sets, row, tmp_path / label) for label, row in benchmark.MAIN.items()}
    expected = {
        "naive fine-tuning": (False, False, True, "l2"), "MOS": (False, False, True, "l2"),
        "MoFE": (True, False, True, "l2"), "frozen blocks": (True, False, True, "l2"),
        "plain mixup": (False, True, False, "l2"), "no regulariser": (False, True, True, "none"),
        "Dynamic-beta Mixup": (False, True, True, "l2"), "MoFE + Dynamic-beta Mixup": (True, True, True, "l2"),
    }  # fmt: skip
    assert {label: (d.moe, d.mixup, d.dynamic, d.reg) for label, (_, d) in found.items()} == expected
    terms = {label: set(run["history"][0]) for label, (run, _) in found.items()}
    assert "reg" in terms["plain mixup"] & terms["Dynamic-beta Mixup"]
    assert "reg" not in terms["no regulariser"]
    for run, _ in found.values():
        assert {"near", "noise"} <= set(run["scores"]["knn"]["per_set"])
        assert run["scores"]["knn"]["far_mean"]["auroc"] == run["scores"]["knn"]["per_set"]["noise"]["auroc"]
    _, frozen = found["frozen blocks"]
    network, before = frozen.network(), dict(sets.backbone.last_block.named_parameters())
    start = before["mlp.c_fc.weight"].to(network.experts.up_weight).expand_as(network.experts.up_weight)
    torch.testing.assert_close(network.experts.up_weight, start, rtol=0, atol=1e-9)
    assert (found["MoFE"][1].network().experts.up_weight - start).abs().max() > 1e-4
    moved = frozen.state["model.router"] - frozen._network(sets.backbone, frozen.group).router
    assert moved.abs().max() > 1e-3


def test_the_global_bank_of_frozen_blocks_is_knn_with_the_same_images(benchmark, sets, tmp_path):
    run, detector = made(benchmark, sets, benchmark.MAIN["frozen blocks"], tmp_path)
    rows = detector.state["bank_row"].tolist()
    bank, features = sets.frozen_fit().image[rows], sets.of_backbone()
    scores = {name: -torch.cdist(found.image, bank).sort(1).values[:, 1] for name, found in features.items()}
    for name in ("near", "noise"):
        wins = (scores["id"][:, None] - scores[name]).sign().mean().item() / 2 + 0.5
        assert run["scores"]["knn_global"]["per_set"][name]["auroc"] == pytest.approx(wins, abs=0.05)


def test_variations_vary_what_they_say(benchmark, sets):
    for row in benchmark.VARIATIONS.values():
        if row.get("experts", 2) <= len(WNIDS):
            params = create_detector("mofe", **benchmark.options_of(sets, row, COMMON)).get_params()
            assert {name: params[name] for name in row} == row


def test_a_finished_row_is_read_back_and_another_is_told(benchmark, sets, tmp_path, monkeypatch):
    row = benchmark.MAIN["naive fine-tuning"]
    first, _ = made(benchmark, sets, row, tmp_path)
    recorded = json.loads((tmp_path / "results.json").read_text())["recipe"]
    assert set(recorded["images"]) == {"fit", "id", "near", "noise"}
    monkeypatch.setattr(benchmark, "fitted", lambda *_: pytest.fail("it was trained again"))
    options = benchmark.options_of(sets, row, COMMON)
    assert benchmark._run(tmp_path, sets, sets.backbone, options) == json.loads(json.dumps(first))
    with pytest.raises(ValueError, match=r"options\.epochs was 1, is 2"):
        benchmark._run(tmp_path, sets, sets.backbone, options | {"epochs": 2})
