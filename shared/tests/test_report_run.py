"""What an evaluation hands to its report: comparisons, calibration curves, pictures."""

import numpy as np
import pytest
import torch
from ood_core import create_detector, evaluate
from ood_core.data import scenes
from ood_core.detectors.mcm import MCM
from ood_core.fusion import Fusion
from ood_core.metrics import paired_bootstrap
from ood_core.scores import ScoreTable
from PIL import Image


def run(clustered, detectors, **options):
    options = {"fit": clustered(), "calibrate": clustered(3), "bootstrap": 40, "seed": 5} | options
    sets = {"far": clustered(2, far=True), "same": clustered(4)}
    return evaluate(detectors, id=clustered(1), ood=sets, **options)


def two_detectors():
    return {"knn": create_detector("knn", k=5), "mahalanobis": create_detector("mahalanobis")}


@pytest.mark.parametrize("turn", [1, -1])
def test_every_detector_is_compared_with_the_best(clustered, turn):
    detectors = two_detectors() | {"one": create_detector("knn", k=1)}
    detectors = dict([*detectors.items()][::turn])
    found = run(clustered, detectors)
    columns = {s: {n: found.scores.scores(n, s) for n in detectors} for s in ("id", "far", "same")}
    best = max(detectors, key=lambda name: found.metrics[name].mean.auroc)
    expected = paired_bootstrap(columns.pop("id"), columns, reference=best, bootstrap=40, seed=5)
    assert found.results["comparison"] == expected.to_dict()
    assert set(expected.mean) == set(detectors) - {best}
    assert "comparison" not in run(clustered, detectors, bootstrap=0).results
    assert run(clustered, detectors["knn"]).results["comparison"] is None


def test_fusions_are_compared_with_their_members_of_the_run(clustered):
    detectors = two_detectors()
    absent = create_detector("knn", k=1)
    fused = Fusion({**detectors, "absent": absent})
    found = run(clustered, detectors | {"fused": fused})
    record = found.results["detectors"]["fused"]["against_members"]
    assert (record["reference"], set(record["detectors"])) == ("fused", set(detectors))
    own = found.metrics["knn"].mean.auroc - found.metrics["fused"].mean.auroc
    assert record["detectors"]["knn"]["average"]["difference"] == pytest.approx(own, abs=1e-12)
    assert "against_members" not in found.results["detectors"]["knn"]
    alone = run(clustered, {"fused": Fusion(two_detectors())})
    assert "against_members" not in alone.results["detectors"]["fused"]


def test_images_that_one_detector_lacks_are_not_compared(clustered):
    from ood_core.evaluation import _compared

    found = run(clustered, two_detectors())
    frame = found.scores.frame.copy()
    frame.loc[[0, 130], "knn"] = np.nan
    frame.loc[7, "status"] = "truncated"
    kept = frame[(frame["status"] == "ok") & frame["knn"].notna()].reset_index(drop=True)
    assert len(kept) == len(frame) - 3
    names = ["mahalanobis", "knn"]
    expected = _compared(ScoreTable(kept), names, 40, 5)
    assert expected["reference"] == "mahalanobis"
    assert _compared(ScoreTable(frame), names, 40, 5) == expected
    frame.loc[frame["source"] == "far", "knn"] = np.nan
    assert _compared(ScoreTable(frame), names, 40, 5) is None


def test_calibration_curve_is_that_of_the_thresholds(clustered):
    detectors = two_detectors() | {"fused": Fusion(two_detectors())}
    found = run(clustered, detectors)
    for name, detector in detectors.items():
        figures = found.results["detectors"][name]
        nominal, accepted = figures["acceptance"]["nominal"], figures["acceptance"]["accepted"]
        assert accepted[nominal.index(0.95)] == figures["id_accepted"]
        assert nominal[-1] == 1
        scores = torch.from_numpy(found.scores.scores(name, "id").copy())
        half = detector.calibration.scores[-60:]  # of 120
        assert accepted[nominal.index(0.5)] == pytest.approx(float((scores >= half.min()).double().mean()))
    plain = run(clustered, two_detectors(), calibrate=None)
    assert "acceptance" not in plain.results["detectors"]["knn"]


class Explained(MCM):
    name = "explained"

    def explain_image(self, image):
        return Image.new("RGB", (100, 50), image.getpixel((0, 0)))


def test_reports_show_the_pictures_of_the_detectors(small_backbone, image_folder, tmp_path):
    options = {"backbone": small_backbone, "class_names": scenes.ID_CLASSES[:4]}
    plain = create_detector("mcm", **options)
    special = Explained(class_names=options["class_names"])
    special.attach(small_backbone)
    other = scenes.write_folder(scenes.textures(5, size=32), tmp_path / "textures")
    found = evaluate([plain, special], id=image_folder, ood={"textures": other}, out=tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('alt="How explained came to its score of ') == 4
    assert "How mcm came" not in page
    image = found.open_image("textures", found.scores.frame["id"].iloc[-1])
    assert found.explain_image("explained", image).getpixel((3, 3)) == image.getpixel((0, 0))
    assert found.explain_image("mcm", image) is None
