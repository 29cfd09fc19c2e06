"""Generated labelled images with object masks: the data of the demo and of the tests.

A *scene* is an object of a shape and a material on a cluttered background; a *lesion* is a skin-lesion-like
blob on skin. Every image depends on (seed, class, index) only, so a set can grow without changing what it held.

Example:
    >>> from ood_core.data import scenes
    >>> made = scenes.render(["striped star", "dotted ring"], per_class=4, size=64, seed=0)
    >>> made.images.shape, made.masks.dtype
    ((8, 64, 64, 3), dtype('bool'))
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = [
    "ID_CLASSES",
    "LESIONS",
    "MATERIALS",
    "NEAR_OOD_CLASSES",
    "SHAPES",
    "SceneSet",
    "digits",
    "noise",
    "render",
    "render_lesions",
    "textures",
    "write_folder",
]


@dataclass(frozen=True)
class SceneSet:
    """A rendered set.

    Attributes:
        images: uint8 [N, size, size, 3].
        masks: bool [N, size, size], True on the object (all False for sets without one).
        labels: int64 [N], index into `label_names`.
        label_names: one name per class.
    """

    images: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    label_names: list[str]

    def __len__(self) -> int:
        return len(self.images)


# Shapes: inside-ness of a point (x right, y down, object scaled to about [-1, 1]) as a boolean map.


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angle = np.arctan2(x, -y)
    return np.hypot(x, y) < 0.68 + 0.32 * np.cos(5 * angle)


def _polygon(sides: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        sector = 2 * np.pi / sides
        angle = np.mod(np.arctan2(x, -y), sector) - sector / 2
        return np.hypot(x, y) * np.cos(angle) < np.cos(sector / 2)

    return inside


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) < 0.9,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.78,
    "triangle": _polygon(3),
    "hexagon": _polygon(6),
    "star": _star,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.95),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.7) < 0.24,
    "crescent": lambda x, y: (np.hypot(x, y) < 0.95) & (np.hypot(x - 0.5, y) > 0.75),
}


# Materials: blend weight in [0, 1] between two colours, in object coordinates, plus a shade factor.


def _striped(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (np.sin(2 * np.pi * rng.uniform(1.4, 2.0) * y) > 0).astype(np.float32)


def _checkered(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cell = rng.uniform(0.36, 0.5)
    return ((np.floor(x / cell) + np.floor(y / cell)) % 2).astype(np.float32)


def _dotted(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cell = rng.uniform(0.42, 0.55)
    return (np.hypot(np.mod(x, cell) / cell - 0.5, np.mod(y, cell) / cell - 0.5) < 0.32).astype(np.float32)


def _marbled(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    a, b, c, d = rng.uniform(0, 2 * np.pi, 4)
    warp = np.sin(3.1 * x + a) + np.sin(4.3 * y + b) + 0.6 * np.sin(6.7 * (x - y) + c)
    return (0.5 + 0.5 * np.sin(3.5 * warp + 2 * x + d)).astype(np.float32)


def _brick(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    high = rng.uniform(0.36, 0.46)
    row = np.floor(y / high)
    across = np.mod(x / (2 * high) + 0.5 * (row % 2), 1.0)
    return ((np.mod(y / high, 1.0) < 0.25) | (across < 0.13)).astype(np.float32)


def _zigzag(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    width = rng.uniform(0.5, 0.65)
    tooth = abs(np.mod(x / width, 1.0) - 0.5) * width * 1.6
    return (np.mod((y + tooth) / width, 1.0) < 0.5).astype(np.float32)


def _glossy(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cx, cy = rng.uniform(-0.45, -0.2, 2)
    return np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 0.22).astype(np.float32)


def _grainy(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.random(x.shape, dtype=np.float32)


MATERIALS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "striped": _striped,
    "checkered": _checkered,
    "dotted": _dotted,
    "marbled": _marbled,
    "brick": _brick,
    "zigzag": _zigzag,
    "glossy": _glossy,
    "grainy": _grainy,
}

ID_CLASSES = [
    "striped star",
    "dotted ring",
    "brick square",
    "glossy circle",
    "zigzag triangle",
    "checkered hexagon",
    "grainy crescent",
    "marbled cross",
]
"""The demo's known classes: every shape and every material once."""

