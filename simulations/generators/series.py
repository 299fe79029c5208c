"""One simulated CT series: a lung, its vessels, a patient's real nodules, a scanner."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simulations.generators.lidc import Nodule
from simulations.generators.nodules import PlacedNodule, paint_nodule, place, turn
from simulations.generators.scanner import MATRIX_PX, Scanner, acquire
from simulations.generators.thorax import Grid, Volume, draw_body, draw_lung, enclose, random_field
from simulations.generators.vessels import grow_tree, paint_tree


@dataclass(frozen=True)
class Series:
    """A reconstructed slab of one lung.

    Attributes:
        hu: ``(slices, rows, columns)``; slices ascend towards the head, columns towards the patient's left.
        spacing_mm: In-plane.
        thickness_mm: Of and between slices.
        origin_mm: Patient coordinates (LPS: left, posterior, superior) of the first voxel's centre.
        nodules: In the order given, with centres in patient coordinates (contours stay as placed).
    """

    hu: Volume
    spacing_mm: float
    thickness_mm: float
    origin_mm: tuple[float, float, float]
    nodules: tuple[PlacedNodule, ...]


def simulate_series(nodules: Sequence[Nodule], scanner: Scanner, rng: np.random.Generator) -> Series:
    """Simulate a scan that covers all ``nodules`` and one or two slices beyond them."""
    spacing = round(rng.uniform(*scanner.spacing_mm), 4)
    thickness = float(rng.choice(scanner.thickness_mm))
    body = draw_body(MATRIX_PX * spacing, rng)
    plane = Grid(1, MATRIX_PX, spacing, thickness, 0.0)
    placed = place([turn(nodule, rng) for nodule in nodules], body, plane, rng)
    grid = _slab(placed, plane, margin=int(rng.integers(1, 3)))

    clouds = random_field(grid, 14.0, rng)
    lung = draw_lung(body, grid, clouds)
    tree = grow_tree(body, grid, rng)
    for nodule in placed:
        tree = tree.giving_way(nodule.centre_mm, nodule.nodule.diameter_mm / 2)
    paint_tree(lung, tree, grid)
    for nodule in placed:
        paint_nodule(lung, nodule, grid, clouds)
    hu = acquire(enclose(lung, body, grid, clouds), grid, scanner, rng)
    return _in_patient(hu, grid, placed, rng)


def _slab(placed: Sequence[PlacedNodule], plane: Grid, margin: int) -> Grid:
    """Return the slices that hold every nodule, and ``margin`` more at both ends."""
    low = min(nodule.extent_mm[0] for nodule in placed)
    high = max(nodule.extent_mm[1] for nodule in placed)
    slices = int(np.ceil((high - low) / plane.thickness_mm)) + 2 * margin
    first = (low + high) / 2 - (slices - 1) / 2 * plane.thickness_mm
    return Grid(slices, plane.pixels, plane.spacing_mm, plane.thickness_mm, first)


def _in_patient(hu: Volume, grid: Grid, placed: Sequence[PlacedNodule], rng: np.random.Generator) -> Series:
    """Put the slab at a place in the patient: the left lung as drawn, the right one mirrored."""
    right = bool(rng.integers(2))
    side = -1.0 if right else 1.0
    middle = np.round([side * rng.uniform(62, 78), rng.uniform(-30, 10), rng.uniform(-260, -60)], 1)
    centres = np.array([p.centre_mm for p in placed]) * (side, 1, 1) + middle
    nodules = tuple(
        PlacedNodule(p.nodule, (float(x), float(y), float(z))) for p, (x, y, z) in zip(placed, centres, strict=True)
    )
    corner = grid.across_mm[0]
    origin = np.round([middle[0] + corner, middle[1] + corner, middle[2] + grid.first_z_mm], 4)
    x, y, z = (float(value) for value in origin)
    return Series(hu[:, :, ::-1] if right else hu, grid.spacing_mm, grid.thickness_mm, (x, y, z), nodules)
