"""How far does one patient more move the clipped sum, wherever the patient is inserted?

The guarantee says: by at most C, ``max_grad_norm``. Under weights that a server made for the purpose, a difference in
the last bit of a patient's forward pass becomes another gradient. A hospital's patients stand in the order of their
pseudonyms, so one patient more moves all behind by a row, or into the next pass. If kernels round by row, all of those
gradients change, and the sum by many times C.

The rounds are real ones; only the noise is left out. Every patient joins.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor, nn

from client.training import Randomness, passes_of, rung_of, train_round
from shared.dp.noise import KEY_BYTES
from shared.dp.rungs import Rung, ladder
from shared.errors import PlanError
from shared.models.cnn import LungCTNet
from shared.models.recurrent import GlucoseForecaster
from shared.plan import RunPlan
from shared.tasks.base import Batch, Task
from shared.tasks.registry import find_task
from shared.weights import Vector, pack

DECLARED: Final = 140
"""Of a hospital: its passes are then as full as 64 records permit, for one and for two records of a patient."""
_SPREADS: Final = (0.3, 1.0, 3.0)
_SEED: Final = 7
Prepare = Callable[[nn.Module], None]
Make = Callable[[Task, int, int, int], Batch]
"""Makes a batch from a task, the number of patients, K and the patients of a pass."""


@dataclass(frozen=True)
class PositionResult:
    """What the attack found.

    Attributes:
        task: Its name.
        moved: The farthest that one patient more moved the clipped sum, in units of C.
        rung: The rung that the rounds ran on.
        threads: The threads of that rung.
        patients: How many there are beside the one who is inserted.
        position: Where that patient was inserted in the worst case.
    """

    task: str
    moved: float
    rung: str
    threads: int
    patients: int
    position: int


def attack_position(task: str, *, threads: int = 1, rung: str | None = None) -> PositionResult:
    """Insert a patient at the front, in the middle, at the end and around a pass's border; return the worst.

    Args:
        task: Its name.
        threads: The wanted number of torch's threads.
        rung: Run on this rung instead of the one that the self-test takes.

    Raises:
        PlanError: If there is no such task or rung.
        FederationError: With ``UNSAFE_KERNELS``, if no rung is safe on this machine.
    """
    found = find_task(task)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plan = _plan(found)
        taken = rung_of(found, plan, DECLARED) if rung is None else _rung(rung, threads)
        moved, position = max(_moves(found, plan, taken))
    finally:
        torch.set_num_threads(before)
    return PositionResult(task, moved, taken.name, taken.threads, DECLARED, position)


def _rung(name: str, threads: int) -> Rung:
    rungs = {rung.name: rung for rung in ladder(threads)}
    if name not in rungs:
        raise PlanError(f"With {threads} threads there is no rung {name!r}. The rungs are: {', '.join(rungs)}.")
    return rungs[name]


def _plan(task: Task) -> RunPlan:
    """Return one step that everybody joins."""
    changed = {"task": task.name, "rounds": 1, "local_steps": 1, "sample_rate": 1.0, "generator_steps": 0}
    return RunPlan.from_mapping({**task.defaults, **changed, "noise_multiplier": 1.0, "delta": 1e-5})


def _moves(task: Task, plan: RunPlan, rung: Rung) -> Iterator[tuple[float, int]]:
    """Yield how far a patient moved the sum, in units of C, and where the patient was inserted."""
    size = passes_of(task, plan, DECLARED).size
    for prepare in _WEIGHTS[type(task.build())]:
        weights = _weights(task, prepare)
        for make in _PATIENTS.get(type(task.build()), (_random,)):
            whole = make(task, DECLARED + 1, plan.records_per_patient, size)
            without = _sum(task, plan, rung, weights, whole, [*range(1, DECLARED + 1)])
            for position in (0, size - 1, size, DECLARED // 2, DECLARED):
                order = [*range(1, position + 1), 0, *range(position + 1, DECLARED + 1)]
                there = _sum(task, plan, rung, weights, whole, order)
                yield float((there - without).norm()) / plan.max_grad_norm, position


def _sum(task: Task, plan: RunPlan, rung: Rung, weights: Vector, whole: Batch, order: list[int]) -> Tensor:
    """Return the clipped sum of a round over patients in this order, ``(D,)``."""
    recorder = _Recorder([])
    train_round(
        task,
        _Patients(whole, torch.tensor(order)),
        plan,
        1,
        weights,
        declared_patients=DECLARED,
        randomness=replace(Randomness.secure(secrets.token_bytes(KEY_BYTES)), noise=recorder),
        rung=rung,
    )
    return torch.cat(recorder.totals)


@dataclass(frozen=True)
class _Recorder:
    """Remembers the clipped sums exactly, and adds nothing."""

    totals: list[Tensor]

    def add(self, total: Tensor, standard_deviation: float) -> Tensor:  # noqa: ARG002 - a source of noise
        self.totals.append(total.flatten().double())
        return total


@dataclass(frozen=True)
class _Patients:
    """Patients in memory, whose records are always the same ones."""

    whole: Batch
    order: Tensor

    def __len__(self) -> int:
        return len(self.order)

    @property
    def keys(self) -> npt.NDArray[np.uint8]:
        return np.arange(16 * len(self), dtype=np.uint32).astype(np.uint8).reshape(-1, 16)

    def draw(self, patients: Tensor, records_per_patient: int, generator: Generator) -> Batch:  # noqa: ARG002
        return Batch({name: tensor[self.order[patients]] for name, tensor in self.whole.fields.items()})


def _weights(task: Task, prepare: Prepare) -> Vector:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = task.build()
        prepare(model)
        return pack(model)


def _chaotic(spread: float) -> Prepare:
    """Return what gives every weight this spread: a recurrent state then forgets nothing, least of all rounding."""

    def prepare(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.normal_(0.0, spread)

    return prepare


def _cancelling(model: nn.Module) -> None:
    """Make hidden units that are equal in exact arithmetic, of large values, and subtract them."""
    network = cast(LungCTNet, model)
    first, second, hidden, last = (
        network.features[0],
        network.features[3],
        network.classifier[1],
        network.classifier[3],
    )
    weights = [layer.get_parameter("weight") for layer in (first, second, hidden, last)]
    biases = [layer.get_parameter("bias") for layer in (first, second, hidden, last)]
    weights[0].zero_()[:4] = torch.rand(4, 1, 3, 3) * 3e3 / 9 * 4
    biases[0].zero_()
    biases[1].fill_(1e-6)
    weights[1].zero_()
    half = torch.randn(64, 3136) * 100.0 / 8
    weights[2][:64], weights[2][64:] = half, half
    biases[2].fill_(1e-3)
    signs = torch.randn(64) * 300.0 / 8
    weights[3].zero_()[1] = torch.cat([signs, -signs])
    biases[3].zero_()


def _random(task: Task, count: int, records: int, _size: int) -> Batch:
    return task.random_patients(count, records, Generator().manual_seed(_SEED))


def _alike(task: Task, count: int, records: int, size: int) -> Batch:
    """Return patients with one image; those whom one patient more moves into an odd row have the other label."""
    one = _random(task, 1, 1, size)["image"]
    # The patient who is inserted is the first; the others' rows before that are counted from the second.
    row = (torch.arange(count) - 1) % size
    labels = ((row == size // 2 - 1) | (row == size // 2 - 2) | (row == size - 2)).long()
    labels[0] = 1
    return Batch(
        {
            "image": one.expand(count, records, *one.shape[2:]).contiguous(),
            "malignant": labels[:, None].expand(count, records).contiguous(),
        }
    )


_CHAOS: Final = tuple(_chaotic(spread) for spread in _SPREADS)


class _Weights(dict[type[nn.Module], tuple[Prepare, ...]]):
    """Hostile weights by model; chaotic ones for a model that none were made for."""

    def __missing__(self, key: type[nn.Module]) -> tuple[Prepare, ...]:
        return _CHAOS


_WEIGHTS: Final = _Weights({LungCTNet: (_cancelling,), GlucoseForecaster: _CHAOS})
_PATIENTS: Final[Mapping[type[nn.Module], tuple[Make, ...]]] = {LungCTNet: (_alike, _random)}
