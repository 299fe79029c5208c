"""The cap holds against a server that chooses each plan after seeing the last reply."""

import math
from dataclasses import replace

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from client.budget import Admission, Cap, Proposal, Rule, Spending, admit
from shared.accounting import Mechanism, epsilon_of
from shared.errors import BudgetExceeded
from shared.renyi import best_order, renyi_epsilon

DELTA = 1e-3
CAP = Cap(8.0, DELTA)
FULL = Mechanism(0.3, 2.36, 240)
"""Its tight epsilon at ``DELTA`` is just below 8 when asked for 8 by hand; a filter states more."""
SMALL = Mechanism(0.3, 4.0, 60)
ROUND = Mechanism(0.3, 4.0, 6)


def whole(run: str, planned: Mechanism, delta: float = DELTA) -> Proposal:
    return Proposal(run, planned, delta)


def one_round(run: str, planned: Mechanism, steps: int, delta: float = DELTA) -> Proposal:
    return Proposal(run, planned, delta, replace(planned, steps=steps))


def released(spending: Spending, proposal: Proposal, cap: Cap = CAP) -> Spending:
    return spending.after(proposal.run, proposal.release or proposal.planned, admit(spending, proposal, cap))


def oracle(mechanisms: list[Mechanism], delta: float, order: int) -> float:
    """The filter's epsilon by dp_accounting's own accountant, all at once, with 1/128 of delta set aside."""
    accountant = RdpAccountant([order], NeighboringRelation.ADD_OR_REMOVE_ONE)
    for mechanism in mechanisms:
        step = PoissonSampledDpEvent(mechanism.sample_rate, GaussianDpEvent(mechanism.noise_multiplier))
        accountant.compose(step, mechanism.steps)
    return float(accountant.get_epsilon(delta * 127 / 128))


def test_a_plan_of_the_very_cap_is_admitted_as_a_hospitals_first() -> None:
    assert 7.5 < epsilon_of([FULL], DELTA) <= 8.0 < oracle([FULL], DELTA, best_order(FULL, 8.0, DELTA))
    assert admit(Spending(), whole("first", FULL), CAP).rule is Rule.PLD
    spending = Spending()
    for _ in range(40):
        spending = released(spending, one_round("first", FULL, 6))
    assert spending.epsilon(CAP) == epsilon_of([FULL], DELTA)
    with pytest.raises(BudgetExceeded):
        admit(spending, one_round("first", FULL, 6), CAP)


@pytest.mark.parametrize("rounds", [1, 20, 40])
def test_after_a_run_admitted_by_pld_alone_there_is_no_other_even_if_it_ends_early(rounds: int) -> None:
    """Else a server stops the first run where its loss is small and goes on: both rules' deltas would add up."""
    spending = Spending()
    for _ in range(rounds):
        spending = released(spending, one_round("first", FULL, 6))
    for proposal in (one_round("second", SMALL, 1), whole("second", SMALL), one_round("second", FULL, 6)):
        with pytest.raises(BudgetExceeded, match="first run was admitted whole"):
            admit(spending, proposal, CAP)


def test_a_raised_cap_counts_all_of_a_run_admitted_by_pld() -> None:
    spending = released(Spending(), one_round("first", FULL, 6))
    order = spending.admissions[0].order
    room = oracle([FULL, SMALL], DELTA, order)
    assert admit(spending, whole("second", SMALL), Cap(room + 1e-6, DELTA)).rule is Rule.FILTER
    with pytest.raises(BudgetExceeded):
        admit(spending, whole("second", SMALL), Cap(room - 1e-3, DELTA))
    assert released(spending, whole("second", SMALL), Cap(room + 1e-6, DELTA)).epsilon(CAP) == pytest.approx(room)


def test_a_lowered_cap_ends_a_run_admitted_by_pld() -> None:
    spending = released(Spending(), one_round("first", FULL, 6))
    with pytest.raises(BudgetExceeded):
        admit(spending, one_round("first", FULL, 6), Cap(7.0, DELTA))


def test_under_the_filter_rounds_that_are_not_run_are_not_spent() -> None:
    spending = released(Spending(), one_round("first", SMALL, 6))
    assert spending.admissions[0].rule is Rule.FILTER
    assert spending.epsilon(CAP) == pytest.approx(oracle([ROUND], DELTA, spending.admissions[0].order), abs=1e-6)
    assert spending.epsilon(CAP) < oracle([SMALL], DELTA, spending.admissions[0].order)


def test_a_query_counts_the_whole_plan_once_though_it_began() -> None:
    spending = released(Spending(), one_round("first", SMALL, 6))
    tight = Cap(oracle([SMALL], DELTA, spending.admissions[0].order) + 1e-6, DELTA)
    assert admit(spending, whole("first", SMALL), tight).rule is Rule.FILTER
    with pytest.raises(BudgetExceeded):
        admit(spending, whole("second", SMALL), tight)


