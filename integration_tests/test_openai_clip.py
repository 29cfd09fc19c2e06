"""CLIP as OpenAI's own code runs it: the same files of weights give the same numbers through our specs."""

import importlib.util
import json
import math
import re
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from ood_core import ImageFolder, create_backbone, create_detector, extract
from ood_core.errors import DataError
from PIL import Image
from safetensors.torch import save_file
from torch import nn

TEXTS = ["a photo of a dog", "A blurry photo of the Great White Shark!", "ramen", "a photo of a missile. " * 3]
# image size, layers, width, patch; embedding, text width, text layers: as published, but narrower and shallower.
SHAPES = {
    "ViT-B-16": (64, 3, 128, 16, 64, 64, 2),
    "ViT-L-14": (56, 4, 192, 14, 96, 128, 3),
    "RN50": (96, [3, 4, 6, 3], 8, None, 64, 64, 2),
}


@pytest.fixture(scope="module")
def original():
    """OpenAI's modules, without their package's own imports."""
    root = Path(next(iter(importlib.util.find_spec("clip").submodule_search_locations)))

    def module(name):
        spec = importlib.util.spec_from_file_location(f"openai_{name}", root / f"{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    return {name: module(name) for name in ("model", "simple_tokenizer")}


@pytest.fixture(scope="module", autouse=True)
def small_architectures():
    """The published names, with small sizes."""
    configs = dict(open_clip.factory._MODEL_CONFIGS)
    for name, (size, layers, width, patch, embedding, text_width, text_layers) in SHAPES.items():
        config = open_clip.get_model_config(name)
        config["embed_dim"] = embedding
        config["vision_cfg"] |= {"image_size": size, "layers": layers, "width": width}
        if patch:
            config["vision_cfg"] |= {"patch_size": patch}
        config["text_cfg"] |= {"width": text_width, "heads": text_width // 64, "layers": text_layers}
        configs[name] = config
    with pytest.MonkeyPatch.context() as patch_:
        patch_.setattr(open_clip.factory, "_MODEL_CONFIGS", configs)
        yield


def published(original, name, seed=0):
    """A state dict as in OpenAI's files: layers in half precision, three numbers beside them; random weights."""
    size, layers, width, patch, embedding, text_width, text_layers = SHAPES[name]
    torch.manual_seed(seed)
    shape = tuple(layers) if isinstance(layers, list) else layers
    model = original["model"].CLIP(
        embedding, size, shape, width, patch, 77, 49408, text_width, text_width // 64, text_layers
    )
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point() and value.ndim < 2:
            value.add_(0.2 * torch.randn_like(value))
    for module in model.visual.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # PyTorch's own start lets fifty layers forget the image
    with torch.no_grad():
        model.logit_scale.fill_(math.log(60))
        for name_, parameter in model.visual.named_parameters():
            if name_.endswith("bn3.weight"):
                parameter.fill_(0.7)
    original["model"].convert_weights(model)
    numbers = {"input_resolution": size, "context_length": 77, "vocab_size": 49408}
    return model.state_dict() | {key: torch.tensor(value) for key, value in numbers.items()}


def reference(original, state):
    """OpenAI's `build_model` of the weights, in full precision."""
    return original["model"].build_model(dict(state)).float()


def original_tokens(original, texts):
    tokenizer = original["simple_tokenizer"].SimpleTokenizer()
    ids = torch.zeros(len(texts), 77, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        words = [49406, *tokenizer.encode(text), 49407]
        row[: len(words)] = torch.tensor(words)
    return ids


def original_local(model, x):
    """The value path, from the original's layers alone."""
    visual = model.visual
    seen = {}
    if hasattr(visual, "attnpool"):
        hook = visual.layer4.register_forward_hook(lambda _, __, out: seen.update(map=out))
        visual(x)
        hook.remove()
        patches = seen["map"].permute(0, 2, 3, 1).flatten(1, 2)
        return visual.attnpool.c_proj(visual.attnpool.v_proj(patches))
    last = visual.transformer.resblocks[-1]
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))
    visual(x)
    hook.remove()
    tokens, width = seen["tokens"].transpose(0, 1), last.attn.embed_dim
    values = F.linear(last.ln_1(tokens), last.attn.in_proj_weight[2 * width :], last.attn.in_proj_bias[2 * width :])
    tokens = tokens + last.attn.out_proj(values)
    tokens = tokens + last.mlp(last.ln_2(tokens))
    return visual.ln_post(tokens[:, 1:]) @ visual.proj


@torch.no_grad()
def assert_same(backbone, model, original):
    """Image, text, logits and local features, unit norm, to 1e-5."""
    torch.manual_seed(7)
    x = 2 * F.interpolate(torch.randn(3, 3, 3, 3), backbone.transform.crop) + torch.randn(
        3, 3, *backbone.transform.crop
    )
    ids = original_tokens(original, TEXTS)
    image, local = backbone.encode_dense(x)
    text = backbone.encode_text(TEXTS)
    assert (image @ image.T).fill_diagonal_(0).max() < 0.99, "the weights tell no images apart"
    assert (text @ text.T).fill_diagonal_(0).max() < 0.99, "the weights tell no texts apart"
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(image, F.normalize(model.encode_image(x), dim=-1), **close)
    torch.testing.assert_close(text, F.normalize(model.encode_text(ids), dim=-1), **close)
    torch.testing.assert_close(local, F.normalize(original_local(model, x), dim=-1), **close)
    logits = backbone.logit_scale * image @ text.T
    torch.testing.assert_close(logits / 60, model(x, ids)[0] / 60, **close)
    assert local.shape[1] == backbone.grid[0] * backbone.grid[1]


def scripted(model, numbers, path):
    """A TorchScript archive of the model, in the precision of its weights."""
    for key in ("input_resolution", "context_length", "vocab_size"):
        if key in model._buffers or hasattr(model, key):
            delattr(model, key)
        model.register_buffer(key, numbers[key])
    size = int(numbers["input_resolution"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, (torch.randn(2, 3, size, size), torch.ones(2, 77, dtype=torch.int64))).save(str(path))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["pt", "safetensors", "archive", "module", "nested"])
def test_published_files_give_the_numbers_of_openais_code(original, tmp_path, name, kind):
    state = published(original, name)
    model = reference(original, state)
    file = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "archive":
        scripted(reference(original, state), state, file)
    elif kind == "safetensors":
        save_file(state, file)
    elif kind == "module":
        torch.save({f"module.{key}": value for key, value in state.items()}, file)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind == "nested" else state, file)
    assert_same(create_backbone(f"open_clip:{name}/{file}"), model, original)


