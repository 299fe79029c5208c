"""Who takes part: the nodes that are connected, are who they were enrolled as, and accept the plan.

The cohort is not fixed at the start. Before each round new nodes are asked, and nodes that went are left out until
they are back.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from flwr.app import Message, MessageType

from server.exchange import Grid, Presence, Question, Timing, exchange
from server.registry import LATE, VANISHED, Registry, SiteRow
from server.replies import check_offer
from shared.errors import ErrorCode, FederationError
from shared.messages import PlanQuery, SiteOffer
from shared.plan import RunPlan

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """What a hospital said of itself when it was enrolled."""

    name: str
    declared_patients: int


class Refusal(StrEnum):
    """Why the server does not let a node take part; these words stay in its registry."""

    NOT_ENROLLED = "not-enrolled"
    NAME_MISMATCH = "name-mismatch"
    DECLARED_MISMATCH = "declared-mismatch"
    NAME_TAKEN = "name-taken"


class Cohort:
    """The sites of a run.

    Args:
        grid: Flower's.
        registry: Where offers and refusals are recorded.
        run: The run's name.
        plan: The agreed plan.
        members: Who is enrolled, by node; it may change while the run goes on. ``None`` where everybody may come, as
            in a simulation, and then nobody is waited for who is not there.
        timing: How patient the server is.
    """

    def __init__(
        self,
        grid: Grid,
        registry: Registry,
        run: str,
        plan: RunPlan,
        members: Mapping[int, Member] | None,
        timing: Timing,
    ) -> None:
        self._grid, self._registry, self._run, self._plan = grid, registry, run, plan
        self._members, self._timing = members, timing
        self.presence = Presence(grid, members or ())
        self._offers: dict[int, SiteOffer] = {}
        self._refused: dict[int, tuple[str, float]] = {}

    def gather(self) -> dict[int, SiteOffer]:
        """Return the offers of the sites that are connected and take part, by node.

        Waits for a quorum until the plan's deadline, and for members whose connection went just now until the grace
        has passed.

        Raises:
            FederationError: ``quorum-lost`` if so many refuse that there can be no quorum, or the deadline passes.
        """
        end = time.monotonic() + self._plan.deadline_s
        while True:
            self.presence.look()
            self._query_newcomers()
            here = {
                node: offer
                for node, offer in self._offers.items()
                if node in self.presence.online and self._unlike_member(node, offer) is None
            }
            if len(here) >= self._plan.quorum and not self._somebody_just_left():
                return here
            if len(self._possible()) < self._plan.quorum or time.monotonic() >= end:
                raise self._too_few(len(here))
            time.sleep(min(self._timing.look_s, self._plan.deadline_s))

    def _query_newcomers(self) -> None:
        now = time.monotonic()
        for node, (_, when) in list(self._refused.items()):
            if node not in self.presence.online or now - when > self._timing.reconsider_s:
                del self._refused[node]
        unknown = self.presence.online - set(self._offers) - set(self._refused)
        for node in sorted(unknown):
            if self._members is not None and node not in self._members:
                self._refuse(node, Refusal.NOT_ENROLLED)  # and is not told the plan
        newcomers = sorted(unknown - set(self._refused))
        if not newcomers:
            return
        replies: dict[int, Message] = {}
        deadline_s = min(self._plan.deadline_s, self._timing.query_s)
        question = Question(PlanQuery(self._run, self._plan).to_content, MessageType.QUERY, "0", deadline_s)
        silent = exchange(self._grid, question, newcomers, self.presence, self._timing, replies.__setitem__)
        for node in newcomers:  # in a fixed order: of two that claim one name, the first has it
            if node in replies:
                self._hear(node, check_offer(replies[node], self._plan))
            else:
                self._refused[node] = (silent[node], time.monotonic())
                _LOG.warning("no answer", extra={"run": self._run, "node": node, "code": silent[node]})

    def _hear(self, node: int, offer: SiteOffer | ErrorCode) -> None:
        reason = self._unlike_member(node, offer) if isinstance(offer, SiteOffer) else offer
        if reason is not None or not isinstance(offer, SiteOffer):
            self._refuse(node, str(reason))
            return
        self._offers[node] = offer
        self._registry.add_site(self._run, SiteRow(offer.site, offer.declared_patients, None))

    def _unlike_member(self, node: int, offer: SiteOffer) -> Refusal | None:
        """Return in what an offer differs from the enrolment, if in anything."""
        if any(other.site == offer.site for holder, other in self._offers.items() if holder != node):
            return Refusal.NAME_TAKEN
        if self._members is None:
            return None
        member = self._members.get(node)
        if member is None:
            return Refusal.NOT_ENROLLED
        if offer.site != member.name:
            return Refusal.NAME_MISMATCH
        return None if offer.declared_patients == member.declared_patients else Refusal.DECLARED_MISMATCH

    def _refuse(self, node: int, reason: str) -> None:
        # By the enrolled name: a node could claim anybody's.
        member = (self._members or {}).get(node)
        name = member.name if member else f"node-{node}"
        self._refused[node] = (str(reason), time.monotonic())
        self._registry.add_site(self._run, SiteRow(name, None, str(reason)))
        _LOG.warning("refused", extra={"run": self._run, "site": name, "code": str(reason)})

    def _somebody_just_left(self) -> bool:
        awaited = set(self._offers) | (set(self._members or ()) - set(self._refused))
        revoked = awaited - set(self._members) if self._members is not None else set()
        return any(0.0 < self.presence.away_s(node) <= self._timing.grace_s for node in awaited - revoked)

    def _possible(self) -> set[int]:
        """Return the nodes that take part or may yet."""
        known = set(self.presence.online) | set(self._offers) if self._members is None else set(self._members)
        return known - {node for node, (reason, _) in self._refused.items() if reason not in (LATE, VANISHED)}

    def _too_few(self, here: int) -> FederationError:
        said = sorted({reason for reason, _ in self._refused.values()})
        others = f" The others said: {', '.join(said)}." if said else ""
        return FederationError(
            f"{here} of the {self._plan.quorum} sites that the plan requires take part.{others}",
            ErrorCode.QUORUM_LOST,
        )
