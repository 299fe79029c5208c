"""What of Flower 1.39 the aggregator sets otherwise: is it still where it sets it?"""

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PushAppMessagesRequest, PushAppMessagesResponse
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    pull_objects,
    push_objects,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import http_grid

from server.config import ServerConfig
from server.control import SUPERLINK, commands
from server.grid import adapt_grid


@pytest.fixture(autouse=True)
def unadapted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave Flower's grid to the other tests as it was."""
    monkeypatch.setattr(http_grid, "pull_objects", pull_objects)
    monkeypatch.setattr(http_grid, "push_objects", push_objects)


class Runtime:
    """The SuperLink's own state behind a ServerApp's two calls, and sites that confirm as early as they can."""

    def __init__(self, folder: Path, hasty: set[int]) -> None:
        database = str(folder / "state.db")
        self.state = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database)).state()
        self.run = self.state.create_run(
            "a/b", "1.0", "0" * 64, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP
        )
        self.nodes = [self.state.create_node("<id:none>", "none", bytes([n]), 0, name=f"h{n}") for n in range(3)]
        for node in self.nodes:
            self.state.activate_node(node, 60.0)
        self.hasty = {self.nodes[n] for n in hasty}
        self.trees: dict[int, ObjectTree] = {}
        self.got: dict[int, bool] = {}

    def PushMessages(self, request: PushAppMessagesRequest) -> PushAppMessagesResponse:
        session, wanted = self.state.start_session(self.run), list[str]()
        for proto, tree in zip(request.messages_list, request.message_object_trees, strict=True):
            message = message_from_proto(proto)
            stored, missing = self.state.store_message_and_object_tree(message, tree, session)
            assert stored
            wanted += missing
            self.trees[message.metadata.dst_node_id] = tree
        self._sites()
        names = [tree.object_id for tree in self.trees.values()]
        return PushAppMessagesResponse(message_ids=names, objects_to_push=wanted, session_id=session)

    def PushObject(self, request: PushObjectRequest) -> PushObjectResponse:
        stored = self.state.store_object(self.run, request.session_id, request.object_id, request.object_content)
        self._sites()
        return PushObjectResponse(stored=stored)

    def _sites(self) -> None:
        """Let each site look whether its content is complete, and confirm; a hasty one confirms without it."""
        for node, tree in self.trees.items():
            (content,) = tree.children
            names = [item.object_id for item in iterate_object_tree(content)]
            complete = all(self.state.object_store.get(name) for name in names)
            if node not in self.got and (complete or node in self.hasty):
                self.got[node] = complete
                self.state.object_store.delete(tree.object_id)


@pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Flower readies its database
@pytest.mark.parametrize("hasty", [set(), {0}, {0, 1, 2}])
def test_no_site_ends_a_round_by_confirming_early(tmp_path: Path, hasty: set[int]) -> None:
    adapt_grid()
    assert "push_objects" in http_grid.HttpGrid._try_push_messages.__code__.co_names
    runtime = Runtime(tmp_path, hasty)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = runtime.run, SUPERLINK_NODE_ID, 1
    grid = SimpleNamespace(_runtime_client=runtime, node=Node(node_id=SUPERLINK_NODE_ID))
    content = RecordDict({"weights": ArrayRecord([np.arange(6.0)])})
    messages = [Message(content, node, "train") for node in runtime.nodes]
    for message in messages:
        message.metadata.__dict__["_message_id"] = message.object_id
    http_grid.HttpGrid._try_push_messages(grid, runtime.run, messages)  # raises where a push is refused
    assert runtime.got == {node: node not in runtime.hasty for node in runtime.nodes}


def test_the_grid_pulls_by_the_name_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    adapt_grid()
    assert "pull_objects" in http_grid.HttpGrid.pull_messages.__code__.co_names
    pauses: list[float] = []
    waits = [0.0, 0.0, 0.0]

    def pull(name: str) -> bytes:
        if waits:
            waits.pop()
            raise ObjectUnavailableError(name)
        return b"there"

    real = threading.Event.wait

    def wait(event: threading.Event, timeout: float | None = None) -> bool:
        if timeout is None:
            return real(event)
        pauses.append(timeout)
        return False

    monkeypatch.setattr(threading.Event, "wait", wait)
    assert http_grid.pull_objects(["object"], pull) == {"object": b"there"}
    assert len(pauses) == 3
    assert max(pauses) < 0.2, "not a second and more, for which every other reply would wait"


def test_an_object_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.grid._UPLOAD_S", 0.0)
    adapt_grid()

    def never(name: str) -> bytes:
        raise ObjectUnavailableError(name)

    with pytest.raises(ObjectPullError):
        http_grid.pull_objects(["object"], never)


NOTICING = """
import threading
from types import SimpleNamespace
from flwr.supercore.sql_mixin import SqlMixin
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
plain, seen, inside, moved = threading.RLock, [], threading.Event(), threading.Event()
class Noticing:
    def __init__(self):
        self.lock = plain()
    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            seen.append("second waits")
            moved.set()
            self.lock.acquire()
    def __exit__(self, *_):
        self.lock.release()
threading.RLock = Noticing
"""
"""Lets the lock that the aggregator puts around Flower's sessions tell when somebody finds it taken."""
TWO_SESSIONS = """
threading.RLock = plain
state = SimpleNamespace(_session_factory=sessionmaker(create_engine("sqlite://")), _session_scope="one")
def first():
    with SqlMixin.session(state), SqlMixin.session(state):  # Flower nests them
        seen.append("first in")
        inside.set()
        moved.wait()
        seen.append("first out")
def second():
    inside.wait()
    with SqlMixin.session(state), SqlMixin.session(state):
        seen.append("second in")
        moved.set()
threads = [threading.Thread(target=act) for act in (first, second)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(", ".join(seen))
"""
"""The first session stays open until the second has either begun or been found waiting: no time decides."""


@pytest.mark.parametrize(
    ("in_turn", "seen"),
    [
        (True, "first in, second waits, first out, second in"),
        (False, "first in, second in, first out"),
    ],
)
def test_the_superlinks_threads_take_its_database_in_turns(tmp_path: Path, in_turn: bool, seen: str) -> None:
    config = ServerConfig(names=("localhost",), fleet_address="0.0.0.0", fleet_port=1, control_port=2, health_port=3)
    program = commands(tmp_path, config)[SUPERLINK][2]
    before = program[: program.index("import sys")] if in_turn else ""
    program = NOTICING + before + TWO_SESSIONS
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == seen
