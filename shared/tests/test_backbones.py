"""Backbones: the same weights give the same features in every library; references are written out."""

import contextlib
import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from ood_core.backbones import _resolve_device, create_backbone, list_backbones, resolve_dtype
from ood_core.backbones.loading import transform_decisions
from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.backbones.open_clip import image_transform as open_clip_transform
from ood_core.backbones.timm import TimmBackbone
from ood_core.backbones.timm import image_transform as timm_transform
from ood_core.backbones.transform import ImageTransform
from ood_core.errors import MissingDataError, UsageError
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
from ood_core.backbones.transformers import TransformersBackbone  # noqa: E402
from ood_core.backbones.transformers import image_transform as hf_transform  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "clip.npz"
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
TEXTS = ["a photo of a cat", "a very long sentence about 3 dogs, two hawks & one eel!", "x"]


# ---- small models, their weights of the size of trained ones, norms and biases off their initial values


def randomized(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and name.endswith(("weight", "gamma")):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim < 2 or "embed" in name or "token" in name:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def square(side):
    return ImageTransform(crop=(side, side), resize=side)


def pixels(backbone, count=2):
    return torch.randn(count, 3, *backbone.transform.crop, generator=torch.Generator().manual_seed(1))


def clip_model(*, quick_gelu=False, image_size=32, patch_size=8, layers=3, kind=open_clip.CLIP, **text):
    vision = CLIPVisionCfg(layers=layers, width=64, head_width=32, patch_size=patch_size, image_size=image_size)
    text = CLIPTextCfg(context_length=77, vocab_size=49408, width=48, heads=2, layers=2, **text)
    return randomized(kind(24, vision, text, quick_gelu=quick_gelu))


def clip_backbone(**options):
    size = options.get("image_size", 32)
    crop = size if isinstance(size, tuple) else (size, size)
    transform = ImageTransform(crop=crop, resize=max(crop))
    return OpenCLIPBackbone(clip_model(**options), open_clip.get_tokenizer("ViT-B-32"), transform)


def vit(*, img_size=28, patch_size=7, depth=3, **options):
    options = {"init_values": 1.0, "num_classes": 0} | options
    return randomized(VisionTransformer(img_size, patch_size, embed_dim=32, depth=depth, num_heads=4, **options))


def swin(kind, *, img_size=(64, 32), window_size=4):
    options = {"num_classes": 5, "window_size": window_size, "depths": (2, 2), "num_heads": (2, 4)}
    return randomized(kind(img_size=img_size, patch_size=4, embed_dim=16, **options))


def timm_backbone(model):
    size = tuple(model.patch_embed.img_size)
    return TimmBackbone(model, ImageTransform(crop=size, resize=max(size)), spec="timm:test")


@pytest.fixture(scope="module")
def clip():
    return clip_backbone()


# ---- weights from one library to another


def renamed(state, rules, qkv=("q_proj", "k_proj", "v_proj")):
    """Keys rewritten by (pattern, replacement) in turn; "{qkv}" in a new key splits the tensor in three."""
    out = {}
    for key, tensor in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        parts = zip(qkv, tensor.chunk(3), strict=True) if "{qkv}" in key else [("", tensor)]
        out |= {key.replace("{qkv}", name): part for name, part in parts}
    return out


CLIP_TO_HF = [
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"ln_([12])", r"layer_norm\1"),
    (r"attn\.in_proj_", "self_attn.{qkv}."),
    (r"attn\.out_proj", "self_attn.out_proj"),
    (r"c_fc", "fc1"),
    (r"c_proj", "fc2"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.class_", "vision_model.embeddings.class_"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection", "text_projection.weight"),
]
CLIP_TO_TIMM = [
    (r"^transformer\.resblocks", "blocks"),
    (r"ln_([12])", r"norm\1"),
    (r"attn\.in_proj_", "attn.qkv."),
    (r"attn\.out_proj", "attn.proj"),
    (r"c_fc", "fc1"),
    (r"c_proj", "fc2"),
    (r"^conv1", "patch_embed.proj"),
    (r"^class_embedding", "cls_token"),
    (r"^positional_embedding", "pos_embed"),
    (r"^ln_pre", "norm_pre"),
    (r"^ln_post", "norm"),
]
VIT_TO_HF = [
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^(cls_token)", r"embeddings.\1"),
    (r"^reg_token", "embeddings.register_tokens"),
    (r"^norm\.", "layernorm."),
    (r"attn\.qkv", "attention.{qkv}"),
    (r"attn\.proj", "attention.o_proj"),
]
DINO_TO_HF = [
    *VIT_TO_HF,
    (r"^blocks", "encoder.layer"),
    (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),
]
CLASSIFIER_TO_HF = [
    *VIT_TO_HF,
    (r"^blocks", "layers"),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    (r"^", "vit."),
    (r"^vit\.head", "classifier"),
]
SWIN_TO_HF = [
    (r"^layers\.1\.downsample", "encoder.layers.0.downsample"),
    (r"^layers", "encoder.layers"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^patch_embed\.norm", "embeddings.norm"),
    (r"^norm\.", "layernorm."),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"(blocks\.\d+)\.mlp\.fc2", r"\1.output.dense"),
    (r"attn\.qkv", "attention.self.{qkv}"),
    (r"attn\.q_bias", "attention.self.query.bias"),
    (r"attn\.v_bias", "attention.self.value.bias"),
    (r"attn\.cpb_mlp", "attention.self.continuous_position_bias_mlp"),
    (r"attn\.logit_scale", "attention.self.logit_scale"),
    (r"attn\.proj", "attention.output.dense"),
    (r"^", "swinv2."),
    (r"^swinv2\.head\.fc", "classifier"),
]


def clip_to_hf(model, *, activation, end=49407):
    sizes = {"intermediate_size": 256, "hidden_act": activation, "layer_norm_eps": 1e-5}
    vision = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 192}
    config = transformers.CLIPConfig(
        text_config=sizes | text | {"eos_token_id": end, "vocab_size": 49408, "max_position_embeddings": 77},
        vision_config=sizes | vision,
        projection_dim=24,
    )
    state = renamed(model.state_dict(), CLIP_TO_HF)
    for name in ("visual_projection.weight", "text_projection.weight"):
        state[name] = state[name].T
    target = transformers.CLIPModel(config)
    target.load_state_dict(state)
    return target


def clip_to_timm(model, *, activation):
    target = VisionTransformer(
        32, 8, embed_dim=64, depth=3, num_heads=2, num_classes=0, pre_norm=True, act_layer=activation,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )  # fmt: skip
    state = renamed(model.visual.state_dict(), CLIP_TO_TIMM)
    state["cls_token"], state["pos_embed"] = state["cls_token"][None, None], state["pos_embed"][None]
    del state["proj"]
    target.load_state_dict(state)
    return target


