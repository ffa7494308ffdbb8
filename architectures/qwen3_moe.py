"""Qwen3, the sparse models 30B-A3B and 235B-A22B (Yang et al. 2025, arXiv:2505.09388).

Dense Qwen3's block, departing from it in these places:

- the feed-forward is a choice among experts: a router scores all of them by a softmax in float32,
  each token passes through the best few, and their outputs are weighted by these scores, which
  `norm_topk_prob` makes sum to one;
- the layers in `mlp_only_layers`, and those that are no `decoder_sparse_step`-th, are dense;
- where `use_sliding_window` is set and `sliding_window` is not null, all layers slide:
  `max_window_layers` is without effect;
- `head_dim` is hidden_size / num_attention_heads where the file does not say.

On disk every expert has tensors of its own, and so it has here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portkit.architecture import Architecture, CausalLM
from portkit.config import (
    ConfigReader,
    check_heads,
    default_head_dim,
    read_attention_bias,
    read_rope,
)
from portkit.nn.attention import KERNELS, visible_keys
from portkit.nn.cache import Cache, FullCache, LayerCache, SlidingCache
from portkit.nn.mlp import GatedMLP
from portkit.nn.moe import GatedExperts, Routing
from portkit.nn.norms import RMSNorm
from portkit.nn.rope import RopeParameters, RotaryEmbedding, rotate
from portkit.weights import Copy, CopyOfOne, Slice, Tie, WeightMap


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig:
    """The keys of `config.json` that the forward pass depends on."""

    vocab_size: int
    pad_token_id: int | None
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    sparse_layers: frozenset[int]
    """Layers with experts; the others are dense."""
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    rope_parameters: RopeParameters
    window: int | None
    """Every layer's sliding window; None where they see everything."""


def read_config(reader: ConfigReader) -> Qwen3MoeConfig:
    max_positions = reader.size("max_position_embeddings", 32768)
    num_layers = reader.size("num_hidden_layers", maximum=4096)
    hidden_size, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    head_dim = reader.size("head_dim", None)
    slides = reader.flag("use_sliding_window", False)
    window = reader.size("sliding_window", 4096, null=None, minimum=2)
    num_experts, num_choices = read_experts(reader)
    vocab_size = reader.size("vocab_size")
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        pad_token_id=reader.padding_row(vocab_size),
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size"),
        moe_intermediate_size=reader.size("moe_intermediate_size", 768),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=reader.size("num_key_value_heads", 4),
        head_dim=head_dim or default_head_dim(reader.where, hidden_size, heads),
        num_experts=num_experts,
        num_experts_per_tok=num_choices,
        norm_topk_prob=reader.flag("norm_topk_prob", False),
        sparse_layers=read_sparse_layers(reader, num_layers),
        max_position_embeddings=max_positions,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=read_attention_bias(reader),
        rope_parameters=RopeParameters(**read_rope(reader, 10000.0, max_positions)),
        window=window if slides else None,
    )
    reader.pin("hidden_act", "silu", because="the feed-forward is gated by SiLU")
    reader.pin("use_qk_norm", True, because="queries and keys are normalised in any case")
    reader.lacks("neighbouring pairs", "several positions", "biases of the feed-forward")
    reader.lacks("shared experts", "layer types", "slices", "caps", "bidirectional layers")
    reader.told("dual_chunk_attention_config", "attention is whole at any length")
    reader.bookkeeping("max_window_layers")  # the reference does not heed it either
    check_heads(
        reader.where, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )
    return config


def read_experts(reader: ConfigReader) -> tuple[int, int]:
    """How many experts there are, under either name, and how many of them a token takes."""
    newer = reader.size("num_local_experts", None, maximum=4096)
    num_experts = reader.size("num_experts", newer or 128, maximum=4096)
    if newer not in (None, num_experts):
        raise reader.contradiction(
            f"num_experts {num_experts} and num_local_experts {newer} are one number; keep one"
        )
    num_choices = reader.size("num_experts_per_tok", 8)
    if num_choices > num_experts:
        raise reader.contradiction(
            f"num_experts_per_tok {num_choices} is more than num_experts {num_experts}"
        )
    return num_experts, num_choices


def read_sparse_layers(reader: ConfigReader, num_layers: int) -> frozenset[int]:
    dense = reader.layers("mlp_only_layers", num_layers) or ()
    step = reader.size("decoder_sparse_step", 1)
    return frozenset(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)


