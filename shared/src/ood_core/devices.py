"""What the hardware can do."""

from __future__ import annotations

import torch


def cpu_has_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16: without them it is slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
