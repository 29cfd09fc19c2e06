"""Decoded and transformed images in batches, in order, with failures recorded beside them."""

from __future__ import annotations

__all__ = ["ImageBatch", "load_batches"]

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ood_core.data.depth import NOTE
from ood_core.data.sources import ImageSource
from ood_core.errors import ImageError, UsageError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ImageBatch:
    """The decodable images of one chunk of a source.

    Attributes:
        indices: int64 [b], positions in the source.
        pixels: float32 [b, 3, H, W]; [0, 3, 0, 0] if every image failed.
        failures: (position in the source, reason) of the others.
        notes: (position in the source, note) of decoded images that are odd: "constant" (of one colour),
            "narrow:MAXIMUM" (16 bits of which only the lowest are used), "channels:NUMBER" (some are left out).
    """

    indices: np.ndarray
    pixels: Tensor
    failures: list[tuple[int, str]]
    notes: list[tuple[int, str]] = field(default_factory=list)


def load_batches(
    source: ImageSource,
    transform: Callable[[Image.Image], Tensor],
    batches: Sequence[Sequence[int]] | None = None,
    *,
    batch_size: int = 64,
    workers: int = 0,
    on_error: str = "raise",
    progress: bool | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    max_pixels: int | None = None,
) -> Iterator[ImageBatch]:
    """Iterate over a source in chunks of consecutive images.

    The batches are the same for any number of workers. An image that cannot be decoded is never replaced: its
    batch is that much smaller.

    Args:
        source: the images.
        transform: RGB image -> float32 [3, H, W], the same size for all; picklable if there are workers.
        batches: positions in the source, chunk by chunk; None: chunks of `batch_size`.
        batch_size: images per chunk, failures included.
        workers: processes that decode; 0 decodes in this one.
        on_error: "raise" stops at the first chunk with a failure, "record" goes on.
        progress: show a bar on stderr; None: only on a terminal.
        indices: what to cut into chunks, as positions in the source; None: all.
        max_pixels: larger images are failures; None: the source's limit.

    Raises:
        UsageError: an argument out of range.
        ImageError: an image that cannot be decoded, with `on_error="raise"`; the message names it.

    Example:
        >>> for batch in load_batches(source, backbone.transform, batch_size=64):  # doctest: +SKIP
        ...     features = backbone.encode_image(batch.pixels)
    """
    if on_error not in ("raise", "record"):
        raise unknown_name("on_error", on_error, ["raise", "record"])
    if batch_size < 1 or workers < 0:
        raise UsageError(f"batch_size={batch_size}, workers={workers}: at least 1 and at least 0 are needed.")
    if batches is None:
        wanted = range(len(source)) if indices is None else np.asarray(indices, np.int64).tolist()
        batches = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    return _iterate(_Chunks(source, transform, batches, max_pixels), workers, on_error, progress)


def _iterate(chunks: _Chunks, workers: int, on_error: str, progress: bool | None) -> Iterator[ImageBatch]:
    batches = iter(_in_order(chunks, workers))  # workers start here, before the bar has a thread
    with _progress_bar(sum(map(len, chunks.batches)), progress) as advance:
        for batch in batches:
            if batch.failures and on_error == "raise":
                raise ImageError(f"{batch.failures[0][1]} Mend or remove it, or pass on_error='record'.")
            advance(len(batch.indices) + len(batch.failures))
            yield batch


@dataclass(frozen=True)
class _Chunks:
    """Chunk number -> batch; what a worker process gets."""

    source: ImageSource
    transform: Callable[[Image.Image], Tensor]
    batches: Sequence[Sequence[int]]
    max_pixels: int | None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, chunk: int) -> ImageBatch:
        import torch

        loaded: list[int] = []
        pixels: list[Tensor] = []
        failures: list[tuple[int, str]] = []
        notes: list[tuple[int, str]] = []
        for index in self.batches[chunk]:
            try:
                image = self.source.open(index, max_pixels=self.max_pixels)
            except ImageError as error:
                failures.append((index, str(error)))
                continue
            loaded.append(index)
            if note := image.info.get(NOTE) or _constant(image):
                notes.append((index, note))
            pixels.append(self.transform(image))
        stacked = torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0)
        return ImageBatch(np.array(loaded, np.int64), stacked, failures, notes)


def _constant(image: Image.Image) -> str | None:
    """ "constant" if all pixels are the same; three that differ are proof enough that they are not."""
    width, height = image.size
    if len({image.getpixel(at) for at in ((0, 0), (width // 2, height // 2), (width - 1, height - 1))}) > 1:
        return None
    extrema: Any = image.getextrema()  # (low, high) of each of three channels
    return "constant" if all(low == high for low, high in extrema) else None


def _in_order(chunks: _Chunks, workers: int) -> Iterable[ImageBatch]:
    workers = min(workers, len(chunks))
    if workers == 0 or len(chunks) == 1:  # one chunk cannot be decoded ahead of its use
        return map(chunks.__getitem__, range(len(chunks)))
    import torch
    from torch.utils.data import DataLoader

    return DataLoader(
        chunks,  # type: ignore[arg-type]  # any sequence will do
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,  # type: ignore[arg-type]
        generator=torch.Generator(),  # the default would draw from the caller's random numbers
    )


def _unchanged(batch: ImageBatch) -> ImageBatch:
    return batch


@contextmanager
def _progress_bar(total: int, show: bool | None) -> Iterator[Callable[[int], Any]]:
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)
