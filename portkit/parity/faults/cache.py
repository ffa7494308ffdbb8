"""Faults of a cache: which keys it gives back, and at which positions new ones stand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from portkit.parity.faults.attending import Mask
from portkit.parity.faults.fault import Edit, Fault, Place, either, on, on_tables
from portkit.parity.faults.rotary import Heads, Rotation


def _past(*ways: str, sliding: bool = False, keys_only: bool = False) -> Edit:
    def edit(shown: Rotation | Heads, place: Place) -> Iterator[Rotation | Heads]:
        if place.site.endswith("#query") or (keys_only and not place.site.endswith("#key")):
            return
        if sliding and place.facts.window(place.facts.attention(place.site)) is None:
            return
        for way in ways:
            yield replace(shown, past=way)

    return either(on(Rotation, edit), on(Heads, edit))


def _held(by: int) -> Edit:
    def edit(mask: Mask, place: Place) -> Iterator[Mask]:
        if mask.window is not None:
            yield replace(mask, held=by)

    return on(Mask, edit)


FAULTS = (
    Fault(
        "cache.position_by_one",
        "counts the positions of decode steps one too far",
        "a step's position is the number of tokens before it",
        on_tables(lambda t, _: (replace(t, step_offset=1), replace(t, step_offset=-1))),
        needs=("continued",),
    ),
    Fault(
        "cache.positions_restart",
        "counts positions from 0 in every pass",
        "go on from the length of the cache",
        on_tables(lambda t, _: (replace(t, restarts=True),)),
        needs=("continued",),
    ),
    Fault(
        "cache.overwritten_early",
        "keeps one key too few in a sliding layer",
        "keep `sliding_window` - 1 keys beside the new one",
        either(_held(-1), _past("early", sliding=True)),
        needs=("window decoded",),
    ),
    Fault(
        "cache.overwritten_late",
        "keeps one key too many in a sliding layer, and shows it",
        "keep `sliding_window` - 1 keys beside the new one",
        either(_held(1), _past("late", sliding=True)),
        needs=("window decoded",),
    ),
    Fault(
        "cache.keys_before_rotation",
        "caches keys before their rotation, and rotates them by the step's own angles",
        "rotate a key by its own position, then cache it",
        _past("unrotated", keys_only=True),
        needs=("decoding",),
    ),
    Fault(
        "cache.stale_after_chunk",
        "loses the last key of an earlier pass",
        "store all tokens of a chunk, the last one too",
        _past("stale", "zeroed", "shifted"),
        needs=("continued",),
    ),
    Fault(
        "cache.padded_positions",
        "counts the padding among the positions of a padded row",
        "give a row's first real token position 0",
        on_tables(lambda t, _: (replace(t, counts_padding=True),)),
        needs=("left padding",),
    ),
)
