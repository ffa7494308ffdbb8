"""Faults of attention: its scale, its norms of heads, what stands between them and the kernel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from portkit.parity.faults.attending import Kernel
from portkit.parity.faults.fault import Edit, Fault, Place, either, on
from portkit.parity.faults.modules import Norm
from portkit.parity.faults.rotary import Heads, Rotation
from portkit.parity.faults.wiring import Copy


def _scales(kernel: Kernel, place: Place, scale: float) -> Iterable[Kernel]:
    return () if abs(scale / kernel.scale - 1) < 1e-12 else (replace(kernel, scale=scale),)


def _of_head_dim(kernel: Kernel, place: Place) -> Iterable[Kernel]:
    head_dim = place.scene.given(f"{place.facts.attention(place.site)}#query").shape[-1]
    return _scales(kernel, place, head_dim**-0.5)


def _of_hidden(kernel: Kernel, place: Place) -> Iterable[Kernel]:
    config = place.facts.config
    return _scales(kernel, place, (config.hidden_size / config.num_attention_heads) ** -0.5)


def _scaled_too(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    """The kernel's scale on the query as well; or its root on query and key."""
    own = place.recipe(f"{place.facts.attention(place.site)}#context")
    if isinstance(own, Kernel):
        yield from (replace(rotation, scale=one) for one in (own.scale, own.scale**0.5))


def _norm_missing(letter: str) -> Edit:
    def edit(rotation: Rotation, place: Place) -> Iterator[Rotation]:
        if rotation.source.endswith(f".{letter}_norm"):
            yield replace(rotation, source=f"{rotation.source}:in")

    def skipped(norm: Norm, place: Place) -> Iterator[Norm]:
        if place.site.endswith(f".{letter}_norm"):
            yield replace(norm, missing=True)

    return either(on(Rotation, edit), on(Norm, skipped))


def _other_head_norm(place: Place, source: str) -> Norm | None:
    other = re.sub(r"\.([qk])_norm", lambda m: f".{'k' if m[1] == 'q' else 'q'}_norm", source)
    found = place.recipe(other) if other != source else None
    return found if isinstance(found, Norm) else None


