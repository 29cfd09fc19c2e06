"""Losses: what an image, its patches and a text are to show."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny.data import mosaics, paste
from tiny.model import Trainee, image_features, text_features
from tiny.recipe import Recipe


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


@torch.no_grad()
def taught_shares(teacher: Trainee, x: Tensor) -> Tensor:
    """Class shares [B, C] of images by a finished model."""
    image, _ = image_features(teacher.clip.visual, x)
    return (teacher.clip.logit_scale.exp() * image @ F.normalize(teacher.classes, dim=-1).T).softmax(-1)


def image_losses(
    model: Trainee, x: Tensor, objects: Tensor, labels: Tensor, recipe: Recipe, teacher: Trainee | None = None
) -> dict[str, Tensor]:
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
    image_logits = scale * image @ matrix.T
    losses = {"image_loss": cross_entropy(image_logits, torch.cat(targets)), "patch_loss": patch_loss}
    if teacher is not None:
        taught = taught_shares(teacher, x[tiled:photos])
        losses["distill_loss"] = recipe.distill_weight * F.cross_entropy(image_logits[:single], taught)
    return losses


def text_loss(model: Trainee, tokens: Tensor, labels: Tensor) -> Tensor:
    """How far the texts are from the class matrix, which they follow and do not move."""
    text = text_features(model.clip, tokens)
    target = F.normalize(model.classes, dim=-1).detach()
    return F.cross_entropy(20 * text @ target.T, labels) + (1 - (text * target[labels]).sum(-1)).mean()
