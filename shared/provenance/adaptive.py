"""The epsilon of runs whose plans may depend on one another's results.

A run that starts from another's model is planned by people who have seen that model. Composition of privacy loss
distributions holds for mechanisms that are fixed beforehand; Rényi divergences add up for mechanisms that are chosen
one after another too (Mironov, "Rényi Differential Privacy", 2017, Proposition 1). Where even the noise of the later
run is chosen from the earlier result, the sum is that of a Rényi filter with this budget (Feldman, Zrnic, "Individual
Privacy Accounting via a Rényi Filter", 2021): a hospital's cap is such a budget, fixed beforehand.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant

from shared.accounting import Mechanism
from shared.errors import PlanError

_ORDERS: Final = (*range(2, 65), 80, 96, 128, 192, 256, 512)
"""Whole orders, whose formula is a finite sum. Any set of orders gives a valid bound."""


def adaptive_epsilon_of(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """Return the epsilon at ``delta`` of ``mechanisms`` that may each depend on the results of those before.

    Neighbouring data sets differ by one patient with all records, who is in every mechanism.

    Raises:
        PlanError: If ``delta`` is not in (0, 1).
    """
    if not 0.0 < delta < 1.0:
        raise PlanError(f"delta must lie strictly between 0 and 1, not {delta}.")
    return _epsilon(tuple(sorted(mechanisms)), delta)


@lru_cache(maxsize=4096)
def _epsilon(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    if not mechanisms:
        return 0.0
    if any(mechanism.noise_multiplier == 0.0 for mechanism in mechanisms):
        return math.inf
    accountant = RdpAccountant(_ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE)
    for mechanism in mechanisms:
        step = PoissonSampledDpEvent(mechanism.sample_rate, GaussianDpEvent(mechanism.noise_multiplier))
        accountant.compose(step, mechanism.steps)
    return float(accountant.get_epsilon(delta))
