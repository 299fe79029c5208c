"""Asking nodes through lost messages, dead connections and returns, on a grid that follows a script."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from flwr.app import Error, Message, RecordDict

from server.exchange import Presence, Question, Timing, exchange
from server.registry import LATE, VANISHED
from shared.errors import ErrorCode
from shared.messages import error_reply
from simulations.grid import LocalGrid

LOST_MESSAGE, LOST_REPLY, NODE_GONE = 3, 4, 5
QUICK = Timing(grace_s=0.05, look_s=0.01, again_s=0.02, silent_s=math.inf)
QUESTION = Question(RecordDict, "train", "1", 5.0)
Answer = Callable[[Message], Message | None]


class Clock:
    """Time that passes by being slept through, and a microsecond whenever somebody looks at it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        self.now_s += 1e-6
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture(autouse=True)
def _own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """How busy the machine is decides nothing."""
    monkeypatch.setattr("server.exchange.time", Clock())


class Nodes(LocalGrid):
    """Nodes 1, 2, 3 … answer their n-th message with the n-th line of their script, and then as the last line says.

    Before each pull, ``events`` may change who is connected.
    """

    def __init__(self, scripts: dict[int, list[Answer]]) -> None:
        super().__init__([Path()], seed=0)
        self.scripts = {node: itertools.chain(lines, itertools.repeat(lines[-1])) for node, lines in scripts.items()}
        self.online = set(scripts)
        self.events: Callable[[int], None] = lambda pulls: None
        self.pulled: list[list[str]] = []
        self.sent: list[tuple[str, int]] = []
        self.unstorable: set[int] = set()
        self.ready: dict[str, Message | None] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node in self.unstorable:
                self.unstorable.discard(node)
                identifiers.append(None)
                continue
            identifier = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = identifier
            self.sent.append((identifier, node))
            self.ready[identifier] = next(self.scripts[node])(message)
            identifiers.append(identifier)
        return identifiers  # type: ignore[return-value]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulled.append(list(message_ids))
        self.events(len(self.pulled))
        found = [(name, reply) for name in self.pulled[-1] if (reply := self.ready.get(name)) is not None]
        for name, _ in found:
            del self.ready[name]
        return [reply for _, reply in found]

    def times_asked(self, node: int) -> int:
        return sum(receiver == node for _, receiver in self.sent)


