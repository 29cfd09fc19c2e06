"""SeTAR+FT: the dropped directions of a search become a low-rank adapter and are trained; LoRA for comparison."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from ood_core import check
from ood_core.backbones.base import Backbone, hash_tensors
from ood_core.data import load_batches, open_source
from ood_core.data.augment import LiveViews
from ood_core.data.sources import ImageSource
from ood_core.errors import UsageError
from ood_core.options import flat_options
from ood_core.training import Epochs, Keeping, train
from torch import Tensor, nn
from torch.func import functional_call

from ood_setar.edit import SeTAREdit, draw
from ood_setar.functional import loss_terms, split_low_rank
from ood_setar.network import image_features, logits, text_features
from ood_setar.options import Training
from ood_setar.search import class_prompts, default_cells_k, label_images, visiting_order

__all__ = ["Adapters", "finetune", "lora", "lora_start", "train_in"]


class Adapters(nn.Module):
    """Low-rank factors beside some weights of a frozen backbone: W = base + B A.

    With the factors of `edit`, or else those that its ratios split off: then W is the original weight (up to
    rounding) before the first step.

    Args:
        backbone: unedited; it is not changed.
        edit: its ratios say which weights, its factors (if it has some) where to start.

    Attributes:
        base: name of a weight -> its frozen part [out, in].
        learned: "NAME.B" [out, r] and "NAME.A" [r, in], the trainable parameters.
    """

    def __init__(self, backbone: Backbone, edit: SeTAREdit) -> None:
        super().__init__()
        edit._check(backbone)
        if edit.drop != "minor":
            raise UsageError(f"Only minor directions are trained; this edit drops {edit.drop!r} ones.")
        self.backbone, self.scale = backbone, edit.scale
        self.base: dict[str, Tensor] = {}
        self.learned: dict[str, nn.Parameter] = {}
        self._model = _Call(backbone.model)
        for name, ratio in edit.ratios.items():
            weight = backbone.linear(name).weight
            weight = weight if weight.dtype == torch.float64 else weight.float()
            base, b, a = split_low_rank(weight, ratio)
            if name in edit.factors:
                b, a = (factor.to(weight) for factor in edit.factors[name])
            if b.shape[1]:
                self.base[name] = base
                self.learned |= {f"{name}.B": nn.Parameter(b.clone()), f"{name}.A": nn.Parameter(a.clone())}
        if not self.base:
            raise UsageError("This edit drops nothing, so there is nothing to train: search again, or use `lora`.")

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """name -> (B, A), detached copies on the CPU."""
        return {
            name: (
                self.learned[f"{name}.B"].detach().cpu().clone(),
                self.learned[f"{name}.A"].detach().cpu().clone(),
            )
            for name in self.base
        }

    def weight(self, name: str) -> Tensor:
        """base + scale B A, [out, in]."""
        return self.base[name] + self.scale * self.learned[f"{name}.B"] @ self.learned[f"{name}.A"]

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function that uses the backbone, with the adapted weights in it; gradients reach the factors."""
        return functional_call(self._model, self._parameters_in_place(), (function, *arguments))

    def _parameters_in_place(self) -> dict[str, Tensor]:
        """The library's parameters that hold adapted weights, by name; several rows of one may be adapted."""
        names = {id(parameter): f"model.{name}" for name, parameter in self.backbone.model.named_parameters()}
        placed: dict[str, Tensor] = {}
        for name in self.base:
            linear = self.backbone.linear(name)
            place = names[id(linear.parameter)]
            placed[place] = linear.placed(self.weight(name), placed.get(place))
        return placed


