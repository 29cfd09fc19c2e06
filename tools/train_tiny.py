"""Train the embedded backbone ("tiny") and write its weights and model card into the package.

    uv run python tools/train_tiny.py --packs ../shared/data --work ~/.cache/ood-tiny
    uv run python tools/train_tiny.py --packs ../shared/data --work ~/.cache/ood-tiny-2 --continue --muon-lr 0.01

Resumes from its last checkpoint in --work; the data order and every random draw depend on (seed, step) only, so a
resumed run continues exactly as an uninterrupted one on the same machine. One line of figures a minute goes to
standard output and to WORK/log.csv. `--continue` starts from the package's weights instead of random ones, with a new
schedule. Matrix products are in bfloat16 where the processor has them, in float32 elsewhere.

Recipe. Image tower: cross-entropy of the cosine to a learned class matrix (200 photograph classes and the
8 x 8 generated "material shape" classes), for the image embedding and, so that local features mean something, for
every patch of the value path; where the object is known (the generated images have masks), a patch beside it is to
look like every class alike. Text tower: learns the same matrix from the class names in several templates.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import io
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import timm.optim.muon
import torch
import torch.nn.functional as F
from ood_core import create_backbone
from ood_core.backbones import resolve_dtype
from ood_core.data import scenes
from ood_core.files import write_atomically, write_json
from ood_core.tiny import ByteTokenizer, ResidualStem, TinyConfig, build_model, load_model
from ood_core.tiny.model import MEAN, STD
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "shared/src/ood_core/tiny"
TEMPLATES = ["a photo of a {}", "a photo of a {}.", "{}", "{}.", "a {}", "a picture of a {}", "an image of a {}"]
SCENE_NAMES = [
    name
    for name in (f"{material} {shape}" for material in scenes.MATERIALS for shape in scenes.SHAPES)
    if name not in scenes.NEAR_OOD_CLASSES  # unknown to the demo, so unknown to its backbone
]


@dataclass(frozen=True)
class Recipe:
    """Every number of the training, as stored in the checkpoint and the model card."""

    samples: int = 600_000
    batch: int = 128
    small: int = 40
    small_share: float = 0.7
    muon_lr: float = 0.02
    adamw_lr: float = 1.5e-3
    weight_decay: float = 0.1  # of Muon; at 0.01 weights grow until the attention is one-hot and learning stalls
    logit_scale: float = 20.0  # initial
    warmup: int = 200  # steps
    steady: float = 0.15  # share of the run until the rate falls, linearly to zero
    crop_area: float = 0.5
    jitter: float = 0.15
    label_smoothing: float = 0.05
    average: float = 0.999  # decay per step of the running average of the weights, which is what is exported
    mosaic_share: float = 0.5  # of the photographs, four of which make one image
    mosaic_weight: float = 0.2  # of the patches of mosaics
    best_share: float = 0.2  # of a single photograph's patches: those that have to show its class
    best_weight: float = 0.225
    scene_share: float = 0.12
    paste_share: float = 0.5  # of the scenes: with another scene and its object behind the object
    scene_weight: float = 0.075  # of the patches of scenes
    scenes_per_class: int = 150
    texts: int = 64
    text_every: int = 4  # steps: the text tower only follows the class matrix
    seed: int = 0
    start: str = ""  # SHA-256 of the finished weights this run continues from; empty: random weights

    @property
    def steps(self) -> int:
        return self.samples // self.batch


# ---- data


def load_pack(path: Path, split: str, wnids: list[str] | None) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """uint8 [N, 64, 64, 3], labels in sorted wnid order, wnids and names."""
    table = pq.read_table(path, columns=["image", "label", "split", "name"])
    table = table.filter([s == split for s in table["split"].to_pylist()])
    labels = table["label"].to_pylist()
    names = dict(zip(labels, table["name"].to_pylist(), strict=True))
    wnids = wnids or sorted(names)
    index = {wnid: i for i, wnid in enumerate(wnids)}
    images = np.empty((len(labels), 64, 64, 3), np.uint8)
    for row, blob in enumerate(table["image"]):
        images[row] = np.asarray(Image.open(io.BytesIO(blob.as_py())).convert("RGB"))
    return images, np.array([index[x] for x in labels]), wnids, [names.get(w, w) for w in wnids]


def load_training_data(packs: Path, work: Path, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Photographs then scenes, uint8 [N, 3, 64, 64], labels, object masks of the scenes, class names; cached."""
    cache = work / "train.npz"
    if not cache.exists():
        first, y1, wnids, names = load_pack(packs / "tiny-imagenet.parquet", "train", None)
        second, y2, _, _ = load_pack(packs / "tiny-imagenet-more.parquet", "train", wnids)
        made = scenes.render(SCENE_NAMES, recipe.scenes_per_class, size=64, seed=1000)
        images = np.concatenate([first, second, made.images])
        labels = np.concatenate([y1, y2, made.labels + len(wnids)])
        np.savez(work / "train.tmp.npz", images=images, labels=labels, masks=made.masks, names=names + SCENE_NAMES)
        (work / "train.tmp.npz").rename(cache)
    data = np.load(cache)
    images = torch.from_numpy(data["images"]).permute(0, 3, 1, 2)
    return images, torch.from_numpy(data["labels"]), torch.from_numpy(data["masks"]), data["names"].tolist()


