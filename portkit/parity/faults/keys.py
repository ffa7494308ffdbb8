"""Faults of keys and values that layers share, and of a norm of values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from portkit.parity.faults.fault import Fault, Place, either, on
from portkit.parity.faults.modules import Norm
from portkit.parity.faults.rotary import Heads, Rotation
from portkit.parity.faults.sharing import Shared, owners


def _other_layer(shared: Shared, place: Place) -> Iterator[Shared]:
    role = place.site.partition("#")[2]
    for source in owners(place.scene, place.site)[::-1]:
        if f"{source}#{role}" != shared.of:
            yield replace(shared, of=f"{source}#{role}")


def _own(shared: Shared, place: Place) -> Iterator[Shared]:
    """Keys and values of its own, by the other layer's matrices, norms and kind of rotation."""
    source = place.recipe(shared.of) if place.is_known(shared.of) else None
    if isinstance(source, Rotation | Heads):
        norm = place.recipe(source.source)
        yield replace(
            shared,
            own=True,
            norm=norm if isinstance(norm, Norm) else None,
            rotation=source if isinstance(source, Rotation) else None,
        )


def _not_normalised(heads: Heads, place: Place) -> Iterator[Heads]:
    if heads.source.endswith(".v_norm"):
        yield replace(heads, source=f"{heads.source}:in")


def _norm_missing(norm: Norm, place: Place) -> Iterator[Norm]:
    if place.site.endswith(".v_norm"):
        yield replace(norm, missing=True)


FAULTS = (
    Fault(
        "attention.shared_from_wrong_layer",
        "gives a layer without keys of its own those of another layer than it should see",
        "the last layer of its own type among those that have keys",
        on(Shared, _other_layer),
    ),
    Fault(
        "attention.keys_not_shared",
        "makes keys and values of its own where this layer sees an earlier layer's",
        "use that layer's keys and values of the same pass, with all that its cache holds",
        on(Shared, _own),
    ),
    Fault(
        "attention.v_norm_missing",
        "does not normalise the value",
        "normalise each head's value, without a weight",
        either(on(Heads, _not_normalised), on(Norm, _norm_missing)),
        leaves_out=True,
    ),
)
