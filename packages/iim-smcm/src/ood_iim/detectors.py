"""The detectors: S-MCM* without training, and IIM with learned prompts."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from ood_core import check
from ood_core.backbones.base import Backbone
from ood_core.data.augment import LiveViews, Views
from ood_core.data.sources import ImageSource
from ood_core.detectors.base import Detector, backbone_of
from ood_core.detectors.mcm import MCM
from ood_core.detectors.trained import Run, TrainedDetector
from ood_core.detectors.zero_shot import ZeroShot, default_k
from ood_core.errors import DataError, MissingDataError, NotFittedError, UsageError
from ood_core.features import FeatureSet, extract
from ood_core.functional import mcm, released_image_to_text, unsaturated_match
from ood_core.ops import topk_patch_softmax
from ood_core.training import train
from PIL import Image
from torch import Tensor

from ood_iim import functional
from ood_iim.learner import PromptLearner, learning_rate

__all__ = ["IIM", "SMCM", "Components"]


class SMCM(ZeroShot):
    """Symmetric MCM without negatives (S-MCM*): global, patch-to-class and class-to-patch matches.

    Args:
        k: (patch, class) entries averaged; None: 50 if the grid has at least 100 patches, else a quarter of
            them.
        temperature: divides the cosines.
        alpha: factor of the class-to-patch term.
        **common: see `create_detector`.

    Example:
        >>> from ood_core import create_detector
        >>> detector = create_detector("s_mcm", backbone="tiny", class_names=["dog", "cat"])  # doctest: +SKIP
        >>> detector.score("photos/")  # doctest: +SKIP
    """

    name = "s_mcm"
    capabilities = frozenset({"image", "local", "text"})

    def __init__(self, *, k: int | None = None, temperature: float = 1.0, alpha: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        self.k = k if k is None else check.integer("k", k, 1, 2**31)
        self.temperature = check.positive("temperature", temperature)
        self.alpha = functional.check_factor("alpha", alpha)

    @property
    def needs(self) -> frozenset[str]:
        """Image and local features."""
        return frozenset({"image", "local"})

    def _score(self, features: FeatureSet) -> Tensor:
        # Both are there: the base class has checked `needs`.
        image, local = cast(Tensor, features.image), cast(Tensor, features.local)
        text, k = self._text(features), default_k(self.k, local.shape[1])
        options: dict[str, Any] = {"k": k, "temperature": self.temperature, "alpha": self.alpha}
        score = functional.s_mcm(image, local, text, text, **options)
        return unsaturated_match(score, image, local, text, **options)

    def explain_image(self, image: Image.Image) -> Image.Image:
        """The picture of `ood_iim.explain`.

        Args:
            image: of any size and mode.
        """
        from ood_iim.explain import explain

        return explain(self, image).render()


class Components(NamedTuple):
    """The terms of all MCM scores of one pass, for several k.

    Attributes:
        ks: the K values of k.
        mcm: global match [N].
        star: patch-to-class match without negatives [N, K].
        image_to_text: the same with negatives [N, K]; `star` itself if there are none.
        text_to_image: class-to-patch match [N, K], without alpha.
    """

    ks: tuple[int, ...]
    mcm: Tensor
    star: Tensor
    image_to_text: Tensor
    text_to_image: Tensor

    def scores(self, k: int, alpha: float = 1.0) -> dict[str, Tensor]:
        """The six scores of the paper's Fig. 6 at one of the `ks`; GL-MCM is there if 1 is among them.

        Raises:
            ValueError: `k` is not among the `ks`.
        """
        check.choice("k", k, self.ks)
        at = self.ks.index(k)
        found = {"mcm": self.mcm}
        if 1 in self.ks:
            found["gl_mcm"] = self.mcm + self.star[:, self.ks.index(1)]
        found["r_mcm*"] = self.mcm + self.star[:, at]
        found["r_mcm"] = self.mcm + self.image_to_text[:, at]
        found["s_mcm*"] = found["r_mcm*"] + alpha * self.text_to_image[:, at]
        found["s_mcm"] = found["r_mcm"] + alpha * self.text_to_image[:, at]
        return found


class IIM(TrainedDetector):
    """Intra-image mining: prompts learned from the patches of a few labelled images, scored by S-MCM.

    Both encoders stay frozen. `fit` learns a context per class, negative prompts and the text projection.

    Args:
        k: (patch, class) entries averaged in the score; None: 50 if the grid has at least 100 patches, else a
            quarter of them.
        temperature: divides the cosines of the score.
        alpha: factor of the class-to-patch term.
        negatives: "use" or "ignore" the negative prompts in the score (S-MCM or S-MCM*).
        form: of the score with negatives, "paper" or "released".
        train_k: positive patches per class in the losses; None as for `k`.
        train_temperature: divides the cosines in the losses; None: the inverse of the model's logit scale (0.01 for
            CLIP), as the released code; 1: the T of the paper's text.
        loss_form: of the negative loss, "paper" or "released".
        region: hard negatives, "next" (ranks k + 1 to 2k) or "all" (k + 1 to P).
        hard_negative_mining: other classes and negatives are read at their own best patches.
        lambda_neg: factor of the negative loss.
        lambda_div: factor of the diversity loss.
        negative_prompts: C_n, their number; 0 for none.
        context_length: learned tokens per prompt.
        shared_context: one context for all classes.
        context_init: words that contexts start from, instead of random vectors.
        train_text_projection: learn the text tower's last linear map, too.
        epochs: passes over the training images.
        batch_size: images per step.
        learning_rate: of SGD, peak of the schedule.
        momentum: of SGD.
        weight_decay: of SGD.
        views: when fitted on images: augmented views encoded once and used in turn; 0 for new ones every epoch.
        crop_scale: smallest share of the image's area in a view.
        max_prompt_batch: prompts whose activations may be in memory at a time.
        seed: of the start, the order and the views.
        **common: see `create_detector`.

    Attributes:
        history: per epoch the weighted terms of the loss.

    Source: Chen et al., AAAI 2026. Defaults are the paper's where it names a value (k, T, alpha, the factors of the
    losses, C_n, the context, epochs, batch and rate), else the released code's (`train_temperature`,
    `train_text_projection`, the contexts of each class, momentum, weight decay, warm-up, crops). The released code's
    crops differ by data set.

    Example:
        >>> shots = FewShot(ImageFolder("train"), 16, seed=1)  # doctest: +SKIP
        >>> detector = create_detector("iim", backbone="tiny").fit(shots)  # doctest: +SKIP
        >>> detector.calibrate("held_out/").is_ood("new/")  # doctest: +SKIP
    """

    name = "iim"
    capabilities = frozenset({"image", "local", "text", "prompts"})
    default_template = "a photo of a {}."
    remedy = "call fit(features or images) with a few labelled ID images per class first"
    # Few classes and steps: fewer negatives, so that the demo is quick, and a higher rate, so that it learns at all.
    demo_options: ClassVar[Mapping[str, Any]] = {"negative_prompts": 40, "epochs": 15, "learning_rate": 2e-3}

    def __init__(
        self,
        *,
        k: int | None = None,
        temperature: float = 1.0,
        alpha: float = 1.0,
        negatives: str = "use",
        form: str = "paper",
        train_k: int | None = None,
        train_temperature: float | None = None,
        loss_form: str = "paper",
        region: str = "next",
        hard_negative_mining: bool = True,
        lambda_neg: float = 5.0,
        lambda_div: float = 0.5,
        negative_prompts: int = 300,
        context_length: int = 16,
        shared_context: bool = False,
        context_init: str | None = None,
        train_text_projection: bool = True,
        epochs: int = 50,
        batch_size: int = 32,
        learning_rate: float = 2.5e-4,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        views: int = 0,
        crop_scale: float = 0.85,
        max_prompt_batch: int | None = 512,
        seed: int = 1,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.k = k if k is None else check.integer("k", k, 1, 2**31)
        self.temperature = check.positive("temperature", temperature)
        self.alpha = functional.check_factor("alpha", alpha)
        self.negatives = check.choice("negatives", negatives, ("use", "ignore"))
        self.form = check.choice("form", form, ("paper", "released"))
        self.train_k = train_k if train_k is None else check.integer("train_k", train_k, 1, 2**31)
        self.train_temperature = (
            train_temperature if train_temperature is None else check.positive("train_temperature", train_temperature)
        )
        self.loss_form = check.choice("loss_form", loss_form, ("paper", "released"))
        self.region = check.choice("region", region, ("next", "all"))
        self.hard_negative_mining = hard_negative_mining
        self.lambda_neg = functional.check_factor("lambda_neg", lambda_neg)
        self.lambda_div = functional.check_factor("lambda_div", lambda_div)
        self.negative_prompts = check.integer("negative_prompts", negative_prompts, 0, 2**31)
        self.context_length = check.integer("context_length", context_length, 1, 2**31)
        self.shared_context, self.context_init = shared_context, context_init
        self.train_text_projection = train_text_projection
        self.epochs = check.integer("epochs", epochs, 1, 2**31)
        self.batch_size = check.integer("batch_size", batch_size, 1, 2**31)
        self.learning_rate = check.positive("learning_rate", learning_rate)
        self.momentum = functional.check_factor("momentum", momentum)
        self.weight_decay = functional.check_factor("weight_decay", weight_decay)
        self.views = check.integer("views", views, 0, 2**31)
        self.crop_scale = check.positive("crop_scale", crop_scale)
        if self.crop_scale > 1:
            raise ValueError(f"crop_scale={crop_scale} must be at most 1, the whole image.")
        if max_prompt_batch is not None:
            check.integer("max_prompt_batch", max_prompt_batch, 1, 2**31)
        self.max_prompt_batch = max_prompt_batch
        self.seed = check.integer("seed", seed, 0, 2**31)

    @property
    def needs(self) -> frozenset[str]:
        """Image and local features."""
        return frozenset({"image", "local"})

    @property
    def fit_options(self) -> frozenset[str]:  # type: ignore[override]
        """All but those of the score and of the memory."""
        others = {"k", "temperature", "alpha", "negatives", "form", "max_prompt_batch"}
        return frozenset(self.option_names()) - others

    # ---- training

    def _learn(self, images: FeatureSet | ImageSource, labels: Tensor, run: Run) -> None:
        """Learn the prompts, from images augmented as `views` says or from features."""
        backbone = backbone_of(self)
        if isinstance(images, FeatureSet):
            if images.local.shape[-1] != backbone.width:
                raise UsageError(
                    f"These features are {images.local.shape[-1]} wide, those of {backbone.spec!r} {backbone.width}: "
                    "extract them with this backbone."
                )
            size = images.local.shape[1]
        else:
            size = math.prod(backbone.grid or ())
        self._class_texts(backbone)  # a template that does not fit shows here, not after the training
        learner = self._learner(backbone)
        options = {name: getattr(self, name) for name in ("lambda_neg", "lambda_div", "region", "hard_negative_mining")}
        options |= {"form": self.loss_form, "k": self._training_k(size), "temperature": self.train_temperature}
        patches = self._patches(backbone, images, **run.loading)
        self.history = train(
            learner.learned(),
            lambda rows, epoch: learner.losses(patches(rows, epoch), labels[rows], **options),
            size=len(labels),
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=torch.optim.SGD(
                learner.learned().values(),
                lr=self.learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            ),
            learning_rate=partial(learning_rate, peak=self.learning_rate, epochs=self.epochs),
            seed=self.seed,
            drop_last=True,
            before_epoch=patches.prepare,
            recipe=self._recipe(images, backbone.fingerprint),
            **run.keeping,
        )
        self._take(backbone, learner)

    def _patches(self, backbone: Backbone, images: FeatureSet | ImageSource, **loading: Any) -> _Rows | _Live:
        if isinstance(images, FeatureSet):
            return _Rows(images.local)
        scale = (self.crop_scale, 1.0)
        if not self.views:
            workers = loading["workers"]
            return _Live(backbone, LiveViews(images, backbone.transform, scale=scale, seed=self.seed, workers=workers))
        views = Views(images, self.views, size=backbone.transform.crop, scale=scale, seed=self.seed)
        return _Rows(extract(backbone, views, {"local"}, **loading).local, self.views)

    def _training_k(self, patches: int) -> int:
        """Positive patches per class."""
        most, why = self._most_training_k(patches)
        return check.integer("train_k", default_k(self.train_k, patches), 1, most, why)

    def _most_training_k(self, patches: int) -> tuple[int, str]:
        """How many they can be, and why: the negative loss needs as many, or one at least, behind them."""
        if not (self.lambda_neg and self.negative_prompts):
            return patches, f"the grid has {patches} patches"
        why = f"the hard negatives are patches behind the train_k best of {patches}: lower train_k"
        return patches // 2 if self.region == "next" else patches - 1, why

    def _learner(self, backbone: Backbone) -> PromptLearner:
        return PromptLearner(
            backbone,
            self.class_names,
            negatives=self.negative_prompts,
            context_length=self.context_length,
            shared_context=self.shared_context,
            context_init=self.context_init,
            train_text_projection=self.train_text_projection,
            max_prompt_batch=self.max_prompt_batch,
            seed=self.seed,
        )

    @torch.no_grad()
    def _take(self, backbone: Backbone, learner: PromptLearner) -> None:
        """Keep the learned tensors and the text features they give."""
        text, negatives = learner()
        tensors = {name: value.detach() for name, value in learner.named_parameters()}
        tensors |= {"text": self._class_texts(backbone), "local_text": text, "negatives": negatives}
        self.state = {name: value.cpu().clone() for name, value in tensors.items() if value.numel()}

    # ---- scores

    def _score(self, features: FeatureSet) -> Tensor:
        text, local_text, negatives = self._texts(features)
        negatives = negatives if self.negatives == "use" else None
        image, local = features.image, features.local
        options: dict[str, Any] = {
            "k": default_k(self.k, local.shape[1]),
            "temperature": self.temperature,
            "alpha": self.alpha,
            "form": self.form,
        }
        score = functional.s_mcm(image, local, text, local_text, negatives, **options)
        return unsaturated_match(score, image, local, text, negatives, local_text=local_text, **options)

    def _texts(self, features: FeatureSet) -> tuple[Tensor, Tensor, Tensor | None]:
        device = features.image.device
        negatives = self.state.get("negatives")
        return (
            self.state["text"].to(device),
            self.state["local_text"].to(device),
            None if negatives is None else negatives.to(device),
        )

    @torch.no_grad()
    def components(
        self, features: FeatureSet, *, ks: Sequence[int] | None = None, temperature: float | None = None
    ) -> Components:
        """The terms of every score, for several k from one pass, in this detector's `form`.

        Args:
            features: with image and local features.
            ks: values of k; None: 1 and this detector's own.
            temperature: None: this detector's own.

        Raises:
            NotFittedError: before `fit`.
            ValueError: no k, or `ks` or `temperature` out of range.
        """
        self._check_scorable(features)
        ks = tuple(sorted({1, default_k(self.k, features.local.shape[1])}) if ks is None else ks)
        temperature = self.temperature if temperature is None else temperature
        text, local_text, negatives = self._texts(features)
        global_match = mcm(features.image, text, temperature=temperature)
        star = topk_patch_softmax(features.local, local_text, k=ks, temperature=temperature)
        with_negatives = star.image_to_text
        if negatives is not None and self.form == "released":
            with_negatives = released_image_to_text(features.local, local_text, negatives, ks, temperature)
        elif negatives is not None:
            with_negatives = topk_patch_softmax(
                features.local, local_text, negatives, k=ks, temperature=temperature
            ).image_to_text
        return Components(ks, global_match, star.image_to_text, with_negatives, star.text_to_image)

    def _predict(self, features: FeatureSet) -> Tensor:
        text, local_text, _ = self._texts(features)
        patches = features.local.shape[1]
        k = min(default_k(self.k, patches), patches)
        return functional.id_logits(features.image, features.local, text, local_text, k=k).argmax(1)

    def explain_image(self, image: Image.Image) -> Image.Image:
        """The picture of `ood_iim.explain`.

        Args:
            image: of any size and mode.
        """
        from ood_iim.explain import explain

        return explain(self, image).render()

    def variants(self) -> dict[str, Detector]:
        """The six scores of the paper's Fig. 6 on the learned prompts, as detectors of their own.

        "mcm", "gl_mcm", "r_mcm*", "r_mcm", "s_mcm*", "s_mcm"; a star ignores the negatives.
        """
        if not self.fitted:
            raise NotFittedError(f"{self.name!r} has not been fitted: {self.remedy}.")
        plain = MCM(class_names=self.class_names, template=self.template, temperature=self.temperature)
        plain.state = {"text": self.state["text"]}
        plain._held = self._held
        options: dict[str, dict[str, Any]] = {
            "gl_mcm": {"k": 1, "alpha": 0.0, "negatives": "ignore"},
            "r_mcm*": {"alpha": 0.0, "negatives": "ignore"},
            "r_mcm": {"alpha": 0.0, "negatives": "use"},
            "s_mcm*": {"negatives": "ignore"},
            "s_mcm": {"negatives": "use"},
        }
        return {"mcm": plain} | {name: copy.copy(self).set_params(**changed) for name, changed in options.items()}

    # ---- storage

    @classmethod
    def from_released(
        cls, path: str | Path, *, backbone: Backbone | str, class_names: Sequence[str], **options: Any
    ) -> Self:
        """Import a checkpoint of the released code (a `model.pth.tar-50`); no code in it is run.

        Args:
            path: the file.
            backbone: the CLIP model it was trained on.
            class_names: C names in the order of its labels.
            **options: of the detector.

        Raises:
            MissingDataError: no such file.
            DataError: a file without the three learned tensors, or one with objects that code of its own would make.
            UsageError: sizes that do not fit the class list or the backbone.
        """
        tensors = _released_tensors(Path(path))
        contexts, negatives = tensors["context"], tensors["negative_context"]
        options |= {"negative_prompts": len(negatives), "context_length": contexts.shape[-2]}
        made = cls(class_names=class_names, **options)
        made.attach(backbone)
        learner = made._learner(backbone_of(made))
        learner.load(tensors)
        made._take(backbone_of(made), learner)
        return made


class _Rows:
    """(rows [b], epoch) -> patch features [b, P, d] of V views of N images in memory; epoch e uses view e mod V."""

    def __init__(self, local: Tensor, views: int = 1) -> None:
        self.local = local.unflatten(0, (views, -1))

    def prepare(self, epoch: int, batches: Sequence[Tensor]) -> None:
        """They are there."""

    def __call__(self, rows: Tensor, epoch: int) -> Tensor:
        return self.local[epoch % len(self.local)][rows]


class _Live:
    """Patch features of views that are new in every epoch, encoded batch by batch."""

    def __init__(self, backbone: Backbone, views: LiveViews) -> None:
        self.backbone, self.prepare, self.views = backbone, views.prepare, views

    def __call__(self, rows: Tensor, epoch: int) -> Tensor:
        return self.backbone.encode(self.views(rows, epoch), {"local"})["local"]


_RELEASED = {
    "context": ("prompt_learner.local_ctx", 3),
    "negative_context": ("prompt_learner.neg_ctx", 3),
    "text_projection": ("text_encoder.text_projection", 2),
}
"""Our name -> theirs and the number of dimensions."""

# The released code saves its schedule with its optimiser as objects beside the tensors, which PyTorch does not read
# by itself. They are rebuilt from plain values, without code from the file, and dropped.
_HARMLESS: list[Any] = [
    torch.optim.lr_scheduler.CosineAnnealingLR,
    torch.optim.SGD,
    (lambda *default: {}, "collections.defaultdict"),
    (dict, "builtins.dict"),
]


def _released_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingDataError(
            f"There is no checkpoint {path}: the released code writes prompt_learner/model.pth.tar-50."
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        reason = " ".join(reason.partition(". ")[0].split())
        raise DataError(f"{path} is no checkpoint of tensors only ({type(error).__name__}: {reason}).") from error
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    for key, dimensions in _RELEASED.values():
        if not isinstance(state.get(key), Tensor) or state[key].ndim != dimensions:
            raise DataError(
                f"{path} is no checkpoint of the released IIM code: it has no {key!r} of {dimensions} dimensions."
            )
    return {name: state[key].float() for name, (key, _) in _RELEASED.items()}
