"""The network that MoFE trains: experts in place of the last block, their router, the final norm, the heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from ood_core import check
from ood_core.backbones.base import Backbone
from ood_core.errors import UsageError
from ood_core.options import flat_options
from torch import Tensor, nn

from ood_mofe.experts import StackedExperts
from ood_mofe.functional import CLIP_LOGIT_SCALE, _weighted
from ood_mofe.ops import expert_class_token, expert_tokens
from ood_mofe.options import Routing

__all__ = ["GroupHeads", "MoFENetwork", "Readout", "TextGroupHeads", "TextHead", "require_class_token"]


class _Heads(nn.Module):
    """A head for each group of classes, with one output more than classes: the last, "others".

    `_every` gives the outputs of all heads [N, C + G]: one per class, then one "others" per group.
    """

    group: Tensor
    position: Tensor
    sizes: Tensor
    outputs: Tensor

    def __init__(self, group: Tensor, rows: int) -> None:
        super().__init__()
        group = check.labels("group", group, len(group), rows)
        sizes = torch.bincount(group)
        if len(group) + len(sizes) != rows or not sizes.all():
            raise ValueError(
                f"weight has {rows} rows, which must be one per class and one per group; the groups' sizes are "
                f"{sizes.tolist()}."
            )
        self.register_buffer("group", group)
        for name, value in zip(("position", "sizes", "outputs"), _layout(group, sizes), strict=True):
            self.register_buffer(name, value, persistent=False)

    def __len__(self) -> int:
        return len(self.sizes)

    def forward(self, token: Tensor, group: Tensor) -> Tensor:
        """Logits [R, Q] of tokens [R, D], each in the head of one group; unused outputs are -inf."""
        rows = self.outputs[group]
        return self._every(token).gather(1, rows.clamp(min=0)).masked_fill(rows < 0, -math.inf)

    def by_group(self, token: Tensor) -> list[Tensor]:
        """Per group the logits [N, Q_g + 1] of all tokens [N, D]."""
        every = self._every(token)
        return [every[:, rows[rows >= 0]] for rows in self.outputs]

    def target(self, labels: Tensor, group: Tensor) -> Tensor:
        """Output of each class in the head of a group, "others" if it is not there; int64 [R]."""
        return torch.where(self.group[labels] == group, self.position[labels], self.sizes[group])

    def class_logits(self, token: Tensor, group: Tensor) -> Tensor:
        """Logits [N, C] without "others"; those of classes outside the `group` of each token are -inf."""
        return self._every(token)[:, : len(self.group)].masked_fill(self.group != group[:, None], -math.inf)

    def others(self, token: Tensor, group: Tensor) -> Tensor:
        """Probability [N] of "others" in the head of one group."""
        return self.others_odds(token, group).sigmoid()

    def others_odds(self, token: Tensor, group: Tensor) -> Tensor:
        """Log-odds [N] of "others" in the head of one group."""
        logits, others = self(token, group), self.sizes[group][:, None]
        return logits.gather(1, others)[:, 0] - logits.scatter(1, others, -math.inf).logsumexp(1)

    def log_probabilities(self, token: Tensor) -> Tensor:
        """[N, C], each class in the head of its own group."""
        total = torch.stack([logits.logsumexp(1) for logits in self.by_group(token)], 1)
        return self._every(token)[:, : len(self.group)] - total[:, self.group]

    def _every(self, token: Tensor) -> Tensor:
        raise NotImplementedError


class GroupHeads(_Heads):
    """A linear head for each group of classes, with one output more than classes: the last, "others".

    Args:
        group: int64 [C], group of each class, 0 to G - 1, none empty.
        weight: [C + G, D], a row per class and then one "others" per group.
        bias: [C + G].

    Raises:
        TypeError: tensors of another type.
        ValueError: shapes that do not fit, NaN, or an empty group.

    Example:
        >>> heads = GroupHeads(torch.tensor([0, 1, 0]), torch.zeros(5, 4), torch.tensor([1.0, 2.0, 3.0, 8.0, 9.0]))
        >>> heads(torch.zeros(2, 4), torch.tensor([0, 1])).tolist()
        [[1.0, 3.0, 8.0], [2.0, 9.0, -inf]]
    """

    def __init__(self, group: Tensor, weight: Tensor, bias: Tensor) -> None:
        weight, bias = check.tensors(weight=(weight, "R D"), bias=(bias, "R"))
        super().__init__(group, len(weight))
        self.weight, self.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())

    def _every(self, token: Tensor) -> Tensor:
        return F.linear(token, self.weight, self.bias)


def _layout(group: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Position of each class in its group, the sizes, and the row of every output of every group, or -1."""
    classes, groups = torch.arange(len(group), device=group.device), torch.arange(len(sizes), device=group.device)
    position = torch.empty_like(group)
    order = group.argsort(stable=True)
    position[order] = classes - (sizes.cumsum(0) - sizes)[group[order]]
    outputs = group.new_full((len(sizes), int(sizes.max()) + 1), -1)
    outputs[group, position] = classes
    outputs[groups, sizes] = len(group) + groups
    return position, sizes, outputs


