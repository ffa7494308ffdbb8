"""What `config.json` says of a Gemma 3n: the text model's keys, in a file of their own or within a
multimodal one's; how they hang together; and the config of a smaller model within a larger.

`gemma3n.py` is the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from portkit.config import (
    MAX_SIZE,
    ConfigReader,
    check_heads,
    read_attention_bias,
    read_rope_by_layer_type,
)
from portkit.nn.rope import RopeParameters

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Gemma3nConfig:
    """The keys of `config.json` that the forward pass depends on."""

    vocab_size: int
    pad_token_id: int | None
    """Its rows in both embeddings, counted from the end where negative, get no gradient."""
    vocab_size_per_layer_input: int
    """Rows of the per-layer embeddings; a token beyond them has row 0's."""
    hidden_size: int
    hidden_size_per_layer_input: int
    intermediate_size: tuple[int, ...]
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    sliding_window: int
    layer_types: tuple[str, ...]
    final_logit_softcapping: float
    altup_num_inputs: int
    altup_active_idx: int
    altup_correct_scale: bool
    num_kv_shared_layers: int
    laurel_rank: int
    activation_sparsity_pattern: tuple[float, ...]
    rope_parameters: Mapping[str, RopeParameters]
    """By layer type."""

    @property
    def num_own_kv_layers(self) -> int:
        """The first so many layers have keys and values of their own."""
        return self.num_hidden_layers - self.num_kv_shared_layers


def read_config(reader: ConfigReader) -> Gemma3nConfig:
    max_positions = reader.size("max_position_embeddings", 32768)
    num_layers = reader.size("num_hidden_layers", maximum=4096)
    rope = read_rope_by_layer_type(
        reader,
        default_thetas={FULL: 1e6, SLIDING: 1e4},
        legacy_theta_keys={FULL: "rope_theta", SLIDING: "rope_local_base_freq"},
        scaled=FULL,
        max_position_embeddings=max_positions,
    )
    config = Gemma3nConfig(
        vocab_size=reader.size("vocab_size", 262400),
        pad_token_id=reader.size("pad_token_id", 0, null=None, minimum=-MAX_SIZE),
        vocab_size_per_layer_input=reader.size("vocab_size_per_layer_input", 262144),
        hidden_size=reader.size("hidden_size"),
        hidden_size_per_layer_input=reader.size("hidden_size_per_layer_input", 256),
        intermediate_size=reader.sizes("intermediate_size", num_layers),
        num_hidden_layers=num_layers,
        num_attention_heads=reader.size("num_attention_heads", 8),
        num_key_value_heads=reader.size("num_key_value_heads", 2),
        head_dim=reader.size("head_dim", 256),
        max_position_embeddings=max_positions,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=reader.flag("tie_word_embeddings", True),
        attention_bias=read_attention_bias(reader),
        sliding_window=reader.size("sliding_window", 512, minimum=2),
        layer_types=reader.words("layer_types", num_layers, (FULL, SLIDING))
        or tuple(SLIDING if (i + 1) % 5 else FULL for i in range(num_layers)),
        final_logit_softcapping=reader.number("final_logit_softcapping", 30.0),
        altup_num_inputs=reader.size("altup_num_inputs", 4, minimum=2, maximum=64),
        altup_active_idx=reader.size("altup_active_idx", 0, minimum=0),
        altup_correct_scale=reader.flag("altup_correct_scale", True),
        num_kv_shared_layers=reader.size("num_kv_shared_layers", 15, minimum=0),
        laurel_rank=reader.size("laurel_rank", 64),
        activation_sparsity_pattern=reader.fractions("activation_sparsity_pattern", num_layers)
        or tuple(0.95 if i < 10 and num_layers > 10 else 0.0 for i in range(num_layers)),
        rope_parameters={kind: RopeParameters(**given) for kind, given in rope.items()},
    )
    for key in ("hidden_activation", "hidden_act"):
        reader.pin(key, "gelu_pytorch_tanh", because="the feed-forward is gated by this GELU")
    reader.bookkeeping("altup_coef_clip", "altup_lr_multiplier")
    reader.pin("use_qk_norm", True, because="queries and keys are normalised in any case")
    reader.lacks("neighbouring pairs", "several positions", "biases of the feed-forward")
    reader.lacks("shared experts", "slices", "bidirectional layers")
    reader.pin("attn_logit_softcapping", because="scores are not capped")
    check_heads(
        reader.where, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )
    check_streams(reader, config)
    return config


