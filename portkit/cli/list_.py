"""`portkit list`: the families that have a port, and the variants to train from scratch."""

from __future__ import annotations

from portkit.cli import options
from portkit.cli.output import print_json, say
from portkit.columns import table


def command(json: options.Json = False) -> None:
    """List the supported families, by the `model_type` of their config.json, and variants."""
    from portkit.registry import find, registered, variants

    found = [(name, find(name).summary, entry.value) for name, entry in registered().items()]
    if json:
        families = [{"model_type": n, "summary": s, "entry_point": e} for n, s, e in found]
        print_json("list", families=families, variants=list(variants()))
        return
    print(table([("model_type", "what", "where"), *found]))
    print()
    say(f"to train from scratch: {', '.join(variants())}")
