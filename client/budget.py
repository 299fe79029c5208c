"""May this be released? The hospital's cap, ``max-epsilon`` at ``max-delta``, against a server that adapts. Pure.

Neighbouring data sets differ by one patient with all records. Everything ever released composes. A server sees each
reply before it chooses the next plan, so the cap is a Rényi filter of one order (:mod:`shared.renyi`): a release is
admitted while the sum of all divergences, its own included, stays within the cap's budget. Rounds that are not run are
not counted, for the filter bounds every way of stopping.

A filter's epsilon is a tenth above the tight one (PLD), which holds for a plan that is fixed beforehand. So that a plan
of epsilon 8 fits a cap of 8, a hospital's *first* run may be admitted by PLD alone. Why that is sound:

Let P be the first run's whole plan, with the divergence ρ(P) of the filter's order, and B the cap's budget.

| case | who admits | what counts later |
| --- | --- | --- |
| ρ(P) ≤ B | the filter, from the start | what was released |
| ρ(P) > B, PLD of P within the cap | PLD, once | **all of P**, for ever, however many of its rounds are run |

In the first case every release passed the filter. In the second, nothing but P is ever released under this cap, because
all of P counts and leaves no room: the server's only choice is where to stop P, which is post-processing of P. The two
rules never share a ledger's outcomes. Were only P's finished rounds counted, a server could stop P where the loss is
small and go on under the filter; the outcomes that stay would use delta once (PLD) and those that leave once more.

The cap may be raised later, to a budget B' ≥ ρ(P). Then a run R that follows is admitted with ρ(P) + ρ(R) ≤ B'. For
every history h of P, with loss L(h), the filter's conversion bounds what follows: the mean of (1 - e^(ε - L))⁺ is at
most c·e^((α - 1)(L(h) + ρ(R) - ε)). That also bounds the histories after which R is never asked for. Its mean over h is
at most c·e^((α - 1)(ρ(P) + ρ(R) - ε)) ≤ δ: once, for all outcomes together. That is why P counts whole.

The order is fixed with the first release, from public numbers: it admits most steps of the first plan under the cap.
Runs of a ledger from before admissions are the filter's, by what they released: to admit one by PLD later would let a
server choose, after outcomes, between its end and another run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from shared.accounting import Mechanism, epsilon_of
from shared.errors import BudgetExceeded
from shared.renyi import best_order, renyi_epsilon

_ROUNDING = 1e-9


class Rule(StrEnum):
    """Who admitted a run."""

    FILTER = "filter"
    PLD = "pld"


@dataclass(frozen=True)
class Cap:
    """What a hospital permits: everything ever released is (``epsilon``, ``delta``) private."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Proposal:
    """What a run asks for.

    Attributes:
        run: Its name in the ledger.
        planned: The whole plan.
        delta: The plan's, at which its own epsilon is stated.
        release: One round that it asks to release; ``None`` if it only asks whether the plan would be accepted.
    """

    run: str
    planned: Mechanism
    delta: float
    release: Mechanism | None = None


@dataclass(frozen=True)
class Admission:
    """How a run was admitted, kept in the ledger with its first release.

    Attributes:
        run: Its name.
        rule: Who admitted it.
        planned: Its whole plan.
        order: The filter's Rényi order, the same for all runs of a ledger.
    """

    run: str
    rule: Rule
    planned: Mechanism
    order: int


