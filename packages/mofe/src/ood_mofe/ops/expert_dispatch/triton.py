# mypy: allow-untyped-defs
"""The form for CUDA and HIP devices: every expert's linear map in one launch, and nothing waits for the host.

Every kernel has its file in `kernels`. B images, T tokens, D width, H heads, E experts, R = B * T rows (R = B for the
class token).

1. `plan` sorts the B image ids by expert and deals out tiles of rows (a counting sort in one program). Nothing else is
   sorted: a tile is a stretch of the sorted ids, looks up where its rows lie, and reads and writes them there.
2. `grouped_linear` makes ROWS x COLUMNS outputs per program, DEPTH features at a time. A tile never holds rows of two
   experts. How many tiles that makes is known on the device only, so the grid has an upper bound of them, less than E
   too many, which return at once. Per head (G = H groups) it also takes the query through the key weights and the mean
   through the value weights. Bias, GELU, LayerScale and residual are added while the tile is in registers.
   `weight_gradient` and `row_sums` are its backward pass, one tile of one expert's gradient per program, which makes
   that of an expert without rows exactly zero and every sum reproducible.
3. `attend` is the class token's attention: TILE tokens of an image per program. It normalises them on the fly, takes
   softmax over its tile and stores the weighted sum of the tile, which `_Attention` brings to a common maximum and
   adds up. `attend_backward` makes the same tiles again: only maxima and sums [B, H] are kept. A tile is read twice
   (the weights must be known before the sum), the second time from the cache.

Bytes and FLOP of the class token, ViT-B/16-like: B = 256, T = 257, D = 768, H = 12, E = 7, numbers of 4 bytes.
`grouped_linear`: 199 MB of weights, each read once from memory and then ROWS at a time from the cache, 3.6 GFLOP.
`attend`: 202 MB of tokens and 2 * 47 MB of partial sums (one program per image would save the latter, but would leave
most of the device waiting for its loads), 3.2 GFLOP. So memory bounds both, or, in full float32 without matrix units,
arithmetic does. On all tokens: 980 GFLOP, bound by arithmetic. Launches cost more than the kernels at this size unless
the frozen part of the model keeps the device busy. Nothing here has been timed on a GPU.

Traps: rows behind an expert's last are read as zeros and never stored; tokens behind the last get the logit -inf, and
no tile is without tokens, so no maximum is -inf; float32 means "ieee" unless torch itself may use tf32, which keeps 11
bits, exactly enough for weights of half precision; sums over D of z * z would cancel, so means and squared deviations
of chunks of D are merged; strides of the weights are arguments, because keys and backward passes read them transposed;
autocast would hand half-precision rows to kernels that store float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ood_mofe.experts import StackedExperts
from ood_mofe.ops.expert_dispatch import torch as loop
from ood_mofe.ops.expert_dispatch.kernels.attend import attend
from ood_mofe.ops.expert_dispatch.kernels.attend_backward import attend_backward
from ood_mofe.ops.expert_dispatch.kernels.grouped_linear import _grouped_linear, grouped_linear
from ood_mofe.ops.expert_dispatch.kernels.plan import Plan, planned
from ood_mofe.ops.expert_dispatch.kernels.row_sums import row_sums
from ood_mofe.ops.expert_dispatch.kernels.weight_gradient import weight_gradient


def all_tokens(tokens: Tensor, expert: Tensor, experts: StackedExperts) -> Tensor:
    """The block of each image's expert [B, T, D]; float64 goes to the torch backend."""
    if tokens.dtype == torch.float64:
        return loop.all_tokens(tokens, expert, experts)
    plan = planned(expert, len(experts), tokens.shape[1], _precision(tokens))
    with _one_device_and_precision(tokens):
        x = tokens.float()[:, :, None].contiguous()
        normed = _normed(x, experts.norm1_weight, experts.norm1_bias, experts.eps, plan)
        qkv = _linear(normed, experts.qkv_weight[:, None], experts.qkv_bias[:, None], plan=plan)
        q, k, v = qkv.view(*tokens.shape[:2], 3, experts.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return _behind_attention(mixed.reshape(x.shape), x, experts, plan)[:, :, 0].to(tokens.dtype)


def class_token(tokens: Tensor, expert: Tensor, experts: StackedExperts) -> Tensor:
    """Its first token [B, D]; float64 goes to the torch backend.

    If `tokens` require a gradient, normalisation and attention of all tokens run in torch; the rest does not change.
    """
    if tokens.dtype == torch.float64:
        return loop.class_token(tokens, expert, experts)
    plan = planned(expert, len(experts), 1, _precision(tokens))
    with _one_device_and_precision(tokens):
        x = tokens[:, :1, None].float().contiguous()
        mixed = _class_attention(x, tokens, experts, plan)
        return _behind_attention(mixed.reshape(x.shape), x, experts, plan)[:, 0, 0].to(tokens.dtype)


def compiled() -> bool:
    """Whether the kernels are compiled for a device; False in the interpreter (TRITON_INTERPRET=1), which takes any."""
    return isinstance(_grouped_linear, triton.JITFunction)


# ---- the block


def _class_attention(x: Tensor, tokens: Tensor, experts: StackedExperts, plan: Plan) -> Tensor:
    """What the class token x [B, 1, 1, D] gathers from the tokens, by head [B, 1, H, D / H]."""
    p, heads = experts, (3, experts.num_heads, -1)
    query, key, value = p.qkv_weight.unflatten(1, heads).unbind(1)  # [E, H, D / H, D]
    query_bias, _, value_bias = p.qkv_bias.unflatten(1, heads).unbind(1)  # the key's bias cancels in the softmax
    normed = _normed(x, p.norm1_weight, p.norm1_bias, p.eps, plan)
    q = _linear(normed, query.flatten(1, 2)[:, None], query_bias.flatten(1)[:, None], plan=plan)
    keys = _linear(q.unflatten(-1, heads[1:]).squeeze(2), key.mT, gain=p.norm1_weight, plan=plan).squeeze(1)
    # Its square root divides the logits, not the keys: one number less per head and feature.
    scale = key.shape[2] ** -0.5
    if tokens.requires_grad and torch.is_grad_enabled():
        mean = _attention_in_torch(keys, tokens.float(), scale, p.eps)
    else:
        mean = _Attention.apply(keys, tokens.detach().contiguous(), scale, p.eps, plan.precision)
    gain, shift = (_OfImages.apply(x, plan)[:, None] for x in (p.norm1_weight, p.norm1_bias))
    return _linear((gain * mean + shift)[:, None], value, value_bias, plan=plan)


def _attention_in_torch(keys: Tensor, tokens: Tensor, scale: float, eps: float) -> Tensor:
    normed = F.layer_norm(tokens, tokens.shape[2:], eps=eps)
    return (scale * keys @ normed.mT).softmax(-1) @ normed


def _behind_attention(mixed: Tensor, x: Tensor, experts: StackedExperts, plan: Plan) -> Tensor:
    """Output projection and MLP with their residuals, rows [B, T, 1, D]."""
    p = experts
    x = _linear(mixed, p.out_weight[:, None], p.out_bias[:, None], p.scale1, x, plan=plan)
    normed = _normed(x, p.norm2_weight, p.norm2_bias, p.eps, plan)
    up = _linear(normed, p.up_weight[:, None], p.up_bias[:, None], plan=plan, activation=p.activation)
    return _linear(up, p.down_weight[:, None], p.down_bias[:, None], p.scale2, x, plan=plan)


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float, plan: Plan) -> Tensor:
    """LayerNorm of rows [B, T, 1, D] with the parameters of each image's expert."""
    gain, shift = (_OfImages.apply(parameter, plan)[:, None, None] for parameter in (weight, bias))
    return gain * F.layer_norm(x, x.shape[3:], eps=eps) + shift


