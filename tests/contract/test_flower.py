"""What of Flower 1.39 the aggregator sets otherwise: is it still where it sets it?"""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError, pull_objects
from flwr.superlink.grid import http_grid

from server.config import ServerConfig
from server.control import SUPERLINK, commands, pull_promptly


def test_the_grid_pulls_by_the_name_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_grid, "pull_objects", pull_objects)
    pull_promptly()
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
    monkeypatch.setattr(http_grid, "pull_objects", pull_objects)
    monkeypatch.setattr("server.control._UPLOAD_S", 0.0)
    pull_promptly()

    def never(name: str) -> bytes:
        raise ObjectUnavailableError(name)

    with pytest.raises(ObjectPullError):
        http_grid.pull_objects(["object"], never)


TWO_SESSIONS = """
from threading import Barrier, BrokenBarrierError, Thread
from types import SimpleNamespace
from flwr.supercore.sql_mixin import SqlMixin
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
state = SimpleNamespace(_session_factory=sessionmaker(create_engine("sqlite://")), _session_scope="one")
both_inside, met = Barrier(2, timeout=1.0), []
def enter():
    with SqlMixin.session(state), SqlMixin.session(state):  # Flower nests them
        try:
            both_inside.wait()
            met.append(True)
        except BrokenBarrierError:
            met.append(False)
threads = [Thread(target=enter) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(met)
"""


@pytest.mark.parametrize("in_turn", [True, False])
def test_the_superlinks_threads_take_its_database_in_turns(tmp_path: Path, in_turn: bool) -> None:
    config = ServerConfig(names=("localhost",), fleet_address="0.0.0.0", fleet_port=1, control_port=2, health_port=3)
    program = commands(tmp_path, config)[SUPERLINK][2]
    before = program[: program.index("import sys")] if in_turn else ""
    done = subprocess.run([sys.executable, "-c", before + TWO_SESSIONS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("[False, False]" if in_turn else "[True, True]")
