"""Where a stack of slices lies in the patient, and how a nodule's axial patches are sampled from it.

Pure NumPy and SciPy. Coordinates are DICOM's patient coordinates (LPS, mm: x to the patient's left, y to the
back, z to the head). Reference: DICOM PS3.3 C.7.6.2.1.1, the image plane equation.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from client.intake.rejects import RejectCode, Rejected
from shared.tasks.ct_nodules import SLICE_OFFSETS_MM, SPACING_MM, STORED_PX, WINDOW_HU

Floats = npt.NDArray[np.float64]

GAP_FACTOR: Final = 1.5
"""An interval between neighbouring slices above this multiple of the series' median is a gap."""
MAX_INTERVAL_MM: Final = 10.0
"""An interval above this is a gap whatever the median: whole nodules fit into it."""
EDGE_MM: Final = max(SLICE_OFFSETS_MM)
"""How far beyond the volume's faces the outermost voxel is repeated; further out there is air."""


@dataclass(frozen=True)
class StackGeometry:
    """The affine map of a stack of parallel slices, at any orientation, gantry tilt and uneven spacing.

    Attributes:
        origin_mm: ``(3,)`` centre of the first slice's first pixel.
        axes: ``(3, 3)`` columns are the unit vectors along the stack, down a column and along a row.
        depths_mm: ``(S,)`` ascending place of each slice along the first axis, from 0.
        spacing_mm: Distance between rows and between columns.
        shape: Rows and columns of a slice.
    """

    origin_mm: Floats
    axes: Floats
    depths_mm: Floats
    spacing_mm: tuple[float, float]
    shape: tuple[int, int]

    @property
    def interval_mm(self) -> float:
        """The usual distance between neighbouring slices."""
        return float(np.median(np.diff(self.depths_mm)))

    @property
    def voxel_mm(self) -> Floats:
        """``(3,)`` size of a voxel along the axes."""
        return np.array([self.interval_mm, *self.spacing_mm])

    def along_axes(self, points: Floats) -> Floats:
        """Return ``(N, 3)`` mm along the axes for ``(N, 3)`` points in the patient."""
        return np.asarray(np.linalg.solve(self.axes, (points - self.origin_mm).T).T, np.float64)

    def beyond_faces_mm(self, along: Floats) -> Floats:
        """Return ``(N,)`` how far points lie outside the volume along the worst axis; negative inside.

        A face lies half a voxel outside the outermost voxel centres.
        """
        last = np.array(
            [self.depths_mm[-1], *((n - 1) * mm for n, mm in zip(self.shape, self.spacing_mm, strict=True))]
        )
        result: Floats = (np.maximum(-along, along - last) - self.voxel_mm / 2).max(axis=1)
        return result

    def voxels(self, along: Floats) -> Floats:
        """Return ``(N, 3)`` fractional (slice, row, column), held inside the volume."""
        index = np.empty_like(along)
        # By the true place of each slice, so that uneven spacing costs no accuracy.
        index[:, 0] = np.interp(along[:, 0], self.depths_mm, np.arange(len(self.depths_mm)))
        for axis, (count, mm) in enumerate(zip(self.shape, self.spacing_mm, strict=True), start=1):
            index[:, axis] = np.clip(along[:, axis] / mm, 0, count - 1)
        return index


@dataclass(frozen=True)
class PatchPlan:
    """What a nodule's patches need of a stack: only this box is ever decoded.

    Attributes:
        box: Slices, rows and columns as ranges ``[start, stop)``.
        index: ``(3, N)`` fractional voxel of each sample, relative to the box.
        air: ``(N,)`` samples outside the volume.
    """

    box: tuple[slice, slice, slice]
    index: Floats
    air: npt.NDArray[np.bool_]

    def sample(self, block: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
        """Interpolate linearly and window.

        Args:
            block: ``(S, H, W)`` Hounsfield units of the box.

        Returns:
            ``(len(SLICE_OFFSETS_MM), STORED_PX, STORED_PX)`` in [0, 1].
        """
        low, high = WINDOW_HU
        hounsfield = ndimage.map_coordinates(block, self.index, order=1, mode="nearest", output=np.float32)
        hounsfield[self.air] = low
        windowed = np.clip((hounsfield - low) / (high - low), 0, 1)
        return np.asarray(windowed.reshape(-1, STORED_PX, STORED_PX), np.float16)


def plan_patches(geometry: StackGeometry, centre_mm: tuple[float, float, float]) -> PatchPlan:
    """Plan the axial patches around a point.

    Raises:
        Rejected: ``OUTSIDE_VOLUME`` if the point lies outside; ``MISSING_SLICES`` if there is a gap
            (``GAP_FACTOR``, ``MAX_INTERVAL_MM``) between the slices from which the patches are interpolated.
    """
    centre = np.array(centre_mm)
    if geometry.beyond_faces_mm(geometry.along_axes(centre[None]))[0] > 0:
        raise Rejected(RejectCode.OUTSIDE_VOLUME)
    along = geometry.along_axes(centre + _OFFSETS_MM)
    air = geometry.beyond_faces_mm(along) > EDGE_MM
    index = geometry.voxels(along)
    lowest = np.floor(index[~air].min(axis=0)).astype(int)
    highest = np.ceil(index[~air].max(axis=0)).astype(int)
    needed_mm = np.diff(geometry.depths_mm[lowest[0] : highest[0] + 1])
    if np.any(needed_mm > min(GAP_FACTOR * geometry.interval_mm, MAX_INTERVAL_MM)):
        raise Rejected(RejectCode.MISSING_SLICES)
    slices, rows, columns = (slice(int(a), int(b) + 1) for a, b in zip(lowest, highest, strict=True))
    return PatchPlan((slices, rows, columns), (index - lowest).T, air)


def _offsets() -> Floats:
    """Return ``(N, 3)`` the samples of all patches relative to the centre.

    The number of pixels is even: the centre lies between the middle ones, so flips and quarter turns keep it.
    """
    line = (np.arange(STORED_PX) - (STORED_PX - 1) / 2) * SPACING_MM
    z, y, x = np.meshgrid(np.array(SLICE_OFFSETS_MM), line, line, indexing="ij")
    return np.stack([x, y, z], axis=-1).reshape(-1, 3)


_OFFSETS_MM: Final = _offsets()
