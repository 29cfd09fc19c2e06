"""The equations of HVL as pure functions on tensors: pyramid, adapter, fusion, probabilities, losses, score.

float64 stays float64, everything else is computed in float32. B images, n x n middle and 2n x 2n fine tiles in
row-major order, d width, C classes. Scale 0 is the whole image, 1 the middle, 2 the fine tiles. Equations: Lai et al.,
MICCAI 2025.
"""

from __future__ import annotations

from math import isqrt, log
from typing import Any

import torch
import torch.nn.functional as F
from ood_core import check
from torch import Tensor

__all__ = [
    "adapt",
    "combine",
    "entropy",
    "entropy_gain",
    "fuse",
    "id_loss",
    "id_loss_from_log",
    "keep_mask",
    "log_pool",
    "ood_loss",
    "ood_loss_from_log",
    "parent_index",
    "patch_log_probabilities",
    "patch_probabilities",
    "pool",
    "pseudo_ood",
    "split_pyramid",
]

# Equal entropies may round to a mean below all of them; without this none would be kept.
_SLACK = 1e-6


def split_pyramid(images: Tensor, n: int) -> Tensor:
    """Each image as a whole, as n x n and as 2n x 2n tiles, every tile of the size of the image.

    The image is enlarged n and 2n times (bicubic, a = -0.75, pixel centres aligned, no clamping) and cut.

    Args:
        images: [B, 3, S, S].
        n: partitions of the middle scale, at least 1.

    Returns:
        [B, 1 + 5 n^2, 3, S, S] in the order whole, middle tiles, fine tiles, each row-major.

    Raises:
        TypeError: not a floating-point tensor, or `n` no integer.
        ValueError: not square images of 3 channels, NaN, or `n` below 1.

    Source: the paper's hierarchical partition; the interpolation is ours, the paper names none.

    Example:
        >>> split_pyramid(torch.zeros(1, 3, 8, 8), 2).shape
        torch.Size([1, 21, 3, 8, 8])
    """
    (images,) = check.tensors(images=(images, "B C S S"))
    if images.shape[1] != 3:
        raise ValueError(f"images must have 3 channels, got shape {list(images.shape)}.")
    _partitions(n)
    return torch.cat([images[:, None], _tiles(images, n), _tiles(images, 2 * n)], dim=1)


def _tiles(images: Tensor, count: int) -> Tensor:
    """Tiles [B, count^2, 3, S, S] of the images enlarged `count` times."""
    return cut(F.interpolate(images, scale_factor=count, mode="bicubic", align_corners=False), count)


def cut(large: Tensor, count: int) -> Tensor:
    """Images [B, 3, count S, count S] cut into tiles [B, count^2, 3, S, S], row-major."""
    size = large.shape[-1] // count
    tiles = large.unfold(2, size, size).unfold(3, size, size)
    return tiles.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def _partitions(n: int) -> int:
    return check.integer("n", n, 1, 2**15)


def parent_index(n: int) -> Tensor:
    """The middle tile that holds each fine tile.

    Args:
        n: partitions of the middle scale, at least 1.

    Returns:
        int64 [4 n^2] in [0, n^2); each value occurs four times.

    Raises:
        TypeError: `n` no integer.
        ValueError: `n` below 1.

    Source: j* of Eq. 1.

    Example:
        >>> parent_index(2).tolist()
        [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    """
    half = torch.arange(2 * _partitions(n)) // 2
    return (half[:, None] * n + half).flatten()


def adapt(v: Tensor, weight: Tensor) -> Tensor:
    """The residual adapter: relu(v W) + v.

    Args:
        v: embeddings [..., d].
        weight: [d, d]; at exactly 0 its gradient is 0 everywhere, so training has to start elsewhere.

    Returns:
        [..., d].

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, or NaN.

    Source: the paper's visual adapter, one for all scales.

    Example:
        >>> adapt(torch.tensor([[1.0, -2.0]]), torch.eye(2))
        tensor([[ 2., -2.]])
    """
    v, weight = check.tensors(v=(v, _rows_of(v, "d")), weight=(weight, "d d"))
    return torch.relu(v @ weight) + v


