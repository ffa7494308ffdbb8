"""Checkpoints of one or two layers: any subset of the kinds of layers that a family has.

Test suites make them. What a larger model has beside may be lacking: a layer of the other type, one
that rotates, one that is dense, a second head, room for a token behind the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from parity_tests.checkpoints import (
    LLAMA3_ROPE,
    YARN,
    Tiny,
    cohere2,
    gemma3,
    gemma3n,
    llama,
    llama4,
    mistral,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
ONE, TWO = {"num_hidden_layers": 1}, {"num_hidden_layers": 2}
SLIDES = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0}
NO_IDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
BY_TYPE = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}


def shallow_gemma3n(kinds: Sequence[str], shared: int = 0, **config: Any) -> Tiny:
    count = len(kinds)
    layers = {
        "num_hidden_layers": count,
        "layer_types": [*kinds],
        "num_kv_shared_layers": shared,
        "intermediate_size": [64] * count,
        "activation_sparsity_pattern": [0.0] * count,
    }
    return gemma3n(**{**layers, **config})


def _everywhere(name: str, family: Callable[..., Tiny]) -> dict[str, Tiny]:
    """What any family may be reduced to."""
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1}
    return {
        f"{name}: one layer": family(**ONE),
        f"{name}: two layers": family(**TWO),
        f"{name}: a context of 16": family(**TWO, max_position_embeddings=16),
        f"{name}: a context of 2": family(**ONE, max_position_embeddings=2),
        f"{name}: one head": family(**ONE, **one_head),
        f"{name}: three words": family(**ONE, **NO_IDS, vocab_size=3),
    }


_FAMILIES: dict[str, Callable[..., Tiny]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3 moe": qwen3_moe,
    "llama4": llama4,
    "mistral": mistral,
    "cohere2": cohere2,
    "gemma3": gemma3,
    "smollm3": smollm3,
}
_SLIDING = {
    f"{name}: {said}": family(**SLIDES, **given)
    for name, family in (("qwen2", qwen2), ("qwen3", qwen3))
    for said, given in (
        ("only sliding", {**TWO, "layer_types": [SLIDING, SLIDING]}),
        ("full, then sliding", {**TWO, "layer_types": [FULL, SLIDING]}),
        (
            "a window beyond the context",
            {**ONE, "layer_types": [SLIDING], "max_position_embeddings": 16},
        ),
    )
}
_BY_TURNS = {
    f"{name}: {said}": family(**{**given, "num_hidden_layers": len(given["layer_types"])})
    for name, family in (("gemma3", gemma3), ("cohere2", cohere2))
    for said, given in (
        ("only sliding", {"layer_types": [SLIDING]}),
        ("only full", {"layer_types": [FULL]}),
        ("only full, twice", {"layer_types": [FULL, FULL]}),
        ("full, then sliding", {"layer_types": [FULL, SLIDING]}),
        ("a window of two", {"layer_types": [SLIDING], "sliding_window": 2}),
        (
            "a window beyond the context",
            {"layer_types": [SLIDING, FULL], "max_position_embeddings": 16},
        ),
    )
}

SHALLOW: dict[str, Tiny] = {
    **{
        key: tiny
        for name, family in _FAMILIES.items()
        for key, tiny in _everywhere(name, family).items()
    },
    "llama: llama3 scaling": llama(**ONE, rope_scaling=LLAMA3_ROPE),
    "llama: yarn": llama(**ONE, rope_scaling=YARN, tie_word_embeddings=True),
    "llama: heads of two channels": llama(**ONE, head_dim=2),
    "llama: a context of 1": llama(**ONE, max_position_embeddings=1),
    "mistral: a window beyond the context": mistral(
        **ONE, sliding_window=64, max_position_embeddings=16
    ),
    "mistral: the window is the context": mistral(
        **ONE, sliding_window=16, max_position_embeddings=16
    ),
    "mistral: no window": mistral(**ONE, sliding_window=None),
    **_SLIDING,
    **_BY_TURNS,
    "gemma3: only sliding, full ones stretched": gemma3(
        **ONE, layer_types=[SLIDING], rope_parameters=BY_TYPE
    ),
    "gemma3: only full, stretched": gemma3(
        **ONE, layer_types=[FULL], rope_parameters=BY_TYPE, final_logit_softcapping=3.0
    ),
    "smollm3: only without positions": smollm3(**ONE, no_rope_layers=[0]),
    "smollm3: only without positions, sliding": smollm3(**TWO, **SLIDES, no_rope_layers=[0, 0]),
    "smollm3: rotating second": smollm3(**TWO, no_rope_layers=[0, 1]),
    "llama4: only dense": llama4(**ONE, moe_layers=[]),
    "llama4: only dense, without positions": llama4(
        **TWO, moe_layers=[], no_rope_layers=[0, 0], use_qk_norm=False
    ),
    "llama4: dense, then sparse": llama4(**TWO, moe_layers=[1]),
    "llama4: only without positions": llama4(
        **ONE, no_rope_layers=[0], rope_parameters={**LLAMA3_ROPE, "rope_theta": 5e5}
    ),
    "llama4: without positions or temperature": llama4(
        **ONE, no_rope_layers=[0], attn_temperature_tuning=False
    ),
    "llama4: rotating, and full": llama4(**ONE, layer_types=[FULL]),
    "llama4: without positions, and chunked": llama4(
        **ONE, layer_types=[CHUNKED], no_rope_layers=[0]
    ),
    "llama4: one expert": llama4(**ONE, num_local_experts=1),
    "llama4: all experts": llama4(**ONE, num_local_experts=3, num_experts_per_tok=3),
    "qwen3 moe: only sliding": qwen3_moe(**TWO, **SLIDES),
    "qwen3 moe: only dense": qwen3_moe(**ONE, mlp_only_layers=[0]),
    "qwen3 moe: dense, then sparse": qwen3_moe(**TWO, mlp_only_layers=[0]),
    "qwen3 moe: one expert": qwen3_moe(**ONE, num_experts=1, num_experts_per_tok=1),
    "qwen3 moe: all experts": qwen3_moe(
        **ONE, num_experts=3, num_experts_per_tok=3, norm_topk_prob=True
    ),
    "gemma3n: one layer": shallow_gemma3n([FULL]),
    "gemma3n: two layers": shallow_gemma3n([SLIDING, FULL]),
    "gemma3n: only sliding": shallow_gemma3n([SLIDING]),
    "gemma3n: only sliding, the second shares": shallow_gemma3n([SLIDING, SLIDING], 1),
    "gemma3n: only full, the second shares": shallow_gemma3n([FULL, FULL], 1),
    "gemma3n: only sparse": shallow_gemma3n([FULL], activation_sparsity_pattern=[0.9]),
    "gemma3n: two streams": shallow_gemma3n(
        [FULL], altup_num_inputs=2, altup_active_idx=1, altup_correct_scale=False
    ),
    "gemma3n: the least of everything": shallow_gemma3n(
        [SLIDING], laurel_rank=1, hidden_size_per_layer_input=1, vocab_size_per_layer_input=1
    ),
    "gemma3n: a window beyond the context": shallow_gemma3n(
        [SLIDING, FULL], max_position_embeddings=16
    ),
    "gemma3n: one head": shallow_gemma3n([FULL], num_attention_heads=1, num_key_value_heads=1),
}
