"""How far generated images are from real ones. Pure functions over NumPy arrays.

Features ``(N, F)`` come from a classifier of the project's own; which one is the caller's to say.

References:
    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017.
    Bińkowski et al., "Demystifying MMD GANs", ICLR 2018: the kernel distance, unbiased for small samples.
    Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019.
    Meehan, Chaudhuri, Dasgupta, "A Non-Parametric Test to Detect Data-Copying in Generative Models", 2020.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance

Features = npt.NDArray[np.floating[Any]]
Images = npt.NDArray[np.floating[Any]]


def frechet_distance(real: Features, generated: Features) -> float:
    """Return the squared Fréchet distance of the normal distributions fitted to two sets of features ``(N, F)``.

    The trace of √(AB) is the sum of the roots of AB's eigenvalues, which are real and not negative, since AB has
    those of A^½ B A^½; this stands when A or B is singular, where a matrix root may fail.
    """
    first, second = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    roots = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0.0)).sum()
    shift = np.square(real.mean(0) - generated.mean(0)).sum()
    return float(shift + np.trace(first) + np.trace(second) - 2.0 * roots)


def kernel_distance(real: Features, generated: Features) -> float:
    """Return the unbiased squared maximum mean discrepancy under the kernel (x·y / F + 1)³; it may fall below 0."""

    def kernel(one: Features, other: Features) -> Features:
        values: Features = (one @ other.T / one.shape[1] + 1.0) ** 3
        return values

    within = [_off_diagonal_mean(kernel(part, part)) for part in (real, generated)]
    return float(sum(within) - 2.0 * kernel(real, generated).mean())


def precision_and_recall(real: Features, generated: Features, neighbours: int = 3) -> tuple[float, float]:
    """Return the share of generated features within the real manifold, and of real ones within the generated.

    A set's manifold is the union of balls about its members, each reaching to the member's ``neighbours``-th
    nearest other one.
    """
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def histogram_distance(real: Images, generated: Images) -> float:
    """Return the Wasserstein-1 distance of the pixels' intensities, in the units of the intensity."""
    points = np.linspace(0.0, 1.0, 513)
    return float(wasserstein_distance(np.quantile(real, points), np.quantile(generated, points)))


def radial_spectrum(images: Images) -> npt.NDArray[np.float64]:
    """Return the mean power by whole radial frequency 1, 2, … side / 2 of square images ``(N, side, side)``."""
    side = images.shape[-1]
    centred = images - images.mean((1, 2), keepdims=True)
    power = np.square(np.abs(np.fft.fft2(centred))).mean(0)
    frequency = np.fft.fftfreq(side, 1.0 / side)
    radius = np.rint(np.hypot(frequency[:, None], frequency[None, :])).astype(int).ravel()
    sums, counts = np.bincount(radius, power.ravel()), np.bincount(radius)
    spectrum: npt.NDArray[np.float64] = (sums / counts)[1 : side // 2 + 1]
    return spectrum


def spectrum_distance(real: Images, generated: Images) -> float:
    """Return the mean distance of the log10 radial spectra: 1 is a factor of ten at every frequency."""
    tiny = np.finfo(float).tiny
    logs = [np.log10(np.maximum(radial_spectrum(images), tiny)) for images in (real, generated)]
    return float(np.abs(logs[0] - logs[1]).mean())


def diversity(real: Images, generated: Images) -> float:
    """Return the mean distance between two generated images over that between two real ones: 0 is one image only."""
    spread = [_off_diagonal_mean(cdist(part, part)) for part in (_flat(real), _flat(generated))]
    return spread[1] / spread[0] if spread[0] else 0.0


def neighbour_ratio(generated: Features, training: Features, heldout: Features) -> float:
    """Return the median distance of generated items to the nearest training item over that to the nearest held-out.

    Below 1 the generator is nearer to what it was trained on: a sign of copying. The larger of the two sets is to be
    cut to the size of the other by the caller, since more items are nearer by chance.
    """
    return float(np.median(nearest(generated, training)) / max(np.median(nearest(generated, heldout)), 1e-12))


def nearest(items: Features, among: Features) -> npt.NDArray[np.float64]:
    """Return the Euclidean distance ``(N,)`` of each item to its nearest ``among`` others."""
    distances: npt.NDArray[np.float64] = cdist(_flat(items), _flat(among)).min(1)
    return distances


def _covered(items: Features, manifold: Features, neighbours: int) -> float:
    within = cdist(manifold, manifold)
    radii = np.partition(within, neighbours, axis=1)[:, neighbours]  # position 0 is the member itself
    return float((cdist(items, manifold) <= radii).any(1).mean())


def _off_diagonal_mean(matrix: Features) -> float:
    count = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))


def _flat(items: Features) -> Features:
    return items.reshape(len(items), -1)