NEAR_OOD_CLASSES = [
    "dotted star",
    "striped ring",
    "glossy square",
    "brick circle",
    "checkered triangle",
    "zigzag hexagon",
    "marbled crescent",
    "grainy cross",
]
"""Near OOD: combinations that are not among the known classes, of parts that are."""


def _rng(seed: int, name: str, index: int) -> np.random.Generator:
    """One generator per image; the class enters by name, so its position in a list does not matter."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), index])


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0
    return np.meshgrid(axis, axis)


def _smooth_noise(size: int, cells: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [size, size, channels] in [0, 1]: random values on a coarse grid, bilinearly enlarged."""
    coarse = rng.random((cells + 1, cells + 1, channels), dtype=np.float32)
    position = np.linspace(0, cells, size, endpoint=False, dtype=np.float32)
    low = position.astype(np.int64)
    weight = position - low
    rows = coarse[low] * (1 - weight)[:, None, None] + coarse[low + 1] * weight[:, None, None]
    return rows[:, low] * (1 - weight)[None, :, None] + rows[:, low + 1] * weight[None, :, None]


def _color(rng: np.random.Generator) -> np.ndarray:
    """A saturated colour, float32 [3] in [0, 1]."""
    hue = rng.uniform(0, 6) + np.array([0.0, 4.0, 2.0])
    pure = np.clip(abs(np.mod(hue, 6) - 3) - 1, 0, 1)
    return (rng.uniform(0.55, 1.0) * (1 - rng.uniform(0.6, 0.95) * (1 - pure))).astype(np.float32)


def _two_colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A dark and a light colour, so that a pattern can be seen whatever the hues are."""
    return 0.45 * _color(rng), 0.45 + 0.55 * _color(rng)


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """Muted smooth colours with a few translucent boxes and bars as clutter, float32 [size, size, 3]."""
    x, y = _grid(size)
    canvas = 0.25 + 0.5 * _smooth_noise(size, int(rng.integers(2, 6)), 3, rng)
    for _ in range(int(rng.integers(3, 8))):
        cx, cy, angle = *rng.uniform(-1, 1, 2), rng.uniform(0, np.pi)
        along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        inside = (abs(along) < rng.uniform(0.1, 0.7)) & (abs(across) < rng.uniform(0.02, 0.25))
        canvas[inside] = 0.45 * canvas[inside] + 0.55 * (0.2 + 0.6 * rng.random(3, dtype=np.float32))
    return canvas + 0.06 * (rng.random((size, size, 1), dtype=np.float32) - 0.5)


def _scene(name: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    material, shape = name.split(" ")
    canvas = _background(size, rng)
    x, y = _grid(size)
    scale, angle = rng.uniform(0.42, 0.72), rng.normal(0, 0.25)
    cx, cy = rng.uniform(-1, 1, 2) * (0.95 - scale)
    along = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / scale
    across = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / scale
    mask = SHAPES[shape](along, across)
    blend = MATERIALS[material](along, across, rng)[..., None]
    dark, light = _two_colors(rng)
    shade = 1 + 0.15 * (along - across)[..., None] * rng.choice([-1, 1])
    painted = (dark * (1 - blend) + light * blend) * shade
    return np.where(mask[..., None], painted, canvas), mask


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


Painter = Callable[[str, int, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def _render(paint: Painter, classes: Sequence[str], per_class: int, size: int, seed: int) -> SceneSet:
    if per_class < 1 or size < 8:
        raise ValueError(f"per_class={per_class} and size={size}: at least 1 image of at least 8 pixels is needed.")
    total = len(classes) * per_class
    images = np.empty((total, size, size, 3), np.uint8)
    masks = np.empty((total, size, size), bool)
    for row in range(total):
        label, index = divmod(row, per_class)
        image, masks[row] = paint(classes[label], size, _rng(seed, classes[label], index))
        images[row] = _to_bytes(image)
    return SceneSet(images, masks, np.repeat(np.arange(len(classes)), per_class), list(classes))


def render(classes: Sequence[str], per_class: int, *, size: int = 64, seed: int = 0) -> SceneSet:
    """Render objects on cluttered backgrounds.

    Args:
        classes: names "MATERIAL SHAPE" with parts from `MATERIALS` and `SHAPES`.
        per_class: images of each class, at least 1.
        size: height and width in pixels, at least 8.
        seed: another seed gives other images of the same classes.

    Returns:
        A `SceneSet` of len(classes) * per_class images, grouped by class.

    Raises:
        ValueError: an unknown material or shape, `per_class` below 1 or `size` below 8.

    Example:
        >>> render(["brick circle"], per_class=2, size=32).label_names
        ['brick circle']
    """
    for name in classes:
        material, _, shape = name.partition(" ")
        if material not in MATERIALS or shape not in SHAPES:
            raise ValueError(f"Class {name!r} is no 'MATERIAL SHAPE' of {sorted(MATERIALS)} and {sorted(SHAPES)}.")
    return _render(_scene, classes, per_class, size, seed)


@dataclass(frozen=True)
class _LesionLook:
    """What sets one lesion class apart: outline, colours in [0, 1] and inner structure."""

    rough: float
    stretch: float
    colors: tuple[tuple[float, float, float], ...]
    structure: str


LESIONS = {
    "melanocytic nevus": _LesionLook(0.05, 1.1, ((0.47, 0.29, 0.2), (0.36, 0.2, 0.13)), "network"),
    "melanoma": _LesionLook(0.3, 1.3, ((0.2, 0.12, 0.1), (0.45, 0.25, 0.16), (0.4, 0.42, 0.52)), "patches"),
    "dermatofibroma": _LesionLook(0.06, 1.05, ((0.93, 0.78, 0.7), (0.6, 0.38, 0.28)), "scar"),
    "vascular lesion": _LesionLook(0.12, 1.15, ((0.6, 0.08, 0.12), (0.35, 0.04, 0.16)), "lacunae"),
    "basal cell carcinoma": _LesionLook(0.15, 1.2, ((0.86, 0.6, 0.57), (0.76, 0.3, 0.32)), "vessels"),
    "benign keratosis": _LesionLook(0.18, 1.25, ((0.62, 0.46, 0.28), (0.8, 0.68, 0.42)), "pores"),
}
"""Lesion classes of `render_lesions`; invented looks inspired by dermoscopy, of no diagnostic value."""


def _structure(kind: str, x: np.ndarray, y: np.ndarray, r: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blend weight in [0, 1] between the look's colours, [size, size]."""
    size = x.shape[0]
    soft = _smooth_noise(size, 6, 1, rng)[..., 0]
    if kind == "network":
        return np.clip(0.5 + 0.4 * np.sin(14 * x + 3 * soft) * np.sin(14 * y + 3 * soft), 0, 1)
    if kind == "patches":
        return (_smooth_noise(size, 4, 1, rng)[..., 0] > 0.5).astype(np.float32) * 0.8 + 0.2 * soft
    if kind == "scar":
        return np.clip((r - 0.25) / 0.5, 0, 1)
    if kind == "lacunae":
        return np.clip(1.4 * abs(np.sin(4.5 * x + 2 * soft) * np.sin(4.5 * y - 2 * soft)), 0, 1)
    if kind == "vessels":
        return (abs(np.sin(3 * x + 5 * soft + 2 * y)) < 0.22).astype(np.float32)
    return _dotted(x + 0.2 * soft, y, rng)