def fuse(u0: Tensor, u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Add coarse context to finer embeddings, weighted by the cosine between them.

    Args:
        u0: whole images [B, d].
        u1: middle tiles [B, n^2, d].
        u2: fine tiles [B, 4 n^2, d].

    Returns:
        (h1 [B, n^2, d], h2 [B, 4 n^2, d]): u1 with its image, u2 with its fused parent; a zero vector has
        cosine 0.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, numbers of tiles that are no pyramid, or NaN.

    Source: Eq. 1: h1_i = u1_i + cos(u1_i, u0) u0, h2_j = u2_j + cos(u2_j, h1_j*) h1_j*.

    Example:
        >>> h1, h2 = fuse(torch.ones(1, 2), torch.ones(1, 1, 2), torch.ones(1, 4, 2))
        >>> h1[0, 0].round(decimals=4), h2[0, 0].round(decimals=4)
        (tensor([2., 2.]), tensor([3., 3.]))
    """
    u0, u1, u2 = check.tensors(u0=(u0, "B d"), u1=(u1, "B N1 d"), u2=(u2, "B N2 d"))
    n = isqrt(u1.shape[1])
    if n * n != u1.shape[1] or u2.shape[1] != 4 * n * n:
        raise ValueError(f"u1 and u2 must hold n^2 and 4 n^2 tiles per image, got {u1.shape[1]} and {u2.shape[1]}.")
    h1 = _with_context(u1, u0[:, None])
    h2 = _with_context(u2, h1[:, parent_index(n).to(h1.device)])
    return h1, h2


def _with_context(x: Tensor, context: Tensor) -> Tensor:
    cosine = (F.normalize(x, dim=-1) * F.normalize(context, dim=-1)).sum(-1, keepdim=True)
    return x + cosine * context


def entropy(p: Tensor) -> Tensor:
    """Shannon entropy of class probabilities in nats: -sum_c p_c log p_c.

    Args:
        p: [..., C] in [0, 1].

    Returns:
        [...] in [0, log C]; its gradient is finite at p = 0, too.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: empty, NaN, or values outside [0, 1].

    Source: H of the paper's patch filter, entropy gain and Eq. 5.

    Example:
        >>> entropy(torch.tensor([[0.5, 0.5], [0.0, 1.0]])).round(decimals=4).abs()
        tensor([0.6931, 0.0000])
    """
    (p,) = check.tensors(p=(p, _rows_of(p, "C")))
    _check_probabilities(p=p)
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


def patch_probabilities(h: Tensor, text: Tensor, *, tau: float) -> Tensor:
    """Class probabilities of embeddings: softmax_c(cos(h, t_c) / tau).

    Args:
        h: fused embeddings [..., d] of any norm.
        text: class texts [C, d] with the bias of their scale added, of any norm.
        tau: temperature, above 0.

    Returns:
        [..., C].

    Raises:
        TypeError: not floating-point tensors, or a `tau` that is no number.
        ValueError: shapes that do not fit, NaN, or a `tau` not above 0.

    Source: Eq. 2.

    Example:
        >>> patch_probabilities(torch.tensor([2.0, 0.0]), torch.eye(2), tau=1.0).round(decimals=4)
        tensor([0.7311, 0.2689])
    """
    return _patch_logits(h, text, tau).softmax(-1)


def patch_log_probabilities(h: Tensor, text: Tensor, *, tau: float) -> Tensor:
    """`patch_probabilities` as logarithms, exact where one underflows: the form used in training.

    Args:
        h: fused embeddings [..., d] of any norm.
        text: class texts [C, d] with the bias of their scale added, of any norm.
        tau: temperature, above 0.

    Returns:
        [..., C].

    Raises:
        TypeError, ValueError: as `patch_probabilities`.

    Example:
        >>> patch_log_probabilities(torch.tensor([1.0, 0.0]), torch.eye(2), tau=0.01)
        tensor([   0., -100.])
    """
    return _patch_logits(h, text, tau).log_softmax(-1)


def _patch_logits(h: Tensor, text: Tensor, tau: float) -> Tensor:
    h, text = check.tensors(h=(h, _rows_of(h, "d")), text=(text, "C d"))
    cosines = F.normalize(h, dim=-1) @ F.normalize(text, dim=-1).T
    return cosines / check.positive("tau", tau)


def keep_mask(entropy: Tensor) -> Tensor:
    """The patches that are sure enough: entropy at most the mean over the image's patches of that scale.

    Args:
        entropy: [B, N].

    Returns:
        bool [B, N] without gradient; at least one patch per image is kept.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong rank, empty, or NaN.

    Source: the paper's patch filter, read with the mean (with its sum every patch would be kept).

    Example:
        >>> keep_mask(torch.tensor([[0.1, 0.2, 0.9]]))
        tensor([[ True,  True, False]])
    """
    (entropy,) = check.tensors(entropy=(entropy, "B N"))
    return (entropy <= entropy.mean(-1, keepdim=True) + _SLACK).detach()


def pool(p: Tensor, keep: Tensor, *, mean: str = "paper") -> Tensor:
    """Probabilities of one scale from those of its kept patches.

    Args:
        p: [B, N, C] in [0, 1].
        keep: bool [B, N], at least one per image.
        mean: "paper" divides the sum by N, so that a scale of which few patches are kept counts for less; "kept"
            divides by their number.

    Returns:
        [B, C]; with "paper" its sum is the share of patches kept.

    Raises:
        TypeError: not a floating-point `p`, or a `keep` that is not bool.
        ValueError: shapes that do not fit, NaN, no patch kept, values outside [0, 1], or an unknown `mean`.

    Source: the paper's entropy filter, p^1 and p^2 of Eq. 3.

    Example:
        >>> p, keep = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), torch.tensor([[True, False]])
        >>> pool(p, keep), pool(p, keep, mean="kept")
        (tensor([[0.5000, 0.0000]]), tensor([[1., 0.]]))
    """
    (p,) = check.tensors(p=(p, "B N C"))
    _check_probabilities(p=p)
    keep = _check_keep(keep, p)
    counts = keep.sum(1) if check.choice("mean", mean, ("paper", "kept")) == "kept" else p.new_tensor(p.shape[1])
    return (p * keep[..., None]).sum(1) / counts.view(-1, 1)


def log_pool(log_p: Tensor, keep: Tensor) -> Tensor:
    """`pool(..., mean="paper")` on logarithms, exact where a probability underflows: the form used in training.

    Args:
        log_p: log-probabilities [B, N, C], at most 0.
        keep: bool [B, N], at least one per image.

    Returns:
        [B, C].

    Raises:
        TypeError, ValueError: as `pool`.

    Example:
        >>> log_pool(torch.log(torch.tensor([[[0.5, 0.5], [0.1, 0.9]]])), torch.tensor([[True, False]])).exp()
        tensor([[0.2500, 0.2500]])
    """
    (log_p,) = check.tensors(log_p=(log_p, "B N C"))
    _check_logs(log_p=log_p)
    keep = _check_keep(keep, log_p)
    return log_p.masked_fill(~keep[..., None], -torch.inf).logsumexp(1) - log(log_p.shape[1])


def entropy_gain(H1: Tensor, H2: Tensor, parent: Tensor) -> Tensor:
    """How much less sure a fine patch is than the middle patch it lies in; the paper's measure of pseudo-OOD patches.

    Args:
        H1: entropies of the middle patches [B, N1].
        H2: entropies of the fine patches [B, N2].
        parent: `parent_index(n)`, int64 [N2].

    Returns:
        H2_j - H1_parent(j), [B, N2].

    Raises:
        TypeError: not floating-point entropies or integer parents.
        ValueError: shapes that do not fit, NaN, or a parent that is not there.

    Source: the paper's entropy gain.

    Example:
        >>> entropy_gain(torch.tensor([[0.2]]), torch.tensor([[0.2, 0.5, 0.9, 0.1]]), parent_index(1))
        tensor([[ 0.0000,  0.3000,  0.7000, -0.1000]])
    """
    H1, H2 = check.tensors(H1=(H1, "B N1"), H2=(H2, "B N2"))
    parent = check.labels("parent", parent, H2.shape[1], H1.shape[1])
    return H2 - H1[:, parent.to(H1.device)]


def pseudo_ood(u0: Tensor, h1: Tensor, h2: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pseudo-OOD embeddings at all three scales from chosen fine patches.

    Args:
        u0: whole images [B, d].
        h1: fused middle patches [B, N1, d].
        h2: fused fine patches [B, N2, d].
        index: the chosen fine patches, int64 [B, K].

    Returns:
        (q0, q1, q2), each [B, K, d]; gradients reach all embeddings.

    Raises:
        TypeError: not floating-point embeddings or an integer index.
        ValueError: shapes that do not fit, NaN, or an index out of range.

    Source: Eq. 4: q2 = h2_k, q1 = q2 + mean_i cos(q2, h1_i) h1_i, q0 = q1 + cos(q1, u0) u0.

    Example:
        >>> one = torch.ones(1, 1, 2)
        >>> [q[0, 0, 0].round(decimals=4).item() for q in pseudo_ood(one[0], one, one, torch.tensor([[0]]))]
        [3.0, 2.0, 1.0]
    """
    u0, h1, h2 = check.tensors(u0=(u0, "B d"), h1=(h1, "B N1 d"), h2=(h2, "B N2 d"))
    index = _check_index(index, h2)
    q2 = h2.gather(1, index[..., None].expand(-1, -1, h2.shape[-1]))
    cosines = F.normalize(q2, dim=-1) @ F.normalize(h1, dim=-1).mT  # [B, K, N1]
    q1 = q2 + cosines @ h1 / h1.shape[1]
    return _with_context(q1, u0[:, None]), q1, q2


