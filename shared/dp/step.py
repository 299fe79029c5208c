"""One private optimizer step over patients, with Opacus.

Formal guarantee. Neighbouring data sets differ by one patient with all of that patient's records. For a batch
of patients the update is

    (Σ_p clip(g_p, C) + N(0, (σC)² I)) / n        clip(g, C) = g · min(1, C / ‖g‖)

where g_p is the gradient of patient p's loss, itself the mean over that patient's K records. Adding or
removing a patient changes the sum by at most C = ``max_grad_norm`` in L2, so one step is the Gaussian
mechanism with ``noise_multiplier`` σ; with Poisson sampling of the patients it is the mechanism that
:mod:`shared.accounting` composes. n = ``expected_patients`` must be a public constant (``sample_rate`` times
the declared number of patients), never the batch's size or the true count, which are sensitive.

| case | what happens |
| --- | --- |
| empty batch | a noise-only step, like any other: its absence would tell that nobody was sampled |
| a patient's gradient is not finite | the patient contributes zero; NaN would void the bound |
| batch larger than memory | physical parts; clipped sums add up, noise is added once |
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from shared.tasks.base import Batch

Loss = Callable[[nn.Module, Batch], Tensor]
_RECORDS_AT_ONCE = 64
"""Per-record gradients of LungCTNet take 1.7 MB each; this bounds them to about 110 MB."""


class PrivateStep:
    """Clips, sums, noises and applies: see the module's guarantee.

    Args:
        model: Trained in place.
        optimizer: Applies the noised gradient.
        loss: Returns ``(B,)``, one value a patient.
        noise_multiplier: σ, positive.
        max_grad_norm: C, the bound on a patient's gradient.
        expected_patients: The public normaliser n.
        generator: Source of the noise.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Loss,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_patients: float,
        generator: Generator,
    ) -> None:
        self._loss = loss
        self._model = GradSampleModule(model, loss_reduction="sum")
        self._optimizer = DPOptimizer(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_patients,
            generator=generator,
        )

    def __call__(self, batch: Batch) -> None:
        """Take one step on ``batch``, which may be empty."""
        parts = list(split(batch, _RECORDS_AT_ONCE)) or [batch]
        for position, part in enumerate(parts):
            self._set_patient_gradients(part)
            self._optimizer.signal_skip_step(position < len(parts) - 1)
            self._optimizer.step()
            self._optimizer.zero_grad()

    def close(self) -> None:
        """Detach from the model, leaving it an ordinary one."""
        self._model.to_standard_module()

    def _set_patient_gradients(self, batch: Batch) -> None:
        """Leave ``grad_sample`` ``(B, ...)`` on each parameter: a patient's, not a record's."""
        parameters = self._optimizer.params
        if not len(batch):
            for parameter in parameters:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
            return
        with warnings.catch_warnings():
            # The first layer's input is data and has no gradient; torch remarks on it at every hook.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            self._loss(self._model, batch).sum().backward()
        for parameter in parameters:
            # The K records of a patient are consecutive rows: their sum is the gradient of the patient's mean.
            by_record = parameter.grad_sample.view(len(batch), -1, *parameter.shape)
            parameter.grad_sample = by_record.sum(1)
        drop_non_finite([parameter.grad_sample for parameter in parameters])


class OrdinaryStep:
    """The same step without privacy: the mean gradient of the sampled patients, neither clipped nor noised."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        self._model, self._optimizer, self._loss = model, optimizer, loss

    def __call__(self, batch: Batch) -> None:
        """Take one step on ``batch``; an empty one changes nothing."""
        if not len(batch):
            return
        self._optimizer.zero_grad()
        self._loss(self._model, batch).mean().backward()
        self._optimizer.step()

    def close(self) -> None:
        """Nothing to detach."""


def split(batch: Batch, records: int) -> list[Batch]:
    """Split a batch into parts of at most ``records`` records, keeping each patient whole."""
    if not len(batch):
        return []
    per_patient = next(iter(batch.fields.values())).shape[1]
    size = max(1, records // per_patient)
    pieces = {name: tensor.split(size) for name, tensor in batch.fields.items()}
    return [Batch(dict(zip(pieces, part, strict=True))) for part in zip(*pieces.values(), strict=True)]


def drop_non_finite(gradients: Sequence[Tensor]) -> None:
    """Zero, in place, every patient whose gradient holds a value that is not finite.

    Args:
        gradients: One tensor ``(B, ...)`` per parameter; a patient is dropped from all of them.
    """
    finite = torch.stack([gradient.flatten(1).isfinite().all(1) for gradient in gradients]).all(0)
    if not finite.all():
        for gradient in gradients:
            gradient[~finite] = 0.0
