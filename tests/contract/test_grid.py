"""The ServerApp's grid against Flower's own state and handlers, and sites that do as they please."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.runtime import runtime_handlers

from server.grid import ServiceGrid
from shared.messages import is_undelivered

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Flower's database
HANDLERS = {
    "PushMessages": runtime_handlers.push_messages,
    "PushObject": runtime_handlers.push_object,
    "PullMessages": runtime_handlers.pull_messages,
    "PullObject": runtime_handlers.pull_object,
    "ConfirmMessageReceived": runtime_handlers.confirm_message_received,
}


class World:
    """Flower's state with three nodes, and what a ServerApp's client does with it."""

    def __init__(self, folder: Path) -> None:
        database = str(folder / "state.db")
        self.state = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database)).state()
        bundle, kind = ("a/b", "1.0", "0" * 64), TaskType.SERVER_APP
        self.run = self.state.create_run(*bundle, {}, NOOP_FEDERATION_ID, None, None, kind)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self.run, SUPERLINK_NODE_ID, 1
        (task,) = self.state.get_tasks(run_ids=[self.run])
        assert self.state.claim_task(task.task_id)
        assert self.state.activate_task(task.task_id)
        self.nodes = [self.state.create_node("<id:none>", "none", bytes([n]), 0, name=f"h{n}") for n in range(3)]
        for node in self.nodes:
            assert self.state.activate_node(node, 60.0)
        self.meanwhile: Callable[[], None] = lambda: None
        client = SimpleNamespace(**{name: partial(self._serve, name) for name in HANDLERS})
        run = SimpleNamespace(run_id=self.run)
        flower: Any = SimpleNamespace(_runtime_client=client, node=Node(node_id=SUPERLINK_NODE_ID), run=run)
        self.grid = ServiceGrid(flower)

    def _serve(self, name: str, request: Any) -> Any:
        answer = HANDLERS[name](request, self.state, SimpleNamespace(run_id=self.run))
        self.meanwhile()
        return answer

    def ask(self, nodes: list[int] | None = None) -> list[str]:
        content = RecordDict({"config": ConfigRecord({"weights": bytes(1000)})})
        return self.grid.push_messages([Message(content, node, "train") for node in nodes or self.nodes])

    def question(self, node: int) -> Message:
        (message,) = self.state.get_message_ins(node_id=node, limit=1)
        return message

    def announce(self, reply: Message, name: str, tree: ObjectTree) -> tuple[str, list[str]]:
        """File a reply; return its session and the objects that it lacks."""
        reply.metadata.__dict__["_message_id"] = name
        session = self.state.start_session(self.run)
        stored, lacking = self.state.store_message_and_object_tree(remove_content_from_message(reply), tree, session)
        assert stored
        return session, lacking

    def send(self, session: str, lacking: list[str], objects: dict[str, bytes]) -> None:
        for name in lacking:
            assert self.state.store_object(self.run, session, name, objects[name])

    def answer(self, node: int, content: RecordDict, keep: int = 0) -> Callable[[], None]:
        """Announce a reply and send all of its objects but the last ``keep``; return what sends these."""
        reply = Message(content, reply_to=self.question(node))
        objects = {name: item.deflate() for name, item in get_all_nested_objects(reply).items()}
        session, lacking = self.announce(reply, reply.object_id, get_object_tree(reply))
        split = len(lacking) - keep
        self.send(session, lacking[:split], objects)
        return lambda: self.send(session, lacking[split:], objects)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def true(number: int = 1) -> RecordDict:
    return RecordDict({"config": ConfigRecord({"true": number})})


def test_questions_and_answers_go_there_and_back(world: World) -> None:
    asked = world.ask()
    for number, node in enumerate(world.nodes[:2]):
        world.answer(node, true(number))
    replies = {reply.metadata.reply_to_message_id: reply for reply in world.grid.pull_messages(asked)}
    assert [replies[name].content for name in asked[:2]] == [true(0), true(1)]
    assert [replies[name].metadata.src_node_id for name in asked[:2]] == world.nodes[:2]
    assert set(replies) == set(asked[:2])
    assert list(world.grid.pull_messages(asked[2:])) == []


@pytest.mark.parametrize("hasty", [set(), {0}, {0, 1, 2}])
def test_no_site_ends_a_round_by_confirming_early(world: World, hasty: set[int]) -> None:
    """Each site confirms the moment it has the content, a hasty one without it, while the ServerApp still pushes."""
    questions: dict[int, ObjectTree] = {}
    complete: dict[int, bool] = {}

    def sites() -> None:
        for index, node in enumerate(world.nodes):
            for message in world.state.get_message_ins(node_id=node, limit=1):
                questions[node] = world.state.object_store.get_object_tree(message.metadata.message_id)
            if node in questions and node not in complete:
                (content,) = questions[node].children
                whole = all(world.state.object_store.get(item.object_id) for item in iterate_object_tree(content))
                if whole or index in hasty:
                    complete[node] = whole
                    world.state.object_store.delete(questions[node].object_id)

    world.meanwhile = sites
    assert all(world.ask())
    assert complete == {node: index not in hasty for index, node in enumerate(world.nodes)}


def made(kind: str, body: bytes, children: tuple[str, ...] = ()) -> tuple[str, bytes]:
    content = f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body
    return get_object_id(content), content


def _not_json() -> tuple[str, ObjectTree, dict[str, bytes]]:
    array, array_bytes = made("Array", b"not json")
    record, record_bytes = made("RecordDict", b"{}", (array,))
    root, root_bytes = made("Message", b"", (record,))
    tree = ObjectTree(object_id=record, children=[ObjectTree(object_id=array)])
    return (
        root,
        ObjectTree(object_id=root, children=[tree]),
        {array: array_bytes, record: record_bytes, root: root_bytes},
    )


def _garbage() -> tuple[str, ObjectTree, dict[str, bytes]]:
    record, record_bytes = made("RecordDict", b"\xff\xff\xff")
    root, root_bytes = made("Message", b"\xff", (record,))
    return (
        root,
        ObjectTree(object_id=root, children=[ObjectTree(object_id=record)]),
        {record: record_bytes, root: root_bytes},
    )


def _childless() -> tuple[str, ObjectTree, dict[str, bytes]]:
    root, root_bytes = made("Message", b"\xff")
    return root, ObjectTree(object_id=root), {root: root_bytes}


def _no_message() -> tuple[str, ObjectTree, dict[str, bytes]]:
    record = true()
    objects = {name: item.deflate() for name, item in get_all_nested_objects(record).items()}
    return record.object_id, get_object_tree(record), objects


def _unfolding() -> tuple[str, ObjectTree, dict[str, bytes]]:
    """Flower joins an array's pieces as often as it names them: here four bytes become gigabytes."""
    content = RecordDict({"arrays": ArrayRecord({"weights": Array("float32", (1,), "numpy.ndarray", bytes(4))})})
    objects = {name: item.deflate() for name, item in get_all_nested_objects(content).items()}
    array, old = next((name, item) for name, item in objects.items() if item.startswith(b"Array "))
    head, body = old.split(b"\0", 1)
    piece = head.split(b" ")[1].decode()
    body = body.replace(b"[0]", b"[" + b",".join([b"0"] * 1000) + b"]")
    new, content_bytes = made("Array", body, (piece,))
    del objects[array]
    record, record_bytes = made("ArrayRecord", b'{"weights":"%s"}' % new.encode(), (new,))
    top, top_bytes = made("RecordDict", b'{"arrays":"%s"}' % record.encode(), (record,))
    root, root_bytes = made("Message", b"", (top,))
    leaf = ObjectTree(object_id=new, children=[ObjectTree(object_id=piece)])
    tree = ObjectTree(object_id=top, children=[ObjectTree(object_id=record, children=[leaf])])
    sent = {piece: objects[piece], new: content_bytes, record: record_bytes, top: top_bytes, root: root_bytes}
    return root, ObjectTree(object_id=root, children=[tree]), sent


