"""Small configs of every family, and keys with the values that a family takes or refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Raw = dict[str, Any]
GONE = object()
SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, Raw] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "qwen3_moe": {
        **SIZES,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "mistral": {**SIZES, "sliding_window": 5},
    "smollm3": {**SIZES, "num_hidden_layers": 5, "pad_token_id": 3},
    "cohere2": {**SIZES, "num_hidden_layers": 5, "sliding_window": 5},
    "gemma3_text": {**SIZES, "num_hidden_layers": 7, "sliding_window": 5},
    "gemma3n_text": {
        **SIZES,
        "num_hidden_layers": 6,
        "sliding_window": 5,
        "num_kv_shared_layers": 1,
        "vocab_size_per_layer_input": 59,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "llama4_text": {
        **SIZES,
        "num_hidden_layers": 4,
        "intermediate_size": 32,
        "intermediate_size_mlp": 40,
        "num_local_experts": 3,
        "attention_chunk_size": 5,
        "floor_scale": 3,
    },
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DUAL_CHUNKS = {"chunk_size": 8, "local_size": 2, "original_max_position_embeddings": 16}

TAKEN_BY_ALL: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (GONE, 0.0, 0.5),
    "bos_token_id": (GONE, None, 1),
    "chunk_size_feed_forward": (0, 4),
    "eos_token_id": (GONE, None, 1, [1, 2]),
    "head_dim": (GONE, 8),
    "id2label": (None, {"0": "LABEL_0", "1": "LABEL_1"}),
    "is_decoder": (None, False, True),
    "max_position_embeddings": (GONE, 32),
    "original_max_position_embeddings": (GONE, None, 16),
    "pad_token_id": (None, 0, 5, -1),
    "partial_rotary_factor": (None, 1.0),
    "rope_parameters": (GONE, None, {}),
    "rope_scaling": (GONE, None, {}, YARN, LLAMA3, {**YARN, "attn_factor": 0.8}),
    "rope_theta": (GONE, 10000, 5e5),
    "tie_word_embeddings": (GONE, True, False),
    "use_cache": (GONE, True, False),
}
"""By key: values that every family computes as the reference does."""

TAKEN: dict[str, Mapping[str, tuple[Any, ...]]] = {
    "llama": {
        "attention_bias": (GONE, False, True),
        "head_dim": (None,),
        "is_llama_config": (None, True),
        "mlp_bias": (GONE, False, True),
        "num_key_value_heads": (GONE, None, 4),
        "rms_norm_eps": (GONE, 1e-6, 1e-3),
        "rope_interleaved": (None, False),
        "sliding_window": (GONE, None),
        "use_qk_norm": (None, False),
    },
    "qwen2": {
        "attention_bias": (GONE, True),
        "dual_chunk_attention_config": (None, DUAL_CHUNKS),
        "layer_types": (GONE, None),
        "num_key_value_heads": (None, 4),
        "qkv_bias": (None, True),
        "sliding_window": (GONE, None, 4),
        "use_sliding_window": (GONE, False, True),
    },
    "qwen3": {
        "attention_bias": (GONE, False, True),
        "dual_chunk_attention_config": (DUAL_CHUNKS,),
        "num_key_value_heads": (None, 4),
        "qkv_bias": (False,),
        "use_qk_norm": (None, True),
    },
    "qwen3_moe": {
        "dual_chunk_attention_config": (DUAL_CHUNKS,),
        "norm_topk_prob": (GONE, False, True),
        "qkv_bias": (None, False),
        "shared_expert_intermediate_size": (None, 0),
        "sliding_window": (GONE, None, 4),
        "use_qk_norm": (None, True),
        "use_sliding_window": (GONE, False, True),
    },
    "mistral": {
        "attention_bias": (GONE, None, False),
        "head_dim": (None,),
        "sliding_window": (GONE, None, 4),
        "qkv_bias": (False,),
    },
    "smollm3": {
        "no_rope_layers": (GONE, None, [1, 0, 1, 1, 0]),
        "num_key_value_heads": (GONE, None, 4),
        "use_sliding_window": (GONE, False, True),
    },
    "cohere2": {
        "_sliding_window_pattern": (2, 3, 4),
        "layer_switch": (None, 4),
        "layer_types": (GONE, None),
        "logit_scale": (GONE, 0.0625, 0.5),
        "num_key_value_heads": (None, 4),
        "rope_interleaved": (None, True),
        "sliding_window_pattern": (GONE, 2, 4),
    },
    "gemma3_text": {
        "_sliding_window_pattern": (2, 3, 6),
        "final_logit_softcapping": (GONE, None, 3.0),
        "layer_types": (GONE, None, ["full_attention"] * 7),
        "sliding_window_pattern": (GONE, 2, 6),
        "use_bidirectional_attention": (None, False),
        "use_qk_norm": (True,),
    },
    "gemma3n_text": {
        "final_logit_softcapping": (GONE, 3.0),
        "pad_token_id": (-59, 58),
        "use_qk_norm": (True,),
    },
    "llama4_text": {
        "no_rope_layers": (GONE, None, [], [0, 1, 1, 0]),
        "rope_interleaved": (True,),
        "rope_scaling": ({**LLAMA3, "high_freq_factor": 1.0},),
        "use_qk_norm": (GONE, True, False),
    },
}
"""Likewise, of one family."""

REFUSED: dict[str, Mapping[str, tuple[Any, ...]]] = {
    "llama": {
        "is_llama_config": (False,),
        "qkv_bias": (True,),
        "rope_interleaved": (True,),
        "rope_scaling": ({**LLAMA3, "high_freq_factor": 0.5}, {**YARN, "unheard_of": 1}),
        "sliding_window": (4,),
        "use_qk_norm": (True,),
    },
    "qwen2": {"attention_bias": (False,), "qkv_bias": (False,), "use_mrope": (True,)},
    "qwen3": {"qkv_bias": (True,), "use_qk_norm": (False,)},
    "qwen3_moe": {"shared_expert_intermediate_size": (32,), "use_qk_norm": (False,)},
    "mistral": {"attention_bias": (True,), "use_sliding_window": (False,)},
    "cohere2": {"layer_switch": (2,), "rope_interleaved": (False,), "use_qk_norm": (True,)},
    "gemma3_text": {
        "rope_parameters": (YARN,),
        "rope_scaling": ({"type": "linear", "factor": 2.0},),
        "use_bidirectional_attention": (True,),
        "use_qk_norm": (False,),
    },
    "gemma3n_text": {"pad_token_id": (59, -60), "use_qk_norm": (False,)},
    "llama4_text": {"rope_interleaved": (False,)},
}
"""What is not computed, or says what is not so."""
