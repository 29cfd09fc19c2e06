"""The embedded backbone: what is shipped loads, has learned something, and takes the ordinary code paths."""

from importlib import resources

import open_clip
import pytest
import torch
import torch.nn.functional as F
from ood_core import create_backbone, extract
from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.data import scenes
from ood_core.prompts import text_features
from ood_core.tiny import ByteTokenizer, ResidualStem
from PIL import Image


@pytest.fixture(scope="module")
def tiny():
    return create_backbone("tiny", dtype="float32")


def test_it_is_an_ordinary_open_clip_model(tiny):
    assert type(tiny) is OpenCLIPBackbone
    assert type(tiny.model) is open_clip.CLIP
    assert (tiny.grid, tiny.width, tiny.context_length) == ((8, 8), 192, 77)
    assert tiny.capabilities == {"image", "local", "text", "prompts", "blocks"}
    assert len(tiny.model.visual.transformer.resblocks) >= 4
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(tiny.encode_image(pixels), tiny.model.encode_image(pixels, normalize=True))


def test_what_is_shipped_is_small_and_complete():
    folder = resources.files("ood_core.tiny")
    names = {item.name for item in folder.iterdir()}
    assert {"model.safetensors", "config.json", "MODEL_CARD.md"} <= names
    assert sum(len(item.read_bytes()) for item in folder.iterdir() if item.is_file()) < 12_000_000


def test_generated_classes_are_told_apart_where_the_object_is(tiny):
    made = scenes.render(scenes.ID_CLASSES, 25, seed=77)
    features = extract(tiny, [Image.fromarray(image) for image in made.images])
    text = text_features(tiny, scenes.ID_CLASSES, "a photo of a {}")
    labels = torch.from_numpy(made.labels)
    assert (features.image @ text.T).argmax(-1).eq(labels).float().mean() >= 0.9
    covered = F.adaptive_avg_pool2d(torch.from_numpy(made.masks)[:, None].float(), tiny.grid).flatten(1)
    probabilities = (tiny.logit_scale * features.local @ text.T).softmax(-1)
    right = probabilities.argmax(-1).eq(labels[:, None])
    assert right[covered >= 0.5].float().mean() >= 0.9
    of_label = probabilities.gather(2, labels[:, None, None].expand(-1, 64, 1))[..., 0]
    assert of_label[covered >= 0.5].mean() > 0.8
    assert of_label[covered == 0].mean() < 0.4


def test_bfloat16_moves_the_embedding_little(tiny):
    half = create_backbone("tiny", dtype="bfloat16")
    pixels = torch.stack([tiny.transform(image) for image in _pictures(8)])
    assert half.encode_image(pixels).dtype == torch.float32
    cosine = (half.encode_image(pixels) * tiny.encode_image(pixels)).sum(-1)
    assert cosine.min() > 0.99
    assert half.fingerprint == tiny.fingerprint


def _pictures(count):
    return [Image.fromarray(image) for image in scenes.render(["brick circle"], count).images]


def test_sixteen_learned_tokens_and_a_long_name_fit(tiny):
    context = torch.randn(2, 16, 192, requires_grad=True)
    names = ["a", "x" * 55]
    out = tiny.encode_prompts(context, names)
    out.sum().backward()
    assert context.grad.abs().sum((1, 2)).min() > 0
    with pytest.raises(ValueError, match="takes 77"):
        tiny.encode_prompts(context, ["a", "x" * 59])


def test_tokenizer_marks_cuts_and_pads():
    tokens = ByteTokenizer()(["A\u00e9", "b" * 100])
    assert tokens.shape == (2, 77)
    assert tokens[0, :5].tolist() == [257, ord("a") + 1, 0xC3 + 1, 0xA9 + 1, 258]
    assert (tokens[0, 5:] == 0).all()
    assert tokens[1, -1] == tokens[1].max() == 258


def test_folded_stem_computes_what_the_trained_one_does():
    torch.manual_seed(0)
    stem = ResidualStem((4, 6, 8), norm=True)
    for _ in range(3):
        stem(torch.randn(8, 3, 32, 32))  # moves the running statistics
    stem.eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(stem.folded()(pixels), stem(pixels), rtol=1e-4, atol=1e-5)
