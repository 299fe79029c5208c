"""Phantoms look like nodules and know nothing of the disease."""

import numpy as np
import torch

from shared.metrics import auroc
from simulations.generators.phantoms import draw_phantoms
from simulations.phantom_start import train_on_phantoms


def test_phantoms_are_bright_in_the_middle_of_dark_lung() -> None:
    images, labels = draw_phantoms(50, 32, np.random.default_rng(0))
    assert images.shape == (50, 32, 32)
    assert images.min() >= 0.0
    assert images.max() <= 1.0
    assert np.median(images[:, 14:18, 14:18].mean((1, 2))) > 2 * np.median(images)
    assert set(labels) == {0, 1}


def test_a_label_says_nothing_of_the_phantoms_size_or_brightness() -> None:
    images, labels = draw_phantoms(1500, 32, np.random.default_rng(1))
    assert abs(auroc(labels, images.mean((1, 2), dtype=np.float64)) - 0.5) < 0.05


def test_the_same_seed_gives_the_same_start() -> None:
    torch.set_num_threads(1)
    first, again, other = (train_on_phantoms(2, seed) for seed in (0, 0, 1))
    one, two, three = (torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