class _Call(nn.Module):
    """A module whose forward is any function: what `functional_call` needs to put tensors in a model's place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def lora(backbone: Backbone, names: Sequence[str], *, rank: int = 32, alpha: float = 8.0, seed: int = 5) -> SeTAREdit:
    """Where LoRA starts: nothing dropped, A random, B zero; to be trained by `finetune`.

    Args:
        backbone: unedited.
        names: weights to adapt, e.g. `visiting_order(backbone.linears())` for all up-projections.
        rank: of every adapter.
        alpha: the product B A is scaled by alpha / rank; 8 is what the paper's baseline had in effect.
        seed: of A.

    Returns:
        An edit that leaves the backbone as it is.

    Raises:
        UsageError: an unknown weight.
        ValueError: a rank larger than a weight.
    """
    factors = {}
    for name in names:
        weight = backbone.linear(name).weight
        check.integer("rank", rank, 1, min(weight.shape), f"{name} is {list(weight.shape)}")
        a = torch.empty(rank, weight.shape[1])
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=draw(seed, name))
        factors[name] = (torch.zeros(weight.shape[0], rank), a)
    return SeTAREdit(
        dict.fromkeys(names, 0.0),
        backbone.fingerprint,
        factors=factors,
        scale=check.positive("alpha", alpha) / rank,
        record={"lora": {"rank": rank, "alpha": alpha, "seed": seed}},
    )


@flat_options
def finetune(
    backbone: Backbone,
    images: Any,
    edit: SeTAREdit,
    *,
    class_names: Sequence[str] | None = None,
    template: str = "a photo of a {}",
    ood_weight: float = 0.1,
    k: int | None = None,
    training: Training = Training(),
    workers: int = 0,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> SeTAREdit:
    """Train the directions that a search dropped (SeTAR+FT), or LoRA's, on labelled ID images.

    The network runs in train mode: one that was built with stochastic depth (Swin) drops residual branches, another
    one for every image and epoch, at its own rates.

    Args:
        backbone: unedited; it is not changed.
        images: a labelled source, usually that of the search.
        edit: of `search` or `lora`.
        class_names: C names; None: those of the labels.
        template: prompt of a class.
        ood_weight: lambda of the loss.
        k: a cell is pseudo-OOD if its class is not among its k largest logits; None: 0.3 C, rounded.
        training: rates, epochs, views, see `Training`.
        workers: processes that decode the views of the steps ahead.
        checkpoint: file that keeps the factors after every epoch.
        resume: go on from it.
        progress: a bar on stderr; None shows it on a terminal only.

    Returns:
        A new edit with the trained factors; its `record` has the losses of every epoch.

    Raises:
        UsageError: an edit of another backbone, or one without anything to train.
        DataError: labels that are missing or no class, or a loss that is no longer finite.

    Source: SeTAR+FT of Li et al., NeurIPS 2024; defaults are those of the released code for CLIP ViT-B/16 (which has
    0.4 as jitter and crops from 0.08 for Swin), and `k` that of its ImageNet, 300 of 1,000, as a share.

    Example:
        >>> tuned = finetune(backbone, "train/", search(backbone, "train/"))  # doctest: +SKIP
        >>> tuned.apply(backbone).encode_image(x)  # doctest: +SKIP
    """
    source = open_source(images)
    names, labels = label_images(backbone, source, class_names)
    k = default_cells_k(k, len(names))
    adapters, depth = Adapters(backbone, edit), _TrainMode(backbone.model, training.seed)
    optimizer = torch.optim.SGD(
        adapters.learned.values(),
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    settings = {
        "template": template,
        "ood_weight": ood_weight,
        "k": k,
        "epochs": training.epochs,
        "batch_size": training.batch_size,
        "learning_rate": training.learning_rate,
        "momentum": training.momentum,
        "weight_decay": training.weight_decay,
        "crop_scale": training.crop_scale if training.augment else None,
        "jitter": training.jitter if training.augment else None,
        "stochastic_depth": depth.rate,
        "seed": training.seed,
        "class_names": names,
        "images": {"count": len(source), "fingerprint": source.fingerprint},
        "backbone": backbone.record(),
    }
    forward = _forward(backbone, class_prompts(template, names) if "prompts" in backbone.capabilities else None)
    pixels: LiveViews | _CentreCrops
    if training.augment:
        drawn: dict[str, Any] = {"scale": (training.crop_scale, 1.0), "seed": training.seed, "jitter": training.jitter}
        pixels = LiveViews(source, backbone.transform, workers=workers, **drawn)
    else:
        pixels = _CentreCrops(backbone, source, workers)
    targets = labels.to(backbone.device)

    def losses(rows: Tensor, epoch: int) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        seen = pixels(rows, epoch)
        with depth(rows, epoch):
            global_logits, local_logits = adapters(forward, seen)
        if not (global_logits.isfinite().all() and local_logits.isfinite().all()):
            return {"loss_id": global_logits.sum() * math.nan}  # the loop says what can be done
        terms = loss_terms(global_logits, local_logits, targets[rows.to(targets.device)], k=k)
        # Cells are pooled over the batch, not averaged by image.
        return {"loss_id": terms.id_loss(), "loss_ood": (ood_weight * terms.negative_entropy.sum(), terms.cells.sum())}

    start = hash_tensors((f"{name}.{i}", pair[i]) for name, pair in edit.factors.items() for i in (0, 1))
    history = train(
        adapters.learned,
        losses,
        size=len(source),
        epochs=training.epochs,
        batch_size=training.batch_size,
        optimizer=optimizer,
        learning_rate=lambda epoch: training.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / training.epochs)),
        in_epoch=Epochs(per_step=True, before_epoch=pixels.prepare),
        seed=training.seed,
        keeping=Keeping(checkpoint, resume, settings | {"ratios": edit.ratios, "scale": edit.scale, "start": start}),
        progress=progress,
    )
    record = edit.record | {"finetune": settings, "history": history}
    return replace(edit, fingerprint=backbone.fingerprint, factors=adapters.factors(), record=record, folder=None)


class _TrainMode:
    """A model in train mode for one pass; what is drawn depends on seed, epoch and image alone.

    So a run that goes on, or is shared by processes, drops the same residual branches as a whole one. Batch norms
    keep their statistics: the backbone does not change.

    Attributes:
        rate: the highest of stochastic depth, 0 without any.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.seed = model, seed
        # timm and transformers each have modules of their own for it, of these names.
        modules = (module for module in model.modules() if type(module).__name__.endswith("DropPath"))
        self.paths = [(module, float(module.drop_prob or 0.0)) for module in modules]  # type: ignore[arg-type]
        self.rate = max((rate for _, rate in self.paths), default=0.0)

    @contextmanager
    def __call__(self, rows: Tensor, epoch: int) -> Iterator[None]:
        """Around a pass of these images."""
        calls, images = count(), rows.tolist()

        def dropping(rate: float) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
            def drop(module: nn.Module, received: tuple[Tensor], output: Tensor) -> Tensor:
                (x,), call = received, next(calls)
                numbers = (random.Random(f"{self.seed} {epoch} {call} {image}").random() for image in images)
                kept = torch.tensor([(number >= rate) / (1 - rate) for number in numbers])
                return x * kept.to(x).view(-1, *[1] * (x.ndim - 1))

            return drop

        hooks = [module.register_forward_hook(dropping(rate)) for module, rate in self.paths if 0 < rate < 1]
        device = next(self.model.parameters(), torch.empty(0)).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(
                random.Random(f"{self.seed} {epoch} {images}").getrandbits(63)
            )  # of dropout, where a model has it
            self.model.train()
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            try:
                yield
            finally:
                self.model.eval()
                for hook in hooks:
                    hook.remove()


