"""Every published pair of architecture and weights is built as its weights ask, without fetching any."""

import copy
import math

import open_clip
import open_clip.factory
import open_clip.hf_model
import open_clip.timm_model
import pytest
import timm
import torch
from ood_core import create_backbone
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import nn

PAIRS = open_clip.list_pretrained()
ARCHITECTURES = {name: open_clip.get_model_config(name) for name in {name for name, _ in PAIRS} | {"ViT-B-16"}}
SCALE, BIAS = 37.5, -11.25


def shrunken(config):
    """The same architecture with one narrow layer: all that a tag decides is kept."""
    config = copy.deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" not in vision:
        convolutions = isinstance(vision["layers"], list)
        vision |= {"layers": [1, 1, 1, 1], "width": 8} if convolutions else {"layers": 1, "width": 64, "head_width": 32}
        config["embed_dim"] = 64
    if "attn_pooler_heads" in vision:
        vision["attn_pooler_heads"] = 2
    if "hf_model_name" not in text:
        text |= {"layers": 1, "width": 32, "heads": 2}
    if "hf_tokenizer_name" in text:
        text["vocab_size"] = 100
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 1, "width": 64, "heads": 2}
    return config


class TokenizerOfTransformers:
    """Stands for a tokenizer that would be fetched, and keeps what was asked of it."""

    def __init__(self, name, context_length=None, **options):
        self.name, self.context_length, self.options = str(name), context_length, options


def give_scale(model, *args, **options):
    """In place of the published weights."""
    with torch.no_grad():
        model.logit_scale.fill_(math.log(SCALE))
        if model.logit_bias is not None:
            model.logit_bias.fill_(BIAS)
    return {}


@pytest.fixture(scope="module", autouse=True)
def library():
    """open_clip without a network, with small copies of its architectures."""
    with pytest.MonkeyPatch.context() as patch:
        small = {name: shrunken(config) for name, config in ARCHITECTURES.items()}
        patch.setattr(open_clip.factory, "_MODEL_CONFIGS", small)
        patch.setattr(open_clip.factory, "download_pretrained", lambda *args, **options: "weights")
        patch.setattr(open_clip.factory, "load_checkpoint", give_scale)
        patch.setattr(open_clip.factory, "HFTokenizer", TokenizerOfTransformers)
        patch.setattr(open_clip.timm_model.timm, "create_model", create_shallow_of(timm.create_model))
        patch.setattr(open_clip.hf_model.AutoConfig, "from_pretrained", small_roberta)
        yield


def create_shallow_of(create):
    """timm's `create_model` with one block per stage and few channels."""

    def shallow(name, pretrained=False, **options):
        assert not pretrained
        if name.startswith("convnext"):
            options |= {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128)}
        elif name.startswith("fastvit"):
            options |= {"layers": (1,) * (5 if name.endswith(("mci3", "mci4")) else 4)}
        else:
            narrow = "siglip" in name or "vit_pe" in name
            options |= {"depth": 1} | ({"embed_dim": 64, "num_heads": 2} if narrow else {})
        return create(name, **options)

    return shallow


def small_roberta(name):
    from transformers import RobertaConfig, XLMRobertaConfig

    kind = XLMRobertaConfig if name.startswith("xlm") else RobertaConfig
    return kind(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=100)


def quick(name, tag):
    """What the tag says; a tag that says nothing was trained with the architecture as it stands."""
    return get_pretrained_cfg(name, tag).get("quick_gelu", ARCHITECTURES[name].get("quick_gelu", False))


def activations(model):
    """Of every block that open_clip itself builds."""
    return {type(block.mlp.gelu) for block in model.modules() if isinstance(block, ResidualAttentionBlock)}


@pytest.mark.parametrize(("name", "tag"), PAIRS, ids=[f"{name}-{tag}" for name, tag in PAIRS])
def test_the_model_of_a_published_tag_is_the_one_that_its_weights_belong_to(name, tag, caplog):
    asked, config = get_pretrained_cfg(name, tag), ARCHITECTURES[name]
    backbone = create_backbone(f"open_clip:{name}/{tag}")

    found = activations(backbone.model)
    assert found <= ({QuickGELU} if quick(name, tag) else {nn.GELU})
    assert found or "hf_model_name" in config["text_cfg"]
    tanh = (config["text_cfg"].get("act_kwargs") or {}).get("approximate") == "tanh"
    text = getattr(backbone.model, "text", backbone.model)
    if isinstance(gelu := getattr(text, "transformer", nn.Module()), nn.Module) and hasattr(gelu, "resblocks"):
        assert str(getattr(gelu.resblocks[0].mlp.gelu, "approximate", "none")) == ("tanh" if tanh else "none")

    said = [record for record in caplog.records if record.name.startswith("ood_core")]
    contradicts = quick(name, tag) != config.get("quick_gelu", False)
    assert len(said) == contradicts, [record.getMessage() for record in said]
    assert not contradicts or "as the configuration of the tag" in said[0].getMessage()

    # The one architecture whose size in open_clip is not that of its network: the weights are for 384 pixels.
    size = 384 if name == "ViTamin-XL-384" else config["vision_cfg"]["image_size"]
    transform = backbone.transform
    assert transform.crop == (size, size)
    assert transform.resize == (None if asked["resize_mode"] == "squash" else size)
    assert (transform.mean, transform.std) == (asked["mean"], asked["std"])
    assert transform.interpolation == asked["interpolation"]

    tokenizer, text_config = backbone.tokenizer, config["text_cfg"]
    assert tokenizer.context_length == backbone.context_length == text_config.get("context_length", 77)
    if fetched := text_config.get("hf_tokenizer_name"):
        wanted = {"tokenizer_mode": text_config.get("tokenizer_mode"), **(text_config.get("tokenizer_kwargs") or {})}
        assert (tokenizer.name, tokenizer.options | wanted) == (fetched, tokenizer.options)
    else:
        assert type(tokenizer) is open_clip.SimpleTokenizer

    assert backbone.logit_scale == pytest.approx(SCALE)
    assert backbone.logit_bias == (BIAS if "init_logit_bias" in config else 0.0)

    told = {decision.what: decision.value for decision in backbone.decisions}
    assert told["image size"] == f"{size} x {size}"
    assert ("QuickGELU" in told["activation"]) == (QuickGELU in found)
    assert told["context length"] == str(tokenizer.context_length)
    assert told["logit scale"] == "37.5"
    assert told.get("logit bias", "0") == f"{backbone.logit_bias:.4g}"
    if "local" in backbone.capabilities:
        image, local = backbone.encode_dense(torch.zeros(1, 3, size, size))
        assert local.shape == (1, backbone.grid[0] * backbone.grid[1], image.shape[-1])
