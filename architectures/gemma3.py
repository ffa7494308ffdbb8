"""Gemma 3 (Kamath et al. 2025, arXiv:2503.19786): 270M and 1B, and the language model of 4B to 27B.

A decoder like Llama's, departing from it in these places:

- the embedding is scaled by sqrt(hidden_size), rounded to the model's dtype first;
- norms multiply by `1 + weight`, in float32, and stand on both sides of attention and of the
  feed-forward ("sandwich"): `h = h + post(block(pre(h)))`;
- queries and keys are normalised per head, before the rotation;
- five layers that see a sliding window, then one that sees everything; the two kinds rotate with
  periods of their own, and only the full layers' are stretched for long contexts;
- scores are scaled by `query_pre_attn_scalar ** -0.5`, which is not head_dim's in every size;
- the feed-forward is gated by GELU (tanh form); the head is the embedding.

The larger models are released with a vision tower; its tensors are dropped, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from portkit.architecture import Architecture, CausalLM
from portkit.config import (
    ConfigReader,
    check_heads,
    read_attention_bias,
    read_rope_by_layer_type,
    read_sliding_layers,
)
from portkit.nn.attention import KERNELS, visible_keys
from portkit.nn.cache import Cache, FullCache, LayerCache, SlidingCache
from portkit.nn.embedding import ScaledEmbedding
from portkit.nn.mlp import GatedMLP, gelu_tanh
from portkit.nn.norms import UnitOffsetRMSNorm
from portkit.nn.rope import RopeParameters, RotaryEmbedding, rotate
from portkit.weights import Copy, Drop, Tie, WeightMap

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Gemma3Config:
    """The keys of `config.json` that the forward pass depends on."""

    vocab_size: int
    pad_token_id: int | None
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    query_pre_attn_scalar: float
    sliding_window: int
    layer_types: tuple[str, ...]
    final_logit_softcapping: float | None
    rope_parameters: Mapping[str, RopeParameters]
    """By layer type."""


def read_config(reader: ConfigReader) -> Gemma3Config:
    # Defaults are the family's own: released files of the larger models leave much unsaid.
    max_positions = reader.size("max_position_embeddings", 131072)
    num_layers = reader.size("num_hidden_layers", maximum=4096)
    rope = read_rope_by_layer_type(
        reader,
        default_thetas={FULL: 1e6, SLIDING: 1e4},
        legacy_theta_keys={FULL: "rope_theta", SLIDING: "rope_local_base_freq"},
        scaled=FULL,
        max_position_embeddings=max_positions,
    )
    vocab_size = reader.size("vocab_size", 262208)
    config = Gemma3Config(
        vocab_size=vocab_size,
        pad_token_id=reader.padding_row(vocab_size, 0),
        hidden_size=reader.size("hidden_size"),
        intermediate_size=reader.size("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=reader.size("num_attention_heads", 8),
        num_key_value_heads=reader.size("num_key_value_heads", 4),
        head_dim=reader.size("head_dim", 256),
        max_position_embeddings=max_positions,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=reader.flag("tie_word_embeddings", True),
        attention_bias=read_attention_bias(reader),
        query_pre_attn_scalar=reader.number("query_pre_attn_scalar", 256.0),
        sliding_window=reader.size("sliding_window", 4096, minimum=2),
        layer_types=read_sliding_layers(reader, num_layers, 6, FULL, SLIDING),
        final_logit_softcapping=reader.number("final_logit_softcapping", None),
        rope_parameters={kind: RopeParameters(**given) for kind, given in rope.items()},
    )
    for key in ("hidden_activation", "hidden_act"):
        reader.pin(key, "gelu_pytorch_tanh", because="the feed-forward is gated by this GELU")
    reader.pin("attn_logit_softcapping", because="the reference stores it and never applies it")
    reader.pin("use_qk_norm", True, because="queries and keys are normalised in any case")
    reader.lacks("neighbouring pairs", "several positions", "biases of the feed-forward")
    reader.lacks("shared experts", "slices", "bidirectional layers")
    check_heads(
        reader.where, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )
    return config


def read_multimodal_config(reader: ConfigReader) -> Gemma3Config:
    """The language model's part of a config that also describes a vision tower."""
    text = reader.section("text_config")
    text.pin("final_logit_softcapping", because="the multimodal reference does not apply it")
    text.pin("model_type", "gemma3_text", because="no other language model is known in this place")
    config = read_config(text)
    # The head is tied by the outer object's word, and it alone.
    tie_word_embeddings = reader.flag("tie_word_embeddings", True)
    reader.bookkeeping(
        "vision_config",
        "mm_tokens_per_image",
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
        "image_token_id",
        "boi_token_id",
        "eoi_token_id",
    )
    return replace(config, tie_word_embeddings=tie_word_embeddings)


