"""Trained as others have published it: validation losses at or below theirs, at the same budget.

nanoGPT's small recipe for a CPU on tiny-shakespeare, and the first hundred iterations of BabyLlama
on TinyStories, of which only a sample is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from portkit.importers.llama2c import import_llama2c
from portkit.training import journal
from portkit.training.recipe import Habits, Recipe
from portkit.training.run import CHARACTERS, Inputs, train

pytestmark = pytest.mark.slow

NANOGPT_SMALL = 1.88
BABYLLAMA_AT_100 = 3.6686
FOUR_LAYERS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "head_dim": 32,
    "hidden_size": 128,
    "intermediate_size": 352,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 69,
}


def test_tiny_shakespeare_by_characters(data_folder: Path, tmp_path: Path) -> None:
    """4 layers of 128, 12 rows of 64 characters, 2,000 steps, no dropout."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FOUR_LAYERS))
    text = data_folder / "text" / "tinyshakespeare.txt"
    inputs = Inputs(config=str(config), data=str(text), tokenizer=CHARACTERS, device="cpu")
    recipe = Recipe(
        steps=2000,
        batch_size=12,
        context=64,
        learning_rate=1e-3,
        final_rate=1e-4,
        warmup_steps=100,
        beta2=0.99,
    )
    habits = Habits(eval_every=0, save_every=1000)
    outcome = train(inputs, recipe, tmp_path / "run", habits)
    assert outcome.num_parameters < 820_000
    assert outcome.evaluation.nats_per_token <= NANOGPT_SMALL


def test_the_beginning_of_babyllama(data_folder: Path, tmp_path: Path) -> None:
    """Its shape and vocabulary, 32 rows of 256 characters."""
    source = data_folder / "weights" / "babyllama105"
    baby = tmp_path / "baby"
    import_llama2c(source / "model5000.bin", baby, tokenizer=source / "tok105.model")
    text = data_folder / "text" / "tinystories-v2-gpt4-sample.txt"
    inputs = Inputs(config=str(baby), data=str(text), tokenizer=str(baby), device="cpu")
    recipe = Recipe(
        steps=1000,
        batch_size=32,
        context=256,
        learning_rate=3e-3,
        final_rate=3e-4,
        warmup_steps=100,
        beta2=0.99,
    )

    class Enough(Exception):
        pass

    def stop(record: Mapping[str, Any]) -> None:
        if record["event"] == "evaluation":
            raise Enough

    run = tmp_path / "run"
    with pytest.raises(Enough):
        train(inputs, recipe, run, Habits(eval_every=100, eval_tokens=50_000), stop)
    ((step, nats),) = journal.series(journal.read_lines(run), "evaluation", "nats_per_token")
    assert step == 100
    assert nats <= BABYLLAMA_AT_100