@pytest.mark.parametrize("hostile", [_not_json, _garbage, _childless, _no_message, _unfolding])
def test_one_unreadable_reply_is_one_sites_loss(
    world: World, hostile: Callable[[], tuple[str, ObjectTree, dict[str, bytes]]]
) -> None:
    asked = world.ask()
    root, tree, objects = hostile()
    session, lacking = world.announce(Message(true(), reply_to=world.question(world.nodes[0])), root, tree)
    world.send(session, lacking, objects)
    world.answer(world.nodes[1], true())
    replies = {reply.metadata.src_node_id: reply for reply in world.grid.pull_messages(asked)}
    assert set(replies) == set(world.nodes[:2])
    assert not replies[world.nodes[0]].content
    assert replies[world.nodes[1]].content == true()


def test_a_reply_on_its_way_keeps_no_other_waiting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = world.ask()
    finish = world.answer(world.nodes[0], true(0), keep=2)
    world.answer(world.nodes[1], true(1))
    monkeypatch.setattr(threading.Event, "wait", lambda *_a: pytest.fail("it waited"))
    (reply,) = world.grid.pull_messages(asked)
    assert reply.metadata.src_node_id == world.nodes[1]
    waited_for = [asked[0], asked[2]]
    assert list(world.grid.pull_messages(waited_for)) == []
    finish()
    (reply,) = world.grid.pull_messages(waited_for)
    assert (reply.metadata.src_node_id, reply.content) == (world.nodes[0], true(0))


def test_a_reply_that_never_comes_counts_as_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.grid._UPLOAD_S", -1.0)
    asked = world.ask()
    world.answer(world.nodes[0], true(), keep=3)
    (reply,) = world.grid.pull_messages(asked)
    assert is_undelivered(reply)
    assert reply.metadata.reply_to_message_id == asked[0]


def test_too_large_a_reply_is_not_put_together(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.grid.MAX_MESSAGE_BYTES", 10_000)
    asked = world.ask()
    world.answer(world.nodes[0], RecordDict({"config": ConfigRecord({"weights": bytes(20_000)})}))
    (reply,) = world.grid.pull_messages(asked)
    assert not reply.content


def test_an_error_arrives_as_what_it_is(world: World) -> None:
    asked = world.ask()
    reply = Message(Error(1000, "budget-exceeded"), reply_to=world.question(world.nodes[0]))
    root, content = made("Message", b"\xff")
    session, lacking = world.announce(reply, root, ObjectTree(object_id=root))
    world.send(session, lacking, {root: content})
    (got,) = world.grid.pull_messages(asked)
    assert (got.error.code, got.error.reason, got.metadata.src_node_id) == (1000, "budget-exceeded", world.nodes[0])
