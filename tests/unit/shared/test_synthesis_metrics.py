"""Distances of generated images, against cases whose answer is known by other means."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from shared import synthesis_metrics as metrics

RNG = np.random.default_rng(0)


def normal(count: int, size: int = 6, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, size)) + shift


def test_frechet_distance_agrees_with_the_matrix_root() -> None:
    one, other = normal(200, seed=1), normal(150, seed=2) @ np.diag([1, 2, 3, 1, 1, 0.5]) + 0.3
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert metrics.frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_fewer_items_than_features_is_finite() -> None:
    assert np.isfinite(metrics.frechet_distance(normal(5, 40), normal(7, 40, seed=3)))


@given(st.floats(0.0, 5.0))
def test_a_shift_alone_gives_its_square_times_the_features(shift: float) -> None:
    same = normal(300, 4)
    assert metrics.frechet_distance(same, same + shift) == pytest.approx(4 * shift**2, abs=1e-6)


def test_kernel_distance_is_unbiased_about_zero_for_equal_distributions() -> None:
    values = [metrics.kernel_distance(normal(40, seed=2 * n), normal(40, seed=2 * n + 1)) for n in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert metrics.kernel_distance(normal(40), normal(40, shift=2.0, seed=1)) > 10 * np.std(values)


def test_precision_and_recall_tell_missing_modes_from_wrong_images() -> None:
    both = np.concatenate([normal(100, 2), normal(100, 2, shift=50.0, seed=1)])
    one_mode = normal(100, 2, seed=2)
    precision, recall = metrics.precision_and_recall(both, one_mode)
    assert precision > 0.8
    assert recall < 0.6
    precision, recall = metrics.precision_and_recall(one_mode, both)
    assert precision < 0.6
    assert recall > 0.8


def test_histogram_distance_is_the_shift_of_a_constant() -> None:
    images = np.full((3, 4, 4), 0.25)
    assert metrics.histogram_distance(images, images + 0.5) == pytest.approx(0.5)
    assert metrics.histogram_distance(images, images) == 0.0


def test_a_wave_has_its_power_at_its_own_frequency() -> None:
    x = np.arange(16)
    wave = np.cos(2 * np.pi * 3 * x / 16)[None, None, :].repeat(16, axis=1)
    spectrum = metrics.radial_spectrum(wave)
    assert spectrum.argmax() == 2  # frequencies begin at 1
    assert spectrum[2] > 1e6 * np.delete(spectrum, 2).max()


def test_ten_times_the_contrast_is_two_decades_of_power() -> None:
    images = RNG.normal(size=(10, 16, 16))
    assert metrics.spectrum_distance(images, 10 * images) == pytest.approx(2.0)


def test_one_image_again_and_again_has_no_diversity() -> None:
    real = RNG.normal(size=(20, 8, 8))
    assert metrics.diversity(real, np.repeat(real[:1], 20, axis=0)) == 0.0
    assert metrics.diversity(real, real) == pytest.approx(1.0)


def test_copies_of_training_items_are_nearer_to_them() -> None:
    training, heldout = normal(50, seed=4), normal(50, seed=5)
    assert metrics.neighbour_ratio(training + 0.01, training, heldout) < 0.1
    assert metrics.neighbour_ratio(normal(200, seed=6), training, heldout) == pytest.approx(1.0, abs=0.15)
