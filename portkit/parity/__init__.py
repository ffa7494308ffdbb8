"""Does the port compute what the reference computes?

    from portkit.parity import record
    query = record("#query", query)      # in a port of your own: a site of its comparison

Importing this package imports nothing else.
"""

from __future__ import annotations

from portkit.parity.points import record

__all__ = ["record"]
