"""Where a task's patients come from in a simulation: who generates raw hospitals, and who prepares them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from client.intake.glucose import prepare_glucose
from client.intake.nodules import prepare_nodules
from shared.errors import PlanError
from simulations.generators.glucose import generate_glucose_hospitals
from simulations.generators.hospitals import generate_hospitals

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """How one task's data is made and read.

    Attributes:
        generate: Writes raw hospitals, one folder each.
        prepare: Reads a raw folder into a prepared store.
        origin: What generated data is, for the reader of a report.
    """

    generate: Callable[..., tuple[Path, ...]]
    prepare: Callable[[Path, Path, bytes, int, Progress], None]
    origin: str


def _prepare_ct_nodules(raw: Path, store: Path, secret: bytes, workers: int, progress: Progress) -> None:
    prepare_nodules(raw, raw / "annotations.csv", store, secret, on_progress=progress, workers=workers)


def _prepare_glucose(raw: Path, store: Path, secret: bytes, _workers: int, progress: Progress) -> None:
    prepare_glucose(raw, store, secret, on_progress=progress)


SOURCES = {
    "nodule-classification": Source(
        generate=generate_hospitals,
        prepare=_prepare_ct_nodules,
        origin=(
            "Simulated CT: the nodules' shapes, sizes and malignancy ratings are real (LIDC-IDRI, four "
            "radiologists), lung texture and scanner noise are simulated. A score on such images is "
            "no clinical claim."
        ),
    ),
    "glucose-forecast": Source(
        generate=generate_glucose_hospitals,
        prepare=_prepare_glucose,
        origin=(
            "Simulated glucose: patients of Bergman's minimal model with Hovorka's absorption of meals and insulin, "
            "and the errors of sensors and of people. A score on such records is no clinical claim."
        ),
    ),
}


def find_source(task: str) -> Source:
    """Return the source of a task's data.

    Raises:
        PlanError: If the simulation has none.
    """
    if task not in SOURCES:
        raise PlanError(f"The simulation has no data for task {task!r}; it has: {', '.join(SOURCES)}.")
    return SOURCES[task]
