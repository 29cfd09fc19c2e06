import copy
import json

import numpy as np
import pytest
import torch
from ood_core import create_backbone, create_detector, extract
from ood_core.data import scenes
from ood_core.errors import NotFittedError, UsageError
from ood_core.pictures import panels
from ood_iim.detectors import IIM
from ood_iim.explain import explain
from ood_iim.s_mcm import SMCM
from PIL import Image

NAMES = ["striped star", "dotted ring"]
PATCHES = 64


@pytest.fixture(scope="module")
def tiny():
    return create_backbone("tiny", dtype="float32")


@pytest.fixture(scope="module")
def images():
    return [Image.fromarray(pixels) for pixels in scenes.render(NAMES, 4, size=64).images]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = scenes.write_folder(scenes.render(NAMES, 4, size=64), tmp_path_factory.mktemp("shots"))
    detector = IIM(negative_prompts=2, epochs=1, class_names=NAMES)
    detector.attach(tiny)
    return detector.fit(folder, progress=False)


@pytest.fixture
def iim(trained):
    return copy.copy(trained)  # options and calibration may change, what was learned is shared


@pytest.fixture
def smcm(tiny):
    detector = SMCM(class_names=["dog", "cat", "owl"])
    detector.attach(tiny)
    return detector


def pixels(picture, panel, row, column):
    """Colour in the middle of a patch of a panel of a 8 x 8 grid."""
    x, y = 20 + panel * 340 + column * 40 + 20, 80 + row * 40 + 20
    return picture.getpixel((x, y))


def test_terms_sum_to_the_score_of_the_detector(iim, smcm, images):
    variants = [{}, {"negatives": "ignore"}, {"form": "released", "temperature": 0.1, "alpha": 0.5, "k": 3}]
    for detector, options in [(smcm, {}), (smcm, {"alpha": 0.0, "k": 100}), *((iim, options) for options in variants)]:
        found = explain(detector.set_params(**options), images[0])
        expected = detector.score(images[0]).item()
        assert found.score == expected
        assert found.mcm + found.image_to_text + found.text_to_image == pytest.approx(expected, abs=1e-6)


def test_patches_are_the_best_of_the_predicted_class(iim, tiny, images):
    found = explain(iim.set_params(k=7), images[5])
    features = extract(tiny, [images[5]], iim.needs)
    label = int(iim.predict(features))
    assert found.predicted == NAMES[label]
    similarity = features.local[0].double().numpy() @ iim.state["local_text"][label].double().numpy()
    order = sorted(range(PATCHES), key=lambda patch: -similarity[patch])
    assert found.positive_patches == order[:16]  # a quarter of the patches, as in training, whatever k is
    assert found.ood_patches == order[16:32]


@pytest.mark.parametrize(("k", "positive", "ood"), [(5, 5, 5), (40, 40, 24), (64, 64, 0), (100, 64, 0)])
def test_no_more_patches_than_the_grid_has(smcm, images, k, positive, ood):
    found = explain(smcm.set_params(k=k), images[0])
    assert (len(found.positive_patches), len(found.ood_patches)) == (positive, ood)
    assert len({*found.positive_patches, *found.ood_patches}) == positive + ood
    assert found.render().width == 1720


def test_maps_are_the_softmaxes_over_classes_and_over_patches(iim, tiny, images):
    local = extract(tiny, [images[2]], iim.needs).local[0].double()
    logits = (local @ iim.state["local_text"].double().T).numpy()
    negatives = (local @ iim.state["negatives"].double().T).numpy()
    for use, others in (("use", np.exp(negatives).sum(1, keepdims=True)), ("ignore", 0)):
        found = explain(iim.set_params(negatives=use), images[2])
        p = np.exp(logits) / (np.exp(logits).sum(1, keepdims=True) + others)
        q = np.exp(logits) / np.exp(logits).sum(0)
        np.testing.assert_allclose(found.image_to_text_map, p.max(1).reshape(8, 8), rtol=1e-6)
        np.testing.assert_allclose(found.text_to_image_map, q.max(1).reshape(8, 8), rtol=1e-6)
        np.testing.assert_array_equal(found.best_class, p.argmax(1).reshape(8, 8))
        assert found.negatives == (2 if use == "use" else 0)


