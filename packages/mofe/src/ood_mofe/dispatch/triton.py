# mypy: allow-untyped-defs
"""The form for CUDA and HIP devices: every expert's linear map in one launch, and nothing waits for the host.

B images, T tokens, D width, H heads, E experts, R = B * T rows (R = B for the class token).

1. `_plan` sorts the B image ids by expert and deals out tiles of rows (a counting sort in one program). Nothing else is
   sorted: a tile is a stretch of the sorted ids, looks up where its rows lie, and reads and writes them there.
2. `_grouped_linear` makes ROWS x COLUMNS outputs per program, DEPTH features at a time. A tile never holds rows of two
   experts. How many tiles that makes is known on the device only, so the grid has an upper bound of them, less than E
   too many, which return at once. Per head (G = H groups) it also takes the query through the key weights and the mean
   through the value weights. Bias, GELU, LayerScale and residual are added while the tile is in registers.
   `_weight_gradient` and `_row_sums` are its backward pass, one tile of one expert's gradient per program, which makes
   that of an expert without rows exactly zero and every sum reproducible.
3. `_attend` is the class token's attention: TILE tokens of an image per program. It normalises them on the fly, takes
   softmax over its tile and stores the weighted sum of the tile, which `_Attention` brings to a common maximum and
   adds up. `_attend_backward` makes the same tiles again: only maxima and sums [B, H] are kept. A tile is read twice
   (the weights must be known before the sum), the second time from the cache.

Bytes and FLOP of the class token, ViT-B/16-like: B = 256, T = 257, D = 768, H = 12, E = 7, numbers of 4 bytes.
`_grouped_linear`: 199 MB of weights, each read once from memory and then ROWS at a time from the cache, 3.6 GFLOP.
`_attend`: 202 MB of tokens and 2 * 47 MB of partial sums (one program per image would save the latter, but would leave
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
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ood_mofe.dispatch import torch as loop
from ood_mofe.experts import StackedExperts

# Rows of a tile: few when experts have few, so that little of a tile is empty.
_FEW, _MANY = 16, 64
_COLUMNS, _DEPTH = 64, 32
# Tokens of a tile in the attention, and rows of the sums behind the backward pass.
_TILE, _SUMMED = 64, 32
_PLANNED = 128
# Fusion is named because its default changes between versions of Triton.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def all_tokens(tokens: Tensor, expert: Tensor, experts: StackedExperts) -> Tensor:
    """The block of each image's expert [B, T, D]; float64 goes to the torch backend."""
    if tokens.dtype == torch.float64:
        return loop.all_tokens(tokens, expert, experts)
    plan = _planned(expert, len(experts), tokens.shape[1], _precision(tokens))
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
    plan = _planned(expert, len(experts), 1, _precision(tokens))
    with _one_device_and_precision(tokens):
        x = tokens[:, :1, None].float().contiguous()
        mixed = _class_attention(x, tokens, experts, plan)
        return _behind_attention(mixed.reshape(x.shape), x, experts, plan)[:, 0, 0].to(tokens.dtype)


def compiled() -> bool:
    """Whether the kernels are compiled for a device; False in the interpreter (TRITON_INTERPRET=1), which takes any."""
    return isinstance(_grouped_linear, triton.JITFunction)


# ---- the block


def _class_attention(x: Tensor, tokens: Tensor, experts: StackedExperts, plan: _Plan) -> Tensor:
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
        mean = _plain_attention(keys, tokens.float(), scale, p.eps)
    else:
        mean = _Attention.apply(keys, tokens.detach().contiguous(), scale, p.eps, plan.precision)
    gain, shift = (_OfImages.apply(x, plan)[:, None] for x in (p.norm1_weight, p.norm1_bias))
    return _linear((gain * mean + shift)[:, None], value, value_bias, plan=plan)


def _plain_attention(keys: Tensor, tokens: Tensor, scale: float, eps: float) -> Tensor:
    normed = F.layer_norm(tokens, tokens.shape[2:], eps=eps)
    return (scale * keys @ normed.mT).softmax(-1) @ normed


def _behind_attention(mixed: Tensor, x: Tensor, experts: StackedExperts, plan: _Plan) -> Tensor:
    """Output projection and MLP with their residuals, rows [B, T, 1, D]."""
    p = experts
    x = _linear(mixed, p.out_weight[:, None], p.out_bias[:, None], p.scale1, x, plan=plan)
    normed = _normed(x, p.norm2_weight, p.norm2_bias, p.eps, plan)
    up = _linear(normed, p.up_weight[:, None], p.up_bias[:, None], plan=plan, activation=p.activation)
    return _linear(up, p.down_weight[:, None], p.down_bias[:, None], p.scale2, x, plan=plan)


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float, plan: _Plan) -> Tensor:
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


