"""How the C library handles memory.

A step frees and asks for the same megabytes again and again; each time the system would map and clear fresh pages,
about a tenth of a step's time on the machine of ``docs/performance.md``. What a process keeps instead is what a step
used at once, and the gaps between its blocks.
"""

import ctypes
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES, _ARENAS = 1 << 30, 2


@cache
def keep_freed_memory() -> bool:
    """Have the GNU C library keep what is freed; return whether there is one to tell."""
    return _told((_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_MMAP_THRESHOLD, _KEPT_BYTES))


@cache
def share_arenas() -> bool:
    """Have all threads that start from now on take memory from two pools; return whether there is such a library.

    With a pool each, every thread keeps what others could use: a daemon grew by 12 MiB.
    """
    return _told((_M_ARENA_MAX, _ARENAS))


def _told(*options: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    return all(mallopt(option, value) == 1 for option, value in options)
