"""What a hospital's scanner makes of a body: resolution, sharpening and noise of its kernel.

Linear and shift invariant within a slice, so it is a product in the discrete cosine transform, whose
implied reflection at the borders leaves no seam. White noise stays white under that orthonormal
transform: the noise needs no transform of its own.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import fft

from simulations.generators.thorax import Grid, Volume

MATRIX_PX: Final = 192


@dataclass(frozen=True)
class Scanner:
    """How a hospital scans and reconstructs.

    Attributes:
        spacing_mm: Range of the in-plane pixel spacing over patients.
        thickness_mm: Slice thicknesses in use.
        blur_mm: Standard deviation of the in-plane point spread.
        edge: Enhancement of middle frequencies; 0 is a soft kernel, 1 a sharp lung kernel.
        noise_hu: Standard deviation of the noise at an average dose.
    """

    spacing_mm: tuple[float, float]
    thickness_mm: tuple[float, ...]
    blur_mm: float
    edge: float
    noise_hu: float


def acquire(body_hu: Volume, grid: Grid, scanner: Scanner, rng: np.random.Generator) -> Volume:
    """Return what the scanner reconstructs from the true densities ``(slices, rows, columns)``."""
    axis = np.arange(grid.pixels, dtype=np.float32) / (2 * grid.pixels * grid.spacing_mm)
    frequency = np.hypot(axis[:, None], axis)
    blur = np.exp(-2 * (np.pi * scanner.blur_mm * frequency) ** 2)
    transfer = blur * (1 + scanner.edge * (frequency / 0.3) ** 2 / (1 + (frequency / 0.45) ** 4))
    # Filtered back-projection amplifies noise with frequency (the ramp) before the kernel rolls it off.
    spectrum = (0.15 + frequency) * transfer
    dose = rng.lognormal(0, 0.2)
    spectrum *= scanner.noise_hu * dose / np.sqrt((spectrum**2).mean())
    image = fft.dctn(body_hu, axes=(1, 2), norm="ortho") * transfer.astype(np.float32)
    image += rng.standard_normal(image.shape, np.float32) * spectrum.astype(np.float32)
    return np.asarray(fft.idctn(image, axes=(1, 2), norm="ortho", overwrite_x=True), np.float32)
