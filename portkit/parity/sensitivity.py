"""Which fields of a config a probe can see: whether anything moves when the field moves.

A field is moved by the faults that read it wrongly; where one of them is caught, the probe sees the
field. Sizes and counts of parts show in the shapes of what is loaded. Knows the config's words, and
what became of the faults; runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from portkit.parity.kill import Fate

SHAPES = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "moe_intermediate_size",
        "num_experts",
    }
)
"""Another value has other parameters, which do not fit the checkpoint."""
_WINDOWS = ("attention.window_plus_one", "attention.window_minus_one", "attention.window_ignored")
MOVED_BY: Mapping[str, tuple[str, ...]] = {
    "rms_norm_eps": ("norm.epsilon",),
    "layer_norm_eps": ("norm.epsilon",),
    "tie_word_embeddings": ("loader.tie_ignored", "loader.tied_although_untied"),
    "attention_bias": ("loader.bias_lost",),
    "mlp_bias": ("loader.bias_lost",),
    "sliding_window": _WINDOWS,
    "window": _WINDOWS,
    "windows": _WINDOWS,
    "layer_types": ("attention.window_everywhere", "attention.window_pattern_shifted"),
    "query_pre_attn_scalar": ("attention.scale_missing", "attention.scale_of_head_dim"),
    "final_logit_softcapping": ("head.softcap_missing", "head.softcap_applied"),
    "rope_theta": ("rope.theta",),
    "rope_type": ("rope.scaling_ignored",),
    "factor": ("rope.llama3_factor", "rope.yarn_factor", "rope.scaling_twice"),
    "low_freq_factor": ("rope.llama3_low_freq",),
    "high_freq_factor": ("rope.llama3_high_freq",),
    "original_max_position_embeddings": (
        "rope.llama3_original_context",
        "rope.yarn_original_context",
    ),
    "beta_fast": ("rope.yarn_beta_fast",),
    "beta_slow": ("rope.yarn_beta_slow",),
    "attention_factor": ("rope.yarn_attention_factor",),
    "truncate": ("rope.yarn_truncate",),
}
"""The faults that read a field wrongly."""


@dataclass(frozen=True)
class Sensitivity:
    """Whether a probe sees one field that the model uses."""

    field: str
    seen: bool | None
    """None: no fault of the catalogue moves it, so that nobody knows."""
    by: str
    """Which fault was caught, `shapes`, or why it was not seen."""


def sensitivities(config: Any, fates: tuple[Fate, ...]) -> tuple[Sensitivity, ...]:
    """One for each field of a family's config; rotary parameters go by their own names."""
    by_name = {one.fault.id: one for one in fates}
    named = dict.fromkeys(_names(config))
    return tuple(_of(name, by_name) for name in named)


def _names(config: Any) -> Iterator[str]:
    for one in fields(config):
        value = getattr(config, one.name)
        nested = value.values() if isinstance(value, Mapping) else (value,)
        if any(map(is_dataclass, nested)):
            for each in nested:
                yield from (f.name for f in fields(each) if getattr(each, f.name) is not None)
        else:
            yield one.name


def _of(name: str, by_name: Mapping[str, Fate]) -> Sensitivity:
    if name in SHAPES:
        return Sensitivity(name, True, "shapes")
    tried = [by_name[one] for one in MOVED_BY.get(name, ()) if one in by_name]
    killed = next((one for one in tried if one.killed), None)
    if killed is not None:
        return Sensitivity(name, True, killed.fault.id)
    survived = next((one for one in tried if one.survived is not None), None)
    if survived is not None:
        return Sensitivity(name, False, survived.survived or "")
    return Sensitivity(name, None, "no fault that applies here moves it")
