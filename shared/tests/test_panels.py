"""Columns, histograms and grids of pictures, pixel by pixel."""

import numpy as np
import pytest
from ood_core.pictures import panels
from PIL import Image

RED, BLUE = "#ff0000", "#0000ff"
PAPER = (255, 255, 255)


def column(picture, x):
    """Height of what stands at x."""
    pixels = np.asarray(picture)[:, x]
    return int((pixels != PAPER).any(-1).sum())


def test_columns_are_as_high_as_their_values():
    picture = panels.bars([1.0, 0.5, 0.0], [RED, BLUE, RED], 300)
    assert picture.size == (300, 300)
    assert [column(picture, x) for x in (50, 150, 250)] == [300, 151, 1]
    assert picture.getpixel((50, 299)) == (255, 0, 0)
    assert picture.getpixel((150, 299)) == (0, 0, 255)
    assert column(picture, 100) == 0  # a gap
    assert column(panels.bars([0.0], [RED], 100), 50) == 1


def test_a_histogram_counts_between_the_least_and_the_largest():
    picture = panels.histogram([0.0, 0.1, 0.2, 10.0], [], 100, bins=10)
    heights = [column(picture, x) for x in range(5, 100, 10)]
    assert heights == [100, *[1] * 8, 34]


@pytest.mark.parametrize(("value", "x"), [(-10.0, 2), (0.0, 50), (10.0, 97)])
def test_marks_cross_the_whole_histogram(value, x):
    picture = panels.histogram([-10.0, 10.0], [(RED, value)], 100)
    assert np.abs(np.array(picture.getpixel((x, 0))) - (255, 0, 0)).sum() == 0
    assert column(picture, x) == 100


def test_a_mark_outside_widens_the_histogram_and_nothing_is_no_error():
    picture = panels.histogram([0.0, 0.0], [(BLUE, 1.0)], 100, bins=10)
    assert column(picture, 5) == 100
    assert picture.getpixel((97, 0)) == (0, 0, 255)
    assert panels.histogram([], [(BLUE, 0.5)], 100).getpixel((2, 0)) == (0, 0, 255)
    assert column(panels.histogram([3.0, 3.0], [], 100, bins=10), 5) == 100


def test_a_grid_shows_whole_pictures_in_their_places():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (99, 0, 99)]
    pictures = [Image.new("RGB", (50, 25), colour) for colour in colours]
    page = panels.grid(pictures, 300)
    for place, colour in enumerate(colours):
        row, column_ = divmod(place, 3)
        assert page.getpixel((column_ * 100 + 50, row * 100 + 50)) == colour
        assert page.getpixel((column_ * 100 + 50, row * 100 + 10)) == PAPER  # not stretched
    assert page.getpixel((250, 150)) == PAPER
    assert panels.grid(pictures[:1], 100).getpixel((50, 50)) == (255, 0, 0)
