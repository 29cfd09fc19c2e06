"""Pictures of features."""

import pytest
import torch
from ood_mofe.plot import draw_features

SETS = {"id": 30, "near": 12, "far": 5}


def test_every_image_is_a_dot_in_every_panel(tmp_path):
    """An SVG names each dot."""
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    generator = torch.Generator().manual_seed(0)
    panel = {name: torch.randn(count, 5, generator=generator).double() for name, count in SETS.items()}
    draw_features({"before": panel, "after": panel}, tmp_path / "features.svg")
    drawn = (tmp_path / "features.svg").read_text()
    assert drawn.count("<use ") >= 2 * sum(SETS.values())
    for name in SETS:
        assert f"<!-- {name} -->" in drawn
