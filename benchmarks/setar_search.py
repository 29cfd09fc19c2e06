"""SeTAR's search: ours against re-evaluating the network for every candidate, time, memory and the ratios chosen.

    uv run python benchmarks/setar_search.py

The released way does for every candidate what the released code does: it loads the weights, decodes the images,
decomposes every weight that has a ratio again, encodes all prompts, runs the whole image tower with the value path in
all blocks, and measures ratio 0 at every layer. The plain way is spared the loading, the decoding and the value path
but in the last block. Two parts: a whole search on a random pair of towers of 12 + 12 blocks; and, at ViT-B/16 shapes,
all candidates of single blocks (ours against the plain way). Writes benchmarks/results/setar_search.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from harness import added_at_peak, publish
from ood_core import create_backbone
from ood_core.backbones.base import Backbone
from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.data import PILImages, scenes
from ood_core.evaluation import environment
from ood_setar.functional import accept, search_loss, truncate
from ood_setar.objective import Objective
from ood_setar.search import RATIOS, Trials, class_prompts, load_labelled, search, visiting_order
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from safetensors.torch import load_file, save_file

RESULT = Path(__file__).parent / "results" / "setar_search.json"
TEMPLATE = "a photo of a {}"
BLOCKS = ["visual.11.up", "visual.6.up", "visual.0.up", "text.11.up", "text.6.up", "text.0.up"]


def pair(width: int, text_width: int) -> Backbone:
    """Random towers of 12 + 12 blocks with the 197 tokens of ViT-B/16."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=12, width=width, head_width=64, patch_size=16, image_size=224)
    text = CLIPTextCfg(context_length=77, vocab_size=49408, width=text_width, heads=2, layers=12)
    model = open_clip.CLIP(text_width, vision, text)
    transform = ImageTransform(crop=(224, 224), resize=224)
    return OpenCLIPBackbone(model, open_clip.get_tokenizer("ViT-B-16"), transform, spec="12 + 12 blocks")


