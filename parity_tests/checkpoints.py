"""Tiny checkpoints, awkward on purpose, written by the reference itself.

Random weights with random norms, so that no multiplication is by one; hidden sizes whose square
root is not exact in bfloat16; heads that are no power of four and do not fill the hidden size;
windows shorter than the probe; more than ten layers where their order could be mistaken; a prime
vocabulary. Intermediate sizes stay multiples of 32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

VOCABULARY = 509
_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 320,
    "intermediate_size": 224,
    "max_position_embeddings": 4096,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}


@dataclass(frozen=True)
class Tiny:
    """A reference class by name and the keywords of its config."""

    family: str
    config: dict[str, Any]


def llama(**config: Any) -> Tiny:
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Tiny("Llama", {**_SHARED, **heads, "head_dim": 40, "rms_norm_eps": 1e-5, **config})


def qwen2(**config: Any) -> Tiny:
    heads = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    return Tiny("Qwen2", {**_SHARED, **heads, "head_dim": 40, **config})


def qwen3(**config: Any) -> Tiny:
    heads = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    return Tiny("Qwen3", {**_SHARED, **heads, "head_dim": 40, **config})


def qwen3_moe(**config: Any) -> Tiny:
    heads = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    experts = {"num_experts": 11, "num_experts_per_tok": 3, "moe_intermediate_size": 96}
    return Tiny("Qwen3Moe", {**_SHARED, **heads, **experts, "head_dim": 40, **config})


def llama4(**config: Any) -> Tiny:
    heads = {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
    experts = {"num_local_experts": 5, "intermediate_size": 96, "intermediate_size_mlp": 160}
    chunks = {"attention_chunk_size": 24, "floor_scale": 7, "attn_scale": 0.3}
    given = {**_SHARED, **heads, **experts, **chunks, "head_dim": 40, **config}
    return Tiny("Llama4", given)


def mistral(**config: Any) -> Tiny:
    heads = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    return Tiny("Mistral", {**_SHARED, **heads, "head_dim": 40, "sliding_window": 24, **config})


def gemma3(**config: Any) -> Tiny:
    heads = {"num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2}
    windows = {"sliding_window": 24, "query_pre_attn_scalar": 48}
    return Tiny("Gemma3", {**_SHARED, **heads, **windows, "head_dim": 40, **config})


def cohere2(**config: Any) -> Tiny:
    heads = {"num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2}
    windows = {"sliding_window": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    return Tiny("Cohere2", {**_SHARED, **heads, **windows, "head_dim": 40, **config})


def gemma3n(**config: Any) -> Tiny:
    """Twelve layers, of which five share keys; streams, sparse layers, tokens beyond the table."""
    sizes = {
        "vocab_size_per_layer_input": 401,
        "hidden_size": 72,
        "hidden_size_per_layer_input": 24,
        "intermediate_size": [64, 96, 128] * 4,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 40,
        "laurel_rank": 24,
        "altup_num_inputs": 3,
    }
    layers = {
        "sliding_window": 24,
        "num_kv_shared_layers": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 4,
        "activation_sparsity_pattern": [0.9, 0.0, 0.6] + [0.0] * 9,
    }
    return Tiny("Gemma3n", {**_SHARED, **sizes, **layers, **config})


def smollm3(**config: Any) -> Tiny:
    heads = {"num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    return Tiny("SmolLM3", {**_SHARED, **heads, **ids, "rope_theta": 5e6, **config})


COMPUTED = [
    pytest.param(torch.float32, "eager", id="float32-eager"),
    pytest.param(torch.bfloat16, "sdpa", id="bfloat16-sdpa"),
    pytest.param(torch.float32, "sdpa", id="float32-sdpa", marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, "eager", id="bfloat16-eager", marks=pytest.mark.slow),
]
"""Every dtype and every attention kernel; all four pairs where slow tests run."""

TINY: dict[str, Tiny] = {
    "llama3": llama(rope_scaling=LLAMA3_ROPE, rope_theta=500000.0, num_hidden_layers=12),
    "llama tied with biases": llama(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True, num_key_value_heads=1
    ),
    "llama linear": llama(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama wide heads": llama(head_dim=264, num_attention_heads=2, num_key_value_heads=1),
    "llama plain heads": llama(num_key_value_heads=4),
    "qwen2": qwen2(num_hidden_layers=12, tie_word_embeddings=True, rope_theta=1e6),
    "qwen2 yarn sliding": qwen2(
        rope_scaling=YARN,
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=1,
        num_attention_heads=8,
        head_dim=40,
        pad_token_id=3,
    ),
    "qwen3": qwen3(tie_word_embeddings=True, rope_theta=1e6),
    "qwen3 yarn sliding": qwen3(
        rope_scaling=YARN,
        rope_theta=1e6,
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=1,
        attention_bias=True,
    ),
    "qwen3 yarn tempered": qwen3(
        rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16.0},
        num_hidden_layers=1,
    ),
    "qwen3 moe": qwen3_moe(norm_topk_prob=True, rope_theta=1e6),
    "qwen3 moe sliding": qwen3_moe(
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=1,
        mlp_only_layers=[1],
        num_experts_per_tok=1,
        tie_word_embeddings=True,
    ),
    "qwen3 moe by turns": qwen3_moe(
        num_hidden_layers=12,
        decoder_sparse_step=2,
        mlp_only_layers=[3, 10],
        num_experts=7,
        moe_intermediate_size=32,
        attention_bias=True,
    ),
    "llama4 scout": llama4(rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0}),
    "llama4 maverick": llama4(
        num_hidden_layers=12,
        interleave_moe_layer_step=2,
        num_local_experts=3,
        intermediate_size=32,
        use_qk_norm=False,
    ),
    "llama4 crowded": llama4(
        num_hidden_layers=3,
        num_experts_per_tok=3,
        num_local_experts=7,
        no_rope_layers=[0, 1, 0],
        moe_layers=[1, 2],
        attn_temperature_tuning=False,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "gemma3": gemma3(),
    "gemma3 shallow": gemma3(num_hidden_layers=4, sliding_window_pattern=3),
    "gemma3 scaled": gemma3(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        final_logit_softcapping=3.0,
        num_key_value_heads=1,
        num_attention_heads=4,
        num_hidden_layers=12,
    ),
    "mistral": mistral(num_hidden_layers=12),
    "mistral without a window": mistral(
        sliding_window=None,
        head_dim=None,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        pad_token_id=3,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    ),
    "smollm3": smollm3(),
    "smollm3 sliding": smollm3(
        num_hidden_layers=5,
        no_rope_layers=[1, 0, 1, 1, 0],
        use_sliding_window=True,
        sliding_window=24,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
    ),
    "gemma3n": gemma3n(),
    "gemma3n plain": gemma3n(
        hidden_size=320,
        num_hidden_layers=4,
        intermediate_size=96,
        num_kv_shared_layers=0,
        num_key_value_heads=4,
        layer_types=["full_attention", "sliding_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        altup_num_inputs=2,
        altup_active_idx=1,
        final_logit_softcapping=3.0,
    ),
    "cohere2": cohere2(num_hidden_layers=12),
    "cohere2 with biases": cohere2(
        attention_bias=True,
        tie_word_embeddings=False,
        logit_scale=0.3,
        num_hidden_layers=3,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
}


def save_tiny(tiny: Tiny, folder: Path, dtype: torch.dtype, seed: int = 0) -> None:
    """Write a checkpoint of random weights as the reference's own `save_pretrained` does."""
    import transformers

    config_class = {
        "Gemma3": "Gemma3TextConfig",
        "Gemma3n": "Gemma3nTextConfig",
        "Llama4": "Llama4TextConfig",
    }.get(tiny.family, f"{tiny.family}Config")
    config = getattr(transformers, config_class)(**tiny.config)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{tiny.family}ForCausalLM")(config)
    randomise(model)
    model.to(dtype).save_pretrained(folder)