def test_a_changed_plan_under_a_name_that_pld_admitted_is_refused() -> None:
    spending = released(Spending(), one_round("first", FULL, 6))
    with pytest.raises(BudgetExceeded):
        admit(spending, one_round("first", replace(FULL, sample_rate=0.1), 6), CAP)


def test_the_order_is_fixed_with_the_first_release() -> None:
    """A filter that took the best order afterwards would let each outcome use all of delta under its own."""
    low, high = Cap(2.0, DELTA), Cap(12.0, DELTA)
    spending = released(Spending(), one_round("first", SMALL, 6), low)
    assert best_order(SMALL, low.epsilon, DELTA) == spending.admissions[0].order != best_order(SMALL, 12.0, DELTA)
    assert admit(spending, one_round("second", SMALL, 6), high).order == spending.admissions[0].order


def test_a_ledger_from_before_admissions_counts_what_it_holds() -> None:
    old = Spending((("first", ROUND), ("first", ROUND), ("second", ROUND)))
    order = best_order(ROUND, 8.0, DELTA)
    assert old.epsilon(CAP) == pytest.approx(oracle([ROUND] * 3, DELTA, order), abs=1e-6)
    assert admit(old, whole("third", SMALL), CAP).rule is Rule.FILTER
    with pytest.raises(BudgetExceeded):
        admit(old, whole("third", FULL), CAP)


def test_a_run_that_began_before_admissions_is_the_filters() -> None:
    """Admitted by PLD now, its earlier outcomes would have chosen between its end and another run."""
    old = Spending((("first", replace(FULL, steps=6)),) * 3)
    assert admit(old, one_round("first", FULL, 6), CAP).rule is Rule.FILTER
    with pytest.raises(BudgetExceeded):
        admit(old, whole("first", FULL), CAP)


def test_without_noise_only_a_hospital_without_a_cap_takes_part() -> None:
    plain = Mechanism(0.5, 0.0, 10)
    assert admit(Spending(), whole("first", plain), Cap(math.inf, DELTA)).rule is Rule.FILTER
    with pytest.raises(BudgetExceeded):
        admit(Spending(), whole("first", plain), CAP)
    assert released(Spending(), whole("first", plain), Cap(math.inf, DELTA)).epsilon(CAP) == math.inf


PLANS = st.builds(
    Mechanism, st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from([1.0, 2.36, 6.0]), st.sampled_from([2, 40, 240])
)


@given(
    plans=st.lists(PLANS, min_size=1, max_size=4),
    asked=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60)), min_size=1, max_size=30),
    cap=st.sampled_from([1.0, 4.0, 8.0, 12.0]),
)
@settings(max_examples=150)
def test_whatever_a_server_asks_for_the_cap_holds(
    plans: list[Mechanism], asked: list[tuple[int, int]], cap: float
) -> None:
    """Whichever runs it interleaves and wherever it stops them: one of the two arguments covers all of it."""
    limit, spending = Cap(cap, DELTA), Spending()
    for number, steps in asked:
        planned = plans[number % len(plans)]
        proposal = one_round(f"run-{number}", planned, min(steps, planned.steps))
        try:
            spending = released(spending, proposal, limit)
        except BudgetExceeded:
            continue
    if not spending.releases:
        return
    first = spending.admissions[0]
    all_of_it = [mechanism for _, mechanism in spending.releases]
    if first.rule is Rule.PLD:
        assert {run for run, _ in spending.releases} == {first.run}
        assert sum(mechanism.steps for mechanism in all_of_it) <= first.planned.steps
        assert epsilon_of([first.planned], DELTA) <= cap + 1e-6
    else:
        assert all(admission == replace(admission, order=first.order) for admission in spending.admissions)
        assert oracle(all_of_it, DELTA, first.order) <= cap + 1e-6
    assert spending.epsilon(limit) <= cap + 1e-6


def test_an_admission_is_remembered_once() -> None:
    spending = released(Spending(), one_round("first", SMALL, 6))
    again = spending.after("first", ROUND, Admission("first", Rule.FILTER, SMALL, 9))
    assert again.admissions == spending.admissions
    assert len(again.releases) == 2


def test_what_is_spent_is_stated_at_the_order_that_the_first_release_fixed() -> None:
    """Under a cap that was raised since, another order would be best for what was released."""
    low, high = Cap(2.0, DELTA), Cap(12.0, DELTA)
    spending = released(Spending(), one_round("first", SMALL, 6), low)
    fixed, other = spending.admissions[0].order, best_order(ROUND, high.epsilon, DELTA)
    assert fixed != other
    assert spending.epsilon(high) == pytest.approx(oracle([ROUND], DELTA, fixed), abs=1e-6)
    assert oracle([ROUND], DELTA, fixed) != pytest.approx(oracle([ROUND], DELTA, other), abs=1e-3)


