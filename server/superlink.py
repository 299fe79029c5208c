"""Flower's SuperLink as the aggregator runs it: ``python -m server.superlink``, with Flower's own arguments.

**Nobody speaks for another.** Flower 1.39 checks that a call to its Fleet API is signed by the key of the node that it
names. It does not check whose key a node comes online with, from whom a message says it is, or whose message a call
deletes: one enrolled site could answer for another, question it as if it were the server and spend its budget, or have
its messages lost. Here a site may do what the daemon does, for itself, and nothing more; calls that it does not need,
those that hand out bundles and configuration among them, are refused.

**In turns.** The SuperLink's threads wait in line for its database, which takes one writer at a time anyway. Left to
SQLite, those who find it busy sleep and try again, for milliseconds that add up in every round; and give up after 5 s,
which a hundred sites on a busy machine can use up.

**Nothing stays.** A run's messages and their objects are removed when its ServerApp ends, not only when a site happens
to name the run again.

``tests/contract/test_link.py`` tries all of it on a real SuperLink.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from threading import RLock
from typing import Any, cast

import grpc  # type: ignore[import-untyped]
from flwr.common.constant import PUBLIC_KEY_HEADER
from flwr.proto import fleet_pb2
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse
from flwr.server.superlink.fleet.grpc_rere.fleet_servicer import FleetServicer
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.sql_mixin import SqlMixin
from flwr.supercore.utils import get_metadata_bytes, int64_to_uint64

from shared.objects import MAX_MESSAGE_BYTES, MOST_OBJECTS

_MOST_HEARTBEAT_S = 30.0
"""A node counts as connected for twice this without a word; rounds wait for whoever is connected."""
_MOST_ANNOUNCEMENT_BYTES = 65_536
_ENVELOPE_BYTES = 2**20
Rule = Callable[[SqlLinkState, Any, bytes], bool]


def main() -> None:
    """Run the SuperLink."""
    take_turns()
    guard()
    forget_ended_runs()
    flower: Any = import_module("flwr.superlink.cli.flower_superlink")  # the package hides it behind its function
    flower.GRPC_MAX_MESSAGE_LENGTH = MAX_MESSAGE_BYTES + _ENVELOPE_BYTES
    sys.argv[0] = "flower-superlink"
    flower.flower_superlink()


def take_turns() -> None:
    """Put a lock around the sessions of Flower's database."""
    session, turn = SqlMixin.session, RLock()

    @contextmanager
    def in_turn(state: SqlMixin) -> Iterator[Any]:
        with turn, session(state) as opened:
            yield opened

    SqlMixin.session = in_turn  # type: ignore[method-assign, assignment]


def guard() -> None:
    """Have every call of the Fleet API checked before Flower carries it out; what has no rule is refused."""
    for method in fleet_pb2.DESCRIPTOR.services_by_name["Fleet"].methods:
        call = getattr(FleetServicer, method.name)
        setattr(FleetServicer, method.name, _guarded(call, _RULES.get(method.name, _never)))


def forget_ended_runs() -> None:
    """Remove what Flower keeps of a run when its ServerApp ends."""
    finish = SqlLinkState.finish_task

    def finish_and_forget(state: SqlLinkState, task_id: int, sub_status: str, details: str) -> bool:
        finished = finish(state, task_id, sub_status, details)
        if finished:
            for task in state.get_tasks(task_ids=[task_id]):
                state.cleanup_run(task.run_id)
        return finished

    SqlLinkState.finish_task = finish_and_forget  # type: ignore[method-assign, assignment]


def _guarded(call: Callable[..., Any], rule: Rule) -> Callable[..., Any]:
    def checked(servicer: FleetServicer, request: Any, context: grpc.ServicerContext) -> Any:
        key = get_metadata_bytes(context.invocation_metadata(), PUBLIC_KEY_HEADER)
        state = cast(SqlLinkState, servicer.state_factory.state())  # there is a --database
        if rule(state, request, key or b""):
            return call(servicer, request, context)
        if rule is _own_question:
            return ConfirmMessageReceivedResponse()  # it may be gone for an honest reason
        return context.abort(grpc.StatusCode.PERMISSION_DENIED, "not permitted")

    return checked


def _own_key(state: SqlLinkState, request: Any, key: bytes) -> bool:
    return _short_beat(state, request, key) and bool(request.public_key == key)


def _short_beat(_state: SqlLinkState, request: Any, _key: bytes) -> bool:
    return bool(request.heartbeat_interval <= _MOST_HEARTBEAT_S)


def _own_reply(state: SqlLinkState, request: Any, _key: bytes) -> bool:
    """Whether a node announces one reply, from itself, filed under its own name, with few objects.

    Flower checks that the question was put to the node that the reply says it is from. A reply filed under a
    question's name would take over the push of that question's content, which all sites wait for.
    """
    if request.ByteSize() > _MOST_ANNOUNCEMENT_BYTES:
        return False
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return False
    reply, tree = request.messages_list[0].metadata, request.message_object_trees[0]
    objects = sum(1 for _ in islice(iterate_object_tree(tree), MOST_OBJECTS + 2))
    return (
        reply.src_node_id == request.node.node_id
        and bool(reply.reply_to_message_id)
        and reply.message_id == tree.object_id
        and objects <= MOST_OBJECTS + 1  # beside the content's the message itself
        and state.get_valid_message_ins(tree.object_id) is None
    )


def _own_question(state: SqlLinkState, request: Any, _key: bytes) -> bool:
    question = state.get_valid_message_ins(request.message_object_id)
    return question is not None and int64_to_uint64(question["dst_node_id"]) == request.node.node_id


def _always(_state: SqlLinkState, _request: Any, _key: bytes) -> bool:
    """Permit what Flower itself ties to the caller's node, and objects, whose names are hashes that only those know
    to whom they were told."""
    return True


def _never(_state: SqlLinkState, _request: Any, _key: bytes) -> bool:
    return False


_RULES: Mapping[str, Rule] = {
    "ActivateNode": _own_key,
    "DeactivateNode": _always,
    "SendNodeHeartbeat": _short_beat,
    "PullMessages": _always,
    "PushMessages": _own_reply,
    "PullObject": _always,
    "PushObject": _always,
    "ConfirmMessageReceived": _own_question,
}


if __name__ == "__main__":
    main()
