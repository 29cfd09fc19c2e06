"""Transformer blocks of the libraries, read into one naming of their parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ood_core.errors import UsageError

__all__ = ["NOT_PLAIN", "plain_block"]

NOT_PLAIN = (
    "A {} is no pre-norm block with plain attention and a plain MLP: experts can be copied from plain vision "
    "transformers of timm, open_clip and transformers."
)


def plain_block(block: nn.Module) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """The parameters of a pre-norm transformer block by one naming, whatever library it is from.

    Args:
        block: of timm, open_clip or transformers, e.g. `backbone.last_block`.

    Returns:
        The parameters: "norm1", "qkv" (query, key and value rows [3 D, D]), "out", "norm2", "up" and "down", each with
        "_weight" and "_bias" (zeros where the library has none), and the LayerScales "scale1" and "scale2" or None.
        The options: "num_heads", "eps" and "activation" ("gelu" or "quick_gelu").

    Raises:
        UsageError: a block of another kind.

    Example:
        >>> from ood_core import create_backbone
        >>> parameters, options = plain_block(create_backbone("tiny").last_block)
        >>> list(parameters["qkv_weight"].shape), options["activation"]
        ([576, 192], 'gelu')
    """
    return _read(getattr(block, "layer", block))


def _read(block: Any) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    if hasattr(block, "ln_1") and hasattr(block.mlp, "c_fc"):  # open_clip
        attn = block.attn
        qkv, parts = (attn.in_proj_weight, attn.in_proj_bias), (block.ln_1, attn.out_proj, block.ln_2, *block.mlp[::2])
        scales, activation, heads = (block.ls_1, block.ls_2), block.mlp[1], attn.num_heads
    elif hasattr(block, "norm1") and hasattr(getattr(block, "attn", None), "qkv") and hasattr(block.mlp, "fc1"):  # timm
        attn, mlp = block.attn, block.mlp
        if hasattr(attn, "rotate_half"):  # rotary positions come from outside the block: its parameters lack them
            raise UsageError(NOT_PLAIN.format(type(block).__name__))
        qkv, parts = (attn.qkv.weight, attn.qkv.bias), (block.norm1, attn.proj, block.norm2, mlp.fc1, mlp.fc2)
        scales, activation, heads = (getattr(block, "ls1", None), getattr(block, "ls2", None)), mlp.act, attn.num_heads
    else:
        return _read_transformers(block)
    return _named(qkv, parts, scales), {
        "num_heads": heads,
        "eps": parts[0].eps,
        "activation": _activation(activation),
    }


def _read_transformers(block: Any) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    attn: Any = getattr(block, "self_attn", None) or getattr(block, "attention", None)
    mlp: Any = getattr(block, "mlp", None)
    if not hasattr(attn, "q_proj") or not hasattr(mlp, "fc1"):
        raise UsageError(NOT_PLAIN.format(type(block).__name__))
    norms = [getattr(block, n) for n in ("layer_norm1", "norm1", "layernorm_before") if hasattr(block, n)]
    norms += [getattr(block, n) for n in ("layer_norm2", "norm2", "layernorm_after") if hasattr(block, n)]
    out = attn.out_proj if hasattr(attn, "out_proj") else attn.o_proj
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in projections]
    qkv = (torch.cat([p.weight for p in projections]), torch.cat(biases))
    scales = (getattr(block, "layer_scale1", None), getattr(block, "layer_scale2", None))
    activation = getattr(mlp, "activation_fn", None) or getattr(mlp, "activation", None) or mlp.act
    heads = len(attn.q_proj.weight) // attn.head_dim if hasattr(attn, "head_dim") else attn.num_heads
    parts = (norms[0], out, norms[1], mlp.fc1, mlp.fc2)
    return _named(qkv, parts, scales), {
        "num_heads": heads,
        "eps": norms[0].eps,
        "activation": _activation(activation),
    }


def _named(qkv: tuple[Tensor, Tensor | None], parts: tuple[Any, ...], scales: tuple[Any, Any]) -> dict[str, Any]:
    norm1, out, norm2, up, down = parts
    weight, bias = qkv
    found: dict[str, Tensor | None] = {
        "norm1_weight": norm1.weight,
        "norm1_bias": norm1.bias,
        "qkv_weight": weight,
        "qkv_bias": weight.new_zeros(len(weight)) if bias is None else bias,
        "scale1": _layer_scale(scales[0]),
        "norm2_weight": norm2.weight,
        "norm2_bias": norm2.bias,
        "scale2": _layer_scale(scales[1]),
    }
    for name, linear in (("out", out), ("up", up), ("down", down)):
        found[f"{name}_weight"] = linear.weight
        found[f"{name}_bias"] = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
    return found


def _layer_scale(module: Any) -> Tensor | None:
    return next((getattr(module, name) for name in ("gamma", "lambda1") if hasattr(module, name)), None)


def _activation(module: Any) -> str:
    name = getattr(module, "__name__", type(module).__name__).lower()
    if "quick" in name:
        return "quick_gelu"
    if "gelu" in name and getattr(module, "approximate", "none") == "none":
        return "gelu"
    raise UsageError(
        f"The block's activation {name!r} is neither GELU nor QuickGELU: experts cannot be copied from it."
    )
