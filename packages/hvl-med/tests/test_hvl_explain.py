import numpy as np
import pytest
import torch
from ood_core import create_detector, extract
from ood_core.data import ImageFolder
from ood_core.errors import NotFittedError, UsageError
from ood_hvl.detectors import HVL
from ood_hvl.explain import explain


@pytest.fixture(scope="module")
def source(image_folder):
    return ImageFolder(image_folder)


@pytest.fixture(scope="module")
def detector(small_backbone, source):
    made = HVL(epochs=3)
    made.attach(small_backbone)
    return made.fit(source, progress=False)


def test_the_parts_are_those_of_the_score(detector, source):
    image = source.open(7)
    found = explain(detector, image)
    features = extract(detector.backbone, [image], {"pyramid"})
    assert found.score == pytest.approx(detector.score(image).item(), abs=1e-6)
    torch.testing.assert_close(found.scale_probabilities.mean(0), found.probabilities)
    assert found.probabilities.max().item() == pytest.approx(found.score, abs=1e-6)
    assert found.predicted == detector.class_names[int(detector.predict(features))]
    for scale in range(2):
        assert torch.equal(found.kept[scale], found.entropies[scale] <= found.entropies[scale].mean() + 1e-6)
    parents = found.entropies[0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(found.gain, found.entropies[1] - parents)
    ranked = np.argsort(-found.gain.flatten().numpy(), kind="stable")
    assert found.pseudo_ood == ranked[:4].tolist()


def test_decisions_and_plain_values(detector, source):
    assert explain(detector, source.open(0)).is_ood is None
    detector.calibrate(source, allow_overlap=True)
    found = explain(detector, source.open(0))
    assert found.is_ood == bool(detector.is_ood(source.open(0)))
    plain = found.to_dict()
    assert plain["threshold"] == detector.threshold
    assert set(plain["whole"]["probabilities"]) == set(source.label_names)
    assert np.array(plain["fine"]["entropies"]).shape == (4, 4)
    assert np.array(plain["middle"]["best_class"]).shape == (2, 2)


def test_the_picture_shows_kept_tiles_bright(detector, source, tmp_path):
    found = explain(detector, source.open(3))
    picture = found.render()
    assert picture.width == 5 * 340 + 20
    for scale, cell in ((0, 160), (1, 80)):
        kept = found.kept[scale]
        for row in range(len(kept)):
            for column in range(len(kept)):
                x, y = column * cell + cell // 2, row * cell + cell // 2
                shown = picture.getpixel((20 + 340 * (1 + scale) + x, 80 + y))
                plain = picture.getpixel((20 + x, 80 + y))
                assert shown == plain if kept[row, column] else sum(shown) <= 0.4 * sum(plain) + 3
    assert found.draw(tmp_path / "why.png").is_file()
    with pytest.raises(UsageError, match=r"must end in \.png"):
        found.draw(tmp_path / "why.jpg")


def test_mistakes(small_backbone, source):
    image = source.open(0)
    with pytest.raises(UsageError, match="got 'mcm'"):
        explain(create_detector("mcm", backbone=small_backbone, class_names=["a", "b"]), image)
    raw = HVL()
    raw.attach(small_backbone)
    with pytest.raises(NotFittedError):
        explain(raw, image)


def test_reports_get_the_picture_of_the_explanation(detector, source):
    image = source.open(2)
    assert detector.explain_image(image).tobytes() == explain(detector, image).render().tobytes()
