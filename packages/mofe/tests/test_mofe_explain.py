import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_core import create_detector, extract
from ood_core.backbones.timm import TimmBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.data import PILImages
from ood_core.errors import DataError, NotFittedError, UsageError
from ood_core.pictures import panels
from ood_mofe.detectors import MoFE
from ood_mofe.explain import Expert, explain
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

NAMES = ["ant", "bee", "cat", "dog", "elk"]
QUICK = {"experts": 3, "epochs": 3, "batch_size": 8, "augment": False, "head_learning_rate": 0.1, "k": 3}


def photos(count, seed):
    """Noise around a colour of the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 5
    colours = np.random.default_rng(7).integers(0, 256, (5, 1, 1, 3))
    pixels = (colours[labels] + rng.normal(0, 40, (count, 16, 16, 3))).clip(0, 255).astype(np.uint8)
    return PILImages(list(map(Image.fromarray, pixels)), labels.tolist(), label_names=NAMES)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=16, depth=2, num_heads=2, num_classes=0, init_values=1.0)
    with torch.no_grad():
        model.pos_embed.zero_()
    return TimmBackbone(model.eval(), ImageTransform(crop=(16, 16), resize=16), spec="small-vit")


@pytest.fixture(scope="module")
def source():
    return photos(40, 0)


@pytest.fixture(scope="module")
def fitted(backbone, source):
    made = MoFE(**QUICK)
    made.attach(backbone)
    return made.fit(source, progress=False)


@pytest.fixture
def detector(fitted):
    """Its own, to be changed."""
    import copy

    return copy.copy(fitted)


@pytest.fixture(scope="module")
def image():
    return photos(5, 3).open(2)


def seen(detector, image):
    """Its expert, and the distances to the bank of that expert [K], nearest first, with their rows."""
    features = extract(detector.backbone, [image], detector.needs)
    expert = int(features.extra["router"].argmax())
    mine = detector.state["bank_expert"] == expert
    token = F.normalize(features.extra["token"], dim=1)
    distances, order = (detector.state["bank"][mine] - token).norm(dim=1).sort()
    return expert, distances, detector.state["bank_row"][mine][order]


# ---- what it says


def test_the_parts_are_those_of_the_score(detector, image):
    found = explain(detector, image)
    assert found.score == pytest.approx(detector.score(image).item(), abs=1e-6)
    assert found.distance == pytest.approx(-found.score, abs=1e-6)
    expert, distances, rows = seen(detector, image)
    assert [one.row for one in found.neighbours] == rows[:6].tolist()
    assert [one.distance for one in found.neighbours] == pytest.approx(distances[:6].tolist(), abs=1e-5)
    assert found.neighbours[found.k - 1].distance == pytest.approx(found.distance, abs=1e-5)
    assert {one.id for one in found.neighbours} == {None}
    assert found.neighbours[0].name == f"training image number {int(rows[0])}"
    features = extract(detector.backbone, [image], detector.needs)
    probability = features.extra["router"][0].softmax(0)
    assert found.experts[0].number == expert
    assert [one.probability for one in found.experts] == pytest.approx(
        probability.sort(descending=True).values.tolist()
    )
    for one in found.experts:
        assert one.classes == [name for name, e in zip(NAMES, detector.group, strict=True) if e == one.number]
    assert found.predicted == NAMES[int(detector.predict(features))]


def test_known_distances_leave_each_training_image_out(detector, source, image):
    found = explain(detector, image)
    expert, *_ = seen(detector, image)
    bank = detector.state["bank"][detector.state["bank_expert"] == expert]
    between = (bank[:, None] - bank).norm(dim=-1).fill_diagonal_(torch.inf)
    expected = between.sort(1).values[:, 2].sort().values  # the third nearest other one
    assert found.reference == "training images, each left out"
    torch.testing.assert_close(found.id_distances, expected, rtol=1e-4, atol=1e-5)
    for one in (found, explain(detector, source.open(int(detector.state["bank_row"][0])))):
        distances = explain(detector, one.image).id_distances
        assert one.farther == pytest.approx((distances >= one.distance).double().mean().item())
    assert one.farther > 0.2  # a training image counts itself among its neighbours
    assert (found.threshold, found.is_ood) == (None, None)


def test_at_most_a_thousand_training_images_are_measured(detector, image, monkeypatch):
    monkeypatch.setattr("ood_mofe.explain._MOST", 4)
    every = explain(detector.set_params(bank="global"), image)
    assert len(every.id_distances) == 4
    assert len(detector.state["bank"]) > 4


def test_a_calibrated_detector_compares_with_its_calibration(detector, image):
    images = photos(25, 5)
    detector.calibrate(images)
    found = explain(detector, image)
    assert found.reference == "calibration images"
    torch.testing.assert_close(found.id_distances, (-detector.score(images)).sort().values)
    assert found.threshold == detector.threshold
    assert found.is_ood == bool(detector.is_ood(image))


def test_another_score_has_no_calibrated_distances(detector, image):
    detector.set_params(scorer="energy").calibrate(photos(25, 5))
    found = explain(detector, image)
    assert found.score == pytest.approx(detector.score(image).item(), abs=1e-5)
    assert found.score > 0 > -found.distance
    assert found.reference == "training images, each left out"
    assert found.is_ood is not None


def test_the_global_bank(detector, image):
    detector.set_params(bank="global", k=7)
    found = explain(detector, image, neighbours=100)
    token = F.normalize(extract(detector.backbone, [image], detector.needs).extra["token"], dim=1)
    expected = (detector.state["bank"] - token).norm(dim=1).sort().values
    assert [one.distance for one in found.neighbours] == pytest.approx(expected.tolist(), abs=1e-5)
    assert found.distance == pytest.approx(float(expected[6]), abs=1e-5)


@pytest.mark.parametrize("left", [0, 1, 2])
def test_banks_of_almost_nothing(detector, image, left):
    expert, *_ = seen(detector, image)
    keep = detector.state["bank_expert"] != expert
    keep[(~keep).nonzero()[:left, 0]] = True
    detector.state = detector.state | {name: detector.state[name][keep] for name in ("bank", "bank_expert", "bank_row")}
    found = explain(detector, image)
    assert (len(found.neighbours), found.k) == (left, left)
    assert found.distance == pytest.approx(-found.score) if left else found.distance == 2.0
    assert len(found.id_distances) == (2 if left == 2 else 0)
    assert (found.farther is None) == (left < 2)
    assert found.render().height > 400


def test_one_block_for_all_classes_is_one_expert(backbone, source, image):
    made = MoFE(**QUICK, moe=False, mixup=False)
    made.attach(backbone)
    found = explain(made.fit(source, progress=False), image)
    assert found.experts == [Expert(0, 1.0, NAMES)]


def test_plain_values(detector, source, image):
    plain = json.loads(json.dumps(explain(detector, image, train=source).to_dict(), allow_nan=False))
    assert plain["experts"][0].keys() == {"number", "probability", "classes"}
    assert plain["neighbours"][0].keys() == {"row", "distance", "id", "label"}
    assert plain["distance"] == pytest.approx(-plain["score"])
    assert len(plain["id_distances"]) > 3


# ---- the training images


def test_neighbours_are_shown_from_the_training_images(detector, source, image):
    found = explain(detector, image, train=source)
    for one in found.neighbours:
        assert one.id == source.ids[one.row]
        assert one.label == one.name == NAMES[source.labels[one.row]]
        assert one.image.tobytes() == source.open(one.row).tobytes()
        token = F.normalize(extract(detector.backbone, [one.image], detector.needs).extra["token"], dim=1)
        entry = detector.state["bank"][detector.state["bank_row"] == one.row]
        torch.testing.assert_close(token, entry, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (lambda: photos(20, 0), "at least .* images, 20 are given"),
        (lambda: photos(45, 0).subset([44, *range(44)]), "is not number"),
    ],
)
def test_other_images_than_those_fitted_on_are_refused(detector, image, others, words):
    with pytest.raises(DataError, match=words):
        explain(detector, image, train=others())


# ---- the picture


def panel(picture, number, x, y):
    return picture.getpixel((20 + 340 * number + x, 80 + y))


def colour(name):
    return tuple(panels.rgb(name))


def test_the_picture(detector, source, image, tmp_path):
    found = explain(detector, image, train=source)
    picture = found.render()
    assert picture.width == 4 * 340 + 20
    width = 320 / 3  # a column per expert, the most probable first and as high as the panel
    for place, expert in enumerate(found.experts):
        height = round(expert.probability / found.experts[0].probability * 319)
        x = round((place + 0.5) * width)
        assert panel(picture, 1, x, 319) == colour(panels.COLORS[place])
        assert panel(picture, 1, x, 319 - height) == colour(panels.COLORS[place])
        if height < 319:
            assert panel(picture, 1, x, 318 - height) == (255, 255, 255)
    cell = 320 // 3
    for place, one in enumerate(found.neighbours):
        middle = [index * cell + cell // 2 for index in (place % 3, place // 3)]
        shown = np.array(panel(picture, 2, *middle), float)
        assert np.abs(shown - np.asarray(one.image).reshape(-1, 3)).sum(1).min() < 60
    low, high = (f(*found.id_distances.tolist(), found.distance) for f in (min, max))
    x = 2 + round((found.distance - low) / (high - low) * 315)
    assert panel(picture, 3, x, 3) == colour(panels.COLORS[5])
    assert found.draw(tmp_path / "why.png").is_file()
    with pytest.raises(UsageError, match=r"must end in \.png"):
        found.draw(tmp_path / "why.jpg")


def test_without_training_images_distances_are_drawn(detector, image):
    found = explain(detector, image)
    picture, width = found.render(), 320 / len(found.neighbours)
    for place, one in enumerate(found.neighbours):
        top = 319 - round(one.distance / found.neighbours[-1].distance * 319)
        x = round((place + 0.5) * width)
        assert panel(picture, 2, x, min(top + 1, 319)) == colour(panels.COLORS[4])
        if top > 1:
            assert panel(picture, 2, x, top - 2) == (255, 255, 255)


def test_reports_show_the_picture_where_the_score_is_a_distance(detector, image):
    assert detector.explain_image(image).tobytes() == explain(detector, image).render().tobytes()
    assert detector.set_params(scorer="energy").explain_image(image) is None


def test_mistakes(backbone, image):
    with pytest.raises(UsageError, match="got 'knn'"):
        explain(create_detector("knn", backbone=backbone), image)
    raw = MoFE()
    raw.attach(backbone)
    with pytest.raises(NotFittedError, match=r"call fit\(images\)"):
        explain(raw, image)
    with pytest.raises(UsageError, match="no backbone"):
        explain(MoFE(), image)
