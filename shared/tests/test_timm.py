"""timm: EVA and DINOv3, options, weights from files, grey images, wrappers, what was decided."""

import json
import logging

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from ood_core import create_backbone
from ood_core.backbones.loading import unwrapped
from ood_core.backbones.timm import TimmBackbone, image_transform
from ood_core.errors import DataError, MissingDataError, UsageError
from PIL import Image
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import nn


def randomized(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise / max(parameter[0].numel(), 9) ** 0.5 if parameter.ndim else noise)
    return model.eval()


def eva(**options):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0} | options
    return randomized(Eva(**options))


DINOV3 = {
    "use_rot_pos_emb": True, "use_abs_pos_emb": False, "rope_type": "dinov3", "rope_temperature": 100,
    "rope_rotate_half": True, "num_reg_tokens": 4, "use_fc_norm": False, "init_values": 1e-1, "dynamic_img_size": True,
    "qkv_bias": False, "global_pool": "token",
}  # fmt: skip
EVA02 = {
    "use_rot_pos_emb": True, "ref_feat_shape": (4, 4), "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False,
    "mlp_ratio": 8 / 3, "scale_attn_inner": True,
}  # fmt: skip
FAMILIES = {
    "dinov3": DINOV3,
    "dinov3 with biases, gated, rectangular": DINOV3 | {"qkv_bias": True, "swiglu_mlp": True, "img_size": (32, 48)},
    "dinov3 at another size": DINOV3 | {"img_size": 48},
    "eva02": EVA02,
    "eva02 fused": EVA02 | {"qkv_fused": True, "swiglu_mlp": True, "scale_mlp": False, "num_classes": 3},
    "eva with post-norm": {"use_post_norm": True},
    "rotary mixed": {"use_rot_pos_emb": True, "rope_type": "mixed", "attn_type": "rope", "qk_norm": True},
    "grouped values": {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "use_rot_pos_emb": True},
    "gated attention, no class token": {"class_token": False, "global_pool": "avg", "init_values": 0.2},
    "attention pool": {"global_pool": "map", "class_token": False},
}


def backbone_of(model, spec="timm:test"):
    return TimmBackbone(model, image_transform(model), spec=spec)


