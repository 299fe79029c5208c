"""Which hospital holds which patients: pure functions from counts and labels to index sets.

Every function returns one tuple of patient indices for each hospital, gives every hospital at least one
patient, and depends on nothing but its arguments and the generator's state.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.errors import PlanError

VENDOR_SCANS: Final = {"GE": 670, "Siemens": 205, "Philips": 74, "Toshiba": 69}
"""LIDC-IDRI's 1,018 scans by manufacturer (Armato et al., 2011): how unequal real contributors are."""
_ATTEMPTS: Final = 100
Partition = tuple[tuple[int, ...], ...]


def by_vendor_shares(patients: int, sites: int, rng: np.random.Generator) -> Partition:
    """Deal patients out at random, in amounts proportional to LIDC-IDRI's vendors.

    Hospital k has the share of vendor k; with more than four hospitals the vendors' shares repeat.

    Raises:
        PlanError: If there are fewer patients than hospitals, or no hospital.
    """
    _require_enough(patients, sites)
    shares = np.resize(np.array(list(VENDOR_SCANS.values()), np.float64), sites)
    # One patient each first, so that a small hospital among many is never empty; then largest remainders.
    exact = shares / shares.sum() * (patients - sites)
    sizes = 1 + np.floor(exact).astype(int)
    sizes[np.argsort(-(exact % 1), kind="stable")[: patients - sizes.sum()]] += 1
    return _cut(rng.permutation(patients), sizes)


def by_dirichlet(malignant: Sequence[bool], sites: int, alpha: float, rng: np.random.Generator) -> Partition:
    """Deal each class out in proportions drawn from a symmetric Dirichlet distribution.

    A small ``alpha`` skews both the hospitals' sizes and their share of malignant patients (Hsu et al.,
    "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019,
    where only the classes are skewed); a large one makes all hospitals alike.

    Args:
        malignant: One label a patient.
        sites: Number of hospitals.
        alpha: Concentration, above 0.
        rng: Consumed.

    Raises:
        PlanError: If ``alpha`` is not positive, or no draw leaves a patient to every hospital.
    """
    _require_enough(len(malignant), sites)
    if not (alpha > 0 and np.isfinite(alpha)):
        raise PlanError(f"The Dirichlet concentration must be a positive number, not {alpha}.")
    labels = np.asarray(malignant, bool)
    for _ in range(_ATTEMPTS):
        classes = [rng.permutation(np.flatnonzero(labels == label)) for label in (False, True)]
        parts = [_cut_by_weights(members, rng.dirichlet(np.full(sites, alpha))) for members in classes]
        partition = tuple(benign + bad for benign, bad in zip(*parts, strict=True))
        if all(partition):
            return partition
    raise PlanError(
        f"A Dirichlet concentration of {alpha} leaves one of {sites} hospitals without a patient "
        f"in each of {_ATTEMPTS} draws. Choose a larger concentration or fewer hospitals."
    )


def evenly(patients: int, sites: int, each: int, rng: np.random.Generator) -> Partition:
    """Give every hospital exactly ``each`` patients; none is used again before all have been used.

    Raises:
        PlanError: If any of the numbers is below one.
    """
    if min(patients, sites, each) < 1:
        raise PlanError(f"Cannot give {each} of {patients} patients to each of {sites} hospitals.")
    rounds = -(-sites * each // patients)
    order = np.concatenate([rng.permutation(patients) for _ in range(rounds)])
    return _cut(order[: sites * each], np.full(sites, each))


def resized(partition: Partition, each: int) -> Partition:
    """Cut or repeat every hospital's own patients to exactly ``each``.

    Raises:
        PlanError: If ``each`` is below one.
    """
    if each < 1:
        raise PlanError(f"A hospital needs at least one patient, not {each}.")
    return tuple(tuple(int(p) for p in np.resize(np.array(held), each)) for held in partition)


def _require_enough(patients: int, sites: int) -> None:
    if sites < 1:
        raise PlanError(f"A federation needs at least one hospital, not {sites}.")
    if patients < sites:
        raise PlanError(f"{patients} patients cannot be split over {sites} hospitals: each needs at least one.")


def _cut(order: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Partition:
    return tuple(tuple(int(p) for p in part) for part in np.split(order, np.cumsum(sizes)[:-1]))


def _cut_by_weights(order: npt.NDArray[np.int64], weights: npt.NDArray[np.float64]) -> Partition:
    ends = np.rint(np.cumsum(weights) * len(order)).astype(int)
    return _cut(order, np.diff(ends, prepend=0))
