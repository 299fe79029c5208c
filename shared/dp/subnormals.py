"""Numbers below the normal format's range, and how long they take.

A processor handles subnormal numbers by microcode, many times as slowly as others. A server can choose weights under
which one patient's values are subnormal and nobody else's, and read off the time of a reply whether that patient was
there. So while a private step runs, such numbers are zero (flush-to-zero and denormals-are-zero).

The switch is a register of each thread's own (MXCSR on x86, FPCR on Arm). A thread inherits it from the one that
creates it, and torch's intra-op threads are created by the thread that first needs them and kept for that thread: GNU
OpenMP has a pool for each thread that opens parallel regions, and LLVM's copies the register at every region. So the
switch is set first of all in a fresh thread, which then does the work. Its pool is made after that, whatever this
process did before, and both end with the work. Evaluation and everything else in the process stays as it was.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_LOG = logging.getLogger(__name__)
_LARGE = 1 << 20
"""Numbers of a tensor that torch divides among all of its threads."""
_T = TypeVar("_T")


def with_subnormals_flushed(work: Callable[[], _T]) -> _T:
    """Return what ``work`` returns, or raise what it raises, in a thread where subnormal numbers count as zero.

    Where the processor cannot do so, that is logged and the work is done nevertheless.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="private", initializer=_flush) as thread:
        return thread.submit(work).result()


def subnormals_are_flushed() -> bool:
    """Whether all of torch's threads that work for this one take subnormal numbers as zero.

    Call it inside :func:`with_subnormals_flushed`, or anywhere to learn how it is there.
    """
    smallest = torch.finfo(torch.float32).tiny
    return bool((torch.full((_LARGE,), smallest) * 0.5 == 0.0).all())


def _flush() -> None:
    if not torch.set_flush_denormal(True):
        _LOG.warning("subnormals")
