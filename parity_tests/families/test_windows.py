"""Which layers slide is the reference's answer, whatever a config leaves out or sets to null."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from parity_tests.checkpoints import Tiny, mistral, qwen2, qwen3, qwen3_moe, smollm3
from portkit.config import ConfigReader
from portkit.nn.cache import SlidingCache
from portkit.registry import architecture_of

SLIDES = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
NO_WINDOW = {**SLIDES, "sliding_window": None}
UNUSED = {"use_sliding_window": False, "sliding_window": 24}
MODELS = {
    "qwen2": qwen2(**SLIDES),
    "qwen2, null": qwen2(**NO_WINDOW),
    "qwen2, unused": qwen2(**UNUSED),
    "qwen3": qwen3(**SLIDES),
    "qwen3, null": qwen3(**NO_WINDOW),
    "qwen3, unused": qwen3(**UNUSED),
    "qwen3_moe": qwen3_moe(**SLIDES),
    "qwen3_moe, null": qwen3_moe(**NO_WINDOW),
    "qwen3_moe, unused": qwen3_moe(**UNUSED),
    "mistral": mistral(),
    "mistral, null": mistral(sliding_window=None),
    "smollm3, unused": smollm3(**UNUSED),
}
SLIDING = {"qwen2": [1, 2], "qwen3": [1, 2], "qwen3_moe": [0, 1, 2], "mistral": [0, 1, 2]}


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_that_slide_are_the_references(name: str) -> None:
    given: Tiny = MODELS[name]
    raw = {"model_type": name.partition(",")[0], **given.config}
    architecture = architecture_of(raw)
    with torch.device("meta"):
        ours = architecture.build(architecture.read_config(ConfigReader(raw)), "sdpa")
        config = getattr(transformers, f"{given.family}Config")(**given.config)
        theirs: Any = getattr(transformers, f"{given.family}ForCausalLM")(config)
    windows = [
        getattr(layer.self_attn, "sliding_window", theirs.config.sliding_window)
        for layer in theirs.model.layers
    ]
    caches = ours.new_cache(1, 99).layers
    assert [one.window if isinstance(one, SlidingCache) else None for one in caches] == windows
    assert [layer for layer, one in enumerate(windows) if one] == SLIDING.get(name, [])
