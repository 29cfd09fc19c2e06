"""Small backbones of every family, in float64 so that nothing depends on rounding, and images for them."""

import re
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.backbones.timm import TimmBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.data import PILImages
from ood_core.testing.fixtures import one_thread
from ood_core.tiny import ByteTokenizer
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer

__all__ = ["one_thread"]

TOKENIZER = ByteTokenizer(context_length=32)
SIDE = 32
OPEN_CLIP_TO_TRANSFORMERS = [
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


def randomized(model, seed, scale=20.0):
    """Weights of the size of trained ones, norms and biases off their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "logit_scale":
                parameter.fill_(np.log(scale))
            elif parameter.ndim == 1 and name.endswith(("weight", "gamma")):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim < 2 or "embed" in name or "token" in name:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval().double()


def square():
    return ImageTransform(crop=(SIDE, SIDE), resize=SIDE)


def clip(layers=(2, 2), *, seed=0, scale=20.0, vision=None):
    """open_clip with a fused qkv; 16 patches."""
    vision = vision or {"layers": layers[0], "width": 24, "head_width": 12, "patch_size": 8}
    text = CLIPTextCfg(
        context_length=TOKENIZER.context_length, vocab_size=ByteTokenizer.vocab_size, width=20, heads=2,
        layers=layers[1],
    )  # fmt: skip
    model = randomized(open_clip.CLIP(16, CLIPVisionCfg(image_size=SIDE, **vision), text), seed, scale)
    if "patch_size" not in vision:  # a ResNet, whose width is found by a pass in float32
        model.float()
    return OpenCLIPBackbone(model, TOKENIZER, square(), spec="small-clip")


def as_transformers(backbone):
    """The weights of a `clip` in the other library."""
    transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    from ood_core.backbones.transformers import TransformersBackbone

    depths = {"visual": len(backbone.layers()), "text": len(backbone.layers("text", 1))}
    both = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 2, "projection_dim": 16}
    vision = {"hidden_size": 24, "intermediate_size": 96, "image_size": SIDE, "patch_size": 8}
    text = {"hidden_size": 20, "intermediate_size": 80, "vocab_size": 259, "max_position_embeddings": 32}
    text |= {"bos_token_id": TOKENIZER.start, "eos_token_id": TOKENIZER.end, "pad_token_id": TOKENIZER.pad}
    config = transformers.CLIPConfig(
        text_config=both | text | {"num_hidden_layers": depths["text"]},
        vision_config=both | vision | {"num_hidden_layers": depths["visual"]},
        projection_dim=16,
    )
    state = {}
    for key, tensor in backbone.model.state_dict().items():
        for pattern, replacement in OPEN_CLIP_TO_TRANSFORMERS:
            key = re.sub(pattern, replacement, key)
        if "{qkv}" in key:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
            state |= {key.replace("{qkv}", name): part for name, part in parts}
        else:
            state[key] = tensor.T if key.endswith("_projection.weight") else tensor
    model = transformers.CLIPModel(config).double()
    model.load_state_dict(state)

    def tokenizer(texts, **_):
        return {"input_ids": TOKENIZER(texts)}

    return TransformersBackbone(model, square(), tokenizer=tokenizer, spec="small-hf-clip")


def vit(*, depth=3, seed=0, **options):
    """A classifier with LayerScale and a class token."""
    options = {"num_classes": 4, "init_values": 1.0} | options
    model = VisionTransformer(SIDE, 8, embed_dim=24, depth=depth, num_heads=2, **options)
    return TimmBackbone(randomized(model, seed), square(), spec="small-vit")


def swin(version=2, *, seed=0, drop=0.0):
    """A classifier of two stages of two blocks; windows are shifted in the first stage."""
    kind = SwinTransformer if version == 1 else SwinTransformerV2
    options = {"num_classes": 4, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}
    options["drop_path_rate"] = drop  # 0.1 unless told otherwise
    model = randomized(kind(img_size=SIDE, patch_size=4, **options), seed)
    return TimmBackbone(model, square(), spec=f"small-swin{version}")


def hf_swin(*, seed=0, drop=0.0):
    """The same of the other library."""
    transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    from ood_core.backbones.transformers import TransformersBackbone

    sizes = {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 4, "patch_size": 4}
    config = transformers.Swinv2Config(image_size=SIDE, num_labels=4, drop_path_rate=drop, **sizes)
    model = randomized(transformers.Swinv2ForImageClassification(config), seed)
    return TransformersBackbone(model, square(), spec="small-hf-swin")


def photos(labels, *, seed=0):
    """Smooth random images with these labels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (len(labels), 5, 5, 3), dtype=np.uint8)
    return PILImages([Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for one in coarse], labels)


@pytest.fixture(scope="session")
def make():
    """Builders of small backbones and image sources."""
    return SimpleNamespace(
        clip=clip, as_transformers=as_transformers, vit=vit, swin=swin, hf_swin=hf_swin, photos=photos
    )
