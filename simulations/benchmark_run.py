"""How much a whole simulated run costs: by engine, by backend, without privacy, and as a bare loop of its steps."""

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console

from client.training import Randomness, train_round
from shared.plan import RunPlan
from shared.records import RecordStore
from shared.tasks.registry import find_task
from shared.weights import Vector, pack
from simulations.display import Display
from simulations.grid import worker_pool
from simulations.run import Simulation, read_plan, start
from simulations.sites import Federation

_QUIET = Display(Console(quiet=True))


def measure_runs(data: Sequence[Path], simulation: Simulation) -> dict[str, float]:
    """Return the seconds that the rounds take on prepared hospitals, by variant of the run.

    Start-up, intake, baselines and report are left out: they are the same for all.
    """
    variants: dict[str, Simulation] = {
        "ours": simulation,
        "ours, clipped by Opacus": replace(simulation, plan={**simulation.plan, "engine": "opacus"}),
        "ours, without privacy": replace(simulation, epsilon=float("inf")),
        "ours, on Ray": replace(simulation, backend="ray"),
    }
    seconds: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        for number, (name, variant) in enumerate(variants.items()):
            out = Path(folder) / str(number)
            summary = start(replace(variant, data=tuple(map(str, data))), out, _QUIET)
            seconds[name] = sum(summary["timings"]["round_s"])
        seconds["bare loop of the same steps"] = _floor(Path(folder) / "0", simulation.workers)
    return seconds


def _floor(run: Path, workers: int) -> float:
    """Time the run's local training and averaging alone: no messages, ledger, evaluation or checkpoint."""
    federation = Federation.open(run)
    if federation is None:
        raise FileNotFoundError(run)
    plan = read_plan(run / "plan.json")
    weights = pack(find_task(plan.task).build())
    shares = np.array(federation.declared_patients) / sum(federation.declared_patients)
    stores = federation.stores(plan.task)
    with worker_pool(workers) as pool:
        run_all = _spread(pool)
        run_all(_train_site, [(store, plan, 1, weights, 1) for store in stores])  # start the processes
        began = time.monotonic()
        for number in range(1, plan.rounds + 1):
            jobs = [
                (store, plan, number, weights, declared)
                for store, declared in zip(stores, federation.declared_patients, strict=True)
            ]
            weights = np.average(run_all(_train_site, jobs), axis=0, weights=shares).astype(np.float32)
        return time.monotonic() - began


_Job = tuple[Path, RunPlan, int, Vector, int]


def _spread(pool: ProcessPoolExecutor | None) -> Callable[[Callable[[_Job], Vector], list[_Job]], list[Vector]]:
    return lambda work, jobs: list(pool.map(work, jobs) if pool else map(work, jobs))


def _train_site(job: _Job) -> Vector:
    store, plan, number, weights, declared = job
    torch.set_num_threads(1)
    task = find_task(plan.task)
    key = hashlib.sha256(f"{store}/{number}".encode()).digest()
    return train_round(
        task,
        task.load(RecordStore.open(store)),
        plan,
        number,
        weights,
        declared_patients=declared,
        randomness=Randomness.simulated(key),
    )
