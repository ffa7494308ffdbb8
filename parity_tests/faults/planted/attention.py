"""Mistakes in attention: scale, norms of heads, masks and windows, groups, what the kernel does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from parity_tests.faults.planted.attention_forward import (
    Heads,
    Kernel,
    Turn,
    as_it_should_be,
    before_rotation,
    normed,
    rewrite,
    turned,
)
from parity_tests.faults.planted.planting import (
    BOTH_KINDS,
    GROUPED,
    HEADS_BESIDE_HIDDEN,
    LOW,
    NORMS_OF_HEADS,
    OTHER_SCALE,
    SCALED_SCORES,
    SLIDING,
    TABLES_BY_TYPE,
    Model,
    Need,
    Planting,
    attentions,
    first,
    replace_forward,
    respell,
    rotating,
    tables,
    windows,
)
from portkit.nn.attention import visible_keys
from portkit.nn.cache import ChunkedCache, FullCache, SlidingCache

Plant = Callable[[Model], str]
HEAD_NORMS = ("q_norm", "k_norm", "v_norm")
NORM_OF_VALUES = Need(
    "values are not normalised", lambda model: hasattr(attentions(model)[0], "v_norm")
)
ONE_TABLE = Need(
    "a layer's type also says by which table it rotates", lambda model: len(tables(model)) == 1
)
OWN_KEYS = Need(
    "a layer's type also says whose keys it shares",
    lambda model: all(getattr(one, "has_own_kv", True) for one in attentions(model)),
)


def _scale(of: Callable[[Model, float], float]) -> Plant:
    def plant(model: Model) -> str:
        for attention in attentions(model):
            attention.attend.scale = of(model, attention.attend.scale)
        return "model.layers.0.self_attn#context"

    return plant


def _hidden_per_head(model: Model, _: float) -> float:
    size: int = model.config.hidden_size // model.config.num_attention_heads
    return size**-0.5


def _turns(turn: Turn, role: str = "query") -> Plant:
    """Every layer does something else with its heads before the cache."""

    def plant(model: Model) -> str:
        for attention in attentions(model):
            rewrite(attention, turn)
        layer = rotating(model)[0] if role == "#value" else 0
        return f"model.layers.{layer}.self_attn{role}"

    return plant


def _scaled_query(attention: Any, heads: Heads, cos: Tensor, sin: Tensor) -> Heads:
    """By hand, before a kernel that scales by itself."""
    query, key, value = as_it_should_be(attention, heads, cos, sin)
    return query * attention.attend.scale, key, value


def _norm_after_rotation(attention: Any, heads: Heads, cos: Tensor, sin: Tensor) -> Heads:
    query, key, value = heads
    query, key = turned(attention, query, cos, sin), turned(attention, key, cos, sin)
    return before_rotation(attention, (query, key, value))


def _value_rotated(attention: Any, heads: Heads, cos: Tensor, sin: Tensor) -> Heads:
    query, key, value = as_it_should_be(attention, heads, cos, sin)
    return query, key, turned(attention, value, cos, sin)


def _without(left_out: str) -> Plant:
    """A norm of heads that nobody calls."""

    def turn(attention: Any, heads: Heads, cos: Tensor, sin: Tensor) -> Heads:
        query, key, value = (
            one if name == left_out else normed(attention, name, one)
            for name, one in zip(HEAD_NORMS, heads, strict=True)
        )
        return turned(attention, query, cos, sin), turned(attention, key, cos, sin), value

    return _turns(turn, f".{left_out}:in")


def qk_norms_swapped(model: Model) -> str:
    for attention in attentions(model):
        if not getattr(attention, "has_own_kv", True):
            continue
        q_norm, k_norm = attention.q_norm, attention.k_norm
        q_norm.forward, k_norm.forward = k_norm.forward, q_norm.forward
    return "model.layers.0.self_attn.q_norm"


def slide(model: Model, new: list[int | None]) -> None:
    """Have the layers mask, and keep, other windows; those of one type alike."""
    decoder, own = model.model, model.new_cache
    if hasattr(decoder, "window"):
        decoder.window = new[0]
    elif isinstance(decoder.windows, dict):
        decoder.windows = dict(zip(types(model), new, strict=False))
    else:
        decoder.windows = tuple(new)

    def new_cache(batch: int, length: int) -> Any:
        cache = own(batch, length)
        cache.layers = tuple(
            SlidingCache(one.num_key_value_heads, one.head_dim, window)
            if window
            else FullCache(one.num_key_value_heads, one.head_dim, length)
            for one, window in zip(cache.layers, new, strict=True)
        )
        return cache

    model.new_cache = new_cache


def _windows(change: Callable[[int | None, int], int | None]) -> Plant:
    """Windows that are other ones: `change` is given each, and the one that the model has."""

    def plant(model: Model) -> str:
        before = windows(model)
        new = [change(one, next(filter(None, before))) for one in before]
        slide(model, new)
        changed = [a != b for a, b in zip(before, new, strict=True)]
        return f"model.layers.{first(changed, True)}.self_attn#mask"

    return plant


def window_pattern_shifted(model: Model) -> str:
    """Each layer slides as the one before it should, the first as the last."""
    before, decoder = windows(model), model.model
    new = [before[-1], *before[:-1]]
    if isinstance(decoder.windows, dict):
        kinds = decoder.layer_types
        decoder.layer_types = (kinds[-1], *kinds[:-1])
    slide(model, new)
    moved = first([a != b for a, b in zip(before, new, strict=True)], True)
    return f"model.layers.{moved}{':in.cos' if len(tables(model)) > 1 else '.self_attn#mask'}"


def types(model: Model) -> Sequence[str]:
    """The layers' types, of a model whose windows are by type."""
    found: Sequence[str] = getattr(model.model, "layer_types", model.config.layer_types)
    return found


