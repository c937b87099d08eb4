"""Keep freed memory in the process: a step frees and asks for the same megabytes again and again.

By default glibc gives blocks of that size back to the system at once, and every page of the next step
is then a fault of its own: at tables' sizes as much time as the step's arithmetic.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt(3)
_LARGEST = 32 << 20  # bytes; the most that glibc takes for the second


def keep_freed_memory() -> None:
    """Tell the allocator so, for the rest of the process. Does nothing where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST)
    mallopt(_TRIM_THRESHOLD, 1 << 30)
