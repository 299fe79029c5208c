"""Freed memory is kept: a second block of the same size costs no page faults."""

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from shared.dp.memory import keep_freed_memory
assert keep_freed_memory()
torch.ones(1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of the GNU C library")
def test_a_second_block_comes_from_what_the_first_left():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    pages = (1 << 22) // resource.getpagesize()
    assert int(done.stdout) < pages / 10
