"""`portkit list`: the families that have a port."""

from __future__ import annotations

from portkit.cli import options
from portkit.cli.output import print_json, table


def command(json: options.Json = False) -> None:
    """List the supported families, by the `model_type` of their config.json."""
    from portkit.registry import find, registered

    found = [(name, find(name).summary, entry.value) for name, entry in registered().items()]
    if json:
        families = [{"model_type": n, "summary": s, "entry_point": e} for n, s, e in found]
        print_json("list", families=families)
        return
    print(table([("model_type", "what", "where"), *found]))
