"""The self-test of kernels: it finds what depends on a row or on threads, and takes the next rung."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from shared.dp.passes import Passes
from shared.dp.rungs import FAST, ONE_BY_ONE, ONE_THREAD, ladder
from shared.dp.selftest import Shape, climb, safe_rung
from shared.errors import ErrorCode, FederationError
from shared.tasks.base import Batch, Task
from shared.tasks.registry import find_task

SHAPE = Shape("bookkeeping", Passes(6, 2), 2)
Spoilt = Callable[[Tensor], Tensor]


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def random_patients(patients: int, records: int, generator: Generator) -> Batch:
    x = torch.randn(patients, records, 5, generator=generator)
    return Batch({"x": x, "y": torch.randint(0, 2, (patients, records), generator=generator)})


def task_whose_kernel(name: str, spoil: Spoilt) -> Task:
    """A task whose forward pass goes through a kernel of the test's making, on ``(B·K, 2)``."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = spoil(model(batch["x"].flatten(0, 1)))
        return F.cross_entropy(logits, batch["y"].flatten(), reduction="none").view(batch["y"].shape).mean(1)

    like = find_task("nodule-classification")
    return replace(like, name=name, build=build, loss=loss, random_patients=random_patients, private=lambda m: m)


def by_row(logits: Tensor) -> Tensor:
    """One row rounds otherwise, as the last of a thread's share does."""
    last = torch.arange(len(logits)) == 7
    return torch.where(last[:, None], logits * (1.0 + 2.0**-22), logits)


def by_row_with_threads(logits: Tensor) -> Tensor:
    return by_row(logits) if torch.get_num_threads() > 1 else logits


def by_company(logits: Tensor) -> Tensor:
    """What is in the other rows decides how a row rounds."""
    return logits * (1.0 + 2.0**-16 * logits.detach().sum().sin())


def test_sound_kernels_stay_on_the_fast_rung() -> None:
    findings = climb(task_whose_kernel("sound", lambda logits: logits), SHAPE, 2)
    assert [(f.rung.name, f.rung.threads, f.difference) for f in findings] == [(FAST, 2, 0.0)]


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_a_kernel_that_rounds_by_row_with_threads_is_found_and_one_thread_taken(engine: str) -> None:
    task = task_whose_kernel(f"by row with threads, {engine}", by_row_with_threads)
    findings = climb(task, replace(SHAPE, engine=engine), 2)
    assert [f.rung.name for f in findings] == [FAST, ONE_THREAD]
    assert 0.0 < findings[0].difference < 1e-3
    assert findings[1].difference == 0.0


def test_a_kernel_that_always_rounds_by_row_leaves_one_by_one() -> None:
    findings = climb(task_whose_kernel("by row", by_row), SHAPE, 2)
    assert [f.rung.name for f in findings] == [FAST, ONE_THREAD, ONE_BY_ONE]
    assert [f.safe for f in findings] == [False, False, True]


def test_a_kernel_that_rounds_by_the_others_is_found() -> None:
    findings = climb(task_whose_kernel("by company", by_company), SHAPE, 2)
    assert not findings[0].safe
    assert not findings[1].safe


def test_an_engine_that_is_unsafe_on_every_rung_is_refused() -> None:
    calls = 0

    def by_call(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return logits * (1.0 + calls * 2.0**-20)

    with pytest.raises(FederationError, match="selftest") as refused:
        safe_rung(task_whose_kernel("by call", by_call), SHAPE, 2)
    assert refused.value.code is ErrorCode.UNSAFE_KERNELS


def test_each_rung_runs_on_its_threads_and_leaves_the_process_as_it_was() -> None:
    before = torch.get_num_threads()
    assert [rung.run(torch.get_num_threads) for rung in ladder(3)] == [3, 1, 1]
    assert torch.get_num_threads() == before


def test_one_by_one_has_as_much_room_in_passes_of_one_patient() -> None:
    of_plan = Passes(28, 6)
    passes = ladder(2)[-1].passes(of_plan)
    assert (passes.size, passes.rows, passes.room) == (1, 2, of_plan.room)
    assert ladder(2)[0].passes(of_plan) == of_plan


def test_gradients_are_computed_in_full_precision_and_by_a_fixed_algorithm() -> None:
    torch.set_float32_matmul_precision("medium")
    ladder(1)[0].run(lambda: None)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # type: ignore[attr-defined]
