"""Families that portkit has never seen: one table of tiny checkpoints, awkward on purpose.

No line of portkit knows any of them. Each is a `model_type` of Transformers and the keywords of its
config, written by Transformers itself with random weights: sizes whose root is not exact, heads
that do not fill the hidden size where the config lets them, windows and chunks shorter than a
probe, a prime vocabulary, experts in odd numbers, tied and untied heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 251
WINDOW = 13

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    **_IDS,
}
_MLP = {"intermediate_size": 96}
_GROUPED = {**_SIZES, **_MLP, "num_key_value_heads": 2}
_WIDE = {**_GROUPED, "head_dim": 20}
"""Heads that do not fill the hidden size."""
_FULL = {**_GROUPED, "hidden_size": 80}
"""For families whose head_dim is hidden_size / heads: 20, so that part of a head can be rotated."""
_LATENT = {
    **_SIZES,
    **_MLP,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
_GROUP_LIMITED = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 40,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
_RECURRENT = {"use_mamba_kernels": False}


def _part(factor: float) -> dict[str, Any]:
    """A rotation of a part of each head."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": factor}
    return {"rope_parameters": rope}


@dataclass(frozen=True)
class Unseen:
    """A family: the keywords of its config, and what it can do in Transformers itself."""

    config: dict[str, Any]
    own_class: str = ""
    """Its class, where it is no causal language model: it is compared by named inputs."""
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of its named inputs, where it has its own class."""


UNSEEN: dict[str, Unseen] = {
    # learned positions, biases, fused and transposed matrices
    "gpt2": Unseen(
        {"vocab_size": VOCABULARY, "n_embd": 72, "n_layer": 3, "n_head": 4, "n_positions": 256}
        | _IDS
    ),
    "opt": Unseen(
        {**_SIZES, "ffn_dim": 96, "word_embed_proj_dim": 40, "do_layer_norm_before": False}
    ),
    # a part of each head rotated, branches in parallel
    "gpt_neox": Unseen({**_SIZES, **_MLP, "hidden_size": 80, **_part(0.4)}),
    "gptj": Unseen(
        {"vocab_size": VOCABULARY, "n_embd": 80, "n_layer": 3, "n_head": 4, "n_positions": 256}
        | {"rotary_dim": 8, **_IDS}
    ),
    "falcon": Unseen(
        {**_SIZES, "hidden_size": 80, "num_kv_heads": 2, "new_decoder_architecture": True}
    ),
    "falcon alibi": Unseen({**_SIZES, "alibi": True, "parallel_attn": False, "bias": True}),
    "phi": Unseen({**_FULL, "qk_layernorm": True, **_part(0.4)}),
    "stablelm": Unseen(
        {**_FULL, "use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}
        | _part(0.4)
    ),
    "cohere": Unseen({**_FULL, "use_qk_norm": True, "logit_scale": 0.3}),
    # ALiBi, also of heads that are no power of two
    "bloom": Unseen(
        {"vocab_size": VOCABULARY, "hidden_size": 72, "n_layer": 3, "n_head": 3, **_IDS}
    ),
    "mpt": Unseen(
        {"vocab_size": VOCABULARY, "d_model": 72, "n_layers": 3, "n_heads": 6, "max_seq_len": 256}
        | {"expansion_ratio": 2, "use_cache": True, **_IDS}
    ),
    # Llama's kin, with and without windows
    "phi3": Unseen({**_FULL, "sliding_window": WINDOW, "tie_word_embeddings": True}),
    "phi3 longrope": Unseen(
        {**_FULL, "original_max_position_embeddings": 32}
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0 + 0.1 * i for i in range(10)],
                "long_factor": [2.0 + 0.3 * i for i in range(10)],
            }
        }
    ),
    "gemma": Unseen({**_WIDE, "num_key_value_heads": 1}),
    "gemma2": Unseen(
        {**_WIDE, "num_hidden_layers": 4, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    ),
    "olmo": Unseen({**_FULL, "clip_qkv": 0.7}),
    "olmo2": Unseen({**_FULL, "num_hidden_layers": 11}),
    "olmo3": Unseen({**_FULL, "num_hidden_layers": 5, "sliding_window": WINDOW}),
    "starcoder2": Unseen({**_FULL, "sliding_window": WINDOW}),
    "granite": Unseen(
        {**_FULL, "embedding_multiplier": 3.0, "logits_scaling": 1.3, "residual_multiplier": 0.3}
        | {"attention_multiplier": 0.2, "tie_word_embeddings": True}
    ),
    "glm4": Unseen({**_WIDE, **_part(0.4)}),
    "exaone4": Unseen({**_FULL, "num_hidden_layers": 5, "sliding_window": WINDOW}),
    "nemotron": Unseen({**_WIDE, **_part(0.4)}),
    "helium": Unseen({**_FULL, "head_dim": 20, "tie_word_embeddings": True}),
    # experts
    "granitemoe": Unseen(
        {**_FULL, "num_local_experts": 5, "num_experts_per_tok": 2, "residual_multiplier": 0.3}
        | {"embedding_multiplier": 3.0, "attention_multiplier": 0.2}
    ),
    "mixtral": Unseen({**_WIDE, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": Unseen(
        {**_FULL, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"shared_expert_intermediate_size": 56, "mlp_only_layers": [1]}
    ),
    "glm4_moe": Unseen({**_WIDE, **_GROUP_LIMITED, "use_qk_norm": True, **_part(0.4)}),
    "dbrx": Unseen(
        {"vocab_size": VOCABULARY, "d_model": 80, "n_layers": 3, "n_heads": 4, "max_seq_len": 256}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 0.7, "rope_theta": 1e4}, **_IDS}
        | {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 5, "moe_top_k": 2}}
    ),
    "gpt_oss": Unseen(
        {**_WIDE, "num_hidden_layers": 4, "sliding_window": WINDOW}
        | {"num_local_experts": 5, "num_experts_per_tok": 2}
    ),
    # latent attention, values narrower or wider than keys
    "deepseek_v2": Unseen(
        {**_LATENT, **_GROUP_LIMITED, "topk_method": "group_limited_greedy", "q_lora_rank": None}
    ),
    "deepseek_v3": Unseen({**_LATENT, **_GROUP_LIMITED}),
    "minicpm3": Unseen({**_LATENT, "scale_emb": 3, "scale_depth": 0.7, "dim_model_base": 24}),
    # state without tokens
    "mamba": Unseen(
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 72,
            "num_hidden_layers": 3,
            "state_size": 8,
            **_IDS,
        }
    ),
    "mamba2": Unseen(
        {"vocab_size": VOCABULARY, "hidden_size": 72, "num_hidden_layers": 3, "state_size": 8}
        | {"num_heads": 6, "head_dim": 24, "n_groups": 2, "chunk_size": 8, **_IDS}
    ),
    "jamba": Unseen(
        {**_FULL, "num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 1}
        | {"num_experts": 5, "mamba_d_state": 8, "mamba_dt_rank": 6, **_RECURRENT}
    ),
    "nemotron_h": Unseen(
        {**_WIDE, "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"]}
        | {"num_hidden_layers": 5, "ssm_state_size": 8, "mamba_num_heads": 6, "mamba_head_dim": 24}
        | {"n_groups": 2, "chunk_size": 8, "n_routed_experts": 5, "moe_intermediate_size": 40}
        | {"moe_shared_expert_intermediate_size": 56, **_RECURRENT}
    ),
    "falcon_h1": Unseen(
        {**_FULL, "mamba_d_ssm": 96, "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 8}
        | {"mamba_chunk_size": 8, "lm_head_multiplier": 0.7, "key_multiplier": 0.6}
        | {"embedding_multiplier": 3.0, "ssm_multipliers": [0.7, 0.8, 0.9, 1.1, 1.2]}
    ),
    "qwen3_next": Unseen(
        {**_WIDE, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 12, "linear_value_head_dim": 20, "num_experts": 5}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 40, **_part(0.4)}
        | {"shared_expert_intermediate_size": 56}
    ),
    "lfm2": Unseen(
        {**_FULL, "num_hidden_layers": 4, "block_auto_adjust_ff_dim": False}
        | {"layer_types": ["conv", "full_attention", "conv", "conv"]}
    ),
    # by named inputs
    "bert": Unseen(
        {**_SIZES, **_MLP},
        "BertForMaskedLM",
        {"input_ids": (2, 9), "token_type_ids": (2, 9), "attention_mask": (2, 9)},
    ),
    "modernbert": Unseen(
        {**_SIZES, **_MLP, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2},
        "ModernBertForMaskedLM",
        {"input_ids": (2, 29), "attention_mask": (2, 29)},
    ),
    "t5": Unseen(
        {"vocab_size": VOCABULARY, "d_model": 72, "d_kv": 20, "d_ff": 96, "num_heads": 4}
        | {"num_layers": 3, "num_decoder_layers": 2, "decoder_start_token_id": 3}
        | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 24},
        "T5ForConditionalGeneration",
        {"input_ids": (2, 29), "attention_mask": (2, 29), "decoder_input_ids": (2, 7)},
    ),
    "siglip": Unseen(
        {
            "text_config": {**_SIZES, **_MLP, "max_position_embeddings": 16, "projection_size": 72},
            "vision_config": {
                "hidden_size": 72,
                "intermediate_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 21,
                "patch_size": 7,
            },
        },
        "SiglipModel",
        {"input_ids": (2, 16), "pixel_values": (2, 3, 21, 21)},
    ),
}


def family_of(name: str) -> str:
    """The `model_type` of a row: its first word."""
    return name.split(maxsplit=1)[0]


def save_unseen(name: str, folder: Path, seed: int = 0) -> None:
    """Write a family's checkpoint in float32, as Transformers itself writes it."""
    import transformers

    unseen = UNSEEN[name]
    config = transformers.CONFIG_MAPPING[family_of(name)](**unseen.config)
    torch.manual_seed(seed)
    if unseen.own_class:
        model = getattr(transformers, unseen.own_class)(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.save_pretrained(folder)


def randomise(model: nn.Module) -> None:
    """Weights that let the input through, norms away from one, biases and corrections from zero."""
    for name, held in model.state_dict().items():
        if not held.is_floating_point() or name.endswith("A_log"):
            continue
        if held.dim() > 1:
            held.normal_(0.0, held.shape[-1] ** -0.5)
        else:
            held.normal_(0.4, 0.4)


def named_inputs(unseen: Unseen, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Inputs by name, the first row's last tokens padding where there is a mask."""
    draw = torch.Generator().manual_seed(seed)
    given: dict[str, Tensor] = {}
    for name, shape in unseen.inputs.items():
        if name == "attention_mask":
            given[name] = torch.ones(shape, dtype=torch.long)
            given[name][0, -3:] = 0
        elif name == "pixel_values":
            given[name] = torch.randn(shape, generator=draw).to(dtype)
        else:
            count = 2 if name == "token_type_ids" else VOCABULARY
            given[name] = torch.randint(4 if count > 4 else 0, count, shape, generator=draw)
    return given
