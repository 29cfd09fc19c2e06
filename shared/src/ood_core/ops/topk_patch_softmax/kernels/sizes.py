"""How large the tiles are, and what every kernel is compiled with."""

# TILE x TILE logits per program, DEPTH features at a time; groups have TILE entries.
TILE, DEPTH = 64, 16
# Fusion is named because its default changes between versions of Triton.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