def test_a_refusal_says_what_would_be_reached_what_is_permitted_and_what_is_spent() -> None:
    spending = released(Spending(), one_round("first", SMALL, 6))
    order = spending.admissions[0].order
    with pytest.raises(BudgetExceeded) as refused:
        admit(spending, whole("second", FULL), CAP)
    assert str(refused.value) == (
        f"Epsilon would reach {oracle([ROUND, FULL], DELTA, order):.3f} at delta 0.001; site.toml permits 8, of which "
        f"{oracle([ROUND], DELTA, order):.3f} is spent. Fewer rounds, more noise or a larger max-epsilon "
        "would be needed."
    )
    spending = released(Spending(), one_round("first", FULL, 6))
    with pytest.raises(BudgetExceeded) as refused:
        admit(spending, one_round("second", SMALL, 1), CAP)
    assert str(refused.value).endswith(
        f"of which {epsilon_of([FULL], DELTA):.3f} is spent. The first run was admitted whole, as a plan fixed "
        "beforehand, and leaves no room for another. Fewer rounds, more noise or a larger max-epsilon would be needed."
    )


def test_an_empty_ledger_has_spent_nothing_and_an_old_one_goes_by_its_first_release() -> None:
    assert Spending().epsilon(CAP) == 0.0
    cap, both = Cap(1.0, DELTA), [ROUND, Mechanism(0.05, 1.0, 6)]
    order, other = (best_order(mechanism, cap.epsilon, DELTA) for mechanism in both)
    old = Spending((("first", both[0]), ("second", both[1])))
    assert old.epsilon(cap) == pytest.approx(oracle(both, DELTA, order), abs=1e-6)
    assert oracle(both, DELTA, order) != pytest.approx(oracle(both, DELTA, other), abs=1e-3)


def test_a_release_that_comes_to_the_very_cap_is_admitted_with_its_plan() -> None:
    spending = released(Spending(), one_round("first", SMALL, 6))
    order = spending.admissions[0].order
    very = Cap(renyi_epsilon([ROUND, SMALL], DELTA, order), DELTA)
    assert admit(spending, whole("second", SMALL), very) == Admission("second", Rule.FILTER, SMALL, order)


def test_the_plan_of_a_run_that_pld_admitted_may_be_asked_for_again() -> None:
    spending = released(Spending(), one_round("first", FULL, 6))
    assert admit(spending, whole("first", FULL), CAP) == spending.admissions[0]


def test_a_run_that_pld_admitted_keeps_to_the_smaller_delta_of_plan_and_cap() -> None:
    spending = released(Spending(), one_round("first", FULL, 6))
    assert epsilon_of([FULL], DELTA / 10) > CAP.epsilon
    with pytest.raises(BudgetExceeded):
        admit(spending, one_round("first", FULL, 6, DELTA / 10), CAP)
    with pytest.raises(BudgetExceeded):
        admit(spending, one_round("first", FULL, 6), Cap(CAP.epsilon, DELTA / 10))


def test_beside_another_run_the_one_that_pld_admitted_counts_under_the_filter() -> None:
    """The cap was raised for the second run and lowered again: PLD's figure of the first alone no longer holds."""
    raised = Cap(20.0, DELTA)
    spending = released(Spending(), one_round("first", FULL, 6))
    spending = released(spending, one_round("second", SMALL, 6), raised)
    assert admit(spending, one_round("first", FULL, 6), raised).rule is Rule.PLD
    with pytest.raises(BudgetExceeded):
        admit(spending, one_round("first", FULL, 6), CAP)


def test_a_plan_that_comes_to_the_very_cap_by_pld_is_admitted_and_goes_on() -> None:
    very = Cap(epsilon_of([FULL], DELTA), DELTA)
    spending = released(Spending(), one_round("first", FULL, 6), very)
    assert spending.admissions[0].rule is Rule.PLD
    assert released(spending, one_round("first", FULL, 6), very).epsilon(very) == very.epsilon


def test_a_run_beyond_its_own_plan_is_refused_in_words() -> None:
    spending = released(Spending(), one_round("first", FULL, 6))
    with pytest.raises(BudgetExceeded, match=r"^Epsilon would reach .* The first run was admitted whole"):
        admit(spending, one_round("first", FULL, FULL.steps), CAP)


def test_the_order_of_an_old_ledger_is_that_of_its_first_release() -> None:
    cap, first, planned = Cap(1.0, DELTA), ROUND, Mechanism(0.01, 6.0, 1)
    assert best_order(first, 1.0, DELTA) != best_order(planned, 1.0, DELTA)
    admitted = admit(Spending((("old", replace(first, steps=1)),)), whole("new", planned), cap)
    assert admitted.order == best_order(first, 1.0, DELTA)