def check_streams(reader: ConfigReader, config: Gemma3nConfig) -> None:
    """The active stream is one of them, and each layer without keys finds some to share."""
    num_rows = min(config.vocab_size, config.vocab_size_per_layer_input)
    if config.pad_token_id is not None and not -num_rows <= config.pad_token_id < num_rows:
        raise reader.contradiction(
            f"pad_token_id {config.pad_token_id} has no row in embeddings of {config.vocab_size} "
            f"and, by layer, {config.vocab_size_per_layer_input} tokens"
        )
    if config.altup_active_idx >= config.altup_num_inputs:
        raise reader.contradiction(
            f"altup_active_idx {config.altup_active_idx} is none of the "
            f"altup_num_inputs {config.altup_num_inputs} streams, which count from 0"
        )
    own = config.num_own_kv_layers
    if own < 1:
        raise reader.contradiction(
            f"num_kv_shared_layers {config.num_kv_shared_layers} leaves none of the "
            f"num_hidden_layers {config.num_hidden_layers} with keys to share"
        )
    for kind in sorted({*config.layer_types[own:]} - {*config.layer_types[:own]}):
        raise reader.contradiction(
            f"layer_types: a {kind} layer shares keys, and none of the first {own} layers is "
            f"one (num_kv_shared_layers {config.num_kv_shared_layers})"
        )


def read_multimodal_config(reader: ConfigReader) -> Gemma3nConfig:
    """The language model's part of a config that also describes vision and audio towers."""
    text = reader.section("text_config")
    text.pin("model_type", "gemma3n_text", because="no other language model is known in this place")
    config = read_config(text)
    reader.bookkeeping(
        "vision_config",
        "audio_config",
        *(f"{kind}_soft_tokens_per_image" for kind in ("vision", "audio")),
        *(f"{kind}_token_id" for kind in ("image", "audio", "boi", "eoi", "boa", "eoa")),
    )
    tie_word_embeddings = reader.flag("tie_word_embeddings", config.tie_word_embeddings)
    return replace(config, tie_word_embeddings=tie_word_embeddings)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of the language model alone, out of a multimodal one."""
    outer = ("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")
    text = config["text_config"]
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    return {
        **{key: config[key] for key in outer if key in config},
        **text,
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        "tie_word_embeddings": tied,
    }


def nested_config(
    reader: ConfigReader, widths: Sequence[int], kept: Sequence[int]
) -> dict[str, Any]:
    """`config.json` of the layers `kept`, with feed-forwards of `widths`."""
    whole = read_config(reader)
    own = [layer for layer in kept if layer < whole.num_own_kv_layers]

    def shown_by(kind: str, layers: Sequence[int]) -> int | None:
        return max((one for one in layers if whole.layer_types[one] == kind), default=None)

    for kind in sorted({whole.layer_types[layer] for layer in kept if layer not in own}):
        source = shown_by(kind, range(whole.num_own_kv_layers))
        if shown_by(kind, own) != source:
            raise reader.contradiction(
                f"layer {source} cannot be dropped: later {kind} layers see its keys and values"
            )
    return {
        **reader.raw,
        "num_hidden_layers": len(kept),
        "num_kv_shared_layers": len(kept) - len(own),
        "intermediate_size": list(widths),
        "layer_types": [whole.layer_types[layer] for layer in kept],
        "activation_sparsity_pattern": [whole.activation_sparsity_pattern[i] for i in kept],
    }