def _skin(size: int, rng: np.random.Generator) -> np.ndarray:
    tone = np.array([0.87, 0.67, 0.56], np.float32) * rng.uniform(0.8, 1.08)
    return tone + 0.07 * (_smooth_noise(size, 5, 3, rng) - 0.5) + 0.03 * (rng.random((size, size, 1)) - 0.5)


def _draw_hairs(image: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(0, 5))):
        a, b, c = rng.uniform(-1, 1), rng.uniform(-0.8, 0.8), rng.uniform(-0.4, 0.4)
        if rng.random() < 0.5:
            x, y = y, x
        image[abs(y - a - b * x - c * x * x) < 0.018] *= 0.35


def _lesion(name: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    look = LESIONS[name]
    x, y = _grid(size)
    scale, turn = rng.uniform(0.4, 0.62), rng.uniform(0, np.pi)
    cx, cy = rng.uniform(-0.18, 0.18, 2)
    along = ((x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)) / (scale * look.stretch)
    across = ((y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)) / scale
    angle = np.arctan2(across, along)
    waves = sum(rng.normal() / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 8))
    radius = np.hypot(along, across) / (1 + look.rough * waves)
    blend = _structure(look.structure, along, across, radius, rng)[..., None]
    first, second, *third = [np.array(color, np.float32) * rng.uniform(0.9, 1.1) for color in look.colors]
    paint = first * (1 - blend) + second * blend
    for color in third:
        veil = np.clip(3 * _smooth_noise(size, 3, 1, rng) - 1.6, 0, 1)
        paint = paint * (1 - veil) + color * veil
    edge = np.clip((1 - radius) / (0.25 if look.rough < 0.1 else 0.12), 0, 1)[..., None]
    image = _skin(size, rng) * (1 - edge) + paint * edge
    _draw_hairs(image, x, y, rng)
    return image, radius < 0.95


