"""Faults of rotary positions: other frequencies, other positions, another form of the rotation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from portkit.parity.faults.fault import Edit, Fault, Place, either, on, on_tables
from portkit.parity.faults.modules import Norm
from portkit.parity.faults.rotary import Rotation, Tables, unscaled
from portkit.parity.faults.scene import in_layer

_THETAS = (1e4, 5e5, 1e6, 1e5, 1.5e5, 5e6, 1e7, 2e4, 5e4)
_FACTORS = (8.0, 32.0, 16.0, 4.0, 2.0, 1.0, 40.0, 64.0)
_HIGH = (4.0, 8.0, 2.0, 16.0)
_FAST = (32.0, 16.0, 64.0, 8.0)
_SLOW = (1.0, 2.0, 4.0, 0.5)
_CONTEXTS = (8192, 2048, 4096, 16384, 32768, 1024, 512, 256, 128, 40960, 65536, 131072)

Change = Callable[[dict[str, Any], Place], Iterable[dict[str, Any]]]


def _parameters(change: Change) -> Edit:
    """Tables of other rotary parameters, in the config's words."""

    def edit(tables: Tables, place: Place) -> Iterator[Tables]:
        before = dict(tables.parameters)
        for after in change(before, place):
            if after != before:
                yield replace(tables, parameters=tuple(sorted(after.items())))

    return on_tables(edit)


def _field(rope_type: str | None, key: str, values: Iterable[Any], default: Any = None) -> Edit:
    """Each of the usual values of one parameter that the model does not have."""

    def change(before: dict[str, Any], place: Place) -> Iterator[dict[str, Any]]:
        if rope_type in (None, before.get("rope_type")):
            context = place.facts.config.max_position_embeddings
            for value in (*values, *([context] if "original" in key else [])):
                if value != before.get(key, default):
                    yield {**before, key: value}

    return _parameters(change)


def _is_scaled(parameters: dict[str, Any]) -> bool:
    return bool(parameters.get("rope_type", "default") != "default")


def _unscaled(before: dict[str, Any], place: Place) -> Iterator[dict[str, Any]]:
    if _is_scaled(before):
        yield unscaled(before)


def _twice(tables: Tables, place: Place) -> Iterator[Tables]:
    if _is_scaled(dict(tables.parameters)):
        yield from (replace(tables, times=2, amplified=times) for times in (2, 1))


def _others(tables: Tables, place: Place) -> Iterator[tuple[str, dict[str, Any]]]:
    """Other layer types and their parameters."""
    for kind in place.facts.rope_kinds():
        if kind != tables.kind:
            yield kind, place.facts.rope_parameters(kind) or {}


def _exchanged(tables: Tables, place: Place) -> Iterator[Tables]:
    """Parameters alone: a model may have no layer of the other type, and no tables of it."""
    for _, other in _others(tables, place):
        yield replace(tables, parameters=tuple(sorted(other.items())))


def _scaled_too(tables: Tables, place: Place) -> Iterator[Tables]:
    own = dict(tables.parameters)
    for _, other in _others(tables, place):
        if _is_scaled(other) and not _is_scaled(own):
            scaled = {**other, "rope_theta": own["rope_theta"]}
            yield replace(tables, parameters=tuple(sorted(scaled.items())))


def _no_ramp(before: dict[str, Any], place: Place) -> Iterator[dict[str, Any]]:
    """Long waves stretched, all others kept: the ramp shrinks to nothing at its long end."""
    if before.get("rope_type") == "llama3":
        low, high = before["low_freq_factor"], before["high_freq_factor"]
        yield {**before, "high_freq_factor": low * (1 + 1e-9)}
        yield {**before, "low_freq_factor": high * (1 - 1e-9)}


def _truncate(before: dict[str, Any], place: Place) -> Iterator[dict[str, Any]]:
    if before.get("rope_type") == "yarn":
        yield {**before, "truncate": not before.get("truncate", True)}


def _yarn_attention(before: dict[str, Any], place: Place) -> Iterator[dict[str, Any]]:
    if before.get("rope_type") == "yarn":
        bare = {k: v for k, v in before.items() if "mscale" not in k}
        yield {**bare, "attention_factor": 1.0}
        yield {k: v for k, v in bare.items() if k != "attention_factor"}


def _tables(**changes: Any) -> Edit:
    return on_tables(lambda tables, place: (replace(tables, **changes),))


def _angles(tables: Tables, place: Place) -> Iterator[Tables]:
    for form in ("product", "angle"):
        yield replace(tables, low_angles=form)


