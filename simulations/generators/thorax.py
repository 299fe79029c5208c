"""A simulated lung in Hounsfield units: what stands around the real nodules.

Texture here is simulated; only the nodules' shapes and labels are real (``lidc.py``). The anatomy is a
sketch of one lung as a scanner's targeted reconstruction shows it: a rib cage that bulges, ribs that
cross the slices obliquely, mediastinum with heart, aorta and a vertebra, and lung tissue that grows
denser towards the back. It makes nodules as hard to see as they are among vessels and near a wall; it
is no model of disease.

Coordinates are millimetres from the middle of the field of view: x towards the patient's side (lateral,
whichever lung it is), y towards the back, z towards the head. Volumes are ``(slices, rows, columns)``.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import fft

Volume = npt.NDArray[np.float32]

AIR_HU: Final = -1000.0
FAT_HU: Final = -95.0
MUSCLE_HU: Final = 45.0
MARROW_HU: Final = 210.0
CORTEX_HU: Final = 650.0
_RIB_DEPTH_MM: Final = 6.5
_RIB_PITCH_MM: Final = 30.0


@dataclass(frozen=True)
class Grid:
    """The voxels of one series.

    Attributes:
        slices: Number of axial images.
        pixels: Rows and columns of each.
        spacing_mm: In-plane.
        thickness_mm: Of a slice, and from one slice to the next.
        first_z_mm: Centre of the lowest slice.
    """

    slices: int
    pixels: int
    spacing_mm: float
    thickness_mm: float
    first_z_mm: float

    @cached_property
    def across_mm(self) -> Volume:
        """``(pixels,)`` centres along x, and along y."""
        return ((np.arange(self.pixels) - (self.pixels - 1) / 2) * self.spacing_mm).astype(np.float32)

    @cached_property
    def z_mm(self) -> Volume:
        """``(slices,)`` centres along z."""
        return (self.first_z_mm + np.arange(self.slices) * self.thickness_mm).astype(np.float32)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""
        return self.slices, self.pixels, self.pixels

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        """Size of a voxel along the axes of a volume."""
        return self.thickness_mm, self.spacing_mm, self.spacing_mm


@dataclass(frozen=True)
class Body:
    """One patient's anatomy around one lung.

    Attributes:
        rib_cage_mm: Half axes of the rib cage's inner ellipse, along x and y.
        medial_mm: Where the mediastinum begins, from the ellipse's centre (negative x).
        heart_mm: How far the heart bulges into the lung.
        waves: Phases of the outlines' undulation, the ribs and the mediastinum.
        taper: Growth of the lung per millimetre towards the head (negative: it narrows).
        lung_hu: Mean density of the lung's tissue.
        contrast_hu: What contrast medium adds to blood.
    """

    rib_cage_mm: tuple[float, float]
    medial_mm: float
    heart_mm: float
    waves: tuple[float, float, float, float]
    taper: float
    lung_hu: float
    contrast_hu: float

    @property
    def hilum_mm(self) -> tuple[float, float]:
        """Where vessels enter the lung, in x and y."""
        return self.medial_mm - self.centre_x_mm + 8.0, 0.12 * self.rib_cage_mm[1]

    @property
    def centre_x_mm(self) -> float:
        """Offset that puts the lung, not the rib cage's ellipse, in the middle of the field of view."""
        return (self.rib_cage_mm[0] + self.medial_mm) / 2

    def inside_ribs_mm(self, x: Volume, y: Volume) -> Volume:
        """Return how deep inside the rib cage (negative: outside) each point lies at z = 0."""
        u = x + self.centre_x_mm
        angle = np.arctan2(y, u)
        wave = 1 + 0.025 * np.sin(2 * angle + self.waves[0]) + 0.015 * np.sin(3 * angle + self.waves[1])
        radius = np.hypot(u / self.rib_cage_mm[0], y / self.rib_cage_mm[1]) * wave
        distance = np.hypot(u, y)
        return np.asarray(distance / np.maximum(radius, 1e-3) - distance, np.float32)

    def beside_mediastinum_mm(self, x: Volume, y: Volume) -> Volume:
        """Return how far lateral of the mediastinum each point lies at z = 0."""
        b = self.rib_cage_mm[1]
        heart = self.heart_mm * np.exp(-(((y + 0.35 * b) / (0.4 * b)) ** 2))
        hilum = 6 * np.exp(-(((y - 0.12 * b) / 9) ** 2))
        wobble = 1.5 * np.sin(y / 8 + self.waves[3])
        return np.asarray(x + self.centre_x_mm - self.medial_mm - heart - hilum + wobble, np.float32)

    def lung_depth_mm(self, x: Volume, y: Volume) -> Volume:
        """Return how deep inside the lung (negative: outside) each point lies at z = 0."""
        rounding = 2.5
        sides = (self.inside_ribs_mm(x, y), self.beside_mediastinum_mm(x, y))
        return np.asarray(-rounding * np.logaddexp(-sides[0] / rounding, -sides[1] / rounding), np.float32)


def draw_body(field_of_view_mm: float, rng: np.random.Generator) -> Body:
    """Draw a patient whose lung fills the field of view, as a technician would have set it."""
    a = field_of_view_mm * rng.uniform(0.415, 0.44)
    return Body(
        rib_cage_mm=(a, field_of_view_mm * rng.uniform(0.40, 0.425)),
        medial_mm=-a * rng.uniform(0.68, 0.76),
        heart_mm=rng.uniform(4, 16),
        waves=tuple(rng.uniform(0, 2 * np.pi, 4)),
        taper=-rng.uniform(0.02, 0.15),
        lung_hu=rng.uniform(-885, -840),
        contrast_hu=rng.choice([0.0, rng.uniform(60, 160)]),
    )