class GlobalHead(nn.Module):
    """A linear head over all classes; `nn.Linear` would draw its weights from the caller's random numbers.

    Args:
        weight: [C, D].
        bias: [C].
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())

    def forward(self, token: Tensor) -> Tensor:
        """Logits [N, C]."""
        return F.linear(token, self.weight, self.bias)


class TextHead(nn.Module):
    """CLIP's own classifier, of which nothing is learned: cosines of the projected class token and the classes' texts.

    Args:
        weight: text features [C, d], unit norm.
        projection: [D, d], from class tokens behind the final norm to the space of the texts.
        logit_scale: factor of the cosines, above 0: the backbone's; CLIP's published models have 100.

    Raises:
        ValueError: shapes that do not fit, or a scale not above 0.
    """

    weight: Tensor
    projection: Tensor
    logit_scale: Tensor

    def __init__(self, weight: Tensor, projection: Tensor, logit_scale: Tensor | float = CLIP_LOGIT_SCALE) -> None:
        super().__init__()
        weight, projection = check.tensors(weight=(weight, "C d"), projection=(projection, "D d"))
        self.register_buffer("weight", weight.clone())
        self.register_buffer("projection", projection.clone())
        self.register_buffer("logit_scale", _scale(logit_scale, weight))

    def forward(self, token: Tensor) -> Tensor:
        """Logits [N, C], `logit_scale` times the cosines."""
        return _cosine_logits(token, self.projection, self.weight, self.logit_scale)


class TextGroupHeads(_Heads):
    """`TextHead` divided among the groups, each with one vector more, which is learned: "others".

    Args:
        group: int64 [C], group of each class.
        weight: text features [C, d], unit norm.
        projection: [D, d].
        others_weight: [G, d]; None starts with minus the mean of each group's texts.
        logit_scale: as of `TextHead`.

    Raises:
        ValueError: shapes that do not fit, an empty group, or a scale not above 0.

    Source: Eq. 9 for CLIP. That the classes' texts stay as they are is our reading.
    """

    weight: Tensor
    projection: Tensor
    logit_scale: Tensor

    def __init__(
        self,
        group: Tensor,
        weight: Tensor,
        projection: Tensor,
        others_weight: Tensor | None = None,
        logit_scale: Tensor | float = CLIP_LOGIT_SCALE,
    ) -> None:
        weight, projection = check.tensors(weight=(weight, "C d"), projection=(projection, "D d"))
        if others_weight is None:
            others_weight = torch.stack([-weight[group == g].mean(0) for g in range(int(group.max()) + 1)])
        super().__init__(group, len(weight) + len(others_weight))
        self.register_buffer("weight", weight.clone())
        self.register_buffer("projection", projection.clone())
        self.register_buffer("logit_scale", _scale(logit_scale, weight))
        self.others_weight = nn.Parameter(others_weight.detach().clone())

    def _every(self, token: Tensor) -> Tensor:
        return _cosine_logits(token, self.projection, torch.cat([self.weight, self.others_weight]), self.logit_scale)


def _cosine_logits(token: Tensor, projection: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return scale * F.normalize(token @ projection, dim=-1) @ rows.T


def _scale(value: Tensor | float, like: Tensor) -> Tensor:
    return like.new_tensor(check.positive("logit_scale", float(value)))


class Readout(nn.Module):
    """The heads, and what they say about class tokens [N, D] behind experts and final norm.

    Args:
        heads: one per group of classes, or None.
        global_head: one over all classes, or None.
    """

    def __init__(self, heads: _Heads | None, global_head: GlobalHead | TextHead | None) -> None:
        super().__init__()
        self.heads, self.global_head = heads, global_head

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """Rebuild from a `state_dict`."""

        def made(name: str, learned: Any, text: Any) -> Any:
            found = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
            return (text if "projection" in found else learned)(**found) if found else None

        return cls(made("heads.", GroupHeads, TextGroupHeads), made("global_head.", GlobalHead, TextHead))

    def class_logits(self, token: Tensor, expert: Tensor, head: str) -> Tensor:
        """[N, C] by which classes are told apart.

        Args:
            token: [N, D].
            expert: int64 [N], as routed.
            head: "global"; "expert": the logits of the expert's classes, -inf for the others; "groups", where all
                groups share one block: log probabilities, of each class in the head of its own group.
        """
        if head == "global":
            assert self.global_head is not None
            return self.global_head(token)
        assert self.heads is not None
        return self.heads.log_probabilities(token) if head == "groups" else self.heads.class_logits(token, expert)


class MoFENetwork(nn.Module):
    """Experts, router, final norm and heads behind a frozen trunk.

    `features` and `enter` take tokens [B, T, D] as `Backbone.prefix(images, network.blocks)` gives them; `enter` runs
    the blocks that are trained below the experts, if there are any, and gives z, which the other methods take. The
    router reads z once per image: its expert is that of every layer. The class token behind experts and final norm is
    the feature that heads and scores read.

    Args:
        experts: E blocks, one per group of classes; or a single one that all groups share.
        norm: the final norm.
        group: int64 [C], group of each class.
        lower: experts of the layers below, bottom first, as many in each.
        unfrozen: blocks below all experts, bottom first, each a single "expert".
        group_heads: a head per group, with "others".
        global_head: a head over all classes.
        text_head: the classes' texts in place of learned heads; then there is a global head in any case.
        patches: how many of the last tokens these are.
        routing: how an image finds its experts, see `Routing`.
        seed: of router and heads.

    Attributes:
        router: [D, E].
        readout: the heads.

    Raises:
        UsageError: options that do not go together.
        ValueError: an option out of range.

    Source: Eq. 3-7. That an expert replaces the whole last block, and the shared norm, are our reading; so is the
    default `gate="none"`, which is not Eq. 7: that is "literal".
    """

    @flat_options
    def __init__(
        self,
        experts: StackedExperts,
        norm: nn.LayerNorm,
        group: Tensor,
        *,
        lower: Sequence[StackedExperts] = (),
        unfrozen: Sequence[StackedExperts] = (),
        group_heads: bool = True,
        global_head: bool = True,
        text_head: TextHead | None = None,
        patches: int = 0,
        routing: Routing = Routing(),
        seed: int = 0,
    ) -> None:
        super().__init__()
        routing.check(len(experts))
        self.routing = routing
        groups = int(group.max()) + 1
        if len(experts) not in (1, groups):
            raise UsageError(f"There are {len(experts)} experts for {groups} groups of classes: give one per group.")
        self.unfrozen: Any = nn.ModuleList(unfrozen)
        self.lower: Any = nn.ModuleList(lower)
        self.experts, self.norm, self.patches = experts, norm, patches
        generator = torch.Generator().manual_seed(seed)

        def draw(rows: int, columns: int, scale: float) -> Tensor:
            return scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(experts.norm1_weight)

        self.router = nn.Parameter(draw(experts.width, len(experts), 0.02))
        group = group.to(experts.norm1_weight.device)
        if text_head is None:
            rows = [draw(count, experts.width, 0.01) for count in (len(group) + groups, len(group))]
            heads: _Heads | None = GroupHeads(group, rows[0], rows[0].new_zeros(len(rows[0]))) if group_heads else None
            self.readout = Readout(heads, GlobalHead(rows[1], rows[1].new_zeros(len(rows[1]))) if global_head else None)
        else:
            given = {"projection": text_head.projection, "logit_scale": text_head.logit_scale}
            heads = TextGroupHeads(group, text_head.weight, **given) if group_heads else None
            self.readout = Readout(heads, text_head)

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        group: Tensor,
        *,
        experts: int,
        expert_layers: int = 1,
        unfreeze_blocks: int = 0,
        texts: Tensor | None = None,
        **options: Any,
    ) -> Self:
        """Copies of a backbone's last blocks and final norm: at first the class token is the backbone's own.

        Args:
            backbone: one that reads its class token; it is not changed.
            group: int64 [C].
            experts: copies of a block: one per group, or 1.
            expert_layers: last blocks that have experts.
            unfreeze_blocks: blocks below them that are trained, too.
            texts: text features [C, d] for a `TextHead`, unit norm.
            **options: of the class.

        Raises:
            UsageError: a backbone without a class token, with fewer blocks, or with blocks or a norm of another kind.
        """
        require_class_token(backbone)
        check_depth(backbone, expert_layers, unfreeze_blocks)
        trained = [layer.module for layer in backbone.layers()[-(unfreeze_blocks + expert_layers) :]]
        below = [StackedExperts.from_block(block, 1) for block in trained[:unfreeze_blocks]]
        *lower, last = [StackedExperts.from_block(block, experts) for block in trained[unfreeze_blocks:]]
        if texts is not None:
            projection = image_projection(backbone, last.width)
            options["text_head"] = TextHead(texts.to(last.norm1_weight), projection, backbone.logit_scale)
        options["patches"] = math.prod(backbone.grid or ())
        norm = _copied_norm(backbone, last.norm1_weight)
        return cls(last, norm, group, lower=lower, unfrozen=below, **options)

    @property
    def expert_layers(self) -> int:
        """Layers that have experts."""
        return len(self.lower) + 1

    @property
    def unfreeze_blocks(self) -> int:
        """Blocks below them that are trained, too."""
        return len(self.unfrozen)

    @property
    def blocks(self) -> int:
        """All blocks that are trained; the trunk ends below them."""
        return self.unfreeze_blocks + self.expert_layers

    def enter(self, tokens: Tensor) -> Tensor:
        """Input z [B, T, D] of the first expert layer from that of the first trained block."""
        for block in self.unfrozen:
            tokens = expert_tokens(tokens, torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device), block)
        return tokens

    def router_input(self, tokens: Tensor) -> Tensor:
        """What the router reads of z, [B, D]."""
        read = tokens[:, 0] if self.routing.router_reads == "class" else tokens[:, -self.patches :].mean(1)
        x = read.to(self.router.dtype)
        return F.layer_norm(x, (x.shape[-1],), eps=self.experts.eps) if self.routing.router_norm == "layer_norm" else x

    def router_logits(self, tokens: Tensor) -> Tensor:
        """[B, E]; Eq. 6 is their softmax."""
        return self.router_input(tokens) @ self.router

    def class_token(self, tokens: Tensor, expert: Tensor, router_logits: Tensor) -> Tensor:
        """Class tokens [R, D] behind the experts, before the final norm.

        Args:
            tokens: z [R, T, D].
            expert: int64 [R], the first (with `top_k=1` the only) expert of each row; more follow the router.
            router_logits: [R, E]; without a gate they are not read.
        """
        if self.routing.gate == "none":
            return self._behind(tokens, expert)
        probability = router_logits.softmax(-1)
        ranked = probability.detach().scatter(1, expert[:, None], math.inf).topk(self.routing.top_k).indices
        weight = probability.gather(1, ranked)
        if self.routing.gate == "renorm":
            weight = weight / weight.sum(1, keepdim=True)
        # `mix_experts` without its checks: of weights that have diverged the training loop says what can be done.
        results = torch.stack([self._behind(tokens, chosen) for chosen in ranked.T], 1)
        if self.routing.gate == "literal":
            return _weighted(results, weight)
        start = tokens[:, 0].to(weight.dtype)
        return start + _weighted(results - start[:, None], weight)

    def _behind(self, tokens: Tensor, expert: Tensor) -> Tensor:
        for layer in self.lower:
            tokens = expert_tokens(tokens, expert, layer)
        if self.routing.tokens == "cls":
            return expert_class_token(tokens, expert, self.experts)
        return expert_tokens(tokens, expert, self.experts)[:, 0]

    def features(self, tokens: Tensor) -> dict[str, Tensor]:
        """What detectors read of the trunk's tokens.

        Args:
            tokens: as `Backbone.prefix(images, network.blocks)` gives them, [B, T, D].

        Returns:
            "router" (logits [B, E]) and "token" (class token behind expert and norm, [B, D]).
        """
        tokens = self.enter(tokens)
        logits = self.router_logits(tokens)
        token = self.norm(self.class_token(tokens, logits.argmax(1), logits))
        return {"router": logits.float(), "token": token.float()}


def image_projection(backbone: Backbone, width: int) -> Tensor:
    """The linear map [D, d] from class tokens behind the final norm to the space of the texts."""
    rows = torch.eye(width, device=backbone.device, dtype=backbone.dtype)
    return backbone.project(rows)  # type: ignore[attr-defined]  # all with texts have it


def check_depth(backbone: Backbone, expert_layers: int, unfreeze_blocks: int) -> None:
    """Raise a `UsageError` if a backbone has fewer blocks than are to be trained."""
    depth = len(backbone.layers())
    if expert_layers + unfreeze_blocks > depth:
        raise UsageError(
            f"expert_layers={expert_layers} and unfreeze_blocks={unfreeze_blocks} are {expert_layers + unfreeze_blocks}"
            f" blocks, and {backbone.spec!r} has {depth}: pass fewer."
        )


def require_class_token(backbone: Backbone) -> None:
    """Raise a `UsageError` unless the backbone's image embedding is read from its class token."""
    backbone.require("image", "blocks")
    if not backbone.reads_class_token:
        raise UsageError(
            f"Backbone {backbone.spec!r} does not read its image embedding from a class token, which is what the "
            "experts compute: use 'tiny', 'timm:vit_base_patch14_dinov2.lvd142m' or 'open_clip:ViT-B-16/openai'."
        )


def _copied_norm(backbone: Backbone, like: Tensor) -> nn.LayerNorm:
    """A copy, to be trained, of the norm behind the last block."""
    norm = backbone.final_norm
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        raise UsageError(
            f"The final norm of {backbone.spec!r} is {norm}: MoFE trains a LayerNorm with weight and bias."
        )
    # No copy of the module: it is frozen, may be in half precision, and some libraries' norms cast their results.
    copied = nn.LayerNorm(list(norm.normalized_shape), norm.eps, device=like.device, dtype=like.dtype)
    copied.load_state_dict(norm.state_dict())
    return copied
