"""Rényi accounting: the epsilon of releases that may each be chosen after seeing the ones before.

Neighbouring data sets differ by one patient with all records, who may be in every release. Composition of privacy loss
distributions (:mod:`shared.accounting`) holds for mechanisms that are fixed beforehand. A server that sees a reply
before it chooses the next plan is not bound by it. A *Rényi filter* of one order α bounds such a server:

    Feldman, Zrnic, "Individual Privacy Accounting via a Rényi Filter", NeurIPS 2021, Theorem 4.5: if every release is
    admitted only while the sum of all Rényi divergences of order α, its own included, stays within a budget fixed
    beforehand, then everything released is Rényi private with that budget, however the releases were chosen.

Why: let L be the privacy loss of all that was released and R the sum of its mechanisms' divergences. Whatever was
chosen when, exp((α - 1)(L - R)) is a supermartingale that starts at 1. Pointwise, (1 - e^(ε - L))⁺ is at most
c·exp((α - 1)(L - ε)), c = (1 - 1/α)^α / (α - 1) (Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential
Privacy", 2020, Proposition 12). So where R never exceeds the B with c·exp((α - 1)(B - ε)) = δ, (ε, δ) holds.

The order is one number, fixed before the first release. A filter that took the best order afterwards could be played:
which order that is depends on outcomes, and the orders' deltas add up. ``test_the_best_of_several_orders_is_no_filter``
is an exact example of nearly 2δ.

A step's sample may fill the room for it (:mod:`shared.dp.passes`, :mod:`shared.accounting`). A fixed share of delta is
set aside for that, since how many steps there are may depend on outcomes too.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from shared.accounting import OVERFLOW_PROBABILITY, Mechanism, check_delta
from shared.errors import PlanError

ORDERS: Final = range(2, 257)
"""The orders that a filter may have. At whole orders the formula is a finite sum (Mironov, Talwar, Zhang, "Rényi
Differential Privacy of the Sampled Gaussian Mechanism", 2019, section 3.3)."""
_SET_ASIDE: Final = 2.0**-7
"""Of delta. It pays for 86,000 steps at delta 1e-5, and for 859,000 at 1e-4."""
_RELATIVE, _ABSOLUTE = 1e-9, 1e-12
"""Added to a step's divergence for the rounding of the library's sums."""


def renyi_epsilon(mechanisms: Iterable[Mechanism], delta: float, order: int) -> float:
    """Return the epsilon at ``delta`` of adaptively chosen ``mechanisms`` under a filter of one order.

    Args:
        mechanisms: Everything released, in any order.
        delta: Fixed beforehand, in (0, 1).
        order: α, one of ``ORDERS``, fixed beforehand.

    Returns:
        Zero for nothing, infinity if a mechanism adds no noise.

    Raises:
        PlanError: If ``delta`` or ``order`` is out of range.
    """
    check_delta(delta)
    if order not in ORDERS:
        raise PlanError(f"A Rényi order must lie between {ORDERS[0]} and {ORDERS[-1]}, not {order}.")
    released = tuple(mechanisms)
    if not released:
        return 0.0
    steps = sum(mechanism.steps for mechanism in released)
    total = math.fsum(mechanism.steps * _divergence(mechanism, order) for mechanism in released)
    if steps * OVERFLOW_PROBABILITY > _SET_ASIDE * delta or not math.isfinite(total):
        return math.inf
    return max(0.0, total + _conversion(order, delta))


@lru_cache(maxsize=256)
def best_order(mechanism: Mechanism, epsilon: float, delta: float) -> int:
    """Return the order under which a filter of (``epsilon``, ``delta``) admits most steps of ``mechanism``.

    Every argument is public and known before anything is released. ``epsilon`` may be infinite: then the order is the
    one that states the least epsilon for the mechanism itself.

    Raises:
        PlanError: If ``delta`` is out of range.
    """
    if not math.isfinite(epsilon):
        return min(ORDERS, key=lambda order: renyi_epsilon([mechanism], delta, order))
    return max(ORDERS, key=lambda order: _budget(order, epsilon, delta) / _divergence(mechanism, order))


def adaptive_epsilon_of(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return the epsilon at ``delta`` of ``mechanisms``, each of which may depend on the results of those before.

    The order is the best one for the first mechanism alone, which depends on no result.

    Raises:
        PlanError: If ``delta`` is out of range.
    """
    check_delta(delta)
    if not mechanisms:
        return 0.0
    return renyi_epsilon(mechanisms, delta, best_order(mechanisms[0], math.inf, delta))


def _budget(order: int, epsilon: float, delta: float) -> float:
    """Return the largest divergence of an order that is (``epsilon``, ``delta``): the conversion, turned round."""
    return max(0.0, epsilon - _conversion(order, delta))


def _conversion(order: int, delta: float) -> float:
    """Return by how much epsilon at ``delta`` exceeds the divergence of ``order``."""
    left = delta * (1.0 - _SET_ASIDE)
    return math.log1p(-1.0 / order) - math.log(left * order) / (order - 1.0)


def _divergence(mechanism: Mechanism, order: int) -> float:
    """Return the Rényi divergence of one step; infinite without noise."""
    return _divergences(mechanism.sample_rate, mechanism.noise_multiplier)[order - ORDERS[0]]


@lru_cache(maxsize=256)
def _divergences(sample_rate: float, noise_multiplier: float) -> tuple[float, ...]:
    """Return the Rényi divergences of one step at all ``ORDERS``."""
    if noise_multiplier == 0.0:
        return (math.inf,) * len(ORDERS)
    # Here, since they take a second that reading a ledger without releases does not need.
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(list(ORDERS), NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier)))
    return tuple(max(0.0, float(rho)) * (1.0 + _RELATIVE) + _ABSOLUTE for rho in accountant.rdp)
