"""The scoring loop and its table: right figures, right rows, images encoded once, clear refusals."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from ood_core import create_detector, evaluate
from ood_core.data import scenes
from ood_core.errors import DataError, MissingDataError, NotFittedError, UsageError
from ood_core.features import FeatureSet, extract
from ood_core.metrics import auroc, fpr_at_tpr
from ood_core.scores import ScoreTable


@pytest.fixture
def found(clustered, tmp_path):
    detectors = [create_detector("knn", k=5), create_detector("mahalanobis")]
    return evaluate(
        detectors,
        id=clustered(1),
        ood={"far": clustered(2, far=True), "other": clustered(4, far=True)},
        fit=clustered(),
        calibrate=clustered(3),
        bootstrap=20,
        out=tmp_path / "out",
    )


def test_figures_are_those_of_the_scores(found, clustered, tmp_path):
    knn = create_detector("knn", k=5).fit(clustered())
    id_scores, far_scores = knn.score_features(clustered(1)), knn.score_features(clustered(2, far=True))
    figures = found.results["detectors"]["knn"]
    assert figures["per_set"]["far"]["auroc"] == pytest.approx(auroc(id_scores, far_scores), abs=1e-12)
    assert figures["per_set"]["far"]["fpr95"] == pytest.approx(fpr_at_tpr(id_scores, far_scores), abs=1e-12)
    assert figures["per_set"]["far"]["n"] == 120
    assert figures["average"]["auroc"] == pytest.approx(
        np.mean([figures["per_set"][s]["auroc"] for s in ("far", "other")])
    )
    assert figures["threshold"] == knn.calibrate(clustered(3)).threshold
    assert figures["id_accepted"] == pytest.approx(float((id_scores >= knn.threshold).double().mean()))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(found.results))
    assert ScoreTable.read(tmp_path / "out" / "scores.parquet").frame.equals(found.scores.frame)


def test_each_set_is_encoded_once_per_backbone(small_backbone, image_folder, tmp_path, monkeypatch):
    calls = []
    encode = type(small_backbone).encode

    def counted(self, x, needs, **options):
        calls.append((len(x), frozenset(needs)))
        return encode(self, x, needs, **options)

    monkeypatch.setattr(type(small_backbone), "encode", counted)
    other = scenes.write_folder(scenes.textures(7, size=32), tmp_path / "textures")
    names = scenes.ID_CLASSES[:4]
    detectors = [create_detector(n, backbone=small_backbone, class_names=names) for n in ("mcm", "gl_mcm", "knn")]
    found = evaluate(detectors, id=image_folder, ood={"textures": other}, fit=image_folder)
    assert sum(count for count, _ in calls) == 20 + 20 + 7  # once to fit kNN, once each to score
    assert found.scores.sources == ["id", "textures"]
    assert found.scores.detectors == ["mcm", "gl_mcm", "knn"]
    assert found.open_image("id", "brick square/00000.png").size == (40, 40)


def test_a_large_source_is_scored_in_parts(small_backbone, image_folder, monkeypatch):
    from ood_core import features

    whole = create_detector("gl_mcm", backbone=small_backbone, class_names=scenes.ID_CLASSES[:4])
    expected = whole.score_features(extract(small_backbone, image_folder))
    monkeypatch.setattr(features, "_SHARD", 6)
    seen = []
    score = type(whole)._score
    monkeypatch.setattr(type(whole), "_score", lambda self, part: seen.append(len(part)) or score(self, part))
    found = evaluate(whole, id=image_folder, ood={"same": image_folder})
    assert seen == [6, 6, 6, 2] * 2
    np.testing.assert_allclose(found.scores.scores("gl_mcm", "same"), expected.numpy(), rtol=1e-6)
    np.testing.assert_allclose(whole.score(image_folder).numpy(), expected.numpy(), rtol=1e-6)


def test_detectors_of_two_backbones_meet_by_id(small_backbone, image_folder):
    torch.manual_seed(1)
    from ood_core.backbones.open_clip import OpenCLIPBackbone
    from ood_core.tiny import ByteTokenizer, TinyConfig, build_model

    config = TinyConfig(
        image_size=32, width=16, layers=1, heads=2, embed_dim=8, stem=(4, 8), text_width=16, text_heads=2
    )
    other = OpenCLIPBackbone(build_model(config), ByteTokenizer(), small_backbone.transform, spec="other")
    names = scenes.ID_CLASSES[:4]
    detectors = {
        "first": create_detector("mcm", backbone=small_backbone, class_names=names),
        "second": create_detector("mcm", backbone=other, class_names=names),
    }
    found = evaluate(detectors, id=image_folder, ood={"same": image_folder})
    for name, detector in detectors.items():
        np.testing.assert_allclose(found.scores.scores(name, "id"), detector.score(image_folder).numpy(), rtol=1e-6)
    assert {b["spec"] for b in found.results["environment"]["backbones"]} == {"small", "other"}
    assert found.results["detectors"]["first"]["per_set"]["same"]["auroc"] == 0.5


def test_refusals(clustered):
    knn = create_detector("knn", k=5)
    with pytest.raises(NotFittedError, match=r"'knn' must be fitted.*fit="):
        evaluate(knn, id=clustered(), ood={"far": clustered(2, far=True)})
    with pytest.raises(UsageError, match="at least one OOD set"):
        evaluate(knn, id=clustered(), ood={}, fit=clustered())
    with pytest.raises(UsageError, match="'id' is the ID test set"):
        evaluate(knn, id=clustered(), ood={"id": clustered()}, fit=clustered())
    with pytest.raises(UsageError, match="Two detectors are named 'knn'"):
        evaluate([knn, create_detector("knn")], id=clustered(), ood={"far": clustered()}, fit=clustered())
    with pytest.raises(DataError, match="no detector"):
        evaluate([], id=clustered(), ood={"far": clustered()})


def test_table_rows_failures_and_labels():
    features = FeatureSet(
        ids=["b", 'a,\n"x"'],
        labels=torch.tensor([1, -1]),
        label_names=["cat", "dog"],
        image=torch.eye(2),
        failures=[("c", "is empty")],
    )
    table = ScoreTable.of(features, {"mcm": torch.tensor([0.25, 0.5])}, source="pets")
    assert table.frame["id"].tolist() == ["b", 'a,\n"x"', "c"]
    assert table.frame["source"].tolist() == ["pets"] * 3
    assert table.frame["label"].fillna("none").tolist() == ["dog", "none", "none"]
    assert table.frame["status"].tolist() == ["ok", "ok", "is empty"]
    assert table.frame["mcm"].tolist()[:2] == [0.25, 0.5]
    assert np.isnan(table.frame["mcm"].iloc[2])
    assert table.frame["mcm"].dtype == np.float32
    assert table.scores("mcm", "pets").tolist() == [0.25, 0.5]


def test_tables_join_by_id_not_by_position(clustered, tmp_path):
    whole = clustered()
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    first = ScoreTable.of(whole, {"x": whole.image[:, 0]})
    second = ScoreTable.of(whole[order], {"y": whole.image[order, 0]})
    joined = first.join(second)
    assert (joined.frame["x"] == joined.frame["y"]).all()
    assert second.join(first).frame["id"].tolist() == [whole.ids[i] for i in order]
    assert joined.detectors == ["x", "y"]
    assert joined.select(["y"]).detectors == ["y"]
    with pytest.raises(UsageError, match="Unknown detector in this table 'z'"):
        joined.select(["z"])
    with pytest.raises(UsageError, match="missing='drop'"):
        first.join(second, missing="drop")
    with pytest.raises(DataError, match="one of the two tables only"):
        first.join(ScoreTable.of(whole[1:], {"y": whole.image[1:, 0]}))
    with pytest.raises(DataError, match="'x' stands in both"):
        first.join(first)
    with pytest.raises(DataError, match="twice"):
        ScoreTable.concatenate([first, first])
    with pytest.raises(UsageError, match="Did you mean 'x'"):
        first.scores("X", "id")
    with pytest.raises(MissingDataError, match="No score table"):
        ScoreTable.read(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="no readable parquet"):
        ScoreTable.read(tmp_path / "bad.parquet")
    pd.DataFrame({"id": ["a"]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match="needs the columns"):
        ScoreTable.read(tmp_path / "other.parquet")


def test_reasons_and_labels_survive_a_join():
    def part(name, ids, failures=()):
        labels, image = torch.zeros(len(ids), dtype=torch.long), torch.ones(len(ids), 2)
        features = FeatureSet(ids=ids, labels=labels, label_names=["cat"], image=image, failures=list(failures))
        return ScoreTable.of(features, {name: np.arange(len(ids))})

    first = part("x", ["b", "a"], [("c", "is empty"), ("e", "is a film")])
    second = part("y", ["d", "c", "b"], [("a", "is torn"), ("f", "is lost")])
    joined = first.join(second, missing="record").frame
    assert joined["id"].tolist() == ["b", "a", "c", "e", "d", "f"]
    lost = "no row with a score of"
    assert joined["status"].tolist() == ["ok", "is torn", "is empty", "is a film", f"{lost} x", "is lost"]
    assert joined["label"].fillna("none").tolist() == ["cat", "cat", "none", "none", "cat", "none"]
    assert joined["x"].dtype == joined["y"].dtype == np.float32
    with pytest.raises(DataError, match="Image 'e' of 'id' stands in one of the two tables only"):
        first.join(second)


def test_unlabelled_features_have_no_labels(clustered):
    table = ScoreTable.of(replace(clustered(), labels=None), {"x": np.zeros(120)})
    assert table.frame["label"].isna().all()


def test_a_kept_cache_gives_the_same_table(small_backbone, image_folder, tmp_path):
    detector = create_detector("mcm", backbone=small_backbone, class_names=scenes.ID_CLASSES[:4])
    fresh = detector.score_features(extract(small_backbone, image_folder, needs={"image"}))
    for _ in range(2):
        torch.testing.assert_close(detector.score(image_folder, cache=tmp_path), fresh, rtol=1e-6, atol=0)
