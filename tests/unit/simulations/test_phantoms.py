"""Phantoms look like nodules, and the start that is made of them knows nothing of the disease."""

import numpy as np
import torch

from simulations.generators.phantoms import draw_phantoms
from simulations.phantom_start import train_on_phantoms


def test_phantoms_are_bright_in_the_middle_of_dark_lung() -> None:
    images = draw_phantoms(50, 32, np.random.default_rng(0))
    assert images.shape == (50, 32, 32)
    assert images.min() >= 0.0
    assert images.max() <= 1.0
    assert np.median(images[:, 14:18, 14:18].mean((1, 2))) > 2 * np.median(images)


def test_the_start_treats_both_classes_exactly_alike() -> None:
    model = train_on_phantoms(2, 0)
    latent, classes = torch.randn(5, model.generator.latent), (torch.zeros(5).long(), torch.ones(5).long())
    for maker in (model.generator, model.average):
        assert torch.equal(maker(latent, classes[0]), maker(latent, classes[1]))
    images = torch.rand(5, 1, 32, 32)
    assert torch.equal(model.judge(images, classes[0]), model.judge(images, classes[1]))


def test_the_same_seed_gives_the_same_start() -> None:
    torch.set_num_threads(1)
    first, again, other = (train_on_phantoms(2, seed) for seed in (0, 0, 1))
    one, two, three = (torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
