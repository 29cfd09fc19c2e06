"""Every published pair of architecture and weights is built as its weights ask, without fetching any."""

import copy
import json
import logging
import math
import warnings

import open_clip
import open_clip.factory
import open_clip.hf_model
import open_clip.timm_model
import pytest
import timm
import torch
from ood_core import create_backbone
from ood_core.errors import DataError, MissingDataError, UsageError
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from safetensors.torch import load_file, save_file
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


# ---- towers that pool with attention


def randomized(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.fixture(scope="module")
def pooled():
    """One backbone of every kind of pool, with random weights."""
    names = {"resnet": "RN50", "siglip": "ViT-B-16-SigLIP", "coca": "coca_ViT-B-32", "pe": "PE-Core-T-16-384"}
    made = {kind: create_backbone(f"open_clip:{name}") for kind, name in names.items()}
    for backbone in made.values():
        randomized(backbone.model)
    return made


@pytest.mark.parametrize("kind", ["resnet", "siglip", "coca", "pe"])
def test_image_features_are_the_librarys_own(pooled, kind):
    backbone = pooled[kind]
    x = torch.randn(2, 3, *backbone.transform.crop)
    expected = backbone.model.encode_image(x, normalize=False)
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(backbone.encode_image(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["siglip", "coca", "pe"])
def test_a_local_feature_is_what_the_pool_answers_to_that_patch_alone(pooled, kind):
    backbone = pooled[kind]
    x = torch.randn(2, 3, *backbone.transform.crop)
    tokens = backbone.embed(x)
    patches = tokens[:, tokens.shape[1] - backbone.grid[0] * backbone.grid[1] :]
    alone = torch.stack([backbone.image_embedding(patches[:, [i]]) for i in range(patches.shape[1])], 1)
    _, local = backbone.encode_dense(x, normalize=False)
    torch.testing.assert_close(local, alone, rtol=1e-4, atol=1e-5)


def test_the_patch_grid_of_siglip_keeps_its_first_patch(pooled):
    backbone = pooled["siglip"]
    assert backbone.grid == (14, 14)
    x = torch.zeros(1, 3, 224, 224)
    x[..., :16, :16] = 3  # seen by the first patch before any block mixes them
    trunk = backbone.model.visual.trunk
    difference = (trunk.patch_embed(x) - trunk.patch_embed(torch.zeros_like(x))).norm(dim=-1)[0]
    assert difference[0] > 0
    assert difference[1:].max() < 1e-5
    assert backbone.embed(x).shape[1] == 196


def test_texts_of_coca_are_raw_when_asked(pooled):
    backbone = pooled["coca"]
    texts = ["a dog", "a photo of a great white shark"]
    ids = backbone.tokenizer(texts)
    expected = backbone.model.encode_text(ids, normalize=False)
    torch.testing.assert_close(backbone.encode_text(texts, normalize=False), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected.norm(dim=-1), torch.ones(2))


# ---- files, folders, names


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "w.safetensors"
    torch.manual_seed(1)
    save_file(open_clip.create_model("ViT-B-16", load_weights=False).state_dict(), file)
    return file


def same_weights(backbone, file):
    own = backbone.model.state_dict()
    return all(torch.equal(own[name], value) for name, value in load_file(file).items())


def test_a_file_by_relative_path_and_by_absolute_path(weights, monkeypatch):
    assert same_weights(create_backbone(f"open_clip:ViT-B-16/{weights}"), weights)
    monkeypatch.chdir(weights.parent)
    assert same_weights(create_backbone("open_clip:ViT-B-16/w.safetensors"), weights)
    assert same_weights(create_backbone("open_clip:ViT-B-16/./w.safetensors"), weights)


def test_a_file_takes_the_preprocessing_that_all_published_weights_agree_on(tmp_path):
    torch.save(open_clip.create_model("ViT-B-16-SigLIP", load_weights=False).state_dict(), tmp_path / "w.pt")
    backbone = create_backbone(f"open_clip:ViT-B-16-SigLIP/{tmp_path}/w.pt")
    assert backbone.transform.mean == (0.5, 0.5, 0.5)
    assert backbone.transform.resize is None
    assert {decision.what: decision.source for decision in backbone.decisions}["mean"].startswith("what all published")


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_the_option_decides_the_activation_of_a_file(weights, quick_gelu):
    backbone = create_backbone(f"open_clip:ViT-B-16/{weights}?quick_gelu={str(quick_gelu).lower()}")
    assert activations(backbone.model) == {QuickGELU if quick_gelu else nn.GELU}
    assert backbone.decisions[0].source == "the option quick_gelu"


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        ("opnai", UsageError, "Did you mean 'openai'"),
        ("none.pt", MissingDataError, r"none\.pt is not there"),
        ("openai?quickgelu=true", UsageError, "Did you mean 'quick_gelu'"),
        ("openai?quick_gelu=maybe", UsageError, "must be true or false"),
        ("openai?quick_gelu", UsageError, r"written '\?quick_gelu=true'"),
    ],
)
def test_wrong_names_are_named(end, error, message):
    with pytest.raises(error, match=message):
        create_backbone(f"open_clip:ViT-B-16/{end}")


