"""What the tests of training share: a text, a small awkward config, a recipe of a few steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from portkit.training.recipe import Recipe
from portkit.training.run import CHARACTERS, Inputs

Write = Callable[..., Path]

CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 12,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 40,
    "intermediate_size": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 64,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 10,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window": 7,
    "vocab_size": 512,
}
RECIPE = Recipe(steps=12, batch_size=4, context=20, learning_rate=1e-2, warmup_steps=3)


def story(number: int) -> str:
    names, things = ("Lily", "Tom", "Ben", "Sue"), ("ball", "cat", "hat", "tree", "boat")
    name, thing = names[number % 4], things[number * 7 % 5]
    return f"{name} had a {thing}. It was {number % 13} years old, and {name} liked the {thing}."


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 240 short stories."""
    file = tmp_path / "stories.txt"
    file.write_text("<|endoftext|>".join(map(story, range(240))), encoding="utf-8")
    return file


@pytest.fixture
def config_file(tmp_path: Path) -> Write:
    """`config_file(**changed)`: the path of the small config, as a file."""

    def write(**changed: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(CONFIG | changed))
        return path

    return write


@pytest.fixture
def inputs(text: Path, config_file: Write) -> Inputs:
    return Inputs(config=str(config_file()), data=str(text), tokenizer=CHARACTERS, device="cpu")


def recipe(**changed: Any) -> Recipe:
    return replace(RECIPE, **changed)


def weights(run: Path) -> dict[str, Tensor]:
    """The tensors of a run's result."""
    return load_file(run / "model" / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs came to the same result, bit for bit."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