def id_loss(p0: Tensor, p1: Tensor, p2: Tensor, labels: Tensor) -> Tensor:
    """L_ID: mean over images of the negative log-likelihood of the class, summed over the three scales.

    Args:
        p0: probabilities of the whole images [B, C].
        p1: pooled probabilities of the middle patches [B, C].
        p2: of the fine patches [B, C].
        labels: int64 [B].

    Returns:
        Scalar.

    Raises:
        TypeError: not floating-point probabilities or integer labels.
        ValueError: shapes that do not fit, NaN, values outside [0, 1], or labels out of range.

    Source: Eq. 3; the plain cross-entropy of pooled probabilities, which no second softmax may touch.

    Example:
        >>> half = torch.tensor([[0.5, 0.5]])
        >>> id_loss(half, half, half, torch.tensor([1]))
        tensor(2.0794)
    """
    p0, p1, p2 = check.tensors(p0=(p0, "B C"), p1=(p1, "B C"), p2=(p2, "B C"))
    _check_probabilities(p0=p0, p1=p1, p2=p2)
    return id_loss_from_log(p0.log(), p1.log(), p2.log(), labels)


def id_loss_from_log(log_p0: Tensor, log_p1: Tensor, log_p2: Tensor, labels: Tensor) -> Tensor:
    """`id_loss` from log-probabilities (of `log_pool` for the scales of patches): the form used in training.

    Args:
        log_p0: [B, C], at most 0.
        log_p1: [B, C], at most 0.
        log_p2: [B, C], at most 0.
        labels: int64 [B].

    Returns:
        Scalar.

    Raises:
        TypeError: not floating-point tensors or integer labels.
        ValueError: shapes that do not fit, NaN, values above 0, or labels out of range.
    """
    logs = check.tensors(log_p0=(log_p0, "B C"), log_p1=(log_p1, "B C"), log_p2=(log_p2, "B C"))
    _check_logs(**dict(zip(("log_p0", "log_p1", "log_p2"), logs, strict=True)))
    labels = check.labels("labels", labels, *logs[0].shape)
    return F.nll_loss(torch.stack(logs).sum(0), labels.to(logs[0].device))