def _precision(tokens: Tensor) -> str:
    """Of products: all of float32 where torch's own products are, else tf32."""
    exact = tokens.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact and not torch.is_autocast_enabled(tokens.device.type) else "tf32"


@contextmanager
def _one_device_and_precision(tokens: Tensor) -> Iterator[None]:
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(tokens), torch.autocast(tokens.device.type, enabled=False):
        yield


# ---- gradients


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    plan: Plan,
    activation: str = "",
) -> Tensor:
    """residual + gain * activation(x @ weight.mT + bias) with the parameters of each image's expert: [B, T, G, N].

    x [B, T, G, K], weight [E, G, N, K], bias [E, G, N], gain [E, N], residual [B, T, G, N]; not both of activation
    and gain.
    """
    return _Linear.apply(x.contiguous(), weight, bias, gain, residual, plan, activation, torch.is_grad_enabled())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gain, residual, plan, activation, trained):
        keep = trained and (gain is not None or activation != "")
        out, before = grouped_linear(x, weight, bias, gain, residual, plan, activation, keep)
        ctx.save_for_backward(x, weight, gain, before)
        ctx.plan, ctx.activation, ctx.biased = plan, activation, bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, weight, gain, before = ctx.saved_tensors
        plan, needs = ctx.plan, ctx.needs_input_grad
        d_weight = d_bias = d_gain = None
        d = d_out.contiguous()
        if gain is not None:
            d_gain = row_sums((d * before).sum(2), plan).to(gain.dtype) if needs[3] else None
            d = d * gain.index_select(0, plan.expert)[:, None, None]
        if ctx.activation:
            d = _ACTIVATION_GRADIENTS[ctx.activation](d, before)
        if needs[1]:
            d_weight = weight_gradient(x, d, weight, plan).to(weight.dtype)
        if ctx.biased and needs[2]:
            d_bias = row_sums(d.flatten(2), plan).unflatten(1, d.shape[2:]).to(weight.dtype)
        d_x = grouped_linear(d, weight.mT, None, None, None, plan, "", False)[0] if needs[0] else None
        return d_x, d_weight, d_bias, d_gain, d_out if needs[4] else None, None, None, None


