"""Scores as pure functions on tensors: the reference implementations, higher = more in-distribution.

`image`, `local`, `text`, `negatives`, `queries` and `bank` are unit-norm; logits are taken as they are. float64 stays
float64, everything else is computed in float32. N images, P patches, C classes, M negatives, d width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ood_core import check
from ood_core.ops import topk_patch_softmax
from ood_core.ops.nearest import distance_to_kth

__all__ = [
    "energy",
    "gen",
    "gl_mcm",
    "gl_mcm_logits",
    "knn",
    "log_remaining",
    "mahalanobis",
    "max_logit",
    "mcm",
    "msp",
    "r_mcm",
    "unsaturated",
    "unsaturated_match",
    "vim",
]

# The last part of a bounded score, which float32 would round away: a thousandth, resolved to 1e-4 of what remains.
_TAIL = 2.0**-10
# Cosines of float32 tell no finer odds than exp(2^24) apart, at any temperature; and no score becomes infinite.
_LEAST_LOG = -(2.0**24)
# Logits held at a time, in elements.
_CHUNK = 1 << 20


def mcm(image: Tensor, text: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Maximum concept matching: the largest softmax probability of the cosines to the class texts.

    Args:
        image: [N, d] unit norm.
        text: [C, d] unit norm.
        temperature: divides the cosines, above 0.

    Returns:
        [N] in [1/C, 1].

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, NaN, `temperature` not above 0.

    Source: Ming et al., "Delving into out-of-distribution detection with vision-language representations", NeurIPS
    2022, Eq. 1-2.

    Example:
        >>> mcm(torch.tensor([[1.0, 0.0]]), torch.eye(2)).round(decimals=4)
        tensor([0.7311])
    """
    image, text = check.tensors(image=(image, "N d"), text=(text, "C d"))
    return msp(image @ text.T, temperature=temperature)


def gl_mcm(
    image: Tensor, local: Tensor, text: Tensor, *, temperature: float = 1.0, local_weight: float = 1.0
) -> Tensor:
    """Global-local MCM: `mcm` plus the largest softmax probability over all patches and classes.

    Args:
        image: [N, d] unit norm.
        local: [N, P, d] unit norm.
        text: [C, d] unit norm.
        temperature: divides the cosines, above 0.
        local_weight: factor of the local term.

    Returns:
        [N] in [(1 + local_weight) / C, 1 + local_weight].

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, NaN, `temperature` not above 0.

    Source: Miyai et al., "GL-MCM: global and local maximum concept matching", IJCV 2025, Eq. 4-5.

    Example:
        >>> gl_mcm(torch.eye(2)[:1], torch.eye(2)[None], torch.eye(2)).round(decimals=4)
        tensor([1.4621])
    """
    image, local, text = check.tensors(image=(image, "N d"), local=(local, "N P d"), text=(text, "C d"))
    best = topk_patch_softmax(local, text, k=1, temperature=temperature).image_to_text
    return mcm(image, text, temperature=temperature) + local_weight * best


def r_mcm(
    image: Tensor,
    local: Tensor,
    text: Tensor,
    negatives: Tensor | None = None,
    *,
    k: int = 50,
    temperature: float = 1.0,
    form: str = "paper",
) -> Tensor:
    """Regional MCM: `mcm` plus the mean of the k largest patch-to-class probabilities.

    Args:
        image: [N, d] unit norm.
        local: [N, P, d] unit norm.
        text: [C, d] unit norm.
        negatives: [M, d] unit norm, or None (R-MCM*); they enter the softmax denominators only.
        k: number of (patch, class) entries averaged, 1 to P * C.
        temperature: divides the cosines, above 0.
        form: "paper": one softmax; "released": the released code's double exponential when negatives are given.

    Returns:
        [N].

    Raises:
        TypeError: not floating-point tensors, or `k` no integer.
        ValueError: shapes that do not fit, NaN, `k` out of range, `temperature` not above 0, unknown `form`.

    Source: Chen et al., "Intra-image mining and symmetric maximum concept matching for few-shot out-of-distribution
    detection", AAAI 2026, Eq. 3-4.

    Example:
        >>> r_mcm(torch.eye(2)[:1], torch.eye(2)[None], torch.eye(2), k=2).round(decimals=4)
        tensor([1.4621])
    """
    image, local, text, negatives = check.tensors(
        image=(image, "N d"), local=(local, "N P d"), text=(text, "C d"), negatives=(negatives, "M d")
    )
    check.choice("form", form, ("paper", "released"))
    if form == "released" and negatives is not None:
        matched = released_image_to_text(local, text, negatives, k, temperature)
    else:
        matched = topk_patch_softmax(local, text, negatives, k=k, temperature=temperature).image_to_text
    return mcm(image, text, temperature=temperature) + matched


