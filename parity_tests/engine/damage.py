"""Small sound checkpoints of every family, the ways to damage one on disk, and what a case is.

A damage is a function of the checkpoint's folder, made from the few moves that spoil files: cut,
put, remove, and an edit of a config, an index, a header or the tensors. A case is a row of the
tables in `bad_weights`, `bad_configs` and their like; what they expect is their business.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from portkit.config import ConfigReader
from portkit.registry import architecture_of

Damage = Callable[[Path], None]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX, PICKLE = "model.safetensors.index.json", "pytorch_model.bin"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
GONE = object()
"""In an edit of JSON: the key is removed."""


@dataclass(frozen=True)
class Case:
    """One row. In `words` and `arguments`, {folder} is the checkpoint, {parent} where it lies."""

    name: str
    damage: Damage
    words: tuple[str, ...]
    code: int = 2
    base: str = "llama"
    """A family, or llama `sharded` or `pickled`."""
    arguments: tuple[str, ...] = ("load", "{folder}")
    hub: Mapping[str, str] | None = None
    """Run as a process of its own: no network, a cache of its own, these in the environment."""
    disk_is_small: bool = False
    """Run as a process of its own for which writing fails after a few kilobytes."""
    needs_proc: bool = False
    """Uses Linux's /proc for a file or disk that really fails."""


def with_options(*options: str) -> tuple[str, ...]:
    return ("load", "{folder}", *options)


_SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_CHOOSING = {
    **_SIZES,
    "intermediate_size_mlp": 40,
    "num_local_experts": 3,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
    "attn_temperature_tuning": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES, "rope_scaling": _STRETCHED},
    "qwen2": {"model_type": "qwen2", **_SIZES, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_SIZES, "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_SIZES,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [0],
    },
    "cohere2": {"model_type": "cohere2", **_SIZES, "sliding_window": 8, "attention_bias": True},
    "smollm3": {"model_type": "smollm3", **_SIZES},
    "mistral": {"model_type": "mistral", **_SIZES, "sliding_window": 8},
    "gemma3n_text": {
        "model_type": "gemma3n_text",
        **_SIZES,
        "sliding_window": 8,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 29,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "gemma3n": {
        "model_type": "gemma3n",
        "text_config": {
            "model_type": "gemma3n_text",
            **_SIZES,
            "sliding_window": 8,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 29,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
        },
        "vision_config": {"hidden_size": 16},
        "audio_config": {"hidden_size": 16},
    },
    "llama4_text": {"model_type": "llama4_text", **_CHOOSING},
    "llama4": {
        "model_type": "llama4",
        "text_config": {"model_type": "llama4_text", **_CHOOSING},
        "vision_config": {"hidden_size": 16},
    },
    "gemma3_text": {"model_type": "gemma3_text", **_SIZES, "sliding_window": 8},
    "gemma3": {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", **_SIZES, "sliding_window": 8},
        "vision_config": {"hidden_size": 16},
    },
}


def write_checkpoint(folder: Path, config: Mapping[str, Any]) -> None:
    """One file of random weights that fits `config`."""
    reader = ConfigReader(config)
    architecture = architecture_of(config)
    torch.manual_seed(0)
    model = architecture.build(architecture.read_config(reader), "sdpa")
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    parameters = {name: torch.randn(one.shape) for name, one in model.named_parameters()}
    tensors = architecture.weight_map.written(model).split(parameters)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def sharded(folder: Path) -> None:
    """The same tensors in two shards: layer 1 in the second, the rest in the first."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shard_of = {name: SHARDS["layers.1." in name] for name in tensors}
    for shard in SHARDS:
        mine = {name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}
        save_file(mine, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": shard_of}))


def pickled(folder: Path) -> None:
    """The same tensors as torch pickles them."""
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()


# -- the moves ---------------------------------------------------------------------------------


def nothing(folder: Path) -> None:
    """The checkpoint is sound; the fault is in the arguments."""


def several(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def cut(name: str, num_bytes: int) -> Damage:
    """Keep the first `num_bytes`; negative: all but so many at the end."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:num_bytes])

    return damage


def grow(name: str, num_bytes: int) -> Damage:
    """So many zeros behind the end."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes() + bytes(num_bytes))

    return damage


def put(name: str, content: object) -> Damage:
    """Bytes as they are, anything else as JSON."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(raw)

    return damage


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def rename(name: str, to: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / to).parent.mkdir(exist_ok=True)
        (folder / name).rename(folder / to)

    return damage


def link(name: str, to: str) -> Damage:
    """A symbolic link in the place of whatever is there."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return damage


def config(edits: Mapping[str, object]) -> Damage:
    """Set keys of config.json, a nested one as `section.key`; GONE removes."""

    def damage(folder: Path) -> None:
        whole = json.loads((folder / CONFIG).read_text())
        for path, value in edits.items():
            *sections, key = path.split(".")
            section = whole
            for name in sections:
                section = section[name]
            section[key] = value
            if value is GONE:
                del section[key]
        (folder / CONFIG).write_text(json.dumps(whole))

    return damage


def shard_map(edits: Mapping[str, object]) -> Damage:
    """Set entries of the index's weight_map; GONE removes."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        listed = {**index["weight_map"], **edits}
        index["weight_map"] = {name: file for name, file in listed.items() if file is not GONE}
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def entry(tensor: str, edits: Mapping[str, object], rename_to: str | None = None) -> Damage:
    """Set fields of one tensor's entry in the header of the single file."""

    def edit(header: dict[str, Any]) -> dict[str, Any]:
        return {
            (rename_to or name if name == tensor else name): (
                {**value, **edits} if name == tensor else value
            )
            for name, value in header.items()
        }

    return header_bytes(lambda raw: json.dumps(edit(json.loads(raw))).encode())


def header_bytes(edit: bytes | Callable[[bytes], bytes]) -> Damage:
    """Edit or replace the JSON of the single file's header, its length following."""

    def damage(folder: Path) -> None:
        raw, data = split_header((folder / WEIGHTS).read_bytes())
        edited = edit if isinstance(edit, bytes) else edit(raw)
        (folder / WEIGHTS).write_bytes(join_header(edited, data))

    return damage


def tensors(edits: Mapping[str, object], name: str = WEIGHTS) -> Damage:
    """Set tensors of a safetensors file; GONE removes."""

    def damage(folder: Path) -> None:
        held = {**load_file(folder / name), **edits}
        kept = {key: tensor for key, tensor in held.items() if isinstance(tensor, Tensor)}
        save_file(kept, folder / name, metadata={"format": "pt"})

    return damage


def pickle(edit: Callable[[dict[Any, Any]], object], **how: Any) -> Damage:
    """Pickle what `edit` makes of the tensors in the pickle that is there."""

    def damage(folder: Path) -> None:
        torch.save(edit(torch.load(folder / PICKLE)), folder / PICKLE, **how)

    return damage


class Malice:
    """Unpickled by anything that trusts it, it leaves a file `executed`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.folder}/executed",)


def malicious(folder: Path) -> None:
    torch.save({"model.norm.weight": Malice(folder)}, folder / PICKLE)


def split_header(file: bytes) -> tuple[bytes, bytes]:
    """A safetensors file as the JSON of its header, and the tensors' bytes."""
    end = 8 + int.from_bytes(file[:8], "little")
    return file[8:end], file[end:]


def join_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data
