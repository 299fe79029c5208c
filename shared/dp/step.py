"""One private optimizer step over patients.

Formal guarantee. Neighbouring data sets differ by one patient with all of that patient's records. The update is

    (Σ_p clip(g_p, C) + N(0, (σC)² I)) / n        clip(g, C) = g · min(1, C / ‖g‖)

where g_p is the gradient of patient p's loss, itself the mean over that patient's K records. Adding or removing a
patient changes the sum by at most C = ``max_grad_norm`` in L2, so one step is the Gaussian mechanism with
``noise_multiplier`` σ; with Poisson sampling of the patients it is the mechanism that :mod:`shared.accounting`
composes. n = ``expected_patients`` must be a public constant (``sample_rate`` times the declared number of patients),
never the batch's size or the true count, which are sensitive.

| case | what happens |
| --- | --- |
| nobody was sampled | a noise-only step like any other, after one pass over padding |
| a patient's gradient is not finite | the patient counts with blank records, within the bound; NaN would void it |
| not even padding's gradient is finite | hostile weights: nobody contributes, the step is noise only |
| more patients than one pass takes | passes of one size; clipped sums add up, noise is added once |

Every pass has the same shape, made of public numbers and filled up with padding that counts zero, at least one row of
it. Kernels round differently for different shapes; under weights made for it, one patient more could otherwise change
the other patients' rounded gradients, and with them the sum by more than C. It also makes memory, and so running out
of it, independent of the data.
"""

import math
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shared.dp.engine import BookKeeping
from shared.dp.noise import NoiseSource
from shared.dp.opacus_engine import OpacusHooks
from shared.dp.optimizer import NoisySum
from shared.tasks.base import Batch

Loss = Callable[[nn.Module, Batch], Tensor]
_RECORDS_AT_ONCE = 64
_OF_WHOM_ONE_MORE, _A_FEW = 10, 5
"""How many more than expected the passes have room for: one for every ten, and five.

Declared numbers are rounded and samples vary, and a pass with hardly anybody in it costs as much as a full one.
"""


class Engine(Protocol):
    """Clips every patient's gradient in one pass over a model."""

    def start(self, patients: int) -> None:
        """Expect a forward and backward pass over ``patients`` patients."""

    def clipped_sum(self, losses: Tensor, bound: float, real: int) -> Tensor:
        """Set ``grad`` to the clipped sum of the first ``real`` patients; return all norms ``(B,)``."""

    def close(self) -> None:
        """Detach from the model."""


ENGINES: dict[str, Callable[[nn.Module], Engine]] = {"bookkeeping": BookKeeping, "opacus": OpacusHooks}


class PrivateStep:
    """Clips, sums, noises and applies: see the module's guarantee.

    Args:
        model: Trained in place.
        optimizer: Applies the noised gradient.
        loss: Returns ``(B,)``, one value a patient.
        noise_multiplier: σ, positive.
        max_grad_norm: C, the bound on a patient's gradient.
        expected_patients: The public normaliser n.
        noise: Source of the noise.
        engine: Name in ``ENGINES``.
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
        noise: NoiseSource,
        engine: str = "bookkeeping",
    ) -> None:
        self._model, self._loss, self._bound = model, loss, max_grad_norm
        self._engine = ENGINES[engine](model)
        self._optimizer = NoisySum(
            optimizer,
            noise,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_patients,
        )

    def __call__(self, parts: Iterable[Batch]) -> None:
        """Take one step on the patients of all ``parts``, each padded to one size by :func:`padded_parts`."""
        waiting: Batch | None = None
        for part in parts:
            if waiting is not None:
                self._pass(waiting, last=False)
            waiting = part
        if waiting is None:
            raise ValueError("A private step needs at least one part, which may be all padding.")
        self._pass(waiting, last=True)

    def close(self) -> None:
        """Detach from the model, leaving it an ordinary one."""
        self._engine.close()

    def _pass(self, part: Batch, *, last: bool) -> None:
        broken = ~self._clipped_sum(part).isfinite()
        if broken[-1]:
            for parameter in self._optimizer.params:
                parameter.grad = torch.zeros_like(parameter)
        elif broken.any():
            self._clipped_sum(part.blank(broken))
        self._optimizer.signal_skip_step(not last)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _clipped_sum(self, part: Batch) -> Tensor:
        self._engine.start(len(part))
        return self._engine.clipped_sum(self._loss(self._model, part), self._bound, part.real)


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


def patients_at_once(records_per_patient: int, most_records: int | None = None, expected_patients: float = 0.0) -> int:
    """Return how many patients one pass takes beside one row of padding: a public number, made of public ones.

    Args:
        records_per_patient: K.
        most_records: How many records a pass may have at most, where they are so small that a pass costs more for
            being one than for what is in it. Then all who are expected, and a few more, share as few passes as
            possible. By default a pass takes ``_RECORDS_AT_ONCE``, whoever is expected.
        expected_patients: The public normaliser of the step, or any other public constant.
    """
    if most_records is None:
        return max(1, _RECORDS_AT_ONCE // records_per_patient - 1)
    most = max(1, most_records // records_per_patient - 1)
    wanted = math.ceil(expected_patients + expected_patients / _OF_WHOM_ONE_MORE) + _A_FEW
    return math.ceil(wanted / math.ceil(wanted / most))


def padded_parts(patients: Tensor, size: int, draw: Callable[[Tensor], Batch]) -> Iterable[Batch]:
    """Yield the batches of one step, drawn one at a time and all of one size; one of padding if nobody joins.

    Args:
        patients: ``(B,)`` who was sampled.
        size: Patients in a batch, from :func:`patients_at_once`; a row of padding comes on top.
        draw: Draws the records of some patients.
    """
    for part in patients.split(size) if len(patients) else (patients,):
        yield draw(part).padded(size + 1)