def released_image_to_text(
    local: Tensor, text: Tensor, negatives: Tensor, k: int | Sequence[int], temperature: float
) -> Tensor:
    """Mean of the k largest softmax probabilities of exp(cosine / T) / T instead of cosine / T; of several k [N, K]."""
    check.positive("temperature", temperature)
    ks = [k] if isinstance(k, int) else list(k)
    for one in ks:
        check.integer("k", one, 1, local.shape[1] * len(text), "patches x classes")
    logits = (local @ torch.cat([text, negatives]).T / temperature).exp() / temperature
    probability = logits.softmax(-1)[..., : len(text)]
    best = probability.flatten(1).topk(max(ks)).values
    means = torch.stack([best[:, :one].mean(-1) for one in ks], 1)
    return means[:, 0] if isinstance(k, int) else means


def msp(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Maximum softmax probability.

    Args:
        logits: [N, C].
        temperature: divides the logits, above 0.

    Returns:
        [N] in [1/C, 1].

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong rank, NaN, `temperature` not above 0.

    Source: Hendrycks & Gimpel, "A baseline for detecting misclassified and out-of-distribution examples", ICLR 2017.

    Example:
        >>> msp(torch.zeros(1, 4))
        tensor([0.2500])
    """
    (logits,) = check.tensors(logits=(logits, "N C"))
    scaled = logits / check.positive("temperature", temperature)
    top = scaled.amax(-1, keepdim=True)
    return 1 / (scaled - top).exp().sum(-1)


def max_logit(logits: Tensor) -> Tensor:
    """The largest logit.

    Args:
        logits: [N, C].

    Returns:
        [N].

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong rank or NaN.

    Source: Hendrycks et al., "Scaling out-of-distribution detection for real-world settings", ICML 2022.

    Example:
        >>> max_logit(torch.tensor([[1.0, 3.0]]))
        tensor([3.])
    """
    (logits,) = check.tensors(logits=(logits, "N C"))
    return logits.amax(-1)


def energy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Negative free energy: temperature * logsumexp(logits / temperature).

    Args:
        logits: [N, C].
        temperature: above 0.

    Returns:
        [N].

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong rank, NaN, `temperature` not above 0.

    Source: Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020, Eq. 4 (its negative).

    Example:
        >>> energy(torch.zeros(1, 2)).round(decimals=4)
        tensor([0.6931])
    """
    (logits,) = check.tensors(logits=(logits, "N C"))
    return check.positive("temperature", temperature) * torch.logsumexp(logits / temperature, -1)


def gen(logits: Tensor, *, gamma: float = 0.1, top: int = 100) -> Tensor:
    """Generalised entropy of the largest probabilities: -sum p^gamma (1 - p)^gamma.

    Args:
        logits: [N, C].
        gamma: exponent in (0, 1).
        top: how many of the largest probabilities count; all of them when there are fewer.

    Returns:
        [N], at most 0.

    Raises:
        TypeError: not a floating-point tensor, or `top` no integer.
        ValueError: wrong rank, NaN, `gamma` or `top` out of range.

    Source: Liu, Lochman & Zach, "GEN: pushing the limits of softmax-based out-of-distribution detection", CVPR 2023.

    Example:
        >>> gen(torch.zeros(1, 2), gamma=0.5)
        tensor([-1.])
    """
    (logits,) = check.tensors(logits=(logits, "N C"))
    if not 0 < gamma < 1:
        raise ValueError(f"gamma={gamma} must lie between 0 and 1.")
    check.integer("top", top, 1, 2**31)
    # 1 - p from the other classes' sum: near p = 1 the plain difference has no digits left.
    log_p = logits.log_softmax(-1)
    values, index = log_p.topk(min(top, logits.shape[-1]))
    log_rest = _log_one_minus(log_p, values, index)
    return -(gamma * (values + log_rest)).exp().sum(-1)


def _log_one_minus(log_p: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """log(1 - p) of the selected entries; for the largest, the logsumexp of all the others."""
    out = torch.log1p(-values.exp().clamp(max=1.0))
    others = log_p.scatter(-1, index[..., :1], float("-inf")).logsumexp(-1)
    return torch.cat([others[..., None], out[..., 1:]], -1)


def gl_mcm_logits(
    global_logits: Tensor, local_logits: Tensor, *, temperature: float = 1.0, local_weight: float = 1.0
) -> Tensor:
    """GL-MCM of given logits, for models without a text tower.

    Args:
        global_logits: [N, C].
        local_logits: [N, P, C].
        temperature: divides both, above 0.
        local_weight: factor of the local term.

    Returns:
        [N] in [(1 + local_weight) / C, 1 + local_weight].

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, NaN, `temperature` not above 0.

    Example:
        >>> gl_mcm_logits(torch.zeros(1, 4), torch.zeros(1, 9, 4))
        tensor([0.5000])
    """
    global_logits, local_logits = check.tensors(
        global_logits=(global_logits, "N C"), local_logits=(local_logits, "N P C")
    )
    best = msp(local_logits.flatten(0, 1), temperature=temperature).view(local_logits.shape[:2]).amax(-1)
    return msp(global_logits, temperature=temperature) + local_weight * best


def knn(queries: Tensor, bank: Tensor, *, k: int = 50) -> Tensor:
    """Minus the Euclidean distance to the k-th nearest entry of the bank.

    Args:
        queries: [N, d] unit norm.
        bank: [K, d] unit norm; of any floating-point type, on any device, and read once in parts, so that it may be a
            memory-mapped file.
        k: 1 to K.

    Returns:
        [N] in [-2, 0].

    Raises:
        TypeError: not floating-point tensors, or `k` no integer.
        ValueError: shapes that do not fit, NaN, `k` outside [1, K].

    Source: Sun et al., "Out-of-distribution detection with deep nearest neighbors", ICML 2022.

    Example:
        >>> knn(torch.eye(2)[:1], torch.eye(2), k=1)
        tensor([-0.])
    """
    # The bank itself is checked in parts: it may be a file of many gigabytes, seen through memory.
    first = bank[:1].to(queries.device) if isinstance(bank, Tensor) and bank.dim() else bank
    queries, _ = check.tensors(queries=(queries, "N d"), bank=(first, "K d"))
    check.integer("k", k, 1, len(bank), "entries in the bank")
    return -distance_to_kth(queries, bank, k)


def mahalanobis(queries: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """Minus the squared Mahalanobis distance to the nearest class mean.

    Args:
        queries: [N, d].
        means: class means [C, d].
        precision: inverse of the covariance shared by the classes, [d, d], symmetric.

    Returns:
        [N], at most 0 up to rounding.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, or NaN.

    Source: Lee et al., "A simple unified framework for detecting out-of-distribution samples and adversarial attacks",
    NeurIPS 2018, Eq. 2.

    Example:
        >>> mahalanobis(torch.ones(1, 2), torch.zeros(1, 2), torch.eye(2))
        tensor([-2.])
    """
    queries, means, precision = check.tensors(
        queries=(queries, "N d"), means=(means, "C d"), precision=(precision, "d d")
    )
    projected = means @ precision
    squared = (
        ((queries @ precision) * queries).sum(-1, keepdim=True)
        - 2 * queries @ projected.T
        + (projected * means).sum(-1)
    )
    return -squared.amin(-1)


def vim(queries: Tensor, logits: Tensor, origin: Tensor, null_space: Tensor, *, alpha: float) -> Tensor:
    """Virtual-logit matching: energy of the logits minus the scaled norm outside the principal space.

    Args:
        queries: features [N, d].
        logits: their logits [N, C].
        origin: point [d] that the head maps to zero logits.
        null_space: orthonormal columns [d, r] that span the complement of the principal space.
        alpha: factor that brings the residual norm to the scale of the logits, above 0.

    Returns:
        [N].

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, NaN, `alpha` not above 0.

    Source: Wang et al., "ViM: out-of-distribution with virtual-logit matching", CVPR 2022, Eq. 5-8 (the negative
    virtual logit plus the energy, which orders images as the paper's softmax does).

    Example:
        >>> vim(torch.eye(2)[:1], torch.zeros(1, 1), torch.zeros(2), torch.eye(2)[:, 1:], alpha=1.0)
        tensor([0.])
    """
    queries, logits, origin, null_space = check.tensors(
        queries=(queries, "N d"), logits=(logits, "N C"), origin=(origin, "d"), null_space=(null_space, "d r")
    )
    residual = ((queries - origin) @ null_space).norm(dim=-1)
    return energy(logits) - check.positive("alpha", alpha) * residual


# ---- bounded scores near their bound


def unsaturated(score: Tensor, log_remaining: Tensor, *, bound: float = 1.0) -> Tensor:
    """A bounded score in the order of its exact value where float32 would round it to the bound.

    With r = bound - score, known to full precision as its logarithm, the score stays as it is down to a remaining
    r = 2^-10 and goes on as bound - 2^-10 + 2^-10 log(2^-10 / r): continuous, of the same slope, increasing without
    end. A bound of 0 needs this only where r is no normal number any more, since floats are dense around 0.

    Args:
        score: [N], at most `bound`.
        log_remaining: log(bound - score) [N], computed without a difference (see `log_remaining`).
        bound: the largest value of the score.

    Returns:
        [N], equal to `score` wherever r is at least 2^-10.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, or NaN.

    Example:
        >>> log_r = torch.tensor([-1.0, -20.0, -200.0])
        >>> unsaturated(1 - log_r.exp(), log_r).round(decimals=4)
        tensor([0.6321, 1.0118, 1.1876])
    """
    score, log_remaining = check.tensors(score=(score, "N"), log_remaining=(log_remaining, "N"))
    tail = _TAIL if bound else torch.finfo(score.dtype).tiny
    beyond = math.log(tail) - log_remaining.clamp(min=_LEAST_LOG)
    return torch.where(beyond > 0, bound - tail + tail * beyond, score)


def log_remaining(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log(1 - `msp`): the logarithm of the probability of all classes but the largest.

    Args:
        logits: [N, C].
        temperature: divides the logits, above 0.

    Returns:
        [N], at most log(1 - 1/C); -inf for a single class.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong rank, NaN, `temperature` not above 0.

    Example:
        >>> log_remaining(torch.tensor([[0.0, 200.0, 0.0]])).round(decimals=3)
        tensor([-199.3070])
    """
    (logits,) = check.tensors(logits=(logits, "N C"))
    return _log_rest_of_largest(logits / check.positive("temperature", temperature))


def _log_rest_of_largest(logits: Tensor) -> Tensor:
    """log(1 - largest softmax) over the last axis: minus the softplus of the log-odds, which nothing saturates."""
    top, index = logits.max(-1, keepdim=True)
    others = logits.scatter(-1, index, -math.inf).logsumexp(-1)
    return logsigmoid(others - top.squeeze(-1))


def unsaturated_match(
    score: Tensor,
    image: Tensor,
    local: Tensor,
    text: Tensor,
    negatives: Tensor | None = None,
    *,
    local_text: Tensor | None = None,
    k: int,
    temperature: float = 1.0,
    local_weight: float = 1.0,
    alpha: float = 0.0,
    form: str = "paper",
) -> Tensor:
    """`unsaturated` of a weighted sum of matches: of `gl_mcm` (k = 1), `r_mcm`, and S-MCM (`alpha` above 0).

    The sum is bounded by 1 + local_weight min(1, P/k) + alpha P/C min(1, C/k), since every patch gives at most 1 in
    one direction and every class in the other. Only images within 2^-9 of that are computed again, so that all
    others cost nothing; unit vectors at temperature 1 never come near it.

    Args:
        score: the sum [N].
        image: [N, d] unit norm.
        local: [N, P, d] unit norm.
        text: [C, d] unit norm.
        negatives: [M, d] unit norm, or None.
        local_text: [C, d] unit norm, compared with `local`; None: `text`.
        k: number of (patch, class) entries averaged.
        temperature: divides the cosines, above 0.
        local_weight: factor of the patch-to-class term, at least 0.
        alpha: factor of the class-to-patch term, at least 0.
        form: "paper", or "released" (see `r_mcm`).

    Returns:
        [N], equal to `score` where at least 2^-10 remains to the bound.

    Raises:
        TypeError: not floating-point tensors, or `k` no integer.
        ValueError: shapes that do not fit, NaN, `k` out of range, `temperature` not above 0.

    Example:
        >>> eye, at = torch.eye(2), {"k": 1, "temperature": 0.01}
        >>> unsaturated_match(r_mcm(eye[:1], eye[None], eye, **at), eye[:1], eye[None], eye, **at)
        tensor([2.0892])
    """
    score, image, local, text, local_text, negatives = check.tensors(
        score=(score, "N"),
        image=(image, "N d"),
        local=(local, "N P d"),
        text=(text, "C d"),
        local_text=(local_text, "C d"),
        negatives=(negatives, "M d"),
    )
    patches, classes = local.shape[1], len(text)
    check.integer("k", k, 1, patches * classes, "patches x classes")
    check.positive("temperature", temperature)
    to_image = alpha * patches / classes
    bound = 1 + local_weight * min(1, patches / k) + to_image * min(1, classes / k)
    columns = text if local_text is None else local_text
    if negatives is not None:
        columns = torch.cat([columns, negatives])
    near = (score > bound - 2 * _TAIL).nonzero()[:, 0]
    if not len(near):
        return score
    found = score.clone()
    for rows in near.split(max(1, _CHUNK // (patches * len(columns)))):
        logits = local[rows] @ columns.T / temperature
        over_columns = logits.exp() / temperature if form == "released" and negatives is not None else logits
        terms = [
            (1.0, _log_rest_of_largest(image[rows] @ text.T / temperature)),
            (local_weight, _log_missing(over_columns, classes, k)),
            (to_image, _log_missing(logits[..., :classes].mT, patches, k) if to_image else None),
        ]
        parts = torch.stack([math.log(weight) + part for weight, part in terms if weight and part is not None])
        found[rows] = unsaturated(score[rows], parts.logsumexp(0), bound=bound)
    return found


def _log_missing(logits: Tensor, entries: int, k: int) -> Tensor:
    """log(min(1, R/k) - mean of the k largest softmax probabilities) of logits [N, R, S] over S, [N].

    Only the first `entries` columns count for the k largest.
    """
    log_p = logits.log_softmax(-1)
    if k > logits.shape[1]:  # the mass of every row that is not among the k
        left = log_p[..., :entries].flatten(1).sort(descending=True).values[:, k:]
        return torch.cat([left, log_p[..., entries:].flatten(1)], 1).logsumexp(1) - math.log(k)
    # The k largest probabilities are those that leave least; near 1 only the sum of the others tells them apart.
    log_rest = torch.log1p(-log_p.exp().clamp(max=1.0))
    log_rest = log_rest.scatter(-1, logits.argmax(-1, keepdim=True), _log_rest_of_largest(logits)[..., None])
    return log_rest[..., :entries].flatten(1).topk(k, largest=False).values.logsumexp(1) - math.log(k)
