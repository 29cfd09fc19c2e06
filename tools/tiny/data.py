"""Packs, batches and augmentation; mosaics and pasted objects, which know what every patch shows."""

from __future__ import annotations

import functools
import io
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from ood_core.data import scenes
from ood_core.tiny.model import MEAN, STD
from PIL import Image
from torch import Tensor

from tiny.recipe import SCENE_NAMES, Recipe


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
