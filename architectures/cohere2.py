"""Command R7B and Command A (Cohere, "Command A", 2025, arXiv:2504.00698).

A decoder like Llama's, departing from it in these places:

- the block is parallel: attention and feed-forward read one and the same normalised input, and
  both are added to the residual stream, `h = h + attention(x) + mlp(x)`, in that order;
- norms are layer norms without a bias: the mean is taken off;
- three layers that see a sliding window, then one that sees everything; only the sliding ones
  rotate, the others know of no positions;
- the rotation pairs neighbouring channels, 2i with 2i + 1, in float32;
- logits are multiplied by `logit_scale`; the head is the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from portkit.architecture import Architecture, CausalLM
from portkit.config import (
    ConfigReader,
    by_period,
    check_heads,
    default_head_dim,
    read_attention_bias,
    read_rope,
    read_sliding_layers,
)
from portkit.nn.attention import KERNELS, visible_keys
from portkit.nn.cache import Cache, FullCache, LayerCache, SlidingCache
from portkit.nn.mlp import GatedMLP
from portkit.nn.norms import CentredLayerNorm
from portkit.nn.rope import InterleavedRotaryEmbedding, RopeParameters, rotate_interleaved
from portkit.weights import Copy, Tie, WeightMap

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Cohere2Config:
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
    layer_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    logit_scale: float
    sliding_window: int
    layer_types: tuple[str, ...]
    rope_parameters: RopeParameters
    """Of the sliding layers; the others do not rotate."""


def read_config(reader: ConfigReader) -> Cohere2Config:
    num_heads = reader.size("num_attention_heads")
    hidden_size = reader.size("hidden_size")
    max_positions = reader.size("max_position_embeddings", 8192)
    num_layers = reader.size("num_hidden_layers", maximum=4096)
    vocab_size = reader.size("vocab_size", 256000)
    config = Cohere2Config(
        vocab_size=vocab_size,
        pad_token_id=reader.padding_row(vocab_size, 0),
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=reader.size("num_key_value_heads", num_heads),
        head_dim=reader.size("head_dim", None)
        or default_head_dim(reader.where, hidden_size, num_heads),
        max_position_embeddings=max_positions,
        layer_norm_eps=reader.number("layer_norm_eps", 1e-5),
        tie_word_embeddings=reader.flag("tie_word_embeddings", True),
        attention_bias=read_attention_bias(reader),
        logit_scale=reader.number("logit_scale", 0.0625),
        sliding_window=reader.size("sliding_window", 4096, minimum=2),
        layer_types=read_layer_types(reader, num_layers),
        rope_parameters=RopeParameters(**read_rope(reader, 10000.0, max_positions)),
    )
    reader.pin("hidden_act", "silu", because="the feed-forward is gated by SiLU")
    # Released files describe the block in words of their own, which the reference does not read.
    reader.pin("use_parallel_block", True, because="attention and feed-forward are parallel")
    reader.pin("use_gated_activation", True, because="the feed-forward is gated")
    reader.pin("position_embedding_type", "rope_gptj", because="neighbouring channels are paired")
    reader.bookkeeping("use_embedding_sharing", "use_parallel_embedding")
    reader.pin("rope_interleaved", True, because="neighbouring channels are paired")
    reader.lacks("head norms", "several positions", "biases of the feed-forward", "shared experts")
    reader.lacks("slices", "caps", "bidirectional layers")
    check_heads(reader.where, num_heads, config.num_key_value_heads, config.head_dim)
    return config


def read_layer_types(reader: ConfigReader, num_layers: int) -> tuple[str, ...]:
    """As a list or a period says, sliding layers first; `layer_switch` is the period once more."""
    found = read_sliding_layers(reader, num_layers, 4, FULL, SLIDING)
    reader.pin("order_of_interleaved_layers", "local_attn_first", because="sliding layers lead")
    switch = reader.size("layer_switch", None)
    if switch is not None and by_period(num_layers, switch, FULL, SLIDING) != found:
        raise reader.contradiction(
            f"layer_switch is {switch}, and layer_types, or else sliding_window_pattern, has full "
            "layers elsewhere: keep what was published with the weights"
        )
    return found


class Attention(nn.Module):
    def __init__(self, config: Cohere2Config, kernel: str, kind: str) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.rotates = kind == SLIDING
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
        if self.rotates:
            query, key = rotate_interleaved(query, cos, sin), rotate_interleaved(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value)
        context = self.attend(query, key, value, mask)  # (batch, tokens, heads, head_dim)
        output: Tensor = self.o_proj(context.flatten(2))
        return output


class Layer(nn.Module):
    def __init__(self, config: Cohere2Config, kernel: str, kind: str) -> None:
        super().__init__()
        self.self_attn = Attention(config, kernel, kind)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, F.silu)
        self.input_layernorm = CentredLayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        x = self.input_layernorm(h)
        # From left to right: the order of the two sums decides the last bit.
        h = h + self.self_attn(x, cos, sin, mask, cache) + self.mlp(x)
        return h


class Decoder(nn.Module):
    def __init__(self, config: Cohere2Config, kernel: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layer_types = config.layer_types
        self.windows = {
            kind: None if kind == FULL else config.sliding_window for kind in config.layer_types
        }
        self.rotary_emb = InterleavedRotaryEmbedding(config.head_dim, config.rope_parameters)
        self.layers = nn.ModuleList(
            Layer(config, kernel, config.layer_types[i]) for i in range(config.num_hidden_layers)
        )
        self.norm = CentredLayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self, input_ids: Tensor, positions: Tensor, cache: Cache | None, padding: Tensor | None
    ) -> Tensor:
        h = self.embed_tokens(input_ids)
        num_tokens, past = input_ids.shape[1], 0 if cache is None else cache.length
        cos, sin = self.rotary_emb(positions, h.dtype)
        masks = {
            kind: visible_keys(num_tokens, past, padding, h.device, self.windows[kind])
            for kind in sorted(set(self.layer_types))
        }
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, kind, layer_cache in zip(self.layers, self.layer_types, caches, strict=True):
            h = layer(h, cos, sin, masks[kind], layer_cache)
        output: Tensor = self.norm(h)
        return output


class Cohere2(CausalLM):
    config: Cohere2Config

    def __init__(self, config: Cohere2Config, kernel: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, kernel)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def logits(self, hidden_states: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden_states) * self.config.logit_scale
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


WEIGHTS = WeightMap(
    (
        Copy("model.embed_tokens.weight"),
        Copy("model.layers.{layer}.input_layernorm.weight"),
        Copy("model.layers.{layer}.self_attn.{proj=q|k|v|o}_proj.{part=weight|bias}"),
        Copy("model.layers.{layer}.mlp.{proj=gate|up|down}_proj.weight"),
        Copy("model.norm.weight"),
        Copy("lm_head.weight"),
        Tie("lm_head.weight", to="model.embed_tokens.weight"),
    )
)

COHERE2 = Architecture(
    model_type="cohere2",
    summary="Command R7B and Command A",
    read_config=read_config,
    build=Cohere2,
    weight_map=WEIGHTS,
)