def pixels(backbone, count=2):
    return torch.randn(count, 3, *backbone.transform.crop, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_eva_blocks_are_the_networks_and_patches_are_patches(options):
    model = eva(**options)
    backbone = backbone_of(model)
    backbone.model.double()
    x = pixels(backbone).double()
    with torch.no_grad():
        expected = model.forward_features(x)
        tokens = backbone.embed(x)
        for layer in backbone.layers():
            before, tokens = tokens, layer(tokens)
            torch.testing.assert_close(layer.parts(before), tokens, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.norm(tokens), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(backbone.last_block(backbone.prefix(x)), tokens, rtol=1e-10, atol=1e-10)
        head = model.forward_head(expected, pre_logits=True)
    image, local = backbone.encode_dense(x, "tokens", normalize=False)
    torch.testing.assert_close(image.double(), head, rtol=1e-5, atol=1e-5)
    rows, columns = (side // 8 for side in backbone.transform.crop)
    assert backbone.grid == (rows, columns)
    assert local.shape == (2, rows * columns, 32)
    if not backbone.pools_by_attention:
        patches = model.fc_norm(expected[:, model.num_prefix_tokens :])
        torch.testing.assert_close(local.double(), patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "attention pool"])
def test_eva_values_depend_on_their_own_patch_and_on_no_position(name):
    """One block, no learned positions: equal patches give equal values wherever they lie, others do not matter."""
    options = FAMILIES[name]
    model = eva(**options | {"depth": 1, "use_abs_pos_emb": False, "num_kv_heads": options.get("num_kv_heads")})
    backbone = backbone_of(model)
    x = pixels(backbone, 1)
    changed = x.clone()
    changed[:, :, 8:16, 24:32] += 1  # row 1, column 3
    columns = backbone.grid[1]
    before, after = (backbone.encode_dense(images, normalize=False)[1][0] for images in (x, changed))
    assert (before - after).abs().amax(-1).nonzero().flatten().tolist() == [columns + 3]
    tile = x[:, :, :8, :8].repeat(1, 1, *backbone.grid)
    values = backbone.encode_dense(tile, normalize=False)[1][0]
    torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-5, atol=1e-5)


def test_dinov3_value_path_is_the_written_out_one():
    model = eva(**DINOV3).double()
    backbone = backbone_of(model)
    x = pixels(backbone).double()
    h = backbone.prefix(x)
    state = {name.removeprefix("blocks.2."): value for name, value in model.state_dict().items()}

    def norm(y, name):
        return F.layer_norm(y, (32,), state[f"{name}.weight"], state[f"{name}.bias"], model.norm.eps)

    value = norm(h, "norm1") @ state["attn.qkv.weight"][64:].T
    h = h + state["gamma_1"] * (value @ state["attn.proj.weight"].T + state["attn.proj.bias"])
    up = F.gelu(norm(h, "norm2") @ state["mlp.fc1.weight"].T + state["mlp.fc1.bias"])
    h = h + state["gamma_2"] * (up @ state["mlp.fc2.weight"].T + state["mlp.fc2.bias"])
    expected = norm(h, "norm")[:, 5:].float()
    torch.testing.assert_close(backbone.encode_dense(x, normalize=False)[1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov3", "eva02", "eva02 fused"])
def test_names_of_eva_weights_and_their_edits(name):
    backbone = backbone_of(eva(**FAMILIES[name]))
    kinds = ("query", "key", "value", "out", "up", "down")
    assert backbone.linears() == [f"visual.{i}.{kind}" for i in range(3) for kind in kinds]
    x = pixels(backbone)
    before = backbone.encode_dense(x)
    for kind in kinds:
        weight = backbone.linear(f"visual.2.{kind}")
        with weight.edited(torch.zeros_like(weight.weight)):
            assert (backbone.encode_image(x) - before[0]).abs().max() > 1e-4, kind
    assert torch.equal(backbone.encode_dense(x)[1], before[1])
    assert torch.equal(backbone.copy().encode_dense(x)[1], before[1])


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_dinov3",
        "eva02_tiny_patch14_224",
        "vit_base_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
    ],
)
def test_published_architectures_have_local_features(name):
    """The library's own model of that name, cut to one block."""
    backbone = create_backbone(f"timm:{name}?depth=1", dtype="float32")
    assert {"local", "blocks"} <= backbone.capabilities
    image, local = backbone.encode_dense(pixels(backbone, 1))
    assert local.shape[1:] == (backbone.grid[0] * backbone.grid[1], image.shape[1])


# ---- wrappers


def test_compiled_and_parallel_modules_are_unwrapped():
    plain = backbone_of(timm.create_model("test_vit"))
    compiled_block = timm.create_model("test_vit")
    compiled_block.load_state_dict(plain.model.state_dict())
    compiled_block.blocks[0] = torch.compile(compiled_block.blocks[0])
    for model in (torch.compile(plain.model), nn.DataParallel(torch.compile(plain.model)), compiled_block):
        wrapped = TimmBackbone(model, plain.transform, spec="timm:test")
        assert wrapped.capabilities == plain.capabilities
        assert wrapped.fingerprint == plain.fingerprint
        x = pixels(plain, 1)
        assert torch.equal(wrapped.encode_dense(x)[1], plain.encode_dense(x)[1])
    assert unwrapped(nn.DataParallel(plain.model)) is plain.model


# ---- options and files


def options_of(spec):
    """What timm receives."""
    seen = {}

    def create(name, **given):
        seen.update(given)
        raise AssertionError("stop here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timm.create_model", create)
        with pytest.raises(UsageError, match="stop here"):
            create_backbone(spec)
    del seen["pretrained"]
    return seen


def test_options_have_the_type_that_they_look_like():
    found = options_of(
        "timm:test_vit?img_size=64,96&patch_drop_rate=0.5&drop_path_rate=1e-1&class_token=True&init_values=null"
        "&global_pool=avg&num_classes=0&mlp_layer=none&act_layer=gelu"
    )
    assert found == {
        "img_size": (64, 96), "patch_drop_rate": 0.5, "drop_path_rate": 0.1, "class_token": True, "init_values": None,
        "global_pool": "avg", "num_classes": 0, "mlp_layer": None, "act_layer": "gelu",
    }  # fmt: skip


def test_rates_of_dropping_change_nothing_in_evaluation(tmp_path):
    model = randomized(timm.create_model("test_vit"))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    spec = f"timm:test_vit/{tmp_path}/w.safetensors"
    plain = create_backbone(spec, dtype="float32")
    x = pixels(plain, 1)
    for option in ("patch_drop_rate=0.5", "drop_path_rate=0.5", "drop_rate=0.3", "proj_drop_rate=0.1"):
        assert torch.equal(create_backbone(f"{spec}?{option}", dtype="float32").encode_image(x), plain.encode_image(x))


@pytest.mark.parametrize("form", ["safetensors", "nested", "module", "query"])
def test_weights_from_a_file_are_loaded_and_called_so(tmp_path, caplog, monkeypatch, form):
    model = randomized(timm.create_model("test_vit", num_classes=5))
    state = model.state_dict()
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, file)
    elif form == "nested":
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, file)
    elif form == "module":
        torch.save({f"module._orig_mod.{key}": value for key, value in state.items()}, file)
    else:
        torch.save(state, file)
    monkeypatch.chdir(tmp_path)
    spec = "timm:test_vit?checkpoint_path=w.pth" if form == "query" else f"timm:test_vit/{file.name}"
    backbone = create_backbone(spec, dtype="float32")
    assert "random" not in caplog.text
    x = pixels(backbone, 1)
    torch.testing.assert_close(backbone.encode_logits(x), model(x))
    assert backbone.encode_logits(x).shape == (1, 5)  # the file's classes, not the architecture's 1000
    assert str(file) in backbone.spec
    assert next(one for one in backbone.decisions if one.what == "weights").value == f"the file {file}"
    if form != "query":
        absolute = create_backbone(f"timm:test_vit/{file}", dtype="float32")
        assert absolute.fingerprint == create_backbone(f"timm:test_vit{file}", dtype="float32").fingerprint


