"""SigLIP, SigLIP 2 and DINOv3: the same random weights in open_clip, timm and transformers give the same features."""

import json
import re

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from ood_core import create_backbone
from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.backbones.timm import TimmBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.errors import DataError, UsageError
from ood_core.testing import backbone_checks
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
from ood_core.backbones.transformers import TransformersBackbone, image_transform  # noqa: E402

TEXTS = ["a Photo of a Cat", "two DOGS", "x"]
SQUARE = ImageTransform(crop=(32, 32), resize=None)
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
TEXT = TOWER | {"vocab_size": 300, "max_position_embeddings": 16, "projection_size": 32}


def randomized(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise / max(parameter[0].numel(), 9) ** 0.5 if parameter.ndim else 0.3 * noise)
    return model.eval()


def pixels(count=2, size=(32, 32)):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def tokenizer():
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {name: i for i, name in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *letters])}
    return transformers.Siglip2Tokenizer(vocab=vocabulary, merges=[], padding_side="right")


def siglip(kind="Siglip"):
    size = {"num_patches": 16} if kind == "Siglip2" else {"image_size": 32}
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT, vision_config=TOWER | {"patch_size": 8, "num_channels": 3} | size
    )
    return randomized(getattr(transformers, f"{kind}Model")(config))


def hf_backbone(model, **options):
    return TransformersBackbone(model, SQUARE, tokenizer=tokenizer(), spec="hf:siglip", **options)


BLOCK = [
    (r"layer_norm([12])", r"norm\1"),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"encoder\.layers", "blocks"),
]


