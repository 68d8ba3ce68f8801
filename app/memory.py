"""What glibc's malloc is told, so that a server is as large after a hundred reloads as after the first."""

import contextlib
import ctypes

MMAP_THRESHOLD = -3
"""glibc's M_MMAP_THRESHOLD."""
LARGE = 1 << 20
"""Bytes from which a block is mapped for itself: most of a network's weights, and little of what a request asks for."""


def map_large_blocks() -> None:
    """Keep blocks of a mebibyte in mappings of their own, which go back to the system when they are freed.

    glibc does so at first, but raises its limit with every such block that is freed, up to 32 MiB. From then on weights
    lie between the small blocks of one of many arenas, and leave holes: 100 reloads under load made 40 MB of them.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc, which has no such call
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)


def give_back() -> None:
    """Return what was freed to the system; malloc would keep half as much again as the server needs."""
    with contextlib.suppress(OSError, AttributeError):  # as above
        ctypes.CDLL(None).malloc_trim(0)
