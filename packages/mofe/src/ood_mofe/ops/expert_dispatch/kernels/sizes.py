"""How large the tiles are, and what every kernel is compiled with."""

# Rows of a tile: few when experts have few, so that little of a tile is empty.
FEW, MANY = 16, 64
COLUMNS, DEPTH = 64, 32
# Tokens of a tile in the attention, and rows of the sums behind the backward pass.
TILE, SUMMED = 64, 32
PLANNED = 128
# Fusion is named because its default changes between versions of Triton.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
