import numpy as np
import pytest

from simulations.generators.slices import diameter_px, shrink


def disc(radius: float) -> np.ndarray:
    axis = np.arange(64) - 31.5
    return np.where(np.hypot(axis[:, None], axis) <= radius, 200, 0).astype(np.uint8)


def test_the_diameter_of_a_disc_is_its_diameter() -> None:
    np.testing.assert_allclose(diameter_px(np.stack([disc(5), disc(20)])), [10, 40], rtol=0.03)


def test_shrinking_keeps_the_mean_and_leaves_a_black_margin() -> None:
    patch = shrink(disc(20)[None])[0].astype(float)
    assert patch.shape == (36, 36)
    assert patch[:4].max() == patch[:, -4:].max() == 0.0
    assert patch[4:-4, 4:-4].mean() == pytest.approx(disc(20).mean() / 255, rel=0.02)
