"""Intake of CT nodules: a directory of DICOM and a list of annotations become a prepared store.

    find files → read headers → patients → series → nodules → one item per patient → store

A patient's records are a function of the series that name this patient, of the annotations that name these series,
and of the site's own rule and links. So they are the same to the byte whoever else is in the export, unless a file
of somebody else states the UID of one of these series; such a series is refused for all whom its files name.

One bad file, series or row is counted under its code and never stops the rest. The result does not depend on
the files' names or order, nor on the number of workers. Processes may be spawned (see ``client.intake.lanes``):
a script calls ``prepare_nodules`` under ``if __name__ == "__main__"``.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from client.intake.annotations import Annotation, read_annotations
from client.intake.dicom import SliceHeader, read_header, read_hounsfield
from client.intake.files import list_files
from client.intake.identities import Identities, IssuerRule
from client.intake.lanes import Lanes
from client.intake.patches import plan_patches
from client.intake.pseudonyms import PatientIdentity
from client.intake.rejects import RejectCode, Rejected
from client.intake.series import Series, group_series, settle_patients, split_numbers
from shared.errors import IntakeError
from shared.records import PatientItem, write_store
from shared.tasks.ct_nodules import SLICE_OFFSETS_MM, SPACING_MM, STORE_KIND, VENDORS, WINDOW_HU

Patches = npt.NDArray[np.float16]
Progress = Callable[[str, int, int], None]
"""Called with a stage (``headers`` or ``nodules``), how many are done, and of how many."""
Key = Callable[[PatientIdentity], bytes]
"""Patient to pseudonym."""
Witness = Callable[[bytes, int, PatientIdentity, Annotation], None]
"""Called with a stored nodule's pseudonym and number, and with the patient and annotation that they stand for."""
T = TypeVar("T")

BATCH_FILES: Final = 64

ATTRIBUTES: Final = MappingProxyType(
    {
        "spacing_mm": SPACING_MM,
        "window_hu": list(WINDOW_HU),
        "slice_offsets_mm": list(SLICE_OFFSETS_MM),
        "vendors": list(VENDORS),
    }
)


@dataclass(frozen=True)
class IntakeReport:
    """What intake made of an export: counts only. They are sensitive and stay in the hospital.

    Attributes:
        patients: Patients in the store.
        records: Records in the store.
        nodules: Nodules in the store.
        files: Files examined (not the annotations, ``DICOMDIR`` or an older store).
        rejected: How often each code was given; see ``RejectCode`` for what it counts.
    """

    patients: int
    records: int
    nodules: int
    files: int
    rejected: Mapping[RejectCode, int]

    def counts(self) -> dict[str, Any]:
        """Return the report as plain JSON, the codes in their own order."""
        return {
            "patients": self.patients,
            "records": self.records,
            "nodules": self.nodules,
            "files": self.files,
            "rejected": {code.value: self.rejected[code] for code in RejectCode if code in self.rejected},
        }


def prepare_nodules(
    dicom_dir: Path,
    annotations: Path,
    store: Path,
    secret: bytes,
    *,
    identities: Identities | None = None,
    on_progress: Progress | None = None,
    on_nodule: Witness | None = None,
    workers: int = 1,
) -> IntakeReport:
    """Prepare a hospital's export for the nodule tasks.

    Args:
        dicom_dir: Searched with all its folders; links are not followed.
        annotations: CSV, see ``client.intake.annotations``.
        store: Where the prepared store goes; an older one there is replaced.
        secret: The site's own, see ``client.intake.pseudonyms``.
        identities: Who is one patient; by default what the files say, and no links.
        on_progress: Told how far the work is.
        on_nodule: Told, in memory only, who each stored nodule belongs to and where it is. The store knows neither.
        workers: Processes that read and decode; 1 means this one, and one more only for compressed pixels.

    Raises:
        IntakeError: If the export or the annotations cannot be read at all, or nothing usable is left.
        StorageError: If the store cannot be written.
    """
    if not dicom_dir.is_dir():
        raise IntakeError(f"{dicom_dir} is not a folder. Name the folder with the DICOM export.")
    marked, rejected = read_annotations(annotations)
    paths, unusable = _find_files(dicom_dir, leave_out=frozenset({annotations.resolve(), store.resolve()}))
    rejected.update(unusable)
    tell, who = on_progress or (lambda _stage, _done, _total: None), identities or Identities()
    key = partial(who.key, secret)
    with Lanes(max(workers, 1)) as lanes:
        headers = []
        for outcome in _watched(_read_headers(lanes, paths), "headers", len(paths), tell):
            if isinstance(outcome, RejectCode):
                rejected[outcome] += 1
            else:
                headers.append(outcome)
        jobs = _match(_usable_series(headers, who.rule, key, rejected), marked, rejected)
        outcomes = lanes.map(_extract, jobs, crashed=_undecodable, isolate=_is_fragile)
        results = list(_watched(outcomes, "nodules", len(jobs), tell))
    patients = _patient_items(jobs, results, rejected, key, on_nodule)
    files = len(paths) + unusable.total()
    if not patients:
        reasons = ", ".join(f"{code} {rejected[code]}" for code in RejectCode if rejected[code]) or "it is empty"
        raise IntakeError(f"Nothing usable is left of the export ({files} files: {reasons}).")
    written = write_store(store, kind=STORE_KIND, patients=patients, attributes=ATTRIBUTES)
    records = int(written.offsets[-1])
    nodules = records // len(SLICE_OFFSETS_MM)
    return IntakeReport(len(written), records, nodules, files, dict(+rejected))


