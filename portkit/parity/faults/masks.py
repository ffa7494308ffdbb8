"""Faults of what a query sees: windows, chunks, layers' types, the causal diagonal, padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from portkit.parity.faults.attending import Kernel, Mask
from portkit.parity.faults.fault import Edit, Fault, Place, either, on
from portkit.parity.faults.rotary import Tables
from portkit.parity.faults.scene import in_layer, layer_of


def _window(by: int) -> Edit:
    def mask(one: Mask, place: Place) -> Iterator[Mask]:
        if one.window is not None:
            yield replace(one, window=one.window + by)

    return _masked(mask)


def _masked(edit: Edit) -> Edit:
    """A mask, or the keys that a kernel itself leaves out."""

    def kernel(one: Kernel, place: Place) -> Iterator[Kernel]:
        own = place.recipe(f"{place.facts.attention(place.site)}#mask")
        if isinstance(own, Mask):
            for other in edit(own, place):
                assert isinstance(other, Mask)
                yield replace(one, mask=other)

    return either(on(Mask, edit), on(Kernel, kernel))


def _ignored(mask: Mask, place: Place) -> Iterator[Mask]:
    if mask.window is not None:
        yield replace(mask, window=None)


def _everywhere(mask: Mask, place: Place) -> Iterator[Mask]:
    if mask.window is None:
        yield from (replace(mask, window=one) for one in place.facts.windows())


def _shifted(mask: Mask, place: Place) -> Iterator[Mask]:
    layer = layer_of(place.site)
    for other in () if layer is None else (layer - 1, layer + 1):
        name = in_layer(place.facts.attention(place.site), other)
        if name in place.facts.modules and place.facts.window(name) != mask.window:
            yield replace(mask, window=place.facts.window(name))


def _shifted_with_tables(mask: Mask, place: Place) -> Iterator[Mask]:
    if len(place.facts.rope_kinds()) > 1:
        yield from _shifted(mask, place)


def _other_type(tables: Tables, place: Place) -> Iterator[Tables]:
    """The tables of a neighbouring layer's type."""
    for layer in (place.layer or 0) - 1, (place.layer or 0) + 1:
        site = in_layer(place.site, layer)
        other = place.recipe(site) if ":in." in site and site in place.scene.trace else None
        if isinstance(other, Tables) and other.kind != tables.kind:
            yield other


def _within(change: Callable[[Mask, int], Iterable[Mask]]) -> Edit:
    """The mask of a layer that attends within chunks."""

    def mask(one: Mask, place: Place) -> Iterator[Mask]:
        if one.chunk is not None:
            yield from change(one, one.chunk)

    return _masked(mask)


def _chunk_by(by: int) -> Edit:
    """Chunks begin a token late or early: the first one, or each of them."""
    return _within(
        lambda one, length: (replace(one, chunk_offset=-by), replace(one, chunk=length + by))
    )


def _causal(by: int) -> Edit:
    return _masked(on(Mask, lambda one, _: (replace(one, ahead=one.ahead + by),)))


FAULTS = (
    Fault(
        "attention.window_plus_one",
        "has a window one key too wide",
        "a token sees itself and `sliding_window` - 1 before it",
        _window(1),
        needs=("window crossed",),
    ),
    Fault(
        "attention.window_minus_one",
        "has a window one key too narrow",
        "a token sees itself and `sliding_window` - 1 before it",
        _window(-1),
        needs=("window crossed",),
    ),
    Fault(
        "attention.window_ignored",
        "lets a sliding layer see everything",
        "limit the layers that `layer_types` calls sliding",
        _masked(on(Mask, _ignored)),
        needs=("window crossed",),
    ),
    Fault(
        "attention.window_everywhere",
        "limits a full layer to the window",
        "limit only the layers that `layer_types` calls sliding",
        _masked(on(Mask, _everywhere)),
        needs=("window crossed",),
    ),
    Fault(
        "attention.window_pattern_shifted",
        "has the pattern of sliding and full layers shifted by one",
        "take each layer's type from `layer_types`",
        _masked(on(Mask, _shifted)),
        needs=("window crossed",),
    ),
    Fault(
        "attention.types_shifted",
        "takes each layer's type from a neighbouring layer, its rotary tables with it",
        "layer i has the type `layer_types[i]`, counted from 0",
        either(on(Tables, _other_type), _masked(on(Mask, _shifted_with_tables))),
    ),
    Fault(
        "attention.causal_plus_one",
        "lets a token see the next one",
        "the diagonal of the causal mask is 0",
        _causal(1),
        needs=("several tokens",),
    ),
    Fault(
        "attention.causal_minus_one",
        "does not let a token see itself",
        "the diagonal of the causal mask belongs to what is seen",
        _causal(-1),
    ),
    Fault(
        "attention.padding_ignored",
        "lets tokens see the padding",
        "mask the keys where the attention mask is 0",
        _masked(on(Mask, lambda one, _: (replace(one, padding=False),))),
        needs=("left padding",),
    ),
    Fault(
        "attention.chunk_as_window",
        "slides a window over the past where this layer attends within chunks",
        "a token sees those of its own chunk of `attention_chunk_size` alone",
        _within(lambda one, _: (replace(one, chunk=None),)),
        needs=("window decoded",),
    ),
    Fault(
        "attention.chunk_plus_one",
        "begins a chunk a token late",
        "the chunk of a token is its place // `attention_chunk_size`",
        _chunk_by(1),
        needs=("window decoded",),
    ),
    Fault(
        "attention.chunk_minus_one",
        "begins a chunk a token early",
        "the chunk of a token is its place // `attention_chunk_size`",
        _chunk_by(-1),
        needs=("window decoded",),
    ),
)
