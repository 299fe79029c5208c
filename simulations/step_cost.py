"""What privacy costs in a task's own step: ``python -m simulations.step_cost STORE --task ct-synthesis``.

The private step as a site takes it, its patients drawn from a prepared store, clipped in padded passes, noised, beside
the ordinary step on the same patients by the same optimizer. The two take turns; a step follows one of its kind before
it is timed. CPU time of one thread, medians.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Final

import torch
from torch import Generator

from client.training import draw_own, make_optimizer, passes_of, private_step
from shared.dp.noise import SeededNoise
from shared.dp.step import OrdinaryStep
from shared.drafting import draft_plan
from shared.plan import RunPlan
from shared.records import RecordStore
from shared.tasks.base import Batch, PatientDataset, Task, hold_all_but
from shared.tasks.registry import find_task
from simulations.scripts import run_script

_REPEATS: Final = 20
_WARM_UP: Final = 2
Step = Callable[[], object]


def measure(task: Task, store: RecordStore, plan: RunPlan, repeats: int) -> tuple[float, float]:
    """Return the median seconds of a private and of an ordinary step on ``sample_rate`` of the store's patients."""
    patients = task.load(store)
    chosen = torch.arange(max(1, round(plan.sample_rate * len(patients))))

    def draw(some: torch.Tensor) -> Batch:
        return draw_own(patients, some, plan.records_per_patient, b"step cost")

    steps = _private(task, patients, plan, chosen, draw), _ordinary(task, plan, chosen, draw)
    times: tuple[list[float], list[float]] = [], []
    for turn in range(_WARM_UP + repeats):
        for step, seconds in zip(steps, times, strict=True):
            step()
            began = time.process_time()
            step()
            if turn >= _WARM_UP:
                seconds.append(time.process_time() - began)
    return median(times[0]), median(times[1])


def _private(
    task: Task, patients: PatientDataset, plan: RunPlan, chosen: torch.Tensor, draw: Callable[[torch.Tensor], Batch]
) -> Step:
    model = task.build().train()
    optimizer = make_optimizer(hold_all_but(task.private(model), model), plan, 1)
    step = private_step(task, model, optimizer, plan, len(patients), SeededNoise(Generator().manual_seed(0)))
    passes = passes_of(task, plan, len(patients))
    return lambda: step(passes.of_step(chosen, len(patients), draw))


def _ordinary(task: Task, plan: RunPlan, chosen: torch.Tensor, draw: Callable[[torch.Tensor], Batch]) -> Step:
    model = task.build().train()
    step = OrdinaryStep(model, make_optimizer(hold_all_but(task.private(model), model), plan, 1), task.loss)
    return lambda: step(draw(chosen))


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(
        description="Measure what privacy costs in a task's own step.",
        epilog="Example: python -m simulations.step_cost runs/demo/sites/site-1/stores/ct-nodules "
        "--task nodule-classification",
    )
    parser.add_argument("store", type=Path, help="a prepared hospital of the task")
    parser.add_argument("--task", default="ct-synthesis")
    parser.add_argument("--epsilon", type=float, default=10.0)
    chosen = parser.parse_args()
    store = RecordStore.open(chosen.store)
    plan = draft_plan(chosen.task, epsilon=chosen.epsilon, delta=0.1 / len(store), overrides={})
    private, ordinary = measure(find_task(chosen.task), store, plan, _REPEATS)
    sys.stdout.write(
        f"{chosen.task}, {round(plan.sample_rate * len(store))} patients a step: {private * 1e3:.1f} ms with privacy, "
        f"{ordinary * 1e3:.1f} ms without, {private / ordinary:.2f} times\n"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_script(main)