def ood_loss(p0: Tensor, p1: Tensor, p2: Tensor) -> Tensor:
    """L_OOD: minus the entropy of pseudo-OOD embeddings, summed over scales, averaged over patches and images.

    Args:
        p0: probabilities [B, K, C] of the pseudo-OOD embeddings of the whole images.
        p1: of the middle scale [B, K, C].
        p2: of the fine scale [B, K, C].

    Returns:
        Scalar in [-3 log C, 0].

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, NaN, or values outside [0, 1].

    Source: Eq. 5.

    Example:
        >>> half = torch.full((1, 1, 2), 0.5)
        >>> ood_loss(half, half, half)
        tensor(-2.0794)
    """
    p0, p1, p2 = check.tensors(p0=(p0, "B K C"), p1=(p1, "B K C"), p2=(p2, "B K C"))
    return -(entropy(p0) + entropy(p1) + entropy(p2)).mean()


def ood_loss_from_log(log_p0: Tensor, log_p1: Tensor, log_p2: Tensor) -> Tensor:
    """`ood_loss` from log-probabilities: the form used in training.

    Args:
        log_p0: [B, K, C], at most 0.
        log_p1: [B, K, C], at most 0.
        log_p2: [B, K, C], at most 0.

    Returns:
        Scalar in [-3 log C, 0].

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, NaN, or values above 0.
    """
    logs = check.tensors(log_p0=(log_p0, "B K C"), log_p1=(log_p1, "B K C"), log_p2=(log_p2, "B K C"))
    _check_logs(**dict(zip(("log_p0", "log_p1", "log_p2"), logs, strict=True)))
    lowest = torch.finfo(logs[0].dtype).min  # 0 log 0 = 0
    return torch.stack([(x.exp() * x.clamp_min(lowest)).sum(-1) for x in logs]).sum(0).mean()


