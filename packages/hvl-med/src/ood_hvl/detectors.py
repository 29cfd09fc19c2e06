"""HVL as a detector: trained on embeddings of the image pyramid, with a diagnosis for every image."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from ood_core import check, functional
from ood_core.backbones import create_backbone
from ood_core.backbones.base import Backbone
from ood_core.data.sources import ImageSource
from ood_core.detectors.base import backbone_of
from ood_core.detectors.given import check_finite
from ood_core.detectors.held import Held
from ood_core.detectors.trained import Run, TrainedDetector
from ood_core.errors import DataError, UsageError
from ood_core.features import FeatureSet, extract
from ood_core.options import flat_options, method_options
from ood_core.prompts import fill, resolve_templates
from ood_core.training import train
from PIL import Image
from torch import Tensor

from ood_hvl.model import HVLModel, Scales
from ood_hvl.options import Matching, PseudoOOD, Pyramid, Training
from ood_hvl.pyramid import FEATURE, pyramid_key, tiles_per_image, with_pyramid
from ood_hvl.views import TurnedViews

__all__ = ["HVL"]

log = logging.getLogger(__name__)


class HVL(TrainedDetector):
    """Hierarchical vision-language learning: diagnosis and refusal from three scales of an image.

    The encoder stays frozen and sees every training image once; `fit` learns an adapter and two text biases.

    Args:
        pyramid: the tiles of an image, see `Pyramid`.
        matching: how scales are fused and compared with texts, see `Matching`.
        pseudo_ood: tiles that stand for OOD images in training, see `PseudoOOD`.
        training: how it learns, see `Training`.
        **common: options of these groups by their own names (`n=1`); and see `create_detector`.

    Attributes:
        history: per epoch the terms of the loss.

    Source: Lai et al., MICCAI 2025; n, k, epochs, batch size, Adam's rate and the cosine are the paper's.

    Example:
        >>> detector = create_detector("hvl", backbone="tiny").fit("train/").calibrate("held_out/")  # doctest: +SKIP
        >>> detector.is_ood("new/")  # doctest: +SKIP
    """

    name = "hvl"
    capabilities = frozenset({"image", "text"})
    remedy = "call fit(features or images) with labelled ID images of at least two classes first"
    # Six tiles per image instead of 21, of the four fine ones the most doubtful.
    demo_options: ClassVar[Mapping[str, Any]] = {"n": 1, "k": 1}

    @flat_options
    def __init__(
        self,
        *,
        pyramid: Pyramid = Pyramid(),
        matching: Matching = Matching(),
        pseudo_ood: PseudoOOD = PseudoOOD(),
        training: Training = Training(),
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.pyramid, self.matching, self.pseudo_ood, self.training = pyramid, matching, pseudo_ood, training
        fine = 4 * pyramid.n**2
        check.integer("k", pseudo_ood.k, 1, fine, f"an image has {fine} fine tiles at n={pyramid.n}")
        self._plain: Backbone | None = None

    @property
    def needs(self) -> frozenset[str]:
        """The embeddings of the pyramid."""
        return frozenset({FEATURE})

    @property
    def fit_options(self) -> frozenset[str]:  # type: ignore[override]
        """All but those of the score and of the memory."""
        return frozenset(method_options(type(self))) - {"patch_mean", "encode_chunk"}

    # ---- backbone

    def attach(self, backbone: Backbone | str) -> None:
        """Take a backbone, and give it the pyramid."""
        backbone = create_backbone(backbone) if isinstance(backbone, str) else backbone
        wide, made = backbone, self.pyramid
        source, resize = made.pyramid_source, made.resize
        if FEATURE not in backbone.added:
            self._plain = backbone
            wide = with_pyramid(backbone, made.n, source=source, resize=resize, chunk=made.encode_chunk)
        elif backbone.added[FEATURE][1] != (key := pyramid_key(made.n, source, resize)):
            raise UsageError(f"This backbone has a {backbone.added[FEATURE][1]}, {self.name!r} needs a {key}.")
        super().attach(wide)

    def set_params(self, **params: Any) -> Self:
        """Change options; the calibration is dropped, and the fitted state if it depended on them.

        Raises:
            UsageError: an unknown option.
        """
        super().set_params(**params)
        if self._plain is not None and {"n", "pyramid_source", "resize", "encode_chunk"} & set(params):
            self._held = Held(self.name)
            self.attach(self._plain)
        return self

    def _check_features(self, features: FeatureSet) -> None:
        tiles = features.get(FEATURE) if isinstance(features, FeatureSet) else None
        n, expected = self.pyramid.n, tiles_per_image(self.pyramid.n)
        if tiles is not None and (tiles.ndim != 3 or tiles.shape[1] != expected):
            raise UsageError(
                f"{self.name!r} with n={n} reads {expected} tiles per image; these features are of shape "
                f"{list(tiles.shape)}. Extract them with this n (`detector.backbone`)."
            )
        super()._check_features(features)
        check_finite(self.name, FEATURE, features)

    # ---- training

    def _learn(self, images: FeatureSet | ImageSource, labels: Tensor, run: Run) -> None:
        """Learn the adapter and the text biases, from images, encoded once, or from features with "pyramid"."""
        backbone = backbone_of(self)
        self._check_classes(labels)
        text = self._raw_texts(backbone)
        tiles = self._tiles(images, **run.loading)
        if tiles.shape[-1] != text.shape[-1]:
            raise UsageError(
                f"These features are {tiles.shape[-1]} wide, the texts of {backbone.spec!r} {text.shape[-1]}: extract "
                "them with this backbone."
            )
        model = self._model(text)
        rows_of_epoch = self._rows(labels, len(tiles) // len(labels))
        learned = dict(model.named_parameters())

        def losses(rows: Tensor, epoch: int) -> dict[str, Tensor]:
            images, rows = rows_of_epoch(rows, epoch)
            return model.losses(tiles[rows].float(), labels[images], ood_weight=self.pseudo_ood.ood_weight)

        self.history = train(
            learned,
            losses,
            size=len(labels),
            epochs=self.training.epochs,
            batch_size=self.training.batch_size,
            optimizer=torch.optim.Adam(learned.values(), lr=self.training.learning_rate),
            learning_rate=lambda epoch: (
                self.training.learning_rate * (1 + math.cos(math.pi * epoch / self.training.epochs)) / 2
            ),
            seed=self.training.seed,
            **run.keeping(self._recipe(images, backbone.fingerprint)),
        )
        self.state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}

    def _rate(self, epoch: float) -> float:
        """A cosine to 0."""
        return self.training.learning_rate * (1 + math.cos(math.pi * epoch / self.training.epochs)) / 2

    def _check_classes(self, labels: Tensor) -> None:
        counts = torch.bincount(labels, minlength=len(self.class_names)).tolist()
        if absent := [name for name, count in zip(self.class_names, counts, strict=True) if not count]:
            raise DataError(f"No training image is of {absent[:5]}: give some of every class, or leave the class out.")
        if single := [name for name, count in zip(self.class_names, counts, strict=True) if count == 1]:
            log.warning(
                "There is one training image only of %s: it is learned, but cannot be told from chance.", single
            )

    def _raw_texts(self, backbone: Backbone) -> Tensor:
        unit = self._class_texts(backbone)  # sets the template, and checks it
        if self.matching.normalize_t:
            return unit
        raw = [
            backbone.encode_text([fill(one, name) for name in self.class_names], normalize=False)
            for one in resolve_templates(self.template or self.default_template)
        ]
        return torch.stack(raw).mean(0).cpu()

    def _tiles(self, images: FeatureSet | ImageSource, **loading: Any) -> Tensor:
        """Embeddings of V orientations of N images, orientation after orientation, [V N, 1 + 5 n^2, d]."""
        if isinstance(images, ImageSource):
            source = TurnedViews(images, self.training.views) if self.training.views > 1 else images
            images = extract(backbone_of(self), source, self.needs, **loading)
        return images.extra[FEATURE]

    def _rows(self, labels: Tensor, views: int) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        """(rows, epoch) -> the images drawn for these rows, and where their embeddings lie."""
        share = 1 / torch.bincount(labels).double()[labels]

        def draw(rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
            generator = torch.Generator().manual_seed(self.training.seed * 1_000_003 + epoch)
            images = torch.arange(len(labels))
            if self.training.class_balance == "sampler":
                images = torch.multinomial(share, len(labels), replacement=True, generator=generator)
            view = torch.randint(views, (len(labels),), generator=generator)
            return images[rows], (view * len(labels) + images)[rows]

        return draw

    def _model(self, text: Tensor) -> HVLModel:
        return HVLModel(
            text,
            tau=self.matching.tau,
            csf=self.matching.csf,
            adapter=self.matching.adapter,
            normalize=self.matching.normalize_v,
            selection=self.pseudo_ood.selection,
            lower_scales=self.pseudo_ood.lower_scales,
            k=self.pseudo_ood.k,
            seed=self.training.seed,
        )

    # ---- scores

    def scales(self, features: FeatureSet) -> Scales:
        """Class probabilities, entropies and kept tiles of every scale.

        Args:
            features: with "pyramid".

        Raises:
            NotFittedError: before `fit`.
            UsageError: features of another backbone or n.
        """
        self._check_scorable(features)
        return self.trained_model(features)(features.extra[FEATURE])

    def trained_model(self, features: FeatureSet) -> HVLModel:
        """The trained layers, on the device of these features."""
        model = self._model(self.state["text"])
        model.load_state_dict(self.state)
        return model.to(features.extra[FEATURE].device)

    @torch.no_grad()
    def _combined(self, features: FeatureSet) -> tuple[Tensor, Tensor, Tensor]:
        return self.trained_model(features)(features.extra[FEATURE]).combined(self.matching.patch_mean)

    def variants(self) -> dict[str, Self]:
        """This detector, and with the other mean over tiles, which needs no training of its own.

        "hvl" as it is, "hvl_kept" or "hvl_paper" with the other `patch_mean`.
        """
        other = "kept" if self.matching.patch_mean == "paper" else "paper"
        return {self.name: self, f"{self.name}_{other}": copy.copy(self).set_params(patch_mean=other)}

    def _score(self, features: FeatureSet) -> Tensor:
        p_id, score, best = self._combined(features)
        others = p_id.scatter(1, best[:, None], 0).sum(1)
        # With the paper's mean dropped tiles are missing from the sum, too; rounding alone is not.
        dropped = 1 - p_id.sum(1)
        return functional.unsaturated(score, (others + dropped.where(dropped > 1e-5, 0)).log())

    def _predict(self, features: FeatureSet) -> Tensor:
        return self._combined(features)[2]

    def explain_image(self, image: Image.Image) -> Image.Image:
        """The picture of `ood_hvl.explain`.

        Args:
            image: of any size and mode.
        """
        from ood_hvl.explain import explain

        return explain(self, image).render()