def render_lesions(classes: Sequence[str], per_class: int, *, size: int = 64, seed: int = 0) -> SceneSet:
    """Render skin-lesion-like images with lesion masks (for tests and demos; of no diagnostic value).

    Args:
        classes: names from `LESIONS`.
        per_class: images of each class, at least 1.
        size: height and width in pixels, at least 8.
        seed: another seed gives other images.

    Returns:
        A `SceneSet` whose masks are True on the lesion.

    Raises:
        ValueError: an unknown class, `per_class` below 1 or `size` below 8.

    Example:
        >>> render_lesions(["melanoma"], per_class=3).masks.any()
        np.True_
    """
    if unknown := [name for name in classes if name not in LESIONS]:
        raise ValueError(f"Unknown lesion {unknown[0]!r}; known are {sorted(LESIONS)}.")
    return _render(_lesion, classes, per_class, size, seed)


def _texture(_: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x, y = _grid(size)
    angle, scale = rng.uniform(0, np.pi), rng.uniform(0.25, 0.7)
    along = (x * np.cos(angle) + y * np.sin(angle)) / scale
    across = (y * np.cos(angle) - x * np.sin(angle)) / scale
    a, b, c = rng.uniform(0.5, 2.5, 3)
    warp = 2 * _smooth_noise(size, 4, 1, rng)[..., 0]
    blend = (0.5 + 0.5 * np.sin(2 * np.pi * (a * along + warp)) * np.sin(2 * np.pi * (b * across + c * warp)))[
        ..., None
    ]
    return _color(rng) * (1 - blend) + _color(rng) * blend, np.zeros((size, size), bool)


def textures(count: int, *, size: int = 64, seed: int = 0) -> SceneSet:
    """Full-frame warped gratings: a far-OOD set without any object.

    Example:
        >>> textures(3, size=32).images.shape
        (3, 32, 32, 3)
    """
    return _render(_texture, ["texture"], count, size, seed)


def _noise_image(_: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    cells = int(rng.choice([4, 8, size // 2, size - 1]))
    return _smooth_noise(size, min(cells, size - 1), 3, rng), np.zeros((size, size), bool)


def noise(count: int, *, size: int = 64, seed: int = 0) -> SceneSet:
    """Colour noise of several grain sizes: a far-OOD set.

    Example:
        >>> noise(2, size=32).label_names
        ['noise']
    """
    return _render(_noise_image, ["noise"], count, size, seed)


def digits(count: int, *, size: int = 64, seed: int = 0) -> SceneSet:
    """Real handwritten digits (8x8 scans, 1,797 of them, shipped with scikit-learn): a far-OOD set.

    Args:
        count: how many, drawn without replacement, at most 1,797.
        size: they are enlarged to this size (bicubic).
        seed: which ones.

    Raises:
        ValueError: `count` outside [1, 1797].
    """
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    if not 1 <= count <= len(scans):
        raise ValueError(f"count={count}: scikit-learn ships {len(scans)} digits, ask for 1 to {len(scans)}.")
    chosen = np.sort(np.random.default_rng(seed).choice(len(scans), count, replace=False))
    images = np.empty((count, size, size, 3), np.uint8)
    for row, index in enumerate(chosen):
        scan = Image.fromarray((scans[index].reshape(8, 8) * (255 / 16)).astype(np.uint8))
        images[row] = np.asarray(scan.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    return SceneSet(images, np.zeros(images.shape[:3], bool), labels[chosen].astype(np.int64), list("0123456789"))


def write_folder(made: SceneSet, root: str | Path) -> Path:
    """Write a set as an ordinary image folder: ROOT/<class name>/00000.png.

    Returns:
        `root` as a `Path`.
    """
    root = Path(root)
    counts = dict.fromkeys(range(len(made.label_names)), 0)
    for image, label in zip(made.images, made.labels.tolist(), strict=True):
        folder = root / made.label_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{counts[label]:05d}.png")
        counts[label] += 1
    return root
