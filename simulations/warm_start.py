"""Public weights that a glucose run starts from: ``python -m simulations.warm_start glucose-forecast``.

What is learnt from nobody costs no privacy. The start is trained on two kinds of made-up records: the simulated
cohort (with its meals and insulin), and random processes that wander, dip and rise at many speeds and are seen
through sensors of many noises and smoothings, so that the network learns to tell from the readings how far their
slope can be trusted. What insulin does is learnt last and by itself, from a cohort that is given doses at random.

The files in ``shared/starts`` were made by this in two parts, named by their SHA-256: all but the insulin map when
the cohort was still a simpler one, and the map, on top of these weights, by :func:`teach_insulin` as it stands. Making
all of it anew gives another start, by and large as good (docs/glucose.md); floating point differs between machines.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, nn
from torch.optim import Adam

from shared.dp.step import OrdinaryStep
from shared.records import KEY_BYTES, RecordStore
from shared.starts import start_path
from shared.tasks.base import Batch, PatientDataset, Task
from shared.tasks.cgm import COVARIATES, STEP_MIN, STORE_KIND
from shared.tasks.registry import find_task
from simulations.generators.glucose_days import ORDINARY, Behaviour, simulate_days
from simulations.generators.glucose_model import TYPES
from simulations.public_start import save_public
from simulations.scripts import run_script

STEPS: Final = 3000
_DAY: Final = 1440 // STEP_MIN
_BATCH: Final = 128
_RATE: Final = 5e-3
_WALKS: Final = 4000
_COHORT, _COHORT_DAYS = 240, 4
_LESSON: Final = Behaviour(
    missed_meals=0.2, missed_snacks=0.5, count_error=0.5, snacks_a_day=1.0, trial_doses_a_day=8.0
)
_LESSON_SHARE: Final = 3
_INSULIN: Final = "insulin.weight"
_EVERYBODY, _EVERY_SECOND = 1, 2
_SPIN_UP: Final = 144
_LIMITS: Final = (40.0, 400.0)
Series = npt.NDArray[np.float64]


def train_start(task: Task, steps: int = STEPS, seed: int = 0, walks: int = _WALKS, cohort: int = _COHORT) -> nn.Module:
    """Return the task's model, trained on made-up records.

    Args:
        task: ``glucose-forecast`` or its variant.
        steps: Optimizer steps.
        seed: Of everything.
        walks: Random processes of a day each.
        cohort: Simulated patients.
    """
    rng, generator = np.random.default_rng(seed), Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.build()
    others = [parameter for name, parameter in model.named_parameters() if name != _INSULIN]
    sources = [task.load(walk_store(walks, rng)), task.load(cohort_store(cohort, rng))]
    learn(model, others, task, sources, steps, generator)
    teach_insulin(model, task, max(1, steps // _LESSON_SHARE), seed, cohort)
    return model


def teach_insulin(model: nn.Module, task: Task, steps: int, seed: int, cohort: int) -> None:
    """Let the model's map of insulin alone learn what doses do, from a cohort that is given them at random.

    The rest of the model has seen none: what insulin was given for must not be mistaken for what it does.
    """
    lesson = cohort_store(cohort, np.random.default_rng([seed, 1]), _LESSON, _EVERYBODY)
    parameter = model.get_parameter(_INSULIN)
    learn(model, [parameter], task, [task.load(lesson)], steps, Generator().manual_seed(seed + 1))


def learn(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    task: Task,
    sources: Sequence[PatientDataset],
    steps: int,
    generator: Generator,
) -> None:
    """Move some of the model's parameters by Adam, on as many records of each source a step."""
    optimizer = Adam(parameters, lr=_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = OrdinaryStep(model, optimizer, task.loss)
    for _ in range(steps):
        drawn = [s.draw(torch.randint(len(s), (_BATCH,), generator=generator), 1, generator) for s in sources]
        step(Batch({name: torch.cat([batch[name] for batch in drawn]) for name in drawn[0].fields}))
        decay.step()


def walk_store(count: int, rng: np.random.Generator) -> RecordStore:
    """Return a day of each of ``count`` random processes, as an intake would have stored it."""
    readings = seen_by_sensors(random_walks(count, _DAY, rng), rng)
    return _store(readings, np.zeros_like(readings), np.zeros_like(readings))


def random_walks(count: int, steps: int, rng: np.random.Generator) -> Series:
    """Return ``(count, steps)`` mg/dL: smoothed noise and, on top, rises like those after meals."""

    def between(low: float, high: float) -> Series:
        return np.exp(rng.uniform(np.log(low), np.log(high), (count, 1)))

    wander = _smoothed(rng.standard_normal((count, steps + _SPIN_UP)), between(40, 240), between(8, 60))[:, _SPIN_UP:]
    spread = between(6, 60)
    wander = spread * (wander - wander.mean(1, keepdims=True)) / wander.std(1, keepdims=True)
    meals = (rng.random(wander.shape) < 5 / _DAY) * rng.gamma(2.0, 0.5, wander.shape)
    rises = _smoothed(meals, between(15, 50), between(15, 50)) * between(150, 2500) * np.clip(spread / 30, 0.2, 2.0)
    glucose = wander + rises
    glucose += rng.uniform(80, 180, (count, 1)) - np.median(glucose, axis=1, keepdims=True)
    lifted: Series = np.where(glucose < 70, 70 - 0.4 * (70 - glucose), glucose)
    return lifted


def seen_by_sensors(glucose: Series, rng: np.random.Generator) -> Series:
    """Return what sensors write of ``(count, steps)``: noise, smoothing and rounding, each of many kinds."""
    count, steps = glucose.shape
    keep = rng.uniform(0.0, 0.95, (count, 1))
    noise = rng.standard_normal(glucose.shape)
    for step in range(1, steps):
        noise[:, step] = keep[:, 0] * noise[:, step - 1] + np.sqrt(1 - keep[:, 0] ** 2) * noise[:, step]
    seen = glucose * (1.0 + noise * np.exp(rng.uniform(np.log(0.002), np.log(0.05), (count, 1))))
    passes = rng.integers(0, 4, (count, 1))
    for done in range(3):
        wide = np.pad(seen, ((0, 0), (1, 1)), mode="edge")
        seen = np.where(passes > done, (wide[:, :-2] + 2.0 * wide[:, 1:-1] + wide[:, 2:]) / 4.0, seen)
    # Some sensors write every 15 minutes, and intake draws lines between their readings.
    before = np.arange(steps) // 3 * 3
    after, way = np.minimum(before + 3, (steps - 1) // 3 * 3), (np.arange(steps) - before) / 3.0
    seen = np.where(rng.random((count, 1)) < 0.1, seen[:, before] * (1 - way) + seen[:, after] * way, seen)
    return np.clip(np.where(rng.random((count, 1)) < 0.7, np.round(seen), seen), *_LIMITS)


def cohort_store(
    patients: int, rng: np.random.Generator, behaviour: Behaviour = ORDINARY, noting: int = _EVERY_SECOND
) -> RecordStore:
    """Return some days of simulated patients; only one in ``noting`` notes insulin and food."""
    days = simulate_days(np.arange(patients) % len(TYPES), _COHORT_DAYS, rng, behaviour)
    readings = days.readings.T.astype(np.float64)
    at = np.arange(readings.shape[1])
    for row in readings:
        known = np.isfinite(row)
        row[~known] = np.interp(at[~known], at[known], row[known])
    noted = (np.arange(patients) // len(TYPES) % noting == 0)[:, None]
    return _store(readings, days.insulin.T * noted, days.carbohydrate.T * noted)


def _smoothed(series: Series, *minutes: Series) -> Series:
    """Pass ``(count, steps)`` through one first-order filter after another, of time constants ``(count, 1)``."""
    for constant in minutes:
        keep = np.exp(-STEP_MIN / constant[:, 0])
        series, state = np.empty_like(series), series
        series[:, 0] = 0.0
        for step in range(1, series.shape[1]):
            series[:, step] = keep * series[:, step - 1] + (1 - keep) * state[:, step]
    return series


def _store(readings: Series, insulin: Series, carbohydrate: Series) -> RecordStore:
    """Return series ``(count, steps)`` as an in-memory store of one segment each."""
    count, steps = readings.shape
    clock = np.tile(np.arange(steps) * STEP_MIN % 1440, count)
    return RecordStore(
        kind=STORE_KIND,
        attributes={"covariates": list(COVARIATES)},
        offsets=np.arange(count + 1, dtype=np.int64) * steps,
        keys=np.zeros((count, KEY_BYTES), np.uint8),
        arrays={
            "glucose": readings.ravel().astype(np.float32),
            "insulin": insulin.ravel().astype(np.float32),
            "carbohydrate": carbohydrate.ravel().astype(np.float32),
            "minute_of_day": clock.astype(np.int16),
            "segment": np.zeros(count * steps, np.int32),
            "measured": np.ones(count * steps, bool),
        },
        digest="",
    )


def write_start(path: Path, task: str, steps: int = STEPS) -> str:
    """Train, write a checkpoint for ``--init`` with its description, and return its SHA-256.

    Raises:
        StorageError: If the file cannot be written.
    """
    return save_public(path, train_start(find_task(task), steps), task)


def main() -> None:
    """Write a start for each task, where runs look for it, and print its SHA-256."""
    parser = argparse.ArgumentParser(description="Train public starts on made-up records.")
    parser.add_argument("tasks", nargs="+", choices=("glucose-forecast", "glucose-forecast-lstm"))
    for name in parser.parse_args().tasks:
        path = start_path(name)
        sys.stdout.write(f"{name} {write_start(path, name)}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_script(main)