def combine(p0: Tensor, p1: Tensor, p2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Diagnosis and score from the three scales.

    Args:
        p0: probabilities of the whole images [B, C].
        p1: pooled probabilities of the middle patches [B, C].
        p2: of the fine patches [B, C].

    Returns:
        (mean over the scales [B, C], its largest value = score [B], higher = more in-distribution, class [B]).

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, NaN, or values outside [0, 1].

    Source: the paper's p_ID and its maximum.

    Example:
        >>> one = torch.tensor([[0.25, 0.75]])
        >>> combine(one, one, one)
        (tensor([[0.2500, 0.7500]]), tensor([0.7500]), tensor([1]))
    """
    p0, p1, p2 = check.tensors(p0=(p0, "B C"), p1=(p1, "B C"), p2=(p2, "B C"))
    _check_probabilities(p0=p0, p1=p1, p2=p2)
    mean = (p0 + p1 + p2) / 3
    score, prediction = mean.max(-1)
    return mean, score, prediction


def _check_probabilities(**given: Tensor) -> None:
    for name, p in given.items():
        low, high = p.detach().min().item(), p.detach().max().item()
        if low < 0 or high > 1 + 1e-5:
            raise ValueError(f"{name} must lie in [0, 1], got {low:.6g} to {high:.6g}: give probabilities, not logits.")


def _check_logs(**given: Tensor) -> None:
    for name, log_p in given.items():
        if (high := log_p.detach().max().item()) > 1e-5:
            raise ValueError(f"{name} must be at most 0, got {high:.6g}: give log-probabilities, not logits.")


def _check_keep(keep: Any, p: Tensor) -> Tensor:
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        raise TypeError(f"keep must be a bool tensor, got {getattr(keep, 'dtype', type(keep).__name__)}.")
    if keep.shape != p.shape[:2]:
        raise ValueError(f"keep must have shape {list(p.shape[:2])}, got {list(keep.shape)}.")
    if empty := (~keep.any(1)).nonzero().flatten().tolist():
        raise ValueError(f"keep leaves no patch of image {empty[0]}: at least one is needed (see keep_mask).")
    return keep.to(p.device)


def _check_index(index: Any, h2: Tensor) -> Tensor:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index must be an integer tensor, got {getattr(index, 'dtype', type(index).__name__)}.")
    if index.ndim != 2 or len(index) != len(h2) or not index.numel():
        raise ValueError(f"index must have shape [{len(h2)}, K], got {list(index.shape)}.")
    if not 0 <= int(index.min()) <= int(index.max()) < h2.shape[1]:
        raise ValueError(f"index must lie in [0, {h2.shape[1]}), got {int(index.min())} to {int(index.max())}.")
    return index.long().to(h2.device)


def _rows_of(value: Any, last: str) -> str:
    """Dimension letters of a tensor with any number of leading dimensions."""
    leading = [f"n{i}" for i in range(getattr(value, "ndim", 1) - 1)]
    return " ".join([*leading, last])
