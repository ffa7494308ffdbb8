"""SmolLM3 (Hugging Face 2025): a decoder like Llama's, departing from it in these places:

- every fourth layer does not rotate queries and keys and so knows of no positions (NoPE: Yang et
  al. 2025, arXiv:2501.18795); `no_rope_layers` has a 1 for each layer that *does* rotate;
- where sliding windows are switched on, it is the layers without positions that slide.
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
from portkit.nn.cache import Cache, FullCache, LayerCache, SlidingCache
from portkit.nn.mlp import GatedMLP
from portkit.nn.norms import RMSNorm
from portkit.nn.rope import RopeParameters, RotaryEmbedding, rotate
from portkit.weights import Copy, Tie, WeightMap

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class SmolLM3Config:
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
    no_rope_layers: tuple[bool, ...]
    """By the file's own word: whether a layer rotates."""
    windows: tuple[int | None, ...]
    """Each layer's sliding window; None where it sees everything."""


def read_config(reader: ConfigReader) -> SmolLM3Config:
    num_heads = reader.size("num_attention_heads")
    hidden_size = reader.size("hidden_size")
    max_positions = reader.size("max_position_embeddings", 32768)
    num_layers = reader.size("num_hidden_layers", maximum=4096)
    no_rope_layers = read_no_rope_layers(reader, num_layers)
    vocab_size = reader.size("vocab_size")
    config = SmolLM3Config(
        vocab_size=vocab_size,
        pad_token_id=reader.padding_row(vocab_size, 128004),
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=reader.size("num_key_value_heads", 4),
        head_dim=reader.size("head_dim", None)
        or default_head_dim(reader.where, hidden_size, num_heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=reader.flag("tie_word_embeddings", True),
        attention_bias=read_attention_bias(reader),
        mlp_bias=reader.flag("mlp_bias", False),
        rope_parameters=RopeParameters(**read_rope(reader, 2e6, max_positions)),
        no_rope_layers=no_rope_layers,
        windows=read_windows(reader, no_rope_layers),
    )
    reader.pin("hidden_act", "silu", because="the feed-forward is gated by SiLU")
    reader.lacks("head norms", "neighbouring pairs", "several positions", "shared experts")
    reader.lacks("caps", "bidirectional layers")
    # Written by the released file; neither the reference nor this port reads them.
    reader.bookkeeping("max_window_layers", "pretraining_tp")
    check_heads(reader.where, num_heads, config.num_key_value_heads, config.head_dim)
    return config


def read_no_rope_layers(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Explicit layers win; else each `no_rope_layer_interval`-th does not rotate."""
    interval = reader.size("no_rope_layer_interval", 4)
    given = reader.bits("no_rope_layers", num_layers)
    return given or tuple((i + 1) % interval != 0 for i in range(num_layers))


def read_windows(reader: ConfigReader, rotates: tuple[bool, ...]) -> tuple[int | None, ...]:
    """Each layer's window; explicit `layer_types` win over where the switch puts them."""
    slides = reader.flag("use_sliding_window", False)
    window = reader.size("sliding_window", None, minimum=2)
    kinds = reader.words("layer_types", len(rotates), (FULL, SLIDING)) or tuple(
        SLIDING if slides and window and not one else FULL for one in rotates
    )
    if SLIDING in kinds and window is None:
        raise reader.contradiction("layer_types names sliding layers, sliding_window is null")
    return tuple(window if kind == SLIDING else None for kind in kinds)


class Attention(nn.Module):
    def __init__(self, config: SmolLM3Config, kernel: str, rotates: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.rotates = rotates
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
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value)
        context = self.attend(query, key, value, mask)  # (batch, tokens, heads, head_dim)
        output: Tensor = self.o_proj(context.flatten(2))
        return output


class Layer(nn.Module):
    def __init__(self, config: SmolLM3Config, kernel: str, rotates: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, kernel, rotates)
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
    def __init__(self, config: SmolLM3Config, kernel: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope_parameters)
        self.layers = nn.ModuleList(
            Layer(config, kernel, config.no_rope_layers[i]) for i in range(config.num_hidden_layers)
        )
        self.windows = config.windows
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, positions: Tensor, cache: Cache | None, padding: Tensor | None
    ) -> Tensor:
        h = self.embed_tokens(input_ids)
        cos, sin = self.rotary_emb(positions, h.dtype)
        num_tokens, past = input_ids.shape[1], 0 if cache is None else cache.length
        masks = {
            window: visible_keys(num_tokens, past, padding, h.device, window)
            for window in dict.fromkeys(self.windows)
        }
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, window, layer_cache in zip(self.layers, self.windows, caches, strict=True):
            h = layer(h, cos, sin, masks[window], layer_cache)
        output: Tensor = self.norm(h)
        return output


class SmolLM3(CausalLM):
    config: SmolLM3Config

    def __init__(self, config: SmolLM3Config, kernel: str = "sdpa") -> None:
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
        return Cache(
            batch,
            [
                FullCache(heads, head_dim, length)
                if window is None
                else SlidingCache(heads, head_dim, window)
                for window in self.config.windows
            ],
        )


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
    )
)

SMOLLM3 = Architecture(
    model_type="smollm3",
    summary="SmolLM3",
    read_config=read_config,
    build=SmolLM3,
    weight_map=WEIGHTS,
)
