"""MoFE as a detector: experts trained on images, and scores in the feature space of each image's expert."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from ood_core import functional
from ood_core.backbones import create_backbone
from ood_core.backbones.base import Backbone, hash_tensors
from ood_core.data.sources import ImageSource
from ood_core.detectors.base import backbone_of
from ood_core.detectors.held import Held
from ood_core.detectors.trained import Run, TrainedDetector, described
from ood_core.errors import DataError, MissingDataError, NotFittedError, UsageError
from ood_core.features import FeatureSet, extract
from ood_core.options import flat_options, method_options
from ood_core.prompts import text_features
from PIL import Image
from torch import Tensor

from ood_mofe.functional import CLIP_LOGIT_SCALE, unsaturated_mos
from ood_mofe.model import MoFENetwork, Readout, check_depth, image_projection, require_class_token
from ood_mofe.options import LOGIT_SCORES, TEXT_SCORES, Mixing, Mixture, Routing, Scoring, Training
from ood_mofe.partition import assign_groups, imagenet_words, initial_groups
from ood_mofe.training import Split, Survey, survey, train_network

__all__ = ["MoFE", "read_texts"]

log = logging.getLogger(__name__)

_FEATURES = frozenset({"router", "token"})
_NEIGHBOURS = 50
# In the order in which the features of saved detectors name them.
_NETWORK = ("router_norm", "router_reads", "expert_layers", "unfreeze_blocks", "gate", "top_k", "tokens")


class MoFE(TrainedDetector):
    """Mixture of feature experts with Dynamic-beta Mixup.

    `fit` divides the classes into groups, copies the backbone's last block for each, and trains the copies, the router
    that sends an image to one of them, and the heads. The rest of the backbone stays as it is.

    Args:
        scoring: how images are scored and classified, see `Scoring`.
        mixture: the experts, see `Mixture`.
        routing: how an image finds its experts, see `Routing`.
        mixing: Dynamic-beta Mixup, see `Mixing`.
        training: how the experts learn, see `Training`.
        **common: options of these groups by their own names (`top_k=2`); and see `create_detector`.

    Attributes:
        history: per epoch the terms of the loss, the validation accuracy and the norm of the class token.

    Source: Zhao et al., ICCV 2025. The number of experts is that of its best row on ImageNet-1k; it does not give the
    recipe.

    Example:
        >>> detector = create_detector("mofe", backbone="tiny", experts=3).fit("train/")  # doctest: +SKIP
        >>> detector.calibrate("held_out/").is_ood("new/")  # doctest: +SKIP
    """

    name = "mofe"
    capabilities = frozenset({"image", "blocks"})
    remedy = "call fit(images) with labelled ID images first"
    changes_backbone = True
    # A dozen classes and a few steps: fewer experts, and higher rates, so that they learn at all.
    demo_options: ClassVar[Mapping[str, Any]] = {
        "experts": 3,
        "epochs": 3,
        "batch_size": 32,
        "augment": False,
        "learning_rate": 1e-4,
        "head_learning_rate": 1e-2,
        "k": 5,
    }

    @flat_options
    def __init__(
        self,
        *,
        scoring: Scoring = Scoring(),
        mixture: Mixture = Mixture(),
        routing: Routing = Routing(),
        mixing: Mixing = Mixing(),
        training: Training = Training(),
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.scoring, self.mixture, self.routing = scoring, mixture, routing
        self.mixing, self.training = mixing, training
        self._check_options()

    def _check_options(self) -> None:
        self.routing.check(self.mixture.experts)
        if self.mixture.moe and self.mixture.group_heads:
            raise UsageError("group_heads=True is for one shared block: pass moe=False, too.")
        if self.mixing.mixup and self.mixing.dynamic and not self.training.validation:
            raise UsageError(
                "validation=0 leaves no images to measure accuracies with: pass dynamic=False, or a share."
            )
        if self.scoring.head == "global" and not self._has_global_head:
            raise UsageError(
                "head='global' is trained by mixup=True, or where all classes share one head (moe=False); or pass "
                "classifier='text'."
            )
        if self.scoring.head == "expert" and not self._has_heads:
            raise UsageError("head='expert' needs experts' heads: pass moe=True or group_heads=True.")
        if self.scoring.scorer == "others" and not self.mixture.moe:
            raise UsageError("scorer='others' reads the head of one expert: pass moe=True, or scorer='mos'.")
        if self.scoring.scorer in ("mos", "atd") and not (self._has_heads or self.scoring.texts):
            raise UsageError(f"scorer={self.scoring.scorer!r} needs groups' heads: pass moe=True or group_heads=True.")
        if self.scoring.scorer == "ctw" and not self.scoring.texts:
            raise UsageError("scorer='ctw' needs texts=, a file with CLIPN's text features.")

    # ---- what there is

    @property
    def needs(self) -> frozenset[str]:
        """Router logits and class token, once there is an expert to compute it."""
        return _FEATURES if self.fitted else frozenset({"image"})

    @property
    def fitted(self) -> bool:
        """Whether it has been trained and has a bank."""
        return "bank" in self.state

    @property
    def fit_options(self) -> frozenset[str]:  # type: ignore[override]
        """Everything but what only the score depends on."""
        texts = {"texts"} if self.scoring.classifier == "linear" else set()
        return frozenset(method_options(type(self))) - {"scorer", "k", "bank", "head", "cache_limit"} - texts

    @property
    def _has_heads(self) -> bool:
        return self.mixture.moe or self.mixture.group_heads

    @property
    def _has_global_head(self) -> bool:
        return self.mixing.mixup or not self._has_heads or self.scoring.classifier == "text"

    def _head(self, trained_with: str | None) -> str:
        """As `Readout.class_logits` calls it."""
        if (
            trained_with == "global"
            or not self._has_heads
            or (trained_with is None and self.scoring.classifier == "text")
        ):
            return "global"
        return "expert" if self.mixture.moe else "groups"

    @property
    def group(self) -> Tensor:
        """Group of each class, int64 [C]."""
        return self.state.get("model.readout.heads.group", torch.zeros(len(self.class_names)).long())

    # ---- fitting

    def _learn(self, images: FeatureSet | ImageSource, labels: Tensor, run: Run) -> None:
        """Divide the classes, train the experts and fill their banks."""
        assert isinstance(images, ImageSource)  # `fit_features` refuses
        backbone = _plain(backbone_of(self))
        self._check_counts(labels)
        if self._has_heads:
            initial_groups(
                self.class_names, self.mixture.experts, **self._grouping()
            )  # to refuse what cannot work at once
        texts = self._class_rows(backbone)
        split = Split.of(images, labels, self.training.validation)
        found = self._survey(split, **run.loading)
        group = self._groups(found.prototypes)
        network = self._network(backbone, group, texts)
        self.history = train_network(
            network,
            backbone,
            split,
            found,
            head=self._head("global" if self._has_global_head else "expert"),
            recipe=self._recipe(images, backbone.fingerprint) | _digests(groups=group, texts=texts),
            run=run,
            mixing=self.mixing,
            training=self.training,
        )
        self._take(backbone, network, split, run.loading)

    def _labels(self, source: ImageSource) -> Tensor:
        labels = self._class_labels(described(source))
        self._check_counts(labels)
        return labels

    def _check_counts(self, labels: Tensor) -> None:
        images = torch.bincount(labels, minlength=len(self.class_names))
        if not images.all():
            empty = [self.class_names[i] for i in (images == 0).nonzero()[:, 0].tolist()]
            raise DataError(f"Classes {empty[:5]} have no images: add some, or leave these class names out.")

    def _survey(self, split: Split, **extraction: Any) -> Survey:
        """What the frozen backbone says about the images."""
        return survey(
            _plain(backbone_of(self)),
            split,
            classes=len(self.class_names),
            routing=self.routing,
            expert_layers=self.mixture.expert_layers,
            **extraction,
        )

    def _class_rows(self, backbone: Backbone) -> Tensor | None:
        """Text features [C, d] that tell the classes apart; None where that is learned."""
        found = self._read_texts(backbone) if self.scoring.texts else {}  # in any case: to refuse a bad file at once
        if self.scoring.classifier == "linear":
            return None
        return found["yes"] if found else self._class_texts(backbone)

    def _class_texts(self, backbone: Backbone) -> Tensor:
        """As the base class, with names for ImageNet's ids."""
        self.template = self.template or self.default_template
        return text_features(backbone, imagenet_words(self.class_names), self.template).cpu()

    def _groups(self, prototypes: Tensor) -> Tensor:
        if not self._has_heads:
            return torch.zeros(len(self.class_names)).long()
        return assign_groups(self.class_names, prototypes, self.mixture.experts, **self._grouping())

    def _grouping(self) -> dict[str, Any]:
        return {"grouping": self.mixture.grouping, "groups": self.mixture.groups}

    def _network(self, backbone: Backbone, group: Tensor, texts: Tensor | None = None) -> MoFENetwork:
        return MoFENetwork.from_backbone(
            backbone,
            group,
            experts=int(group.max()) + 1 if self.mixture.moe else 1,
            group_heads=self._has_heads,
            global_head=self._has_global_head,
            texts=texts,
            seed=self.training.seed,
            expert_layers=self.mixture.expert_layers,
            unfreeze_blocks=self.mixture.unfreeze_blocks,
            routing=self.routing,
        )

    def _take(self, backbone: Backbone, network: MoFENetwork, split: Split, extraction: dict[str, Any]) -> None:
        """Keep what was learned and the training images' features, sorted by expert."""
        self.state = {f"model.{name}": value.detach().cpu().clone() for name, value in network.state_dict().items()}
        if "text" in backbone.capabilities:
            self.state["projection"] = image_projection(backbone, network.experts.width).float().cpu()
            self.state["logit_scale"] = torch.tensor(backbone.logit_scale)
        self._held = Held(self.name)
        self._use(backbone)
        features = extract(backbone_of(self), split.part(split.rows), _FEATURES, **extraction)
        expert = self._expert(features)
        order = expert.argsort(stable=True)
        bank = F.normalize(features.extra["token"], dim=1)[order]
        self.state |= {"bank": bank, "bank_expert": expert[order], "bank_row": split.rows[order]}
        self.state["k"] = torch.bincount(split.labels[split.rows]).median().clamp(max=_NEIGHBOURS)
        if self.scoring.texts:
            self.state |= self._read_texts(backbone)
        self._mention_small_banks(self._small_banks())

    def _read_texts(self, backbone: Backbone) -> dict[str, Tensor]:
        if "text" not in backbone.capabilities:
            raise UsageError("texts= is for CLIP backbones, whose images and texts share a space.")
        return read_texts(str(self.scoring.texts), len(self.class_names), backbone.width)

    def _small_banks(self) -> dict[str, int]:
        """Images by the name of each bank in which `k` reaches beyond the last."""
        sizes = self._bank_sizes() if self.fitted and self.scoring.scorer == "knn" else {}
        return {bank: size for bank, size in sizes.items() if size < self.neighbour}

    def _mention_small_banks(self, banks: Mapping[str, int]) -> None:
        for bank, size in banks.items():
            then = f"k={size} is used" if size else "images routed there get the lowest score, -2"
            log.warning("mofe: the bank of %s holds %d images, fewer than k=%d: %s.", bank, size, self.neighbour, then)

    def _bank_sizes(self) -> dict[str, int]:
        """Images by the name of the bank."""
        sizes = torch.bincount(self.state["bank_expert"], minlength=self._experts).tolist()
        if self.scoring.bank == "global" or len(sizes) == 1:
            return {"all experts": sum(sizes)}
        return {f"expert {e} ({', '.join(self._classes_of(e)[:3])}, ...)": size for e, size in enumerate(sizes)}

    def _classes_of(self, expert: int) -> list[str]:
        return [name for name, group in zip(self.class_names, self.group.tolist(), strict=True) if group == expert]

    @property
    def neighbour(self) -> int:
        """Rank of the neighbour that "knn" reads, in banks that are large enough: `k`, or what was chosen for None."""
        return self.scoring.k or int(self.state.get("k", _NEIGHBOURS))

    @property
    def _experts(self) -> int:
        return self.state["model.router"].shape[1]

    def set_params(self, **params: Any) -> Self:
        """Change options; the calibration is dropped, and the fit if it depended on them.

        Raises:
            UsageError: an unknown option.
        """
        base, small = self._held.record.get("base"), self._small_banks()
        super().set_params(**params)
        if self.fitted:
            if "texts" in params:
                self.state = {name: value for name, value in self.state.items() if name not in ("yes", "no")}
            if params.get("texts"):
                self.state |= self._read_texts(backbone_of(self))
            self._mention_small_banks({bank: size for bank, size in self._small_banks().items() if bank not in small})
        elif self._held.backbone is not None:
            plain, self._held = _plain(self._held.backbone), Held(self.name)
            self._use(plain)
        elif base:
            self._held = Held(self.name, {"spec": self._held.record["spec"], "fingerprint": base})
        return self

    # ---- backbone

    def _attach(self, backbone: Backbone) -> None:
        require_class_token(backbone)
        check_depth(backbone, self.mixture.expert_layers, self.mixture.unfreeze_blocks)
        if self.scoring.classifier == "text":
            backbone.require("text")

    def attach(self, backbone: Backbone | str) -> None:
        """Take a backbone, and put the experts behind its trunk if there are some."""
        self._use(_plain(create_backbone(backbone) if isinstance(backbone, str) else backbone))

    def _use(self, base: Backbone) -> None:
        expected = self._held.record.get("base", base.fingerprint)
        if expected != base.fingerprint:
            raise UsageError(
                f"Detector {self.name!r} was made with backbone {self._held.record['spec']!r} ({expected[:12]}), "
                f"not with {base.spec!r} ({base.fingerprint[:12]}). Fit it again."
            )
        super().attach(self._with_experts(base) if self.state else base)
        if self.state:
            self._held = self._held.recording(base=base.fingerprint)

    def network(self) -> MoFENetwork:
        """What was trained, as a function of the tokens that `Backbone.prefix(images, network.blocks)` gives.

        Raises:
            NotFittedError: before `fit`.
        """
        if not self.fitted:
            raise NotFittedError(f"{self.name!r} has not been fitted: {self.remedy}.")
        return self._loaded(_plain(backbone_of(self)))

    def _loaded(self, base: Backbone) -> MoFENetwork:
        texts = self.state["model.readout.global_head.weight"] if self.scoring.classifier == "text" else None
        network = self._network(base, self.group, texts)
        learned = {
            name.removeprefix("model."): value for name, value in self.state.items() if name.startswith("model.")
        }
        # Those of detectors that were saved without one.
        scales = {name: self._logit_scale() for name in network.state_dict() if name.endswith("logit_scale")}
        network.load_state_dict(scales | learned)
        return network.requires_grad_(False)

    def _logit_scale(self) -> Tensor:
        """Of the backbone that the detector was fitted with; earlier versions took CLIP's whatever it was."""
        return self.state.get("logit_scale", torch.tensor(CLIP_LOGIT_SCALE))

    def _with_experts(self, base: Backbone) -> Backbone:
        """The backbone with "router" and "token", computed in one pass behind its trunk."""
        network = self._loaded(base)
        learned = network.state_dict()
        options = {name: getattr(self, name) for name in _NETWORK}
        read = {name: value for name, value in learned.items() if not name.startswith("readout.")}
        key = hash_tensors(sorted(read.items()), json.dumps(options))
        return base.with_features(
            _FEATURES, lambda x: network.features(base.prefix(x.to(base.dtype), network.blocks)), f"experts {key}"
        )

    def explain_image(self, image: Image.Image) -> Image.Image | None:
        """The picture of `ood_mofe.explain`; None where the score is no distance.

        Args:
            image: of any size and mode.
        """
        from ood_mofe.explain import explain

        return explain(self, image).render() if self.scoring.scorer == "knn" else None

    # ---- scores

    def _expert(self, features: FeatureSet) -> Tensor:
        """Number of each image's expert, int64 [N]."""
        logits = features.extra["router"]
        if not (logits.isfinite().all() and features.extra["token"].isfinite().all()):
            raise DataError(
                "Router logits or class tokens hold NaN or infinite values: the training has diverged, fit again with "
                "a lower learning_rate and head_learning_rate."
            )
        return logits.argmax(1)

    def _score(self, features: FeatureSet) -> Tensor:
        expert, token = self._expert(features), features.extra["token"]
        if self.scoring.scorer == "knn":
            return self._knn(F.normalize(token, dim=1), expert)
        if self.scoring.scorer in LOGIT_SCORES:
            return LOGIT_SCORES[self.scoring.scorer](
                self._class_logits(token, expert, "global" if self._has_global_head else None)
            )
        if self.scoring.scorer in TEXT_SCORES and "yes" in self.state:
            projected, yes, no = (self.state[name].to(token) for name in ("projection", "yes", "no"))
            image, scale = F.normalize(token @ projected, dim=1), float(self._logit_scale())
            return TEXT_SCORES[self.scoring.scorer](image, yes, no, logit_scale=scale)
        heads = self._readout(token).heads
        assert heads is not None
        if self.scoring.scorer == "mos" or not self.mixture.moe:
            return unsaturated_mos(heads.by_group(token))
        odds = heads.others_odds(token, expert)
        return functional.unsaturated((-odds).sigmoid(), F.logsigmoid(odds))

    def _knn(self, queries: Tensor, expert: Tensor) -> Tensor:
        """Each image against the bank of its expert, or against all."""
        bank, owner = self.state["bank"].to(queries), self.state["bank_expert"].to(queries.device)
        if self.scoring.bank == "global":
            return functional.knn(queries, bank, k=min(self.neighbour, len(bank)))
        scores = queries.new_full((len(queries),), -2.0)  # as far as can be, where the expert has no bank
        for one in expert.unique().tolist():
            mine = expert == one
            start, end = torch.searchsorted(owner, owner.new_tensor([one, one + 1])).tolist()
            entries = bank[start:end]  # sorted by expert: no copy of what may be millions of rows
            if len(entries):
                scores[mine] = functional.knn(queries[mine], entries, k=min(self.neighbour, len(entries)))
        return scores

    def _predict(self, features: FeatureSet) -> Tensor:
        return self._class_logits(features.extra["token"], self._expert(features), self.scoring.head).argmax(1)

    def _class_logits(self, token: Tensor, expert: Tensor, head: str | None) -> Tensor:
        return self._readout(token).class_logits(token, expert, self._head(head))

    def _readout(self, like: Tensor) -> Readout:
        prefix = "model.readout."
        state = {name.removeprefix(prefix): value for name, value in self.state.items() if name.startswith(prefix)}
        return Readout.from_state(state).to(like)


