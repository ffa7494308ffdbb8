"""Llama 3, 3.1, 3.2 and 3.3 (Grattafiori et al. 2024, arXiv:2407.21783).

The plain decoder that the other families depart from: pre-norm blocks, grouped-query attention,
rotary positions, a gated SiLU feed-forward.

    h = h + attention(norm(h))
    h = h + mlp(norm(h))

Every layer attends to everything before it. Llama 3.1 and later stretch the rotary periods
(`llama3` scaling); the small models of 3.2 tie the head to the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from portkit.nn.cache import Cache, FullCache, LayerCache
from portkit.nn.mlp import GatedMLP
from portkit.nn.norms import RMSNorm
from portkit.nn.rope import RopeParameters, RotaryEmbedding, rotate
from portkit.weights import Copy, Drop, Tie, WeightMap


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
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
    mlp_bias: bool
    rope_parameters: RopeParameters


def read_config(reader: ConfigReader) -> LlamaConfig:
    hidden_size = reader.size("hidden_size")
    num_heads = reader.size("num_attention_heads")
    max_positions = reader.size("max_position_embeddings", 2048)
    vocab_size = reader.size("vocab_size")
    config = LlamaConfig(
        vocab_size=vocab_size,
        pad_token_id=reader.padding_row(vocab_size),
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size"),
        num_hidden_layers=reader.size("num_hidden_layers", maximum=4096),
        num_attention_heads=num_heads,
        num_key_value_heads=reader.size("num_key_value_heads", num_heads),
        head_dim=reader.size("head_dim", None)
        or default_head_dim(reader.where, hidden_size, num_heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=read_attention_bias(reader),
        mlp_bias=reader.flag("mlp_bias", False),
        rope_parameters=RopeParameters(**read_rope(reader, 10000.0, max_positions)),
    )
    reader.pin("hidden_act", "silu", because="the feed-forward is gated by SiLU")
    reader.pin("is_llama_config", True, because="another family has a model_type of its own")
    reader.lacks("windows", "layer types", "head norms", "neighbouring pairs", "several positions")
    reader.lacks("shared experts", "slices", "caps", "bidirectional layers")
    check_heads(reader.where, num_heads, config.num_key_value_heads, config.head_dim)
    return config


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, kernel: str) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bias)
        self.attend = KERNELS[kernel](config.head_dim**-0.5)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        by_head = (*x.shape[:2], -1, self.head_dim)
        query = self.q_proj(x).view(by_head).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        key = self.k_proj(x).view(by_head).transpose(1, 2)
        value = self.v_proj(x).view(by_head).transpose(1, 2)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value)
        context = self.attend(query, key, value, mask)  # (batch, tokens, heads, head_dim)
        output: Tensor = self.o_proj(context.flatten(2))
        return output


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, kernel: str) -> None:
        super().__init__()
        self.self_attn = Attention(config, kernel)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, F.silu, config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, mask, cache)
        h = h + self.mlp(self.post_attention_layernorm(h))
        return h


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig, kernel: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope_parameters)
        self.layers = nn.ModuleList(Layer(config, kernel) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, positions: Tensor, cache: Cache | None, padding: Tensor | None
    ) -> Tensor:
        h = self.embed_tokens(input_ids)
        cos, sin = self.rotary_emb(positions, h.dtype)
        past = 0 if cache is None else cache.length
        mask = visible_keys(input_ids.shape[1], past, padding, h.device)
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            h = layer(h, cos, sin, mask, layer_cache)
        output: Tensor = self.norm(h)
        return output


class Llama(CausalLM):
    config: LlamaConfig

    def __init__(self, config: LlamaConfig, kernel: str = "sdpa") -> None:
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
        layers = range(self.config.num_hidden_layers)
        return Cache(batch, [FullCache(heads, head_dim, length) for _ in layers])


WEIGHTS = WeightMap(
    (
        Copy("model.embed_tokens.weight"),
        Copy("model.layers.{layer}.input_layernorm.weight"),
        Copy("model.layers.{layer}.self_attn.{proj=q|k|v|o}_proj.{part=weight|bias}"),
        Copy("model.layers.{layer}.post_attention_layernorm.weight"),
        Copy("model.layers.{layer}.mlp.{proj=gate|up|down}_proj.{part=weight|bias}"),
        Copy("model.norm.weight"),
        Copy("lm_head.weight"),
        Tie("lm_head.weight", to="model.embed_tokens.weight"),
        Drop(
            "model.layers.{layer}.self_attn.rotary_emb.inv_freq",
            because="rotary frequencies are computed from the config",
        ),
    )
)

LLAMA = Architecture(
    model_type="llama",
    summary="Llama 3, 3.1, 3.2, 3.3 and what shares their shape",
    read_config=read_config,
    build=Llama,
    weight_map=WEIGHTS,
)
