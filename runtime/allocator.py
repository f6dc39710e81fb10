"""Memory that a CPU run frees and takes again at every layer, kept by the process instead of given back in between.

glibc returns a large block to the system as soon as it is freed, and the next one is handed out page by page, each zeroed at
its first touch: up to half of the time of a step whose tensors are large.
"""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_KEPT = 1 << 25  # bytes of a block: the most that glibc admits
KEPT = 1 << 30  # bytes at the heap's end


def keep_freed_memory() -> bool:
    """Keep up to KEPT freed bytes, of blocks up to LARGEST_KEPT, for what comes next; whether this system can.

    Results are the same, and larger blocks are given back as before.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(set_option(M_MMAP_THRESHOLD, LARGEST_KEPT) and set_option(M_TRIM_THRESHOLD, KEPT))
