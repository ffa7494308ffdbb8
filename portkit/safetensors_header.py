"""Where a safetensors file's header ends: eight bytes of length, little-endian, then so much JSON.

Knows the format's first bytes and its bound; reads no file, and does not know what the JSON says.
"""

from __future__ import annotations

LENGTH_BYTES = 8
MAX_BYTES = 100_000_000
"""The safetensors library's own limit: what announces more is damage, or another kind of file."""


def header_length(start: bytes) -> int | None:
    """Bytes of JSON that a file with these first bytes announces; None where it has no length."""
    if len(start) < LENGTH_BYTES:
        return None
    return int.from_bytes(start[:LENGTH_BYTES], "little")
