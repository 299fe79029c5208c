"""PNG by hand, read back by somebody else's decoder."""

import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from shared.images import grey_png, grid


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_a_png_holds_the_image(height: int, width: int, enlarge: int) -> None:
    image = np.random.default_rng(height * 10 + width).random((height, width))
    read = imread(io.BytesIO(grey_png(image, enlarge)), format="png")
    assert read.shape == (height * enlarge, width * enlarge)
    np.testing.assert_allclose(read[::enlarge, ::enlarge], image, atol=0.5 / 255 + 1e-6)


def test_what_is_no_number_is_black_and_what_is_too_bright_is_white() -> None:
    read = imread(io.BytesIO(grey_png(np.array([[np.nan, -1.0, 2.0]]))), format="png")
    assert read.tolist() == [[0.0, 0.0, 1.0]]


def test_a_grid_lays_images_out_row_by_row() -> None:
    images = np.arange(3)[:, None, None] / 4 * np.ones((3, 2, 2))
    sheet = grid(images, columns=2)
    assert sheet.shape == (5, 5)
    assert [sheet[0, 0], sheet[0, 3], sheet[3, 0]] == [0.0, 0.25, 0.5]
    assert (sheet[3:, 3:] == 1.0).all()
