"""Where faults are planted: for each family the checkpoints that turn on what a fault needs.

A fault is planted in the first checkpoint of a family that has what it needs, so the plain ones
come first. What no checkpoint of a family has cannot be planted there, and why is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
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
    qwen3,
    qwen3_moe,
    smollm3,
)
from parity_tests.faults.planted import PLANTINGS
from parity_tests.faults.planted.planting import Model, Planting
from parity_tests.faults.planted.streams import COEF_CLIP
from portkit.loading import draw, open_checkpoint

_SHALLOW = {"num_hidden_layers": 2}
_SQUARE = {**_SHALLOW, "num_attention_heads": 8, "num_key_value_heads": 8}
_SLIDING = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
_NO_ROPE = {"no_rope_layers": [1, 0]}
_FOUR = {
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_kv_shared_layers": 1,
    "altup_coef_clip": COEF_CLIP,
    "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.9, 0.0, 0.6, 0.0],
}
_LINEAR = {"rope_type": "linear", "factor": 4.0}


def _global_rope(**parameters: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "full_attention": {**parameters, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    }


# Few layers: a comparison costs about so much a site and pass.
OWN: dict[str, Tiny] = {
    "llama": llama(**_SHALLOW, rope_theta=500000.0),
    "llama biased": llama(**_SHALLOW, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama square": llama(**_SQUARE, rope_scaling=LLAMA3_ROPE, rope_theta=500000.0),
    "llama linear": llama(**_SHALLOW, rope_scaling=_LINEAR),
    "llama yarn": llama(**_SHALLOW, rope_scaling=YARN),
    "llama deep": llama(num_hidden_layers=12),
    "qwen3": qwen3(**_SHALLOW, tie_word_embeddings=True, rope_theta=1e6),
    "qwen3 sliding": qwen3(**_SHALLOW, **_SLIDING, attention_bias=True, rope_theta=1e6),
    "qwen3 square": qwen3(**_SQUARE, rope_scaling=LLAMA3_ROPE, rope_theta=1e6),
    "qwen3 linear": qwen3(**_SHALLOW, rope_scaling=_LINEAR),
    "qwen3 yarn": qwen3(**_SHALLOW, rope_scaling=YARN, rope_theta=1e6),
    "qwen3 deep": qwen3(num_hidden_layers=12),
    "gemma3": gemma3(**_SHALLOW, sliding_window_pattern=2),
    "gemma3 square": gemma3(
        **_SQUARE,
        **_global_rope(**LLAMA3_ROPE),
        sliding_window_pattern=2,
        attention_bias=True,
        tie_word_embeddings=False,
        final_logit_softcapping=3.0,
    ),
    "gemma3 linear": gemma3(**_SHALLOW, **_global_rope(**_LINEAR), sliding_window_pattern=2),
    "gemma3 yarn": gemma3(**_SHALLOW, **_global_rope(**YARN), sliding_window_pattern=2),
    "gemma3 deep": gemma3(num_hidden_layers=12),
    "qwen3_moe": qwen3_moe(**_SHALLOW, mlp_only_layers=[0], norm_topk_prob=True, rope_theta=1e6),
    "qwen3_moe sliding": qwen3_moe(
        **_SHALLOW,
        use_sliding_window=True,
        sliding_window=24,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "qwen3_moe square": qwen3_moe(**_SQUARE, moe_intermediate_size=320, rope_scaling=YARN),
    "qwen3_moe deep": qwen3_moe(num_hidden_layers=12),
    "llama4": llama4(
        **_SHALLOW,
        **_NO_ROPE,
        moe_layers=[1],
        use_qk_norm=False,
        rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0},
    ),
    "llama4 normed": llama4(**_SHALLOW, **_NO_ROPE, tie_word_embeddings=True, attention_bias=True),
    "llama4 square": llama4(**_SQUARE, intermediate_size=160, num_experts_per_tok=2),
    "llama4 deep": llama4(num_hidden_layers=12, use_qk_norm=False),
    "cohere2": cohere2(**_SHALLOW, layer_types=["sliding_attention", "full_attention"]),
    "cohere2 square": cohere2(
        **_SQUARE,
        layer_types=["sliding_attention", "full_attention"],
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "cohere2 deep": cohere2(num_hidden_layers=12),
    "gemma3n": gemma3n(**_FOUR),
    "gemma3n biased": gemma3n(**_FOUR, attention_bias=True, tie_word_embeddings=False),
    "gemma3n deep": gemma3n(),
    "smollm3": smollm3(**_SHALLOW, no_rope_layers=[1, 0]),
    "smollm3 sliding": smollm3(
        **_SHALLOW,
        no_rope_layers=[1, 0],
        use_sliding_window=True,
        sliding_window=24,
        tie_word_embeddings=False,
        attention_bias=True,
    ),
    "smollm3 square": smollm3(**_SQUARE, head_dim=40, no_rope_layers=[1, 0]),
    "smollm3 linear": smollm3(**_SHALLOW, rope_scaling=_LINEAR, no_rope_layers=[1, 0]),
    "smollm3 deep": smollm3(),
    "mistral": mistral(**_SHALLOW),
    "mistral square": mistral(**_SQUARE, tie_word_embeddings=True),
    "mistral linear": mistral(**_SHALLOW, rope_scaling=_LINEAR, sliding_window=None),
    "mistral deep": mistral(num_hidden_layers=12),
}
FAMILIES: dict[str, tuple[str, ...]] = {
    family: tuple(name for name in OWN if name.partition(" ")[0] == family)
    for family in (
        "llama",
        "qwen3",
        "gemma3",
        "qwen3_moe",
        "llama4",
        "cohere2",
        "gemma3n",
        "smollm3",
        "mistral",
    )
}
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Stage:
    """One fault in one checkpoint and one dtype."""

    planting: Planting
    family: str
    checkpoint: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.planting.name}, {self.checkpoint}, {self.dtype}"


@dataclass(frozen=True)
class Impossible:
    """A fault that no checkpoint of a family can have."""

    planting: Planting
    family: str
    reason: str


Folder = Callable[[str, str], Path]
"""From a checkpoint's name and a dtype to where it lies."""


def stages(folder: Folder) -> tuple[list[Stage], list[Impossible]]:
    """Every fault in every family, where it is possible, and what is not."""
    drawn = cache(lambda name: draw(open_checkpoint(folder(name, "float32"))).skeleton)
    found: list[Stage] = []
    impossible: list[Impossible] = []
    for family, names in FAMILIES.items():
        for planting in PLANTINGS:
            where = _first(planting, {name: drawn(name) for name in names})
            if where in names:
                found += [Stage(planting, family, where, dtype) for dtype in planting.dtypes]
            else:
                impossible.append(Impossible(planting, family, where))
    return found, impossible


def _first(planting: Planting, models: dict[str, Model]) -> str:
    """The first checkpoint that will do, or what is missing in the one that has the most."""
    unmet = {name: planting.unmet(model) for name, model in models.items()}
    return next((name for name, reason in unmet.items() if reason is None), _reason(unmet))


def _reason(unmet: dict[str, str | None]) -> str:
    return ", or ".join(dict.fromkeys(filter(None, unmet.values())))
