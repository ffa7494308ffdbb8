"""The table of bad input: folders that other programs wrote, and what to do with them.

Adapters, other layouts and quantised ones, models with other heads, names with something before
them, and pointers that git left in the place of files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from parity_tests.engine.damage import (
    CONFIG,
    GONE,
    PICKLE,
    SHARDS,
    WEIGHTS,
    Case,
    Damage,
    config,
    put,
    remove,
    rename,
    several,
    tensors,
    with_options,
)

ADAPTER = "adapter_config.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
HEAD, NORM = "lm_head.weight", "model.norm.weight"
PROJECTION = "model.layers.1.self_attn.q_proj"
UNQUANTISED = "take the unquantised repository"
ADAPTS = put(ADAPTER, {"base_model_name_or_path": "org/base", "peft_type": "LORA"})
MERGE = ("{folder}: adapter_config.json", "(LORA) for org/base", "merge_and_unload", "take the")
SEEN = ("inspect", "{folder}")
MLX = {"group_size": 64, "bits": 4}


def respelt(spelling: Callable[[str], str]) -> Damage:
    def damage(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        respelt = {spelling(name): tensor for name, tensor in held.items()}
        save_file(respelt, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def packed(**parts: tuple[int, ...]) -> Damage:
    """A projection by parts, as quantisers store it."""
    made = {f"{PROJECTION}.{part}": torch.ones(size).int() for part, size in parts.items()}
    return tensors({f"{PROJECTION}.weight": GONE, **made})


def as_meta(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "tok_embeddings"),
        ("model.", ""),
        ("self_attn.q_proj", "attention.wq"),
        ("lm_head", "output"),
    ):
        name = name.replace(ours, theirs)
    return name


_ARCHITECTURES = "config.json: architectures is "
FOLDERS = [
    Case("an adapter beside", ADAPTS, MERGE),
    Case("an adapter beside, inspected", ADAPTS, MERGE, arguments=SEEN),
    Case("an adapter alone", several(ADAPTS, remove(CONFIG), remove(WEIGHTS)), MERGE),
    Case("an adapter that says nothing", put(ADAPTER, {}), ("kind not named", "model not named")),
    Case("an adapter's config damaged", put(ADAPTER, b"{"), (ADAPTER, "is not JSON")),
    Case(
        "Meta's own layout",
        several(remove(CONFIG), rename(WEIGHTS, "consolidated.00.pth"), put("params.json", {})),
        (f"no {CONFIG}: consolidated.00.pth", "Meta's own", "convert_llama_weights_to_hf.py"),
    ),
    Case(
        "Mistral's own layout",
        several(remove(CONFIG), rename(WEIGHTS, "consolidated.safetensors")),
        (f"no {CONFIG}: consolidated.safetensors", "Mistral's own", "Hugging Face's layout"),
    ),
    Case(
        "Mistral's own layout beside a config",
        rename(WEIGHTS, "consolidated.safetensors"),
        (f"neither {WEIGHTS}", "consolidated.safetensors is Mistral's own", "convert_mistral"),
        base="mistral",
    ),
    Case(
        "TensorFlow's",
        rename(WEIGHTS, "tf_model.h5"),
        ("tf_model.h5 is TensorFlow's", "safetensors"),
    ),
    Case("no weights at all", remove(WEIGHTS), ("fetch the weights as well",)),
    Case("a pointer", put(WEIGHTS, POINTER), (WEIGHTS, "git-lfs pointer", "`git lfs pull`")),
    Case("a pointer, inspected", put(WEIGHTS, POINTER), ("pointer",), arguments=SEEN),
    Case("a pointer for a config", put(CONFIG, POINTER), (CONFIG, "git-lfs pointer")),
    Case(
        "a pointer for a shard",
        put(SHARDS[1], POINTER),
        (SHARDS[1], "git-lfs pointer", "{folder}"),
        base="sharded",
    ),
    Case(
        "a pointer for a pickle",
        put(PICKLE, POINTER),
        (PICKLE, "git-lfs pointer"),
        base="pickled",
        arguments=with_options("--allow-pickle"),
    ),
    Case(
        "MLX's config",
        config({"quantization": MLX}),
        ("quantised by MLX", UNQUANTISED, "mlx_lm.convert --dequantize"),
    ),
    Case(
        "MLX's config, both of its keys",
        config({"quantization": MLX, "quantization_config": MLX}),
        ("quantised by MLX", UNQUANTISED, "mlx_lm.convert --dequantize"),
    ),
]

_TENSORS = [
    Case(
        "GPTQ's",
        packed(qweight=(3, 32), qzeros=(1, 4), scales=(1, 32), g_idx=(24,)),
        (f"1 missing: {PROJECTION}.weight; 4 unexpected", "g_idx is GPTQ's layout", UNQUANTISED),
    ),
    Case(
        "AWQ's",
        packed(qweight=(24, 4), qzeros=(1, 4), scales=(1, 32)),
        ("qweight is AWQ's or GPTQ's layout", UNQUANTISED),
    ),
    Case(
        "MLX's",
        packed(weight=(32, 3), scales=(32, 1), biases=(32, 1)),
        ("scales is MLX's quantised layout", UNQUANTISED, "mlx_lm.convert --dequantize"),
    ),
    Case(
        "bitsandbytes'",
        tensors({f"{PROJECTION}.weight.absmax": torch.ones(12)}),
        ("absmax is bitsandbytes' layout", UNQUANTISED),
    ),
    Case(
        "scaled weights",
        tensors({f"{PROJECTION}.weight_scale_inv": torch.ones(1, 1)}),
        ("weight_scale_inv is a layout of scaled weights", UNQUANTISED),
    ),
    Case(
        "an adapter not merged",
        respelt(lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight")),
        ("base_layer.weight is an adapter of PEFT's", "merge_and_unload"),
    ),
    Case(
        "layers compiled one by one",
        respelt(lambda name: name.replace("layers.1.", "layers.1._orig_mod.")),
        ("_orig_mod", "wrapped for training", "save the model unwrapped"),
    ),
    Case(
        "Meta's own names",
        respelt(as_meta),
        ("attention.wq.weight is Meta's own layout", "convert_llama"),
    ),
    Case(
        "a classifier",
        several(
            config({"architectures": ["LlamaForSequenceClassification"]}),
            tensors({HEAD: GONE, "score.weight": torch.ones(2, 24)}),
        ),
        (
            f"1 missing: {HEAD}; 1 unexpected: score.weight",
            f"{_ARCHITECTURES}LlamaForSequenceClassification",
            "classifier's or a reward model's",
            "take the language model that it was made of",
        ),
    ),
    Case(
        "a reward model whose head was its embedding",
        several(
            config({"architectures": ["Qwen2ForRewardModel"]}),
            tensors({"score.0.weight": torch.ones(24, 24)}),
        ),
        ("1 unexpected: score.0.weight", f"{_ARCHITECTURES}Qwen2ForRewardModel"),
        base="qwen2",
    ),
    Case(
        "without its head",
        several(config({"architectures": ["LlamaModel"]}), tensors({HEAD: GONE})),
        (f"1 missing: {HEAD}; {_ARCHITECTURES}LlamaModel, the model without its head",),
    ),
    Case(
        "one tensor under two names",
        tensors({"norm.weight": torch.ones(24)}),
        ("norm.weight", NORM, "two spellings of one tensor", "save the checkpoint again"),
    ),
    Case(
        "compiled",
        respelt(lambda name: f"_orig_mod.{name}"),
        ("begin with '_orig_mod.'", "torch.compile", "model._orig_mod"),
    ),
    Case(
        "another family's names",
        respelt(lambda name: f"transformer.h.{name.replace('layers', 'blocks')}x"),
        ("21 missing", "21 unexpected", "take config and weights of one release"),
    ),
]
LAYOUTS = [*FOLDERS, *(replace(case, code=1) for case in _TENSORS)]

CLASSIFIER_BY_NAME: Damage = config({"architectures": ["LlamaForSequenceClassification"]})
"""Whose tensors are a language model's all the same."""