def read_texts(file: str | Path, classes: int, width: int) -> dict[str, Tensor]:
    """CLIPN's text features of the classes, unit norm: "yes" and "no" of an .npz file, without running code in it.

    Args:
        file: the file.
        classes: C rows expected.
        width: d columns expected.

    Raises:
        MissingDataError: no such file.
        DataError: a file of another kind, or of other sizes.
    """
    if not Path(file).is_file():
        raise MissingDataError(f"There is no file {str(file)!r} with text features {{yes, no}}; check the path.")
    try:
        with np.load(file, allow_pickle=False) as saved:
            found = {name: torch.from_numpy(saved[name]).float() for name in ("yes", "no")}
    except Exception as error:
        raise DataError(f"{str(file)!r} holds no arrays 'yes' and 'no' ({type(error).__name__}: {error}).") from error
    for name, value in found.items():
        if list(value.shape) != [classes, width] or not value.isfinite().all():
            raise DataError(f"{name!r} of {str(file)!r} is {list(value.shape)}, not finite [{classes}, {width}].")
    return {name: F.normalize(value, dim=1) for name, value in found.items()}


def _digests(**tensors: Tensor | None) -> dict[str, str]:
    """What a recipe says of tensors, whatever file they came from."""
    return {name: hash_tensors([(name, value)]) for name, value in tensors.items() if value is not None}


def _plain(backbone: Backbone) -> Backbone:
    """The backbone without the features of an earlier fit."""
    twin = copy.copy(backbone)
    twin.added = {name: made for name, made in backbone.added.items() if name not in _FEATURES}
    return twin