@dataclass(frozen=True)
class Spending:
    """What a ledger holds, as far as the cap is concerned.

    Attributes:
        releases: Run and mechanism of everything reserved or committed.
        admissions: Of its runs, in the order of their first releases. A ledger from before admissions has none.
    """

    releases: Sequence[tuple[str, Mechanism]] = ()
    admissions: Sequence[Admission] = ()

    def admission_of(self, run: str) -> Admission | None:
        """Return how a run was admitted; ``None`` if it was not yet."""
        return next((admission for admission in self.admissions if admission.run == run), None)

    def counted(self, without: str = "") -> list[Mechanism]:
        """Return what counts under the filter, without one run: what was released, and all of a run admitted by PLD."""
        whole = {admission.run: admission for admission in self.admissions if admission.rule is Rule.PLD}
        planned = [admission.planned for run, admission in whole.items() if run != without]
        return planned + [released for run, released in self.releases if run != without and run not in whole]

    def after(self, run: str, released: Mechanism, admission: Admission) -> "Spending":
        """Return what the ledger holds after one more release of a run that is admitted so."""
        known = self.admission_of(run) is not None
        return Spending((*self.releases, (run, released)), (*self.admissions, *[admission] * (not known)))

    def epsilon(self, cap: Cap) -> float:
        """Return what is spent of the cap: the filter's epsilon, or a sole run's PLD if that admitted it."""
        match self.admissions:
            case [Admission(rule=Rule.PLD, planned=planned)] if len({run for run, _ in self.releases}) == 1:
                return epsilon_of([planned], cap.delta)
            case [first, *_]:
                return renyi_epsilon(self.counted(), cap.delta, first.order)
        counted = self.counted()
        return renyi_epsilon(counted, cap.delta, best_order(counted[0], cap.epsilon, cap.delta)) if counted else 0.0


def admit(spending: Spending, proposal: Proposal, cap: Cap) -> Admission:
    """Return how ``proposal`` is admitted after everything in the ledger; see the module for the argument.

    Raises:
        BudgetExceeded: If neither rule admits it.
    """
    known = spending.admission_of(proposal.run)
    if known and known.rule is Rule.PLD:
        _check_within_plan(spending, proposal, known, cap)
        return known
    order = _order(spending, proposal, cap)
    if not spending.releases and _fits_by_pld_only(proposal, order, cap):
        return Admission(proposal.run, Rule.PLD, proposal.planned, order)
    if proposal.release is None:
        after = [*spending.counted(without=proposal.run), proposal.planned]
    else:
        after = [*spending.counted(), proposal.release]
    total = renyi_epsilon(after, cap.delta, order)
    if total > cap.epsilon + _ROUNDING:
        raise BudgetExceeded(_refusal(spending, total, cap))
    return known or Admission(proposal.run, Rule.FILTER, proposal.planned, order)


def _check_within_plan(spending: Spending, proposal: Proposal, known: Admission, cap: Cap) -> None:
    """Check that a run admitted by PLD asks for no more than its plan, and that the cap was not lowered since."""
    released = sum(mechanism.steps for run, mechanism in spending.releases if run == proposal.run)
    steps = proposal.planned.steps if proposal.release is None else released + proposal.release.steps
    alone = all(run == proposal.run for run, _ in spending.releases)
    total = epsilon_of([known.planned], min(proposal.delta, cap.delta)) if alone else spending.epsilon(cap)
    if proposal.planned != known.planned or steps > known.planned.steps or total > cap.epsilon + _ROUNDING:
        raise BudgetExceeded(_refusal(spending, total, cap))


def _order(spending: Spending, proposal: Proposal, cap: Cap) -> int:
    """Return the ledger's Rényi order; before the first release, the one that is best for the first plan."""
    if spending.admissions:
        return spending.admissions[0].order
    first = spending.releases[0][1] if spending.releases else proposal.planned
    return best_order(first, cap.epsilon, cap.delta)


def _fits_by_pld_only(proposal: Proposal, order: int, cap: Cap) -> bool:
    if renyi_epsilon([proposal.planned], cap.delta, order) <= cap.epsilon:
        return False
    return epsilon_of([proposal.planned], min(proposal.delta, cap.delta)) <= cap.epsilon + _ROUNDING


def _refusal(spending: Spending, total: float, cap: Cap) -> str:
    sole = any(admission.rule is Rule.PLD for admission in spending.admissions)
    why = (
        "The first run was admitted whole, as a plan fixed beforehand, and leaves no room for another. " if sole else ""
    )
    return (
        f"Epsilon would reach {total:.3f} at delta {cap.delta:g}; site.toml permits {cap.epsilon:g}, of which "
        f"{spending.epsilon(cap):.3f} is spent. {why}Fewer rounds, more noise or a larger max-epsilon would be needed."
    )
