"""Does the port compute what the reference computes?

    import portkit.parity
    result = portkit.parity.compare(model, "google/gemma-3-270m")    # verdict, culprits, report
    portkit.parity.assert_parity(model, "google/gemma-3-270m")       # in a test
    portkit.parity.decode("google/gemma-3-270m")                     # every way of decoding

    from portkit.parity import record
    query = record("#query", query)      # in a port of your own: a site of its comparison

Importing this package imports nothing else: torch is loaded when a comparison is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from portkit.parity.sides.points import record

if TYPE_CHECKING:
    from portkit.parity.api import Result, assert_parity, compare, decode

_LAZY = ("Result", "assert_parity", "compare", "decode")

__all__ = ["Result", "assert_parity", "compare", "decode", "record"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module("portkit.parity.api"), name)
    raise AttributeError(f"module 'portkit.parity' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