def save_tiny_multimodal(
    folder: Path, dtype: torch.dtype, seed: int = 0, family: str = "Gemma3"
) -> None:
    """A checkpoint with a vision tower around the language model, as Gemma 3 4B to 27B are, or
    Llama 4."""
    import transformers

    vision = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    if family == "Gemma3":
        text = gemma3(num_hidden_layers=3, sliding_window_pattern=3).config
        outer = {"mm_tokens_per_image": 4, "image_token_index": 511}
    else:
        text, outer = TINY["llama4 scout"].config, {}
        vision |= {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64}
    config = getattr(transformers, f"{family}Config")(
        text_config={**text, "vocab_size": 512}, vision_config=vision, **outer
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    randomise(model)
    model.to(dtype).save_pretrained(folder)


def save_tiny_with_towers(folder: Path, dtype: torch.dtype) -> None:
    """A Gemma 3n checkpoint as it is released: towers around the language model, their own config.

    The reference's class for it needs a package that is not installed here, so that the text model
    is written by the reference and the rest put around it: names, prefixes, keys of shared layers.
    """
    tiny = TINY["gemma3n"]
    save_tiny(tiny, folder, dtype)
    (written,) = folder.glob("*.safetensors")
    tensors = load_file(written)
    released = {
        f"model.language_model.{name.removeprefix('model.')}": tensor
        for name, tensor in tensors.items()
    }
    for layer in (7, 11):  # of layers that share keys; nobody reads them
        attention = f"model.language_model.layers.{layer}.self_attn"
        for part in ("k_proj", "v_proj"):
            released[f"{attention}.{part}.weight"] = torch.ones(80, 72, dtype=dtype)
        released[f"{attention}.k_norm.weight"] = torch.ones(40, dtype=dtype)
    for tower in (
        "vision_tower.timm_model.x",
        "audio_tower.conv",
        "embed_vision.y",
        "embed_audio.z",
    ):
        released[f"model.{tower}.weight"] = torch.ones(3, 5, dtype=dtype)
    save_file(released, written, metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    word = text.pop("dtype")
    config = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "text_config": {**text, "architectures": None},
        "vision_config": {"model_type": "gemma3n_vision", "architecture": "mobilenetv5_300m_enc"},
        "audio_config": {"model_type": "gemma3n_audio"},
        "audio_soft_tokens_per_image": 188,
        "vision_soft_tokens_per_image": 256,
        **{f"{kind}_token_id": 300 for kind in ("image", "audio", "boi", "eoi", "boa", "eoa")},
        "dtype": word,
    }
    (folder / "config.json").write_text(json.dumps(config))


def randomise(model: torch.nn.Module) -> None:
    """Norm weights and biases away from the ones and zeros that hide mistakes."""
    for name, parameter in model.named_parameters():
        if "norm" in name or parameter.dim() == 1:
            parameter.data.normal_(0.4, 0.4)
        else:
            parameter.data.mul_(2.0)
