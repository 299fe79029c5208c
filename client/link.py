"""The site's connection to the server: the one file that uses what Flower does not publish.

It speaks Flower 1.39's Fleet API (gRPC, TLS, every call signed with the site's key) through Flower's own generated
stub and message types. Flower's ready-made connection, ``grpc_request_response``, is not used: it ends the whole
process where it cannot connect, fixes the heartbeat, takes no channel options and holds the call that fetches code.
Of the Fleet API's calls this file keeps the eight below. ``GetFab``, by which a server hands out code, and ``GetRun``,
by which it hands out configuration, are not among them.

What Flower's private modules do is pinned by ``tests/contract/test_link.py`` against a real SuperLink.
"""

import random
import time
from threading import Event, Thread
from typing import Any, Self

import grpc  # type: ignore[import-untyped]
from flwr.app import Message
from flwr.app.message import make_message, remove_content_from_message
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import (
    FLWR_COMPONENT_NAME_METADATA_KEY,
    FLWR_PACKAGE_NAME_METADATA_KEY,
    FLWR_PACKAGE_VERSION_METADATA_KEY,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.version import package_name, package_version

from client.channel import PASSING, Backoff, Endpoint, LinkFault, Watch, fault_of
from shared.objects import MAX_MESSAGE_BYTES, content_from, object_names

_CALLS = (
    *("ActivateNode", "DeactivateNode", "SendNodeHeartbeat", "PullMessages", "PushMessages"),
    *("PullObject", "PushObject", "ConfirmMessageReceived"),
)
_HEADERS = (  # who calls; Flower's own helper would load its web framework, 11 MiB, into every daemon
    (FLWR_PACKAGE_NAME_METADATA_KEY, package_name),
    (FLWR_PACKAGE_VERSION_METADATA_KEY, package_version),
    (FLWR_COMPONENT_NAME_METADATA_KEY, "SuperNode"),
)
HEARTBEAT_S = 10.0  # the least that Flower permits: a dead site is noticed after two of these
_CALL_S, _OBJECT_CALL_S, _LAST_CALL_S = 30.0, 300.0, 1.5
_LAPSE_S = 1.0
_OBJECT_PAUSES_S = (0.02, 0.04, 0.08, 0.16, *[0.25] * 480)  # two minutes for a message's objects to arrive
_OBJECT_PATIENCE, _LONGEST_OBJECT_PAUSE_S = 3.0, 5.0
_SERVER_TRIES, _PUSH_TRIES = 5, 3


class Stopped(Exception):  # noqa: N818 - not an error
    """The daemon is ending; the call was not made or not finished."""


class LinkRefused(Exception):  # noqa: N818 - says what happened
    """The server refused a call, and repeating it on this connection would not help."""

    def __init__(self, fault: LinkFault) -> None:
        super().__init__(fault.value)
        self.fault = fault


class UnacceptableMessage(Exception):  # noqa: N818 - says what happened
    """A message came that is too large or makes no sense; ``envelope`` is what to reply to."""

    def __init__(self, envelope: Message) -> None:
        super().__init__("unacceptable message")
        self.envelope = envelope


class Link:
    """A node that is online at the server while the ``with`` block lasts.

    Calls that fail because the server is away are repeated until they succeed: the node stays the same node through
    any cut and any restart of the server, so a reply in hand is delivered as soon as the line is back.

    Args:
        endpoint: The server and this site's key.
        stop: Ends every wait; whatever is under way then raises :class:`Stopped`.
        watch: Is told how the connection fares.
        backoff: Pauses between attempts.
        previous_node: The node id of this key's last connection, if it may not have ended properly.
    """

    def __init__(
        self, endpoint: Endpoint, stop: Event, watch: Watch, backoff: Backoff, previous_node: int | None = None
    ) -> None:
        self._endpoint, self._stop, self._watch, self._backoff = endpoint, stop, watch, backoff
        self._previous_node = previous_node
        signing = NodeAuthClientInterceptor(endpoint.key, endpoint.key.public_key())
        self._channel = grpc.intercept_channel(endpoint.channel(), signing)
        stub = FleetStub(self._channel)
        self._calls = {name: getattr(stub, name) for name in _CALLS}
        self._node = Node()
        self._closed = Event()
        self._heart = Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def node_id(self) -> int:
        """The id that the server gave this key at enrolment."""
        return self._node.node_id

    def __enter__(self) -> Self:
        """Bring the node online. Raises LinkRefused or Stopped."""
        try:
            # After a crash the server still counts the node as online and would refuse it until its heartbeat
            # lapses; so the old connection is ended first. The pause lets a ServerApp that waits for an answer that
            # died with the crash see that the node was gone, instead of waiting until the round's deadline.
            if self._previous_node is not None and self._deactivate(self._previous_node):
                self._stop.wait(_LAPSE_S)
            public = public_key_to_bytes(self._endpoint.key.public_key())
            request = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_S)
            self._node = Node(node_id=self._call("ActivateNode", request).node_id)
        except BaseException:
            self._channel.close()
            raise
        self._heart.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        """Take the node offline; whether the server hears it does not matter."""
        self.abandon()
        self._channel.close()
        self._heart.join()

    def abandon(self) -> None:
        """Take the node offline within a second or two, from any thread."""
        self._closed.set()
        self._deactivate(self.node_id)

    def receive(self) -> Message | None:
        """Return the next message, or ``None`` if there is none.

        Raises:
            UnacceptableMessage: If the message is too large or cannot be put together.
            LinkRefused: If the server no longer knows this node.
            Stopped: If the daemon is ending.
        """
        answer = self._call("PullMessages", PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        envelope = _envelope(answer.messages_list[0])
        run = envelope.metadata.run_id
        try:
            # Of the message's objects only the content is fetched: its envelope is here already, and it is what the
            # server filed the message under, so the reply is made from it.
            (content,) = answer.message_object_trees[0].children
            contents = self._pull(run, content)
            identifier = envelope.metadata.message_id
            confirm = ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=identifier)
            self._call("ConfirmMessageReceived", confirm)
            return make_message(metadata=envelope.metadata, content=content_from(content.object_id, contents))
        except (LinkRefused, Stopped) as error:
            if isinstance(error, LinkRefused) and error.fault is LinkFault.RUN_OVER:
                return None
            if isinstance(error, LinkRefused) and error.fault is LinkFault.TOO_LARGE:
                raise UnacceptableMessage(envelope) from error
            raise
        except Exception as error:  # objects are the server's bytes: they may break Flower's parser anywhere
            raise UnacceptableMessage(envelope) from error

    def reply(self, reply: Message) -> bool:
        """Deliver a reply; return false if the server no longer takes it, because its run is over.

        How long the answer took is not told: it depends on the patients who were drawn.
        """
        run = reply.metadata.run_id
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree = get_object_tree(reply)
            contents = {name: item.deflate() for name, item in get_all_nested_objects(reply).items()}
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
        try:
            return any(self._push(run, request, contents) for _ in range(_PUSH_TRIES))
        except LinkRefused as error:
            if error.fault is LinkFault.RUN_OVER:
                return False
            raise

    def _push(self, run: int, request: PushMessagesRequest, contents: dict[str, bytes]) -> bool:
        """Push a reply and what the server lacks of it; false if the push session lapsed on the way."""
        answer = self._call("PushMessages", request)
        for name in answer.objects_to_push:
            part = PushObjectRequest(
                node=self._node,
                run_id=run,
                object_id=name,
                object_content=contents[name],
                session_id=answer.session_id,
            )
            if not self._call("PushObject", part, _OBJECT_CALL_S).stored:
                return False
        return True

    def _pull(self, run: int, tree: ObjectTree) -> dict[str, bytes]:
        """Return the contents of a message's objects, never holding more than the limit and one object."""
        contents: dict[str, bytes] = {}
        for name in object_names(tree):
            contents[name] = self._pull_object(run, name)
            if sum(map(len, contents.values())) > MAX_MESSAGE_BYTES:
                raise LinkRefused(LinkFault.TOO_LARGE)
        return contents

    def _pull_object(self, run: int, name: str) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=run, object_id=name)
        for pause_s in _OBJECT_PAUSES_S:
            asked = time.monotonic()
            answer = self._call("PullObject", request, _OBJECT_CALL_S)
            if answer.object_available:
                return bytes(answer.object_content)
            if not answer.object_found:
                break
            self._stop.wait(object_pause_s(pause_s, time.monotonic() - asked))
        raise ValueError("an announced object never came")

    def _call(self, name: str, request: Any, timeout_s: float = _CALL_S) -> Any:
        """Make one call, again and again while the server is merely away. Raises LinkRefused or Stopped."""
        attempt = 0
        while not self._stop.is_set():
            try:
                answer = self._calls[name](request, timeout=timeout_s, metadata=_HEADERS)
            except grpc.RpcError as error:
                fault = fault_of(error)
            else:
                self._watch.contact()
                return answer
            attempt += 1
            if fault not in PASSING and (fault is not LinkFault.SERVER or attempt >= _SERVER_TRIES):
                raise LinkRefused(fault)
            delay_s = self._backoff.delay_s(attempt)
            self._watch.fault(fault, attempt, delay_s)
            self._stop.wait(delay_s)
        raise Stopped

    def _deactivate(self, node_id: int) -> bool:
        try:
            request = DeactivateNodeRequest(node_id=node_id)
            self._calls["DeactivateNode"](request, timeout=_LAST_CALL_S, metadata=_HEADERS)
        except (grpc.RpcError, ValueError):  # ValueError: the channel is closed already
            return False
        return True

    def _beat(self) -> None:
        """Tell the server that the site lives, also while it trains."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S)
        while True:
            pause_s = HEARTBEAT_S * random.uniform(0.3, 0.5)  # noqa: S311 - spreads sites in time
            if self._closed.wait(pause_s):
                return
            try:
                self._calls["SendNodeHeartbeat"](request, timeout=HEARTBEAT_S / 2, metadata=_HEADERS)
            except grpc.RpcError as error:
                self._watch.fault(fault_of(error), 1, HEARTBEAT_S / 2)
            except ValueError:  # the channel is closed
                return
            else:
                self._watch.contact()


def object_pause_s(least_s: float, call_s: float) -> float:
    """Return how long to wait before asking again for an object that was announced and is not there yet.

    At least three times what the server took to answer, for who answers slowly has many to answer; but not after an
    outage, which a call sits out and which says nothing of the server.
    """
    return max(least_s, min(_OBJECT_PATIENCE * call_s, _LONGEST_OBJECT_PAUSE_S))


def _envelope(proto: Any) -> Message:
    """Return a message without its content. Raises UnacceptableMessage where Flower has no such kind of message."""
    try:
        return message_from_proto(proto)
    except ValueError as error:
        proto.metadata.message_type = "query.unknown"  # only to have something that can be replied to
        raise UnacceptableMessage(message_from_proto(proto)) from error
