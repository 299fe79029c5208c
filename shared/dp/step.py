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
| nobody was sampled | a noise-only step like any other, after as many passes over padding |
| a patient's gradient is not finite | the patient adds nothing, which is within the bound; NaN would void it |
| weights under which nobody's gradient is finite | nobody adds anything, the step is noise only |
| more patients than one pass takes | the clipped sums of all passes add up, noise is added once |

Every step has the same number of passes, all of one shape. Both are made of public numbers (:mod:`shared.dp.passes`);
rows that nobody fills are padding, which counts zero. One shape makes memory, and so running out of it, independent of
the data.

Kernels also round by the shape and by the row. Under weights made for it, one patient more could otherwise change the
other patients' rounded gradients, and with them the sum by more than C. So the passes run on kernels under which a
patient's gradient is the same in every bit, in whichever row and company: :mod:`shared.dp.rungs` says which there are,
and :mod:`shared.dp.selftest` finds them and bounds the rounding of the sum itself.

The work of a step is constant: the same operations on the same shapes, whoever was sampled and whatever their gradients
are. The server chooses the weights and sees when a reply comes. Work that depended on a patient would be a message
about that patient outside the ledger. So nothing here branches on a value: rows that do not count are cleared by an
operation of constant work (:func:`shared.dp.tape.counted`), and no pass is run again. Numbers too small for the normal
format, which take a processor many times as long, are taken as zero (:mod:`shared.dp.subnormals`).
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from shared.dp.engine import BookKeeping
from shared.dp.noise import NoiseSource
from shared.dp.opacus_engine import OpacusHooks
from shared.dp.optimizer import NoisySum
from shared.tasks.base import Batch

Loss = Callable[[nn.Module, Batch], Tensor]


class Engine(Protocol):
    """Clips every patient's gradient in one pass over a model."""

    def start(self, patients: int) -> None:
        """Expect a forward and backward pass over ``patients`` patients."""

    def clipped_sum(self, losses: Tensor, bound: float, real: int) -> Tensor:
        """Set ``grad`` to the clipped sum of the first ``real`` patients; return all norms ``(B,)``.

        A patient whose norm is not finite adds nothing, and the work is the same whichever patients those are.
        """

    def rows(self, losses: Tensor) -> tuple[Tensor, ...]:
        """Return, for the self-test, what each patient's row gives to the clipped sum: tensors ``(B, ...)``."""

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
        """Take one step on the patients of all ``parts``, of one size: :meth:`shared.dp.passes.Passes.of_step`."""
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
        self._engine.start(len(part))
        self._engine.clipped_sum(self._loss(self._model, part), self._bound, part.real)
        self._optimizer.signal_skip_step(not last)
        self._optimizer.step()
        self._optimizer.zero_grad()


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
