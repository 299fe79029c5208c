"""The two constants of Flower 1.39 that the aggregator sets otherwise: are they still where it sets them?"""

import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

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


def test_the_superlink_waits_a_minute_for_its_own_database(tmp_path) -> None:
    config = ServerConfig(names=("localhost",), fleet_address="0.0.0.0", fleet_port=1, control_port=2, health_port=3)
    program = commands(tmp_path, config)[SUPERLINK][2]
    ask = """
import sqlite3
connection = sqlite3.connect(":memory:")
sql_mixin._set_sqlite_pragmas(connection, None)
print(connection.execute("PRAGMA busy_timeout").fetchone()[0])
"""
    prepared = program[: program.index("import sys")] + ask
    done = subprocess.run([sys.executable, "-c", prepared], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "60000"
    with closing(sqlite3.connect(":memory:")) as plain:
        assert plain.execute("PRAGMA busy_timeout").fetchone()[0] < 60_000
