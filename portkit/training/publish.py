"""A trained model as a Hugging Face folder: config, weights, tokenizer, generation config.

Knows how a sharded model is gathered and which files the folder has; what tensors are called the
weight map knows.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from portkit.checkpoint import CONFIG
from portkit.layout import new_folder, write_json, write_weights
from portkit.loading import COMPUTE_DTYPES
from portkit.registry import architecture_of
from portkit.training.loop import Trainer
from portkit.training.vocabulary import copy_files

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def publish(
    trainer: Trainer, config: Mapping[str, Any], tokenizer_folder: Path, target: Path, dtype: str
) -> None:
    """Write the folder `target`, whole or not at all; what stood there before is replaced.

    All ranks call it, the first writes. `dtype` is what the weights are rounded to: float32,
    bfloat16 or float16. Raises ExportError.
    """
    tensors = _gather(trainer, config, COMPUTE_DTYPES[dtype])
    with trainer.ranks.first_does() as first:
        if not first:
            return
        fresh = target.with_name(f".{target.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        with new_folder(fresh, sum(one.nbytes for one in tensors.values())) as folder:
            write_json(folder, CONFIG, {**config, "dtype": dtype})
            special = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
            write_json(folder, "generation_config.json", special)
            copy_files(tokenizer_folder, folder)
            write_weights(folder, tensors)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)


def _gather(trainer: Trainer, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the checkpoint by name, a tied one once; on the first rank alone."""
    whole = get_model_state_dict(trainer.objective, options=_WHOLE)
    if not trainer.ranks.first:
        return {}
    plan = architecture_of(config).weight_map.written(trainer.model)
    held = {
        name.removeprefix("model."): one.to(dtype)
        for name, one in whole.items()
        if isinstance(one, Tensor)
    }
    return plan.split(held)
