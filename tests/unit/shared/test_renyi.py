"""Rényi accounting: an independent integral, a paid room for samples, and why several orders are no filter."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from shared.accounting import OVERFLOW_PROBABILITY, Mechanism, epsilon_of
from shared.errors import PlanError
from shared.renyi import ORDERS, adaptive_epsilon_of, best_order, renyi_epsilon

DELTA = 1e-3
SMALL, FULL = Mechanism(0.3, 4.0, 60), Mechanism(0.3, 2.36, 240)


def divergence(rate: float, noise: float, order: int) -> float:
    """Rényi divergence of one step by plain quadrature (Mironov, Talwar, Zhang 2019, Theorem 5)."""

    def integrand(x: float) -> float:
        ratio = 1.0 - rate + rate * math.exp((2.0 * x - 1.0) / (2.0 * noise**2))
        return float(norm.pdf(x, scale=noise) * ratio**order)

    reach = order + 12.0 * noise
    parts = [quad(integrand, a, b, epsabs=0, epsrel=1e-11, limit=400)[0] for a, b in ((-reach, 0), (0, reach))]
    return math.log(sum(parts)) / (order - 1.0)


def converted(rho: float, order: int, delta: float) -> float:
    """Proposition 12 of Canonne, Kamath and Steinke, with 1/128 of delta set aside."""
    return rho + math.log1p(-1 / order) - math.log(delta * 127 / 128 * order) / (order - 1)


@settings(max_examples=25)
@given(
    rate=st.floats(0.01, 1.0),
    noise=st.floats(0.6, 8.0),
    steps=st.integers(1, 1000),
    order=st.sampled_from([2, 3, 6, 9]),
)
def test_the_filter_agrees_with_an_integral_and_is_never_below_it(
    rate: float, noise: float, steps: int, order: int
) -> None:
    exact = max(0.0, converted(steps * divergence(rate, noise, order), order, DELTA))
    found = renyi_epsilon([Mechanism(rate, noise, steps)], DELTA, order)
    assert exact - 1e-9 <= found <= exact * (1.0 + 1e-6) + 1e-6


@pytest.mark.parametrize(
    ("plan", "delta"),
    [(Mechanism(0.3, 2.5, 240), 2.6e-4), (Mechanism(0.1, 1.0, 200), 1e-5), (Mechanism(0.01, 1.0, 10_000), 1e-5)],
)
def test_the_filter_is_about_a_tenth_above_the_tight_epsilon(plan: Mechanism, delta: float) -> None:
    tight = epsilon_of([plan], delta)
    order = best_order(plan, tight * 1.1, delta)
    assert 1.05 * tight < renyi_epsilon([plan], delta, order) < 1.13 * tight


def test_the_room_for_a_sample_is_paid_from_delta() -> None:
    mechanism = Mechanism(0.1, 1.0, 1000)
    charge = mechanism.steps * OVERFLOW_PROBABILITY
    assert epsilon_of([mechanism], charge) == math.inf
    assert epsilon_of([mechanism], 1e-6 + charge) == pytest.approx(
        epsilon_of([Mechanism(0.1, 1.0, 1000)], 1e-6), rel=1e-4
    )
    assert epsilon_of([mechanism], 2 * charge) < math.inf
    assert renyi_epsilon([mechanism], 127 * charge, 4) == math.inf
    assert renyi_epsilon([mechanism], 129 * charge, 4) < math.inf


@pytest.mark.parametrize("order", [0, 1, 1.5, ORDERS[-1] + 1])
def test_an_order_out_of_range_is_refused(order: int) -> None:
    with pytest.raises(PlanError, match="order"):
        renyi_epsilon([SMALL], DELTA, order)


def test_epsilon_of_runs_that_follow_from_one_another() -> None:
    assert adaptive_epsilon_of([], DELTA) == 0.0
    one, both = adaptive_epsilon_of([SMALL], DELTA), adaptive_epsilon_of([SMALL, FULL], DELTA)
    assert epsilon_of([SMALL], DELTA) < one < both
    assert adaptive_epsilon_of([SMALL, replace(SMALL, noise_multiplier=0.0)], DELTA) == math.inf


def test_the_best_of_several_orders_is_no_filter() -> None:
    """Two mechanisms, each admissible at its own order; a server that chooses after the first output gets 1.8 delta.

    First output: loss 2 with probability p under the patient, else about 0. Then either A, a sure loss, or B, a large
    loss with small probability. Outcomes are exact, nothing is sampled.
    """
    epsilon, delta, low, high = 10.0, 1e-3, 2.0, 8.0

    def tight(order: float) -> float:
        return (1 / (order - 1)) * (1 - 1 / order) ** order

    def bound(order: float, losses: list[tuple[float, float]]) -> float:
        """Delta that the sum of divergences of this order gives: a product of moments."""
        moment = sum(p * math.exp((order - 1) * loss) for p, loss in losses)
        return tight(order) * math.exp(-(order - 1) * epsilon) * moment

    p, s, first = 7.9 * delta, 1.85 * delta, 2.0
    a, b = epsilon + math.log(8 / 7) - first, epsilon + math.log(2)
    opening = [(p, first), (1 - p, math.log((1 - p) / (1 - p * math.exp(-first))))]
    kind_a = [(1.0, a)]
    kind_b = [(s, b), (1 - s, math.log((1 - s) / (1 - s * math.exp(-b))))]

    def both(second: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(p1 * p2, l1 + l2) for p1, l1 in opening for p2, l2 in second]

    assert bound(high, both(kind_a)) <= delta, "the order 8 has room for A"
    assert bound(low, both(kind_b)) <= delta, "the order 2 has room for B"
    chosen = [kind_a, kind_b]  # after the first output and after the second
    reached = sum(
        p1 * p2 * max(0.0, -math.expm1(epsilon - l1 - l2))
        for (p1, l1), second in zip(opening, chosen, strict=True)
        for p2, l2 in second
    )
    assert reached > 1.8 * delta
    assert np.isclose(sum(q for q, _ in opening), 1.0)


def test_nothing_costs_nothing_at_any_order() -> None:
    assert [renyi_epsilon([], DELTA, order) for order in (ORDERS[0], ORDERS[-1])] == [0.0, 0.0]


def test_an_order_is_refused_with_the_range_of_those_that_are_not() -> None:
    with pytest.raises(PlanError, match=r"^A Rényi order must lie between 2 and 256, not 257\.$"):
        renyi_epsilon([SMALL], DELTA, 257)


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_no_other_order_admits_a_step_more_than_the_best(epsilon: float) -> None:
    best, steps = best_order(SMALL, epsilon, 1e-3), 1
    while renyi_epsilon([replace(SMALL, steps=steps + 1)], 1e-3, best) <= epsilon:
        steps += 1
    assert steps > 1
    assert all(renyi_epsilon([replace(SMALL, steps=steps + 1)], 1e-3, order) > epsilon for order in ORDERS)