def test_weights_saved_without_the_three_numbers_are_known_by_their_precision(original, tmp_path, caplog):
    state = published(original, "ViT-B-16")
    bare = {key: value for key, value in state.items() if value.ndim or key == "logit_scale"}
    torch.save(bare, tmp_path / "w.pt")
    backbone = create_backbone(f"open_clip:ViT-B-16/{tmp_path}/w.pt")
    assert_same(backbone, reference(original, state), original)
    said = [record.getMessage() for record in caplog.records if "QuickGELU" in record.getMessage()]
    assert len(said) == 1
    assert "OpenAI's" in said[0]
    assert backbone.decisions[0][:2] == ("activation", "QuickGELU")


def test_full_precision_weights_need_the_option_and_that_is_said(original, tmp_path, caplog):
    state = published(original, "ViT-B-16")
    model = reference(original, state)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    backbone = create_backbone(f"open_clip:ViT-B-16/{tmp_path}/w.pt?quick_gelu=true")
    assert_same(backbone, model, original)
    caplog.clear()
    plain = create_backbone(f"open_clip:ViT-B-16/{tmp_path}/w.pt")
    assert plain.decisions[0].value == "GELU"
    assert "?quick_gelu=true" in caplog.text
    assert "'openai'" in caplog.text


def test_with_plain_gelu_the_comparison_fails(original, tmp_path):
    """The mutation that every CLIP table suffered from."""
    state = published(original, "ViT-B-16")
    torch.save(state, tmp_path / "w.pt")
    backbone = create_backbone(f"open_clip:ViT-B-16/{tmp_path}/w.pt?quick_gelu=false")
    with pytest.raises(AssertionError, match="not close"):
        assert_same(backbone, reference(original, state), original)
    right = create_backbone(f"open_clip:ViT-B-16/{tmp_path}/w.pt?quick_gelu=true")
    assert_same(right, reference(original, state), original)


