"""Work in processes of its own, each of which may die without taking the rest along.

Compressed pixels are decoded by a C++ library (GDCM) that ends its whole process on some damaged streams
(``std::terminate``). One such file must cost one nodule, not the intake. So each lane is a single spawned
process (fork is unsafe beside threads) that gets one item at a time and is replaced if it dies over it.
"""

import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from queue import SimpleQueue
from typing import TypeVar

from shared.errors import IntakeError

A = TypeVar("A")
B = TypeVar("B")


class Lanes:
    """A fixed number of lanes; a context manager, which ends their processes. None starts before it is needed.

    Args:
        count: How many. A single lane does in this process whatever cannot harm it.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._idle: SimpleQueue[_Lane] = SimpleQueue()

    def __enter__(self) -> "Lanes":
        for _ in range(self._count):
            self._idle.put(_Lane())
        return self

    def __exit__(self, *_exception: object) -> None:
        for _ in range(self._count):
            self._idle.get().close()

    def map(
        self,
        work: Callable[[A], B],
        items: Sequence[A],
        *,
        crashed: Callable[[A], B],
        isolate: Callable[[A], bool] = lambda _item: False,
    ) -> Iterator[B]:
        """Yield ``work(item)`` in the order of the items, or ``crashed(item)`` where its process died.

        ``work`` and the items must be picklable; ``isolate`` names the items that never run in this process.
        """

        def run(item: A) -> B:
            if self._count == 1 and not isolate(item):
                return work(item)
            lane = self._idle.get()
            try:
                return lane.run(work, item)
            except BrokenProcessPool:
                return crashed(item)
            finally:
                self._idle.put(lane)

        if self._count == 1:
            yield from map(run, items)
            return
        with ThreadPoolExecutor(self._count) as threads:  # they only wait for the processes
            yield from threads.map(run, items)


class _Lane:
    """One process, started when first needed and again after it died."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def run(self, work: Callable[[A], B], item: A) -> B:
        if self._pool is None:
            self._pool = _start()
        try:
            return self._pool.submit(work, item).result()
        except BrokenProcessPool:
            self.close()
            raise

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _start() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_keep_secrets)
    try:
        # A process that cannot even start says nothing about the item that it would have got.
        pool.submit(os.getpid).result()
    except BrokenProcessPool:
        raise IntakeError(
            "A reading process cannot be started. Check the free memory; in a script of your own, "
            'call intake under `if __name__ == "__main__"`.'
        ) from None
    return pool


def _keep_secrets() -> None:
    """Let a dying process leave neither a core dump, which would hold patients, nor the library's last words."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