def _find_files(root: Path, leave_out: frozenset[Path]) -> tuple[list[Path], Counter[RejectCode]]:
    """List the files below ``root``; count what cannot be one."""
    found = list_files(root, leave_out)
    rejected = Counter(
        {
            RejectCode.SYMLINK: found.links,
            RejectCode.NOT_A_FILE: found.special,
            RejectCode.UNREADABLE: found.unreadable,
        }
    )
    return [path for path in found.files if path.name.upper() != "DICOMDIR"], +rejected


def _watched(outcomes: Iterator[T], stage: str, total: int, tell: Progress) -> Iterator[T]:
    for done, outcome in enumerate(outcomes, start=1):
        yield outcome
        tell(stage, done, total)


def _read_headers(lanes: Lanes, paths: Sequence[Path]) -> Iterator[SliceHeader | RejectCode]:
    def died(_batch: Sequence[Path]) -> list[SliceHeader | RejectCode]:
        raise IntakeError("A reading process died, perhaps for want of memory. Try fewer workers.")

    batches = [paths[start : start + BATCH_FILES] for start in range(0, len(paths), BATCH_FILES)]
    return chain.from_iterable(lanes.map(_read_batch, batches, crashed=died))


def _read_batch(paths: Sequence[Path]) -> list[SliceHeader | RejectCode]:
    return [read_header(path) for path in paths]


def _usable_series(
    headers: list[SliceHeader], rule: IssuerRule, key: Key, rejected: Counter[RejectCode]
) -> Mapping[str, Series | RejectCode]:
    settled, left_out = settle_patients(headers, rule)
    series, copies = group_series(settled, key)
    rejected[RejectCode.NO_ISSUER] += left_out
    rejected[RejectCode.SPLIT_NUMBER] += split_numbers(settled)
    rejected[RejectCode.DUPLICATE_FILE] += copies
    rejected.update(outcome for outcome in series.values() if isinstance(outcome, RejectCode))
    return series


@dataclass(frozen=True, repr=False)
class _Job:
    """One nodule and the series in which it was marked."""

    series: Series
    annotation: Annotation


def _match(
    series: Mapping[str, Series | RejectCode], marked: Sequence[Annotation], rejected: Counter[RejectCode]
) -> list[_Job]:
    """Pair annotations with their series; only these series are ever decoded."""
    by_series: dict[str, list[Annotation]] = defaultdict(list)
    for annotation in marked:
        by_series[annotation.series_uid].append(annotation)
    jobs: list[_Job] = []
    for series_uid, group in by_series.items():
        match series.get(series_uid):
            case None:
                rejected[RejectCode.UNKNOWN_SERIES] += len(group)
            case Series() as usable:
                jobs += [_Job(usable, annotation) for annotation in group]
            case _:
                rejected[RejectCode.REJECTED_SERIES] += len(group)
    return jobs


def _extract(job: _Job) -> Patches | RejectCode:
    """Decode what a nodule needs of its series; a frame is cut to the nodule's box at once."""
    try:
        plan = plan_patches(job.series.geometry, job.annotation.centre_mm)
        needed, rows, columns = plan.box
        block = np.stack([read_hounsfield(header, rows, columns) for header in job.series.slices[needed]])
        return plan.sample(block)
    except Rejected as outcome:
        return outcome.code


def _is_fragile(job: _Job) -> bool:
    return any(header.fragile for header in job.series.slices)


def _undecodable(_job: _Job) -> RejectCode:
    return RejectCode.UNDECODABLE


def _patient_items(
    jobs: Sequence[_Job],
    results: Sequence[Patches | RejectCode],
    rejected: Counter[RejectCode],
    key: Key,
    witness: Witness | None,
) -> list[PatientItem]:
    """Gather every patient's nodules from all of the patient's series, under all of the patient's identifiers."""
    nodules: dict[bytes, list[tuple[Annotation, int, Patches]]] = defaultdict(list)
    for job, outcome in zip(jobs, results, strict=True):
        if isinstance(outcome, RejectCode):
            rejected[outcome] += 1
        else:
            name = key(job.series.patient)
            if witness is not None:
                witness(name, len(nodules[name]), job.series.patient, job.annotation)
            nodules[name].append((job.annotation, job.series.vendor, outcome))
    return [_patient_item(name, group) for name, group in nodules.items()]


def _patient_item(key: bytes, group: Sequence[tuple[Annotation, int, Patches]]) -> PatientItem:
    each = len(SLICE_OFFSETS_MM)
    marked, vendors, images = zip(*group, strict=True)
    return PatientItem(
        key,
        {
            "image": np.concatenate(images),
            "malignant": np.repeat(np.array([a.malignant for a in marked], np.uint8), each),
            "nodule": np.repeat(np.arange(len(group), dtype=np.int32), each),
            "diameter_mm": np.repeat(np.array([a.diameter_mm for a in marked], np.float32), each),
            "vendor": np.repeat(np.array(vendors, np.uint8), each),
        },
    )
