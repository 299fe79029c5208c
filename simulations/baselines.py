"""What the federation is compared with: simple methods, all patients pooled without privacy, each hospital alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Generator, nn
from torch.optim import Adam

from client.training import preferred_device
from shared.dp.step import OrdinaryStep
from shared.evaluation import Evaluation
from shared.metrics import Estimate
from shared.records import RecordStore
from shared.tasks.base import Task
from shared.tasks.registry import find_task
from simulations.sites import merge_stores
from simulations.sources import Simple

PASSES, LEAST_STEPS = 25, 100
"""A baseline trains for so many passes over its patients, and at least so many steps."""
_PATIENTS_A_STEP = 48
_RECORDS_PER_PATIENT = 2
_LEARNING_RATE = 1e-3


def judge_baselines(
    task: str,
    stores: Mapping[str, Path],
    heldout: Path,
    *,
    simple: Simple | None,
    train: bool,
    seed: int,
    sensitivity: float | None = None,
    pool: Executor | None,
    report: Callable[[int, int], None],
) -> dict[str, Any]:
    """Return what a run is compared with, as the registry keeps it.

    Args:
        task: Name of the task.
        stores: Each hospital's training patients.
        heldout: The patients, or their later readings, to judge on.
        simple: Judges the task's simple methods, if it has any.
        train: Whether to train pooled and local-only models.
        seed: Of these.
        sensitivity: The share of positives that their thresholds must find; by default balanced accuracy chooses.
        pool: Worker processes, if there are any.
        report: Told how many of how many are done.
    """
    jobs = {"pooled": list(stores.values()), **{name: [store] for name, store in stores.items()}} if train else {}
    with ExitStack() as stack:
        executor = pool or stack.enter_context(ThreadPoolExecutor(1))
        futures: dict[str, Future[Evaluation]] = {
            name: executor.submit(train_alone, task, paths, heldout, seed, sensitivity) for name, paths in jobs.items()
        }
        judged = executor.submit(_judge_simple, simple, stores, heldout) if simple else None
        everything: list[Future[Any]] = [*futures.values(), *([judged] if judged else [])]
        for done, future in enumerate(everything, start=1):
            future.result()
            report(done, len(everything))
    found = judged.result() if judged else {}
    if futures:
        results = {name: future.result() for name, future in futures.items()}
        pooled = results.pop("pooled")
        found |= describe(pooled, results, find_task(task).metric)
    return found


def _judge_simple(simple: Simple, stores: Mapping[str, Path], heldout: Path) -> dict[str, Any]:
    return simple({name: RecordStore.open(path) for name, path in stores.items()}, RecordStore.open(heldout))


def train_alone(
    task_name: str, stores: Sequence[Path], heldout: Path, seed: int, sensitivity: float | None = None
) -> Evaluation:
    """Train on the patients of ``stores`` together, without privacy, and judge on ``heldout``."""
    torch.set_num_threads(1)
    task = find_task(task_name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.build().to(preferred_device())
    _fit(task, model, merge_stores([RecordStore.open(path) for path in stores]), seed)
    model.eval()
    return task.judge(model, RecordStore.open(heldout), sensitivity)


def _fit(task: Task, model: nn.Module, store: RecordStore, seed: int) -> None:
    """Train with Adam at a falling rate on batches of patients."""
    generator = Generator().manual_seed(seed)
    patients = task.load(store)
    steps = max(LEAST_STEPS, PASSES * len(patients) // _PATIENTS_A_STEP)
    optimizer = Adam(model.parameters(), lr=_LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = OrdinaryStep(model, optimizer, task.loss)
    for _ in range(steps):
        chosen = torch.randint(len(patients), (_PATIENTS_A_STEP,), generator=generator)
        step(patients.draw(chosen, _RECORDS_PER_PATIENT, generator).to(preferred_device()))
        decay.step()


def describe(pooled: Evaluation, local: dict[str, Evaluation], metric: str) -> dict[str, Any]:
    """Return the trained baselines as the registry keeps them."""
    return {
        "pooled": dict(pooled.metrics),
        "local": {
            **{name: fmean(evaluation.value(name) for evaluation in local.values()) for name in pooled.metrics},
            metric: mean_estimate([evaluation.metrics[metric] for evaluation in local.values()]),
            "by_site": {site: dict(evaluation.metrics) for site, evaluation in local.items()},
        },
    }


def mean_estimate(estimates: Sequence[float | Estimate]) -> Estimate:
    """Return the mean of several hospitals' figures; an interval of a mean over hospitals is not claimed."""
    values = [estimate.value if isinstance(estimate, Estimate) else estimate for estimate in estimates]
    return Estimate(fmean(values), math.nan, math.nan)
