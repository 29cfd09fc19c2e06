"""How MoFE is trained: the losses of a batch, what is drawn for it, and what must be known before it starts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ood_core import check
from ood_core.backbones.base import Backbone
from ood_core.data import load_batches
from ood_core.data.augment import LiveViews
from ood_core.data.sources import ImageSource
from ood_core.detectors.trained import Run
from ood_core.features import stream
from ood_core.options import flat_options
from ood_core.training import Epochs, train
from torch import Tensor, nn

from ood_mofe.functional import (
    beta_concentration,
    draw_partners,
    expert_loss,
    fold_lambda,
    mixup,
    mixup_loss,
    norm_regulariser,
    routing_loss,
)
from ood_mofe.model import MoFENetwork
from ood_mofe.options import Mixing, Routing, Training

__all__ = [
    "Crops",
    "Objective",
    "Split",
    "Survey",
    "Validation",
    "class_accuracy",
    "draw_lambda",
    "draw_negatives",
    "parameter_groups",
    "schedule",
    "split_validation",
    "survey",
    "train_network",
]

_MOST_HELD = 50  # validation images per class
_WARM_UP = 0.05  # of all steps
_CHUNK = 64  # images per pass that needs no gradient

Images = Callable[[Tensor, int], Tensor]
"""(rows int64 [b], epoch) -> pixels [b, 3, H, W] or tokens [b, T, D]."""


def split_validation(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to validate with: of each class a share, at least one image and at most 50.

    A class of one image keeps it for training. The draw depends on the labels only.

    Args:
        labels: int64 [N].
        share: in [0, 1); 0 holds nothing out.

    Returns:
        Two rising lists of row numbers.

    Raises:
        ValueError: a share out of range.

    Example:
        >>> train, held = split_validation(torch.tensor([0, 0, 0, 1]), 0.1)
        >>> len(train), len(held), 3 in train
        (3, 1, True)
    """
    check.part("validation", share)
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist() if share else ():
        rows = (labels == label).nonzero()[:, 0]
        count = min(max(1, round(share * len(rows))), _MOST_HELD, len(rows) - 1)
        held[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


@dataclass(frozen=True)
class Split:
    """Labelled images, some of them held out.

    Attributes:
        source: the images.
        labels: int64 [N].
        rows: images to train on.
        held: images to validate with.
    """

    source: ImageSource
    labels: Tensor
    rows: Tensor
    held: Tensor

    @classmethod
    def of(cls, source: ImageSource, labels: Tensor, share: float) -> Split:
        """Hold out a share of each class, see `split_validation`."""
        return cls(source, labels, *split_validation(labels, share))

    def part(self, rows: Tensor) -> ImageSource:
        """Some of the images."""
        return self.source.subset(rows.numpy())


def class_accuracy(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Share of each class's images that are predicted right, float64 [C]; 0 for a class without images."""
    images = torch.bincount(labels, minlength=classes)
    return torch.bincount(labels[predicted == labels], minlength=classes).double() / images.clamp(min=1)


# ---- before the training


@dataclass(frozen=True)
class Survey:
    """What the frozen backbone says about the images.

    Attributes:
        prototypes: mean router input of each class, float64 [C, D].
        accuracy: of the nearest class mean (cosine) on the validation images, float64 [C].
        mean_square: of the class token's values behind the last block, before the final norm.
    """

    prototypes: Tensor
    accuracy: Tensor
    mean_square: float


@torch.no_grad()
@flat_options
def survey(
    backbone: Backbone,
    split: Split,
    *,
    classes: int,
    cache: str | Path | None = None,
    workers: int = 0,
    progress: bool | None = None,
    routing: Routing = Routing(),
    expert_layers: int = 1,
) -> Survey:
    """Look at every centre crop once with the backbone as it is.

    Args:
        backbone: one that reads its class token.
        split: images to train on give the means.
        classes: C.
        cache: folder for the class tokens.
        workers: processes that decode.
        progress: a bar on stderr; None shows it on a terminal only.
        routing: what the router reads.
        expert_layers: last blocks that will have experts.
    """
    reading = Routing(router_norm=routing.router_norm, router_reads=routing.router_reads)
    alone: dict[str, Any] = {"experts": 1, "expert_layers": expert_layers, "routing": reading}
    network = MoFENetwork.from_backbone(backbone, torch.zeros(1).long(), **alone)
    seen = _with_class_tokens(backbone, network)
    loading: dict[str, Any] = {"cache": cache, "workers": workers, "progress": progress}
    means, count, squares = torch.zeros(2, classes, network.experts.width, dtype=torch.float64), 0, 0.0
    for part, own in _parts(seen, split, split.rows, **loading):
        means[0].index_add_(0, own, part["router_input"].double())
        means[1].index_add_(0, own, network.norm(part["behind"].to(backbone.device)).cpu().double())
        squares += part["behind"].double().square().mean(1).sum().item()
        count += len(own)
    predicted = [split.labels[:0]]
    for part, _ in _parts(seen, split, split.held, **loading):
        token = network.norm(part["behind"].to(backbone.device)).cpu().double()
        predicted.append((F.normalize(token, dim=1) @ F.normalize(means[1], dim=1).T).argmax(1))
    images = torch.bincount(split.labels[split.rows], minlength=classes)
    accuracy = class_accuracy(torch.cat(predicted), split.labels[split.held], classes)
    return Survey(means[0] / images[:, None], accuracy, squares / count)


def _with_class_tokens(backbone: Backbone, network: MoFENetwork) -> Backbone:
    """The backbone with what a router reads before the blocks with experts, and the class token behind them."""

    def compute(x: Tensor) -> dict[str, Tensor]:
        tokens = backbone.prefix(x.to(backbone.dtype), network.blocks)
        logits = network.router_logits(tokens)
        behind = network.class_token(tokens, logits.argmax(1), logits)
        return {"router_input": network.router_input(tokens), "behind": behind}

    router = f"router_norm={network.routing.router_norm} router_reads={network.routing.router_reads}"
    key = f"{router} before and class token behind the last {network.blocks} blocks"
    return backbone.with_features(["router_input", "behind"], compute, key)


def _parts(
    backbone: Backbone, split: Split, rows: Tensor, **loading: Any
) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
    """Features of some rows, and their labels."""
    start = 0
    needs = {"router_input", "behind"}
    for part in stream(backbone, split.part(rows), needs, **loading):
        yield part.extra, split.labels[rows[start : start + len(part)]]
        start += len(part)


# ---- images


class Crops:
    """Centre crops by row, as pixels or as tokens of the frozen trunk; kept in memory if they fit.

    Args:
        source: the images.
        backbone: whose transform and trunk are used.
        tokens: give tokens, not pixels.
        limit: bytes that may be kept.
        blocks: last blocks that are not of the trunk.

    Attributes:
        bytes: what is kept; 0 if all would be more than `limit`.
    """

    def __init__(self, source: ImageSource, backbone: Backbone, *, tokens: bool, limit: float, blocks: int = 1) -> None:
        self.source, self.backbone, self.tokens, self.blocks = source, backbone, tokens, blocks
        one = self._read(torch.zeros(1).long())
        size = len(source) * one.numel() * one.element_size()
        self.bytes = size if size <= limit else 0
        self._kept: Tensor | None = None

    def __call__(self, rows: Tensor, epoch: int = 0) -> Tensor:
        """Pixels [b, 3, H, W], or tokens [b, T, D] on the backbone's device."""
        if self.bytes and self._kept is None:
            self._kept = torch.cat([self._read(chunk).cpu() for chunk in torch.arange(len(self.source)).split(_CHUNK)])
        found = self._read(rows) if self._kept is None else self._kept[rows]
        return found.to(self.backbone.device) if self.tokens else found

    def _read(self, rows: Tensor) -> Tensor:
        (batch,) = load_batches(self.source, self.backbone.transform, [rows.tolist()], progress=False)
        return _prefix(self.backbone, self.blocks, batch.pixels) if self.tokens else batch.pixels


@torch.no_grad()
def _prefix(backbone: Backbone, blocks: int, pixels: Tensor) -> Tensor:
    return backbone.prefix(backbone.prepare(pixels), blocks)


# ---- draws


def draw_negatives(expert: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """For every expert as many images of other experts as it has of its own.

    Args:
        expert: int64 [B], the expert of each image.
        generator: source of the draws; None is torch's own.

    Returns:
        (image, expert), int64 [R] each: drawn without replacement where there are enough images; none for an expert
        that owns the whole batch.

    Source: the ratio is the paper's, the scheme ours.

    Example:
        >>> draw_negatives(torch.tensor([0, 0, 1, 1]), torch.Generator().manual_seed(0))[1]
        tensor([0, 0, 1, 1])
    """
    images, experts = [expert[:0]], [expert[:0]]
    for one in expert.unique().tolist():
        count, others = int((expert == one).sum()), (expert != one).nonzero()[:, 0]
        if not len(others):
            continue
        if len(others) < count:
            chosen = torch.randint(len(others), (count,), generator=generator)
        else:
            chosen = torch.randperm(len(others), generator=generator)[:count]
        images.append(others[chosen])
        experts.append(torch.full_like(chosen, one))
    return torch.cat(images), torch.cat(experts)


def draw_lambda(concentration: Tensor, generator: np.random.Generator) -> Tensor:
    """lambda ~ Beta(sigma, sigma) for each sigma [B], float32 in [0, 1].

    Source: Eq. 12.
    """
    sigma = concentration.double().numpy()
    # NumPy's draws go by logarithms; a quotient of gamma draws would be 0 / 0 for a small sigma.
    return torch.from_numpy(generator.beta(sigma, sigma)).float()


@dataclass(frozen=True)
class _Draws:
    """What is random about a batch, as positions in it: negatives [R], share and partner of each image [B]."""

    image: Tensor
    expert: Tensor
    lam: Tensor
    partner: Tensor


# ---- losses


class Objective:
    """The losses of a batch.

    Args:
        network: what is trained.
        labels: int64 [N] of all training rows.
        pixels: of these rows.
        encode: pixels -> tokens before the first trained block, without gradient.
        tokens: of unmixed images, where they are kept; None computes them from the pixels.
        accuracy: epoch -> accuracy [C] of each class before it.
        mixing: Dynamic-beta Mixup, see `Mixing`; `reg_weight` as the factor of the mean square itself.
        seed: of all draws.
    """

    @flat_options
    def __init__(
        self,
        network: MoFENetwork,
        labels: Tensor,
        pixels: Images,
        encode: Callable[[Tensor], Tensor],
        *,
        tokens: Images | None = None,
        accuracy: Callable[[int], Tensor],
        mixing: Mixing = Mixing(),
        seed: int = 0,
    ) -> None:
        self.network, self.labels, self.pixels, self.encode, self.tokens = network, labels, pixels, encode, tokens
        self.accuracy, self.mixing, self.seed = accuracy, mixing, seed
        heads, head = network.readout.heads, network.readout.global_head
        classes = 0 if head is None else len(head.weight)
        self.group = torch.zeros(classes).long() if heads is None else heads.group.cpu()
        self.shared = heads is None or len(network.experts) < len(heads)

    def __call__(self, rows: Tensor, epoch: int, *, batch: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """Terms of some rows of a batch.

        Args:
            rows: int64 [b], those of this process.
            epoch: from 0.
            batch: int64 [B], those of all processes; what is drawn depends on seed, epoch and these only.
        """
        draws = self._draw(epoch, batch)
        at = (batch == rows[:, None]).int().argmax(1)
        pixels, mixed = self._pixels(rows, at, batch, epoch, draws)
        clean = self.encode(pixels) if self.tokens is None else self.tokens(rows, epoch)
        found = self._clean_losses(self.network.enter(clean), self.labels[rows], at, draws)
        if self.mixing.mixup:
            found |= self._mixed_losses(*mixed, self._mixed_groups(batch, at, draws))
        return found

    # ---- what is drawn

    def _draw(self, epoch: int, batch: Tensor) -> _Draws:
        digest = hashlib.sha256(f"{self.seed} {epoch} {batch.tolist()}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        labels = self.labels[batch]
        image, expert = draw_negatives(self.group[labels], generator)
        if not self.mixing.mixup:
            return _Draws(image, expert, torch.ones(len(batch)), torch.arange(len(batch)))
        partner = draw_partners(labels, generator)
        weight = self.mixing.accuracy_weight if self.mixing.dynamic else 0
        sigma = beta_concentration(self.accuracy(epoch), w=weight)[labels]
        lam = draw_lambda(sigma, np.random.default_rng(list(digest)))
        lam = fold_lambda(lam) if self.mixing.dynamic else lam
        return _Draws(image, expert, lam.masked_fill(labels[partner] == labels, 1.0), partner)

    def _pixels(
        self, rows: Tensor, at: Tensor, batch: Tensor, epoch: int, draws: _Draws
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Pixels of the rows, where they are needed, and their mixes with targets; partners may be other processes'."""
        none = torch.empty(0)
        if not self.mixing.mixup:
            return (self.pixels(rows, epoch) if self.tokens is None else none), (none, none)
        partner = draws.partner[at]
        wanted = torch.cat([at, partner[~torch.isin(partner, at)].unique()])
        pixels = self.pixels(batch[wanted], epoch)
        one_hot = F.one_hot(self.labels[batch[wanted]], len(self.group))
        lam = torch.ones(len(wanted))
        lam[: len(at)] = draws.lam[at]
        index = torch.arange(len(wanted))
        index[: len(at)] = (wanted == partner[:, None]).int().argmax(1)
        mixed, target = mixup(pixels, one_hot, lam, index)
        return pixels[: len(at)], (mixed[: len(at)], target[: len(at)])

    def _mixed_groups(self, batch: Tensor, at: Tensor, draws: _Draws) -> Tensor:
        """The expert of a mixed image is that of its larger share."""
        larger = torch.where(draws.lam < 0.5, draws.partner, torch.arange(len(batch)))
        return self.group[self.labels[batch[larger[at]]]]

    # ---- terms

    def _clean_losses(
        self, tokens: Tensor, labels: Tensor, at: Tensor, draws: _Draws
    ) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        network, heads = self.network, self.network.readout.heads
        labels, group = labels.to(tokens.device), self.group[labels].to(tokens.device)
        logits = network.router_logits(tokens)
        if self.shared:
            token = network.norm(network.class_token(tokens, torch.zeros_like(group), logits))
            if heads is None:
                return {"classes": F.cross_entropy(self._global(token), labels)}
            every = [torch.full_like(labels, g) for g in range(len(heads))]
            parts = [_unless_nan(expert_loss, heads(token, g), heads.target(labels, g)) for g in every]
            return {"groups": torch.stack(parts).sum()}
        assert heads is not None
        # Positives, each through its own expert, and the negatives that fall on these rows.
        ours = (draws.image[:, None] == at).nonzero().to(group.device)
        image = torch.cat([torch.arange(len(at), device=group.device), ours[:, 1]])
        expert = torch.cat([group, draws.expert.to(group.device)[ours[:, 0]]])
        token = network.norm(network.class_token(tokens[image], expert, logits[image]))
        rows = torch.tensor(float(len(image)))
        loss = _unless_nan(expert_loss, heads(token, expert), heads.target(labels[image], expert))
        return {"experts": (loss * rows, rows), "routing": _unless_nan(routing_loss, logits, group)}

    def _mixed_losses(self, mixed: Tensor, target: Tensor, group: Tensor) -> dict[str, Tensor]:
        tokens = self.network.enter(self.encode(mixed))
        expert = torch.zeros_like(group) if self.shared else group
        behind = self.network.class_token(tokens, expert.to(tokens.device), self.network.router_logits(tokens))
        token = self.network.norm(behind)
        smoothed = partial(mixup_loss, reg="ls" if self.mixing.reg == "ls" else "none", smoothing=self.mixing.smoothing)
        found = {"mixup": _unless_nan(smoothed, self._global(token), target.to(token))}
        if self.mixing.reg == "l2":
            features = behind if self.mixing.reg_on == "pre_norm" else token
            found["reg"] = _unless_nan(partial(norm_regulariser, weight=self.mixing.reg_weight), features)
        return found

    def _global(self, token: Tensor) -> Tensor:
        return self.network.readout.class_logits(token, token.new_zeros(len(token)).long(), "global")


def _unless_nan(loss: Callable[..., Tensor], values: Tensor, *target: Tensor) -> Tensor:
    """A loss of NaN where the values hold some: the training loop says what can be done."""
    return values.sum() * math.nan if values.isnan().any() else loss(values, *target)


class Validation:
    """The accuracy of every class, from the weights of the moment, so that a resumed training finds the same.

    Args:
        network: what is trained.
        tokens: of the validation images, before the first trained block.
        labels: int64 [V].
        head: that predicts, see `Readout.class_logits`.
        first: accuracy [C] before the first epoch.
    """

    def __init__(self, network: MoFENetwork, tokens: Crops, labels: Tensor, head: str, first: Tensor) -> None:
        self.network, self.tokens, self.labels, self.head = network, tokens, labels, head
        self._known = {0: first}
        self._norm = math.nan

    def accuracy(self, epoch: int) -> Tensor:
        """[C] before an epoch, the current one."""
        if epoch not in self._known:
            self._known[epoch] = self._measure()
        return self._known[epoch]

    def figures(self, epoch: int) -> dict[str, float]:
        """After an epoch: mean accuracy of the classes, and mean norm of the class token before the final norm."""
        accuracy = self.accuracy(epoch + 1)
        return {"validation_accuracy": accuracy[self.labels.unique()].mean().item(), "token_norm": self._norm}

    @torch.no_grad()
    def _measure(self) -> Tensor:
        network, predicted, norms = self.network, [], []
        for rows in torch.arange(len(self.labels)).split(_CHUNK):
            tokens = network.enter(self.tokens(rows))
            logits = network.router_logits(tokens)
            expert = logits.argmax(1)
            behind = network.class_token(tokens, expert, logits)
            predicted.append(network.readout.class_logits(network.norm(behind), expert, self.head).argmax(1).cpu())
            norms.append(behind.norm(dim=1).cpu())
        self._norm = torch.cat(norms).mean().item()
        return class_accuracy(torch.cat(predicted), self.labels, len(self._known[0]))


# ---- the training itself


def schedule(epoch: float, *, peak: float, epochs: int, steps: int) -> float:
    """Linear warm-up over the first 5 % of all steps, then a cosine that ends at 0.

    Args:
        epoch: fraction of epochs done.
        peak: highest rate.
        epochs: in all.
        steps: per epoch.
    """
    done, total = round(epoch * steps), epochs * steps
    warm = math.ceil(_WARM_UP * total)
    if done < warm:
        return peak * (done + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warm + 1) / (total - warm + 1)))


def parameter_groups(network: MoFENetwork, *, weight_decay: float, lr_scale: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: blocks and norm at the rate itself, router and heads at `lr_scale` times it.

    Norms, biases and layer scales are not decayed.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        plain = "norm" in name or "scale" in name or name.endswith("bias")
        scale = lr_scale if name.startswith(("router", "readout.")) else 1.0
        found.setdefault((scale, 0.0 if plain else weight_decay), []).append(parameter)
    return [{"params": some, "lr_scale": scale, "weight_decay": decay} for (scale, decay), some in found.items()]


def _centre(backbone: Backbone, split: Split, limit: float, blocks: int) -> tuple[Images, Images | None]:
    """Pixels of the centre crops to train on, and their tokens if they can be kept."""
    images = split.part(split.rows)
    tokens = Crops(images, backbone, tokens=True, limit=limit, blocks=blocks)
    return Crops(images, backbone, tokens=False, limit=limit - tokens.bytes), tokens if tokens.bytes else None


def _clip(parameters: Iterable[nn.Parameter], norm: float) -> None:
    nn.utils.clip_grad_norm_(parameters, norm)


@flat_options
def train_network(
    network: MoFENetwork,
    backbone: Backbone,
    split: Split,
    found: Survey,
    *,
    head: str,
    recipe: Mapping[str, Any],
    mixing: Mixing = Mixing(),
    training: Training = Training(),
    run: Run = Run(),
) -> list[dict[str, float]]:
    """Train a network on images.

    Args:
        network: changed in place, on the backbone's device.
        backbone: its trunk stays frozen.
        split: the images.
        found: of these images.
        head: that predicts, see `Readout.class_logits`.
        recipe: see `train`.
        mixing: with `reg_on="pre_norm"`, `reg_weight` is in units of the class token's mean square at the start.
        training: how the experts learn; its `validation` has been used to split.
        run: checkpoint, workers, progress.

    Returns:
        The history of `train`, with "validation_accuracy" and "token_norm" where there are validation images.
    """
    validation, kept = None, 0
    if len(split.held):
        crops = Crops(split.part(split.held), backbone, tokens=True, limit=training.cache_limit, blocks=network.blocks)
        validation, kept = Validation(network, crops, split.labels[split.held], head, found.accuracy), crops.bytes
    source, scale = split.part(split.rows), (training.crop_scale, 1.0)
    views = LiveViews(source, backbone.transform, scale=scale, seed=training.seed, workers=run.workers)
    pixels, tokens = (
        (views, None) if training.augment else _centre(backbone, split, training.cache_limit - kept, network.blocks)
    )
    unit = found.mean_square if mixing.reg_on == "pre_norm" else 1.0
    objective = Objective(
        network,
        split.labels[split.rows],
        pixels,
        partial(_prefix, backbone, network.blocks),
        tokens=tokens,
        accuracy=(lambda epoch: found.accuracy) if validation is None else validation.accuracy,
        mixing=replace(mixing, reg_weight=mixing.reg_weight / unit),
        seed=training.seed,
    )
    parameters = dict(network.named_parameters())
    faster = training.head_learning_rate / training.learning_rate
    optimizer = torch.optim.AdamW(parameter_groups(network, weight_decay=training.weight_decay, lr_scale=faster))
    optimizer.register_step_pre_hook(lambda *_: _clip(parameters.values(), training.clip))
    steps = -(-len(split.rows) // training.batch_size)
    return train(
        parameters,
        objective,
        size=len(split.rows),
        epochs=training.epochs,
        batch_size=training.batch_size,
        optimizer=optimizer,
        learning_rate=partial(schedule, peak=training.learning_rate, epochs=training.epochs, steps=steps),
        in_epoch=Epochs(
            per_step=True,
            whole_batch=True,
            before_epoch=views.prepare if training.augment else None,
            after_epoch=None if validation is None else validation.figures,
        ),
        seed=training.seed,
        **run.keeping(recipe),
    )
