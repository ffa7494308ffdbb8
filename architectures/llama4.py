"""Llama 4, the language model of Scout and Maverick (Meta 2025, ai.meta.com/blog/llama-4).

A decoder like Llama 3's, departing from it in these places:

- three of four layers rotate, and attend within chunks of `attention_chunk_size` tokens; the fourth
  has no positions at all and sees everything ("NoPE");
- rotation pairs neighbouring channels, as complex numbers in float32;
- rotating layers normalise queries and keys, without a weight and after the rotation, where
  `use_qk_norm` says so;
- layers without positions scale their queries by a temperature that grows with the distance from
  the beginning, so that attention stays sharp over long contexts;
- the feed-forward is a choice among experts, in every layer or every other one, beside an expert
  that all tokens pass through. The router's sigmoid weighs an expert's *input*;
- with eager attention the softmax is in the model's dtype.

The released checkpoints' vision tower is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portkit.architecture import Architecture, CausalLM
from portkit.config import ConfigReader, check_heads, read_attention_bias, read_rope
from portkit.nn.attention import (
    LowPrecisionEagerAttention,
    SdpaAttention,
    visible_in_chunk,
    visible_keys,
)
from portkit.nn.cache import Cache, ChunkedCache, FullCache, LayerCache
from portkit.nn.mlp import GatedMLP
from portkit.nn.moe import ExpertsByChoice, Routing, weighted
from portkit.nn.norms import L2Norm, RMSNorm
from portkit.nn.rope import PolarRotaryEmbedding, RopeParameters, rotate_polar
from portkit.weights import Copy, Drop, Tie, WeightMap

FULL, CHUNKED = "full_attention", "chunked_attention"
KERNELS = {"sdpa": SdpaAttention, "eager": LowPrecisionEagerAttention}


@dataclass(frozen=True, kw_only=True)
class Llama4Config:
    """The keys of `config.json` that the forward pass depends on."""

    vocab_size: int
    pad_token_id: int | None
    hidden_size: int
    intermediate_size: int
    """Of an expert."""
    intermediate_size_mlp: int
    """Of a dense layer."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    moe_layers: frozenset[int]
    rope_layers: frozenset[int]
    """Layers that rotate; the others have no positions."""
    layer_types: tuple[str, ...]
    attention_chunk_size: int
    attn_temperature_tuning: bool
    attn_scale: float
    floor_scale: int
    use_qk_norm: bool
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    rope_parameters: RopeParameters


def read_config(reader: ConfigReader) -> Llama4Config:
    max_positions = reader.size("max_position_embeddings", 131072)
    num_layers = reader.size("num_hidden_layers", maximum=4096)
    rope_layers = read_rope_layers(reader, num_layers)
    kinds = reader.words("layer_types", num_layers, (FULL, CHUNKED))
    vocab_size = reader.size("vocab_size")
    config = Llama4Config(
        vocab_size=vocab_size,
        pad_token_id=reader.padding_row(vocab_size),
        hidden_size=reader.size("hidden_size"),
        intermediate_size=reader.size("intermediate_size"),
        intermediate_size_mlp=reader.size("intermediate_size_mlp", 16384),
        num_hidden_layers=num_layers,
        num_attention_heads=reader.size("num_attention_heads"),
        num_key_value_heads=reader.size("num_key_value_heads", 8),
        head_dim=reader.size("head_dim", 128),
        num_local_experts=reader.size("num_local_experts", 16, maximum=4096),
        num_experts_per_tok=reader.size("num_experts_per_tok", 1),
        moe_layers=read_moe_layers(reader, num_layers),
        rope_layers=rope_layers,
        layer_types=kinds
        or tuple(CHUNKED if i in rope_layers else FULL for i in range(num_layers)),
        attention_chunk_size=reader.size("attention_chunk_size", 8192, minimum=2),
        attn_temperature_tuning=reader.switch("attn_temperature_tuning", True),
        attn_scale=reader.number("attn_scale", 0.1),
        floor_scale=reader.size("floor_scale", 8192),
        use_qk_norm=reader.flag("use_qk_norm", True),
        max_position_embeddings=max_positions,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-5),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=read_attention_bias(reader),
        rope_parameters=RopeParameters(**read_rope(reader, 500000.0, max_positions)),
    )
    reader.pin("hidden_act", "silu", because="the feed-forward is gated by SiLU")
    reader.pin("rope_interleaved", True, because="neighbouring channels are paired")
    reader.lacks("windows", "several positions", "biases of the feed-forward", "slices", "caps")
    reader.lacks("bidirectional layers")
    reader.bookkeeping("for_llm_compressor", "router_jitter_noise")
    check_heads(
        reader.where, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )
    chosen, experts = config.num_experts_per_tok, config.num_local_experts
    if chosen > experts:
        raise reader.contradiction(f"num_experts_per_tok {chosen} > num_local_experts {experts}")
    if CHUNKED in config.layer_types and reader.raw.get("attention_chunk_size", 0) is None:
        raise reader.contradiction(
            "attention_chunk_size is null, and layer_types has chunked_attention: give a length"
        )
    return config


