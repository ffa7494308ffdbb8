"""Folders that are no checkpoint of ours to read, told by what lies in them, and the way out.

Knows other programs' names for files and tensors. Reads nothing: it is asked with names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

ADAPTER = "adapter_config.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""What a file begins with that git left in the place of a large one."""

_CONVERTED = "take the repository in Hugging Face's layout, or convert it with"
_META = f"is Meta's own layout: {_CONVERTED} Transformers' convert_llama_weights_to_hf.py"
_MISTRAL = f"is Mistral's own layout: {_CONVERTED} Transformers' convert_mistral_weights_to_hf.py"
_UNQUANTISED = "no port of a quantised checkpoint exists yet; take the unquantised repository"

_FILES = {
    "consolidated.00.pth": _META,
    "consolidated.safetensors": _MISTRAL,
    "weights.npz": "is MLX's old layout: take the repository that it was converted from",
    "tf_model.h5": "is TensorFlow's: take the repository's safetensors, or convert it",
    "flax_model.msgpack": "is Flax's: take the repository's safetensors, or convert it",
}

# In this order: a quantised layout is also what else it is.
_TENSORS = (
    (r"lora_[AB]\.|\.base_layer\.", "is an adapter of PEFT's: save what merge_and_unload() gives"),
    (r"\.g_idx$", f"is GPTQ's layout: {_UNQUANTISED}"),
    (r"\.q(weight|zeros)$", f"is AWQ's or GPTQ's layout: {_UNQUANTISED}"),
    (r"\.absmax$|\.quant_state\.", f"is bitsandbytes' layout: {_UNQUANTISED}"),
    (r"\.weight_(scale|packed)(_inv)?$", f"is a layout of scaled weights: {_UNQUANTISED}"),
    (
        r"\.scales$",
        f"is MLX's quantised layout: {_UNQUANTISED}, or write one with mlx_lm.convert --dequantize",
    ),
    (
        r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.",
        "is of a module that was wrapped for training: save the model unwrapped, or take that word "
        "out of the names",
    ),
    (r"^(layers\.\d+\.attention\.wq|tok_embeddings)\.weight$", _META),
)


def by_files(has: Callable[[str], bool]) -> str | None:
    """What a folder without the weights or the config that we read holds instead, or None."""
    return next((f"{name} {what}" for name, what in _FILES.items() if has(name)), None)


def by_tensors(names: Iterable[str]) -> str | None:
    """Whose layout it is that has tensors of such names, or None."""
    names = list(names)
    for pattern, what in _TENSORS:
        found = next((name for name in names if re.search(pattern, name)), None)
        if found is not None:
            return f"{found} {what}"
    return None


def by_architectures(config: Mapping[str, Any]) -> str | None:
    """What model a config names that is not a language model with its head, or None."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        return None
    word = named[0]
    if word.endswith(("ForCausalLM", "ForConditionalGeneration")):
        return None
    if word.endswith("Model") and "For" not in word:
        return (
            f"config.json: architectures is {word}, the model without its head: take the "
            "checkpoint of the language model"
        )
    return (
        f"config.json: architectures is {word}, with another head than a language model's (a "
        "classifier's or a reward model's, say): take the language model that it was made of"
    )


def adapter(config: Mapping[str, Any]) -> str:
    """What an `adapter_config.json` says of the folder that it lies in."""
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    return (
        f"{ADAPTER} says that this is an adapter ({kind or 'kind not named'}) for "
        f"{base or 'a model not named'}, to be put upon its weights: merge the two with PEFT "
        "(merge_and_unload, then save_pretrained), or take the file away to go without it"
    )
