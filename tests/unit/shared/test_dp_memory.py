"""Freed memory is kept: after a few, a block of the same size costs no page faults."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from shared.dp.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(40):  # small blocks may sit in the first ones' gaps
    torch.ones(1 << 24)  # 64 MiB, which glibc would map afresh every time
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of the GNU C library")
def test_later_blocks_come_from_what_earlier_ones_left():
    faults = [
        int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "give-back")
    ]
    assert faults[0] < faults[1] / 4, faults


THREADS = """
import ctypes, sys, threading
from shared.dp.memory import share_arenas
if sys.argv[1] == "share":
    assert share_arenas()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
together = threading.Barrier(8)
def take():
    libc.malloc(64)
    together.wait()
threads = [threading.Thread(target=take) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
stdout = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, stdout)
libc.fflush(stdout)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_info is of the GNU C library")
def test_threads_share_two_arenas():
    arenas = [
        subprocess.run([sys.executable, "-c", THREADS, how], capture_output=True, text=True, check=True).stdout.count(
            "<heap nr="
        )
        for how in ("share", "one-each")
    ]
    assert arenas[0] <= 2 < arenas[1], arenas