def read_rope_layers(reader: ConfigReader, num_layers: int) -> frozenset[int]:
    """`no_rope_layers` has a 1 for each layer that *rotates*; else all do but each fourth."""
    interval = reader.size("no_rope_layer_interval", 4)
    reader.pin("nope_layer_interval", interval, because="the reference reads another key")
    given = reader.bits("no_rope_layers", num_layers)
    if given is not None:
        return frozenset(i for i, rotates in enumerate(given) if rotates)
    return frozenset(i for i in range(num_layers) if (i + 1) % interval)


def read_moe_layers(reader: ConfigReader, num_layers: int) -> frozenset[int]:
    """Explicit layers win; else every `interleave_moe_layer_step`-th has experts."""
    step = reader.size("interleave_moe_layer_step", 1)
    explicit = reader.layers("moe_layers", num_layers)
    return frozenset(range(step - 1, num_layers, step)) if explicit is None else explicit


def read_multimodal_config(reader: ConfigReader) -> Llama4Config:
    """The language model's part of a config that also describes a vision tower."""
    text = reader.section("text_config")
    text.pin("model_type", "llama4_text", because="no other language model is known in this place")
    config = read_config(text)
    tied = config.tie_word_embeddings
    reader.pin("tie_word_embeddings", tied, because="text_config says whether the head is tied")
    reader.bookkeeping("vision_config", "boi_token_index", "eoi_token_index", "image_token_index")
    return config


class Attention(nn.Module):
    def __init__(self, config: Llama4Config, rotates: bool, kernel: str) -> None:
        super().__init__()
        self.head_dim, self.rotates = config.head_dim, rotates
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bias)
        self.qk_norm = L2Norm(config.rms_norm_eps) if config.use_qk_norm and rotates else None
        self.is_tempered = config.attn_temperature_tuning and not rotates
        if self.is_tempered:
            self.attn_scale, self.floor_scale = config.attn_scale, config.floor_scale
        self.attend = KERNELS[kernel](config.head_dim**-0.5)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        past: int,
        cache: LayerCache | None,
    ) -> Tensor:
        by_head = (*x.shape[:2], -1, self.head_dim)  # (batch, tokens, heads, head_dim)
        query, key, value = (
            projection(x).view(by_head) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rotates:
            query, key = rotate_polar(query, cos, sin), rotate_polar(key, cos, sin)
        if self.qk_norm is not None:
            query, key = self.qk_norm(query), self.qk_norm(key)
        if self.is_tempered:
            query = (query * self.temperature(past, x)).to(x.dtype)
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value)
        context = self.attend(query, key, value, mask)  # (batch, tokens, heads, head_dim)
        output: Tensor = self.o_proj(context.flatten(2))
        return output

    def temperature(self, past: int, x: Tensor) -> Tensor:
        """float32 (tokens, 1, 1): a factor for each query, by how many tokens stand before it, as
        the cache counts them: padding too, and whatever their positions."""
        count = torch.arange(past, past + x.shape[1], device=x.device).float() + 1.0
        factors = torch.log1p(torch.floor(count / self.floor_scale)) * self.attn_scale + 1.0
        return factors[:, None, None]