class _Plan(NamedTuple):
    """Which image goes where.

    Attributes:
        expert: of each image, int64 [B].
        order: the images sorted by expert, int32 [B].
        offsets: where each expert's begin in `order`, int32 [E + 1].
        tile_expert: of each tile of rows, int32; E for tiles that were not needed.
        tile_row: its first row, counting T rows for every image in `order`, int32.
        height: rows of a tile.
        precision: of products, a word of Triton's.
    """

    expert: Tensor
    order: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    height: int
    precision: str


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    plan: _Plan,
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
        out, before = _launch_linear(x, weight, bias, gain, residual, plan, activation, keep)
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
            d_gain = _launch_row_sums((d * before).sum(2), plan).to(gain.dtype) if needs[3] else None
            d = d * gain.index_select(0, plan.expert)[:, None, None]
        if ctx.activation:
            d = _ACTIVATION_GRADIENTS[ctx.activation](d, before)
        if needs[1]:
            d_weight = _launch_weight_gradient(x, d, weight, plan).to(weight.dtype)
        if ctx.biased and needs[2]:
            d_bias = _launch_row_sums(d.flatten(2), plan).unflatten(1, d.shape[2:]).to(weight.dtype)
        d_x = _launch_linear(d, weight.mT, None, None, None, plan, "", False)[0] if needs[0] else None
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
        return _launch_row_sums(d.contiguous()[:, None], ctx.plan).to(ctx.dtype), None


class _Attention(torch.autograd.Function):
    """Means [B, H, D] of the normalised tokens [B, T, D], weighted by softmax(scale * keys [B, H, D] @ tokens)."""

    @staticmethod
    def forward(ctx, keys, tokens, scale, eps, precision):
        parts, tops, totals = _launch_attend(keys, tokens, scale, eps, precision)
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
        parts = _launch_attend_backward(keys, tokens, d, top, total, (d * mean).sum(2), *ctx.options)
        return parts.sum(1), None, None, None, None


# ---- launches


