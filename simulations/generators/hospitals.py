"""Generate the raw exports of a federation's hospitals: DICOM CT series and the radiologists' findings.

    OUT/site-1/annotations.csv      seriesuid,coordX,coordY,coordZ,diameter_mm,malignancy
    OUT/site-1/DICOM/PA000000/…     or folders named by identifiers, as the hospital's archive exports
    OUT/site-2/…

The columns are LUNA16's (patient coordinates, LPS, in mm) and the readers' median malignancy. Texture is
simulated; shapes and labels are real (``lidc.py``), so no score on these files is a clinical claim.

Every patient has a random generator of its own, seeded by the run's seed, the hospital and the patient's
position in it: the files are the same whatever the number of processes.
"""

import csv
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless, RLELossless

from shared.errors import FederationError, PlanError, StorageError
from shared.files import storage_errors
from simulations import partition as partitions
from simulations.generators.dicom import Equipment, draw_identity, write_series
from simulations.generators.lidc import Nodule, Patient, load_patients
from simulations.generators.scanner import Scanner
from simulations.generators.series import simulate_series

COLUMNS: Final = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm", "malignancy")
ANNOTATIONS: Final = "annotations.csv"
_Row = tuple[str | float, ...]
_FEW: Final = 16
"""Up to so many patients are generated in this process: starting others takes longer."""
_CHUNK: Final = 4
"""Patients that a process takes at a time."""


@dataclass(frozen=True)
class Hospital:
    """What makes one hospital's files differ from another's."""

    equipment: Equipment
    scanner: Scanner


# One for each of LIDC-IDRI's vendors, in the order of partition.VENDOR_SCANS; more hospitals repeat them.
_HOSPITALS: Final = (
    Hospital(
        Equipment(
            manufacturer="GE MEDICAL SYSTEMS",
            model="LightSpeed VCT",
            kernel="BONE",
            institution="Riverside General Hospital",
            syntax=JPEGLSLossless,
            signed=True,
            intercept=-1024,
            layout="numbered",
            numbering="head",
        ),
        Scanner(spacing_mm=(0.66, 0.76), thickness_mm=(2.5,), blur_mm=0.5, edge=0.8, noise_hu=26),
    ),
    Hospital(
        Equipment(
            manufacturer="SIEMENS",
            model="SOMATOM Definition AS",
            kernel="B45f",
            institution="Universitaetsklinikum Sankt Anna",
            syntax=ExplicitVRLittleEndian,
            signed=False,
            intercept=-1024,
            layout="uid",
            numbering="head",
        ),
        Scanner(spacing_mm=(0.65, 0.72), thickness_mm=(2.0, 3.0), blur_mm=0.6, edge=0.4, noise_hu=18),
    ),
    Hospital(
        Equipment(
            manufacturer="Philips",
            model="Brilliance 64",
            kernel="C",
            institution="Ospedale Santa Chiara",
            syntax=RLELossless,
            signed=False,
            intercept=-1000,
            layout="numbered",
            numbering="shuffled",
        ),
        Scanner(spacing_mm=(0.70, 0.80), thickness_mm=(2.0,), blur_mm=0.7, edge=0.2, noise_hu=15),
    ),
    Hospital(
        Equipment(
            manufacturer="TOSHIBA",
            model="Aquilion",
            kernel="FC51",
            institution="Minato Central Hospital",
            syntax=ImplicitVRLittleEndian,
            signed=True,
            intercept=0,
            layout="uid",
            numbering="shuffled",
        ),
        Scanner(spacing_mm=(0.68, 0.78), thickness_mm=(2.0, 3.0), blur_mm=0.55, edge=0.6, noise_hu=22),
    ),
)


@dataclass(frozen=True)
class _Task:
    """One patient's scan; small enough to be sent to another process."""

    export: Path
    site: int
    number: int
    nodules: tuple[Nodule, ...]


