"""Who is let in: enrolment, names, declared patients, and nodes that come and go between rounds."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Message

from server.cohort import Cohort, Member
from server.exchange import Timing
from server.registry import Registry
from shared.errors import ErrorCode, FederationError
from shared.messages import PlanQuery, SiteOffer, error_reply
from shared.plan import RunPlan
from simulations.grid import LocalGrid

PLAN = RunPlan(
    task="nodule-classification",
    rounds=2,
    local_steps=1,
    sample_rate=0.5,
    records_per_patient=1,
    max_grad_norm=1.0,
    noise_multiplier=1.0,
    delta=1e-3,
    learning_rate=0.1,
    min_sites=1,
    deadline_s=0.5,
)
QUICK = Timing(grace_s=0.05, look_s=0.01, again_s=0.02, query_s=0.2, reconsider_s=60.0)
MEMBERS = {1: Member("north", 10), 2: Member("south", 20)}


class Sites(LocalGrid):
    """Nodes that answer a query with the offer given, or with an error code."""

    def __init__(self, offers: dict[int, tuple[str, int] | ErrorCode | None]) -> None:
        super().__init__([Path()], seed=0)
        self.offers = offers
        self.online = set(offers)
        self.asked: list[int] = []
        self.looks = 0
        self.events: Callable[[int], None] = lambda looks: None

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        self.events(self.looks)
        return list(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = []
        for message in messages:
            self.asked.append(message.metadata.dst_node_id)
            identifier = f"message-{len(self.asked)}"
            message.metadata.__dict__["_message_id"] = identifier
            self._pending[identifier] = message
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for identifier in message_ids:
            message = self._pending.pop(identifier)
            assert isinstance(message, Message)
            offer = self.offers[message.metadata.dst_node_id]
            if offer is None:
                self._pending[identifier] = message
            elif isinstance(offer, ErrorCode):
                replies.append(error_reply(offer, message))
            else:
                plan = PlanQuery.from_content(message.content).plan
                replies.append(Message(SiteOffer(*offer, plan.digest).to_content(), reply_to=message))
        return replies


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    store = Registry(tmp_path / "registry.sqlite")
    store.begin("r", PLAN)
    return store


def sites_of(registry: Registry) -> dict[str, tuple[int | None, str | None]]:
    return {row.site: (row.declared_patients, row.refused) for row in registry.read("r").sites}


def cohort(grid: Sites, registry: Registry, members: dict[int, Member] | None = MEMBERS, **changes: object) -> Cohort:
    return Cohort(grid, registry, "r", replace(PLAN, **changes), members, QUICK)  # type: ignore[arg-type]


def names(found: dict[int, SiteOffer]) -> list[str]:
    return [offer.site for _, offer in sorted(found.items())]


def test_members_who_accept_take_part(registry: Registry) -> None:
    assert names(cohort(Sites({1: ("north", 10), 2: ("south", 20)}), registry).gather()) == ["north", "south"]
    assert sites_of(registry) == {"north": (10, None), "south": (20, None)}


@pytest.mark.parametrize(
    ("node", "offer", "recorded"),
    [
        (3, ("east", 30), {"node-3": (None, "not-enrolled")}),
        (2, ("southern", 20), {"south": (None, "name-mismatch")}),
        (2, ("south", 2000), {"south": (None, "declared-mismatch")}),
        (2, ("north", 20), {"south": (None, "name-taken")}),
        (2, ErrorCode.BUDGET_EXCEEDED, {"south": (None, "budget-exceeded")}),
    ],
)
def test_who_is_not_who_was_enrolled_is_refused_by_name(
    registry: Registry, node: int, offer: tuple[str, int], recorded: dict[str, tuple[int | None, str | None]]
) -> None:
    grid = Sites({1: ("north", 10), node: offer})
    assert names(cohort(grid, registry).gather()) == ["north"]
    assert sites_of(registry) == {"north": (10, None), **recorded}


def test_a_node_that_is_not_enrolled_is_not_told_the_plan(registry: Registry) -> None:
    grid = Sites({1: ("north", 10), 3: ("north", 10)})
    cohort(grid, registry).gather()
    assert grid.asked == [1]


def test_of_two_that_claim_one_name_the_second_is_refused(registry: Registry) -> None:
    found = cohort(Sites({8: ("north", 10), 5: ("north", 99)}), registry, members=None).gather()
    assert {node: offer.declared_patients for node, offer in found.items()} == {5: 99}
    assert sites_of(registry) == {"north": (99, None), "node-8": (None, "name-taken")}


def test_a_site_that_went_is_left_out_and_is_back_without_being_asked_anew(registry: Registry) -> None:
    grid = Sites({1: ("north", 10), 2: ("south", 20)})
    sites = cohort(grid, registry)
    assert names(sites.gather()) == ["north", "south"]
    grid.online = {1}
    assert names(sites.gather()) == ["north"]
    grid.online = {1, 2}
    assert names(sites.gather()) == ["north", "south"]
    assert sorted(grid.asked) == [1, 2]


def test_a_node_that_appears_later_is_asked_and_joins(registry: Registry) -> None:
    grid = Sites({1: ("north", 10), 2: ("south", 20)})
    grid.online = {1}
    sites = cohort(grid, registry)
    assert names(sites.gather()) == ["north"]
    grid.online = {1, 2}
    assert names(sites.gather()) == ["north", "south"]


def test_a_quorum_is_waited_for(registry: Registry) -> None:
    grid = Sites({1: ("north", 10), 2: ("south", 20)})

    def connect(looks: int) -> None:
        grid.online = {1, 2} if looks > 10 else {1}

    grid.events = connect
    assert names(cohort(grid, registry, min_sites=2, deadline_s=60.0).gather()) == ["north", "south"]


def test_a_member_that_is_just_restarting_is_waited_for_although_there_is_a_quorum(registry: Registry) -> None:
    grid = Sites({1: ("north", 10), 2: ("south", 20)})
    grid.events = lambda looks: setattr(grid, "online", {1} if looks < 8 else {1, 2})
    patient = Cohort(grid, registry, "r", PLAN, MEMBERS, replace(QUICK, grace_s=60.0))
    assert names(patient.gather()) == ["north", "south"]


def test_no_quorum_by_the_deadline_is_said(registry: Registry) -> None:
    grid = Sites({1: ("north", 10), 2: None})
    with pytest.raises(FederationError, match="1 of the 2 sites") as caught:
        cohort(grid, registry, min_sites=2).gather()
    assert caught.value.code is ErrorCode.QUORUM_LOST


@pytest.mark.parametrize("members", [MEMBERS, None])
def test_when_too_many_refuse_nobody_waits_for_the_deadline(
    registry: Registry, members: dict[int, Member] | None
) -> None:
    grid = Sites({1: ErrorCode.BUDGET_EXCEEDED, 2: ("south", 20)})
    with pytest.raises(FederationError, match="The others said: budget-exceeded") as caught:
        cohort(grid, registry, members, min_sites=2, deadline_s=1e6).gather()
    assert caught.value.code is ErrorCode.QUORUM_LOST


def test_a_revoked_member_is_out_from_the_next_round(registry: Registry) -> None:
    grid, members = Sites({1: ("north", 10), 2: ("south", 20)}), dict(MEMBERS)
    sites = cohort(grid, registry, members)
    assert names(sites.gather()) == ["north", "south"]
    del members[2]
    assert names(sites.gather()) == ["north"]


def test_a_revoked_member_is_not_waited_for(registry: Registry) -> None:
    grid, members = Sites({1: ("north", 10), 2: ("south", 20)}), dict(MEMBERS)
    sites = Cohort(grid, registry, "r", PLAN, members, replace(QUICK, grace_s=60.0))
    sites.gather()
    del members[2]
    grid.online = {1}
    assert names(sites.gather()) == ["north"]


def test_a_site_that_refused_is_asked_again_once_it_comes_back(registry: Registry) -> None:
    grid = Sites({1: ("north", 10), 2: ErrorCode.POLICY_REFUSED})
    sites = cohort(grid, registry)
    assert names(sites.gather()) == ["north"]
    assert names(sites.gather()) == ["north"]
    assert grid.asked == [1, 2]
    grid.online = {1}
    sites.gather()
    grid.online, grid.offers[2] = {1, 2}, ("south", 20)
    assert names(sites.gather()) == ["north", "south"]
