"""Generate the glucose exports of a federation's hospitals: one CSV each, in intake's plain form.

    OUT/site-1/glucose.csv      patient_id,timestamp,glucose_mg_dl,insulin_units,carbohydrate_g
    OUT/site-2/…

Patients, days and sensors are simulated (``glucose_model``, ``glucose_days``); no score on them is a clinical
claim. Hospitals differ in how many of their patients have type 1, type 2 or no diabetes.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.errors import PlanError, StorageError
from shared.files import storage_errors
from shared.tasks.cgm import STEP_MIN
from simulations.generators.glucose_days import DAY_MIN, Days, simulate_days
from simulations.generators.glucose_model import TYPES

COLUMNS: Final = ("patient_id", "timestamp", "glucose_mg_dl", "insulin_units", "carbohydrate_g")
EXPORT: Final = "glucose.csv"
DAYS: Final = 14
PATIENTS_PER_SITE: Final = 50
SHARES: Final = ((0.70, 0.20, 0.10), (0.20, 0.70, 0.10), (0.40, 0.40, 0.20), (0.10, 0.30, 0.60))
"""Of ``TYPES``, hospital by hospital: a clinic for type 1, one for type 2, a general one, a screening study."""
_FIRST_DAY: Final = np.datetime64("2024-01-01T00:00", "m")
_SPREAD_DAYS: Final = 300


def generate_glucose_hospitals(
    out: Path,
    *,
    sites: int,
    seed: int,
    patients_per_site: int | None = None,
    partition: str = "vendors",
    alpha: float = 1.0,
    days: int = DAYS,
    workers: int | None = None,  # noqa: ARG001 - every source is called alike; a hospital takes seconds
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, ...]:
    """Write the exports of ``sites`` hospitals below ``out``.

    Args:
        out: Created if need be; must not yet hold a folder of one of these hospitals.
        sites: Number of hospitals.
        seed: The same seed writes the same bytes.
        patients_per_site: By default ``PATIENTS_PER_SITE``.
        partition: ``vendors`` (the shares in ``SHARES``, in turn) or ``dirichlet`` (shares drawn at random).
        alpha: Concentration of the Dirichlet distribution: smaller is more skewed.
        days: Of readings of each patient.
        workers: Not used.
        on_progress: Told the number of patients done and in all, after each hospital.

    Returns:
        The hospitals' folders, in order.

    Raises:
        PlanError: If a number or the partition makes no sense.
        StorageError: If ``out`` cannot be written.
    """
    each = PATIENTS_PER_SITE if patients_per_site is None else patients_per_site
    if min(sites, each) < 1 or seed < 0:
        raise PlanError("Glucose hospitals need at least one site and one patient each, and a seed of 0 or more.")
    shares = _shares(sites, seed, partition, alpha)
    folders = tuple(out / f"site-{number}" for number in range(1, sites + 1))
    for folder in folders:
        if folder.exists():
            raise StorageError(f"{folder} exists already. Choose another folder or remove it first.")
    try:
        for site, folder in enumerate(folders):
            rng = np.random.default_rng([seed, site])
            lived = simulate_days(_types(shares[site], each, rng), days, rng)
            with storage_errors(out):
                folder.mkdir(parents=True)
                _write(folder / EXPORT, lived, site, rng)
            if on_progress:
                on_progress((site + 1) * each, sites * each)
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return folders


def _shares(sites: int, seed: int, partition: str, alpha: float) -> npt.NDArray[np.float64]:
    if partition == "vendors":
        return np.resize(np.array(SHARES), (sites, len(TYPES)))
    if partition != "dirichlet":
        raise PlanError(f"There is no partition called {partition!r}; choose 'vendors' or 'dirichlet'.")
    if not (alpha > 0 and np.isfinite(alpha)):
        raise PlanError(f"The Dirichlet concentration must be a positive number, not {alpha}.")
    return np.random.default_rng([seed, sites, 1]).dirichlet(np.full(len(TYPES), alpha), sites)


def _types(shares: npt.NDArray[np.float64], patients: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Deal types out as near to ``shares`` as whole patients allow, in random order."""
    ends = np.rint(np.cumsum(shares) * patients).astype(int)
    return rng.permutation(np.repeat(np.arange(len(TYPES)), np.diff(ends, prepend=0)))


def _write(path: Path, days: Days, site: int, rng: np.random.Generator) -> None:
    """Write a hospital's patients; a step without reading and dose has no row."""
    steps = np.arange(len(days.readings)) * STEP_MIN
    first_days = rng.integers(0, _SPREAD_DAYS, len(days.types)) * DAY_MIN
    with path.open("w", newline="", encoding="utf-8") as handle:
        handle.write(",".join(COLUMNS) + "\n")
        for patient in range(len(days.types)):
            minutes = first_days[patient] + days.start_min[patient] + steps
            times = np.datetime_as_string(_FIRST_DAY + minutes.astype("timedelta64[m]"), unit="m").tolist()
            columns = (_cells(getattr(days, n)[:, patient]) for n in ("readings", "insulin", "carbohydrate"))
            name = f"S{site + 1}-{patient:05d}"
            rows = zip(times, *columns, strict=True)
            handle.writelines(f"{name},{time},{g},{i},{c}\n" for time, g, i, c in rows if g or i or c)


def _cells(values: npt.NDArray[np.float32]) -> list[str]:
    """Return the values as text; nothing for NaN and for no dose."""
    return [f"{value:g}" if value > 0 else "" for value in values.tolist()]