def dino_to_hf(model, *, registers=0, swiglu=False):
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    extra = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, mlp_ratio=4, layer_norm_eps=1e-6, use_swiglu_ffn=swiglu, **extra
    )
    state = model.state_dict()
    if registers:  # here positions cover the class token, in timm they do not
        state["pos_embed"] = torch.cat([torch.full((1, 1, 32), 0.3), state["pos_embed"]], 1)
        state["cls_token"] = state["cls_token"] - 0.3
    state = renamed(state, DINO_TO_HF)
    for key in [key for key in state if swiglu and ".fc" in key]:
        tensor = state.pop(key)
        if "fc2" in key:
            state[key.replace("fc2", "down_proj")] = tensor
        else:
            state |= {key.replace("fc1", n): t for n, t in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)}
    target = getattr(transformers, f"{kind}Model")(config)
    missing, unexpected = target.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["embeddings.mask_token"], [])
    return target


def hf_tokenizer():
    """The library's own CLIP tokenizer, on the vocabulary that open_clip ships."""
    source = open_clip.tokenizer.SimpleTokenizer()
    merges = [pair for pair, _ in sorted(source.bpe_ranks.items(), key=lambda item: item[1])]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in source.encoder.items()}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


@pytest.fixture(scope="module")
def tokenizer():
    return hf_tokenizer()