def _norms_swapped(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    other = _other_head_norm(place, rotation.source)
    if other is not None:
        yield replace(rotation, source=f"{rotation.source}:in", other_norm=other)


def _norm_swapped(norm: Norm, place: Place) -> Iterator[Norm]:
    other = _other_head_norm(place, place.site)
    if other is not None:
        yield replace(norm, weight=other.weight)


def _norm_after(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    """All of it; or the rotation that is lacking here, since it was made before the norm."""
    own = place.recipe(rotation.source)
    if isinstance(own, Norm) and rotation.turns:
        yield replace(rotation, source=f"{rotation.source}:in", norm_after=own)
        yield replace(rotation, style="none")


def _rotated_before(copy: Copy, place: Place) -> Iterator[Rotation]:
    """What a norm of heads is given was rotated already."""
    attention, _, norm = place.site.removesuffix(":in").rpartition(".")
    if norm in {"q_norm", "k_norm"}:
        own = place.recipe(f"{attention}#{'query' if norm == 'q_norm' else 'key'}")
        if isinstance(own, Rotation) and own.turns and own.source == f"{attention}.{norm}":
            yield replace(own, source=copy.of)


def _not_tempered(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    if rotation.temperature is not None:
        yield replace(rotation, temperature=None)


def _cooler(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    if rotation.temperature is not None:
        floor, scale = rotation.temperature
        for other in (floor + 1, floor - 1, 8192, 2 * floor, 1):
            if other not in (floor, 0):
                yield replace(rotation, temperature=(other, scale))


def _warmer(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    if rotation.temperature is not None:
        floor, scale = rotation.temperature
        for other in (0.1, 1.0, 0.2, 0.5):
            if other != scale:
                yield replace(rotation, temperature=(floor, other))


def _tempered_too(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    """As the layers without positions are."""
    if rotation.temperature is None and place.site.endswith("#query"):
        for attention in place.facts.attentions:
            site = f"{attention}#query"
            other = place.recipe(site) if place.is_known(site) else None
            if isinstance(other, Rotation) and other.temperature is not None:
                yield replace(rotation, temperature=other.temperature)
                return


def _norm_left_out(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    if rotation.style == "done":
        yield replace(rotation, source=f"{rotation.source}:in")


def _norm_before(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    """A norm that is given heads as they are projected, and what it makes is rotated."""
    if rotation.style == "done":
        inner = place.recipe(f"{rotation.source}:in")
        if isinstance(inner, Rotation):
            yield replace(rotation, style=inner.style, upcast=inner.upcast)
    elif place.site.endswith(":in"):
        yield replace(rotation, style="none")


def _tiled(kernel: Kernel, place: Place) -> Iterator[Kernel]:
    attention = place.facts.attention(place.site)
    query, key = (place.scene.given(f"{attention}#{role}") for role in ("query", "key"))
    if key.shape[1] not in (1, query.shape[1]):
        yield replace(kernel, tiled=True, parts=True)


def _capped(kernel: Kernel, place: Place) -> Iterator[Kernel]:
    for cap in (50.0, 30.0, 20.0, 5.0):
        yield replace(kernel, cap=cap)


def _value_rotated(heads: Heads, place: Place) -> Iterator[Heads]:
    own = place.recipe(f"{place.facts.attention(place.site)}#key")
    if isinstance(own, Rotation) and own.style == "done":
        own = place.recipe(f"{own.source}:in")
    if isinstance(own, Rotation) and own.turns:
        yield replace(heads, rotation=own)


FAULTS = (
    Fault(
        "attention.scale_missing",
        "does not scale the attention scores",
        "multiply them by the config's scale, usually head_dim ** -0.5",
        on(Kernel, lambda kernel, place: _scales(kernel, place, 1.0)),
    ),
    Fault(
        "attention.scale_of_head_dim",
        "scales the attention scores by head_dim ** -0.5, where this config has another scale",
        "use the config's own, as `query_pre_attn_scalar` ** -0.5",
        on(Kernel, _of_head_dim),
    ),
    Fault(
        "attention.scale_of_hidden",
        "scales the attention scores by (hidden_size / heads) ** -0.5, which is not head_dim here",
        "read `head_dim` of the config",
        on(Kernel, _of_hidden),
    ),
    Fault(
        "attention.scale_twice",
        "scales the attention scores twice",
        "torch's kernel scales by itself: do not scale the query too, or pass scale=1",
        either(
            on(Kernel, lambda kernel, place: _scales(kernel, place, kernel.scale**2)),
            on(Rotation, _scaled_too),
        ),
    ),
    Fault(
        "attention.q_norm_missing",
        "does not normalise the query",
        "apply `q_norm` to each head's query before the rotation",
        _norm_missing("q"),
        leaves_out=True,
    ),
    Fault(
        "attention.k_norm_missing",
        "does not normalise the key",
        "apply `k_norm` to each head's key before the rotation",
        _norm_missing("k"),
        leaves_out=True,
    ),
    Fault(
        "attention.qk_norms_swapped",
        "applies `q_norm` to the key and `k_norm` to the query",
        "exchange them",
        either(on(Rotation, _norms_swapped), on(Norm, _norm_swapped)),
    ),
    Fault(
        "attention.norm_after_rotation",
        "normalises query and key after their rotation",
        "normalise first, then rotate",
        either(on(Rotation, _norm_after), on(Copy, _rotated_before)),
    ),
    Fault(
        "attention.gqa_order",
        "lets query head i read key head i % groups",
        "repeat each key head in place: query head i reads i // repeats",
        on(Kernel, _tiled),
    ),
    Fault(
        "attention.softcap_applied",
        "caps attention scores softly, which the reference does not",
        "leave `attn_logit_softcapping` alone here",
        on(Kernel, _capped),
    ),
    Fault(
        "attention.value_rotated",
        "rotates the values as well",
        "rotate query and key alone",
        on(Heads, _value_rotated),
    ),
    Fault(
        "attention.temperature_missing",
        "does not scale the queries of layers without positions",
        "honour `attn_temperature_tuning`",
        on(Rotation, _not_tempered),
    ),
    Fault(
        "attention.temperature_floor",
        "has another `floor_scale` in its temperature",
        "log(1 + floor(tokens / floor_scale)), of tokens counted from 1",
        on(Rotation, _cooler),
        needs=("later tokens",),
    ),
    Fault(
        "attention.temperature_scale",
        "has another `attn_scale` in its temperature",
        "1 + attn_scale * log(1 + floor(tokens / floor_scale))",
        on(Rotation, _warmer),
        needs=("later tokens",),
    ),
    Fault(
        "attention.temperature_everywhere",
        "scales the queries of layers that rotate by the temperature too",
        "scale them in layers without positions alone",
        on(Rotation, _tempered_too),
        needs=("later tokens",),
    ),
    Fault(
        "attention.norm_after_rotation_missing",
        "does not normalise queries and keys after their rotation",
        "honour `use_qk_norm`",
        on(Rotation, _norm_left_out),
        leaves_out=True,
    ),
    Fault(
        "attention.norm_before_rotation",
        "normalises queries and keys before their rotation where this model does so after it",
        "rotate first, then normalise: without a weight it is the same but for rounding",
        on(Rotation, _norm_before),
    ),
)