def answers(message: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


def silent(_message: Message) -> None:
    return None


def fails(code: int) -> Answer:
    return lambda message: Message(Error(code, "gone"), reply_to=message)


@dataclass
class Outcome:
    replies: list[tuple[int, bool]]
    missing: dict[int, str]


def ask(
    grid: Nodes, timing: Timing = QUICK, quorum: int = 1, question: Question = QUESTION, nodes: Iterable[int] = ()
) -> Outcome:
    replies: list[tuple[int, bool]] = []
    usable = 0

    def take(node: int, reply: Message) -> None:
        nonlocal usable
        replies.append((node, reply.has_error()))
        usable += not reply.has_error()

    nodes = list(nodes) or list(grid.scripts)
    missing = exchange(grid, question, nodes, Presence(grid), timing, take, lambda: usable >= quorum)
    return Outcome(sorted(replies), missing)


def test_everybody_answers_once() -> None:
    grid = Nodes({1: [answers], 2: [answers]})
    assert ask(grid) == Outcome([(1, False), (2, False)], {})
    assert len(grid.sent) == 2


def test_a_refusal_is_final() -> None:
    grid = Nodes({1: [answers], 2: [lambda message: error_reply(ErrorCode.BUDGET_EXCEEDED, message), answers]})
    assert ask(grid, quorum=2) == Outcome([(1, False), (2, True)], {})
    assert grid.times_asked(2) == 1


@pytest.mark.parametrize("code", [LOST_MESSAGE, LOST_REPLY, NODE_GONE])
def test_what_flower_lost_is_asked_again(code: int) -> None:
    grid = Nodes({1: [fails(code), fails(code), answers], 2: [answers]})
    assert ask(grid) == Outcome([(1, False), (2, False)], {})
    assert (grid.times_asked(1), grid.times_asked(2)) == (3, 1)


def test_a_message_that_flower_could_not_store_is_sent_again() -> None:
    grid = Nodes({1: [answers], 2: [answers]})
    grid.unstorable = {1}
    assert ask(grid) == Outcome([(1, False), (2, False)], {})


def test_a_node_that_comes_back_within_the_round_is_asked_again() -> None:
    grid = Nodes({1: [silent, answers], 2: [answers]})

    def restart(pulls: int) -> None:
        grid.online = {2} if 3 < pulls < 12 else {1, 2}

    grid.events = restart
    assert ask(grid, replace(QUICK, grace_s=60.0)) == Outcome([(1, False), (2, False)], {})
    assert grid.times_asked(1) == 2


def test_a_connected_node_whose_message_is_lost_unnoticed_is_asked_again_less_and_less_often() -> None:
    grid = Nodes({1: [silent, silent, answers]})
    assert ask(grid, replace(QUICK, silent_s=0.03)) == Outcome([(1, False)], {})
    assert grid.times_asked(1) == 3
    grid = Nodes({1: [silent]})
    ask(grid, replace(QUICK, silent_s=1.0), question=replace(QUESTION, deadline_s=100.0))
    assert grid.times_asked(1) == 7  # after 1, 3, 7, 15, 31 and 63 s; evenly it would be a hundred times


def test_the_first_of_two_answers_counts_and_the_other_is_no_longer_pulled() -> None:
    grid = Nodes({1: [silent, answers], 2: [silent]})
    question = replace(QUESTION, deadline_s=1.2)
    outcome = ask(grid, replace(QUICK, silent_s=0.05), quorum=2, question=question)
    assert outcome == Outcome([(1, False)], {2: LATE})
    own = {name for name, node in grid.sent if node == 1}
    assert len(own) == 2
    assert not own & set(grid.pulled[-1])


def test_enough_answers_do_not_wait_for_a_node_that_is_gone_for_long() -> None:
    grid = Nodes({1: [answers], 2: [silent]})
    grid.events = lambda pulls: setattr(grid, "online", {1} if pulls > 1 else {1, 2})
    assert ask(grid, question=replace(QUESTION, deadline_s=3600.0)) == Outcome([(1, False)], {2: VANISHED})


def test_without_enough_answers_a_gone_node_is_waited_for_until_the_deadline() -> None:
    grid = Nodes({1: [answers], 2: [silent, answers]})
    grid.online = {1}

    def returns(pulls: int) -> None:
        grid.online = {1, 2} if pulls > 20 else {1}

    grid.events = returns
    assert ask(grid, replace(QUICK, grace_s=0.0), quorum=2) == Outcome([(1, False), (2, False)], {})


def test_a_late_answer_is_ignored_and_said_to_be_late() -> None:
    grid = Nodes({1: [answers], 2: [silent]})
    assert ask(grid, question=replace(QUESTION, deadline_s=0.2)).missing == {2: LATE}
    late = [name for name, node in grid.sent if node == 2]
    grid.ready[late[0]] = answers(Message(RecordDict(), 2, "train"))
    grid.pulled.clear()
    ask(grid, question=replace(QUESTION, deadline_s=0.2))
    assert not {name for names in grid.pulled for name in names} & set(late)


def test_presence_counts_from_the_start_for_expected_nodes_and_forever_for_unknown_ones() -> None:
    grid = Nodes({1: [answers], 2: [answers]})
    grid.online = {1}
    presence = Presence(grid, [1, 2])
    assert presence.away_s(1) == 0.0
    assert 0.0 < presence.away_s(2) < 60.0
    assert presence.away_s(3) == math.inf
    assert not presence.look(3600.0)
    grid.online = {2}
    assert presence.look()
    assert presence.away_s(2) == 0.0