def test_a_published_tag_gives_the_numbers_of_openais_code(original, tmp_path, monkeypatch):
    state = published(original, "ViT-B-16")
    numbers = ("input_resolution", "context_length", "vocab_size")
    save_file({key: value for key, value in state.items() if key not in numbers}, tmp_path / "w.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "w.safetensors"))
    for spec in ("open_clip:ViT-B-16/openai", "open_clip:ViT-B-16/OpenAI"):
        assert_same(create_backbone(spec), reference(original, state), original)


@pytest.mark.parametrize("quick_gelu", [True, None])
def test_a_folder_of_open_clip_is_built_as_its_configuration_says(original, tmp_path, quick_gelu):
    state = published(original, "ViT-L-14")
    config = open_clip.get_model_config("ViT-L-14") | ({} if quick_gelu is None else {"quick_gelu": quick_gelu})
    asked = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": asked}))
    save_file(state, tmp_path / "open_clip_model.safetensors")
    backbone = create_backbone(f"open_clip:local-dir:{tmp_path}")
    assert_same(backbone, reference(original, state), original)
    transform = backbone.transform
    assert (transform.mean, transform.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert (transform.resize, transform.interpolation) == (None, "bilinear")


# ---- the same weights through transformers

TO_HF = [
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"ln_([12])", r"layer_norm\1"),
    (r"attn\.out_proj", "self_attn.out_proj"),
    (r"c_fc", "fc1"),
    (r"c_proj", "fc2"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection", "text_projection.weight"),
]


def to_transformers(state, name):
    """A folder's model with the same weights."""
    size, layers, width, patch, embedding, text_width, text_layers = SHAPES[name]
    common = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": embedding}
    vision = common | {
        **{"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64},
        **{"intermediate_size": 4 * width, "image_size": size, "patch_size": patch},
    }
    text = common | {
        **{"hidden_size": text_width, "num_hidden_layers": text_layers, "num_attention_heads": text_width // 64},
        **{"intermediate_size": 4 * text_width, "eos_token_id": 49407, "bos_token_id": 49406},
    }
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=embedding)
    model = transformers.CLIPModel(config)
    renamed = {}
    for key, value in state.items():
        if key in ("input_resolution", "context_length", "vocab_size"):
            continue
        value = value.T if key in ("visual.proj", "text_projection") else value
        for pattern, replacement in TO_HF:
            key = re.sub(pattern, replacement, key)
        if "attn.in_proj_" in key:
            names = [key.replace("attn.in_proj_", f"self_attn.{one}_proj.") for one in "qkv"]
            renamed |= dict(zip(names, value.chunk(3), strict=True))
        else:
            renamed[key] = value
    model.load_state_dict(renamed)
    return model.float()


def clip_tokenizer():
    source = open_clip.tokenizer.SimpleTokenizer()
    merges = [pair for pair, _ in sorted(source.bpe_ranks.items(), key=lambda item: item[1])]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in source.encoder.items()}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-L-14"])
def test_the_same_weights_agree_through_transformers(original, tmp_path, name):
    state = published(original, name, seed=3)
    folder, size = tmp_path / "hf", SHAPES[name][0]
    to_transformers(state, name).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size)
    processor.save_pretrained(folder)
    torch.save(state, tmp_path / "w.pt")
    ours, theirs = create_backbone(f"open_clip:{name}/{tmp_path}/w.pt"), create_backbone(f"hf:{folder}")
    assert_same(theirs, reference(original, state), original)
    assert theirs.transform.crop == ours.transform.crop
    pixels = Image.effect_noise((90, 70), 60).convert("RGB")
    torch.testing.assert_close(ours.transform(pixels), theirs.transform(pixels), rtol=0, atol=1e-5)
    context = 0.1 * torch.randn(4, SHAPES[name][5])
    prompts = [backbone.encode_prompts(context, ["dog", "sea_lion"]) for backbone in (ours, theirs)]
    torch.testing.assert_close(*prompts, rtol=1e-5, atol=1e-5)


# ---- what does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("visual.proj"), r"lacks visual\.proj of this architecture"),
        (lambda state: state.update(head=torch.ones(2)), r"holds head that this architecture has not"),
        (lambda state: state.update(ln_final=torch.ones(2)), r"holds ln_final that"),
        (
            lambda state: state.update({"visual.positional_embedding": torch.ones(5, 128)}),
            r"other shapes for visual\.positional_embedding \[5, 128\] instead of \[17, 128\]",
        ),
        (lambda state: state["ln_final.bias"].fill_(torch.nan), r"NaN or infinite values in ln_final\.bias"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(original, tmp_path, change, message):
    state = published(original, "ViT-B-16")
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(DataError, match=message) as refusal:
        create_backbone(f"open_clip:ViT-B-16/{tmp_path}/w.pt")
    assert "network" not in str(refusal.value)


def test_zero_shot_detectors_and_iim_run_on_a_clip_resnet(original, tmp_path):
    torch.save(published(original, "RN50"), tmp_path / "w.pt")
    backbone = create_backbone(f"open_clip:RN50/{tmp_path}/w.pt")
    assert backbone.grid == (3, 3)
    assert "blocks" not in backbone.capabilities
    torch.manual_seed(0)
    for index in range(4):
        folder = tmp_path / "images" / ("dog", "cat")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((96, 96), 20 + 30 * index).convert("RGB").save(folder / f"{index}.png")
    for name, options in {
        "mcm": {},
        "gl_mcm": {},
        "r_mcm": {},
        "iim": {"negative_prompts": 2, "context_length": 2, "epochs": 1, "k": 2},
    }.items():
        features = extract(backbone, ImageFolder(tmp_path / "images"), {"image", "local"})
        detector = create_detector(name, backbone=backbone, class_names=["dog", "cat"], **options)
        scores = detector.fit(features).score_features(features)
        assert scores.isfinite().all()
        assert len(scores.unique()) > 1