def generate_hospitals(
    out: Path,
    *,
    sites: int,
    seed: int,
    patients_per_site: int | None = None,
    partition: str = "vendors",
    alpha: float = 1.0,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, ...]:
    """Write the exports of ``sites`` hospitals below ``out``.

    Args:
        out: Created if need be; must not yet hold a folder of one of these hospitals.
        sites: Number of hospitals; each of four vendors' scanners in turn.
        seed: The same seed writes the same bytes.
        patients_per_site: Exactly so many for every hospital; LIDC patients then recur, newly turned and
            in a new thorax, once all have been used. By default all 740 are dealt out.
        partition: ``vendors`` (LIDC-IDRI's shares) or ``dirichlet`` (skewed in size and malignancy).
        alpha: Concentration of the Dirichlet partition.
        workers: Processes; by default one for every processor, or none for a few patients.
        on_progress: Told the number of patients done and in all, after each.

    Returns:
        The hospitals' folders, in order.

    Raises:
        PlanError: If the patients cannot be split as asked.
        StorageError: If ``out`` cannot be written or the LIDC-IDRI annotations are missing.
    """
    if seed < 0:
        raise PlanError(f"The seed must not be negative, and is {seed}.")
    patients = load_patients()
    held = _split(patients, seed, sites=sites, each=patients_per_site, partition=partition, alpha=alpha)
    folders = tuple(out / f"site-{number}" for number in range(1, sites + 1))
    tasks = [
        _Task(folder, site, number, patients[patient].nodules)
        for site, (folder, members) in enumerate(zip(folders, held, strict=True))
        for number, patient in enumerate(members)
    ]
    with storage_errors(out), _new_folders(folders):
        rows: list[list[_Row]] = []
        with _mapping(workers, len(tasks)) as run:
            for found in run(partial(_write_patient, seed), tasks):
                rows.append(found)
                if on_progress:
                    on_progress(len(rows), len(tasks))
        for folder in folders:
            mine = (r for r, task in zip(rows, tasks, strict=True) if task.export == folder)
            _write_annotations(folder / ANNOTATIONS, chain.from_iterable(mine))
    return folders


@contextmanager
def _new_folders(folders: Sequence[Path]) -> Iterator[None]:
    """Create folders that must not exist yet; remove them again if what follows fails."""
    for folder in folders:
        if folder.exists():
            raise StorageError(f"{folder} exists already. Choose another folder or remove it first.")
    try:
        for folder in folders:
            folder.mkdir(parents=True)
        yield
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _split(
    patients: Sequence[Patient], seed: int, *, sites: int, each: int | None, partition: str, alpha: float
) -> partitions.Partition:
    """Return which LIDC patients every hospital holds."""
    rng = np.random.default_rng(seed)
    if partition == "vendors":
        if each is None:
            return partitions.by_vendor_shares(len(patients), sites, rng)
        return partitions.evenly(len(patients), sites, each, rng)
    if partition == "dirichlet":
        skewed = partitions.by_dirichlet([patient.malignant for patient in patients], sites, alpha, rng)
        return skewed if each is None else partitions.resized(skewed, each)
    raise PlanError(f"There is no partition called {partition!r}; choose 'vendors' or 'dirichlet'.")


def _write_patient(seed: int, task: _Task) -> list[_Row]:
    """Simulate and write one patient; return the patient's findings."""
    rng = np.random.default_rng([seed, task.site, task.number])
    hospital = _hospital(task.site)
    series = simulate_series(task.nodules, hospital.scanner, rng)
    identity = draw_identity(f"fedward/{seed}/{task.site}", task.number, rng)
    uid = write_series(task.export, series, hospital.equipment, identity, rng)
    return [
        (uid, *(round(c, 2) for c in p.centre_mm), round(p.nodule.diameter_mm, 2), p.nodule.malignancy)
        for p in series.nodules
    ]


def _hospital(site: int) -> Hospital:
    kind = _HOSPITALS[site % len(_HOSPITALS)]
    campus = site // len(_HOSPITALS)
    if not campus:
        return kind
    name = f"{kind.equipment.institution}, Campus {campus + 1}"
    return replace(kind, equipment=replace(kind.equipment, institution=name))


def _write_annotations(path: Path, rows: Iterator[_Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


@contextmanager
def _mapping(workers: int | None, tasks: int) -> Iterator[Callable[..., Iterator[list[_Row]]]]:
    """Yield an ordered ``map`` over processes, or the built-in one where processes would not pay."""
    count = min(workers or os.cpu_count() or 1, tasks)
    if count <= 1 or (workers is None and tasks <= _FEW):
        yield map
        return
    # Spawned, because a forked child of a process with threads (torch, gRPC) can deadlock.
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
    try:
        yield partial(pool.map, chunksize=_CHUNK)
    except BrokenProcessPool as error:
        raise FederationError(
            "A process that generated patients died, perhaps for lack of memory. Try again with workers=1."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
