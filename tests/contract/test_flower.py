"""What of Flower 1.39 the aggregator sets otherwise: is it still where it sets it?"""

import subprocess
import sys

import pytest

NOTICING = """
import threading
from types import SimpleNamespace
from flwr.supercore.sql_mixin import SqlMixin
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from server import superlink
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
superlink.RLock = Noticing
"""
"""Lets the lock that the aggregator puts around Flower's sessions tell when somebody finds it taken."""
TWO_SESSIONS = """
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
    ("turns", "seen"),
    [
        ("superlink.take_turns()", "first in, second waits, first out, second in"),
        ("", "first in, second in, first out"),
    ],
)
def test_the_superlinks_threads_take_its_database_in_turns(turns: str, seen: str) -> None:
    program = NOTICING + turns + TWO_SESSIONS
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == seen