def folder(path, *, config=None, weights=True, **preprocess):
    config = copy.deepcopy(config or open_clip.factory._MODEL_CONFIGS["ViT-B-16"])
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    if weights:
        save_file(open_clip.create_model("ViT-B-16", load_weights=False).state_dict(), path / "model.safetensors")
    return f"open_clip:local-dir:{path}"


def test_a_folder_without_weights_is_no_random_network(tmp_path):
    with pytest.raises(MissingDataError, match="holds no weights"):
        create_backbone(folder(tmp_path, weights=False))


def test_a_folder_whose_weights_have_another_size_is_refused(tmp_path):
    config = copy.deepcopy(open_clip.factory._MODEL_CONFIGS["ViT-B-16"])
    config["vision_cfg"]["image_size"] = 96
    with pytest.raises(DataError, match=r"other shapes for visual\.positional_embedding \[197, 64\] instead of"):
        create_backbone(folder(tmp_path, config=config))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_cfg": {}}'])
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(DataError, match=r"open_clip_config\.json is no configuration"):
        create_backbone(f"open_clip:local-dir:{tmp_path}")


def test_a_repository_of_the_hub_without_weights_is_no_random_network(monkeypatch):
    def missing(*args, **options):
        raise FileNotFoundError("no such file")

    config = {"model_cfg": open_clip.factory._MODEL_CONFIGS["ViT-B-16"]}
    monkeypatch.setattr(open_clip.factory, "_get_hf_config", lambda *_, **__: copy.deepcopy(config))
    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", missing)
    with pytest.raises(MissingDataError, match="could not be loaded"):
        create_backbone("open_clip:hf-hub:some/clip")


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_repository_of_the_hub_is_built_as_its_configuration_says(monkeypatch, quick_gelu):
    config = {
        "model_cfg": open_clip.factory._MODEL_CONFIGS["ViT-B-16"] | {"quick_gelu": quick_gelu},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"},
    }
    monkeypatch.setattr(open_clip.factory, "_get_hf_config", lambda *_, **__: copy.deepcopy(config))
    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", lambda *_, **__: "weights")
    backbone = create_backbone("open_clip:hf-hub:some/clip")
    assert activations(backbone.model) == {QuickGELU if quick_gelu else nn.GELU}
    assert backbone.transform.mean == (0.5, 0.5, 0.5)
    assert backbone.transform.resize is None
    assert backbone.logit_scale == pytest.approx(SCALE)


def test_warnings_of_the_library_reach_the_user(monkeypatch, caplog):
    def warn(*args, **options):
        warnings.warn("the SHA256 checksum does not match; re-downloading", UserWarning, stacklevel=1)
        return "weights"

    monkeypatch.setattr(open_clip.factory, "download_pretrained", warn)
    with caplog.at_level(logging.WARNING):
        create_backbone("open_clip:ViT-B-16/laion2b_s34b_b88k")
    assert "checksum does not match" in caplog.text
