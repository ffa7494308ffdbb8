"""A loaded model as a GGUF file, for llama.cpp to run the very same weights.

The file's form is the GGUF specification's (github.com/ggml-org/ggml, docs/gguf.md): a header, keys
with values, each tensor's name, sizes, type and offset, and the aligned data. Matrices keep the
dtype that they are held in; vectors are float32. There is no vocabulary: token ids go in and come
out.

Knows what a few families are called there, what llama.cpp computes for each of them by itself and
what must be in the file: Llama's pairs of channels, Gemma's `1 + weight`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portkit.errors import ExportError
from portkit.exporting import state_dict
from portkit.loading import LoadedModel
from portkit.nn.rope import RopeParameters, inverse_frequencies
from portkit.weights import Template

_ALIGNMENT = 32
_UINT32, _FLOAT32, _STRING = 4, 6, 8
_TENSOR_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.{layer}.input_layernorm.weight": "blk.{layer}.attn_norm.weight",
    "model.layers.{layer}.self_attn.{part=q|k|v}_proj.weight": "blk.{layer}.attn_{part}.weight",
    "model.layers.{layer}.self_attn.{part=q|k}_norm.weight": "blk.{layer}.attn_{part}_norm.weight",
    "model.layers.{layer}.self_attn.o_proj.weight": "blk.{layer}.attn_output.weight",
    "model.layers.{layer}.mlp.{part=gate|up|down}_proj.weight": "blk.{layer}.ffn_{part}.weight",
}
_NORM = "model.layers.{layer}.{name}_layernorm.weight"
_BEFORE_MLP = {_NORM.replace("{name}", "post_attention"): "blk.{layer}.ffn_norm.weight"}
_ON_BOTH_SIDES = {
    _NORM.replace("{name}", "post_attention"): "blk.{layer}.post_attention_norm.weight",
    _NORM.replace("{name}", "pre_feedforward"): "blk.{layer}.ffn_norm.weight",
    _NORM.replace("{name}", "post_feedforward"): "blk.{layer}.post_ffw_norm.weight",
}

_Change = Callable[[str, Tensor, Any], Tensor]


@dataclass(frozen=True)
class _Family:
    """`name` in GGUF, its norms' names, and what is stored otherwise than in a checkpoint."""

    name: str
    norms: Mapping[str, str]
    change: _Change = lambda _name, tensor, _config: tensor


def _pairs_of_channels(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Of q and k, channel i and its partner i + head_dim/2 side by side."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return tensor
    heads = tensor.view(-1, 2, config.head_dim // 2, tensor.shape[1])
    return heads.transpose(1, 2).reshape(tensor.shape)


def _whole_norms(_name: str, tensor: Tensor, _config: Any) -> Tensor:
    return 1 + tensor.float() if tensor.dim() == 1 else tensor


_FAMILIES = {
    "llama": _Family("llama", _BEFORE_MLP, _pairs_of_channels),
    "qwen3": _Family("qwen3", _BEFORE_MLP),
    "gemma3": _Family("gemma3", _ON_BOTH_SIDES, _whole_norms),
    "gemma3_text": _Family("gemma3", _ON_BOTH_SIDES, _whole_norms),
}


def write_gguf(loaded: LoadedModel, path: Path) -> None:
    """Write the weights of `loaded`, in the dtype that they have, and what a decoder must know.

    Raises ExportError for a family, or a config, that llama.cpp computes otherwise or that is not
    known here, and where the file cannot be written.
    """
    family = _FAMILIES.get(loaded.architecture.model_type)
    if family is None:
        known = ", ".join(sorted(_FAMILIES))
        raise ExportError(
            f"no GGUF is written of {loaded.architecture.model_type}, only of {known}"
        )
    fields = {"general.architecture": family.name, "tokenizer.ggml.model": "no_vocab"}
    fields |= {f"{family.name}.{key}": one for key, one in _settings(loaded.config).items()}
    tensors = dict(_tensors(loaded, family))
    try:
        with path.open("wb") as file:
            file.write(_header(fields, tensors))
            for tensor in tensors.values():
                file.write(bytes(-file.tell() % _ALIGNMENT))
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror}") from error


def _settings(config: Any) -> dict[str, Any]:
    found = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
    }
    if isinstance(config.rope_parameters, RopeParameters):
        if "sliding_attention" in getattr(config, "layer_types", ()):
            raise ExportError("llama.cpp lets every layer of this family see everything")
        return found | _rotation(config.rope_parameters)
    _check_scores(config)
    sliding = config.rope_parameters["sliding_attention"]
    return (
        found
        | _rotation(config.rope_parameters["full_attention"])
        | {
            "attention.sliding_window": config.sliding_window,
            "attention.sliding_window_pattern": _period(config.layer_types),
            "rope.freq_base_swa": float(sliding.rope_theta),
        }
    )


def _check_scores(config: Any) -> None:
    """Raises ExportError where the config is not what llama.cpp takes for granted."""
    if config.query_pre_attn_scalar != config.head_dim or config.final_logit_softcapping:
        raise ExportError(
            "llama.cpp scales scores by head_dim ** -0.5 and caps no logits: query_pre_attn_scalar "
            f"{config.query_pre_attn_scalar} or final_logit_softcapping "
            f"{config.final_logit_softcapping} is something else"
        )


def _period(layer_types: Sequence[str]) -> int:
    """Of the layers, the last of so many sees everything, and no other."""
    period = [*layer_types, "full_attention"].index("full_attention") + 1
    for layer, kind in enumerate(layer_types, start=1):
        if (kind == "full_attention") != (layer % period == 0):
            raise ExportError("llama.cpp takes layers that see everything at even distances")
    return period


def _rotation(rope: RopeParameters) -> dict[str, Any]:
    found: dict[str, Any] = {"rope.freq_base": float(rope.rope_theta)}
    if rope.rope_type == "linear":
        return found | {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": float(rope.factor or 1),
        }
    if rope.rope_type not in ("default", "llama3"):
        raise ExportError(f"no GGUF is written of rope_type {rope.rope_type}")
    return found


def _tensors(loaded: LoadedModel, family: _Family) -> Iterator[tuple[str, Tensor]]:
    names = {Template(ours): Template(to) for ours, to in {**_NAMES, **family.norms}.items()}
    for ours, tensor in state_dict(loaded).items():
        found = [(theirs, one.match(ours)) for one, theirs in names.items()]
        name = next((theirs.fill(bound) for theirs, bound in found if bound is not None), None)
        if name is None:
            raise ExportError(f"no GGUF is written of a model with {ours}")
        changed = family.change(name, tensor, loaded.config)
        yield name, changed.float() if changed.dim() == 1 else changed
    rope = loaded.config.rope_parameters
    if getattr(rope, "rope_type", None) == "llama3":
        # How much slower each pair turns than without the stretching.
        plain = RopeParameters(rope_type="default", rope_theta=rope.rope_theta)
        slow, fast = (inverse_frequencies(loaded.config.head_dim, one)[0] for one in (rope, plain))
        yield "rope_freqs.weight", fast / slow


def _header(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))]
    for key, value in fields.items():
        parts += [_string(key), _value(value)]
    offset = 0
    for name, tensor in tensors.items():
        sizes: Sequence[int] = tensor.shape[::-1]
        kind = _TENSOR_TYPES[tensor.dtype]
        parts += [
            _string(name),
            struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset),
        ]
        offset += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
    return b"".join(parts)


def _value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    return struct.pack("<If", _FLOAT32, value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