class Attention(nn.Module):
    def __init__(self, config: Gemma3Config, kernel: str) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bias)
        self.q_norm = UnitOffsetRMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = UnitOffsetRMSNorm(config.head_dim, config.rms_norm_eps)
        self.attend = KERNELS[kernel](config.query_pre_attn_scalar**-0.5)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        by_head = (*x.shape[:2], -1, self.head_dim)
        query = self.q_proj(x).view(by_head).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        key = self.k_proj(x).view(by_head).transpose(1, 2)
        value = self.v_proj(x).view(by_head).transpose(1, 2)
        query = rotate(self.q_norm(query), cos, sin)
        key = rotate(self.k_norm(key), cos, sin)
        if cache is not None:
            key, value = cache.update(key, value)
        context = self.attend(query, key, value, mask)  # (batch, tokens, heads, head_dim)
        output: Tensor = self.o_proj(context.flatten(2))
        return output


class Layer(nn.Module):
    def __init__(self, config: Gemma3Config, kernel: str) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, kernel)
        self.mlp = GatedMLP(size, config.intermediate_size, gelu_tanh)
        self.input_layernorm = UnitOffsetRMSNorm(size, eps)
        self.post_attention_layernorm = UnitOffsetRMSNorm(size, eps)
        self.pre_feedforward_layernorm = UnitOffsetRMSNorm(size, eps)
        self.post_feedforward_layernorm = UnitOffsetRMSNorm(size, eps)

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(h), cos, sin, mask, cache)
        h = h + self.post_attention_layernorm(attended)
        h = h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))
        return h


class Decoder(nn.Module):
    def __init__(self, config: Gemma3Config, kernel: str) -> None:
        super().__init__()
        size = config.hidden_size
        self.embed_tokens = ScaledEmbedding(config.vocab_size, size, size**0.5, config.pad_token_id)
        self.layer_types = config.layer_types
        self.windows = {
            kind: None if kind == FULL else config.sliding_window for kind in config.layer_types
        }
        self.rotary_emb = nn.ModuleDict(
            {
                kind: RotaryEmbedding(config.head_dim, config.rope_parameters[kind])
                for kind in sorted(set(config.layer_types))
            }
        )
        self.layers = nn.ModuleList(Layer(config, kernel) for _ in range(config.num_hidden_layers))
        self.norm = UnitOffsetRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, positions: Tensor, cache: Cache | None, padding: Tensor | None
    ) -> Tensor:
        h = self.embed_tokens(input_ids)
        num_tokens, past = input_ids.shape[1], 0 if cache is None else cache.length
        tables, masks = {}, {}
        for kind, rotary_emb in self.rotary_emb.items():
            tables[kind] = rotary_emb(positions, h.dtype)
            masks[kind] = visible_keys(num_tokens, past, padding, h.device, self.windows[kind])
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, kind, layer_cache in zip(self.layers, self.layer_types, caches, strict=True):
            h = layer(h, *tables[kind], masks[kind], layer_cache)
        output: Tensor = self.norm(h)
        return output


class Gemma3(CausalLM):
    config: Gemma3Config

    def __init__(self, config: Gemma3Config, kernel: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, kernel)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def logits(self, hidden_states: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden_states)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def new_cache(self, batch: int, length: int) -> Cache:
        config = self.config
        heads, head_dim = config.num_key_value_heads, config.head_dim
        return Cache(
            batch,
            [
                FullCache(heads, head_dim, length)
                if kind == FULL
                else SlidingCache(heads, head_dim, config.sliding_window)
                for kind in config.layer_types
            ],
        )


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of the language model alone, out of a multimodal one."""
    outer = ("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")
    return {
        **{key: config[key] for key in outer if key in config},
        **config["text_config"],
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
    }


NORMS = "input|post_attention|pre_feedforward|post_feedforward"
VISION = "the vision tower is not ported; this is the language model alone"

WEIGHTS = WeightMap(
    (
        Copy("model.embed_tokens.weight"),
        Copy(f"model.layers.{{layer}}.{{norm={NORMS}}}_layernorm.weight"),
        Copy("model.layers.{layer}.self_attn.{proj=q|k|v|o}_proj.{part=weight|bias}"),
        Copy("model.layers.{layer}.self_attn.{part=q|k}_norm.weight"),
        Copy("model.layers.{layer}.mlp.{proj=gate|up|down}_proj.weight"),
        Copy("model.norm.weight"),
        Copy("lm_head.weight"),
        Tie("lm_head.weight", to="model.embed_tokens.weight"),
    )
)

# As multimodal files are released, and as newer tools save them.
MULTIMODAL_WEIGHTS = WeightMap(
    (
        *WEIGHTS.rules,
        Drop("vision_tower.{*}", because=VISION),
        Drop("multi_modal_projector.{*}", because=VISION),
    ),
    prefixes=("language_model.", "model.language_model."),
)

GEMMA3 = Architecture(
    model_type="gemma3_text",
    summary="Gemma 3 270M and 1B",
    read_config=read_config,
    build=Gemma3,
    weight_map=WEIGHTS,
)

GEMMA3_MULTIMODAL = Architecture(
    model_type="gemma3",
    summary="Gemma 3 4B, 12B and 27B: the language model of the multimodal checkpoint",
    read_config=read_multimodal_config,
    build=Gemma3,
    weight_map=MULTIMODAL_WEIGHTS,
    text_config=text_config,
)
