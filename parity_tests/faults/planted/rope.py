"""Mistakes in rotary positions: the frequencies, the tables made of them, the rotation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parity_tests.faults.planted.planting import (
    LOW,
    NEIGHBOURS,
    ONE_STREAM,
    PAIRS_OF_HALVES,
    ROUNDED_TABLES,
    SCALED_ROPE,
    TABLES_BY_TYPE,
    Model,
    Planting,
    attentions,
    by_token,
    first_rotated,
    layers,
    replace_forward,
    respell,
    rope_is,
    rotating,
    rotation_of,
    tables,
)
from portkit.nn import rope
from portkit.nn.rope import (
    PolarRotaryEmbedding,
    RopeParameters,
    RotaryEmbedding,
    inverse_frequencies,
)

Plant = Callable[[Model], str]


def _respecify(made: RotaryEmbedding, other: RopeParameters) -> None:
    made.inv_freq, made.scaling = inverse_frequencies(2 * len(made.inv_freq), other)


def _first_scaled(model: Model) -> tuple[str, RotaryEmbedding]:
    return next((k, one) for k, one in tables(model).items() if one.rope.rope_type != "default")


def theta(model: Model) -> str:
    """The paper's base for the config's, or the config's of another model for the paper's."""
    kind, made = next(iter(tables(model).items()))
    theirs = {one.rope.rope_theta for one in tables(model).values()}
    other = next(one for one in (10_000.0, 500_000.0) if one not in theirs)
    _respecify(made, replace(made.rope, rope_theta=other))
    return f"model#cos{kind}"


def local_global_exchanged(model: Model) -> str:
    one, other = tables(model).values()
    one.inv_freq, other.inv_freq = other.inv_freq, one.inv_freq
    one.scaling, other.scaling = other.scaling, one.scaling
    return f"model#cos{next(iter(tables(model)))}"


def table_of_the_other_type(model: Model) -> str:
    """One layer is given the other type's tables."""
    layer = layers(model)[-1]
    kind = model.model.layer_types[-1]
    other = next(one for name, one in tables(model).items() if name != f".{kind}")
    seen: list[Tensor] = []

    def decode(own: Any, input_ids: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        seen[:] = [positions]
        hidden: Tensor = own(input_ids, positions, *rest)
        return hidden

    own = layer.forward

    def forward(h: Tensor, cos: Tensor, sin: Tensor, mask: Any, cache: Any) -> Tensor:
        cos, sin = RotaryEmbedding.forward(other, seen[0], cos.dtype)
        summed: Tensor = own(h, cos, sin, mask, cache)
        return summed

    replace_forward(model.model, decode)
    layer.forward = forward
    return f"model.layers.{len(layers(model)) - 1}.self_attn:in.cos"


def scaling_ignored(model: Model) -> str:
    kind, made = _first_scaled(model)
    _respecify(made, replace(made.rope, rope_type="default"))
    return f"model#cos{kind}"


def scaling_twice(model: Model) -> str:
    """The frequencies that are scaled once more were scaled already."""
    kind, made = _first_scaled(model)
    plain, _ = inverse_frequencies(2 * len(made.inv_freq), replace(made.rope, rope_type="default"))
    made.inv_freq = made.inv_freq * (made.inv_freq / plain)
    return f"model#cos{kind}"


def scaling_on_local_layers(model: Model) -> str:
    _, scaled = _first_scaled(model)
    kind, made = next((k, m) for k, m in tables(model).items() if m is not scaled)
    _respecify(made, replace(scaled.rope, rope_theta=made.rope.rope_theta))
    return f"model#cos{kind}"


def _with(**changed: Any) -> Plant:
    """One parameter of the scaling is another number."""

    def plant(model: Model) -> str:
        kind, made = _first_scaled(model)
        _respecify(made, replace(made.rope, **changed))
        return f"model#cos{kind}"

    return plant


def _context_for_original(model: Model) -> str:
    """`max_position_embeddings` where the length of the first training is meant."""
    context = model.config.max_position_embeddings
    return _with(original_max_position_embeddings=context)(model)


def llama3_no_ramp(model: Model) -> str:
    """Long waves stretched, all others kept: nothing between."""
    kind, made = _first_scaled(model)
    plain, _ = inverse_frequencies(2 * len(made.inv_freq), replace(made.rope, rope_type="default"))
    assert made.rope.original_max_position_embeddings is not None
    assert made.rope.low_freq_factor is not None
    longest = made.rope.original_max_position_embeddings / made.rope.low_freq_factor
    made.inv_freq = torch.where(2 * torch.pi / plain > longest, plain / made.rope.factor, plain)
    return f"model#cos{kind}"


def yarn_attention_factor(model: Model) -> str:
    kind, made = _first_scaled(model)
    made.scaling = 1.0
    return f"model#cos{kind}"


def _rotations(rotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Plant:
    """Every layer rotates in another way."""

    def plant(model: Model) -> str:
        respell_rotations(model, rotate)
        return first_rotated(model)

    return plant


def respell_rotations(model: Model, rotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Have every layer rotate (batch, heads, tokens, head_dim) by `rotate`."""
    for attention in attentions(model):
        _respell(attention, rotate)


def _respell(attention: Any, rotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    def of_tokens(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x.transpose(1, 2), cos, sin).transpose(1, 2)

    name = rotation_of(attention)
    respell(attention, **{name: of_tokens if by_token(attention) else rotate})


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels i and i + d/2 are a pair, where tables are laid out for neighbours."""
    half = x.shape[-1] // 2
    cos, sin = (one if one.shape[-1] == half else one[..., ::2] for one in (cos, sin))
    cos, sin = (torch.cat((one, one), -1)[:, None] for one in (cos, sin))
    wide = x.float()
    turned = torch.cat((-wide[..., half:], wide[..., :half]), -1)
    return (wide * cos.float() + turned * sin.float()).to(x.dtype)


def _other_way(model: Model) -> str:
    """The family's own rotation by the negative angle."""
    for attention in attentions(model):
        own = getattr(rope, rotation_of(attention))
        respell(attention, **{rotation_of(attention): lambda x, c, s, own=own: own(x, c, -s)})
    return first_rotated(model)


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels 2i and 2i + 1 are a pair, with the tables laid out for it."""
    half = x.shape[-1] // 2
    cos, sin = (one[:, None, :, :half].repeat_interleave(2, -1) for one in (cos, sin))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def rotate_in_float32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    wide = x.float()
    turned = torch.cat((-wide[..., half:], wide[..., :half]), -1)
    return (wide * cos[:, None].float() + turned * sin[:, None].float()).to(x.dtype)


def position_off_by_one(model: Model) -> str:
    def forward(own: Any, input_ids: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        counted: Tensor = own(input_ids, positions + 1, *rest)
        return counted

    replace_forward(model.model, forward)
    return f"model#cos{next(iter(tables(model)))}"


def angles_in_low_precision(model: Model) -> str:
    def forward(made: RotaryEmbedding) -> Callable[..., tuple[Tensor, Tensor]]:
        def tabled(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            angles = positions[..., None].to(dtype) * made.inv_freq.to(dtype)
            if isinstance(made, PolarRotaryEmbedding):
                return angles.float().cos() * made.scaling, angles.float().sin() * made.scaling
            angles = made.spread(angles)
            return angles.cos() * made.scaling, angles.sin() * made.scaling

        return tabled

    for made in tables(model).values():
        made.forward = forward(made)  # type: ignore[method-assign]
    return f"model#cos{next(iter(tables(model)))}"


def frequencies_rounded(model: Model) -> str:
    """What `model.to(bfloat16)` does to a buffer."""
    for made in tables(model).values():
        made.inv_freq = made.inv_freq.to(torch.bfloat16).float()
    return f"model#cos{next(iter(tables(model)))}"


def tables_in_float32(model: Model) -> str:
    for made in tables(model).values():
        replace_forward(made, lambda own, positions, _: own(positions, torch.float32))
    if PAIRS_OF_HALVES.holds(model):
        respell_rotations(model, rotate_in_float32)
    return f"model#cos{next(iter(tables(model)))}"


def not_applied_in_a_layer(model: Model) -> str:
    last = rotating(model)[-1]
    _respell(attentions(model)[last], lambda x, *_: x)
    behind = getattr(attentions(model)[last], "qk_norm", None) is not None
    return f"model.layers.{last}.self_attn{'.qk_norm:in' if behind else '#query'}"


LINEAR, LLAMA3, YARN = rope_is("linear"), rope_is("llama3"), rope_is("yarn")

PLANTINGS = (
    Planting("rope.theta", theta),
    Planting("rope.local_global_exchanged", local_global_exchanged, (TABLES_BY_TYPE,)),
    Planting(
        "rope.local_global_exchanged",
        table_of_the_other_type,
        (TABLES_BY_TYPE, ONE_STREAM),
        variant="for a layer",
    ),
    Planting("rope.scaling_ignored", scaling_ignored, (LINEAR,), variant="linear"),
    Planting("rope.scaling_ignored", scaling_ignored, (LLAMA3,), variant="llama3"),
    Planting("rope.scaling_ignored", scaling_ignored, (YARN,), variant="yarn"),
    Planting("rope.scaling_twice", scaling_twice, (SCALED_ROPE,)),
    Planting(
        "rope.scaling_on_local_layers", scaling_on_local_layers, (TABLES_BY_TYPE, SCALED_ROPE)
    ),
    Planting("rope.llama3_factor", _with(factor=32.0), (LLAMA3,)),
    Planting("rope.llama3_low_freq", _with(low_freq_factor=2.0), (LLAMA3,)),
    Planting("rope.llama3_high_freq", _with(high_freq_factor=2.0), (LLAMA3,)),
    Planting("rope.llama3_original_context", _context_for_original, (LLAMA3,)),
    Planting("rope.llama3_no_ramp", llama3_no_ramp, (LLAMA3,)),
    Planting("rope.yarn_factor", _with(factor=4.0), (YARN,)),
    Planting("rope.yarn_beta_fast", _with(beta_fast=16.0), (YARN,)),
    Planting("rope.yarn_beta_slow", _with(beta_slow=2.0), (YARN,)),
    Planting("rope.yarn_original_context", _context_for_original, (YARN,)),
    Planting("rope.yarn_attention_factor", yarn_attention_factor, (YARN,)),
    Planting("rope.yarn_truncate", _with(truncate=False), (YARN,)),
    Planting("rope.interleaved", _rotations(_interleaved), (PAIRS_OF_HALVES,)),
    Planting("rope.not_interleaved", _rotations(_halves), (NEIGHBOURS,)),
    Planting("rope.sign", _other_way),
    Planting("rope.position_off_by_one", position_off_by_one),
    Planting("rope.angles_in_low_precision", angles_in_low_precision, dtypes=LOW),
    Planting("rope.frequencies_rounded", frequencies_rounded, dtypes=LOW),
    Planting("rope.tables_in_float32", tables_in_float32, (ROUNDED_TABLES,), LOW),
    Planting("rope.not_applied", not_applied_in_a_layer, variant="in a layer"),
    Planting("rope.not_applied", _rotations(lambda x, *_: x), variant="anywhere"),
)
