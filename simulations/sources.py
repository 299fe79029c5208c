"""Where a task's patients come from in a simulation: who generates raw hospitals, and who prepares them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from client.intake.glucose import prepare_glucose
from client.intake.nodules import prepare_nodules
from server.checkpoints import checkpoint_sha256
from shared.errors import PlanError
from shared.provenance.keys import SIGNING_PUB, Trusted, read_trusted
from shared.records import RecordStore
from shared.starts import start_path
from shared.tasks.cgm_windows import split_in_time
from simulations.forecast_baselines import forecast_baselines, simple_forecasts
from simulations.generators.glucose import generate_glucose_hospitals
from simulations.generators.hospitals import generate_hospitals
from simulations.nodule_baselines import size_alone
from simulations.synthesis import examine

Progress = Callable[[str, int, int], None]
Simple = Callable[[Mapping[str, RecordStore], RecordStore], dict[str, Any]]
"""Judges simple methods, from each hospital's training store and the held-out store."""
_RUN_DEPTH = 4
"""From SRV/runs/NAME/checkpoints up to SRV."""


@dataclass(frozen=True)
class Source:
    """How one task's data is made and read.

    Attributes:
        generate: Writes raw hospitals, one folder each.
        prepare: Reads a raw folder into a prepared store.
        origin: What generated data is, for the reader of a report.
        split: Divides a store into a part to train on and a part to judge on, where every patient is in both and
            time divides them; by default whole patients are held out.
        start: A public checkpoint that a run starts from unless it is told otherwise.
        examine: Finds out what only who holds every hospital's patients can, from the final checkpoint, all hospitals'
            training patients, the held-out ones and the simulation's folder, where it may leave files; returns metrics.
        simple: Judges methods that train nothing and take seconds, from each hospital's training part and the held-out
            store; every run is compared with them.
        baselines: Judges these and all others that are not the task's own network; they take minutes.
    """

    generate: Callable[..., tuple[Path, ...]]
    prepare: Callable[[Path, Path, bytes, int, Progress], None]
    origin: str
    split: Callable[[RecordStore], tuple[RecordStore, RecordStore]] | None = None
    start: Path | None = None
    simple: Simple | None = None
    baselines: Simple | None = None
    examine: Callable[[Path, RecordStore, RecordStore, Path], Mapping[str, Any]] | None = None


def _prepare_ct_nodules(raw: Path, store: Path, secret: bytes, workers: int, progress: Progress) -> None:
    prepare_nodules(raw, raw / "annotations.csv", store, secret, on_progress=progress, workers=workers)


def _prepare_glucose(raw: Path, store: Path, secret: bytes, _workers: int, progress: Progress) -> None:
    prepare_glucose(raw, store, secret, on_progress=progress)


_SIMULATED_CT = Source(
    generate=generate_hospitals,
    prepare=_prepare_ct_nodules,
    origin=(
        "Simulated CT: the nodules' shapes, sizes and malignancy ratings are real (LIDC-IDRI, four "
        "radiologists), lung texture and scanner noise are simulated. A score on such images is "
        "no clinical claim."
    ),
)
SOURCES = {
    "nodule-classification": replace(_SIMULATED_CT, simple=size_alone),
    "ct-synthesis": replace(_SIMULATED_CT, start=start_path("ct-synthesis"), examine=examine),
    "glucose-forecast": Source(
        generate=generate_glucose_hospitals,
        prepare=_prepare_glucose,
        origin=(
            "Simulated glucose: patients of Bergman's minimal model with Hovorka's absorption of meals and insulin, "
            "and the errors of sensors and of people. A score on such records is no clinical claim."
        ),
        split=split_in_time,
        start=start_path("glucose-forecast"),
        simple=simple_forecasts,
        baselines=forecast_baselines,
    ),
}
SOURCES["glucose-forecast-lstm"] = replace(SOURCES["glucose-forecast"], start=start_path("glucose-forecast-lstm"))


def find_source(task: str) -> Source:
    """Return the source of a task's data.

    Raises:
        PlanError: If the simulation has none.
    """
    if task not in SOURCES:
        raise PlanError(f"The simulation has no data for task {task!r}; it has: {', '.join(SOURCES)}.")
    return SOURCES[task]


@cache
def shipped_starts() -> frozenset[str]:
    """Return the SHA-256 of the public starts that come with Fedward, which saw no patient.

    Raises:
        StorageError: If one is missing.
    """
    return frozenset(checkpoint_sha256(source.start) for source in SOURCES.values() if source.start)


def keys_beside(checkpoint: Path) -> Trusted:
    """Return the signing keys that lie in the folders of the run which wrote a checkpoint.

    A researcher trusts a folder by naming it. A hospital does not: see ``fedward-site trust``.

    Raises:
        StorageError: If a file of that name holds no key.
    """
    folders = checkpoint.resolve().parents[:_RUN_DEPTH]
    return tuple(key for folder in folders for key in read_trusted(folder / SIGNING_PUB))
