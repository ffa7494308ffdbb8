"""A model before its first step: a config by name or path, the port it makes, its first weights.

Knows how a variant's config is fitted to a tokenizer and a context, and how weights are drawn.
Knows no family: the port and the names of its tensors are the registry's and the weight map's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from portkit.architecture import Architecture, CausalLM
from portkit.checkpoint import CONFIG
from portkit.config import ConfigReader
from portkit.errors import InvalidConfig, TrainingError
from portkit.json_reading import read_object
from portkit.registry import architecture_of, variants
from portkit.tokenizer import Tokenizer

_DEFAULT_STD = 0.02


def read_variant(name: str) -> dict[str, Any]:
    """`config.json` as it is in a file or folder, or under the name of a variant that ships.

    Raises InvalidConfig where there is none, or it is not JSON.
    """
    path = Path(name)
    path = path / CONFIG if path.is_dir() else path
    shipped = variants()
    if not path.is_file():
        if name not in shipped:
            raise InvalidConfig(
                f"{name!r} is neither a config.json, a folder with one, nor a variant: there are "
                f"{', '.join(shipped)}"
            )
        path = shipped[name]
    return read_object(path, str(path), InvalidConfig, "repair it, or give a model's config.json")


def fit_config(
    raw: Mapping[str, Any], tokenizer: Tokenizer, context: int, vocab_size: int
) -> dict[str, Any]:
    """The text model's config with this tokenizer: `vocab_size` rows and its special ids.

    Raises a PortkitError where no port computes the config, TrainingError where it cannot be
    trained on blocks of `context` tokens.
    """
    architecture = architecture_of(raw)
    fitted = {
        **architecture.text_config(raw),
        "vocab_size": vocab_size,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": None,
    }
    if tokenizer.vocab_size > vocab_size:
        raise TrainingError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1} and the model {vocab_size} "
            "rows: take the tokenizer and the vocabulary of one checkpoint"
        )
    _, config = _read(fitted)
    if context > config.max_position_embeddings:
        raise TrainingError(
            f"--context {context} is more than the config's max_position_embeddings "
            f"{config.max_position_embeddings}: shorten the one or raise the other"
        )
    return fitted


def build(raw: Mapping[str, Any], seed: int, device: torch.device) -> CausalLM:
    """The port of a fitted config in float32, its weights drawn from `seed`.

    Drawn on the CPU, so that every device begins alike. Matrices are normal with the config's
    `initializer_range`; those that write into the residual stream are narrower by sqrt(2 layers),
    as in GPT-2, and the sum of all layers starts at the size of one. Norms start at one, however
    the family stores that; biases at zero.
    """
    architecture, config = _read(raw)
    model = architecture.build(config, "sdpa")
    std = float(raw.get("initializer_range") or _DEFAULT_STD)
    residual_std = std / math.sqrt(2 * config.num_hidden_layers)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            writes = not {"o_proj", "down_proj"}.isdisjoint(name.split("."))
            nn.init.normal_(parameter, std=residual_std if writes else std, generator=generator)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
    return model.to(device)


def _read(raw: Mapping[str, Any]) -> tuple[Architecture, Any]:
    architecture = architecture_of(raw)
    reader = ConfigReader(raw)
    config = architecture.read_config(reader)
    reader.finish()
    return architecture, config
