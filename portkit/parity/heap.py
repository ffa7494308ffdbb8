"""What the C library keeps of freed memory (glibc): how a comparison holds no more than it uses.

Activations come and go in sizes that leave holes in the library's heap; left to itself it would
keep half as much again as is in use. Where the library is another one nothing is done.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_M_MMAP_THRESHOLD = -3  # in glibc's malloc.h
_MAPPED_BYTES = 1 << 20
_LARGEST_IN_HEAP_BYTES = 32 << 20
"""What glibc's own threshold grows to."""


@contextmanager
def large_tensors_mapped() -> Iterator[None]:
    """Have each tensor of a megabyte or more lie in pages of its own, which go when it does.

    Costs the time to map and clear them, so that smaller ones stay in the heap.
    """
    _set_threshold(_MAPPED_BYTES)
    try:
        yield
    finally:
        _set_threshold(_LARGEST_IN_HEAP_BYTES)


def release_freed_memory() -> None:
    """Give back to the system what smaller tensors have left in the heap."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _set_threshold(num_bytes: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, num_bytes)
