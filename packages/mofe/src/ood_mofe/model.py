"""The network that MoFE trains: experts in place of the last block, their router, the final norm, the heads."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from ood_core import _check
from ood_core.backbones.base import Backbone
from ood_core.errors import UsageError
from torch import Tensor, nn

from ood_mofe.dispatch import expert_class_token, expert_tokens
from ood_mofe.experts import StackedExperts

__all__ = ["GroupHeads", "MoFENetwork", "Readout", "require_class_token"]


class GroupHeads(nn.Module):
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

    group: Tensor
    position: Tensor
    sizes: Tensor
    outputs: Tensor

    def __init__(self, group: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        weight, bias = _check.tensors(weight=(weight, "R D"), bias=(bias, "R"))
        group = _check.labels("group", group, len(group), len(weight))
        sizes = torch.bincount(group)
        if len(group) + len(sizes) != len(weight) or not sizes.all():
            raise ValueError(
                f"weight has {len(weight)} rows, which must be one per class and one per group; the groups' sizes are "
                f"{sizes.tolist()}."
            )
        self.weight, self.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
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
        return self(token, group).softmax(-1).gather(1, self.sizes[group][:, None])[:, 0]

    def log_probabilities(self, token: Tensor) -> Tensor:
        """[N, C], each class in the head of its own group."""
        total = torch.stack([logits.logsumexp(1) for logits in self.by_group(token)], 1)
        return self._every(token)[:, : len(self.group)] - total[:, self.group]

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


class Readout(nn.Module):
    """The heads, and what they say about class tokens [N, D] behind experts and final norm.

    Args:
        heads: one per group of classes, or None.
        global_head: one over all classes, or None.
    """

    def __init__(self, heads: GroupHeads | None, global_head: GlobalHead | None) -> None:
        super().__init__()
        self.heads, self.global_head = heads, global_head

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """Rebuild from a `state_dict`."""
        heads = {name: state.get(f"heads.{name}") for name in ("group", "weight", "bias")}
        globally = {name: state.get(f"global_head.{name}") for name in ("weight", "bias")}
        return cls(
            None if heads["group"] is None else GroupHeads(**heads),  # type: ignore[arg-type]
            None if globally["weight"] is None else GlobalHead(**globally),  # type: ignore[arg-type]
        )

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

    Tokens z [B, T, D] are what `Backbone.prefix` gives. The router reads the class token z[:, 0]; the class token
    behind its expert and the final norm is the feature that heads and scores read.

    Args:
        experts: E blocks, one per group of classes; or a single one that all groups share.
        norm: the final norm.
        group: int64 [C], group of each class.
        group_heads: a head per group, with "others".
        global_head: a head over all classes.
        router_norm: "layer_norm" (without parameters) or "none", of the router's input.
        gate: "none" takes the block's result as it is; "prob" weights what the block adds to the class token by the
            router's probability; "renorm" by that probability divided by the sum over the `top_k`.
        top_k: experts per image; more than one needs a gate. Heads and banks are those of the first.
        tokens: "cls" computes the class token alone, "all" the whole block; they agree.
        seed: of router and heads.

    Attributes:
        router: [D, E].
        readout: the heads.

    Raises:
        UsageError: options that do not go together.
        ValueError: an option out of range.

    Source: Eq. 3-7. That an expert replaces the whole last block, and the shared norm, are our reading.
    """

    def __init__(
        self,
        experts: StackedExperts,
        norm: nn.LayerNorm,
        group: Tensor,
        *,
        group_heads: bool = True,
        global_head: bool = True,
        router_norm: str = "layer_norm",
        gate: str = "none",
        top_k: int = 1,
        tokens: str = "cls",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.router_norm = _check.choice("router_norm", router_norm, ("layer_norm", "none"))
        self.gate = _check.choice("gate", gate, ("none", "prob", "renorm"))
        self.tokens = _check.choice("tokens", tokens, ("cls", "all"))
        self.top_k = _check.integer("top_k", top_k, 1, len(experts), "the number of experts")
        if top_k > 1 and gate == "none":
            raise UsageError(f"top_k={top_k} experts need weights: pass gate='renorm' or gate='prob'.")
        groups = int(group.max()) + 1
        if len(experts) not in (1, groups):
            raise UsageError(f"There are {len(experts)} experts for {groups} groups of classes: give one per group.")
        self.experts, self.norm = experts, norm
        generator = torch.Generator().manual_seed(seed)
        like = experts.norm1_weight

        def draw(rows: int, columns: int, scale: float) -> Tensor:
            return scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(like)

        self.router = nn.Parameter(draw(experts.width, len(experts), 0.02))
        rows = draw(len(group) + groups, experts.width, 0.01)
        heads = GroupHeads(group.to(like.device), rows, rows.new_zeros(len(rows))) if group_heads else None
        rows = draw(len(group), experts.width, 0.01)
        self.readout = Readout(heads, GlobalHead(rows, rows.new_zeros(len(rows))) if global_head else None)

    @classmethod
    def from_backbone(cls, backbone: Backbone, group: Tensor, *, experts: int, **options: Any) -> Self:
        """Copies of a backbone's last block and final norm: at first the class token is the backbone's own.

        Args:
            backbone: one that reads its class token; it is not changed.
            group: int64 [C].
            experts: copies of the block: one per group, or 1.
            **options: of the class.

        Raises:
            UsageError: a backbone without a class token, or with a block or norm of another kind.
        """
        require_class_token(backbone)
        copies = StackedExperts.from_block(backbone.last_block, experts)
        return cls(copies, _copied_norm(backbone, copies.norm1_weight), group, **options)

    def router_input(self, tokens: Tensor) -> Tensor:
        """The class tokens as the router reads them, [B, D]."""
        x = tokens[:, 0].to(self.router.dtype)
        return F.layer_norm(x, (x.shape[-1],), eps=self.experts.eps) if self.router_norm == "layer_norm" else x

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
        if self.gate == "none":
            return self._behind(tokens, expert)
        probability = router_logits.softmax(-1)
        ranked = probability.detach().scatter(1, expert[:, None], math.inf).topk(self.top_k).indices
        weight = probability.gather(1, ranked)
        if self.gate == "renorm":
            weight = weight / weight.sum(1, keepdim=True)
        start = tokens[:, 0].to(weight.dtype)
        added = [self._behind(tokens, chosen) - start for chosen in ranked.T]
        return start + (weight.T[..., None] * torch.stack(added)).sum(0)

    def _behind(self, tokens: Tensor, expert: Tensor) -> Tensor:
        if self.tokens == "cls":
            return expert_class_token(tokens, expert, self.experts)
        return expert_tokens(tokens, expert, self.experts)[:, 0]

    def features(self, tokens: Tensor) -> dict[str, Tensor]:
        """What detectors read: "router" (logits [B, E]) and "token" (class token behind expert and norm, [B, D])."""
        logits = self.router_logits(tokens)
        token = self.norm(self.class_token(tokens, logits.argmax(1), logits))
        return {"router": logits.float(), "token": token.float()}


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
