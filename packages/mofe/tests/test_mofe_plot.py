"""Pictures of features."""

import pytest
import torch
from ood_mofe import plot

SETS = {"id": 30, "near": 12, "far": 5}


def test_every_image_is_a_dot_in_the_plane_of_the_known_ones(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    kept = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: kept.append(figure))
    generator = torch.Generator().manual_seed(0)
    panel = {name: torch.randn(count, 5, generator=generator).double() for name, count in SETS.items()}
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator).double()).Q
    plot.draw_features({"before": panel, "turned": {name: x @ turn for name, x in panel.items()}}, tmp_path / "f.png")
    dots = [
        {dot.get_label(): torch.from_numpy(dot.get_offsets().data) for dot in axis.collections} for axis in kept[0].axes
    ]
    assert [{name: len(x) for name, x in one.items()} for one in dots] == [SETS, SETS]
    before, turned = (torch.cat([one[name] for name in SETS]) for one in dots)
    torch.testing.assert_close(torch.cdist(before, before), torch.cdist(turned, turned))
    variance = torch.linalg.eigvalsh(panel["id"].T.cov())[-2:].flip(0)
    torch.testing.assert_close(dots[0]["id"].var(0), variance)
