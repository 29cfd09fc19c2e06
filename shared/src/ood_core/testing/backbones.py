"""What every backbone keeps to, whatever its library: its capabilities do what they say."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ood_core.backbones import create_backbone
from ood_core.backbones.base import Backbone, hash_tensors
from ood_core.errors import UsageError
from ood_core.testing.checks import Check, close, refused, require, same

__all__ = ["backbone_checks", "check_backbone"]

_TEXTS = ["a photo of a cat", "2 dogs & eels!", "x"]


def check_backbone(backbone: Backbone | str) -> None:
    """Check everything that every backbone keeps to, for the capabilities that it has.

    Args:
        backbone: a backbone, or its spec.

    Raises:
        AssertionError: the first thing that does not hold.

    Example:
        >>> check_backbone("tiny")
    """
    for check in backbone_checks(backbone):
        check()


def backbone_checks(backbone: Backbone | str) -> list[Check]:
    """The checks of `check_backbone`, to be called one by one; the backbone is made here, nothing else is computed.

    Args:
        backbone: a backbone, or its spec.

    Example:
        >>> [str(check) for check in backbone_checks("tiny")][0]
        'tiny-features_are_unit_vectors_in_float32'
    """
    made = create_backbone(backbone, dtype="float32") if isinstance(backbone, str) else backbone
    return [Check(made.spec, function, made) for function, asks in _CHECKS.items() if asks <= made.capabilities]


def _pixels(backbone: Backbone, count: int = 3) -> Tensor:
    """Noise as `transform` gives it."""
    return torch.randn(count, 3, *backbone.transform.crop, generator=torch.Generator().manual_seed(1))


def _encoded(backbone: Backbone, x: Tensor) -> dict[str, Tensor]:
    """Everything that it makes of images."""
    return backbone.encode(x, backbone.capabilities & {"image", "local", "logits"})


# ---- images


def features_are_unit_vectors_in_float32(backbone: Backbone) -> None:
    """One of the width per image; they carry no gradient."""
    x = _pixels(backbone).requires_grad_()
    image = backbone.encode_image(x)
    require(
        image.shape == (3, backbone.width), f"encode_image gives {list(image.shape)}, the width is {backbone.width}."
    )
    _check_vectors(image, "image")
    raw = backbone.encode_image(x, normalize=False)
    close(F.normalize(raw, dim=-1), image, "normalize=False must give the same direction.")


def _check_vectors(found: Tensor, what: str) -> None:
    require(found.dtype == torch.float32, f"{what!r} features must be float32, not {found.dtype}.")
    require(not found.requires_grad, f"{what!r} features must carry no gradient.")
    close(found.norm(dim=-1), torch.ones(found.shape[:-1]), f"{what!r} features must have unit norm.", atol=1e-5)


def an_image_is_encoded_alone(backbone: Backbone) -> None:
    """Twice the same, and whatever else is in the batch."""
    x = _pixels(backbone)
    whole = _encoded(backbone, x)
    for name, value in _encoded(backbone, x).items():
        same(value, whole[name], f"Encoding twice must give the same {name!r}.")
    for name, value in _encoded(backbone, x[[2, 1]]).items():
        scale = whole[name].abs().max().item()
        told = f"The {name!r} of an image must depend on no other image."
        close(value, whole[name][[2, 1]], told, rtol=1e-4, atol=1e-5 * max(scale, 1))


def capabilities_it_lacks_are_refused(backbone: Backbone) -> None:
    """With a sentence that names them."""
    x = _pixels(backbone, 1)
    calls: dict[str, Callable[[], Any]] = {
        "local": partial(backbone.encode_dense, x),
        "logits": partial(backbone.encode_logits, x),
        "text": partial(backbone.encode_text, _TEXTS),
        "prompts": partial(backbone.encode_prompts, torch.zeros(2, 4), ["cat"]),
        "blocks": partial(backbone.require, "blocks"),
    }
    for name in set(calls) - backbone.capabilities:
        refused(f"{name!r}", UsageError, f"has no '{name}'.*Use ", calls[name])
    refused("An unknown feature", UsageError, "Unknown feature 'locale'", backbone.encode, x, {"locale"})


def other_pixels_are_refused(backbone: Backbone) -> None:
    """Another shape, another type, NaN."""
    height, width = backbone.transform.crop
    words = rf"\[B, 3, {height}, {width}\].*got "
    refused("Images of another shape", ValueError, words, backbone.encode_image, torch.zeros(2, 3, height, width - 1))
    refused("A list", ValueError, "got list", backbone.encode_image, [1, 2])
    broken = _pixels(backbone, 1)
    broken[0, 1, 2, 3] = torch.nan
    refused("NaN", ValueError, "NaN", backbone.encode_image, broken)


def images_of_any_size_and_mode_are_transformed(backbone: Backbone) -> None:
    """To float32 [3, H, W]."""
    for size in ((1, 1), (7, 300), (50, 40)):
        values = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        for mode in ("RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I;16"):
            grey = Image.fromarray(values).convert("L")
            image = grey.convert("I").convert(mode) if mode == "I;16" else Image.fromarray(values).convert(mode)
            found, told = backbone.transform(image), f"transform of a {mode} image of {size[0]} x {size[1]} pixels"
            require(found.dtype == torch.float32, f"{told} gives {found.dtype}, not float32.")
            require(found.shape == (3, *backbone.transform.crop), f"{told} gives {list(found.shape)}.")
            require(found.isfinite().all(), f"{told} gives values that are not finite.")


def half_precision_weights_give_float32(backbone: Backbone) -> None:
    """Near those of float32, and not the same."""
    x, half = _pixels(backbone), backbone.copy()
    half.model.to(torch.bfloat16)
    require(half.dtype == torch.bfloat16, f"With weights in bfloat16 its dtype is {half.dtype}.")
    exact = _encoded(backbone, x)
    for name, value in _encoded(half, x).items():
        require(value.dtype == torch.float32, f"In bfloat16 {name!r} must come as float32, not {value.dtype}.")
        if name != "logits":
            _check_vectors(value, name)
        cosine = F.cosine_similarity(value, exact[name], dim=-1)
        require(cosine.min() > 0.99, f"In bfloat16 {name!r} has a cosine of {cosine.min():.3f} to that of float32.")
        require(not torch.equal(value, exact[name]), f"In bfloat16 {name!r} is that of float32: it is not computed so.")


def local_features_are_those_of_the_grid(backbone: Backbone) -> None:
    """One per patch, of both kinds; the image features are those of encode_image."""
    x, grid = _pixels(backbone), backbone.grid
    require(grid is not None, "A backbone with local features must say its grid.")
    patches = grid[0] * grid[1]  # type: ignore[index]  # it is there
    for kind in ("value", "tokens"):
        image, local = backbone.encode_dense(x, kind)
        expected = (3, patches, backbone.width)
        require(local.shape == expected, f"local={kind!r} gives {list(local.shape)}, the grid {grid} asks {expected}.")
        _check_vectors(local, "local")
        close(image, backbone.encode_image(x), "encode_dense must give encode_image's features.")
    words = "local='patch'"
    refused("An unknown kind of local features", ValueError, words, backbone.encode, x, {"local"}, local="patch")


def logits_are_those_of_its_head(backbone: Backbone) -> None:
    """One per class."""
    x = _pixels(backbone)
    logits = backbone.encode_logits(x)
    require(logits.dtype == torch.float32, f"Logits must be float32, not {logits.dtype}.")
    require(logits.ndim == 2 and len(logits) == len(x), f"Logits of {len(x)} images are {list(logits.shape)}.")
    if backbone.label_names:
        classes = len(backbone.label_names)
        require(logits.shape[1] == classes, f"{classes} classes have names, and {logits.shape[1]} have logits.")
    embedding = backbone.encode_image(x, normalize=False).to(backbone.device, backbone.dtype)
    with torch.no_grad():
        of_embedding = backbone.logits(embedding).float()
    close(of_embedding, logits, "logits(embedding) must be encode_logits.", rtol=1e-4, atol=1e-4)


# ---- texts


def texts_are_unit_vectors_in_float32(backbone: Backbone) -> None:
    """In any order, and independent of each other."""
    text = backbone.encode_text(_TEXTS)
    require(text.shape == (3, backbone.width), f"Three texts give {list(text.shape)}, the width is {backbone.width}.")
    _check_vectors(text, "text")
    close(backbone.encode_text(_TEXTS[::-1]), text.flip(0), "The order of texts must change no text.")
    one = torch.cat([backbone.encode_text([one]) for one in _TEXTS])
    close(one, text, "A text must depend on no other text.")
    text.zero_()
    require(backbone.encode_text(_TEXTS).any(), "What a caller writes into the features must change no later ones.")
    require(backbone.logit_scale > 0, f"logit_scale={backbone.logit_scale} must be positive.")
    refused("A text in place of a list", TypeError, "list of strings, got 'cat'", backbone.encode_text, "cat")


def long_texts_are_cut(backbone: Backbone) -> None:
    """And told by `cut_texts`."""
    if backbone.tokenizer is not None and backbone.context_length:
        texts = ["a cat", "word " * backbone.context_length]
        found = backbone.cut_texts(texts)
        require(found == [1], f"cut_texts must name the text of {backbone.context_length} words alone, not {found}.")
        _check_vectors(backbone.encode_text(texts, warn=False), "text")


def prompts_carry_gradients_to_their_context(backbone: Backbone) -> None:
    """And to no other prompt and no weight."""
    width = backbone.embed_tokens(backbone.tokenize(["x"]).to(backbone.device)).shape[-1]
    context = 0.2 * torch.randn(3, 4, width, generator=torch.Generator().manual_seed(3))
    context.requires_grad_()
    prompts = backbone.encode_prompts(context, ["cat", "sea_lion", ""])
    require(prompts.shape == (3, backbone.width), f"Three prompts give {list(prompts.shape)}.")
    close(prompts.norm(dim=-1), torch.ones(3), "Prompts must have unit norm.", atol=1e-5)
    prompts[:2].sum().backward()
    reached = context.grad.abs().sum((1, 2))  # type: ignore[union-attr]  # after backward
    require((reached[:2] > 1e-3).all(), "Gradients must reach the context of a prompt.")
    require(reached[2] == 0, "The gradient of a prompt must not reach the context of another.")
    require(all(p.grad is None for p in backbone.model.parameters()), "Gradients must reach no weight.")
    shared = backbone.encode_prompts(context[0].detach(), ["cat", "sea_lion"])
    each = backbone.encode_prompts(context[:1].detach().expand(2, -1, -1), ["cat", "sea_lion"])
    close(shared, each, "A context [n, D] must be that of every class.")
    wrong = torch.zeros(4, width + 1)
    refused("A context of another width", ValueError, "context must be", backbone.encode_prompts, wrong, ["cat"])


# ---- blocks and weights


def blocks_are_the_rest_of_the_network(backbone: Backbone) -> None:
    """The last one behind `prefix`; and each is its attention, then its feed-forward."""
    twin = backbone.copy()
    twin.model.double()
    x = _pixels(twin).double()
    with torch.no_grad():
        prefix, tokens = twin.prefix(x), twin.embed(x)
        for layer in twin.layers():
            before, tokens = layer.enter(tokens), layer(tokens)
            told = f"The parts of {layer.name} must be the library's block."
            close(layer.parts(before), tokens, told, rtol=1e-10, atol=1e-10)
        close(twin.last_block(prefix), tokens, "last_block must end the network.", rtol=1e-10, atol=1e-10)
        embedding = F.normalize(twin.image_embedding(tokens).float(), dim=-1)
    close(embedding, backbone.encode_image(x.float()), "The blocks must end in the image embedding.")
    named = {name.rpartition(".")[0] for name in backbone.linears() if name.startswith("visual.")} - {"visual"}
    found = {layer.name for layer in backbone.layers()}
    require(found == named, f"The layers are {sorted(found)}, their weights are of {sorted(named)}.")
    depth = len(twin.layers())
    for blocks in (0, depth + 1):
        words = rf"blocks={blocks} is outside \[1, {depth}\]"
        refused(f"prefix(x, {blocks})", ValueError, words, twin.prefix, x, blocks)


def the_tail_carries_gradients(backbone: Backbone) -> None:
    """`tail` behind `prefix` is the rest of the pass."""
    x = _pixels(backbone)
    tokens = backbone.prefix(backbone.prepare(x)).detach().requires_grad_()
    found, expected = backbone.tail(tokens), backbone.encode_dense(x, normalize=False)
    for name, one, other in zip(("image", "local"), found, expected, strict=True):
        told = f"tail must give the {name!r} features that are not normalised."
        close(one.detach().float(), other, told, atol=1e-5 * max(other.abs().max().item(), 1))
    torch.cat([part.flatten() for part in found]).sum().backward()
    gradient = tokens.grad
    require(gradient is not None and gradient.isfinite().all() and gradient.any(), "Gradients must reach the tokens.")
    require(backbone.last_block(tokens).requires_grad, "last_block must carry gradients.")


class _Interrupted(Exception):
    """Raised inside an edit."""


def edits_are_seen_and_come_back(backbone: Backbone) -> None:
    """Bit by bit, for a weight of every kind: weights, features and fingerprint, also after an exception."""
    x, fingerprint = _pixels(backbone), backbone.fingerprint
    image, weights = backbone.encode_image(x), hash_tensors(backbone.model.state_dict().items())
    kinds = {name.rpartition(".")[2]: name for name in backbone.linears() if name.startswith("visual.")}
    for name in kinds.values():
        linear = backbone.linear(name)
        new = (1.5 * linear.weight.roll(1, 0)).requires_grad_()
        placed = linear.placed(new)
        with suppress(_Interrupted), linear.edited(new.detach()):
            same(backbone.linear(name).weight, new.detach(), f"An edit must set {name}.")
            same(placed.detach(), linear.parameter.detach(), f"placed must give what an edit of {name} writes.")
            require(backbone.fingerprint != fingerprint, f"An edit of {name} must change the fingerprint.")
            moved = (backbone.encode_image(x) - image).abs().max()
            require(moved > 1e-4, f"An edit of {name} must change the features, they move by {moved:.2g}.")
            raise _Interrupted
        require(backbone.fingerprint == fingerprint, f"Behind an edit of {name} the fingerprint must be as before.")
        placed.sum().backward()
        same(new.grad, torch.ones_like(new), f"placed must carry the gradient of {name}.")  # type: ignore[arg-type]  # after backward
    found = hash_tensors(backbone.model.state_dict().items())
    require(found == weights, "Behind edits all weights must be as before.")
    same(backbone.encode_image(x), image, "Behind edits the features must be as before.")


def edits_of_texts_are_seen(backbone: Backbone) -> None:
    """Texts encoded before are not taken from memory."""
    text, names = backbone.encode_text(_TEXTS), [name for name in backbone.linears() if name.startswith("text.")]
    for name in names[:1]:
        linear = backbone.linear(name)
        with linear.edited(1.5 * linear.weight.roll(1, 0)):
            require(not torch.equal(backbone.encode_text(_TEXTS), text), f"An edit of {name} must change the texts.")
        same(backbone.encode_text(_TEXTS), text, f"Behind an edit of {name} the texts must be as before.")


def bad_weights_change_nothing(backbone: Backbone) -> None:
    """Another shape, NaN, an unknown name."""
    linear, before = backbone.linear(backbone.linears()[0]), backbone.fingerprint
    rows, columns = linear.weight.shape
    name = re.escape(linear.name)
    wide, broken = torch.zeros(rows, columns + 1), torch.full((rows, columns), torch.nan)
    words = rf"{name} is \[{rows}, {columns}\], the new weight \[{rows}, {columns + 1}\]"
    for new, told in ((wide, words), (broken, f"{name} holds NaN")):
        refused("A bad weight", ValueError, told, linear.set, new)
        refused("A bad weight", ValueError, told, linear.edited(new).__enter__)
    require(backbone.fingerprint == before, "A weight that was refused must change nothing.")
    refused("An unknown name", UsageError, "Unknown weight 'visual.no'", backbone.linear, "visual.no")


def a_copy_is_independent(backbone: Backbone) -> None:
    """The same features, weights of its own; frozen as the original is."""
    x, before = _pixels(backbone), backbone.fingerprint
    twin, image = backbone.copy(), backbone.encode_image(x)
    require(twin.fingerprint == before, "A copy must have the fingerprint of the original.")
    same(twin.encode_image(x), image, "A copy must give the same features.")
    for one in (backbone, twin):
        require(not any(p.requires_grad for p in one.model.parameters()), "A backbone must be frozen.")
        require(not any(module.training for module in one.model.modules()), "A backbone must be in evaluation mode.")
    for name in twin.linears()[:1]:
        twin.linear(name).set(torch.zeros_like(twin.linear(name).weight))
        require(twin.fingerprint != before, "Other weights must have another fingerprint.")
        require(backbone.fingerprint == before, "Weights of a copy must not change the original's fingerprint.")
        require(not torch.equal(twin.encode_image(x), image), "Weights of a copy must change its features.")
        same(backbone.encode_image(x), image, "Weights of a copy must not change the original's features.")
        third = twin.copy()
        require(third.fingerprint == twin.fingerprint, "A copy of an edited backbone must have its fingerprint.")
        same(third.encode_image(x), twin.encode_image(x), "A copy of an edited backbone must give its features.")


def weights_are_saved(backbone: Backbone) -> None:
    """In files, with a sentence that says how to load them."""
    with tempfile.TemporaryDirectory(prefix="ood-testing-") as folder:
        told = backbone.save(Path(folder) / "new")
        require(told.startswith("Saved: "), f"save must say what was saved, it says {told!r}.")
        require(list((Path(folder) / "new").glob("*.safetensors")), "save must write safetensors.")


_CHECKS: dict[Callable[[Backbone], None], frozenset[str]] = {
    features_are_unit_vectors_in_float32: frozenset(),
    an_image_is_encoded_alone: frozenset(),
    capabilities_it_lacks_are_refused: frozenset(),
    other_pixels_are_refused: frozenset(),
    images_of_any_size_and_mode_are_transformed: frozenset(),
    half_precision_weights_give_float32: frozenset(),
    a_copy_is_independent: frozenset(),
    weights_are_saved: frozenset(),
    local_features_are_those_of_the_grid: frozenset({"local"}),
    logits_are_those_of_its_head: frozenset({"logits"}),
    texts_are_unit_vectors_in_float32: frozenset({"text"}),
    long_texts_are_cut: frozenset({"text"}),
    edits_of_texts_are_seen: frozenset({"text"}),
    prompts_carry_gradients_to_their_context: frozenset({"prompts"}),
    blocks_are_the_rest_of_the_network: frozenset({"blocks"}),
    the_tail_carries_gradients: frozenset({"blocks", "local"}),
    edits_are_seen_and_come_back: frozenset({"blocks"}),
    bad_weights_change_nothing: frozenset({"blocks"}),
}
