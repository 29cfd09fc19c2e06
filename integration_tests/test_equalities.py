"""Methods that must agree where the papers make them equal, on every kernel backend, and all four in one pipeline."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_core import Fusion, ImageFolder, create_backbone, create_detector, evaluate, extract
from ood_core.backbones.timm import TimmBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.data import FewShot, ParquetImages, PILImages, scenes
from ood_core.detectors.base import Detector
from ood_core.errors import UsageError
from ood_core.metrics import auroc
from ood_hvl.pyramid import with_pyramid
from ood_mofe.model import MoFENetwork
from ood_setar import SeTAREdit
from timm.models.vision_transformer import VisionTransformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLASSES = sorted(scenes.ID_CLASSES[:3])
BRIEF = {
    "iim": {"epochs": 2, "negative_prompts": 3, "context_length": 4},
    "setar": {"ratios": [0.0, 0.4], "order": "visual_only"},
    "hvl": {"n": 1, "k": 1, "epochs": 10},
    "mofe": {"experts": 2, "epochs": 1, "batch_size": 12, "augment": False, "k": 3, "head_learning_rate": 1e-2},
}
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    sets = {
        "train": scenes.render(CLASSES, 8, seed=1),
        "held": scenes.render(CLASSES, 8, seed=2),
        "test": scenes.render(CLASSES, 4, seed=3),
        "noise": scenes.noise(12),
    }
    return {name: scenes.write_folder(made, root / name) for name, made in sets.items()}


@pytest.fixture(scope="module")
def tiny():
    return create_backbone("tiny", device=DEVICE)


@pytest.fixture(scope="module")
def features(tiny, folders):
    return extract(tiny, folders["test"])


def create(name, backbone, **options):
    return create_detector(name, backbone=backbone, class_names=CLASSES, **BRIEF.get(name, {}) | options)


@pytest.fixture(scope="module")
def iim(tiny, folders):
    return create("iim", tiny).fit(extract(tiny, folders["train"]))


@pytest.fixture(scope="module")
def mofe(tiny, folders):
    return create("mofe", tiny).fit(folders["train"])


# ---- one method as a case of another


@pytest.mark.parametrize("options", [{}, {"k": 3}, {"k": 7, "temperature": 0.02}])
def test_s_mcm_without_its_second_term_is_r_mcm(tiny, features, options):
    ours, theirs = create("s_mcm", tiny, alpha=0.0, **options), create("r_mcm", tiny, **options)
    assert torch.equal(ours.score_features(features), theirs.score_features(features))


@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_r_mcm_of_the_single_best_patch_is_gl_mcm(tiny, features, temperature):
    ours = create("r_mcm", tiny, k=1, temperature=temperature)
    theirs = create("gl_mcm", tiny, temperature=temperature)
    assert torch.equal(ours.score_features(features), theirs.score_features(features))


def test_iim_with_the_plain_prompts_is_s_mcm(tiny, iim, features):
    """Nothing learned is left in it once its texts are the zero-shot ones."""
    plain = create("s_mcm", tiny, template="a photo of a {}.")
    changed = iim.variants()["s_mcm*"]
    assert not torch.equal(changed.score_features(features), plain.score_features(features))
    changed.state = iim.state | {"local_text": iim.state["text"]}
    assert torch.equal(changed.score_features(features), plain.score_features(features))


@pytest.mark.parametrize("scorer", ["mcm", "gl_mcm"])
def test_setar_that_drops_nothing_is_its_score_bit_for_bit(tiny, folders, features, scorer):
    nothing = SeTAREdit(dict.fromkeys(tiny.linears(), 0.0), tiny.fingerprint)
    setar = create("setar", tiny, scorer=scorer).use(nothing)
    assert setar.backbone.fingerprint == tiny.fingerprint
    edited = extract(setar.backbone, folders["test"])
    assert torch.equal(edited.image, features.image)
    assert torch.equal(edited.local, features.local)
    plain = create(scorer, tiny)
    assert torch.equal(setar.score(folders["test"]), plain.score_features(features))


def layer_scaled_vit():
    """A small random network whose layer scales are near 1, so that the last block matters."""
    model = VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2, num_classes=0, init_values=1.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else noise / parameter[0].numel() ** 0.5)
    return TimmBackbone(model, ImageTransform(crop=(32, 32), resize=32), spec="layer-scaled")


@pytest.mark.parametrize("make", [lambda: create_backbone("tiny"), layer_scaled_vit], ids=["tiny", "layer scale"])
@pytest.mark.parametrize("options", [{}, {"tokens": "all"}, {"gate": "renorm", "top_k": 2}])
def test_experts_before_the_first_step_are_the_backbone(make, options):
    backbone = make()
    network = MoFENetwork.from_backbone(backbone, torch.tensor([0, 1, 2, 1]), experts=3, **options)
    x = torch.randn(6, 3, *backbone.transform.crop, generator=torch.Generator().manual_seed(1))
    tokens = backbone.prefix(x)
    for expert in (torch.zeros(6).long(), torch.tensor([2, 1, 0, 0, 1, 2])):
        behind = network.class_token(tokens, expert, network.router_logits(tokens))
        token = network.norm(behind)
        ours = backbone.project(token) if "text" in backbone.capabilities else token
        torch.testing.assert_close(F.normalize(ours, dim=1), backbone.encode_image(x), **ROUNDING)
        assert (behind - tokens[:, 0]).abs().max() > 0.1


def test_mofe_that_learns_nothing_is_knn_on_the_backbone(folders):
    backbone, source = layer_scaled_vit(), ImageFolder(folders["train"])
    still = {"learning_rate": 1e-30, "head_learning_rate": 1e-30, "weight_decay": 0.0, "bank": "global"}
    mofe = create("mofe", backbone, **still).fit(source)
    bank = extract(backbone, source.subset(mofe.state["bank_row"].numpy()), {"image"})
    knn = create("knn", backbone, k=3).fit(bank)
    torch.testing.assert_close(mofe.score(folders["test"]), knn.score(folders["test"]), **ROUNDING)


def test_pyramids_share_their_tiles(tiny, folders):
    """At n = 1 the middle tile is the whole image, and the fine tiles are the middle ones of n = 2."""
    images = ImageFolder(folders["test"]).subset(range(3))
    whole = tiny.encode_image(torch.stack([tiny.transform(image) for _, image in images]), normalize=False).cpu()
    pyramids = (with_pyramid(tiny, n, dtype=torch.float32) for n in (1, 2))
    one, two = (extract(backbone, images, {"pyramid"}).extra["pyramid"] for backbone in pyramids)
    rounding = {"rtol": 1e-5, "atol": 1e-5 * whole.abs().max().item()}
    for part in (one[:, 0], one[:, 1], two[:, 0]):
        torch.testing.assert_close(part, whole, **rounding)
    torch.testing.assert_close(one[:, 2:], two[:, 1:5], **rounding)


@pytest.mark.parametrize("combine", ["mean", "max", "min"])
def test_a_fusion_with_itself_ranks_as_its_member(tiny, folders, features, combine):
    member, held = create("s_mcm", tiny), extract(tiny, folders["held"])
    fused = Fusion({"one": member, "again": member}, normalize="z_score", combine=combine).calibrate(held)
    scores = member.score_features(features)
    assert torch.equal(fused.score_features(features).argsort(), scores.argsort())
    assert torch.equal(fused.is_ood(features), member.calibrate(held).is_ood(features))
    weighted = Fusion(
        {"one": member, "other": create("mcm", tiny)}, normalize="z_score", weights={"one": 1, "other": 0}
    )
    assert torch.equal(weighted.calibrate(held).score_features(features).argsort(), scores.argsort())
    with pytest.raises(UsageError, match="two or more detectors"):
        Fusion([member])


# ---- kernels


@pytest.fixture(scope="module")
def matched(tiny, iim):
    """Detectors that compare patches with classes by the shared operation."""
    detectors = {name: create(name, tiny) for name in ("gl_mcm", "r_mcm", "s_mcm")}
    return detectors | {f"iim's {name}": made for name, made in iim.variants().items() if name != "mcm"}


@pytest.fixture(scope="module")
def chosen(matched, mofe, features, folders):
    """Scores by the backend that is chosen without being told."""
    found = {name: detector.score_features(features[:5]) for name, detector in matched.items()}
    return found | {"mofe": mofe.score(ImageFolder(folders["test"]).subset(range(5)))}


@pytest.fixture(params=["reference", "torch", *(["triton"] if find_spec("triton") else [])])
def backend(request, chosen, monkeypatch):
    """Its name, with every operation forced on it, and the list of operations that ran."""
    ran = []
    for name in ("ood_core.ops.topk_patch_softmax", "ood_mofe.ops.expert_dispatch"):
        module = sys.modules[name]

        def forced(operation, given, *tensors, choose=module.implementation, **form):
            ran.append(operation)
            return choose(operation, given or request.param, *tensors, **form)

        monkeypatch.setattr(module, "implementation", forced)
    return request.param, ran


def test_every_backend_gives_every_detector_the_same_scores(matched, mofe, features, folders, backend, chosen):
    _, ran = backend
    there = features[:5]._with_columns({name: value.to(DEVICE) for name, value in features[:5]._columns().items()})
    found = {name: detector.score_features(there) for name, detector in matched.items()}
    assert ran == ["ood_core.ops.topk_patch_softmax"] * len(matched)
    found["mofe"] = mofe.score(ImageFolder(folders["test"]).subset(range(5)))
    assert ran[len(matched) :] == ["ood_mofe.ops.expert_dispatch"]
    for name, scores in found.items():
        torch.testing.assert_close(
            scores, chosen[name], **ROUNDING, msg=lambda message, name=name: f"{name}: {message}"
        )


# ---- together


def test_experts_and_patches_of_one_clip_tower_in_one_fusion(tiny, mofe, features, folders, tmp_path):
    """The experts stand behind a tower whose patches S-MCM goes on reading as they were."""
    cache = {"cache": tmp_path / "cache"}
    alone = create("s_mcm", tiny)
    fused = Fusion([create("mofe", tiny), alone]).fit(folders["train"]).calibrate(folders["held"], **cache)
    tokens = extract(mofe.backbone, folders["test"], mofe.needs, **cache)
    expected = mofe.score_features(tokens), alone.score_features(features)
    assert torch.equal(fused.members["mofe"].score_features(tokens), expected[0])
    p_values = [
        member.calibrate(member.score(folders["held"], **cache)).p_value(scores)
        for member, scores in zip((mofe, alone), expected, strict=True)
    ]
    scores = fused.score(folders["test"], **cache)
    torch.testing.assert_close(scores, sum(p_values) / 2, rtol=1e-6, atol=0)
    assert auroc(scores, fused.score(folders["noise"], **cache)) > 0.9
    fused.save_pretrained(tmp_path / "fused")
    loaded = Detector.from_pretrained(tmp_path / "fused")
    assert torch.equal(loaded.score(folders["test"], **cache), scores)


PACKS = Path(__file__).parents[2] / "shared" / "data"


def generated(folders):
    return {name: ImageFolder(folder) for name, folder in folders.items()}


def photographed(_):
    """Skin lesions of three kinds, and pieces of gut."""

    def lesions(split, shots):
        source = ParquetImages(PACKS / "dermatology-ham10000.parquet", split=split)
        return FewShot(source.with_labels_from(["mel", "nv", "vasc"]), shots, 1)

    gut = ParquetImages(PACKS / "histology-colorectal.parquet", split="test")
    return {
        "train": lesions("train", 8),
        "held": lesions("val", 8),
        "test": lesions("test", 4),
        "noise": gut.subset(range(12)),
    }


DATA = [generated, *([pytest.param(photographed, marks=pytest.mark.packs)] if PACKS.is_dir() else [])]


@pytest.mark.parametrize("data", DATA)
def test_all_four_methods_in_one_fused_pipeline(tiny, folders, data, tmp_path):
    """Fitted, calibrated, fused, judged and saved together; each scores as it does alone."""
    sets = data(folders)
    made = {name: create_detector(name, backbone=tiny, **BRIEF[name]) for name in ("iim", "setar", "hvl", "mofe")}
    fused = Fusion(made)
    given = {"fit": sets["train"], "calibrate": sets["held"], "id": sets["test"], "ood": {"far": sets["noise"]}}
    cache = {"cache": tmp_path / "cache"}
    found = evaluate({**made, "fusion": fused}, **given, **cache, out=tmp_path / "results")
    p_values = []
    for name, detector in made.items():
        scores = found.scores.scores(name, "far")
        np.testing.assert_allclose(scores, detector.score(sets["noise"], **cache).numpy(), **ROUNDING)
        p_values.append(detector.p_value(scores))
    scores = {source: found.scores.scores("fusion", source) for source in ("id", "far")}
    np.testing.assert_allclose(scores["far"], sum(p_values) / 4, rtol=1e-6)
    figures = found.results["detectors"]
    assert figures["fusion"]["average"]["auroc"] == pytest.approx(auroc(scores["id"], scores["far"]), abs=1e-12)
    # The backbone never saw the names of skin lesions: briefly fitted IIM and HVL, which rest on texts, are at chance
    # there, while MoFE's neighbours separate the sets nearly perfectly; their equal mean lies between.
    assert figures["fusion"]["average"]["auroc"] > (0.9 if data is generated else 0.5)
    assert len({detector.backbone.fingerprint for detector in (*made.values(), create("mcm", tiny))}) >= 3
    fused.save_pretrained(tmp_path / "fusion")
    loaded = Detector.from_pretrained(tmp_path / "fusion")
    np.testing.assert_allclose(loaded.score(sets["noise"], **cache), scores["far"], rtol=1e-6)
    assert (tmp_path / "results" / "report.html").is_file()


# ---- the same image twice


def test_an_image_has_one_score_wherever_it_stands(tiny, mofe, folders):
    """Benchmarks' lists name some images twice, and some in two sets: each is kept, and scored alike."""
    ours, noise = ([image for _, image in ImageFolder(folders[name])] for name in ("test", "noise"))
    detectors = {"mofe": mofe, "s_mcm": create("s_mcm", tiny)}
    once = evaluate(detectors, id=PILImages(ours), ood={"noise": PILImages(noise)})
    sets = {"noise": PILImages([image for image in noise for _ in range(2)]), "ours": PILImages(ours)}
    twice = evaluate(detectors, id=PILImages(ours + ours[::-1]), ood=sets)
    for name in detectors:
        scores = once.scores.scores(name, "id")
        for again in (twice.scores.scores(name, "ours"), *twice.scores.scores(name, "id").reshape(2, -1)):
            assert sorted(again) == pytest.approx(sorted(scores), rel=1e-5, abs=1e-6)
        figures, before = (found.results["detectors"][name]["per_set"] for found in (twice, once))
        assert figures["noise"]["auroc"] == pytest.approx(before["noise"]["auroc"], abs=1e-12)
        assert figures["noise"]["n"] == 2 * before["noise"]["n"]
        assert figures["ours"]["auroc"] == pytest.approx(0.5, abs=0.05)