def test_a_file_without_classifier_gives_features_and_another_image_size_resamples(tmp_path):
    model = randomized(timm.create_model("test_vit", num_classes=0))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone = create_backbone(f"timm:test_vit/{tmp_path}/w.safetensors?img_size=96", dtype="float32")
    assert backbone.capabilities == {"image", "local", "blocks"}
    assert backbone.grid == (6, 6)
    larger = timm.create_model("test_vit", num_classes=0, img_size=160)
    larger.load_state_dict(model.state_dict())
    larger.set_input_size(img_size=96)
    x = pixels(backbone, 1)
    torch.testing.assert_close(backbone.encode_image(x, normalize=False), larger.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("blocks.1.mlp.fc1.bias"), r"lacks blocks\.1\.mlp\.fc1\.bias"),
        (lambda state: state.update({"adapter.weight": torch.zeros(2)}), r"holds adapter\.weight"),
        (lambda state: state.update({"blocks.0.norm1.bias": torch.zeros(3)}), r"blocks\.0\.norm1\.bias \[3\] instead"),
        (lambda state: state.update({"norm.bias": torch.full((64,), torch.nan)}), r"NaN.*norm\.bias"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, damage, message):
    state = timm.create_model("test_vit").state_dict()
    damage(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(DataError, match=message):
        create_backbone(f"timm:test_vit/{tmp_path}/w.pt")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "pretrained_cfg": {}}))
    if "NaN" not in message:
        with pytest.raises(DataError, match=r"do not belong to this network.*num_classes=0") as caught:
            create_backbone(f"timm:local-dir:{tmp_path}")
        assert "tiny" not in str(caught.value)


