"""The models whose training step :mod:`simulations.benchmark` measures."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from shared.models.cnn import LungCTNet
from shared.models.gan import Discriminator
from shared.models.recurrent import Forecaster, GlucoseForecaster
from shared.models.unet import UNet
from shared.tasks.cgm_windows import HORIZON
from shared.tasks.glucose_forecast import HISTORY, pinball_loss


@dataclass(frozen=True)
class Case:
    """One model and its data.

    Attributes:
        build: Makes the model.
        opacus: Makes the model that Opacus can hook, where that is another one.
        draw: Returns ``(inputs, targets)`` of a batch.
        loss: Returns ``(B,)`` from outputs and targets.
        batches: Batch sizes of the full benchmark.
        images: Whether a memory layout can be chosen.
        records: Records of a patient where there are several: then a batch counts patients, ``draw`` gets the number
            of records, and book-keeping takes its step as training does, in padded passes of one size. Opacus clips
            each record for itself, for it knows no patients.
    """

    build: Callable[[], nn.Module]
    draw: Callable[[int, Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: tuple[int, ...]
    images: bool = True
    opacus: Callable[[], nn.Module] | None = None
    records: int = 1


def _binary(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").flatten(1).mean(1)


def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


def _classes(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def _images(side: int) -> Callable[[int, Generator], tuple[Tensor, Tensor]]:
    def draw(batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
        images = torch.randn(batch, 1, side, side, generator=generator)
        return images, (torch.rand(images.shape, generator=generator) > 0.7).float()

    return draw


def _labelled(side: int) -> Callable[[int, Generator], tuple[Tensor, Tensor]]:
    def draw(batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
        return _images(side)(batch, generator)[0], torch.randint(0, 2, (batch,), generator=generator)

    return draw


def _real(batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
    return _images(28)(batch, generator)[0], torch.ones(batch, 1)


def _readings(batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 12, 3, generator=generator), torch.randn(batch, 12, generator=generator)


def _recurrent(cell: str) -> Callable[[], nn.Module]:
    return lambda: Forecaster(getattr(nn, cell))


def _opacus_recurrent(cell: str) -> Callable[[], nn.Module]:
    from opacus import layers  # noqa: PLC0415 - only this benchmark wants Opacus's cells

    return lambda: Forecaster(getattr(layers, cell))


def _windows(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    readings = torch.rand(count, HISTORY, 4, generator=generator) * torch.tensor([200.0, 5.0, 60.0, 1439.0])
    return readings, 200.0 * torch.rand(count, HORIZON, generator=generator)


def _forecaster(cell: type[nn.RNNBase] = nn.GRU) -> nn.Module:
    """Return the task's model after its first steps: fresh, its read-out is zero and nothing else would move."""
    model = GlucoseForecaster(cell)
    nn.init.normal_(model.readout.weight, std=0.1)
    return model


def _opacus_forecaster() -> nn.Module:
    from opacus.layers import DPGRU  # noqa: PLC0415 - see above

    return _forecaster(DPGRU)


CASES = {
    "lungctnet": Case(LungCTNet, _labelled(28), _classes, (64, 256)),
    "unet": Case(UNet, _images(64), _binary, (16,)),
    "discriminator": Case(Discriminator, _real, _binary, (64,)),
    "ct-discriminator": Case(lambda: Discriminator(12, 32, 2), _labelled(32), _classes, (64,)),
    "lstm": Case(_recurrent("LSTM"), _readings, _squared, (256,), False, _opacus_recurrent("DPLSTM")),
    "gru": Case(_recurrent("GRU"), _readings, _squared, (256,), False, _opacus_recurrent("DPGRU")),
    "forecaster": Case(_forecaster, _windows, pinball_loss, (15, 64, 200), False, _opacus_forecaster, 4),
}
