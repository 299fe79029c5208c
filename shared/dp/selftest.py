"""Does a patient's gradient depend on the patient's row or on others? A test of this machine's kernels, in every bit.

The test runs the task's own model, loss, engine and shape of a pass, on random batches that no patient is in. For each
rung of :mod:`shared.dp.rungs` it compares, in every bit:

| batch | what is compared with the reference batch of different patients | shows that |
| --- | --- | --- |
| everybody one row further, the last one first | every layer's norms | neither row nor neighbours matter |
| the same patient in every row | norms and gradients | all rows are alike |
| one patient, then padding | norms, and the gradient in the first row | it does not matter if nobody else is there |

A gradient is taken as it enters the clipped sum, with coefficient 1 for that row and 0 for all others. All is done
under ordinary weights and under weights of about the largest norm that sites permit. Rounding depends on how a kernel
divides its work, and that on shapes and threads; values with all bits in use make a difference visible.

Equal in every bit means that with or without one patient, in any row and any pass, all others' clipped gradients are
the same. What then remains is the order in which a sum over rows is added up. Its terms are at most C each, so a pass
of B rows errs by at most B²·2⁻²⁴·C where each patient's gradient was formed. Where it was not (the Gram path), a
patient's terms add up to M ≤ norm·√(32T) for T positions (:func:`shared.dp.tape.norm_of_grams`), and the bound is
B²T·√(32T)·2⁻²⁴·C. Passes are added in double precision.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Generator, Tensor, nn

from shared.dp.passes import Passes
from shared.dp.rungs import Rung, ladder
from shared.dp.step import ENGINES
from shared.dp.subnormals import subnormals_are_flushed
from shared.errors import ErrorCode, FederationError
from shared.tasks.base import Batch, Task, hold_all_but

HOSTILE_NORM = 9e3
_ALONE = 3
"""Patients to tell apart where each has a pass of its own."""
_SEED = 20
Row = tuple[Tensor, ...]
"""A patient's squared norms ``(L,)`` by layer, and where it is looked at the gradient ``(D,)``."""


@dataclass(frozen=True)
class Finding:
    """What the self-test saw on one rung.

    Attributes:
        rung: The rung.
        difference: The largest difference between what must be equal, relative to the largest entry. The test of a
            rung ends with the first kind of comparison that finds one.
        flushed: Whether subnormal numbers are zero on every thread.
    """

    rung: Rung
    difference: float
    flushed: bool

    @property
    def safe(self) -> bool:
        """Whether no bit differed."""
        return self.difference == 0.0


@dataclass(frozen=True)
class Shape:
    """What the kernels see, and so all that a finding depends on, beside the machine.

    Attributes:
        engine: Name in :data:`shared.dp.step.ENGINES`.
        passes: The plan's.
        records_per_patient: K.
        device: Where the model is.
    """

    engine: str
    passes: Passes
    records_per_patient: int
    device: str = "cpu"


def safe_rung(task: Task, shape: Shape, threads: int) -> Rung:
    """Return the first rung on which the self-test finds no difference.

    Raises:
        FederationError: With ``UNSAFE_KERNELS``, if there is none.
    """
    findings = climb(task, shape, threads)
    if not findings[-1].safe:
        raise FederationError(
            f"This machine's kernels round a patient's gradient of {task.name} by where it stands, even one by one. "
            "Nothing was trained. Run 'fedward-site selftest', and use another version of torch or another machine.",
            ErrorCode.UNSAFE_KERNELS,
        )
    return findings[-1].rung


def climb(task: Task, shape: Shape, threads: int) -> tuple[Finding, ...]:
    """Test the ladder from its fast end until a rung is safe; the last finding is that rung's, or of the last rung.

    Findings are kept for the life of the process, by the task's name and model, the shape and the number of threads.
    """
    size = min(shape.passes.size, shape.passes.room)
    alike = Shape(shape.engine, Passes(size, 1), shape.records_per_patient, shape.device)
    return _climb(_Named(task), alike, threads)


@dataclass(frozen=True, eq=False)
class _Named:
    """A task that equals another of the same name and model."""

    task: Task

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and self._names == other._names

    def __hash__(self) -> int:
        return hash(self._names)

    @property
    def _names(self) -> tuple[object, ...]:
        return self.task.name, self.task.build


@lru_cache(maxsize=256)
def _climb(named: _Named, shape: Shape, threads: int) -> tuple[Finding, ...]:
    findings: list[Finding] = []
    for rung in ladder(threads):
        findings.append(rung.run(lambda rung=rung: _examine(named.task, shape, rung)))  # type: ignore[misc]
        if findings[-1].safe:
            break
    return tuple(findings)


def _examine(task: Task, shape: Shape, rung: Rung) -> Finding:
    """Return the finding for one rung; runs in the rung's own thread."""
    passes, flushed = rung.passes(shape.passes), subnormals_are_flushed()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        ordinary, hostile = (prepare(task.build()).to(shape.device).train() for prepare in (_ordinary, _hostile))
        worst = _difference(task, ordinary, shape, passes.size) or _difference(task, hostile, shape, passes.size)
    return Finding(rung, worst, flushed)


def _ordinary(model: nn.Module) -> nn.Module:
    """Leave no weight at zero, under which rounding would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _hostile(model: nn.Module) -> nn.Module:
    """Give the weights the largest norm that a site permits, in no order."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        norm = torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum().sqrt()
        for parameter in model.parameters():
            parameter.mul_(HOSTILE_NORM / norm)
    return model


def _difference(task: Task, model: nn.Module, shape: Shape, size: int) -> float:
    """Return the largest difference under one model's weights: first of the norms, then of whole gradients."""
    count = size if size > 1 else _ALONE
    patients = task.random_patients(count, shape.records_per_patient, Generator().manual_seed(_SEED)).to(shape.device)
    hold_all_but(task.private(model), model)
    engine = ENGINES[shape.engine](model)

    def rows(order: list[int], whole: int) -> Iterator[Row]:
        """Yield what each patient of ``order`` gives, with the gradient for the first ``whole`` ones."""
        for start in range(0, len(order), size):
            part = torch.tensor(order[start : start + size])
            batch = Batch({name: tensor[part] for name, tensor in patients.fields.items()}).padded(size + 1)
            engine.start(len(batch))
            norms, gradient = engine.rows(task.loss(model, batch))
            with torch.no_grad():
                for row in range(len(part)):
                    yield (norms[:, row], gradient(row)) if start + row < whole else (norms[:, row],)

    try:
        everybody = list(range(count))
        reference = list(rows(everybody, whole=1))
        for order, whole in ((everybody[-1:] + everybody[:-1], 0), ([count // 2], 0), ([0] * count, count), ([0], 1)):
            found = max(_apart(reference[who], row) for who, row in zip(order, rows(order, whole), strict=True))
            if found:
                return found
        return 0.0
    finally:
        engine.close()


def _apart(one: Row, other: Row) -> float:
    """Return the largest difference of two rows, relative to the largest number; 0 only if they are equal."""
    return max(_relative(a, b) for a, b in zip(one, other, strict=False))


def _relative(one: Tensor, other: Tensor) -> float:
    if torch.equal(one, other):
        return 0.0
    both = (one == other) | (one.isnan() & other.isnan())
    if both.all():
        return 0.0
    difference = float((one - other)[~both].abs().max() / one.abs().max())
    return difference if 0.0 < difference < float("inf") else 1.0
