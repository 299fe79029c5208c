"""Real nodules in a simulated lung: where they go, how they are turned, how they become voxels.

Rasterising is exact along x (each contour's edge covers a fraction of a pixel), fourfold supersampled
along y, and exact along z: a slice shows every contour in proportion to how much of the slice's
thickness the contour's own slab fills. That is a scanner's partial volume.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from scipy.ndimage import gaussian_filter

from simulations.generators.lidc import Nodule, Points
from simulations.generators.thorax import Body, Grid, Volume

GROUND_GLASS_HU: Final = -600.0
SOLID_HU: Final = 40.0
CALCIFIED_HU: Final = 240.0
_SUBROWS: Final = 4
_GAP_MM: Final = 4.0
_BETWEEN_CENTRES_MM: Final = 18.0
_SPREADS_MM: Final = (2.0, 8.0, 20.0, 40.0)
_CANDIDATES: Final = 1500


@dataclass(frozen=True)
class PlacedNodule:
    """A nodule and the position of its centre as x, y, z in mm (``thorax.py``'s coordinates)."""

    nodule: Nodule
    centre_mm: tuple[float, float, float]

    @property
    def extent_mm(self) -> tuple[float, float]:
        """Lower and upper end along z."""
        low, high = self.nodule.extent_mm
        return self.centre_mm[2] + low, self.centre_mm[2] + high


def density_hu(nodule: Nodule) -> float:
    """Return the nodule's mean density from its readers' ratings."""
    if nodule.calcified:
        return CALCIFIED_HU
    return float(np.interp(nodule.texture, [1, 5], [GROUND_GLASS_HU, SOLID_HU]))


def turn(nodule: Nodule, rng: np.random.Generator) -> Nodule:
    """Turn a nodule by quarter turns and reflections, which keep every length."""
    swap, *flips = rng.integers(2, size=4).astype(bool)
    signs = np.where(flips, -1.0, 1.0)

    def points(original: Points) -> Points:
        return np.asarray((original[:, ::-1] if swap else original) * signs[:2])

    contours = tuple(replace(c, points_mm=points(c.points_mm)) for c in nodule.contours)
    if flips[2]:
        contours = tuple(replace(c, low_mm=-c.high_mm, high_mm=-c.low_mm) for c in reversed(contours))
    return replace(nodule, contours=contours)


def place(nodules: Sequence[Nodule], body: Body, grid: Grid, rng: np.random.Generator) -> list[PlacedNodule]:
    """Find room for all nodules inside the lung, apart from one another, close along z.

    The largest goes first. Where there is no room near the middle the search widens along z; a nodule
    for which there is no room at all gets the roomiest place that was tried.

    Args:
        nodules: Already turned.
        body: Whose lung.
        grid: Its pixels are the candidates; its slices are ignored.
        rng: Consumed.

    Returns:
        In the order of ``nodules``.
    """
    x, y = np.meshgrid(grid.across_mm, grid.across_mm)
    depth = body.lung_depth_mm(x, y).ravel()
    depth[np.hypot(x - body.hilum_mm[0], y - body.hilum_mm[1]).ravel() < 14] = -1  # the hilum's vessels
    inside = np.flatnonzero(depth > 3)
    placed: dict[int, PlacedNodule] = {}
    for index in sorted(range(len(nodules)), key=lambda i: -nodules[i].diameter_mm):
        for spread in _SPREADS_MM:
            pixel = rng.choice(inside, _CANDIDATES)
            z = rng.uniform(-spread, spread, _CANDIDATES)
            candidates = np.stack([x.flat[pixel], y.flat[pixel], z], axis=1)
            room = _room_mm(nodules[index], candidates, depth[pixel] + body.taper * z, list(placed.values()))
            if room.max() >= 0:
                break
        best = int(np.argmax(np.minimum(room, 0)))  # the first with room enough: candidates are random
        cx, cy, cz = (float(c) for c in candidates[best])
        placed[index] = PlacedNodule(nodules[index], (cx, cy, cz))
    return [placed[index] for index in range(len(nodules))]


def _room_mm(nodule: Nodule, candidates: Points, depth_mm: Points, others: Sequence[PlacedNodule]) -> Points:
    """Return the free margin at each candidate ``(n, 3)``; negative where something is too close."""
    radius = nodule.diameter_mm / 2
    room = depth_mm - radius - 1.5
    for other in others:
        apart = np.linalg.norm(candidates - np.array(other.centre_mm), axis=1)
        needed = max(radius + other.nodule.diameter_mm / 2 + _GAP_MM, _BETWEEN_CENTRES_MM)
        room = np.minimum(room, apart - needed)
    return np.asarray(room, np.float64)


def paint_nodule(lung: Volume, placed: PlacedNodule, grid: Grid, clouds: Volume) -> None:
    """Paint a nodule into ``lung`` in place, its edge as sharp as its readers rated it."""
    share, rows, columns, slices = rasterise(placed, grid)
    blur = max(5.0 - placed.nodule.margin, 0.0) * 0.22 / grid.spacing_mm
    share = gaussian_filter(share, (0.0, blur, blur), mode="constant")
    hu = density_hu(placed.nodule)
    uneven = 20.0 if hu > 0 else 60.0
    box = lung[slices, rows, columns]
    box += share * (np.maximum(hu + uneven * clouds[slices, rows, columns], box) - box)


def rasterise(placed: PlacedNodule, grid: Grid) -> tuple[Volume, slice, slice, slice]:
    """Return the part of each voxel that the nodule fills, 0 to 1, and its rows, columns and slices."""
    contours = placed.nodule.contours
    centre = np.array(placed.centre_mm)
    points = [(c.points_mm + centre[:2] - grid.across_mm[0]) / grid.spacing_mm for c in contours]
    every = np.concatenate(points)
    low = np.clip(np.floor(every.min(axis=0)).astype(int) - 3, 0, grid.pixels)
    high = np.clip(np.ceil(every.max(axis=0)).astype(int) + 4, 0, grid.pixels)
    width, height = high - low
    masks = np.stack([_coverage(p - low, int(height), int(width)) for p in points])
    edges = np.array([[c.low_mm, c.high_mm] for c in contours]) + centre[2]
    bottom = grid.z_mm[:, None] - grid.thickness_mm / 2
    overlap = np.minimum(edges[:, 1], bottom + grid.thickness_mm) - np.maximum(edges[:, 0], bottom)
    weight = np.clip(overlap / grid.thickness_mm, 0, 1) * np.where([c.cavity for c in contours], -1, 1)
    touched = np.flatnonzero(weight.any(axis=1))
    slices = slice(int(touched[0]), int(touched[-1]) + 1) if len(touched) else slice(0, 0)
    share = np.clip(np.tensordot(weight[slices], masks, axes=1), 0, 1).astype(np.float32)
    return share, slice(low[1], high[1]), slice(low[0], high[0]), slices


def _coverage(points: Points, height: int, width: int) -> Points:
    """Return how much of each pixel a closed polygon covers.

    Every edge's crossing of a sub-row adds, to all pixels on its right, its direction: a running sum
    along the row is then the winding number, with fractions where the edge cuts a pixel.

    Args:
        points: ``(n, 2)`` x and y in pixels; pixel (0, 0) is centred on the origin.
        height: Rows.
        width: Columns.
    """
    x0, y0 = points.T
    x1, y1 = np.roll(points, -1, axis=0).T
    level = ((np.arange(height * _SUBROWS) + 0.5) / _SUBROWS - 0.5)[:, None]
    row, edge = np.nonzero((y0 <= level) != (y1 <= level))
    place = (level[row, 0] - y0[edge]) / (y1[edge] - y0[edge])
    crossing = np.clip(x0[edge] + place * (x1[edge] - x0[edge]) + 0.5, 0, width)
    column = crossing.astype(int)
    part = crossing - column
    direction = np.where(y1[edge] > y0[edge], 1.0, -1.0)
    cell = row * (width + 2) + column
    size = height * _SUBROWS * (width + 2)
    steps = np.bincount(cell, direction * (1 - part), size) + np.bincount(cell + 1, direction * part, size)
    winding = np.abs(np.cumsum(steps.reshape(height, _SUBROWS, width + 2), axis=2))
    return np.asarray(np.minimum(winding, 1).mean(axis=1)[:, :width], np.float64)
