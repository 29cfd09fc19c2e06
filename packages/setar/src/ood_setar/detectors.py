"""SeTAR as a detector: search on a few labelled images, then any training-free score on the edited backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from ood_core import check
from ood_core.backbones import create_backbone
from ood_core.backbones.base import Backbone
from ood_core.data import open_source
from ood_core.data.sources import Images
from ood_core.detectors import create_detector
from ood_core.detectors.base import Detector, backbone_of, needs_of
from ood_core.detectors.held import Held
from ood_core.errors import UsageError
from ood_core.features import FeatureSet
from ood_core.options import method_options
from torch import Tensor

from ood_setar.edit import SeTAREdit
from ood_setar.finetune import finetune
from ood_setar.search import RATIOS, search

__all__ = ["SeTAR"]


class SeTAR(Detector):
    """A training-free score on a backbone that `fit` has edited by a search (and, if asked, fine-tuned).

    Args:
        scorer: a detector that needs no fitting: "mcm", "gl_mcm", "energy", "neg_label", ...; for classifiers "msp",
            "energy", "gl_mcm", ...
        kind: weights searched, see `search`.
        order: in which they are decided.
        ratios: candidates.
        drop: "minor", "principal" or "random".
        ood_weight: lambda of the loss.
        cells_k: a cell is pseudo-OOD if its class is not among its `cells_k` largest logits; None: 0.3 C.
        finetune_epochs: of SeTAR+FT after the search; 0 trains nothing.
        learning_rate: of SeTAR+FT.
        batch_size: of SeTAR+FT.
        seed: of random drops, order and views.
        **common: see `create_detector`.

    Attributes:
        edit: what `fit` found.

    Source: Li et al., NeurIPS 2024.

    Example:
        >>> detector = create_detector("setar", backbone="tiny", scorer="gl_mcm").fit("train/")  # doctest: +SKIP
        >>> detector.edit.ratios  # doctest: +SKIP
        {'visual.3.up': 0.1, 'visual.2.up': 0.0, ...}
    """

    name = "setar"
    # Of the default score; `_attach` asks for what the score at hand needs.
    capabilities = frozenset({"image", "local", "text", "prompts", "blocks"})
    remedy = "call fit(images) with about one labelled ID image per class or more"
    changes_backbone = True
    least_classes: ClassVar[int] = 2
    # Three ratios of the image tower take seconds.
    demo_options: ClassVar[Mapping[str, Any]] = {"ratios": [0.0, 0.1, 0.4], "order": "visual_only"}

    def __init__(
        self,
        *,
        scorer: str = "mcm",
        kind: str = "up",
        order: str | None = None,
        ratios: Sequence[float] = RATIOS,
        drop: str = "minor",
        ood_weight: float = 0.1,
        cells_k: int | None = None,
        finetune_epochs: int = 0,
        learning_rate: float = 0.01,
        batch_size: int = 100,
        seed: int = 5,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.scorer, self.kind, self.order, self.drop = scorer, kind, order, drop
        self.ratios = list(ratios)
        self.ood_weight, self.cells_k = ood_weight, cells_k
        self.finetune_epochs = check.integer("finetune_epochs", finetune_epochs, 0, 2**31)
        self.learning_rate = check.positive("learning_rate", learning_rate)
        self.batch_size = check.integer("batch_size", batch_size, 1, 2**31)
        self.seed = check.integer("seed", seed, 0, 2**31)
        if finetune_epochs and drop != "minor":
            raise UsageError(f"Only minor directions are trained: finetune_epochs=0 goes with drop={drop!r}.")
        self.edit: SeTAREdit | None = None
        self._original: Backbone | None = None
        self._inner = self._new_inner(self.class_names)

    def _new_inner(self, class_names: Sequence[str]) -> Detector:
        return create_detector(self.scorer, class_names=class_names, template=self.template)

    @property
    def needs(self) -> frozenset[str]:
        """What the score needs."""
        return self._inner.needs

    @property
    def fitted(self) -> bool:
        """Whether a search has been made."""
        return self.edit is not None

    @property
    def fit_options(self) -> frozenset[str]:  # type: ignore[override]
        """Every option: the edit or the score depends on it."""
        return frozenset(method_options(type(self)))

    # ---- fitting

    def fit_images(  # type: ignore[override]  # the search keeps no features
        self, images: Images, *, log_file: str | Path | None = None, progress: bool | None = None
    ) -> Self:
        """Search for what to drop; forgets an earlier edit and calibration.

        Args:
            images: labelled ID images (a source, a folder, ...).
            log_file: see `search`.
            progress: a bar on stderr; None shows it on a terminal only.

        Raises:
            UsageError: no backbone, or what `search` raises.
            DataError: labels that are missing or no class.
        """
        backbone = self._unedited()
        template = self.template or self._inner.default_template
        if not isinstance(template, str):
            raise UsageError(f"{self.name!r} searches with one template, got {len(template)}: give a string.")
        common: dict[str, Any] = {
            "class_names": self._given_names or None,
            "template": template,
            "ood_weight": self.ood_weight,
            "k": self.cells_k,
            "seed": self.seed,
            "progress": progress,
        }
        names = ("kind", "order", "ratios", "drop")
        edit = search(backbone, images, log_file=log_file, **{n: getattr(self, n) for n in names}, **common)
        if self.finetune_epochs and any(edit.ratios.values()):
            common |= {"learning_rate": self.learning_rate, "batch_size": self.batch_size}
            common["epochs"] = self.finetune_epochs
            edit = finetune(backbone, images, edit, **common)
        self.use(edit)
        self._remember(open_source(images))
        return self

    def use(self, edit: SeTAREdit) -> Self:
        """Take an edit made elsewhere instead of searching for one; forgets an earlier edit and calibration.

        Args:
            edit: of the backbone of this detector; its class names are taken where none are set.

        Raises:
            UsageError: no backbone, an edit of another one, or a score that needs fitting itself.

        Example:
            >>> SeTAR(class_names=names).use(SeTAREdit.from_pretrained("edit/"))  # doctest: +SKIP
        """
        backbone = self._unedited()
        edited = edit.apply(backbone)
        made = edit.record.get("search") or edit.record.get("finetune") or {}
        class_names = self._given_names or list(made.get("class_names", []))
        inner = self._new_inner(class_names)
        inner.attach(edited)
        if not inner.fitted:
            raise UsageError(
                f"{self.scorer!r} would have to be fitted itself: take a score that need not, such as 'mcm'."
            )
        self.edit, self.class_names, self._inner, self._held = edit, class_names, inner, Held(self.name)
        self._take(edited, backbone)
        self.calibration = None
        return self

    def set_params(self, **params: Any) -> Self:
        """Change options; the fit and the calibration are dropped.

        Raises:
            UsageError: an unknown option.
        """
        super().set_params(**params)
        if not params:
            return self
        edit, self.edit, self._inner = self.edit, None, self._new_inner(self.class_names)
        if self._original is not None:
            self._held = Held(self.name)
            self._take(self._original, self._original)
        elif edit is not None and self._held.record:  # the recorded one is loaded when needed
            self._held = replace(self._held.recording(fingerprint=edit.fingerprint), backbone=None)
        return self

    # ---- backbone

    def _unedited(self) -> Backbone:
        backbone = backbone_of(self)  # loads a recorded one, and edits it
        return self._original or backbone

    def _attach(self, backbone: Backbone) -> None:
        backbone.require(*sorted({"image", "local", "blocks"} | needs_of(self._inner, backbone)))

    def attach(self, backbone: Backbone | str) -> None:
        """Take an edited backbone, or edit the one given."""
        backbone = create_backbone(backbone) if isinstance(backbone, str) else backbone
        original = None if backbone.edits else backbone
        if self.edit is not None and original is not None:
            backbone = self.edit.apply(original)
        self._take(backbone, original)

    def _take(self, backbone: Backbone, original: Backbone | None) -> None:
        super().attach(backbone)
        self._original = original
        if self.edit is not None:
            # The edit is saved with the detector: what loads the rest is the original's name.
            self._held = self._held.recording(spec=backbone.spec.partition("+edit:")[0])

    # ---- scores

    def _score(self, features: FeatureSet) -> Tensor:
        return self._inner._score(features)

    def _predict(self, features: FeatureSet) -> Tensor | None:
        return self._inner._predict(features)

    # ---- storage

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors`, and in folders of their own the `edit` and the `score`."""
        if self.edit is None:
            (Path(folder) / "edit" / "edit.json").unlink(missing_ok=True)  # of an earlier fit
        else:
            self.edit.save_pretrained(Path(folder) / "edit")
            self._inner.save_pretrained(Path(folder) / "score")
        super().save_pretrained(folder)

    @classmethod
    def _empty(cls, path: Path, config: dict[str, Any]) -> Self:
        made = super()._empty(path, config)
        if (path / "edit" / "edit.json").is_file():
            made.edit = SeTAREdit.from_pretrained(path / "edit")
            made._inner = Detector.from_pretrained(path / "score")
        return made