def assert_same_image_features(first, second, *, tolerance=1e-5):
    x = pixels(first)
    for local in ("value", "tokens"):
        for one, other in zip(
            first.encode_dense(x, local, normalize=False),
            second.encode_dense(x, local, normalize=False),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def assert_same_weights(first, second):
    assert first.linears() == second.linears()
    for name in first.linears():
        assert torch.equal(first.linear(name).weight, second.linear(name).weight), name


# ---- the same weights in several libraries


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_clip_is_the_same_in_open_clip_transformers_and_timm(quick_gelu, tokenizer):
    reference = clip_backbone(quick_gelu=quick_gelu)
    name, layer = ("quick_gelu", "quick_gelu") if quick_gelu else ("gelu", nn.GELU)
    hf = clip_to_hf(reference.model, activation=name)
    hf = TransformersBackbone(hf, square(32), tokenizer=tokenizer)
    assert hf.grid == reference.grid == (4, 4)
    assert (hf.width, hf.logit_scale) == (reference.width, pytest.approx(reference.logit_scale))
    assert_same_image_features(reference, hf)
    assert_same_weights(reference, hf)
    text = reference.encode_text(TEXTS, normalize=False)
    torch.testing.assert_close(hf.encode_text(TEXTS, normalize=False), text, rtol=1e-5, atol=1e-5)
    context = 0.2 * torch.randn(4, 48)
    prompts = [backbone.encode_prompts(context, ["cat", "sea_lion"]) for backbone in (reference, hf)]
    torch.testing.assert_close(*prompts, rtol=1e-5, atol=1e-5)

    plain = timm_backbone(clip_to_timm(reference.model, activation=layer))
    x, projection = pixels(plain), reference.model.visual.proj
    for local in ("value", "tokens"):
        image, patches = plain.encode_dense(x, local, normalize=False)
        expected = reference.encode_dense(x, local, normalize=False)
        torch.testing.assert_close(image @ projection, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(patches @ projection, expected[1], rtol=1e-5, atol=1e-5)
    for weight in plain.linears():
        assert torch.equal(plain.linear(weight).weight, reference.linear(weight).weight)


def test_the_two_clip_tokenizers_agree_up_to_the_end_mark(clip, tokenizer):
    hf = TransformersBackbone(clip_to_hf(clip.model, activation="gelu"), square(32), tokenizer=tokenizer)
    texts = [*TEXTS, "electric ray.", ".", "Éclair naïve CAFÉ, 100% of it's (good)", "word " * 100]
    ours, theirs = clip.tokenize(texts), hf.tokenize(texts)
    assert theirs.shape == ours.shape == (len(texts), 77)
    assert torch.equal(hf.end_positions(theirs), clip.end_positions(ours))
    for one, other, end in zip(ours, theirs, clip.end_positions(ours), strict=True):
        assert torch.equal(one[: end + 1], other[: end + 1])


def test_old_clip_configurations_with_end_token_2_read_the_largest_token(clip, tokenizer):
    hf = clip_to_hf(clip.model, activation="gelu", end=2)
    backbone = TransformersBackbone(hf, square(32), tokenizer=tokenizer)
    ids = backbone.tokenize(TEXTS)
    expected = hf.get_text_features(ids).pooler_output
    torch.testing.assert_close(backbone.encode_text(TEXTS, normalize=False), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected, clip.encode_text(TEXTS, normalize=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 3])
def test_dinov2_is_the_same_in_timm_and_transformers(registers):
    model = vit(reg_tokens=registers, no_embed_class=registers > 0)
    ours = timm_backbone(model)
    theirs = TransformersBackbone(dino_to_hf(model, registers=registers), square(28))
    assert ours.grid == theirs.grid == (4, 4)
    assert ours.capabilities == theirs.capabilities == {"image", "local", "blocks"}
    assert_same_image_features(ours, theirs)
    assert_same_weights(ours, theirs)


def test_gated_mlp_is_the_same_and_up_is_the_ungated_half():
    model = vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=5.5)
    ours, theirs = timm_backbone(model), TransformersBackbone(dino_to_hf(model, swiglu=True), square(28))
    assert_same_image_features(ours, theirs)
    assert_same_weights(ours, theirs)
    assert ours.linear("visual.0.up").weight.shape == (88, 32)


def test_vit_classifier_is_the_same_in_timm_and_transformers_on_a_non_square_grid():
    model = vit(img_size=(14, 28), init_values=None, num_classes=5)
    config = transformers.ViTConfig(
        **SIZES | {"image_size": (14, 28)}, intermediate_size=128, layer_norm_eps=1e-6, num_labels=5
    )
    target = transformers.ViTForImageClassification(config)
    target.load_state_dict(renamed(model.state_dict(), CLASSIFIER_TO_HF))
    ours = timm_backbone(model)
    theirs = TransformersBackbone(target, ImageTransform(crop=(14, 28), resize=28))
    assert ours.grid == theirs.grid == (2, 4)
    assert_same_image_features(ours, theirs)
    assert_same_weights(ours, theirs)
    x = pixels(ours)
    torch.testing.assert_close(ours.encode_logits(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.encode_logits(x), model(x), rtol=1e-5, atol=1e-5)


def swin_pair(window_size):
    model = swin(SwinTransformerV2, img_size=(64, 48), window_size=window_size)
    config = transformers.Swinv2Config(
        image_size=(64, 48),
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=window_size,
        num_labels=5,
    )
    target = transformers.Swinv2ForImageClassification(config)
    target.load_state_dict(renamed(model.state_dict(), SWIN_TO_HF, qkv=("query", "key", "value")))
    ours = timm_backbone(model)
    return ours, TransformersBackbone(target, ours.transform)


def test_swin_v2_is_the_same_in_timm_and_transformers():
    ours, theirs = swin_pair(4)
    assert ours.grid == theirs.grid == (8, 6)
    assert ours.capabilities == theirs.capabilities == {"image", "local", "blocks", "logits"}
    assert_same_image_features(ours, theirs)
    assert_same_weights(ours, theirs)
    x = pixels(ours)
    torch.testing.assert_close(ours.encode_logits(x), theirs.encode_logits(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window_size", [4, 3])
def test_swin_v2_is_what_its_own_library_computes(window_size):
    """Also where windows need padding, which the two libraries do before and after the shift."""
    ours, theirs = swin_pair(window_size)
    x = pixels(ours)
    torch.testing.assert_close(ours.encode_logits(x), ours.model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.encode_logits(x), theirs.model(x).logits, rtol=1e-5, atol=1e-5)
    _, local = theirs.encode_dense(x, "tokens", normalize=False)
    torch.testing.assert_close(local, theirs.model.swinv2(x).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_dinov2_classifier_reads_class_token_and_mean_patch_and_has_no_local_features():
    config = transformers.Dinov2Config(**SIZES, num_labels=3, id2label={0: "ant", 1: "bee", 2: "fly"})
    model = transformers.Dinov2ForImageClassification(config).eval()
    backbone = TransformersBackbone(model, square(28), spec="hf:dino")
    x = pixels(backbone)
    torch.testing.assert_close(backbone.encode_logits(x), model(x).logits)
    assert backbone.label_names == ["ant", "bee", "fly"]
    assert backbone.encode_image(x).shape == (2, backbone.width) == (2, 64)
    with pytest.raises(UsageError, match="'hf:dino' has no 'local'"):
        backbone.encode_dense(x)


# ---- the value path, written out


def norm(x, state, key, eps):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{key}.weight"] + state[f"{key}.bias"]


def affine(x, weight, bias):
    return x @ weight.T + bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def last_block_input(block, run):
    seen = []
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run()
    handle.remove()
    return seen[0]


def value_features(backbone, x):
    """Local features in the precision of the weights."""
    with torch.no_grad():
        return backbone.local_embedding(backbone.layers()[-1].parts.value_path(backbone.prefix(x)))


def check_value_path(backbone, block, expected_from):
    """`expected_from(input of the last block)` against the backbone, in float64 and as users see it."""
    backbone.model.double()
    x = pixels(backbone).double()
    with torch.no_grad():
        expected = expected_from(last_block_input(block, lambda: backbone.model(x)))
    torch.testing.assert_close(value_features(backbone, x), expected, rtol=1e-10, atol=1e-10)
    image, local = backbone.encode_dense(x)
    assert image.dtype == local.dtype == torch.float32
    unit = expected / expected.square().sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(local.double(), unit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_clip_value_path_is_the_written_out_one(quick_gelu):
    backbone = clip_backbone(quick_gelu=quick_gelu)
    state = backbone.model.double().visual.state_dict()
    block = "transformer.resblocks.2"

    def expected(h):
        weight, bias = (state[f"{block}.attn.in_proj_{kind}"][128:192] for kind in ("weight", "bias"))
        value = affine(norm(h, state, f"{block}.ln_1", 1e-5), weight, bias)
        u = h + affine(value, state[f"{block}.attn.out_proj.weight"], state[f"{block}.attn.out_proj.bias"])
        up = affine(
            norm(u, state, f"{block}.ln_2", 1e-5),
            *(state[f"{block}.mlp.c_fc.{k}"] for k in ("weight", "bias")),
        )
        up = up * torch.sigmoid(1.702 * up) if quick_gelu else gelu(up)
        u = u + affine(up, *(state[f"{block}.mlp.c_proj.{k}"] for k in ("weight", "bias")))
        return norm(u[:, 1:], state, "ln_post", 1e-5) @ state["proj"]

    # The model itself wants texts too, so its image tower is run.
    visual = backbone.model.visual
    x = pixels(backbone).double()
    h = last_block_input(visual.transformer.resblocks[-1], lambda: visual(x))
    torch.testing.assert_close(value_features(backbone, x), expected(h), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("registers", [0, 2])
def test_dinov2_value_path_has_layer_scale_and_drops_prefix_tokens(registers):
    model = vit(reg_tokens=registers).double()
    state = model.state_dict()

    def expected(h):
        value = affine(
            norm(h, state, "blocks.2.norm1", 1e-6),
            state["blocks.2.attn.qkv.weight"][64:],
            state["blocks.2.attn.qkv.bias"][64:],
        )
        out = affine(value, state["blocks.2.attn.proj.weight"], state["blocks.2.attn.proj.bias"])
        u = h + out * state["blocks.2.ls1.gamma"]
        up = gelu(
            affine(
                norm(u, state, "blocks.2.norm2", 1e-6),
                state["blocks.2.mlp.fc1.weight"],
                state["blocks.2.mlp.fc1.bias"],
            )
        )
        down = affine(up, state["blocks.2.mlp.fc2.weight"], state["blocks.2.mlp.fc2.bias"])
        return norm(u + down * state["blocks.2.ls2.gamma"], state, "norm", 1e-6)[:, 1 + registers :]

    check_value_path(timm_backbone(model), model.blocks[-1], expected)


@pytest.mark.parametrize("kind", [SwinTransformer, SwinTransformerV2])
def test_swin_value_path_is_the_written_out_one(kind):
    model = swin(kind).double()
    state = model.state_dict()
    key = "layers.1.blocks.1"
    second = kind is SwinTransformerV2
    bias = state[f"{key}.attn.v_bias"] if second else state[f"{key}.attn.qkv.bias"][64:]

    def attention(x):
        value = affine(x, state[f"{key}.attn.qkv.weight"][64:], bias)
        return affine(value, state[f"{key}.attn.proj.weight"], state[f"{key}.attn.proj.bias"])

    def mlp(x):
        up = gelu(affine(x, state[f"{key}.mlp.fc1.weight"], state[f"{key}.mlp.fc1.bias"]))
        return affine(up, state[f"{key}.mlp.fc2.weight"], state[f"{key}.mlp.fc2.bias"])

    def expected(h):
        if second:  # norms behind attention and MLP
            u = h + norm(attention(h), state, f"{key}.norm1", 1e-5)
            w = u + norm(mlp(u), state, f"{key}.norm2", 1e-5)
        else:
            u = h + attention(norm(h, state, f"{key}.norm1", 1e-5))
            w = u + mlp(norm(u, state, f"{key}.norm2", 1e-5))
        return norm(w, state, "norm", 1e-5).reshape(2, 32, 32)

    check_value_path(timm_backbone(model), model.layers[-1].blocks[-1], expected)


# ---- golden values of the released code


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.fixture(scope="module")
def golden_clip(golden):
    model = open_clip.CLIP(
        24,
        CLIPVisionCfg(layers=3, width=64, head_width=64, patch_size=8, image_size=32),
        CLIPTextCfg(context_length=77, vocab_size=49408, width=64, heads=2, layers=2),
        quick_gelu=True,
    ).double()
    state = {key[3:]: torch.from_numpy(value) for key, value in golden.items() if key.startswith("sd/")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["token_embedding.weight"], [])
    with torch.no_grad():
        model.token_embedding.weight.fill_(torch.nan)  # a row that is not among the used ones would show
        model.token_embedding.weight[golden["used_token_ids"]] = torch.from_numpy(golden["used_token_rows"])
    return OpenCLIPBackbone(model, open_clip.get_tokenizer("ViT-B-16"), square(32))


def test_golden_image_features(golden, golden_clip):
    x = torch.from_numpy(golden["image"])
    image, local = golden_clip.encode_dense(x, normalize=False)
    np.testing.assert_allclose(image, golden["global_raw"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(local, golden["local_raw"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value_features(golden_clip, x), golden["local_raw"], rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        exact = golden_clip.image_embedding(golden_clip.last_block(golden_clip.prefix(x)))
    np.testing.assert_allclose(exact, golden["global_raw"], rtol=1e-9, atol=1e-11)


def test_golden_token_ids(golden, golden_clip):
    names = [str(name).replace("_", " ") for name in golden["classnames"]]
    ids = golden_clip.tokenize([f"a photo of a {name}." for name in names])
    assert np.array_equal(ids, golden["tok_global"])
    # The released code tokenizes sixteen letters X where the context goes; ours has none there.
    for texts, key in (([f"{name}." for name in names], "tok_local"), (["."] * 3, "tok_neg")):
        released = np.delete(golden[key], slice(1, 17), axis=1)
        assert np.array_equal(golden_clip.tokenize(texts)[:, : released.shape[1]], released)


def test_golden_text_features(golden, golden_clip):
    names = [str(name) for name in golden["classnames"]]
    template = [f"a photo of a {name.replace('_', ' ')}." for name in names]
    local, negative = (torch.from_numpy(golden[f"{kind}_ctx0"]) for kind in ("local", "neg"))
    np.testing.assert_allclose(golden_clip.encode_text(template), golden["text_global"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(golden_clip.encode_prompts(local, names), golden["text_local"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(golden_clip.encode_prompts(negative, [""] * 3), golden["text_neg"], rtol=1e-5, atol=1e-6)


def test_golden_text_features_in_float64(golden, golden_clip):
    names = [str(name) for name in golden["classnames"]]
    for kind, texts in (("local", names), ("neg", [""] * 3)):
        text = golden_clip.encode_prompts(torch.from_numpy(golden[f"{kind}_ctx0"]), texts)
        assert text.dtype == torch.float64
        np.testing.assert_allclose(text, golden[f"text_{kind}"], rtol=1e-9, atol=1e-11)


# ---- grids, prefix tokens, pooling


def hf_vit_backbone(size, depth):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=64, image_size=size,
        patch_size=4, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.ViTModel(config, add_pooling_layer=False)
    return TransformersBackbone(model, ImageTransform(crop=size, resize=max(size)))


@pytest.mark.parametrize(
    "backbone",
    [
        clip_backbone(image_size=(16, 24), patch_size=4, layers=1),
        timm_backbone(vit(img_size=(16, 24), patch_size=4, depth=1)),
        timm_backbone(vit(img_size=(16, 24), patch_size=4, depth=1, class_token=False, global_pool="avg")),
        timm_backbone(vit(img_size=(16, 24), patch_size=4, depth=1, reg_tokens=2, dynamic_img_size=True)),
        hf_vit_backbone((16, 24), 1),
    ],
    ids=["open_clip", "timm", "timm-no-class-token", "timm-registers", "transformers"],
)
def test_local_features_are_row_major_patches(backbone):
    """In a network of one block the value path of a patch depends on the pixels of that patch alone."""
    assert backbone.grid == (4, 6)
    x = pixels(backbone, 1)
    changed = x.clone()
    changed[:, :, 8:12, 16:20] += 1  # row 2, column 4
    _, before = backbone.encode_dense(x)
    _, after = backbone.encode_dense(changed)
    moved = (before - after).abs().amax(-1)[0]
    assert moved.nonzero().flatten().tolist() == [2 * 6 + 4]


def test_model_without_class_token_pools_then_norms():
    model = vit(class_token=False, global_pool="avg", num_classes=4)
    backbone = timm_backbone(model)
    x = pixels(backbone)
    tokens = model.forward_features(x)
    image, local = backbone.encode_dense(x, "tokens", normalize=False)
    torch.testing.assert_close(image, model.fc_norm(tokens.mean(1)))
    torch.testing.assert_close(local, model.fc_norm(tokens))
    torch.testing.assert_close(backbone.encode_logits(x), model(x))


def test_prefix_ends_below_as_many_blocks_as_asked():
    model = vit()
    backbone = timm_backbone(model)
    x = pixels(backbone)
    depth = len(model.blocks)
    for blocks in range(1, depth + 1):
        expected = model.blocks[depth - blocks :](backbone.prefix(x, blocks))
        torch.testing.assert_close(model.norm(expected), model.forward_features(x))
    for blocks in (0, depth + 1):
        with pytest.raises(ValueError, match=rf"blocks={blocks} is outside \[1, {depth}\]"):
            backbone.prefix(x, blocks)


def test_prefix_tokens_are_no_patches():
    model = vit(reg_tokens=3)
    backbone = timm_backbone(model)
    x = pixels(backbone)
    expected = model.forward_features(x)
    image, local = backbone.encode_dense(x, "tokens", normalize=False)
    torch.testing.assert_close(local, expected[:, 4:])
    torch.testing.assert_close(image, expected[:, 0])


def test_attention_pooling_has_local_features_from_the_values_of_the_pool():
    model = vit(class_token=False, global_pool="map", num_classes=4)
    backbone = timm_backbone(model)
    x = pixels(backbone)
    assert backbone.capabilities == {"image", "local", "logits", "blocks"}
    torch.testing.assert_close(backbone.encode_logits(x), model(x))
    image, local = backbone.encode_dense(x, normalize=False)
    torch.testing.assert_close(image, model.forward_head(model.forward_features(x), pre_logits=True))
    # What the pool says to one patch alone, by the library's own pool.
    tokens = model.forward_features(x)
    for patch in (0, 5, 15):
        torch.testing.assert_close(local[:, patch], model.attn_pool(tokens[:, patch : patch + 1]))
    assert torch.equal(backbone.linear("visual.1.up").weight, model.blocks[1].mlp.fc1.weight)


def test_other_networks_give_image_and_logits():
    model = randomized(timm.create_model("test_resnet"))
    backbone = TimmBackbone(model, timm_transform(model), spec="timm:test_resnet")
    x = pixels(backbone)
    assert backbone.capabilities == {"image", "logits"}
    torch.testing.assert_close(backbone.encode_logits(x), model(x))
    assert backbone.encode_image(x).shape == (2, backbone.width)
    with pytest.raises(UsageError, match=r"no 'local' \(it has image, logits\).*open_clip:ViT-B-16"):
        backbone.encode_dense(x)


def test_network_without_pooling_is_refused():
    model = timm.create_model("test_resnet", num_classes=0, global_pool="")
    with pytest.raises(UsageError, match="no image embedding"):
        TimmBackbone(model, timm_transform(model), spec="timm:test_resnet?global_pool=")


@pytest.mark.parametrize("kind", [SwinTransformer, SwinTransformerV2])
def test_swin_tokens_and_odd_stages(kind):
    model = swin(kind, img_size=(36, 20))  # 9 x 5 patches, 5 x 3 cells in the last stage
    backbone = timm_backbone(model)
    assert backbone.grid == (5, 3)
    x = pixels(backbone)
    image, local = backbone.encode_dense(x, "tokens", normalize=False)
    cells = model.forward_features(x)
    torch.testing.assert_close(local, cells.flatten(1, 2))
    torch.testing.assert_close(image, cells.mean((1, 2)))


# ---- texts


@pytest.mark.parametrize("pooling", [{}, {"pool_type": "eos", "eos_id": 49407}])
def test_truncated_text_pass_equals_the_full_one(pooling):
    backbone = clip_backbone(layers=1, **pooling)
    ids = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    with torch.no_grad():
        full = backbone.model.encode_text(ids)
    torch.testing.assert_close(backbone.encode_text(TEXTS, normalize=False), full, rtol=1e-5, atol=1e-5)
    backbone._prompt_chunk = 1
    backbone.texts_seen = {}
    torch.testing.assert_close(backbone.encode_text(TEXTS, normalize=False), full, rtol=1e-5, atol=1e-5)


def test_bidirectional_text_tower_is_not_cut():
    model = clip_model(
        layers=1,
        kind=open_clip.CustomTextCLIP,
        no_causal_mask=True,
        pool_type="last",
        proj_type="linear",
        proj_bias=True,
    )
    backbone = OpenCLIPBackbone(model, open_clip.get_tokenizer("ViT-B-32"), square(32), spec="open_clip:siglip")
    assert backbone.capabilities == {"image", "text", "local", "blocks"}
    ids = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    with torch.no_grad():
        full = model.encode_text(ids)
        padded_otherwise = model.encode_text(torch.where(ids == 0, 7, ids))
    assert (full - padded_otherwise).abs().max() > 1e-2  # the padding is read, so cutting it would show
    torch.testing.assert_close(backbone.encode_text(TEXTS, normalize=False), full)
    with pytest.raises(UsageError, match="'open_clip:siglip' has no 'prompts'"):
        backbone.encode_prompts(torch.zeros(2, 48), ["cat"])


def test_prompt_with_the_words_as_context_is_the_text(clip):
    ids = clip.tokenize(["a photo of a"])[0]
    context = clip.embed_tokens(ids[1:5])
    prompts = clip.encode_prompts(context, ["cat", "sea_lion"])
    texts = clip.encode_text(["a photo of a cat.", "a photo of a sea lion."])
    torch.testing.assert_close(prompts, texts, rtol=1e-5, atol=1e-5)
    per_class = clip.encode_prompts(context.expand(2, -1, -1), ["cat", "sea_lion"])
    torch.testing.assert_close(per_class, texts, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_context_and_nothing_else(clip):
    context = (0.2 * torch.randn(3, 4, 48, generator=torch.Generator().manual_seed(3))).requires_grad_()
    clip.encode_prompts(context, ["cat", "dog", ""])[:2].sum().backward()
    reached = context.grad.abs().sum((1, 2))
    assert (reached[:2] > 1e-3).all()
    assert reached[2] == 0
    assert all(parameter.grad is None for parameter in clip.model.parameters())


def test_gradients_through_the_context_match_differences(golden_clip, golden):
    context = torch.from_numpy(golden["neg_ctx0"]).requires_grad_()
    direction = torch.randn(context.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weight = torch.randn(3, 24, generator=torch.Generator().manual_seed(5))

    def value(c):
        return (golden_clip.encode_prompts(c, [""] * 3) * weight).sum()

    (gradient,) = torch.autograd.grad(value(context), context)
    step = 1e-3
    with torch.no_grad():
        difference = (value(context + step * direction) - value(context - step * direction)) / (2 * step)
    assert (gradient * direction).sum() == pytest.approx(difference.item(), rel=1e-2)


def test_images_carry_no_gradient(clip):
    x = pixels(clip).requires_grad_()
    assert not any(features.requires_grad for features in clip.encode_dense(x))
    tokens = clip.prefix(x)
    assert clip.last_block(tokens).requires_grad  # methods that retrain the last block need it


@pytest.mark.parametrize("backbone", [clip_backbone(layers=1), hf_vit_backbone((16, 16), 2), timm_backbone(vit())])
def test_last_block_is_the_rest_of_the_network(backbone):
    x = pixels(backbone)
    with torch.no_grad():
        tokens = backbone.last_block(backbone.prefix(x))
        embedding = backbone.image_embedding(tokens)
    torch.testing.assert_close(embedding, backbone.encode_image(x, normalize=False))
    torch.testing.assert_close(F.normalize(embedding, dim=-1), backbone.encode_image(x))


def layered():
    """A backbone of every family whose blocks are known."""
    return [
        clip_backbone(),
        TransformersBackbone(clip_to_hf(clip_model(quick_gelu=True), activation="quick_gelu"), square(32)),
        timm_backbone(vit(num_classes=5)),
        timm_backbone(vit(reg_tokens=2, global_pool="avg")),
        TransformersBackbone(dino_to_hf(vit(), registers=0), square(28)),
        timm_backbone(swin(SwinTransformer)),
        *swin_pair(3),
    ]


@pytest.mark.parametrize("backbone", layered())
def test_a_block_is_its_attention_then_its_feed_forward(backbone):
    """For every layer of every tower: `parts` is the library's own block, and the layers are the network."""
    backbone.model.double()
    with torch.no_grad():
        tokens = backbone.embed(pixels(backbone).double())
        for layer in backbone.layers():
            before = layer.enter(tokens)
            after = layer.parts.feed_forward(layer.parts.attend(before))
            tokens = layer(tokens)
            torch.testing.assert_close(after, tokens, rtol=1e-10, atol=1e-10)
        embedding = F.normalize(backbone.image_embedding(tokens), dim=-1)
    torch.testing.assert_close(embedding.float(), backbone.encode_image(pixels(backbone)), rtol=1e-5, atol=1e-6)
    kinds = {name.rpartition(".")[0] for name in backbone.linears() if name.startswith("visual.")} - {"visual"}
    assert {layer.name for layer in backbone.layers()} == kinds


def test_text_blocks_are_their_attention_then_their_feed_forward(tokenizer):
    hf = clip_to_hf(clip_model(quick_gelu=True), activation="quick_gelu")
    theirs = TransformersBackbone(hf, square(32), tokenizer=tokenizer)
    for backbone in (clip_backbone(quick_gelu=True), theirs):
        backbone.model.double()
        with torch.no_grad():
            embeddings, end = backbone.embed_texts(TEXTS)
            x = backbone.add_positions(embeddings)
            for layer in backbone.layers("text", x.shape[1]):
                torch.testing.assert_close(
                    layer.parts.feed_forward(layer.parts.attend(x)), layer(x), atol=1e-10, rtol=0
                )
                x = layer(x)
            features = F.normalize(backbone.project_text(backbone.text_norm(x[torch.arange(len(x)), end])), dim=-1)
        torch.testing.assert_close(features.float(), backbone.encode_text(TEXTS), rtol=1e-5, atol=1e-6)


def test_the_text_tail_has_the_gradients_of_the_whole_block(tokenizer):
    backbone = clip_backbone(quick_gelu=True)
    backbone.model.double()
    embeddings, end = backbone.embed_texts(TEXTS)
    last = backbone.layers("text", embeddings.shape[1])[-1]
    tokens = backbone.add_positions(embeddings).requires_grad_()
    ours = backbone.text_tail(tokens, end)
    whole = backbone.text_norm(last(tokens)[torch.arange(len(end)), end])
    torch.testing.assert_close(ours, whole, atol=1e-10, rtol=0)
    of_ours, of_whole = (torch.autograd.grad(out.square().sum(), tokens)[0] for out in (ours, whole))
    torch.testing.assert_close(of_ours, of_whole, atol=1e-10, rtol=1e-10)


def test_auto_is_what_the_environment_names_or_what_the_processor_has(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("OOD_DTYPE", "float64")
    assert resolve_dtype("auto", cpu) == torch.float64
    assert resolve_dtype("float32", cpu) == torch.float32
    monkeypatch.setenv("OOD_DTYPE", "flaot32")
    with pytest.raises(UsageError, match=r"flaot32.*float32"):
        resolve_dtype("auto", cpu)
    monkeypatch.delenv("OOD_DTYPE")
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("ood_core.devices.cpu_has_bfloat16", lambda has=has: has)
        assert resolve_dtype("auto", cpu) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tower", ["visual", "text"])
def test_an_open_clip_block_is_the_librarys_with_and_without_gradient(tower, dtype):
    backbone = clip_backbone()
    backbone.model.to(dtype)
    width = backbone.layers(tower)[0].module.attn.embed_dim
    x = torch.randn(3, 7, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = backbone.text.attn_mask[:7, :7] if tower == "text" else None
    atol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for layer in backbone.layers(tower, 7):
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        found, expected = layer(ours), layer.module(theirs, attn_mask=mask)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=atol)
        direction = torch.linspace(-1, 1, width, dtype=dtype)
        for output, start in ((found, ours), (expected, theirs)):
            (output @ direction).sum().backward()
            assert start.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("backbone", layered())
def test_only_a_pooled_class_token_reads_it_alone(backbone):
    """Changing the patches behind the last block changes the image embedding unless it reads the class token."""
    with torch.no_grad():
        tokens = backbone._run_last_block(backbone.prefix(pixels(backbone)))
        changed = tokens.clone()
        changed.view(len(tokens), -1, tokens.shape[-1])[:, -1] += torch.arange(tokens.shape[-1])
        same = torch.equal(backbone.image_embedding(tokens), backbone.image_embedding(changed))
    assert same == backbone.reads_class_token


@pytest.mark.parametrize("backbone", layered())
def test_a_copy_is_independent(backbone):
    name = backbone.linears()[0]
    twin = backbone.copy()
    assert twin.fingerprint == backbone.fingerprint
    x = pixels(backbone)
    assert torch.equal(twin.encode_image(x), backbone.encode_image(x))
    before = backbone.fingerprint
    twin.linear(name).set(torch.zeros_like(twin.linear(name).weight))
    assert backbone.fingerprint == before != twin.fingerprint
    assert torch.equal(twin.copy().encode_image(x), twin.encode_image(x))
    assert twin.copy().fingerprint == twin.fingerprint
    assert not torch.equal(twin.encode_image(x), backbone.encode_image(x))


def test_prompt_errors_name_what_is_wrong(clip):
    with pytest.raises(
        ValueError, match=r"'word word.*' with 16 context tokens needs 83 tokens; the text tower takes 77"
    ):
        clip.encode_prompts(torch.zeros(16, 48), ["cat", "word " * 64])
    with pytest.raises(ValueError, match=r"context must be \[n, 48\] or \[2, n, 48\], got \[2, 4, 47\]"):
        clip.encode_prompts(torch.zeros(4, 47), ["cat", "dog"])
    with pytest.raises(ValueError, match=r"got \[3, 4, 48\]"):
        clip.encode_prompts(torch.zeros(3, 4, 48), ["cat", "dog"])
    with pytest.raises(TypeError, match="list of strings, got 'cat'"):
        clip.encode_text("cat")


def test_texts_from_memory_follow_an_edit_and_are_copies(clip):
    first = clip.encode_text(TEXTS)
    expected = first.clone()
    first.zero_()
    assert torch.equal(clip.encode_text(TEXTS), expected)
    weight = clip.linear("text.0.up")
    with weight.edited(weight.weight * 0.5):
        assert (clip.encode_text(TEXTS) - expected).abs().max() > 1e-3
    assert torch.equal(clip.encode_text(TEXTS), expected)


# ---- named weights


def edit_cases():
    hf = clip_to_hf(clip_model(), activation="gelu")
    return [
        (clip_backbone(), "visual.1.value"),
        (clip_backbone(), "visual.projection"),
        (TransformersBackbone(hf, square(32)), "visual.projection"),
        (timm_backbone(vit()), "visual.2.query"),
        (timm_backbone(swin(SwinTransformerV2)), "visual.1.0.down"),
    ]


@pytest.mark.parametrize(("backbone", "name"), edit_cases())
def test_an_edit_is_seen_and_comes_back_bit_by_bit(backbone, name):
    x = pixels(backbone)
    linear, fingerprint, features = backbone.linear(name), backbone.fingerprint, backbone.encode_image(x)
    state = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    new = 1.5 * linear.weight.roll(1, 0)
    with contextlib.suppress(KeyError), linear.edited(new):
        assert torch.equal(backbone.linear(name).weight, new)
        assert backbone.fingerprint != fingerprint
        assert (backbone.encode_image(x) - features).abs().max() > 1e-4
        raise KeyError("inside")
    assert all(torch.equal(value, state[key]) for key, value in backbone.model.state_dict().items())
    assert backbone.fingerprint == fingerprint
    assert torch.equal(backbone.encode_image(x), features)


@pytest.mark.parametrize(("backbone", "name"), edit_cases())
def test_a_placed_weight_is_what_an_edit_writes_and_carries_gradients(backbone, name):
    linear = backbone.linear(name)
    new = (1.5 * linear.weight).requires_grad_()
    placed = linear.placed(new)
    with linear.edited(new.detach()):
        assert torch.equal(placed, linear.parameter)
    placed.sum().backward()
    assert torch.equal(new.grad, torch.ones_like(new))


def test_row_blocks_are_edited_alone(clip):
    fused = clip.model.visual.transformer.resblocks[0].attn.in_proj_weight
    before = fused.clone()
    with clip.linear("visual.0.key").edited(torch.zeros(64, 64)):
        assert torch.equal(fused[:64], before[:64])
        assert torch.equal(fused[128:], before[128:])
        assert not fused[64:128].any()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(64, 65), r"visual.0.out is \[64, 64\], the new weight \[64, 65\]"),
        (torch.full((64, 64), torch.nan), "visual.0.out holds NaN"),
    ],
)
def test_a_bad_weight_changes_nothing(clip, weight, message):
    linear, fingerprint = clip.linear("visual.0.out"), clip.fingerprint
    before = linear.weight.clone()
    with pytest.raises(ValueError, match=message):
        linear.set(weight)
    with pytest.raises(ValueError, match=message), linear.edited(weight):
        pass
    assert torch.equal(linear.weight, before)
    assert clip.fingerprint == fingerprint


def test_names_of_weights(clip):
    kinds = ("query", "key", "value", "out", "up", "down")
    expected = [f"visual.{i}.{kind}" for i in range(3) for kind in kinds]
    expected += [f"text.{i}.{kind}" for i in range(2) for kind in kinds]
    assert clip.linears() == [*expected, "visual.projection", "text.projection"]
    assert clip.linear("visual.projection").weight.shape == (24, 64)
    names = timm_backbone(swin(SwinTransformer)).linears()
    assert names == [f"visual.{s}.{b}.{kind}" for s in range(2) for b in range(2) for kind in kinds]
    with pytest.raises(UsageError, match=r"Unknown weight 'visual.1.upp'. Did you mean 'visual.1.up'"):
        clip.linear("visual.1.upp")


def test_fingerprint_depends_on_weights_alone():
    assert clip_backbone().fingerprint == clip_backbone().fingerprint
    model = clip_model()
    with torch.no_grad():
        model.ln_final.bias[3] += 1e-3
    assert OpenCLIPBackbone(model, None, square(32)).fingerprint != clip_backbone().fingerprint


# ---- precision, inputs, capabilities


@pytest.mark.parametrize("make", [clip_backbone, lambda: timm_backbone(vit()), lambda: hf_vit_backbone((16, 16), 2)])
def test_half_precision_weights_give_float32_results(make):
    backbone = make()
    x = pixels(backbone)
    exact = backbone.encode_dense(x)
    backbone.model.to(torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    for half, full in zip(backbone.encode_dense(x), exact, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.norm(dim=-1), torch.ones(half.shape[:-1]), rtol=1e-5, atol=1e-5)
        cosine = (half * full).sum(-1)
        assert 0.99 < cosine.min() < 1 - 1e-7


def test_half_precision_texts(tokenizer):
    for make in (clip_backbone, lambda: TransformersBackbone(
        clip_to_hf(clip_model(), activation="gelu"), square(32), tokenizer=tokenizer
    )):  # fmt: skip
        backbone = make()
        exact = backbone.encode_text(TEXTS)
        backbone.model.to(torch.bfloat16)
        half = backbone.encode_text(TEXTS)
        assert half.dtype == torch.float32
        assert not torch.equal(half, exact)
        assert (half * exact).sum(-1).min() > 0.99


def test_images_of_another_shape_or_with_nan_are_refused(clip):
    with pytest.raises(ValueError, match=r"\[B, 3, 32, 32\].*got \[2, 3, 32, 31\]"):
        clip.encode_image(torch.zeros(2, 3, 32, 31))
    with pytest.raises(ValueError, match="got list"):
        clip.encode_image([1, 2])
    bad = torch.zeros(1, 3, 32, 32)
    bad[0, 1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        clip.encode_image(bad)


def test_a_missing_capability_names_other_backbones(clip):
    with pytest.raises(UsageError, match=r"has no 'logits'.*timm:swinv2_base"):
        clip.encode_logits(pixels(clip))
    with pytest.raises(UsageError, match=r"'timm:test' has no 'text'.*hf:openai/clip"):
        timm_backbone(vit()).encode_text(["cat"])
    hf = TransformersBackbone(clip_to_hf(clip.model, activation="gelu"), square(32))
    with pytest.raises(UsageError, match="has no 'text'"):
        hf.encode_text(["cat"])
    with pytest.raises(UsageError, match=r"Unknown feature 'locale'\. Did you mean 'local'"):
        clip.encode(pixels(clip), {"locale"})
    with pytest.raises(ValueError, match="local='patch'"):
        clip.encode(pixels(clip), {"local"}, local="patch")


# ---- transforms


def photo(width, height):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("options", "resize"),
    [
        ({"crop_pct": 0.9, "interpolation": "bicubic"}, 177),
        ({"crop_pct": 1.0, "interpolation": "bilinear"}, 160),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, None),
    ],
)
def test_timm_transform_is_the_library_own(options, resize):
    model = timm.create_model("test_vit", pretrained_cfg_overlay=options)
    transform = timm_transform(model)
    assert (transform.crop, transform.resize) == ((160, 160), resize)
    library = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = photo(230, 190)
    torch.testing.assert_close(transform(image), library(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_open_clip_transform_is_the_library_own(mode):
    model = clip_model(layers=1)
    asked = {"size": (32, 32), "resize_mode": mode, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "fill_color": 90}
    cfg = open_clip.transform.PreprocessCfg(**asked)
    open_clip.transform.merge_preprocess_dict(cfg, {})
    open_clip.model.set_model_preprocess_cfg(model, open_clip.transform.asdict(cfg))
    library = open_clip.transform.image_transform_v2(cfg, is_train=False)
    image = photo(70, 51)
    torch.testing.assert_close(open_clip_transform(model)(image), library(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "resize"),
    [
        ({"resize": None}, "both sides to 32 x 32"),
        ({"resize": 36}, "short side to 36"),
        ({"resize": (32, 32), "fit": "contain"}, "contain 32 x 32"),
        ({"resize": None, "fit": "none"}, "none: the middle is cut out"),
    ],
)
def test_what_a_transform_does_is_told_with_its_sources(options, resize):
    transform = ImageTransform(crop=(32, 32), **options)
    told = transform_decisions(transform, size="the tower", rest="the tag", sources={"mean": "the library"})
    found = {decision.what: (decision.value, decision.source) for decision in told}
    assert found["image size"] == ("32 x 32", "the tower")
    assert found["resize"] == (resize, "the tag")
    assert (found["mean"][1], found["std"][1]) == ("the library", "the tag")


def test_wrapped_open_clip_models_are_the_same_backbone():
    plain = clip_backbone()
    for model in (nn.DataParallel(plain.model), torch.compile(plain.model)):
        wrapped = OpenCLIPBackbone(model, plain.tokenizer, plain.transform)
        assert wrapped.capabilities == plain.capabilities
        assert wrapped.fingerprint == plain.fingerprint


CLIP_PROCESSOR = {
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CLIP_PROCESSOR, ((32, 32), 36, "bicubic")),
        ({"size": 36, "crop_size": 32, "do_center_crop": True, "resample": 2}, ((32, 32), 36, "bilinear")),
        ({"size": 48, "resample": 2}, ((48, 48), None, "bilinear")),
        ({"size": {"height": 40, "width": 48}, "resample": 0}, ((40, 48), None, "nearest")),
        ({}, ((28, 28), 28, "bicubic")),
    ],
)
def test_transformers_transform_is_read_from_the_processor(config, expected):
    model_config = transformers.Dinov2Config(image_size=28)
    transform = hf_transform(config, model_config)
    assert (transform.crop, transform.resize, transform.interpolation) == expected
    mean = config.get("image_mean", [0.485, 0.456, 0.406])
    assert list(transform.mean) == mean
    assert transform(photo(70, 51)).shape == (3, *expected[0])
    assert hf_transform({"do_normalize": False}, model_config).mean == (0.0, 0.0, 0.0)


# ---- loading


def test_listed_backbones_start_with_the_embedded_one():
    assert list_backbones()[0] == "tiny"
    assert "hf:NAME_OR_FOLDER" in list_backbones()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("openclip:ViT-B-16/openai", "Did you mean 'open_clip:ViT-B-16/openai'"),
        ("timm", "Unknown backbone 'timm'"),
        ("tiny:large", "Unknown backbone 'tiny:large'"),
        ("open_clip:ViT-B-61/openai", "Unknown open_clip architecture 'ViT-B-61'. Did you mean 'ViT-B-16'"),
        ("open_clip:ViT-B-16/opnai", "Unknown weights for open_clip ViT-B-16 'opnai'. Did you mean 'openai'"),
        ("timm:vit_base_patch61_224.x", "'vit_base_patch61_224'. Did you mean 'vit_base_patch16_224'"),
        ("timm:vit_base_patch14_dinov2.lvd", "Did you mean 'lvd142m'"),
        ("timm:test_vit?img_size", r"options are written '\?img_size=224"),
        ("timm:test_vit?no_such_thing=1", "timm cannot build .*no_such_thing"),
    ],
)  # fmt: skip
def test_unknown_names_list_the_nearest(spec, message):
    with pytest.raises(UsageError, match=message):
        create_backbone(spec)


def test_every_process_of_a_launcher_takes_its_own_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _resolve_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _resolve_device("cuda") == torch.device("cuda:1")
    assert _resolve_device("cuda:0") == torch.device("cuda:0")
    assert _resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="2 CUDA devices found"):
        _resolve_device("cuda")


def test_unknown_devices():
    with pytest.raises(UsageError, match="Unknown device 'gpu0'"):
        create_backbone("tiny", device="gpu0")
    with pytest.raises(UsageError, match="'cuda:99' is not there"):
        create_backbone("tiny", device="cuda:99")


def test_unknown_dtype_and_wrong_types():
    with pytest.raises(UsageError, match=r"Unknown dtype 'float31'\. Did you mean 'float32'"):
        create_backbone("timm:test_vit", dtype="float31")
    with pytest.raises(TypeError, match="spec must be a string"):
        create_backbone(3)


def test_missing_folders_are_missing_data(tmp_path):
    for library in ("timm:local-dir:", "open_clip:local-dir:", "hf:"):
        with pytest.raises(MissingDataError, match=r"could not be loaded.*'tiny'"):
            create_backbone(f"{library}{tmp_path / 'nowhere'}")


def test_timm_options_and_random_weights(caplog):
    backbone = create_backbone("timm:test_vit?img_size=64,96&num_classes=0", dtype="float32")
    assert "no weights named" in caplog.text
    assert backbone.grid == (4, 6)
    assert backbone.transform.crop == (64, 96)
    assert backbone.capabilities == {"image", "local", "blocks"}


def test_timm_folder(tmp_path):
    model = randomized(timm.create_model("test_vit", num_classes=3))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "test_vit", "num_classes": 3, "label_names": ["ant", "bee", "fly"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"input_size": [3, 160, 160]}}))
    backbone = create_backbone(f"timm:local-dir:{tmp_path}", dtype="float32")
    x = pixels(backbone)
    torch.testing.assert_close(backbone.encode_logits(x), model(x))
    assert backbone.label_names == ["ant", "bee", "fly"]


def test_transformers_folder(tmp_path, clip, tokenizer):
    clip_to_hf(clip.model, activation="gelu").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR))
    backbone = create_backbone(f"hf:{tmp_path}", dtype="float32")
    assert backbone.transform.describe() == {
        "crop": (32, 32),
        "resize": 36,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.5, 0.6, 0.7),
        "interpolation": "bicubic",
    }
    assert_same_image_features(clip, backbone)
    torch.testing.assert_close(backbone.encode_text(TEXTS), clip.encode_text(TEXTS), rtol=1e-5, atol=1e-5)


def test_transformers_folder_without_processor_and_labels(tmp_path, caplog):
    config = transformers.ViTConfig(**SIZES, intermediate_size=64, num_labels=3)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    backbone = create_backbone(f"hf:{tmp_path}", dtype="float32")
    assert "no preprocessor_config.json" in caplog.text
    assert backbone.transform.crop == (28, 28)
    assert backbone.label_names is None  # "LABEL_0", ... are no names
    x = pixels(backbone)
    torch.testing.assert_close(backbone.encode_logits(x), model(x).logits)


def test_incomplete_weights_are_refused(tmp_path):
    config = transformers.ViTConfig(**SIZES, intermediate_size=64)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path)
    state = {key: value.clone() for key, value in model.state_dict().items() if "layers.1.mlp.fc1" not in key}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingDataError, match=r"incomplete: vit\.layers\.1\.mlp\.fc1\.bias"):
        create_backbone(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "bert", "architectures": ["BertModel"]},
            "is a BertModel. Supported: CLIPModel, ViTModel",
        ),
        (
            {"model_type": "clip", "architectures": ["CLIPVisionModelWithProjection"]},
            "is a CLIPVisionModelWithProj",
        ),
        ({"model_type": "no-such-type"}, "Supported: CLIPModel"),
    ],
)
def test_unsupported_transformers_models_name_the_supported_ones(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        create_backbone(f"hf:{tmp_path}")


def test_missing_transformers_gives_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "ood_core.backbones.transformers")
    with pytest.raises(UsageError, match=r"pip install 'ood-core\[transformers\]'"):
        create_backbone("hf:openai/clip-vit-base-patch16")


@pytest.mark.parametrize("normalize", [True, False])
def test_the_tail_is_the_rest_of_the_pass(normalize):
    tiny = create_backbone("tiny")
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    image, local = tiny.tail(tiny.prefix(images))
    expected = tiny.encode_dense(images, normalize=normalize)
    if normalize:
        image, local = F.normalize(image, dim=-1), F.normalize(local, dim=-1)
    torch.testing.assert_close(image, expected[0])
    torch.testing.assert_close(local, expected[1])
    tokens = tiny.prefix(images).requires_grad_()
    sum(part.sum() for part in tiny.tail(tokens)).backward()
    assert tokens.grad.isfinite().all()
    assert tokens.grad.any()


def test_the_weights_are_saved_in_the_librarys_format(tmp_path):
    tiny = create_backbone("tiny")
    assert tiny.save(tmp_path / "new").startswith(
        f"Saved: {tmp_path / 'new' / 'model.safetensors'}, for load_state_dict"
    )
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(value, tensors[name]) for name, value in tiny.model.state_dict().items())
