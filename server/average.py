"""The weighted average of the sites' weights, taken as they arrive, with no site above the operator's share.

Memory does not grow with the number of sites: a running sum, and besides it only the few largest sites, which the
cap may hold back. The result does not depend, to the last bit, on who answered first.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.errors import ProtocolError
from shared.weights import Vector

LARGEST_WEIGHT = 65536.0
"""A single weight beyond this is no model's: it is refused, so that the sum below cannot overflow."""
_RANGE_BITS = 16
_ACCUMULATOR_BITS = 62
_MOST_PATIENTS_BITS = 40


def capped_shares(declared: Sequence[int], max_share: float) -> list[float]:
    """Return each site's share of the average: proportional to its patients, none above ``max_share``.

    What the cap takes from a large site goes to the others in proportion to their patients, which may lift the next
    one to the cap, and so on. Where n sites cannot keep to the cap because n · max_share < 1, all get 1/n, the
    smallest largest share there is.

    Args:
        declared: Patients of each site, positive.
        max_share: In (0, 1].
    """
    count = len(declared)
    if count * max_share <= 1.0:
        return [1.0 / count] * count
    order = sorted(range(count), key=lambda index: declared[index], reverse=True)
    capped = _sites_at_cap([declared[index] for index in order], max_share)
    a_patient = (1.0 - capped * max_share) / sum(declared[index] for index in order[capped:])
    shares = [a_patient * patients for patients in declared]
    for index in order[:capped]:
        shares[index] = max_share
    return shares


def _sites_at_cap(descending: Sequence[int], max_share: float) -> int:
    """Return how many of the sites, the largest first, are held back to ``max_share``."""
    patients = sum(descending)
    for capped, own in enumerate(descending):
        if own * (1.0 - capped * max_share) <= max_share * patients:
            return capped
        patients -= own
    return len(descending)


class ExactSum:
    """Σ d · x over float32 vectors x and whole numbers d, free of rounding that depends on the order.

    Each weight is split into two whole numbers, a high and a low limb of a fixed-point number, and these are summed
    in 64 bits. Sums of integers do not depend on their order. With D the bound on Σ d, b its bits and |x| < 2^16,
    the high limb counts units of 2^(b-46) and the low one units of 2^(2b-108); both sums stay below 2^62. For
    D < 2^20 (a million patients) the grid is 2^-68: every float32 of at least 2^-44 lies on it, the sum is exact,
    and one that is smaller is moved by 10^-21 at most.

    Args:
        size: Weights in a vector.
        most_patients: D, the same whoever answers.
    """

    def __init__(self, size: int, most_patients: int) -> None:
        bits = most_patients.bit_length()
        if bits > _MOST_PATIENTS_BITS:
            raise ProtocolError("The sites declare more patients than there are people.")
        self._high_bits = _ACCUMULATOR_BITS - _RANGE_BITS - bits
        self._low_bits = _ACCUMULATOR_BITS - bits
        self._high = np.zeros(size, np.int64)
        self._low = np.zeros(size, np.int64)
        self.patients = 0

    def add(self, weights: Vector, patients: int) -> None:
        """Add ``patients`` times ``weights``, whose values are below ``LARGEST_WEIGHT``."""
        scaled = np.ldexp(weights.astype(np.float64), self._high_bits)
        high = np.rint(scaled)
        scaled -= high  # exact: both lie on the grid of the float32
        self._high += high.astype(np.int64) * patients
        self._low += np.rint(np.ldexp(scaled, self._low_bits)).astype(np.int64) * patients
        self.patients += patients

    def value(self) -> npt.NDArray[np.float64]:
        """Return the sum, rounded to float64."""
        refined = self._high.astype(np.float64) + np.ldexp(self._low.astype(np.float64), -self._low_bits)
        return np.asarray(np.ldexp(refined, -self._high_bits))


class StreamingAverage:
    """The average by declared patients with capped shares, taken as replies arrive.

    Shares depend on who answers, which is known only at the end. At most ⌊1 / max_share⌋ sites can be at the cap,
    and they are the largest; so only that many are kept as they are, the rest goes into the sum at once.

    Args:
        size: Weights in a vector.
        most_patients: Σ of the declared patients of all sites that are asked.
        max_share: In (0, 1]; see :func:`capped_shares`.
    """

    def __init__(self, size: int, most_patients: int, max_share: float) -> None:
        self._sum = ExactSum(size, most_patients)
        self._max_share = max_share
        self._most_kept = math.ceil(1.0 / max_share)
        self._kept: list[tuple[int, str, Vector]] = []
        self._summed: list[int] = []

    def add(self, site: str, patients: int, weights: Vector) -> None:
        """Take one site's weights; a site's name, which is unique, decides among equals."""
        heapq.heappush(self._kept, (patients, site, weights))
        if len(self._kept) > self._most_kept:
            patients, _, weights = heapq.heappop(self._kept)
            self._sum.add(weights, patients)
            self._summed.append(patients)

    def result(self) -> Vector:
        """Return the average ``(D,)``; nothing may be added afterwards.

        Raises:
            ProtocolError: If nothing was added.
        """
        kept = sorted(self._kept, key=lambda item: item[:2], reverse=True)
        if not kept:
            raise ProtocolError("There is nothing to average.")
        declared = [patients for patients, _, _ in kept] + sorted(self._summed, reverse=True)
        if len(declared) * self._max_share <= 1.0:
            return _mean([weights for _, _, weights in kept], 1.0 / len(kept)).astype(np.float32)
        capped = _sites_at_cap(declared, self._max_share)
        for patients, _, weights in kept[capped:]:
            self._sum.add(weights, patients)
        rest = self._sum.value() * ((1.0 - capped * self._max_share) / self._sum.patients)
        if not capped:
            return rest.astype(np.float32)
        return (_mean([weights for _, _, weights in kept[:capped]], self._max_share) + rest).astype(np.float32)


def _mean(vectors: Sequence[Vector], share: float) -> npt.NDArray[np.float64]:
    total = np.zeros(len(vectors[0]), np.float64)
    for vector in vectors:
        total += share * vector.astype(np.float64)
    return total
