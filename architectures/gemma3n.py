"""Gemma 3n (Google 2025): the language model of E2B and E4B, and of what is sliced out of them.

A decoder like Gemma 3's (sliding and full layers with periods of their own, sandwich norms, a head
tied to the scaled embedding), departing from it in these places:

- norms multiply by `weight`, not `1 + weight`, in float32, the cast last; values are normalised
  too, without a weight, and scores are not scaled at all;
- AltUp (Baykal et al. 2023, arXiv:2301.13310): the residual stream is several streams, (streams,
  batch, tokens, hidden). A layer *predicts* all of them, runs on one, the active stream, and
  *corrects* the others by what that came out as;
- LAuReL (Menghani et al. 2024, arXiv:2411.07501): beside attention a low-rank residual branch;
- per-layer embeddings: each token has a small vector for each layer, which gates what the layer
  adds to the inactive streams. The table is a third of all parameters, and only the rows of the
  tokens that come are ever read: loaded as stored, it stays in the mapped file;
- the first layers' feed-forward is sparse: a gate counts only above a quantile of its normal fit;
- the last `num_kv_shared_layers` layers have no keys and values of their own and see those of the
  last layer of their type that has;
- MatFormer (Devvrit et al. 2023, arXiv:2310.07707): layers have widths of their own, and a smaller
  model is the first rows of a larger one.

The clipping of AltUp's coefficients, which the reference does in training alone, is not here. What
`config.json` says, and how it is checked, is in `gemma3n_config.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from architectures.gemma3n_config import (
    FULL,
    Gemma3nConfig,
    nested_config,
    read_config,
    read_multimodal_config,
    text_config,
)
from portkit.architecture import Architecture, CausalLM, Nesting
from portkit.nn.attention import KERNELS, visible_keys
from portkit.nn.cache import Cache, FullCache, LayerCache, SharedKeys, SlidingCache
from portkit.nn.embedding import ScaledEmbedding
from portkit.nn.mlp import SparseGatedMLP, gelu_tanh
from portkit.nn.norms import LateCastRMSNorm, WeightlessRMSNorm
from portkit.nn.rope import RotaryEmbedding, rotate_by_token
from portkit.nn.streams import AltUp, Laurel, gathered, spread
from portkit.weights import Copy, Drop, Tie, WeightMap


class Attention(nn.Module):
    def __init__(self, config: Gemma3nConfig, kernel: str, has_own_kv: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.has_own_kv = has_own_kv
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.q_norm = LateCastRMSNorm(config.head_dim, config.rms_norm_eps)
        if has_own_kv:
            self.k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
            self.v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
            self.k_norm = LateCastRMSNorm(config.head_dim, config.rms_norm_eps)
            self.v_norm = WeightlessRMSNorm(config.rms_norm_eps)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bias)
        self.attend = KERNELS[kernel](1.0)

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: LayerCache | None,
        shared: SharedKeys,
    ) -> Tensor:
        cos, sin = position_embeddings
        by_head = (*x.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(x).view(by_head))  # (batch, tokens, heads, head_dim)
        query = rotate_by_token(query, cos, sin).transpose(1, 2)
        if self.has_own_kv:
            key = self.k_norm(self.k_proj(x).view(by_head))
            key = rotate_by_token(key, cos, sin).transpose(1, 2)
            value = self.v_norm(self.v_proj(x).view(by_head)).transpose(1, 2)
            if cache is not None:
                key, value = cache.update(key, value)
            shared.update(key, value)
        else:
            key, value = shared.shown()
        context = self.attend(query, key, value, mask)  # (batch, tokens, heads, head_dim)
        output: Tensor = self.o_proj(context.flatten(2))
        return output


class Layer(nn.Module):
    def __init__(self, config: Gemma3nConfig, kernel: str, number: int) -> None:
        super().__init__()
        size, per_layer, eps = (
            config.hidden_size,
            config.hidden_size_per_layer_input,
            config.rms_norm_eps,
        )
        self.scales_correction = config.altup_correct_scale
        self.self_attn = Attention(config, kernel, number < config.num_own_kv_layers)
        self.mlp = SparseGatedMLP(
            size, config.intermediate_size[number], config.activation_sparsity_pattern[number]
        )
        self.altup = AltUp(size, config.altup_num_inputs, config.altup_active_idx, eps)
        self.laurel = Laurel(size, config.laurel_rank, eps)
        self.input_layernorm = LateCastRMSNorm(size, eps)
        self.post_attention_layernorm = LateCastRMSNorm(size, eps)
        self.pre_feedforward_layernorm = LateCastRMSNorm(size, eps)
        self.post_feedforward_layernorm = LateCastRMSNorm(size, eps)
        self.per_layer_input_gate = nn.Linear(size, per_layer, bias=False)
        self.per_layer_projection = nn.Linear(per_layer, size, bias=False)
        self.post_per_layer_input_norm = LateCastRMSNorm(size, eps)

    def forward(
        self,
        streams: Tensor,
        per_layer_input: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: LayerCache | None,
        shared: SharedKeys,
    ) -> Tensor:
        predictions = self.altup.predict(streams)
        h = predictions[self.altup.active]
        x = self.input_layernorm(h)
        laurel = self.laurel(x)
        attended = self.self_attn(x, position_embeddings, mask, cache, shared)
        h = h + self.post_attention_layernorm(attended)
        h = (h + laurel) / math.sqrt(2)
        h = h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))
        streams = self.altup.correct(predictions, h)

        h = streams[self.altup.active]
        if self.scales_correction:
            h = h * self.altup.correct_output_scale
        h = gelu_tanh(self.per_layer_input_gate(h)) * per_layer_input
        h = self.post_per_layer_input_norm(self.per_layer_projection(h))
        # The first stream gets none of it, whichever is the active one.
        return torch.cat((streams[:1], streams[1:] + h))


class Decoder(nn.Module):
    per_layer_projection_scale: Tensor
    per_layer_input_scale: Tensor

    def __init__(self, config: Gemma3nConfig, kernel: str) -> None:
        super().__init__()
        self.config = config
        size, per_layer = config.hidden_size, config.hidden_size_per_layer_input
        all_layers = config.num_hidden_layers * per_layer
        num_inactive = config.altup_num_inputs - 1
        self.windows = {
            kind: None if kind == FULL else config.sliding_window for kind in config.layer_types
        }
        self.embed_tokens = ScaledEmbedding(config.vocab_size, size, size**0.5, config.pad_token_id)
        self.embed_tokens_per_layer = ScaledEmbedding(
            config.vocab_size_per_layer_input, all_layers, per_layer**0.5, config.pad_token_id
        )
        self.per_layer_model_projection = nn.Linear(size, all_layers, bias=False)
        self.per_layer_projection_norm = LateCastRMSNorm(per_layer, config.rms_norm_eps)
        self.altup_projections = nn.ModuleList(
            nn.Linear(size, size, bias=False) for _ in range(num_inactive)
        )
        self.altup_unembed_projections = nn.ModuleList(
            nn.Linear(size, size, bias=False) for _ in range(num_inactive)
        )
        self.rotary_emb = nn.ModuleDict(
            {
                kind: RotaryEmbedding(config.head_dim, config.rope_parameters[kind])
                for kind in sorted(set(config.layer_types))
            }
        )
        self.layers = nn.ModuleList(
            Layer(config, kernel, number) for number in range(config.num_hidden_layers)
        )
        self.norm = LateCastRMSNorm(size, config.rms_norm_eps)
        for name, scale in (("projection", size**-0.5), ("input", 2**-0.5)):
            constant = torch.tensor(scale, device="cpu")
            self.register_buffer(f"per_layer_{name}_scale", constant, persistent=False)

    def forward(
        self, input_ids: Tensor, positions: Tensor, cache: Cache | None, padding: Tensor | None
    ) -> Tensor:
        embedded = self.embed_tokens(input_ids)
        per_layer_inputs = self.per_layer_inputs(input_ids, embedded)
        num_tokens, past = input_ids.shape[1], 0 if cache is None else cache.length
        tables, masks = {}, {}
        for kind, rotary_emb in self.rotary_emb.items():
            tables[kind] = rotary_emb(positions, embedded.dtype)
            masks[kind] = visible_keys(
                num_tokens, past, padding, embedded.device, self.windows[kind]
            )
        # Only layers with keys of their own have a cache.
        caches: Sequence[LayerCache] = () if cache is None else cache.layers
        shared = {kind: SharedKeys() for kind in tables}
        streams = spread(embedded, self.altup_projections)
        for number, kind in enumerate(self.config.layer_types):
            streams = self.layers[number](
                streams,
                per_layer_inputs[:, :, number],
                tables[kind],
                masks[kind],
                caches[number] if number < len(caches) else None,
                shared[kind],
            )
        output: Tensor = self.norm(gathered(streams, self.altup_unembed_projections))
        return output

    def per_layer_inputs(self, input_ids: Tensor, embedded: Tensor) -> Tensor:
        """What each layer gets of each token: (batch, tokens, layers, hidden_per_layer)."""
        by_layer = (self.config.num_hidden_layers, self.config.hidden_size_per_layer_input)
        known = input_ids < self.config.vocab_size_per_layer_input
        looked_up = self.embed_tokens_per_layer(input_ids.where(known, 0)).unflatten(-1, by_layer)
        projected = self.per_layer_model_projection(embedded) * self.per_layer_projection_scale
        projected = self.per_layer_projection_norm(projected.unflatten(-1, by_layer))
        inputs: Tensor = (projected + looked_up) * self.per_layer_input_scale
        return inputs


class Gemma3n(CausalLM):
    config: Gemma3nConfig

    def __init__(self, config: Gemma3nConfig, kernel: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, kernel)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def logits(self, hidden_states: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        logits: Tensor = torch.tanh(self.lm_head(hidden_states) / cap) * cap
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
                for kind in config.layer_types[: config.num_own_kv_layers]
            ],
        )


NESTING = Nesting(
    nested_config,
    by_layer={
        "model.embed_tokens_per_layer.weight": 1,
        "model.per_layer_model_projection.weight": 0,
    },
)

NORMS = "input|post_attention|pre_feedforward|post_feedforward"
SHARED = "this layer sees the keys and values of an earlier one"
TOWER = "the vision and audio towers are not ported; this is the language model alone"

# Of a multimodal file, whether its towers are there or not.
PREFIXES = ("language_model.", "model.language_model.")

WEIGHTS = WeightMap(
    (
        Copy("model.embed_tokens.weight"),
        Copy("model.embed_tokens_per_layer.weight"),
        Copy("model.per_layer_model_projection.weight"),
        Copy("model.per_layer_projection_norm.weight"),
        Copy("model.altup_{way=|unembed_}projections.{stream}.weight"),
        Copy(f"model.layers.{{layer}}.{{norm={NORMS}}}_layernorm.weight"),
        Copy("model.layers.{layer}.self_attn.{proj=q|k|v|o}_proj.{part=weight|bias}"),
        Copy("model.layers.{layer}.self_attn.{part=q|k}_norm.weight"),
        Copy("model.layers.{layer}.mlp.{proj=gate|up|down}_proj.weight"),
        Copy("model.layers.{layer}.altup.correct_output_scale"),
        Copy("model.layers.{layer}.altup.{what=correction|prediction}_coefs.weight"),
        Copy("model.layers.{layer}.altup.{what=modality_router|router_norm}.weight"),
        Copy("model.layers.{layer}.laurel.linear_{side=left|right}.weight"),
        Copy("model.layers.{layer}.laurel.post_laurel_norm.weight"),
        Copy("model.layers.{layer}.per_layer_{what=input_gate|projection}.weight"),
        Copy("model.layers.{layer}.post_per_layer_input_norm.weight"),
        Copy("model.norm.weight"),
        Copy("lm_head.weight"),
        Tie("lm_head.weight", to="model.embed_tokens.weight"),
        Drop("model.layers.{layer}.self_attn.{proj=k|v}_proj.{part=weight|bias}", because=SHARED),
        Drop("model.layers.{layer}.self_attn.k_norm.weight", because=SHARED),
    ),
    prefixes=PREFIXES,
)

MULTIMODAL_WEIGHTS = WeightMap(
    (
        *WEIGHTS.rules,
        *(
            Drop(f"{tower}.{{*}}", because=TOWER)
            for tower in ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
        ),
    ),
    prefixes=PREFIXES,
)


GEMMA3N = Architecture(
    model_type="gemma3n_text",
    summary="Gemma 3n E2B and E4B: the language model alone, and what is sliced out of it",
    read_config=read_config,
    build=Gemma3n,
    weight_map=WEIGHTS,
    nesting=NESTING,
)

GEMMA3N_MULTIMODAL = Architecture(
    model_type="gemma3n",
    summary="Gemma 3n E2B and E4B: the language model of the multimodal checkpoint",
    read_config=read_multimodal_config,
    build=Gemma3n,
    weight_map=MULTIMODAL_WEIGHTS,
    text_config=text_config,
    nesting=NESTING,
)