def _diagonal(offset: int) -> Plant:
    """A query sees all keys up to its own and so many more."""

    def visible(
        num_queries: int,
        past: int,
        padding: Tensor | None,
        device: torch.device,
        window: int | None = None,
    ) -> Tensor:
        held = past if window is None else min(past, window - 1)
        queries = torch.arange(past, past + num_queries, device=device)[:, None]
        keys = torch.arange(past - held, past + num_queries, device=device)[None, :]
        seen = keys <= queries + offset
        if window is not None:
            seen &= keys > queries - window
        seen = seen[None, None]
        return seen if padding is None else seen & padding[:, None, None, -seen.shape[-1] :]

    def plant(model: Model) -> str:
        respell(model.model, visible_keys=visible)
        return f"model.layers.{_unchunked(model)}.self_attn#mask"

    return plant


def _unchunked(model: Model) -> int:
    """The first layer that does not attend within chunks, whose mask is made elsewhere."""
    caches = model.new_cache(1, 1).layers
    return first([type(one) is ChunkedCache for one in caches], False)


def padding_ignored(model: Model) -> str:
    def visible(num_queries: int, past: int, _: Any, *rest: Any) -> Tensor | None:
        return visible_keys(num_queries, past, None, *rest)

    respell(model.model, visible_keys=visible)
    return f"model.layers.{_unchunked(model)}.self_attn#mask"


def gqa_order(model: Model) -> str:
    """Groups laid side by side where each is to be repeated: head i reads group i % groups."""

    def forward(own: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        key, value = (one.repeat(1, repeats, 1, 1) for one in (key, value))
        context: Tensor = own(query, key, value, mask)
        return context

    for attention in attentions(model):
        replace_forward(attention.attend, forward)
    return "model.layers.0.self_attn#context"


PLANTINGS = (
    Planting("attention.scale_missing", _scale(lambda _, __: 1.0), (SCALED_SCORES,)),
    Planting(
        "attention.scale_of_head_dim",
        _scale(lambda model, _: model.config.head_dim**-0.5),
        (OTHER_SCALE,),
    ),
    Planting("attention.scale_of_hidden", _scale(_hidden_per_head), (HEADS_BESIDE_HIDDEN,)),
    Planting(
        "attention.scale_twice",
        _scale(lambda _, scale: scale**2),
        (SCALED_SCORES,),
        variant="in the kernel",
    ),
    Planting(
        "attention.scale_twice",
        _turns(_scaled_query, "#query"),
        (SCALED_SCORES,),
        variant="of the query",
    ),
    Planting("attention.q_norm_missing", _without("q_norm"), (NORMS_OF_HEADS,)),
    Planting("attention.k_norm_missing", _without("k_norm"), (NORMS_OF_HEADS,)),
    Planting("attention.v_norm_missing", _without("v_norm"), (NORM_OF_VALUES,)),
    Planting("attention.qk_norms_swapped", qk_norms_swapped, (NORMS_OF_HEADS,)),
    Planting(
        "attention.norm_after_rotation",
        _turns(_norm_after_rotation, ".q_norm:in"),
        (NORMS_OF_HEADS,),
    ),
    Planting("attention.window_plus_one", _windows(lambda one, _: one and one + 1), (SLIDING,)),
    Planting("attention.window_minus_one", _windows(lambda one, _: one and one - 1), (SLIDING,)),
    Planting("attention.window_ignored", _windows(lambda *_: None), (SLIDING,)),
    Planting("attention.window_everywhere", _windows(lambda _, window: window), (BOTH_KINDS,)),
    Planting(
        "attention.window_pattern_shifted",
        window_pattern_shifted,
        (BOTH_KINDS, OWN_KEYS, ONE_TABLE),
    ),
    Planting(
        "attention.types_shifted", window_pattern_shifted, (BOTH_KINDS, OWN_KEYS, TABLES_BY_TYPE)
    ),
    Planting("attention.causal_plus_one", _diagonal(1)),
    Planting("attention.causal_minus_one", _diagonal(-1)),
    Planting("attention.padding_ignored", padding_ignored),
    Planting("attention.gqa_order", gqa_order, (GROUPED,)),
    Planting("attention.softcap_applied", Kernel(cap=50.0)),
    Planting("attention.softmax_in_dtype", Kernel(wide_softmax=False), dtypes=LOW, kernel="eager"),
    Planting("attention.value_rotated", _turns(_value_rotated, "#value")),
)