def vision_to_timm(state):
    """Weights of transformers' SigLIP tower as timm keeps them."""
    out = {}
    for key, value in state.items():
        if not key.startswith("vision_model.") or "k_proj" in key or "v_proj" in key:
            continue
        name = key.removeprefix("vision_model.")
        if "q_proj" in name:
            value = torch.cat([state[key.replace("q_proj", kind)] for kind in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj", "attn.qkv")
        for pattern, new in BLOCK:
            name = re.sub(pattern, new, name)
        name = name.replace("embeddings.patch_embedding", "patch_embed.proj").replace("post_layernorm", "norm")
        name = name.replace("head.layernorm", "attn_pool.norm").replace("head.mlp", "attn_pool.mlp")
        if name == "patch_embed.proj.weight" and value.ndim == 2:  # SigLIP 2: patches with channels last
            value = value.view(-1, 8, 8, 3).permute(0, 3, 1, 2)
        if name == "embeddings.position_embedding.weight":
            name, value = "pos_embed", value[None]
        if name == "head.probe":
            name = "attn_pool.latent"
        if "head.attention.in_proj" in name:
            kind = name.rpartition("_")[2]
            out[f"attn_pool.q.{kind}"], out[f"attn_pool.kv.{kind}"] = value[:32], value[32:]
            continue
        out[name.replace("head.attention.out_proj", "attn_pool.proj")] = value
    return out


def timm_tower(model):
    tower = VisionTransformer(
        32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=0, class_token=False, global_pool="map",
        act_layer="gelu_tanh",
    )  # fmt: skip
    tower.load_state_dict(vision_to_timm(model.state_dict()))
    return tower.eval()


def open_clip_model(model):
    """The same weights in open_clip's layout of SigLIP."""
    text = open_clip.CLIPTextCfg(
        context_length=16, vocab_size=300, width=32, heads=2, layers=2, no_causal_mask=True, proj_bias=True,
        pool_type="last", norm_kwargs={"eps": 1e-6}, act_kwargs={"approximate": "tanh"},
    )  # fmt: skip
    made = open_clip.CustomTextCLIP(32, open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8), text)
    tower = open_clip.timm_model.TimmModel.__new__(open_clip.timm_model.TimmModel)
    torch.nn.Module.__init__(tower)
    tower.trunk, tower.head, tower.image_size = timm_tower(model), torch.nn.Sequential(), (32, 32)
    made.visual = tower
    state, out = model.state_dict(), {}
    for key, value in state.items():
        if not key.startswith("text_model.") or "k_proj" in key or "v_proj" in key:
            continue
        name = key.removeprefix("text_model.")
        if "q_proj" in name:
            value = torch.cat([state[key.replace("q_proj", kind)] for kind in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        name = name.replace("encoder.layers", "transformer.resblocks").replace("final_layer_norm", "ln_final")
        name = name.replace("layer_norm", "ln_")
        name = name.replace("self_attn.out_proj", "attn.out_proj").replace("fc1", "c_fc").replace("fc2", "c_proj")
        name = name.replace("head.", "text_projection.")
        name = name.replace("embeddings.token_embedding", "token_embedding")
        out[name.replace("embeddings.position_embedding.weight", "positional_embedding")] = value
    made.text.load_state_dict(out, strict=True)
    made.logit_scale.data = model.logit_scale.data[0]
    return made.eval()


def same(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["Siglip", "Siglip2"])
def test_siglip_is_the_same_in_the_libraries(kind):
    model = siglip(kind)
    hf, tower = hf_backbone(model), timm_tower(model)
    ours = TimmBackbone(tower, SQUARE, spec="timm:siglip")
    clip = OpenCLIPBackbone(open_clip_model(model), hf.tokenize, SQUARE, spec="open_clip:siglip")
    x = pixels()
    assert hf.grid == ours.grid == (4, 4)
    for local in ("value", "tokens"):
        theirs, mine = (one.encode_dense(x, local, normalize=False) for one in (hf, ours))
        same(theirs[0], mine[0])
        same(theirs[1], mine[1])
        if "local" in clip.capabilities:
            same(clip.encode_dense(x, local, normalize=False)[1], mine[1])
    same(clip.encode_image(x, normalize=False), hf.encode_image(x, normalize=False))
    same(clip.encode_text(TEXTS, normalize=False), hf.encode_text(TEXTS, normalize=False))
    visual = [name for name in hf.linears() if name.startswith("visual.")]
    assert visual == ours.linears()
    assert all(torch.equal(hf.linear(name).weight, ours.linear(name).weight) for name in visual)


@pytest.mark.parametrize("kind", ["Siglip", "Siglip2"])
def test_siglip_is_what_its_own_library_computes(kind):
    model = siglip(kind)
    backbone = hf_backbone(model)
    assert backbone.capabilities == {"image", "local", "blocks", "text"}
    x = pixels()
    ids = tokenizer()([text.lower() for text in TEXTS], padding="max_length", max_length=16, return_tensors="pt")
    images = {"pixel_values": x}
    if kind == "Siglip2":
        patches = x.view(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, -1)
        ones = torch.ones(2, 16, dtype=torch.int64)
        images = {"pixel_values": patches, "pixel_attention_mask": ones, "spatial_shapes": torch.tensor([[4, 4]] * 2)}
    out = model(input_ids=ids["input_ids"], **images)
    image, text = backbone.encode_image(x), backbone.encode_text(TEXTS)
    same(image, F.normalize(out.vision_model_output.pooler_output, dim=-1))
    same(text, F.normalize(out.text_model_output.pooler_output, dim=-1))
    same(backbone.logit_scale * image @ text.T + backbone.logit_bias, out.logits_per_image)
    assert backbone.logit_bias != 0
    assert torch.equal(backbone.encode_text([text.upper() for text in TEXTS]), text)
    with pytest.raises(UsageError, match="has no 'prompts'"):
        backbone.encode_prompts(torch.zeros(2, 32), ["cat"])


def test_a_siglip_patch_is_what_the_pool_says_to_it_alone():
    model = siglip()
    tokens = model.vision_model(pixels()).last_hidden_state
    _, local = hf_backbone(model).encode_dense(pixels(), normalize=False)
    for patch in range(16):
        same(local[:, patch], model.vision_model.head(tokens[:, patch : patch + 1]))


def dinov3(registers=4, gated=False, key_bias=False):
    config = transformers.DINOv3ViTConfig(
        **TOWER, patch_size=8, image_size=32, num_register_tokens=registers, use_gated_mlp=gated, key_bias=key_bias,
        hidden_act="silu" if gated else "gelu",
    )  # fmt: skip
    return randomized(transformers.DINOv3ViTModel(config))


def dinov3_to_timm(model, *, gated):
    state, out = model.state_dict(), {}
    for key, value in state.items():
        if "mask_token" in key or "k_proj" in key or "v_proj" in key or ("up_proj" in key and gated):
            continue
        name = key.replace("model.layer", "blocks").replace("embeddings.patch_embeddings", "patch_embed.proj")
        if "q_proj.weight" in name:
            value = torch.cat([state[key.replace("q_proj", kind)] for kind in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("attention.q_proj", "attn.qkv")
        if "q_proj.bias" in name:
            out[name.replace("attention.q_proj.bias", "attn.v_bias")] = state[key.replace("q_proj", "v_proj")]
            name = name.replace("attention.q_proj.bias", "attn.q_bias")
        if gated and "gate_proj" in name:
            value = torch.cat([value, state[key.replace("gate_proj", "up_proj")]])
        name = name.replace("gate_proj" if gated else "up_proj", "fc1").replace("down_proj", "fc2")
        name = name.replace("attention.o_proj", "attn.proj")
        name = re.sub(r"layer_scale([12])\.lambda1", r"gamma_\1", name)
        name = name.replace("embeddings.cls_token", "cls_token").replace("embeddings.register_tokens", "reg_token")
        out[name] = value
    target = Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, use_rot_pos_emb=True,
        use_abs_pos_emb=False, rope_type="dinov3", rope_temperature=100, rope_rotate_half=True, num_reg_tokens=4,
        use_fc_norm=False, init_values=1.0, dynamic_img_size=True, global_pool="token", swiglu_mlp=gated,
        norm_layer=lambda width, **options: torch.nn.LayerNorm(width, eps=1e-5, **options),
    )  # fmt: skip
    target.load_state_dict(out)
    return target.eval()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_dinov3_is_the_same_in_timm_and_transformers(gated, size):
    model = dinov3(gated=gated)
    transform = ImageTransform(crop=size, resize=None)
    theirs = TransformersBackbone(model, transform, spec="hf:dinov3")
    ours = TimmBackbone(dinov3_to_timm(model, gated=gated), transform, spec="timm:dinov3")
    assert theirs.capabilities == ours.capabilities == {"image", "local", "blocks"}
    assert theirs.grid == ours.grid == (size[0] // 8, size[1] // 8)
    x = pixels(size=size)
    with torch.no_grad():
        expected = model(x).last_hidden_state
    for local in ("value", "tokens"):
        one, other = (backbone.encode_dense(x, local, normalize=False) for backbone in (theirs, ours))
        same(one[0], other[0])
        same(one[1], other[1])
    same(one[0], expected[:, 0])
    same(one[1], expected[:, 5:])  # one class token, four registers
    assert theirs.linears() == ours.linears()
    for name in ours.linears():
        assert torch.equal(ours.linear(name).weight, theirs.linear(name).weight), name


BACKBONES = [
    hf_backbone(siglip()),
    hf_backbone(siglip("Siglip2")),
    TransformersBackbone(dinov3(), SQUARE, spec="hf:dinov3"),
]


@pytest.mark.parametrize("check", [check for one in BACKBONES for check in backbone_checks(one)], ids=str)
def test_conformance(check):
    check()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_compiled_models_are_unwrapped(backbone):
    assert TransformersBackbone(torch.compile(backbone.model), SQUARE).fingerprint == backbone.fingerprint


def test_rotary_frequencies_are_not_rounded_with_the_weights():
    model = dinov3()
    exact = model.rope_embeddings.inv_freq.clone()
    backbone = TransformersBackbone(model, SQUARE)
    backbone.model.to(torch.bfloat16)
    backbone.encode_dense(pixels())
    same(model.rope_embeddings.inv_freq, exact, tolerance=1e-7)


# ---- folders


def saved(model, folder, processor=None):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_a_siglip_folder_with_its_tokenizer_and_processor(tmp_path):
    model = siglip()
    named = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    backbone = create_backbone(f"hf:{saved(model, tmp_path, named)}", dtype="float32")
    assert (backbone.transform.mean, backbone.transform.std) == ((0.5,) * 3, (0.5,) * 3)
    same(backbone.encode_dense(pixels())[1], hf_backbone(model).encode_dense(pixels())[1])
    same(backbone.encode_text(TEXTS), hf_backbone(model).encode_text(TEXTS))
    found = {one.what: one.value for one in backbone.decisions}
    assert found["prefix tokens"] == "0 class, 0 register"
    assert found["pooling"] == "attention"
    assert "lower case" in found["tokenizer"]
    assert float(found["logit bias"]) == pytest.approx(backbone.logit_bias, rel=1e-4)


def test_extra_and_misshapen_weights_are_named_with_the_remedy_that_fits(tmp_path):
    saved(dinov3(), tmp_path, {})
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"adapter.weight": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"adapter\.weight would not be used"):
        create_backbone(f"hf:{tmp_path}")
    save_file(state | {"norm.bias": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"other shapes.*config\.json") as caught:
        create_backbone(f"hf:{tmp_path}")
    assert "tiny" not in str(caught.value)


SMALL = {"height": 32, "width": 32}
PROCESSORS = [
    ("SiglipImageProcessor", {"size": SMALL}),
    ("ViTImageProcessor", {"size": {"height": 40, "width": 32}, "rescale_factor": 0.01}),
    ("ViTImageProcessor", {"size": SMALL, "do_rescale": False}),
    ("ViTImageProcessor", {"size": SMALL, "do_normalize": False}),
    ("ViTImageProcessor", {"size": 32}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 48}, "crop_size": SMALL}),
    ("CLIPImageProcessor", {"size": 48, "crop_size": 32}),
    ("CLIPImageProcessor", {"do_resize": False, "crop_size": {"height": 64, "width": 32}}),
    ("BitImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": SMALL}),
    ("DeiTImageProcessor", {"size": {"height": 48, "width": 48}, "crop_size": SMALL}),
]


@pytest.mark.parametrize(("name", "config"), PROCESSORS)
def test_transforms_are_the_processors(name, config):
    theirs = getattr(transformers, name)(**config)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (57, 70, 3), dtype=np.uint8))
    expected = theirs(images=image, return_tensors="pt")["pixel_values"][0]
    found = image_transform({"image_processor_type": name, **config}, transformers.ViTConfig(image_size=32))(image)
    assert found.shape == expected.shape
    # Their resizing rounds otherwise than Pillow's now and then: by one level of 255.
    level = (255 if config.get("do_rescale") is False else 255 * config.get("rescale_factor", 1 / 255)) / 255
    assert (found - expected).abs().max() < 2.5 * level / min(theirs.image_std if theirs.do_normalize else [1])


def test_a_processor_that_gives_many_sizes_is_refused():
    with pytest.raises(UsageError, match="many sizes"):
        image_transform({"size": {"longest_edge": 64}}, transformers.ViTConfig(image_size=32))