class Router(nn.Module):
    """The largest few logits, and their sigmoids, which need not sum to anything."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))
        self.num_choices = config.num_experts_per_tok

    def forward(self, x: Tensor) -> Routing:
        logits = F.linear(x, self.weight)  # (tokens, experts)
        chosen, experts = logits.topk(self.num_choices, dim=-1)
        # Of all experts, as the reference does: a sigmoid's last bit depends on its neighbours.
        kept = torch.full_like(logits, -torch.inf).scatter(-1, experts, chosen)
        scores = torch.sigmoid(kept.float()).to(x.dtype)
        return Routing(logits, scores.gather(-1, experts), experts)


class SparseMLP(nn.Module):
    def __init__(self, config: Llama4Config) -> None:
        super().__init__()
        size, expert_size = config.hidden_size, config.intermediate_size
        self.router = Router(config)
        self.experts = ExpertsByChoice(config.num_local_experts, size, expert_size, F.silu)
        self.shared_expert = GatedMLP(size, expert_size, F.silu)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        routing = self.router(x)
        # One after the other as in the reference: it is the order in which gradients are summed.
        routed = self.experts(weighted(x, routing))
        output: Tensor = self.shared_expert(x) + routed.values.sum(1)
        return output  # (batch x tokens, hidden_size)


class Layer(nn.Module):
    def __init__(self, config: Llama4Config, number: int, kernel: str) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, number in config.rope_layers, kernel)
        self.feed_forward = (
            SparseMLP(config)
            if number in config.moe_layers
            else GatedMLP(size, config.intermediate_size_mlp, F.silu)
        )
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        past: int,
        cache: LayerCache | None,
    ) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, mask, past, cache)
        h = h + self.feed_forward(self.post_attention_layernorm(h)).view(h.shape)
        return h


class Decoder(nn.Module):
    def __init__(self, config: Llama4Config, kernel: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.rotary_emb = PolarRotaryEmbedding(config.head_dim, config.rope_parameters)
        self.layers = nn.ModuleList(
            Layer(config, number, kernel) for number in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layer_types = config.layer_types
        self.chunks = {
            kind: None if kind == FULL else config.attention_chunk_size for kind in self.layer_types
        }

    def forward(
        self, input_ids: Tensor, positions: Tensor, cache: Cache | None, padding: Tensor | None
    ) -> Tensor:
        h = self.embed_tokens(input_ids)
        cos, sin = self.rotary_emb(positions, h.dtype)
        num_tokens, past = input_ids.shape[1], 0 if cache is None else cache.length
        masks = {
            kind: visible_keys(num_tokens, past, padding, h.device)
            if chunk is None
            else visible_in_chunk(num_tokens, past, padding, h.device, chunk)
            for kind, chunk in self.chunks.items()
        }
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, kind, layer_cache in zip(self.layers, self.layer_types, caches, strict=True):
            h = layer(h, cos, sin, masks[kind], past, layer_cache)
        output: Tensor = self.norm(h)
        return output


class Llama4(CausalLM):
    config: Llama4Config

    def __init__(self, config: Llama4Config, kernel: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, kernel)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def logits(self, hidden_states: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden_states)
        return logits

    def new_cache(self, batch: int, length: int) -> Cache:
        heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        caches: list[LayerCache] = [
            FullCache(heads, head_dim, length)
            if kind == FULL
            else ChunkedCache(heads, head_dim, self.config.attention_chunk_size)
            for kind in self.config.layer_types
        ]
        return Cache(batch, caches)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of the language model alone, out of a multimodal one."""
    return {
        **{key: config[key] for key in ("torch_dtype", "dtype") if key in config},
        **config["text_config"],
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
    }


VISION = "the vision tower is not ported; this is the language model alone"
WEIGHTS = WeightMap(
    (
        Copy("model.embed_tokens.weight"),
        Copy("model.layers.{layer}.{norm=input|post_attention}_layernorm.weight"),
        Copy("model.layers.{layer}.self_attn.{proj=q|k|v|o}_proj.{part=weight|bias}"),
        Copy("model.layers.{layer}.feed_forward.{proj=gate|up|down}_proj.weight"),
        Copy("model.layers.{layer}.feed_forward.router.weight"),
        Copy("model.layers.{layer}.feed_forward.experts.{proj=gate_up|down}_proj"),
        Copy("model.layers.{layer}.feed_forward.shared_expert.{proj=gate|up|down}_proj.weight"),
        Copy("model.norm.weight"),
        Copy("lm_head.weight"),
        Tie("lm_head.weight", to="model.embed_tokens.weight"),
    ),
    prefixes=("language_model.",),
)

MULTIMODAL_WEIGHTS = WeightMap(
    (
        *WEIGHTS.rules,
        Drop("{part=vision_model|multi_modal_projector}.{*}", because=VISION),
    ),
    prefixes=WEIGHTS.prefixes,
)

_TOKENS, _BY_EXPERT = "batch position channel", "expert batch position channel"

LLAMA4 = Architecture(
    model_type="llama4_text",
    summary="Llama 4, the language model alone",
    read_config=read_config,
    build=Llama4,
    weight_map=WEIGHTS,
)

LLAMA4_MULTIMODAL = Architecture(
    model_type="llama4",
    summary="Llama 4 Scout and Maverick: the language model of the multimodal checkpoint",
    read_config=read_multimodal_config,
    build=Llama4,
    weight_map=MULTIMODAL_WEIGHTS,
    text_config=text_config,
)
