"""Rotary parameters, in any of their spellings, as one: each rope type's keys, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portkit.config.reader import REQUIRED, ConfigReader
from portkit.errors import InvalidConfig

_ORIGINAL_LENGTH = "original_max_position_embeddings"

# rope type: the parameters it must have, and those it may have.
_ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (_ORIGINAL_LENGTH,)),
    "yarn": (
        ("factor",),
        (
            _ORIGINAL_LENGTH,
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}


def read_rope(
    reader: ConfigReader, default_theta: float, max_position_embeddings: int
) -> dict[str, Any]:
    """The rotary parameters of a model with one kind of layer, in the canonical spelling.

    `rope_scaling` wins over `rope_parameters` where both are given; theta is taken from inside,
    then from `rope_theta`, then from `default_theta`.
    """
    _pin_whole_heads(reader)
    theta = reader.number("rope_theta", default_theta)
    length = reader.size(_ORIGINAL_LENGTH, max_position_embeddings)
    older = reader.optional_section("rope_scaling")
    newer = reader.optional_section("rope_parameters")
    if older is not None and newer is not None:
        newer.bookkeeping(*newer.raw)
        reader.tell("rope_parameters", "rope_scaling is given too, and wins")
    return _read_rope_type(older or newer, theta, length)


def read_rope_by_layer_type(
    reader: ConfigReader,
    default_thetas: Mapping[str, float],
    legacy_theta_keys: Mapping[str, str],
    scaled: str,
    max_position_embeddings: int,
) -> dict[str, dict[str, Any]]:
    """The rotary parameters of each layer type, in the canonical spelling.

    Newer files nest `rope_parameters` by layer type; older ones have a theta of its own key for
    each type, and a `rope_scaling` that holds for the layer type `scaled` alone.
    """
    _pin_whole_heads(reader)
    nested = reader.optional_section("rope_parameters")
    scaling = reader.optional_section("rope_scaling")
    reader.told(_ORIGINAL_LENGTH, "each layer type says its own")
    if nested is not None and not nested.raw.keys() <= default_thetas.keys():
        raise InvalidConfig(
            f"{reader.where}: rope_parameters must be nested by layer type "
            f"({', '.join(default_thetas)}); a flat one would be silently without effect"
        )
    if nested is not None and scaling is not None:
        raise InvalidConfig(
            f"{reader.where}: rope_scaling and rope_parameters are both given; keep one"
        )
    if scaling is not None and scaling.raw.get("rope_type") is None:
        scaling.pin("type", "default", because="the reference reads rope_type here: call it so")
    found = {}
    for kind, default_theta in default_thetas.items():
        theta = reader.number(legacy_theta_keys[kind], default_theta)
        given = scaling if kind == scaled else None
        if nested is not None:
            given = nested.optional_section(kind)
        found[kind] = _read_rope_type(given, theta, max_position_embeddings)
    return found


def _read_rope_type(reader: ConfigReader | None, theta: float, length: int) -> dict[str, Any]:
    """One set of rotary parameters, checked: known type, nothing missing, nothing unread."""
    if reader is None:
        reader = ConfigReader({})
    newer, older = (
        reader.word(key, *_ROPE_TYPES, because="no other rotation is ported")
        for key in ("rope_type", "type")
    )
    if newer and older and newer != older:
        raise reader.contradiction("rope_type and type contradict each other; keep one")
    rope_type = newer or older or "default"
    required, optional = _ROPE_TYPES[rope_type]
    found: dict[str, Any] = {"rope_type": rope_type}
    found["rope_theta"] = reader.number("rope_theta", theta)
    for key in (*required, *optional):
        if key == "truncate":
            found[key] = reader.flag(key, True)
        elif key == _ORIGINAL_LENGTH:
            found[key] = reader.size(key, length)
        else:
            found[key] = reader.number(key, REQUIRED if key in required else None)
    if found["rope_theta"] <= 1:
        raise reader.contradiction(f"rope_theta must be above 1, not {found['rope_theta']}")
    if rope_type == "llama3" and found["low_freq_factor"] > found["high_freq_factor"]:
        raise reader.contradiction(
            f"low_freq_factor must be at most high_freq_factor, not {found['low_freq_factor']}"
        )
    reader.told("attn_factor", "attention_factor is the key that scales cos and sin")
    _pin_whole_heads(reader)
    return found


def _pin_whole_heads(reader: ConfigReader) -> None:
    for key in ("partial_rotary_factor", "rotary_pct"):
        reader.pin(key, 1.0, because="every channel of a head is rotated")