def test_the_decision_is_that_of_the_calibrated_detector(smcm, images):
    assert explain(smcm, images[0]).is_ood is None
    smcm.calibrate(torch.linspace(-1, 0, 20))
    assert explain(smcm, images[0]).is_ood is False
    smcm.calibrate(torch.linspace(10, 11, 20))
    found = explain(smcm, images[0])
    assert found.is_ood is True
    assert found.threshold == smcm.threshold


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "1"])
def test_images_of_any_shape_and_mode_show_what_the_network_saw(smcm, mode):
    image = Image.linear_gradient("L").resize((200, 90)).convert(mode)
    found = explain(smcm, image)
    assert found.score == smcm.score(image).item()
    assert (found.image.size, found.image.mode) == ((64, 64), "RGB")
    transform = smcm.backbone.transform
    torch.testing.assert_close(transform(found.image), transform(image))


def test_the_dictionary_is_json_and_names_the_classes(iim, images):
    found = explain(iim, images[0])
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["score"] == found.score
    assert read["is_ood"] is None
    assert read["grid"] == [8, 8]
    assert read["best_class"][3][4] == NAMES[found.best_class[3, 4]]
    assert read["image_to_text_map"] == found.image_to_text_map.tolist()
    assert read["positive_patches"] == found.positive_patches


def test_the_picture_shows_patches_classes_and_maps(smcm, images, tmp_path):
    found = explain(smcm, images[0])
    assert found.draw(tmp_path / "new" / "why.PNG") == tmp_path / "new" / "why.PNG"
    with Image.open(tmp_path / "new" / "why.PNG") as picture:
        picture.load()
    classes = len(found.best_class.unique())
    assert picture.format == "PNG"
    assert picture.size == (5 * 320 + 6 * 20, 80 + 320 + 10 + 20 * max(4, classes) + 20)
    for patches, color in ((found.positive_patches, "#0072b2"), (found.ood_patches, "#d55e00")):
        row, column = divmod(patches[0], 8)
        edge = (20 + 340 + 40 * column + 2, 80 + 40 * row + 2)
        assert picture.getpixel(edge) == tuple(panels.rgb(color))
    commonest = int(found.best_class.flatten().mode().values)
    row, column = np.argwhere(found.best_class.numpy() == commonest)[0]
    assert pixels(picture, 2, row, column) == tuple(panels.rgb("#0072b2"))
    for panel, values in ((3, found.image_to_text_map), (4, found.text_to_image_map)):
        for place, color in ((values.argmax(), "#fde725"), (values.argmin(), "#440154")):
            assert pixels(picture, panel, *divmod(int(place), 8)) == tuple(panels.rgb(color))


def test_more_than_eight_classes_share_a_line_and_long_names_fit(smcm, images):
    found = explain(smcm, images[0])
    names = ["a very long name of a class that no panel can hold", "été\n1", "熊", *"abcdefgh"]
    object.__setattr__(found, "class_names", names)
    object.__setattr__(found, "best_class", (torch.arange(64) % 11).view(8, 8))
    assert found.render().height == 80 + 320 + 10 + 9 * 20 + 20
    assert panels.printable("été\n1") == "ete 1"
    assert panels.printable("熊") == "?"


def test_a_constant_map_has_one_colour():
    assert (panels.heat(np.full((2, 3), 0.25)) == panels.rgb("#440154")).all()


def test_what_cannot_be_explained_is_refused(smcm, tiny, images, tmp_path):
    with pytest.raises(UsageError, match="got 'knn'"):
        explain(create_detector("knn", backbone=tiny), images[0])
    with pytest.raises(UsageError, match="no backbone"):
        explain(SMCM(class_names=["dog", "cat"]), images[0])
    unfitted = IIM(class_names=NAMES)
    unfitted.attach(tiny)
    with pytest.raises(NotFittedError, match="fit"):
        explain(unfitted, images[0])
    with pytest.raises(UsageError, match=r"'.*why\.jpg' must end in \.png"):
        explain(smcm, images[0]).draw(tmp_path / "why.jpg")


def test_reports_get_the_picture_of_the_explanation(iim, smcm, images):
    for detector in (iim, smcm):
        assert detector.explain_image(images[3]).tobytes() == explain(detector, images[3]).render().tobytes()
