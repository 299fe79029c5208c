"""How a round's messages get to Flower's SuperLink and the sites' replies from it, whatever one of the sites does.

Flower 1.39's own grid trusts every site. Where it pushes what the messages share before the messages themselves, a
site that confirms at once ends the ServerApp; one reply that cannot be put together ends it too; a reply that was
announced and never sent keeps it from all others; and a small reply may unfold to any size. Here none of these is more
than that site's own loss, and weights are there within milliseconds where Flower sleeps for a second and more.
"""

import logging
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode as FlowerErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.superlink.grid.http_grid import HttpGrid

from shared.errors import ProtocolError
from shared.objects import MAX_MESSAGE_BYTES, content_from, object_names

_LOG = logging.getLogger(__name__)
_UPLOAD_S = 120.0


@dataclass
class _Parcel:
    """A reply that was announced; its objects come when the site has sent them."""

    metadata: Metadata
    name: str
    missing: list[str]
    until: float
    contents: dict[str, bytes] = field(default_factory=dict)


class ServiceGrid:
    """The ServerApp's connection to the SuperLink.

    Args:
        grid: Flower's, for its connection and run.
    """

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._parcels: dict[str, _Parcel] = {}

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are connected."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Collection[Message]) -> list[str]:
        """Send messages; return the id of each, empty for one that the SuperLink does not take.

        The messages' own objects are pushed before what they share. A site confirms a message when it has the content,
        and the SuperLink then deletes the message: pushing it only now would be an error. A site that confirms what
        it never fetched has its question deleted before it is complete; that push is refused, and harms nobody else.
        """
        protos, trees, objects = [], [], dict[str, InflatableObject]()
        with no_object_id_recompute():
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
                protos.append(message_to_proto(remove_content_from_message(message)))
                trees.append(get_object_tree(message))
                objects |= get_all_nested_objects(message)
            request = PushAppMessagesRequest(messages_list=protos, message_object_trees=trees)
            answer = self._grid._runtime_client.PushMessages(request)
            wanted = set(answer.objects_to_push)
            for name, item in sorted(objects.items(), key=lambda pair: not isinstance(pair[1], Message)):
                if name in wanted:
                    self._push(answer.session_id, name, item)
        return [identifier or "" for identifier in answer.message_ids]

    def pull_messages(self, message_ids: Collection[str]) -> Iterator[Message]:
        """Yield the replies to some questions that have arrived whole; nothing is waited for.

        A reply that cannot be put together is yielded without any content. One that is not there ``_UPLOAD_S`` after
        it was announced is yielded as undelivered. Who it is from is what the SuperLink knows, never what it says.
        """
        expected = [name for name in message_ids if name not in self._parcels]  # of those Flower has told
        answer = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=expected))
        for proto, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            if proto.metadata.reply_to_message_id not in expected:
                continue  # nobody asked
            if proto.HasField("error"):
                self._confirm(proto.metadata.message_id)
                yield message_from_proto(proto)
            else:
                self._parcels[proto.metadata.reply_to_message_id] = _parcel(proto, tree)
        for question, parcel in list(self._parcels.items()):
            if reply := self._open(parcel):
                del self._parcels[question]
                self._confirm(parcel.metadata.message_id)
                yield reply

    def _open(self, parcel: _Parcel) -> Message | None:
        """Return a reply as far as it can be known now: ``None`` while its objects are on their way."""
        try:
            while parcel.missing:
                arrived = self._pull(parcel.missing[0])
                if arrived is None:
                    return None if time.monotonic() < parcel.until else _undelivered(parcel.metadata)
                parcel.contents[parcel.missing.pop(0)] = arrived
                if sum(map(len, parcel.contents.values())) > MAX_MESSAGE_BYTES:
                    raise ProtocolError("The reply is too large.")
            content = content_from(parcel.name, parcel.contents)
        except ProtocolError:
            _LOG.warning("reply cannot be read", extra={"node": parcel.metadata.src_node_id})
            content = RecordDict()
        except _Gone:
            return _undelivered(parcel.metadata)
        return make_message(metadata=parcel.metadata, content=content)

    def _push(self, session: str, name: str, item: InflatableObject) -> None:
        part = PushObjectRequest(
            node=self._grid.node,
            run_id=self._run,
            object_id=name,
            object_content=item.deflate(),
            session_id=session,
        )
        if not self._grid._runtime_client.PushObject(part).stored:
            _LOG.warning("part of a message was not taken", extra={"kind": type(item).__name__})

    def _pull(self, name: str) -> bytes | None:
        """Return an object, or ``None`` if it has not arrived yet. Raises _Gone."""
        request = PullObjectRequest(node=self._grid.node, run_id=self._run, object_id=name)
        answer = self._grid._runtime_client.PullObject(request)
        if not answer.object_found:
            raise _Gone
        return bytes(answer.object_content) if answer.object_available else None

    def _confirm(self, name: str) -> None:
        request = ConfirmMessageReceivedRequest(node=self._grid.node, run_id=self._run, message_object_id=name)
        self._grid._runtime_client.ConfirmMessageReceived(request)

    @property
    def _run(self) -> int:
        return self._grid.run.run_id


class _Gone(Exception):  # noqa: N818 - says what happened
    """An announced object will not come any more."""


def _parcel(proto: ProtoMessage, tree: ObjectTree) -> _Parcel:
    """Return a reply that is to be fetched; one of a shape that no reply has is to be opened as it is, with nothing."""
    try:
        (content,) = tree.children
        name, missing = content.object_id, object_names(content)
    except (ValueError, ProtocolError):
        name, missing = "", []
    return _Parcel(metadata_from_proto(proto.metadata), name, missing, time.monotonic() + _UPLOAD_S)


def _undelivered(metadata: Metadata) -> Message:
    return make_message(metadata=metadata, error=Error(FlowerErrorCode.MESSAGE_UNAVAILABLE, ""))