def random_field(grid: Grid, scale_mm: float, rng: np.random.Generator) -> Volume:
    """Return a smooth Gaussian random volume of zero mean and unit standard deviation.

    The spectrum falls off beyond 1 / ``scale_mm`` as a power law: clouds with some fine structure.
    """
    coefficients = rng.standard_normal(grid.shape, np.float32)
    frequencies = [np.arange(n) / (2 * n * mm) for n, mm in zip(grid.shape, grid.voxel_mm, strict=True)]
    z, y, x = np.ix_(*frequencies)
    spectrum = (1 + (scale_mm**2) * (z**2 + y**2 + x**2)) ** -1.6
    coefficients *= spectrum.astype(np.float32)
    coefficients[0, 0, 0] = 0
    field = fft.idctn(coefficients, norm="ortho", overwrite_x=True)
    return np.asarray(field / max(float(field.std()), 1e-6), np.float32)


def draw_lung(body: Body, grid: Grid, clouds: Volume) -> Volume:
    """Return lung tissue without vessels, everywhere in the field of view.

    Args:
        body: The patient.
        grid: Where to draw.
        clouds: A ``random_field`` on that grid; varies aeration.
    """
    gravity = 30.0 * grid.across_mm / body.rib_cage_mm[1]
    return np.asarray(body.lung_hu + gravity[:, None] + 26.0 * clouds, np.float32)


def enclose(lung: Volume, body: Body, grid: Grid, clouds: Volume) -> Volume:
    """Put chest wall and mediastinum around a finished lung, with partial volume at the pleura."""
    x, y = np.meshgrid(grid.across_mm, grid.across_mm)
    wall = -body.inside_ribs_mm(x, y)
    around = np.where(body.beside_mediastinum_mm(x, y) < -wall, _mediastinum(body, x, y), _soft_wall(wall))
    outside = around + 7.0 * clouds
    _add_ribs(outside, wall, np.arctan2(y, x + body.centre_x_mm), body, grid)
    depth = body.lung_depth_mm(x, y) + body.taper * grid.z_mm[:, None, None]
    share = np.clip(0.5 + depth / grid.spacing_mm, 0, 1)
    return np.asarray(outside + share * (lung - outside), np.float32)


def _soft_wall(wall: Volume) -> Volume:
    """Return muscle, fat, skin and room air by depth below the pleura."""
    edges = [0.0, 2.0, 13.0, 16.0, 19.0, 33.0, 34.0, 36.0, 37.0]
    tissue = [MUSCLE_HU, 15.0, 30.0, MUSCLE_HU, FAT_HU, FAT_HU, 20.0, 20.0, AIR_HU]
    return np.interp(wall, edges, tissue).astype(np.float32)


def _mediastinum(body: Body, x: Volume, y: Volume) -> Volume:
    """Return heart, aorta and vertebra in fat."""
    u, b = x + body.centre_x_mm - body.medial_mm, body.rib_cage_mm[1]

    def disc(centre: tuple[float, float], axes: tuple[float, float]) -> Volume:
        radius = np.hypot((u - centre[0]) / axes[0], (y - centre[1]) / axes[1])
        return np.asarray(np.clip((1 - radius) * min(axes) + 0.5, 0, 1), np.float32)

    hu = np.interp(body.beside_mediastinum_mm(x, y), [-4.0, -2.0], [FAT_HU / 3, MUSCLE_HU])
    blood = MUSCLE_HU + body.contrast_hu
    parts = [
        (disc((-16.0 + body.heart_mm, -0.35 * b), (24.0, 0.5 * b)), blood),
        (disc((-13.0, 0.52 * b), (10.5, 10.5)), blood),
        (disc((-27.0, 0.86 * b), (19.0, 17.0)), CORTEX_HU * 0.7),
        (disc((-27.0, 0.86 * b), (17.0, 15.0)), MARROW_HU),
    ]
    for share, value in parts:
        hu = hu + share * (value - hu)
    return np.asarray(hu, np.float32)


def _add_ribs(outside: Volume, wall: Volume, angle: Volume, body: Body, grid: Grid) -> None:
    """Paint the ribs: bands that descend towards the front, so each slice cuts them obliquely."""
    rows, columns = np.nonzero((wall > -2) & (wall < 16) & (np.abs(angle) < 2.4))
    descent = 26.0 * angle[rows, columns] + body.waves[2] * _RIB_PITCH_MM
    level = np.mod(grid.z_mm[:, None] - descent, _RIB_PITCH_MM) - _RIB_PITCH_MM / 2
    depth = wall[rows, columns] - body.taper * grid.z_mm[:, None] - _RIB_DEPTH_MM
    inside_mm = (1 - np.hypot(level / 6.5, depth / 3.8)) * 3.8
    tissue = outside[:, rows, columns]
    for margin_mm, value in ((0.0, CORTEX_HU), (1.4, MARROW_HU)):
        share = np.clip(0.5 + (inside_mm - margin_mm) / grid.spacing_mm, 0, 1)
        tissue += share * (value - tissue)
    outside[:, rows, columns] = tissue