def _neighbours(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    if rotation.style == "half":
        for style in ("pairs", "parted", "neighbours"):
            yield replace(rotation, style=style)


def _halves(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    if rotation.turns and rotation.style != "half":
        for style in ("half", "halved"):
            yield from (replace(rotation, style=style, upcast=wide) for wide in (True, False))


def _paired(now: bool) -> Edit:
    def edit(tables: Tables, place: Place) -> Iterable[Tables]:
        as_now = tables.polar or tables.paired == now
        return () if as_now else (replace(tables, paired=now),)

    return on(Tables, edit)


def _turned(rotation: Rotation, place: Place) -> Iterable[Rotation]:
    return (replace(rotation, sign=-rotation.sign),) if rotation.turns else ()


def _not_rotated(rotation: Rotation, place: Place) -> Iterable[Rotation]:
    return (replace(rotation, style="none"),) if rotation.turns else ()


def _rotated_too(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    """As another layer rotates, whatever else this layer does instead."""
    if rotation.style == "none":
        for attention in place.facts.attentions:
            other = _of_attention(place, attention)
            if other is not None and other.style != "none":
                yield _placed_as(place, other)
                yield _placed_as(place, other, tempered=False)
                return


def _of_attention(place: Place, attention: str) -> Rotation | None:
    """How another layer treats the positions of its heads, with a norm that may follow."""
    site = attention + place.site[len(place.facts.attention(place.site)) :]
    found = place.recipe(site) if place.is_known(site) else None
    if isinstance(found, Rotation) and found.style == "done":
        inner, norm = place.recipe(f"{found.source}:in"), place.recipe(found.source)
        assert isinstance(inner, Rotation), "what is done is done somewhere"
        assert isinstance(norm, Norm), "and normalised"
        return replace(inner, norm_after=norm, temperature=found.temperature)
    return found if isinstance(found, Rotation) else None


def _placed_as(place: Place, other: Rotation, tempered: bool = True) -> Rotation:
    """Another layer's treatment of positions, of this layer's heads."""
    own = _of_attention(place, place.facts.attention(place.site))
    assert own is not None, "it is edited"
    temperature = other.temperature if tempered else own.temperature
    return replace(other, source=own.source, heads=own.heads, temperature=temperature)


def _shifted(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    """A layer that does what the one before or behind it should."""
    attention = place.facts.attention(place.site)
    if place.site.endswith(":in"):
        return
    for layer in (place.layer or 0) - 1, (place.layer or 0) + 1:
        other = _of_attention(place, in_layer(attention, layer))
        if other is not None and (other.style == "none") != (rotation.style == "none"):
            yield _placed_as(place, other)
            yield _placed_as(place, other, tempered=False)


def _rounded(tables: Tables, place: Place) -> Iterable[Tables]:
    return (replace(tables, rounded=True),) if tables.polar else ()


def _float_tables(rotation: Rotation, place: Place) -> Iterator[Rotation]:
    """The rotation goes on in float32, as unrounded tables make it, and is cast once."""
    for one in on_tables(lambda t, _: (replace(t, rounded=False),))(rotation, place):
        assert isinstance(one, Rotation)
        yield replace(one, upcast=True)


FAULTS = (
    Fault(
        "rope.local_global_exchanged",
        "gives one layer type the rotary tables of the other",
        "look up tables by the layer's own type",
        on_tables(_exchanged),
    ),
    Fault(
        "rope.theta",
        "has another rotary base than the config's `rope_theta`",
        "read `rope_theta` (or `rope_parameters`) of the config, not a default",
        _field(None, "rope_theta", _THETAS),
        needs=("later tokens",),
    ),
    Fault(
        "rope.scaling_ignored",
        "does not apply the config's rope scaling",
        "apply `rope_scaling`, or `rope_parameters` with its `rope_type`",
        _parameters(_unscaled),
    ),
    Fault(
        "rope.scaling_twice",
        "applies the rope scaling twice",
        "scale either the frequencies or the positions, once",
        on_tables(_twice),
    ),
    Fault(
        "rope.scaling_on_local_layers",
        "scales the rotary tables of the local layers too",
        "scale the full layers' tables alone",
        on_tables(_scaled_too),
    ),
    Fault(
        "rope.llama3_factor",
        "has another `factor` in its llama3 scaling",
        "read `factor` of the config",
        _field("llama3", "factor", _FACTORS),
    ),
    Fault(
        "rope.llama3_low_freq",
        "has another `low_freq_factor` in its llama3 scaling",
        "read `low_freq_factor` of the config",
        _field("llama3", "low_freq_factor", (2.0, 0.5, 1.0)),
    ),
    Fault(
        "rope.llama3_high_freq",
        "has another `high_freq_factor` in its llama3 scaling",
        "read `high_freq_factor` of the config",
        _field("llama3", "high_freq_factor", _HIGH),
    ),
    Fault(
        "rope.llama3_original_context",
        "has another `original_max_position_embeddings` in its llama3 scaling",
        "read it of the rope scaling; it is not `max_position_embeddings`",
        _field("llama3", "original_max_position_embeddings", _CONTEXTS),
    ),
    Fault(
        "rope.llama3_no_ramp",
        "has no ramp between stretched and kept frequencies in its llama3 scaling",
        "blend the frequencies between the two wavelengths",
        _parameters(_no_ramp),
    ),
    Fault(
        "rope.yarn_factor",
        "has another `factor` in its YaRN scaling",
        "read `factor` of the config",
        _field("yarn", "factor", _FACTORS),
    ),
    Fault(
        "rope.yarn_beta_fast",
        "has another `beta_fast` in its YaRN scaling",
        "read `beta_fast`; without one it is 32",
        _field("yarn", "beta_fast", _FAST, default=32.0),
    ),
    Fault(
        "rope.yarn_beta_slow",
        "has another `beta_slow` in its YaRN scaling",
        "read `beta_slow`; without one it is 1",
        _field("yarn", "beta_slow", _SLOW, default=1.0),
    ),
    Fault(
        "rope.yarn_original_context",
        "has another `original_max_position_embeddings` in its YaRN scaling",
        "read it of the rope scaling; it is not `max_position_embeddings`",
        _field("yarn", "original_max_position_embeddings", _CONTEXTS),
    ),
    Fault(
        "rope.yarn_attention_factor",
        "has another temperature on YaRN's cos and sin",
        "multiply both by `attention_factor`, or by 0.1 ln(factor) + 1 and its mscale forms",
        _parameters(_yarn_attention),
    ),
    Fault(
        "rope.yarn_truncate",
        "rounds the ends of YaRN's ramp where they stay, or the reverse",
        "honour `truncate`; without one the ends are rounded to whole channels",
        _parameters(_truncate),
    ),
    Fault(
        "rope.interleaved",
        "pairs neighbouring channels where this model pairs channel i with i + d/2",
        "rotate halves, or permute the rows of q and k when they are loaded",
        either(on(Rotation, _neighbours), on(Tables, _paired(now=True))),
    ),
    Fault(
        "rope.not_interleaved",
        "pairs channel i with i + d/2 where this model pairs neighbouring channels",
        "rotate channel 2i with 2i + 1, or permute the rows of q and k when they are loaded",
        either(on(Rotation, _halves), on(Tables, _paired(now=False))),
    ),
    Fault(
        "rope.sign",
        "rotates the other way",
        "the rotated half is (-x2, x1)",
        either(on(Rotation, _turned), on(Tables, lambda t, _: (replace(t, sign=-t.sign),))),
    ),
    Fault(
        "rope.position_off_by_one",
        "counts positions from 1",
        "the first token's position is 0",
        _tables(offset=1),
    ),
    Fault(
        "rope.angles_in_low_precision",
        "computes the rotary angles in the model's dtype",
        "multiply positions and frequencies in float32, and round cos and sin alone",
        on_tables(_angles),
    ),
    Fault(
        "rope.frequencies_rounded",
        "has rotary frequencies that were cast with the model",
        "keep `inv_freq` out of `.to(dtype)`",
        _tables(low_frequencies=True),
    ),
    Fault(
        "rope.tables_in_float32",
        "rotates with cos and sin that were not rounded to the model's dtype",
        "cast cos and sin before they are multiplied",
        either(on(Tables, lambda t, _: (replace(t, rounded=False),)), on(Rotation, _float_tables)),
    ),
    Fault(
        "rope.not_applied",
        "does not rotate",
        "rotate query and key before they meet",
        either(on(Rotation, _not_rotated), on(Tables, lambda t, _: (replace(t, still=True),))),
    ),
    Fault(
        "rope.applied_everywhere",
        "rotates in a layer that knows of no positions",
        "rotate where the model does: a 1 in `no_rope_layers` means that the layer rotates; where "
        "there is no such list, only layers of one type do",
        on(Rotation, _rotated_too),
        needs=("later tokens",),
    ),
    Fault(
        "rope.shifted_by_a_layer",
        "counts the layers without positions from another one",
        "take from the config which layers rotate, or count from 0: layer i has none where "
        "(i + 1) % interval == 0",
        on(Rotation, _shifted),
        needs=("later tokens",),
        leaves_out=True,
    ),
    Fault(
        "rope.tables_rounded",
        "rounds cos and sin to the model's dtype where this model rotates in float32",
        "rotate as complex numbers of float32, and cast once",
        on_tables(_rounded),
    ),
)
