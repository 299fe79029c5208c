"""What a hostile server learns from a step's work: nothing, for it is the same whoever is there."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from client.training import draw_own, make_optimizer, passes_of, private_step
from shared.dp.engine import BookKeeping
from shared.dp.noise import KeyStream, SecureNoise
from shared.errors import PlanError
from shared.tasks.base import Batch, hold_all_but
from shared.tasks.registry import all_tasks, find_task
from shared.weights import unpack
from simulations.step_attacks.timing import OVERFLOW, PATIENTS, SUBNORMAL, Attack, attack_time

TASKS = sorted(all_tasks())
WEIGHTS = (OVERFLOW, SUBNORMAL)


class Operations(TorchDispatchMode):
    """Notes every operation of torch with the shapes and types that it works on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = tuple(
            (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else str(type(leaf))
            for leaf in tree_leaves((args, kwargs or {}))
        )
        self.seen.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


def hostile_model(attack: Attack) -> nn.Module:
    model = attack.task.build()
    unpack(attack.weights, model)
    hold_all_but(attack.task.private(model), model)
    return model


def batches(attack: Attack, there: bool, sampled: Tensor) -> Iterator[Batch]:
    patients = attack.task.load(attack.stores[there])
    passes = passes_of(attack.task, attack.plan, PATIENTS)
    return passes.of_step(
        sampled, len(patients), lambda chosen: draw_own(patients, chosen, attack.plan.records_per_patient, b"draws")
    )


def operations(attack: Attack, there: bool, sampled: Tensor) -> list[tuple[str, tuple[object, ...]]]:
    """What one step does, after a first one that makes the memory it keeps."""
    model = hostile_model(attack)
    noise = SecureNoise(KeyStream(bytes(32), b"noise"))
    step = private_step(
        attack.task, model, make_optimizer(attack.task.private(model), attack.plan, 1), attack.plan, PATIENTS, noise
    )
    parts = list(batches(attack, there, sampled))
    step(parts)
    unpack(attack.weights, model)
    with Operations() as watched:
        step(parts)
    step.close()
    return watched.seen


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("task", TASKS)
def test_a_step_does_the_same_operations_whoever_joins(task: str, weights: str) -> None:
    """The same operations on the same shapes: with nobody, with everybody, and with a gradient that is not finite."""
    attack = Attack.on(find_task(task), weights)
    everybody = torch.arange(PATIENTS + 1)
    without = operations(attack, False, everybody[:PATIENTS])
    assert len(without) > 100
    assert operations(attack, True, everybody) == without
    assert operations(attack, True, everybody[PATIENTS:]) == without
    assert operations(attack, False, everybody[:0]) == without


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_step_of_opacus_does_the_same_operations_whoever_joins(weights: str) -> None:
    attack = Attack.on(find_task("nodule-classification"), weights)
    attack = replace(attack, plan=replace(attack.plan, engine="opacus"))
    everybody = torch.arange(PATIENTS + 1)
    assert operations(attack, True, everybody) == operations(attack, False, everybody[:PATIENTS])


@pytest.mark.parametrize("task", TASKS)
def test_the_hostile_weights_break_one_patients_gradient_and_nobody_elses(task: str) -> None:
    """Or the other tests would show nothing."""
    attack = Attack.on(find_task(task), OVERFLOW)
    model = hostile_model(attack)
    engine = BookKeeping(model)
    patients = attack.task.load(attack.stores[True])
    batch = draw_own(patients, torch.arange(PATIENTS + 1), attack.plan.records_per_patient, b"draws")
    engine.start(len(batch))
    norms = engine.clipped_sum(attack.task.loss(model, batch), 1.0, len(batch))
    engine.close()
    assert norms[:PATIENTS].isfinite().all()
    assert not norms[PATIENTS].isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("task", TASKS)
def test_the_timing_attack_counts_the_same_passes(task: str) -> None:
    attack = Attack.on(find_task(task), OVERFLOW)
    found = attack_time(task, replies=1)
    assert found.passes_with == found.passes_without == passes_of(attack.task, attack.plan, PATIENTS).count
    assert found.replies == 1
    assert found.auc in (0.0, 0.5, 1.0)
    assert min(found.cpu_ms_with, found.cpu_ms_without) > 0.0


def test_the_timing_attack_puts_the_number_of_threads_back() -> None:
    with pytest.raises(PlanError, match="'nothing' weights"):
        attack_time("glucose-forecast", threads=2, weights="nothing")
    assert torch.get_num_threads() == 1
