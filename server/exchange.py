"""Ask nodes one question and take their answers, through lost messages and nodes that go and come back.

Flower delivers a message once: to a daemon that then dies, or whose connection breaks, it is lost. To ask again is
safe, because a site answers a round that it has trained with the reply in its ledger.

| what happened to a node | what is done |
| --- | --- |
| answered, be it with an error | final |
| Flower could not deliver the message or the reply | asked again, ``again_s`` after the last time |
| its connection went and came back | asked again |
| connected, but silent for ``silent_s``, then twice that, … | asked again: a message may be lost unnoticed |
| gone for longer than ``grace_s``, and there are enough answers | no longer waited for |
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message, RecordDict

from server.registry import LATE, VANISHED
from shared.messages import is_undelivered

_LOG = logging.getLogger(__name__)
_POLL_S, _FIRST_POLL_S, _SLOWEST_POLL_S, _POLL_SHARE = 0.05, 0.15, 0.5, 0.02


class Grid(Protocol):
    """What rounds need of Flower's ``Grid``."""

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are connected."""

    def push_messages(self, messages: list[Message]) -> Iterable[str]:
        """Send messages; return the id of each."""

    def pull_messages(self, message_ids: list[str]) -> Iterable[Message]:
        """Return the replies to some messages that have arrived."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How patient the server is, in seconds.

    Attributes:
        grace_s: How long a site whose connection went is waited for while the others suffice.
        look_s: Between two looks at who is connected.
        again_s: Least time between two sendings of one request to one node.
        silent_s: After how long a connected but silent node is asked again.
        query_s: How long a node may take to answer whether it takes part.
        reconsider_s: After how long a connected node that refused is asked whether it takes part now.
        attempts: How often a round is tried before the run fails.
        retry_s: Between two attempts.
        closed_s: For how long a round waits for sites that train at certain hours only.
    """

    grace_s: float = 120.0
    look_s: float = 1.0
    again_s: float = 3.0
    silent_s: float = 300.0
    query_s: float = 300.0
    reconsider_s: float = 600.0
    attempts: int = 3
    retry_s: float = 10.0
    closed_s: float = 4 * 86_400.0


SIMULATED = Timing(attempts=1, silent_s=math.inf, query_s=math.inf, closed_s=0.0)
"""In one process nothing is lost or comes back, and a node is silent only because it is not its turn yet."""


class Presence:
    """Which nodes are connected, and for how long the others have not been.

    Args:
        grid: Flower's.
        expected: Nodes that count as seen at the start, so that the first round waits for them too.
    """

    def __init__(self, grid: Grid, expected: Iterable[int] = ()) -> None:
        self._grid = grid
        self._began = time.monotonic()
        self._seen = dict.fromkeys(expected, self._began)
        self.online: frozenset[int] = frozenset()
        self._looked = -math.inf
        self.look()

    def look(self, every_s: float = 0.0) -> bool:
        """Ask Flower, unless that was done less than ``every_s`` ago; return whether it was asked."""
        if time.monotonic() - self._looked < every_s:
            return False
        self.online = frozenset(self._grid.get_node_ids())
        self._looked = time.monotonic()
        self._seen.update(dict.fromkeys(self.online, self._looked))
        return True

    def away_s(self, node: int) -> float:
        """Return for how long a node has not been seen; 0 if it is connected."""
        return 0.0 if node in self.online else time.monotonic() - self._seen.get(node, -math.inf)


@dataclass(frozen=True, eq=False)
class Question:
    """One request to many nodes; every sending of it has content of its own."""

    content: Callable[[], RecordDict]
    kind: str
    group: str
    deadline_s: float


@dataclass
class _Call:
    """What is known of one node that has not answered."""

    sent: float
    silent_s: float
    lost: bool = False
    messages: set[str] = field(default_factory=set)


class _Calls:
    """The open calls of one exchange."""

    def __init__(self, grid: Grid, question: Question, timing: Timing) -> None:
        self._grid, self._question, self._timing = grid, question, timing
        self._end = time.monotonic() + question.deadline_s
        self.open: dict[int, _Call] = {}
        self._nodes: dict[str, int] = {}

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def send(self, nodes: Collection[int]) -> None:
        """Send the question to each node, for the first time or anew."""
        question, content, ttl = self._question, self._question.content(), max(self.left_s, 1.0)
        messages = [
            Message(content, dst_node_id=node, message_type=question.kind, group_id=question.group, ttl=ttl)
            for node in nodes
        ]
        identifiers = list(self._grid.push_messages(messages)) if messages else []
        identifiers += [""] * (len(messages) - len(identifiers))
        for node, identifier in zip(nodes, identifiers, strict=True):
            call = self.open.setdefault(node, _Call(0.0, self._timing.silent_s))
            call.sent, call.lost = time.monotonic(), not identifier
            if identifier:  # Flower gives none for a message that it could not store
                call.messages.add(identifier)
                self._nodes[identifier] = node

    def pull(self) -> Iterable[tuple[int, Message]]:
        """Yield what has arrived. A failed reply does not say truly who sent it, so it is known by its question."""
        for reply in self._grid.pull_messages(list(self._nodes)):
            identifier = reply.metadata.reply_to_message_id
            node = self._nodes.pop(identifier, None)
            if node is None:
                continue
            call = self.open[node]
            call.messages.discard(identifier)
            if is_undelivered(reply):
                call.lost = True
                continue
            for other in self.open.pop(node).messages:
                del self._nodes[other]
            yield node, reply

    def ask_again(self, online: Collection[int]) -> None:
        """Send anew to the nodes whose question or answer was lost, as far as they are connected."""
        now, due = time.monotonic(), []
        for node, call in self.open.items():
            if node not in online:
                call.lost = True
                continue
            waited = now - call.sent
            if waited >= (self._timing.again_s if call.lost else call.silent_s):
                call.silent_s *= 1 if call.lost else 2
                due.append(node)
        if due:
            _LOG.info("asked again", extra={"kind": self._question.kind})
            self.send(due)


def exchange(
    grid: Grid,
    question: Question,
    nodes: Collection[int],
    presence: Presence,
    timing: Timing,
    on_reply: Callable[[int, Message], None],
    enough: Callable[[], bool] = lambda: True,
) -> dict[int, str]:
    """Ask the nodes and hand over each answer as it arrives, until all have answered or the deadline has passed.

    Args:
        grid: Flower's.
        question: What to ask, and how long to wait.
        nodes: Whom.
        presence: Who is connected.
        timing: How patiently.
        on_reply: Called with the node and its answer.
        enough: Whether the answers so far suffice, so that nodes that are long gone need not be waited for.

    Returns:
        The nodes that did not answer: ``late`` if still connected, else ``vanished``.
    """
    calls, began, heard = _Calls(grid, question, timing), time.monotonic(), False
    calls.send(nodes)
    while calls.open and calls.left_s > 0.0:
        arrived = False
        for node, reply in calls.pull():
            arrived = heard = True
            on_reply(node, reply)
        if presence.look(timing.look_s):
            calls.ask_again(presence.online)
            if enough() and all(presence.away_s(node) > timing.grace_s for node in calls.open):
                break
        if calls.open and not arrived:
            # Fast once a reply has come, for the others are near, and never more than a fiftieth of a round's length
            # late. Before, every look would only keep the SuperLink from the sites' own calls.
            least = _POLL_S if heard else _FIRST_POLL_S
            wait = min(max(least, _POLL_SHARE * (time.monotonic() - began)), _SLOWEST_POLL_S)
            time.sleep(max(0.0, min(wait, calls.left_s)))
    presence.look(timing.look_s)
    return {node: LATE if node in presence.online else VANISHED for node in calls.open}