class Attention(nn.Module):
    def __init__(self, config: Qwen3MoeConfig, kernel: str) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.attend = KERNELS[kernel](config.head_dim**-0.5)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        by_head = (*x.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(x).view(by_head)).transpose(1, 2)
        key = self.k_norm(self.k_proj(x).view(by_head)).transpose(1, 2)
        value = self.v_proj(x).view(by_head).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value)
        context = self.attend(query, key, value, mask)  # (batch, tokens, heads, head_dim)
        output: Tensor = self.o_proj(context.flatten(2))
        return output


class Router(nn.Module):
    """The best few experts of a softmax over all, which is float32; weights in x's dtype."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.num_choices, self.normalise = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x: Tensor) -> Routing:
        logits = F.linear(x, self.weight)  # (tokens, experts)
        probabilities = F.softmax(logits, dim=-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self.num_choices, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(logits, weights.to(x.dtype), experts)


class SparseMLP(nn.Module):
    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = GatedExperts(
            config.num_experts, config.hidden_size, config.moe_intermediate_size, F.silu
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        routing = self.gate(tokens)
        output: Tensor = self.experts(tokens, routing.weights, routing.experts).view(x.shape)
        return output


class Layer(nn.Module):
    def __init__(self, config: Qwen3MoeConfig, is_sparse: bool, kernel: str) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, kernel)
        self.mlp = (
            SparseMLP(config) if is_sparse else GatedMLP(size, config.intermediate_size, F.silu)
        )
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, mask, cache)
        h = h + self.mlp(self.post_attention_layernorm(h))
        return h


class Decoder(nn.Module):
    def __init__(self, config: Qwen3MoeConfig, kernel: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope_parameters)
        self.layers = nn.ModuleList(
            Layer(config, i in config.sparse_layers, kernel)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.window = config.window

    def forward(
        self, input_ids: Tensor, positions: Tensor, cache: Cache | None, padding: Tensor | None
    ) -> Tensor:
        h = self.embed_tokens(input_ids)
        cos, sin = self.rotary_emb(positions, h.dtype)
        past = 0 if cache is None else cache.length
        mask = visible_keys(input_ids.shape[1], past, padding, h.device, self.window)
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            h = layer(h, cos, sin, mask, layer_cache)
        output: Tensor = self.norm(h)
        return output


class Qwen3Moe(CausalLM):
    config: Qwen3MoeConfig

    def __init__(self, config: Qwen3MoeConfig, kernel: str = "sdpa") -> None:
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
        heads, head_dim, window = (
            self.config.num_key_value_heads,
            self.config.head_dim,
            self.config.window,
        )
        return Cache(
            batch,
            [
                SlidingCache(heads, head_dim, window)
                if window
                else FullCache(heads, head_dim, length)
                for _ in range(self.config.num_hidden_layers)
            ],
        )


_EXPERTS = "model.layers.{layer}.mlp.experts"

WEIGHTS = WeightMap(
    (
        Copy("model.embed_tokens.weight"),
        Copy("model.layers.{layer}.input_layernorm.weight"),
        Copy("model.layers.{layer}.self_attn.{proj=q|k|v|o}_proj.{part=weight|bias}"),
        Copy("model.layers.{layer}.self_attn.{part=q|k}_norm.weight"),
        Copy("model.layers.{layer}.post_attention_layernorm.weight"),
        Copy("model.layers.{layer}.mlp.{proj=gate|up|down}_proj.weight"),
        Copy("model.layers.{layer}.mlp.gate.weight"),
        CopyOfOne(
            f"{_EXPERTS}.{{proj=gate|up|down}}_proj.{{expert}}",
            source=f"{_EXPERTS}.{{expert}}.{{proj}}_proj.weight",
        ),
        # As newer tools hold a layer's experts, and as some save them.
        Slice(f"{_EXPERTS}.gate_proj.{{expert}}", f"{_EXPERTS}.gate_up_proj", "expert", 0, 2),
        Slice(f"{_EXPERTS}.up_proj.{{expert}}", f"{_EXPERTS}.gate_up_proj", "expert", 1, 2),
        Slice(f"{_EXPERTS}.down_proj.{{expert}}", f"{_EXPERTS}.down_proj", "expert"),
        Copy("model.norm.weight"),
        Copy("lm_head.weight"),
        Tie("lm_head.weight", to="model.embed_tokens.weight"),
    )
)

QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    summary="Qwen3 30B-A3B and 235B-A22B, the sparse models",
    read_config=read_config,
    build=Qwen3Moe,
    weight_map=WEIGHTS,
)
