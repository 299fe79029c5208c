"""An in-process Flower ``Grid``: the real ``ServerApp`` and ``ClientApp`` on one machine, without a network.

With one worker, messages are answered in this process, one at each pull. With more, worker processes answer
them; each runs torch on one thread, so the results do not depend on the number of workers.
"""

import math
import multiprocessing
import signal
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    from client.app import SiteApp

_RUN_ID = 1
_SERVER_NODE = 1
_FIRST_NODE = 100


def answer(message: Message, folder: str, seed: int) -> Message:
    """Let the site in ``folder`` answer one message with the real ``ClientApp``."""
    from client.app import SITE_FOLDER  # noqa: PLC0415 - heavy, and needed in workers only

    node = message.metadata.dst_node_id
    context = Context(
        run_id=_RUN_ID,
        node_id=node,
        node_config={SITE_FOLDER: folder},
        state=RecordDict(),
        run_config={},
    )
    return _app_of(seed)(message, context)


@cache
def _app_of(seed: int) -> "SiteApp":
    """The worker's own, which keeps the stores that it opened."""
    from client.app import SiteApp  # noqa: PLC0415 - as above

    return SiteApp(seed)


def _start_worker() -> None:
    """One thread a worker; Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    import client.app  # noqa: F401, PLC0415 - pay for the import while the data is being made


class LocalGrid(Grid):
    """A grid whose nodes are site folders on this machine.

    Args:
        folders: One per node.
        seed: Makes the sites' noise repeatable.
        pool: Worker processes, or ``None`` to answer in this process.
    """

    def __init__(self, folders: Sequence[Path], seed: int, pool: ProcessPoolExecutor | None = None) -> None:
        self._seed = seed
        self._folders = {_FIRST_NODE + number: str(folder) for number, folder in enumerate(folders)}
        self._pool = pool
        self._pending: dict[str, Message | Future[Message]] = {}
        self._run = Run.create_empty(_RUN_ID)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, _SERVER_NODE, 1

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message (Flower's older way)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes, all of them connected."""
        return list(self._folders)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to the workers; return their ids."""
        identifiers = []
        for message in messages:
            identifier = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = identifier
            folder = self._folders[message.metadata.dst_node_id]
            self._pending[identifier] = (
                self._pool.submit(answer, message, folder, self._seed) if self._pool else message
            )
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are ready; without workers, answer the next message now."""
        replies = []
        for identifier in message_ids:
            item = self._pending.get(identifier)
            if isinstance(item, Message):
                replies.append(answer(item, self._folders[item.metadata.dst_node_id], self._seed))
                del self._pending[identifier]
                break
            if item is not None and item.done():
                replies.append(item.result())
                del self._pending[identifier]
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull until every reply is there or ``timeout`` seconds have passed."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting and time.monotonic() < end:
            arrived = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies.extend(arrived)
        return replies


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Yield ``workers`` fresh processes, or ``None`` for one; on the way out they are ended at once.

    Ending a worker in mid-round loses nothing: the reservation in its ledger is taken up again on resume.
    """
    if workers <= 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    finally:
        for process in list((pool._processes or {}).values()):  # no public way to end a busy worker in 3.11
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
