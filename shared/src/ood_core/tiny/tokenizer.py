"""Byte-level tokenizer of the embedded backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ByteTokenizer:
    """UTF-8 bytes of the lower-cased text between a start and an end mark.

    Token ids: 0 padding, byte + 1, 257 start, 258 end. The end mark is the largest id, as open_clip's
    text pooling expects.

    Example:
        >>> ByteTokenizer(context_length=5)(["ab"]).tolist()
        [[257, 98, 99, 258, 0]]
    """

    pad, start, end = 0, 257, 258
    vocab_size = 259

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without marks or padding."""
        return [byte + 1 for byte in text.lower().encode()]

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokenize to int64 [N, context_length]; longer texts are cut, the end mark stays."""
        length = context_length or self.context_length
        texts = [texts] if isinstance(texts, str) else list(texts)
        out = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(out, texts, strict=True):
            ids = [self.start, *self.encode(text)[: length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return out
