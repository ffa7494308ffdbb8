"""What the C library keeps of freed memory (glibc): how a comparison gives it back.

Activations come and go in sizes that leave holes in the library's heap; left to itself it would
keep half as much again as is in use. Where the library is another one nothing is done.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress


def release_freed_memory() -> None:
    """Give back to the system what was freed."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
