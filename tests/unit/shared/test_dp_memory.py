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
