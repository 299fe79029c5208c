"""Does what a patient gives depend on the patient's row or on others? A test of this machine's kernels, in every bit.

The test runs the task's own model, loss, engine and shape of a pass, on random batches that no patient is in. For each
rung of :mod:`shared.dp.rungs` it compares every patient's row of all that enters the clipped sum: each layer's squared
norm, and the formed gradient, or the inputs and output gradients of a product over all patients.

| batch | compared with the reference batch of different patients | shows that |
| --- | --- | --- |
| everybody some rows further, or in reverse | every patient | row and neighbours do not matter |
| the same patient in every row | every row | all rows are alike |
| one patient, then padding | the first row | it does not matter if nobody else is there |

All is done under ordinary weights and under weights of about the largest norm that sites permit. Rounding depends on
how a kernel divides its work, and that on shapes and threads; values with all bits in use make a difference visible.

Equal in every bit means that with or without one patient, in any row and any pass, all others give the same. What then
remains is the order in which a sum over rows is added up. Its terms are at most C a patient where gradients were
formed. Where they were not (the Gram path), a patient's terms add up to M ≤ norm·√(32T) for T positions
(:func:`shared.dp.tape.norm_of_grams`). Passes are added in double precision. ``fedward-sim attack position`` measures
what all of it comes to: no more than 1e-5 of C.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Generator, Tensor, nn

from shared.dp.passes import Passes
from shared.dp.rungs import Rung, ladder
from shared.dp.step import ENGINES, Engine
from shared.dp.subnormals import subnormals_are_flushed
from shared.errors import ErrorCode, FederationError
from shared.tasks.base import Batch, Task, hold_all_but

HOSTILE_NORM = 9e3
_ALONE = 3
"""Patients to tell apart where each has a pass of its own."""
_SEED = 20
Rows = tuple[Tensor, ...]
"""What patients give to the clipped sum, tensors ``(B, ...)``: see :meth:`shared.dp.step.Engine.rows`."""


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
    """Return the largest difference under one model's weights."""
    count = size if size > 1 else _ALONE
    patients = task.random_patients(count, shape.records_per_patient, Generator().manual_seed(_SEED)).to(shape.device)
    hold_all_but(task.private(model), model)
    engine = ENGINES[shape.engine](model)
    everybody = torch.arange(count)
    orders = (everybody.roll(1), everybody.roll(count // 3), everybody.flip(0), everybody[:1].repeat(count))
    try:
        reference = _rows(task, model, engine, patients, everybody, size)
        for order in (*orders, everybody[:1], everybody[count // 2 : count // 2 + 1]):
            if found := _apart(reference, order, _rows(task, model, engine, patients, order, size)):
                return found
        return 0.0
    finally:
        engine.close()


def _rows(task: Task, model: nn.Module, engine: Engine, patients: Batch, order: Tensor, size: int) -> Rows:
    """Return what the patients of ``order`` ``(N,)`` give, in passes of ``size`` patients and a row of padding."""
    found = []
    for part in order.split(size):
        batch = Batch({name: tensor[part] for name, tensor in patients.fields.items()}).padded(size + 1)
        engine.start(len(batch))
        found.append([tensor[: len(part)].detach().clone() for tensor in engine.rows(task.loss(model, batch))])
    return tuple(torch.cat(tensors) for tensors in zip(*found, strict=True))


def _apart(reference: Rows, order: Tensor, rows: Rows) -> float:
    """Return the largest difference of any row from its patient's in the reference; 0 only if every bit is equal."""
    return max(_relative(one[order], other) for one, other in zip(reference, rows, strict=True))


def _relative(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to the largest number; NaN is equal to NaN."""
    if torch.equal(one, other):
        return 0.0
    both = (one == other) | (one.isnan() & other.isnan())
    if both.all():
        return 0.0
    difference = float((one - other)[~both].abs().max() / one.abs().max())
    return difference if 0.0 < difference < float("inf") else 1.0
