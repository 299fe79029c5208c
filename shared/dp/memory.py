"""Keep the C library from giving memory back to the system after every step.

A step frees and asks for the same megabytes again and again; each time the system would map and clear fresh pages,
about a tenth of a step's time on the machine of ``docs/performance.md``. The process's peak is the same either way.
"""

import ctypes
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30


@cache
def keep_freed_memory() -> bool:
    """Tell the GNU C library so, once per process; return whether there is one to tell."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    done = [mallopt(option, _KEPT_BYTES) for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD)]
    return done == [1, 1]
