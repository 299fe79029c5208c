"""Hospitals of real images that somebody else prepared: a NumPy archive dealt to prepared stores.

Three kinds of archive are known by the fields they hold: nodule slices (``slices.py``), nodule cubes (``cubes.py``) and
chest X-rays (``xrays.py``).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np

from shared.errors import IntakeError
from shared.records import KEY_BYTES, Array, PatientItem, write_store
from shared.tasks.ct_nodules import STORE_KIND
from simulations.generators import cubes, slices, xrays

HELDOUT: Final = "heldout"


@dataclass(frozen=True)
class _Kind:
    """One form of archive.

    Attributes:
        fields: What it holds.
        read: Makes every patient's name and arrays of the fields; raises ValueError if their shapes are wrong.
        attributes: What the stores say of the preparation.
        heldout: Makes the patients that the archive itself sets apart for judging, if it does.
    """

    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Array]], dict[str, dict[str, Array]]]
    attributes: Mapping[str, Any]
    heldout: Callable[[Mapping[str, Array]], dict[str, dict[str, Array]]] | None = None


_KINDS: Final = (
    _Kind(slices.FIELDS, slices.read_patients, slices.ATTRIBUTES),
    _Kind(cubes.FIELDS, cubes.read_patients, cubes.ATTRIBUTES),
    _Kind(xrays.FIELDS, xrays.read_patients, xrays.ATTRIBUTES, xrays.read_heldout),
)


def deal_archive(archive: Path, out: Path, *, sites: int, seed: int) -> tuple[Path, ...]:
    """Deal the patients of ``archive`` evenly to ``sites`` prepared stores below ``out``.

    What the archive itself sets apart for judging becomes ``out/heldout``.

    Returns:
        The hospitals' folders, in order, without the held-out one.

    Raises:
        IntakeError: If the archive cannot be read or holds fewer patients than there are sites.
        StorageError: If ``out`` cannot be written.
    """
    kind, content = _read(archive)
    try:
        patients = _items(kind.read(content))
        apart = _items(kind.heldout(content)) if kind.heldout else []
    except (ValueError, IndexError, TypeError) as error:
        raise IntakeError(
            f"{archive} holds {', '.join(kind.fields)} of other shapes than expected: {error}."
        ) from error
    if len(patients) < sites:
        raise IntakeError(f"{archive} holds {len(patients)} patients, too few for {sites} hospitals.")
    if out.exists() and any(out.iterdir()):
        raise IntakeError(f"{out} is not empty. Give a new folder to --out.")
    order = np.random.default_rng(seed).permutation(len(patients))
    folders = tuple(out / f"site-{number}" for number in range(1, sites + 1))
    for number, folder in enumerate(folders):
        _write(folder, [patients[position] for position in order[number::sites]], kind)
    if apart:
        _write(out / HELDOUT, apart, kind)
    return folders


def _write(folder: Path, patients: Sequence[PatientItem], kind: _Kind) -> None:
    write_store(folder, kind=STORE_KIND, patients=patients, attributes=kind.attributes)


def _items(patients: Mapping[str, dict[str, Array]]) -> list[PatientItem]:
    return [
        PatientItem(hashlib.sha256(name.encode()).digest()[:KEY_BYTES], arrays) for name, arrays in patients.items()
    ]


def _read(archive: Path) -> tuple[_Kind, dict[str, Array]]:
    """Return the archive's content and which kind it is."""
    known = "nodule slices, nodule cubes or chest X-rays"
    try:
        with np.load(archive, allow_pickle=False) as content:
            for kind in _KINDS:
                if set(kind.fields) <= set(content.files):
                    return kind, {name: content[name] for name in kind.fields}
    except (OSError, EOFError, TypeError, ValueError, AttributeError, BadZipFile) as error:
        raise IntakeError(f"{archive} is no archive of {known}.") from error
    raise IntakeError(f"{archive} is no archive of {known}: it lacks their fields.")