def _quick_gelu_backward(d: Tensor, x: Tensor) -> Tensor:
    sigmoid = (1.702 * x).sigmoid()
    return d * sigmoid * (1 + 1.702 * x * (1 - sigmoid))


_ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward.default,
    "quick_gelu": _quick_gelu_backward,
}


class _OfImages(torch.autograd.Function):
    """Parameters [E, N] of each image's expert [B, N]; indexing itself would add gradients in any order."""

    @staticmethod
    def forward(ctx, parameter, plan):
        ctx.plan, ctx.dtype = plan, parameter.dtype
        return parameter.index_select(0, plan.expert).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        return row_sums(d.contiguous()[:, None], ctx.plan).to(ctx.dtype), None


class _Attention(torch.autograd.Function):
    """Means [B, H, D] of the normalised tokens [B, T, D], weighted by softmax(scale * keys [B, H, D] @ tokens)."""

    @staticmethod
    def forward(ctx, keys, tokens, scale, eps, precision):
        parts, tops, totals = attend(keys, tokens, scale, eps, precision)
        top = tops.amax(1)
        weights = (tops - top[:, None]).exp()
        total = (weights * totals).sum(1)
        mean = torch.einsum("bth,bthd->bhd", weights / total[:, None], parts)
        # Not the logsumexp, their sum: of large logits it keeps too few digits.
        ctx.save_for_backward(keys, tokens, mean, top, total)
        ctx.options = scale, eps, precision
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        keys, tokens, mean, top, total = ctx.saved_tensors
        d = d.contiguous()
        parts = attend_backward(keys, tokens, d, top, total, (d * mean).sum(2), *ctx.options)
        return parts.sum(1), None, None, None, None