def _forward(backbone: Backbone, prompts: list[str] | None) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Pixels -> scaled logits of images and cells; both towers run, with gradients."""
    with torch.no_grad():
        words = None if prompts is None else backbone.embed_texts(prompts)

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x = backbone.embed(backbone.prepare(pixels))
        for layer in backbone.layers()[:-1]:
            x = layer(x)
        text = None if words is None else text_features(backbone, backbone.text_hidden(*words))
        return logits(backbone, *image_features(backbone, x), text)

    return forward


class _CentreCrops:
    """The same pixels in every epoch, in memory."""

    def __init__(self, backbone: Backbone, source: ImageSource, workers: int) -> None:
        batches = load_batches(source, backbone.transform, workers=workers, progress=False)
        self.whole = torch.cat([batch.pixels for batch in batches])

    def prepare(self, epoch: int, batches: Sequence[Tensor]) -> None:
        """Nothing: all is there."""

    def __call__(self, rows: Tensor, epoch: int) -> Tensor:
        return self.whole[rows]


def lora_start(backbone: Backbone, *, seed: int, **options: Any) -> SeTAREdit:
    """LoRA on one weight of every block, before training.

    Args:
        backbone: unedited.
        seed: of the factors.
        **options: of `lora`, and `kind` and `order` of `visiting_order`.
    """
    order = options.pop("order", None) or ("visual_text" if "prompts" in backbone.capabilities else "visual_only")
    names = visiting_order(backbone.linears(), kind=options.pop("kind", "up"), order=order)
    return lora(backbone, names, seed=seed, **options)


def train_in(folder: str | Path, backbone: Backbone, images: Any, edit: SeTAREdit, **options: Any) -> SeTAREdit:
    """Fine-tune and save; a run that was interrupted goes on from the checkpoint in `folder`.

    Args:
        folder: for the edit.
        backbone: unedited.
        images: labelled.
        edit: of a search or of LoRA.
        **options: of `finetune`.
    """
    checkpoint = Path(folder) / "checkpoint.safetensors"
    tuned = finetune(backbone, images, edit, checkpoint=checkpoint, **options)
    tuned.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)
    return tuned
