"""Patches of no patient: nodules drawn from geometry alone, for a generative model's public start.

What they know is what any textbook says of CT: lung is dark, vessels and the chest wall are bright, a nodule is a
rounded thing in the middle, 4 to 30 mm across. They have no class: nothing here says what is benign or malignant, so
whatever a model tells apart that started from these it has from patients, under their privacy.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from shared.tasks.ct_nodules import SPACING_MM, WINDOW_HU

_LUNG_HU: Final = -860.0
_TISSUE_HU: Final = 40.0
_DENSITY_HU: Final = (-600.0, 150.0)
_DIAMETER_MM: Final = (4.0, 30.0)
_LOBES: Final = np.arange(2, 7)
Images = npt.NDArray[np.float32]
Field = npt.NDArray[np.float64]


def draw_phantoms(count: int, side_px: int, rng: np.random.Generator) -> Images:
    """Return patches ``(count, side, side)``, windowed to [0, 1].

    Args:
        count: How many.
        side_px: Their side, at ``SPACING_MM``.
        rng: Consumed.
    """
    low, high = WINDOW_HU
    patches = np.stack([_patch(side_px, rng) for _ in range(count)])
    windowed: Images = ((patches - low) / (high - low)).clip(0.0, 1.0).astype(np.float32)
    return windowed


def _patch(side_px: int, rng: np.random.Generator) -> Field:
    """Return one patch in Hounsfield units."""
    axis = (np.arange(side_px) - (side_px - 1) / 2) * SPACING_MM
    y, x = np.meshgrid(axis, axis, indexing="ij")
    clouds = gaussian_filter(rng.normal(size=x.shape), rng.uniform(2.0, 4.0))
    image = _LUNG_HU + 30.0 * rng.normal() + 25.0 * clouds / clouds.std()
    for _ in range(rng.poisson(3.0)):
        image = np.maximum(image, _vessel(x, y, rng))
    if rng.random() < 0.25:
        image = np.maximum(image, _wall(x, y, rng))
    image = np.maximum(image, _nodule(x, y, rng))
    patch: Field = gaussian_filter(image, rng.uniform(0.4, 0.9)) + rng.uniform(10.0, 30.0) * rng.normal(size=x.shape)
    return patch


def _nodule(x: Field, y: Field, rng: np.random.Generator) -> Field:
    """Return a star-shaped body about the middle: an ellipse whose outline a few waves disturb."""
    radius = 0.5 * np.exp(rng.uniform(*np.log(_DIAMETER_MM)))
    dx, dy = x - rng.normal(), y - rng.normal()
    angle = np.arctan2(dy, dx)
    waves = rng.normal(size=len(_LOBES)) * rng.uniform(0.0, 0.25) / _LOBES
    phases = rng.uniform(0.0, 2.0 * np.pi, len(_LOBES))
    outline = radius * (1.0 + (waves * np.cos(_LOBES * angle[..., None] + phases)).sum(-1))
    inside = 1.0 / (1.0 + np.exp((np.hypot(dx, dy) - outline) / rng.uniform(0.3, 0.9)))
    density = rng.uniform(*_DENSITY_HU)
    body: Field = _LUNG_HU + inside * (density - _LUNG_HU)
    return body


def _vessel(x: Field, y: Field, rng: np.random.Generator) -> Field:
    """Return a stretch of a straight bright tube."""
    angle, reach = rng.uniform(0.0, 2.0 * np.pi), x.max()
    cx, cy = rng.uniform(-reach, reach, 2)
    along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
    profile = np.exp(-((across / rng.uniform(0.5, 1.5)) ** 2) - (along / rng.uniform(1.0, 8.0)) ** 2)
    body: Field = _LUNG_HU + profile * rng.uniform(0.4, 1.0) * (_TISSUE_HU - _LUNG_HU)
    return body


def _wall(x: Field, y: Field, rng: np.random.Generator) -> Field:
    """Return the chest wall: all that lies beyond a wide circle about a point inside the lung."""
    angle, curvature = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(40.0, 120.0)
    offset = curvature - rng.uniform(7.0, 18.0)
    distance = np.hypot(x + offset * np.cos(angle), y + offset * np.sin(angle)) - curvature
    inside = 1.0 / (1.0 + np.exp(-distance / 0.5))
    body: Field = _LUNG_HU + inside * (_TISSUE_HU + 20.0 * rng.normal() - _LUNG_HU)
    return body
