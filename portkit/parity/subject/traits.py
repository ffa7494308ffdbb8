"""What a probe is chosen by: vocabulary, context, windows, chunks, and where a scaling sets in.

Read from our own model, or from the config that the reference itself goes by. Knows no family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

from portkit.architecture import CausalLM
from portkit.nn.cache import ChunkedCache, SlidingCache
from portkit.nn.rope import RotaryEmbedding

_LENGTHS = ("window", "chunk_size", "conv_kernel", "d_conv", "conv_L_cache", "index_topk")
"""Parts of the names by which configs call a number of tokens that a layer looks back over."""
_NO_LENGTHS = {
    "attention_chunk_size",  # told apart by the layers' types
    "chunk_size_feed_forward",
    "max_window_layers",
    "sliding_window_pattern",
}


@dataclass(frozen=True)
class Traits:
    """What a model turns on, as far as a probe has to know it."""

    vocab_size: int
    max_positions: int | None
    """The positions that it was made for; None: no end is known."""
    num_layers: int
    windows: tuple[int, ...] = ()
    """Of its layers, ascending; a chunk's length is one."""
    chunks: tuple[int, ...] = ()
    """Those of them that are chunks, which begin anew at their multiples."""
    scaled: Mapping[str, int] = field(default_factory=dict)
    """Positions at which the scaling of a rotary table sets in, by the module's name."""
    takes_positions: bool = True
    """They can be given; else a position is reached by as many tokens before it alone."""


@singledispatch
def traits_of(subject: Any) -> Traits:
    """Of one of our models, of the reference's module, or of what was read already."""
    return _of_model(subject)


@traits_of.register
def _(subject: Traits) -> Traits:
    return subject


@traits_of.register
def _(subject: CausalLM) -> Traits:
    layers = subject.new_cache(1, 1).layers
    config = subject.config
    scaled = {
        name: module.rope.original_max_position_embeddings
        for name, module in subject.named_modules()
        if isinstance(module, RotaryEmbedding)
        and module.rope.original_max_position_embeddings is not None
    }
    return Traits(
        config.vocab_size,
        config.max_position_embeddings,
        config.num_hidden_layers,
        tuple(sorted({one.window for one in layers if isinstance(one, SlidingCache)})),
        tuple(sorted({one.window for one in layers if isinstance(one, ChunkedCache)})),
        scaled,
    )


def _of_model(model: Any) -> Traits:
    """Of a model that brings a Hugging Face config, as Transformers' do."""
    whole = model.config
    config = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
    rows = getattr(model.get_input_embeddings(), "weight", None)
    return traits_of_config(config, None if rows is None else int(rows.shape[0]))


def traits_by_inputs(model: Any) -> Traits:
    """Of a model that is called by named inputs: what can be told, which may be nothing."""
    whole: Any = getattr(model, "config", None)
    config = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
    return Traits(
        _number(config, "vocab_size") or 0, None, _number(config, "num_hidden_layers") or 0
    )


def traits_of_config(config: Any, vocab_size: int | None = None) -> Traits:
    """Of a text model's config, attributes by the names that `config.json` has."""
    chunk = _number(config, "attention_chunk_size")
    chunked = chunk is not None and _has_layers(config, "chunk")
    return Traits(
        vocab_size or int(config.vocab_size),
        _number(config, "max_position_embeddings") or _number(config, "max_seq_len"),
        _number(config, "num_hidden_layers") or 0,
        tuple(sorted({*_lengths(config), *([chunk] if chunked and chunk else ())})),
        (chunk,) if chunked and chunk is not None else (),
        _scaled(config),
    )


def _lengths(config: Any) -> set[int]:
    """Windows, chunks, convolutions, what an indexer keeps: a probe is longer than each."""
    may_slide = getattr(config, "use_sliding_window", True) is not False
    slides = may_slide and _has_layers(config, "sliding")
    names = [name for name in vars(config) if any(one in name for one in _LENGTHS)]
    found = {name: _number(config, name) for name in names if name not in _NO_LENGTHS}
    if not slides:
        found.pop("sliding_window", None)
    return {one for one in found.values() if one is not None}


def _has_layers(config: Any, kind: str) -> bool:
    """Whether some layers are of a kind; where the config does not tell them apart, all are."""
    kinds = getattr(config, "layer_types", None) or ()
    return not kinds or any(kind in str(one) for one in kinds)


def _number(config: Any, name: str) -> int | None:
    found = getattr(config, name, None)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None


def _scaled(config: Any) -> dict[str, int]:
    """Rotary parameters name where their scaling sets in, once or by layer type."""
    given = getattr(config, "rope_parameters", None)
    if not isinstance(given, Mapping):
        return {}
    by_kind = {k: v for k, v in given.items() if isinstance(v, Mapping)} or {"": given}
    key = "original_max_position_embeddings"
    found = {
        f"model.rotary_emb{f'.{kind}' if kind else ''}": one.get(key) or getattr(config, key, None)
        for kind, one in by_kind.items()
        if one.get("rope_type", "default") != "default"
    }
    return {name: one for name, one in found.items() if isinstance(one, int)}