def sample_batch(step: int, labels: Tensor, photos: int, recipe: Recipe) -> Tensor:
    """Row numbers of a batch: photographs by epoch permutation, scenes at random."""
    scene_count = round(recipe.batch * recipe.scene_share)
    photo_count = recipe.batch - scene_count
    start = step * photo_count
    position = torch.arange(start, start + photo_count)
    rows = []
    for epoch in position.div(photos, rounding_mode="floor").unique().tolist():
        generator = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
        order = torch.randperm(photos, generator=generator)
        rows.append(order[position[position // photos == epoch] % photos])
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    rows.append(photos + torch.randint(len(labels) - photos, (scene_count,), generator=generator))
    return torch.cat(rows)


def augment(images: Tensor, masks: Tensor, size: int, step: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Random crop (area, aspect 3/4 to 4/3), flip, brightness and contrast.

    Returns normalised images [B, 3, size, size] and, cut alike, the object masks of the last M of them.
    """
    count, device = len(images), images.device
    rng = torch.Generator().manual_seed(recipe.seed * 7_000_003 + step)
    draw = torch.rand(6, count, generator=rng)
    area = recipe.crop_area + (1 - recipe.crop_area) * draw[0]
    aspect = (math.log(4 / 3) * (2 * draw[1] - 1)).exp().sqrt()
    sx, sy = (area.sqrt() * aspect).clamp(max=1), (area.sqrt() / aspect).clamp(max=1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = sx * torch.where(draw[4] < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = sy
    theta[:, 0, 2], theta[:, 1, 2] = (1 - sx) * (2 * draw[2] - 1), (1 - sy) * (2 * draw[3] - 1)
    grid = F.affine_grid(theta.to(device), [count, 3, size, size], align_corners=False)
    sample = functools.partial(F.grid_sample, mode="bilinear", padding_mode="reflection", align_corners=False)
    out = sample(images.float() / 255, grid)
    objects = sample(masks[:, None].to(out), grid[count - len(masks) :])[:, 0]
    gain = 1 + recipe.jitter * (2 * torch.rand(2, count, 1, 1, 1, generator=rng) - 1).to(device)
    out = (out * gain[0] - 0.5) * gain[1] + 0.5
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((out - mean) / std).contiguous(memory_format=torch.channels_last), objects


# ---- model: the towers with plain-matmul attention, 1.8x faster to train on CPU than the fused one


def attention(block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    attn = block.attn
    count, tokens, width = x.shape
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).view(count, tokens, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5)
    scores = scores if mask is None else scores + mask
    return attn.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(count, tokens, width))


def run_block(block: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    x = x + attention(block, block.ln_1(x), mask)
    return x + block.mlp(block.ln_2(x))


def value_block(block: nn.Module, x: Tensor) -> Tensor:
    width = x.shape[-1]
    attn = block.attn
    value = F.linear(block.ln_1(x), attn.in_proj_weight[2 * width :], attn.in_proj_bias[2 * width :])
    x = x + attn.out_proj(value)
    return x + block.mlp(block.ln_2(x))


def image_features(visual: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit image [B, d] and value-path patch features [B, P, d], at any input size."""
    x = visual.conv1(x)
    grid = x.shape[-2:]
    position = visual.positional_embedding
    if grid != visual.grid_size:
        table = position[1:].T.reshape(1, -1, *visual.grid_size)
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        position = torch.cat([position[:1], table.flatten(2)[0].T])
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = visual.ln_pre(x + position)
    *lower, last = visual.transformer.resblocks
    for block in lower:
        x = run_block(block, x)
    image = visual.ln_post(run_block(last, x)[:, 0]) @ visual.proj
    local = visual.ln_post(value_block(last, x[:, 1:])) @ visual.proj
    return F.normalize(image.float(), dim=-1), F.normalize(local.float(), dim=-1)


def text_features(model: nn.Module, tokens: Tensor) -> Tensor:
    length = int(tokens.argmax(-1).max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    mask = torch.full((length, length), float("-inf"), device=x.device).triu(1)
    for block in model.transformer.resblocks:
        x = run_block(block, x, mask)
    x = model.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ model.text_projection
    return F.normalize(x.float(), dim=-1)


class Trainee(nn.Module):
    """The CLIP in training form plus the learned class matrix."""

    def __init__(self, config: TinyConfig, classes: int, logit_scale: float) -> None:
        super().__init__()
        self.clip = build_model(config, norm=True)
        nn.init.constant_(self.clip.logit_scale, math.log(logit_scale))
        visual = self.clip.visual
        for block in (*visual.transformer.resblocks, *self.clip.transformer.resblocks):
            nn.init.zeros_(block.mlp.c_proj.weight)
        self.classes = nn.Parameter(torch.randn(classes, config.embed_dim) * 0.02)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def continue_from(self, weights: Path, images: Tensor, texts: Tensor) -> None:
        """Take up finished weights: the same function of the images [N, 3, H, W] as the one that was exported.

        Export folded the stem's batch norms, so new ones start at the statistics of `images`, with the scale and
        shift that undo them. The class matrix was not exported: it starts at the class texts [T, C, L] it had taught.
        """
        state = {name: value.float() for name, value in load_file(weights).items()}
        stem = ResidualStem(self.clip.visual.conv1.channels)
        stem.load_state_dict({k.removeprefix("visual.conv1."): state.pop(k) for k in list(state) if "conv1." in k})
        missing, unexpected = self.clip.load_state_dict(state, strict=False)
        if unexpected or any("conv1" not in name for name in missing):
            raise SystemExit(f"{weights} holds other layers: {[*missing, *unexpected][:4]}.")
        self.clip.visual.conv1.unfold(stem, images)
        names = torch.stack([text_features(self.clip, tokens) for tokens in texts]).mean(0)
        self.classes.copy_(F.normalize(names, dim=-1))


def build_optimizer(model: Trainee, recipe: Recipe, precision: torch.dtype) -> timm.optim.muon.Muon:
    """Muon on matrices and convolutions of the towers, AdamW on the rest."""
    rest_names = ("embedding", "classes", "proj", "text_projection", "logit_scale")
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        single = parameter.ndim < 2 or name.endswith(rest_names) or "embedding" in name
        (rest if single else matrices).append(parameter)
    # Its orthogonalisation computes in bfloat16, which is 50 times slower where the processor emulates it.
    orthogonalise = timm.optim.muon.zeropower_via_newtonschulz
    timm.optim.muon.zeropower_via_newtonschulz = functools.partial(orthogonalise, dtype=precision)
    return timm.optim.muon.Muon(
        [
            {"params": matrices, "lr": recipe.muon_lr, "use_fallback": False},
            {"params": rest, "lr": recipe.adamw_lr, "use_fallback": True, "weight_decay": 0.0},
        ],
        lr=recipe.muon_lr,
        momentum=0.95,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="original",
    )


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    return min(1.0, (step + 1) / recipe.warmup, (1 - step / recipe.steps) / (1 - recipe.steady))


def mosaics(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images [4 M, 3, H, W] at half size, joined two by two: images, labels [M, 4], masks of the tiles [M, 4, H, W]."""
    count, size = len(x) // 4, x.shape[-1]
    tiles = F.avg_pool2d(x, 2).view(count, 2, 2, 3, size // 2, size // 2)
    joined = tiles.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, size, size)
    masks = torch.eye(4, device=x.device).view(1, 4, 2, 2).expand(count, 4, 2, 2)
    return joined, labels.view(count, 4), F.interpolate(masks, scale_factor=size // 2)


def paste(x: Tensor, labels: Tensor, objects: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes [M, 3, H, W], the first of them with their neighbour in place of the background.

    Returns the images, the labels [M, 2] of the object in front and the one behind, and what is visible of them,
    [M, 2, H, W].
    """
    pasted = (torch.arange(len(x), device=x.device) < share * len(x)).view(-1, 1, 1).to(x)
    behind = pasted * (1 - objects)
    x = x + behind[:, None] * (x.roll(1, 0) - x)
    return x, torch.stack([labels, labels.roll(1)], 1), torch.stack([objects, behind * objects.roll(1, 0)], 1)


def class_shares(labels: Tensor, masks: Tensor, side: int, classes: int) -> tuple[Tensor, Tensor]:
    """Class shares of images [B, C] and of their patches [B, side ** 2, C], from K labelled masks [B, K, H, W] each.

    A patch is of each class as far as that mask covers it and for the rest of every class alike; an image is of the
    classes by their visible areas.
    """
    covered = F.adaptive_avg_pool2d(masks, side).flatten(2)
    one_hot = F.one_hot(labels, classes).to(covered)
    named = covered.transpose(1, 2) @ one_hot
    area = named.sum(1)
    return area / area.sum(1, keepdim=True).clamp(min=1e-6), named + (1 - covered.sum(1))[..., None] / classes


def best_patches_loss(logits: Tensor, labels: Tensor, share: float) -> Tensor:
    """Multiple-instance loss: cross-entropy of those patches [B, P, C] of an image that show its class best."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(logits.shape[:2]), reduction="none")
    return losses.topk(math.ceil(share * logits.shape[1]), largest=False).values.mean()


def image_losses(model: Trainee, x: Tensor, objects: Tensor, labels: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """Cross-entropies of the image embedding and of the patches, of photographs and scenes of known `objects`."""
    photos, classes = len(x) - len(objects), len(model.classes)
    tiled = round(recipe.mosaic_share * photos) // 4 * 4
    single = photos - tiled
    joined = mosaics(x[:tiled], labels[:tiled])
    pasted = paste(x[photos:], labels[photos:], objects, recipe.paste_share)
    image, local = image_features(model.clip.visual, torch.cat([x[tiled:photos], joined[0], pasted[0]]))

    scale, matrix = model.clip.logit_scale.exp().clamp(max=100), F.normalize(model.classes, dim=-1)
    logits = scale * local @ matrix.T
    cross_entropy = functools.partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)
    targets = [F.one_hot(labels[tiled:photos], classes).to(logits)]
    patch_loss = recipe.best_weight * best_patches_loss(logits[:single], labels[tiled:photos], recipe.best_share)
    parts = logits[single:].split([tiled // 4, len(objects)])
    for part, known, weight in zip(parts, (joined, pasted), (recipe.mosaic_weight, recipe.scene_weight), strict=True):
        of_images, of_patches = class_shares(*known[1:], math.isqrt(logits.shape[1]), classes)
        targets.append(of_images)
        if len(part):
            patch_loss = patch_loss + weight * cross_entropy(part.flatten(0, 1), of_patches.flatten(0, 1))
    return {"image_loss": cross_entropy(scale * image @ matrix.T, torch.cat(targets)), "patch_loss": patch_loss}


def text_loss(model: Trainee, tokens: Tensor, labels: Tensor) -> Tensor:
    """How far the texts are from the class matrix, which they follow and do not move."""
    text = text_features(model.clip, tokens)
    target = F.normalize(model.classes, dim=-1).detach()
    return F.cross_entropy(20 * text @ target.T, labels) + (1 - (text * target[labels]).sum(-1)).mean()


# ---- evaluation and export


@torch.no_grad()
def accuracy(model: Trainee, text: Tensor, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 shares against text features [C, d]: image embedding, single patch, mean of patches."""
    hits, device = torch.zeros(3), text.device
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    for start in range(0, len(images), 250):
        x = (images[start : start + 250].to(device).float() / 255 - mean) / std
        y = labels[start : start + 250].to(device)
        image, local = image_features(model.clip.visual, x)
        hits[0] += (image @ text.T).argmax(-1).eq(y).sum().item()
        hits[1] += (local @ text.T).argmax(-1).eq(y[:, None]).float().mean(1).sum().item()
        hits[2] += (local.mean(1) @ text.T).argmax(-1).eq(y).sum().item()
    return dict(zip(("image", "single_patch", "mean_of_patches"), (hits / len(images)).tolist(), strict=True))


@torch.no_grad()
def class_text(model: Trainee, names: list[str]) -> Tensor:
    tokens = ByteTokenizer()([TEMPLATES[0].format(name) for name in names])
    return text_features(model.clip, tokens.to(model.classes.device))


def export(model: Trainee, config: TinyConfig, folder: Path, history: dict) -> None:
    """fp16 safetensors and config.json, the stem's batch norms folded."""
    model.eval()
    clip = build_model(config)
    state = {k: v for k, v in model.clip.state_dict().items() if not k.startswith("visual.conv1")}
    stem = model.clip.visual.conv1.to("cpu").folded()
    state |= {f"visual.conv1.{k}": v for k, v in stem.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].clamp(max=math.log(100))
    clip.load_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half().contiguous() for k, v in clip.state_dict().items()}
    write_atomically(folder / "model.safetensors", lambda path: save_file(tensors, path))
    write_json(folder / "config.json", {"model": asdict(config), "mean": MEAN, "std": STD, "training": history})


def zero_shot_auroc(folder: Path, packs: Path, cache: Path) -> dict[str, dict[str, float]]:
    """AUROC of the zero-shot scores on `tiny-imagenet-100`, near and mean of the far sets, of the written weights."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import tiny_imagenet_100 as protocol

    backbone = create_backbone("tiny", dtype="float32")
    backbone.model.load_state_dict(load_model(folder).state_dict())
    results = protocol.run(backbone, packs, protocol.ZERO_SHOT, bootstrap=0, cache=str(cache))
    return {
        name: {"near": figures["per_set"]["near"]["auroc"], "far": figures["far_mean"]["auroc"]}
        for name, figures in results["detectors"].items()
    }


def model_card(history: dict, top1: dict[str, dict[str, float]], auroc: dict[str, dict[str, float]]) -> str:
    """The card as Markdown, every figure from the script."""

    def rows(figures: dict[str, dict[str, float]]) -> str:
        return "".join(
            f"| {name} |" + "".join(f" {100 * value:.1f} |" for value in values.values()) + "\n"
            for name, values in figures.items()
        )

    runs = "".join(
        f"  {number}. {run['samples']:,} images ({run['small']} pixels for {100 * run['small_share']:.0f} %, then 64), "
        f"Muon {run['muon_lr']:g} and AdamW {run['adamw_lr']:g}, {run['schedule']}, seed {run['seed']}, "
        f"{run['hours']:.2f} hours on {run['hardware']} in {run['dtype']}, torch {run['torch']}, {run['date']}\n"
        for number, run in enumerate(history["runs"], 1)
    )
    return f"""# Model card: tiny

A small CLIP for 64 x 64 pixel images that `ood-core` ships so that everything runs without a network. It knows 200
kinds of photographs a little and {len(SCENE_NAMES)} kinds of generated objects well: enough to try, test and compare
methods, not enough for any real decision.

- Architecture: `open_clip.CLIP`; image tower: residual convolutional stem, then 4 transformer blocks of width 192 over
  an 8 x 8 grid with class token; text tower: 4 causal blocks of width 192 over UTF-8 bytes, context 77; embedding
  width 192.
- Data: {history["runs"][-1]["photographs"]:,} photographs of 200 classes (Tiny-ImageNet, training split; class names in
  {len(TEMPLATES)} templates) and
  {Recipe.scenes_per_class * len(SCENE_NAMES):,} scenes of `ood_core.data.scenes` ("MATERIAL SHAPE"). No medical,
  texture, natural-scene, flower, digit, cartoon or sketch images. The terms of the photographs (ImageNet) allow
  non-commercial research and education.
- Training (`tools/train_tiny.py` does it again), each run continuing from the weights of the one before:
{runs}
Zero-shot top-1 in percent, with the text tower and the template "a photo of a {{}}" (patches: value path of the last
block):

| images | image embedding | single patch | mean of patches |
|---|---|---|---|
{rows(top1)}
The photographs are the 10,000 of the split `val` (200 classes); none was trained on. They were looked at
{history["val_looks"]} times in all, once after each finished run, the discarded ones included. The scenes are 50 new
ones of each of the demo's 8 known classes, told apart among those 8.

AUROC in percent of the zero-shot scores on the protocol `tiny-imagenet-100` (`docs/benchmarks.md` has every detector
and the intervals). The near-OOD classes are among the 200 that were trained on; the far sets are unlike them.

| score | near OOD | far OOD, mean of 8 sets |
|---|---|---|
{rows(auroc)}"""


# ---- the loop


class Training:
    """One run: what a checkpoint holds, and the steps from there to the end."""

    def __init__(self, packs: Path, work: Path, device: str, recipe: Recipe, start: Path | None = None) -> None:
        self.packs, self.work, self.device, self.recipe = packs, work, device, recipe
        self.precision = resolve_dtype("auto", torch.device(device))
        work.mkdir(parents=True, exist_ok=True)
        self.images, self.labels, self.masks, self.names = load_training_data(packs, work, recipe)
        self.photo_classes = len(self.names) - len(SCENE_NAMES)
        self.photos = int((self.labels < self.photo_classes).sum())
        torch.manual_seed(recipe.seed)
        self.model = Trainee(TinyConfig(), len(self.names), recipe.logit_scale).to(device)
        self.optimizer = build_optimizer(self.model, recipe, self.precision)
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.average), use_buffers=True)
        tokenizer = ByteTokenizer()
        self.texts = torch.stack([tokenizer([t.format(name) for name in self.names]) for t in TEMPLATES])
        self.step, self.seconds = 0, 0.0
        self.checkpoint, self.csv = work / "checkpoint.pt", work / "log.csv"
        if self.checkpoint.exists():
            self.load()
        elif start is not None:
            rows = sample_batch(0, self.labels, self.photos, replace(recipe, batch=512))
            images, _ = augment(self.images[rows].to(device), self.masks[:0], 64, 0, recipe)
            self.model.continue_from(start, images, self.texts.to(device))

    def load(self) -> None:
        saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if saved["recipe"] != asdict(self.recipe):
            raise SystemExit(f"{self.checkpoint} is of another recipe: remove it or give another --work.")
        self.model.load_state_dict(saved["model"])
        self.averaged.load_state_dict(saved["averaged"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        if self.csv.exists():  # steps behind the checkpoint are run again
            head, *lines = self.csv.read_text().splitlines(keepends=True)
            kept = [line for line in lines if int(line.split(",")[0]) <= self.step]
            write_atomically(self.csv, lambda path: path.write_text("".join([head, *kept])))
        print(f"resumed at step {self.step} of {self.recipe.steps}", flush=True)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "recipe": asdict(self.recipe),
        }
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))

    def train_step(self) -> dict[str, Tensor]:
        """One update; the detached losses."""
        recipe, device = self.recipe, self.device
        rows = sample_batch(self.step, self.labels, self.photos, recipe)
        size = recipe.small if self.step < recipe.small_share * recipe.steps else 64
        masks = self.masks[rows[rows >= self.photos] - self.photos]  # a batch ends with its scenes
        x, objects = augment(self.images[rows].to(device), masks.to(device), size, self.step, recipe)
        for group, lr in zip(self.optimizer.param_groups, (recipe.muon_lr, recipe.adamw_lr), strict=True):
            group["lr"] = lr * learning_rate_factor(self.step, recipe)
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            parts = image_losses(self.model, x, objects, self.labels[rows].to(device), recipe)
            if self.step % recipe.text_every == 0:
                rng = torch.Generator().manual_seed(recipe.seed * 9_000_003 + self.step)
                chosen = torch.randint(len(self.names), (recipe.texts,), generator=rng)
                tokens = self.texts[torch.randint(len(TEMPLATES), (recipe.texts,), generator=rng), chosen]
                parts["text_loss"] = text_loss(self.model, tokens.to(device), chosen.to(device))
        self.optimizer.zero_grad(set_to_none=True)
        sum(parts.values()).backward()
        self.optimizer.step()
        self.averaged.update_parameters(self.model)
        self.step += 1
        return {name: part.detach() for name, part in parts.items()}

    def run(self, stop_at: int | None, save_every: float) -> None:
        """Train to the end or to `stop_at`, with a line of figures a minute."""
        logged = saved = last = time.monotonic()
        window: list[dict[str, Tensor]] = []
        while self.step < min(self.recipe.steps, stop_at or self.recipe.steps):
            window.append(self.train_step())
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if now - logged > 60:
                self.log(window, len(window) * self.recipe.batch / (now - logged))
                logged, window = now, []
            if now - saved > save_every:
                self.save()
                saved = time.monotonic()
        self.save()

    def log(self, window: list[dict[str, Tensor]], speed: float) -> None:
        line = {"step": self.step, "samples": self.step * self.recipe.batch, "seconds": round(self.seconds, 1)}
        for name in ("image_loss", "patch_loss", "text_loss"):
            values = [parts[name].item() for parts in window if name in parts]
            line[name] = round(sum(values) / len(values), 4) if values else math.nan
        line["images_per_second"] = round(speed, 1)
        fresh = not self.csv.exists()
        with self.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, line)
            if fresh:
                writer.writeheader()
            writer.writerow(line)
        print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)

    def finish(self, out: Path) -> None:
        """Look at the held-out photographs once; write weights, history and model card."""
        model = self.averaged.module.eval()
        photo_names = self.names[: self.photo_classes]
        images, labels, _, found = load_pack(self.packs / "tiny-imagenet.parquet", "val", None)
        if found != photo_names:
            raise SystemExit("The val split's class names differ from the training split's.")
        made = scenes.render(scenes.ID_CLASSES, 50, size=64, seed=5)
        top1 = {
            name: accuracy(model, class_text(model, names), torch.from_numpy(x).permute(0, 3, 1, 2), y)
            for name, names, x, y in (
                ("photographs", photo_names, images, torch.from_numpy(labels)),
                ("scenes", scenes.ID_CLASSES, made.images, torch.from_numpy(made.labels)),
            )
        }
        print(json.dumps(top1, indent=2), flush=True)
        history = self.history(top1["photographs"])
        export(model.to("cpu"), TinyConfig(), out, history)
        auroc = zero_shot_auroc(out, self.packs, self.work / "features")
        print(json.dumps(auroc, indent=2), flush=True)
        card = model_card(history, top1, auroc)
        write_atomically(out / "MODEL_CARD.md", lambda path: path.write_text(card, encoding="utf-8"))

    def history(self, top1: dict[str, float]) -> dict:
        """The finished runs that these weights come from, this one last, and how often `val` was looked at so far."""
        before = json.loads((PACKAGE / "config.json").read_text()).get("training", {"val_looks": 0, "runs": []})
        run = asdict(self.recipe) | {
            "schedule": f"constant for {100 * self.recipe.steady:.0f} %, then linearly to 0",
            "hours": round(self.seconds / 3600, 2),
            "hardware": torch.cuda.get_device_name()
            if self.device == "cuda"
            else f"{torch.get_num_threads()} CPU cores",
            "dtype": str(self.precision).removeprefix("torch."),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "photographs": self.photos,
            "top1": top1,
        }
        earlier = before["runs"] if self.recipe.start else []
        return {"val_looks": before["val_looks"] + 1, "runs": [*earlier, run]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packs", required=True, help="folder with tiny-imagenet.parquet and tiny-imagenet-more.parquet"
    )
    parser.add_argument("--work", required=True, help="folder for the decoded data, checkpoint and log")
    parser.add_argument("--out", default=str(PACKAGE), help="where the weights go (default: into the package)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    numbers = [field for field in fields(Recipe) if field.name != "start"]
    for field in numbers:
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help="default: %(default)s")
    parser.add_argument(
        "--continue", dest="start", action="store_true", help="from the package's weights; give another --seed"
    )
    parser.add_argument("--save-every", type=float, default=240, help="seconds between checkpoints")
    parser.add_argument("--stop-at", type=int, help="stop after this step (to try the resuming)")
    args = parser.parse_args()
    start = PACKAGE / "model.safetensors" if args.start else None
    digest = hashlib.sha256(start.read_bytes()).hexdigest() if start else ""
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in numbers}, start=digest)
    training = Training(Path(args.packs), Path(args.work).expanduser(), args.device, recipe, start)
    training.run(args.stop_at, args.save_every)
    if training.step == training.recipe.steps:
        training.finish(Path(args.out))


if __name__ == "__main__":
    main()