def _planned(expert: Tensor, experts: int, tokens: int, precision: str) -> _Plan:
    """The plan for rows of this many tokens per image."""
    images = len(expert)
    rows = images * tokens
    height = _FEW if rows < 2 * _MANY * experts else _MANY
    # Each expert that has rows has at most one tile that is not full.
    tiles = min(rows, (rows + min(experts, images) * (height - 1)) // height)
    order, offsets, tile_expert, tile_row = (
        torch.empty(size, dtype=torch.int32, device=expert.device) for size in (images, experts + 1, tiles, tiles)
    )
    with torch.cuda.device_of(expert):
        _plan[(1,)](
            expert.contiguous(),
            order,
            offsets,
            tile_expert,
            tile_row,
            images,
            tokens,
            experts,
            tiles,
            height,
            ROWS=_PLANNED,
            EXPERTS=triton.next_power_of_2(experts + 1),
            **_OPTIONS,
        )
    return _Plan(expert, order, offsets, tile_expert, tile_row, height, precision)


def _launch_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    residual: Tensor | None,
    plan: _Plan,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """The rows, and if they are to be kept, those before activation and gain."""
    images, tokens, groups, depth = x.shape
    experts, _, columns, _ = weight.shape
    out = x.new_empty(images, tokens, groups, columns)
    before = torch.empty_like(out) if keep else None
    _grouped_linear[(triton.cdiv(columns, _COLUMNS), len(plan.tile_expert), groups)](
        x,
        weight,
        None if bias is None else bias.contiguous(),
        None if gain is None else gain.contiguous(),
        residual,
        before,
        out,
        plan.order,
        plan.offsets,
        plan.tile_expert,
        plan.tile_row,
        experts,
        tokens,
        groups,
        columns,
        depth,
        *weight.stride(),
        ACTIVATION=activation,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
        PRECISION=plan.precision,
        **_linear_options(plan.height),
    )
    return out, before


def _linear_options(height: int) -> dict[str, object]:
    # 64 x 64 sums in full float32 need more registers than four warps have.
    return {"ROWS": height, **_OPTIONS, "num_warps": 4 if height == _FEW else 8}


def _launch_weight_gradient(x: Tensor, d: Tensor, weight: Tensor, plan: _Plan) -> Tensor:
    _, tokens, groups, depth = x.shape
    columns = d.shape[3]
    out = torch.empty_like(weight, dtype=torch.float32)
    _weight_gradient[(triton.cdiv(depth, _COLUMNS), triton.cdiv(columns, _COLUMNS), len(weight) * groups)](
        x,
        d,
        out,
        plan.order,
        plan.offsets,
        tokens,
        groups,
        columns,
        depth,
        *out.stride(),
        ROWS=_SUMMED,
        COLUMNS=_COLUMNS,
        PRECISION=plan.precision,
        **_OPTIONS,
    )
    return out


def _launch_row_sums(values: Tensor, plan: _Plan) -> Tensor:
    """Sums [E, N] of each expert's rows in [B, T, N]."""
    _, tokens, columns = values.shape
    experts = len(plan.offsets) - 1
    out = values.new_empty(experts, columns)
    _row_sums[(triton.cdiv(columns, _COLUMNS), experts)](
        values, out, plan.order, plan.offsets, tokens, columns, ROWS=_SUMMED, COLUMNS=_COLUMNS, **_OPTIONS
    )
    return out


def _launch_attend(
    keys: Tensor, tokens: Tensor, scale: float, eps: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Per tile of tokens: sums [B, tiles, H, D] weighted by exp(logit - maximum), maxima and sums of these weights."""
    images, count, width = tokens.shape
    heads, tiles = keys.shape[1], triton.cdiv(count, _TILE)
    parts = keys.new_empty(images, tiles, heads, width)
    tops, totals = keys.new_empty(2, images, tiles, heads)
    _attend[(tiles, images)](
        tokens, keys, parts, tops, totals, count, heads, width, scale, eps, **_attention_options(heads, precision)
    )
    return parts, tops, totals


def _launch_attend_backward(
    keys: Tensor,
    tokens: Tensor,
    d: Tensor,
    top: Tensor,
    total: Tensor,
    average: Tensor,
    scale: float,
    eps: float,
    precision: str,
) -> Tensor:
    """The keys' gradient, a part per tile of tokens [B, tiles, H, D]."""
    images, count, width = tokens.shape
    heads, tiles = keys.shape[1], triton.cdiv(count, _TILE)
    parts = keys.new_empty(images, tiles, heads, width)
    _attend_backward[(tiles, images)](
        tokens,
        keys,
        d,
        parts,
        top,
        total,
        average,
        count,
        heads,
        width,
        scale,
        eps,
        **_attention_options(heads, precision),
    )
    return parts


def _attention_options(heads: int, precision: str) -> dict[str, object]:
    # Products on matrix units have at least 16 rows.
    padded = max(16, triton.next_power_of_2(heads))
    return {"HEADS": padded, "TILE": _TILE, "DEPTH": _DEPTH, "PRECISION": precision, **_OPTIONS}


# ---- kernels


@triton.jit
def _plan(
    expert,  # int64 [B]
    order,  # [B]: images sorted by expert, in their order within one
    offsets,  # [E + 1]: where each expert's images begin in it
    tile_expert,  # [tiles]: E behind the last tile
    tile_row,  # [tiles]: its first row, of T rows per image
    B,
    T,
    E,
    tiles,
    height,  # of a tile
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two above E
):
    e = tl.arange(0, EXPERTS)[None, :]
    row = tl.arange(0, ROWS)
    counts = tl.full((EXPERTS,), 0, tl.int32)
    for start in range(0, B, ROWS):
        mine = tl.load(expert + start + row, start + row < B, -1)
        counts += tl.sum((mine[:, None] == e).to(tl.int32), 0)
    place = tl.cumsum(counts, 0) - counts
    tl.store(offsets + tl.arange(0, EXPERTS), place, tl.arange(0, EXPERTS) <= E)

    needed = tl.cdiv(counts * T, height)
    behind = tl.cumsum(needed, 0)
    # Row of a tile = height * its number + this.
    ahead = place * T - (behind - needed) * height
    for start in range(0, tiles, ROWS):
        tile = start + row
        mine = tl.minimum(tl.sum((behind[None, :] <= tile[:, None]).to(tl.int32), 1), E)
        first = height * tile + tl.sum(tl.where(mine[:, None] == e, ahead[None, :], 0), 1)
        tl.store(tile_expert + tile, mine, tile < tiles)
        tl.store(tile_row + tile, first, tile < tiles)

    for start in range(0, B, ROWS):
        mine = tl.load(expert + start + row, start + row < B, -1)
        member = (mine[:, None] == e).to(tl.int32)
        earlier = tl.cumsum(member, 0) - member
        at = tl.sum(member * (place[None, :] + earlier), 1)
        tl.store(order + at, start + row, start + row < B)
        place += tl.sum(member, 0)


@triton.jit
def _row(order, position, stop, T):
    image = tl.load(order + position // T, position < stop, 0).to(tl.int64)
    return image * T + position % T


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(0.7071067811865476 * x))
    if ACTIVATION == "quick_gelu":
        x = x / (1 + tl.exp(-1.702 * x))
    return x


@triton.jit
def _grouped_linear(
    x,  # [R, G, K]
    weight,  # [E, G, N, K]
    bias,  # [E, G, N] or None
    gain,  # [E, N] or None
    residual,  # [R, G, N] or None
    before,  # [R, G, N] or None: x @ weight + bias
    out,  # [R, G, N]: residual + gain * activation(before)
    order,
    offsets,
    tile_expert,
    tile_row,
    E,
    T,
    G,
    N,
    K,
    weight_expert,
    weight_group,
    weight_n,
    weight_k,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert >= E:
        return
    stop = tl.load(offsets + expert + 1) * T
    # Columns run fastest: programs that run together share their rows, and an expert's weights stay in the cache.
    group = tl.program_id(2)
    position = tl.load(tile_row + tl.program_id(1)) + tl.arange(0, ROWS)
    row_in = position < stop
    row = _row(order, position, stop, T) * G + group
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_in = column < N
    depth = tl.arange(0, DEPTH)
    x_at = x + row[:, None] * K + depth[None, :]
    matrix = weight + expert.to(tl.int64) * weight_expert + group * weight_group
    weight_at = matrix + column[None, :] * weight_n + depth[:, None] * weight_k
    y = tl.full((ROWS, COLUMNS), 0, tl.float32)
    for start in range(0, K, DEPTH):
        a = tl.load(x_at + start, row_in[:, None] & (start + depth[None, :] < K), 0.0)
        b = tl.load(weight_at + start * weight_k, column_in[None, :] & (start + depth[:, None] < K), 0.0)
        y = tl.dot(a, b.to(tl.float32), y, input_precision=PRECISION)

    if bias is not None:
        y += tl.load(bias + (expert * G + group) * N + column, column_in, 0.0).to(tl.float32)[None, :]
    at = row[:, None] * N + column[None, :]
    inside = row_in[:, None] & column_in[None, :]
    if before is not None:
        tl.store(before + at, y, inside)
    y = _activate(y, ACTIVATION)
    if gain is not None:
        y *= tl.load(gain + expert * N + column, column_in, 0.0).to(tl.float32)[None, :]
    if residual is not None:
        y += tl.load(residual + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, y, inside)


@triton.jit
def _weight_gradient(
    x,  # [R, G, K]
    y,  # [R, G, N]: gradient behind the linear map
    out,  # [E, G, N, K]
    order,
    offsets,
    T,
    G,
    N,
    K,
    out_expert,
    out_group,
    out_n,
    out_k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.program_id(2) // G
    group = tl.program_id(2) % G
    begin = tl.load(offsets + expert) * T
    stop = tl.load(offsets + expert + 1) * T
    total = tl.full((COLUMNS, COLUMNS), 0, tl.float32)
    for start in range(begin, stop, ROWS):
        position = start + tl.arange(0, ROWS)
        row = _row(order, position, stop, T) * G + group
        row_in = position < stop
        a = tl.load(y + row[None, :] * N + n[:, None], row_in[None, :] & (n[:, None] < N), 0.0)
        b = tl.load(x + row[:, None] * K + k[None, :], row_in[:, None] & (k[None, :] < K), 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = out + expert.to(tl.int64) * out_expert + group * out_group
    at = at + n[:, None] * out_n + k[None, :] * out_k
    tl.store(at, total, (n[:, None] < N) & (k[None, :] < K))


@triton.jit
def _row_sums(
    values,  # [R, N]
    out,  # [E, N]
    order,
    offsets,
    T,
    N,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(offsets + expert) * T
    stop = tl.load(offsets + expert + 1) * T
    total = tl.full((COLUMNS,), 0, tl.float32)
    for start in range(begin, stop, ROWS):
        position = start + tl.arange(0, ROWS)
        at = _row(order, position, stop, T)[:, None] * N + column[None, :]
        total += tl.sum(tl.load(values + at, (position < stop)[:, None] & (column < N)[None, :], 0.0), 0)
    tl.store(out + expert * N + column, total, column < N)


@triton.jit
def _normalised_products(
    token_at,
    token_in,
    vector_at,
    head_in,
    D,
    eps,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products [HEADS, TILE] of vectors with normalised tokens, and the tokens' means and reciprocal deviations."""
    depth = tl.arange(0, DEPTH)
    mean = tl.full((TILE,), 0, tl.float32)
    spread = tl.full((TILE,), 0, tl.float32)
    sums = tl.full((HEADS,), 0, tl.float32)
    products = tl.full((HEADS, TILE), 0, tl.float32)
    for start in range(0, D, DEPTH):
        inside = (start + depth < D)[None, :]
        z = tl.load(token_at + start + depth[None, :], token_in & inside, 0.0).to(tl.float32)
        v = tl.load(vector_at + start + depth[None, :], head_in & inside, 0.0)
        products = tl.dot(v, tl.trans(z), products, input_precision=PRECISION)
        sums += tl.sum(v, 1)
        count = tl.minimum(D - start, DEPTH).to(tl.float32)
        chunk = tl.sum(z, 1) / count
        away = tl.where(inside, z - chunk[:, None], 0.0)
        share = count / (start + count)
        spread += tl.sum(away * away, 1) + (chunk - mean) * (chunk - mean) * (start * share)
        mean += (chunk - mean) * share
    rstd = tl.rsqrt(spread / D + eps)
    return (products - sums[:, None] * mean[None, :]) * rstd[None, :], mean, rstd


@triton.jit
def _store_weighted(
    out_at, weights, token_at, token_in, mean, rstd, head_in, D, DEPTH: tl.constexpr, PRECISION: tl.constexpr
):
    depth = tl.arange(0, DEPTH)
    for start in range(0, D, DEPTH):
        inside = (start + depth < D)[None, :]
        z = tl.load(token_at + start + depth[None, :], token_in & inside, 0.0).to(tl.float32)
        normalised = (z - mean[:, None]) * rstd[:, None]
        part = tl.dot(weights, normalised, input_precision=PRECISION)
        tl.store(out_at + start + depth[None, :], part, head_in & inside)


@triton.jit
def _attend(
    tokens,  # [B, T, D]
    keys,  # [B, H, D]
    parts,  # [B, tiles, H, D]
    tops,  # [B, tiles, H]
    totals,  # [B, tiles, H]
    T,
    H,
    D,
    scale,
    eps,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = tl.arange(0, HEADS)
    token_in = (token < T)[:, None]
    head_in = (head < H)[:, None]
    token_at = tokens + (image * T + token)[:, None] * D
    vector = (image * H + head)[:, None] * D
    logits, mean, rstd = _normalised_products(
        token_at, token_in, keys + vector, head_in, D, eps, HEADS, TILE, DEPTH, PRECISION
    )
    logits = tl.where((token < T)[None, :], scale * logits, float("-inf"))
    top = tl.max(logits, 1)
    weights = tl.exp(logits - top[:, None])
    at = (image * tl.num_programs(0) + tl.program_id(0)) * H + head
    tl.store(tops + at, top, head < H)
    tl.store(totals + at, tl.sum(weights, 1), head < H)
    _store_weighted(parts + at[:, None] * D, weights, token_at, token_in, mean, rstd, head_in, D, DEPTH, PRECISION)


@triton.jit
def _attend_backward(
    tokens,  # [B, T, D]
    keys,  # [B, H, D]
    gradient,  # [B, H, D]: of the weighted means
    parts,  # [B, tiles, H, D]
    top,  # [B, H]: the largest logit
    total,  # [B, H]: sum of exp(logit - top)
    average,  # [B, H]: gradient . weighted mean
    T,
    H,
    D,
    scale,
    eps,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = tl.arange(0, HEADS)
    token_in = (token < T)[:, None]
    head_in = (head < H)[:, None]
    token_at = tokens + (image * T + token)[:, None] * D
    vector = (image * H + head)[:, None] * D
    logits, mean, rstd = _normalised_products(
        token_at, token_in, keys + vector, head_in, D, eps, HEADS, TILE, DEPTH, PRECISION
    )
    slopes, _, _ = _normalised_products(
        token_at, token_in, gradient + vector, head_in, D, eps, HEADS, TILE, DEPTH, PRECISION
    )
    row = image * H + head
    peak = tl.load(top + row, head < H, 0.0)
    share = 1 / tl.load(total + row, head < H, 1.0)
    centre = tl.load(average + row, head < H, 0.0)
    weights = tl.exp(scale * logits - peak[:, None]) * share[:, None] * (slopes - centre[:, None])
    weights = tl.where(head_in & (token < T)[None, :], scale * weights, 0.0)
    at = ((image * tl.num_programs(0) + tl.program_id(0)) * H + head)[:, None] * D
    _store_weighted(parts + at, weights, token_at, token_in, mean, rstd, head_in, D, DEPTH, PRECISION)
