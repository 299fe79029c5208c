"""Opacus 1.6.0 on channels-last images: wrong by itself, right behind our guard."""

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from torch import Tensor

from shared.dp.opacus_engine import OpacusHooks
from shared.models.cnn import LungCTNet

IMAGES = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


def make() -> LungCTNet:
    torch.manual_seed(1)
    return LungCTNet().double().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def losses(model: LungCTNet) -> Tensor:
    images = IMAGES.to(memory_format=torch.channels_last)
    return F.cross_entropy(model(images), LABELS, reduction="none")


def by_autograd() -> Tensor:
    """Each patient's gradient of the second convolution, one backward pass each: ``(B, 64, 32, 3, 3)``."""
    model = make()
    weight = model.features[3].weight
    return torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses(model)])


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_opacus_alone_is_wrong_on_channels_last() -> None:
    """The reason for the guard. When a later Opacus passes, the guard can go."""
    model = make()
    wrapped = GradSampleModule(model, loss_reduction="sum")
    losses(model).sum().backward()
    found, expected = model.features[3].weight.grad_sample, by_autograd()
    wrapped.to_standard_module()
    assert (found - expected).norm() / expected.norm() > 0.1


def test_behind_the_guard_it_agrees_with_autograd() -> None:
    model = make()
    engine = OpacusHooks(model)
    engine.start(len(LABELS))
    engine.clipped_sum(losses(model), 1e6, len(LABELS))
    engine.close()
    torch.testing.assert_close(model.features[3].weight.grad, by_autograd().sum(0), rtol=1e-9, atol=1e-12)