def test_a_classifier_that_would_stay_random_is_refused(tmp_path):
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "model.safetensors")
    cfg = {"num_classes": 3, "classifier": "head", "first_conv": "patch_embed.proj"}
    config = {"architecture": "test_vit", "num_classes": 3, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = f"timm:local-dir:{tmp_path}"
    assert "logits" in create_backbone(spec).capabilities
    assert "logits" not in create_backbone(f"{spec}?num_classes=0").capabilities
    with pytest.raises(DataError, match=r"head\.weight.*random"):
        create_backbone(f"{spec}?num_classes=7")


def test_files_that_are_not_there_and_options_that_are_none(tmp_path):
    with pytest.raises(MissingDataError, match=r"no file .*gone\.pt"):
        create_backbone(f"timm:test_vit/{tmp_path}/gone.pt")
    for option in ("features_only=true", "pretrained=true", "img_size=big"):
        with pytest.raises(UsageError, match="timm:test_vit"):
            create_backbone(f"timm:test_vit?{option}")


# ---- grey images


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_network_for_grey_images_reads_one_channel(name):
    backbone = create_backbone(f"timm:{name}?in_chans=1", dtype="float32")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (170, 190, 3), dtype=np.uint8))
    x = backbone.transform(image)[None]
    assert x.shape == (1, 3, *backbone.transform.crop)
    assert torch.equal(x[:, 0], x[:, 1])
    assert torch.equal(backbone.transform(image.convert("L"))[None], x)
    torch.testing.assert_close(backbone.encode_logits(x), backbone.model(x[:, :1]), rtol=1e-5, atol=1e-5)
    grey = np.asarray(image.convert("L")).mean() / 255
    (mean,), (std,) = backbone.transform.mean, backbone.transform.std
    assert x.mean() == pytest.approx((grey - mean) / std, abs=0.1)


def test_other_channels_are_refused():
    with pytest.raises(UsageError, match="reads 5 channels"):
        create_backbone("timm:test_vit?in_chans=5")


# ---- the transform of a tag


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"crop_pct": 0.9, "crop_mode": "squash"}, 160),
        ({"crop_pct": 0.8, "crop_mode": "border", "mean": (0.1, 0.2, 0.3)}, 160),
        ({"crop_pct": 0.95}, (96, 160)),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, (96, 160)),
        ({"crop_pct": 0.7, "crop_mode": "border"}, (160, 96)),
    ],
)
@pytest.mark.parametrize("shape", [(230, 190), (90, 400), (60, 50)])
def test_crop_modes_are_the_librarys(options, size, shape):
    model = timm.create_model("test_vit", pretrained_cfg_overlay=options, img_size=size)
    transform = image_transform(model)
    config = timm.data.resolve_model_data_config(model)
    config["input_size"] = (3, *transform.crop)
    library = timm.data.create_transform(**config)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    torch.testing.assert_close(transform(image), library(image), rtol=1e-5, atol=1e-5)


# ---- what was decided


def test_decisions_say_what_and_where_from():
    backbone = create_backbone("timm:vit_small_patch16_dinov3?depth=1&img_size=64", dtype="float32")
    found = {one.what: (one.value, one.source) for one in backbone.decisions}
    assert found["prefix tokens"][0] == "1 class, 4 register"
    assert found["image size"] == ("64 x 64", "the option img_size")
    assert found["activation"][0] == "GELU"
    assert found["weights"][0] == "random"
    assert found["precision"] == ("float32", "the argument")
    assert found["device"][0] == "cpu"
    tiny = {one.what: one.value for one in create_backbone("tiny").decisions}
    assert {"architecture", "activation", "image size", "mean", "tokenizer", "precision", "logit scale"} <= set(tiny)
    assert backbone.copy().decisions == backbone.decisions


def test_the_source_of_the_precision(monkeypatch):
    def source(**options):
        return next(one for one in create_backbone("tiny", **options).decisions if one.what == "precision").source

    monkeypatch.setenv("OOD_DTYPE", "float32")
    assert source() == "the environment variable OOD_DTYPE"
    assert source(dtype="float32") == "the argument"
    monkeypatch.delenv("OOD_DTYPE")
    assert source() == "the hardware"


def test_loading_leaves_the_loggers_as_they_were():
    logger = logging.getLogger("timm.models._builder")
    before = (logger.level, logger.propagate, list(logger.handlers))
    create_backbone("timm:test_vit")
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
