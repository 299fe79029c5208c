"""Freed memory is kept: after a few, a block of the same size costs no page faults."""

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from shared.dp.memory import keep_freed_memory
assert keep_freed_memory()
for _ in range(4):
    torch.ones(1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of the GNU C library")
def test_later_blocks_come_from_what_earlier_ones_left():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    pages = (1 << 22) // resource.getpagesize()
    assert int(done.stdout) < pages / 10