def images(count: int, classes: int) -> tuple[PILImages, list[str]]:
    """Generated images, `count` of them over `classes` names of ImageNet."""
    names = open_clip.IMAGENET_CLASSNAMES[:classes]
    made = scenes.render(scenes.ID_CLASSES, -(-count // 8), size=224).images[:count]
    labels = [names[i * classes // count] for i in range(count)]
    return PILImages([Image.fromarray(image) for image in made], labels), names


@torch.no_grad()
def plain_loss(backbone: Backbone, pixels: torch.Tensor, labels: torch.Tensor, prompts: list[str], k: int) -> float:
    """The loss from the whole network: nothing is remembered."""
    backbone.texts_seen.clear()
    text = backbone.encode_text(prompts)
    image, local = backbone.encode_dense(pixels)
    scale = backbone.logit_scale
    return search_loss(scale * image @ text.T, scale * local @ text.T, labels, k=k, weight=0.1).item()


@torch.no_grad()
def released_loss(backbone: Backbone, pixels: torch.Tensor, labels: torch.Tensor, prompts: list[str], k: int) -> float:
    """The same with the value path in all blocks, of which the last one is read."""
    backbone.texts_seen.clear()
    text = backbone.encode_text(prompts)
    x = backbone.embed(pixels)
    for layer in backbone.layers():
        x, below = layer(x), x
        local = layer.parts.value_path(below)
    image, local = (F.normalize(v, dim=-1) for v in (backbone.image_embedding(x), backbone.local_embedding(local)))
    scale = backbone.logit_scale
    return search_loss(scale * image @ text.T, scale * local @ text.T, labels, k=k, weight=0.1).item()


def uncached_search(
    backbone: Backbone, source: PILImages, class_names: list[str], k: int, names: list[str], *, released: bool
) -> dict[str, float]:
    """Every candidate anew: all weights with a ratio decomposed again, the whole network run again."""
    data = load_labelled(backbone, source, class_names)
    originals = {name: backbone.linear(name).weight.clone() for name in names}
    prompts, chosen, incumbent = class_prompts(TEMPLATE, class_names), dict[str, float](), float("inf")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model.safetensors"
        save_file({n: v.contiguous() for n, v in backbone.model.state_dict().items()}, checkpoint)
        for name in names:
            values = []
            for ratio in RATIOS:
                if released:
                    backbone.model.load_state_dict(load_file(checkpoint))
                    data = load_labelled(backbone, source, class_names)
                for other, kept in (chosen | {name: ratio}).items():
                    backbone.linear(other).weight.copy_(truncate(originals[other], kept))
                loss = released_loss if released else plain_loss
                values.append((ratio, loss(backbone, data.pixels, data.labels, prompts, k)))
            chosen[name], incumbent = accept(incumbent, values)
            backbone.linear(name).weight.copy_(truncate(originals[name], chosen[name]))
    return chosen


def timed(job: Any) -> tuple[Any, dict[str, float]]:
    started = time.perf_counter()
    found, mebibytes = added_at_peak(job)
    return found, {"seconds": time.perf_counter() - started, "mebibytes": mebibytes}


def whole_search(count: int, classes: int) -> dict[str, Any]:
    """Both searches on 12 + 12 blocks."""
    backbone = pair(192, 128)
    source, names = images(count, classes)
    order = visiting_order(backbone.linears())
    edit, ours = timed(lambda: search(backbone, source, class_names=names, batch_size=count, progress=False))
    k = round(0.3 * classes)
    chosen, plain = timed(lambda: uncached_search(backbone.copy(), source, names, k, order, released=False))
    again, released = timed(lambda: uncached_search(backbone.copy(), source, names, k, order, released=True))
    margins = [step["margin"] for step in edit.record["steps"] if step["margin"] is not None]
    return {
        "images": count,
        "classes": classes,
        "candidates": dict.fromkeys(("released", "plain"), len(order) * len(RATIOS))
        | {"ours": 1 + len(order) * (len(RATIOS) - 1)},
        "same ratios": chosen == again == edit.ratios,
        "weights pruned": sum(map(bool, edit.ratios.values())),
        "smallest margin": min(margins),
        "seconds": {"released": released["seconds"], "plain": plain["seconds"], "ours": ours["seconds"]},
        "mebibytes": ours["mebibytes"],
    }


def single_blocks(count: int, classes: int, repeats: int) -> dict[str, Any]:
    """Seconds for all candidates of a block at ViT-B/16 shapes, and the largest difference of their losses."""
    backbone = create_backbone("open_clip:ViT-B-16", dtype="float32")
    source, names = images(count, classes)
    data = load_labelled(backbone, source, names)
    objective = Objective(k=round(0.3 * classes))
    options = {"batch_size": count, "memory": 4 << 30}
    trials, prepared = timed(lambda: Trials(backbone, data, TEMPLATE, objective, "minor", 5, **options))
    found: dict[str, Any] = {"images": count, "classes": classes, "preparing": prepared, "blocks": {}}
    prompts, plain = class_prompts(TEMPLATE, names), backbone.copy()
    for name in BLOCKS:
        original = plain.linear(name).weight.clone()
        seconds, losses = [], {}
        for _ in range(repeats):
            trials.decomposed.clear()
            measured, cost = timed(lambda name=name: trials.measure(name, RATIOS[1:]))
            seconds.append(cost["seconds"])
        started = time.perf_counter()
        for ratio in RATIOS[1:]:
            plain.linear(name).weight.copy_(truncate(original, ratio))
            losses[ratio] = plain_loss(plain, data.pixels, data.labels, prompts, objective.k)
        usual = time.perf_counter() - started
        plain.linear(name).weight.copy_(original)
        off = max(abs(measured[ratio]["loss"] - loss) / abs(loss) for ratio, loss in losses.items())
        found["blocks"][name] = {"plain": usual, "ours": statistics.median(seconds), "largest difference": off}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--which", nargs="+", choices=["search", "blocks"], default=["search", "blocks"])
    args = parser.parse_args()
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if "search" in args.which:
        found["search"] = whole_search(args.images, args.classes)
        print(found["search"], flush=True)
    if "blocks" in args.which:
        found["ViT-B/16"] = single_blocks(args.images, args.classes, args.repeats)
        print(found["ViT-B/16"], flush=True)
    publish(RESULT, found | {"environment": environment()})


if __name__ == "__main__":
    main()
