"""Make portkit's demo checkpoint from nothing: python tools/make_demo_checkpoint.py [--out DIR]

Story text from `stories.py`, `portkit train` on it, and a model card with what was measured: some
twenty minutes on two CPU cores. A run that was interrupted goes on where it was left.

Knows the demo model's shape and the settings of its training. The shape is awkward on purpose,
since the demo's point is a port that is right: both layer types in an order that no pattern gives,
a window shorter than the context, grouped heads, hidden_size != heads * head_dim,
sqrt(hidden_size) and the attention's scale inexact in bfloat16, a prime vocabulary. Knows nothing
of how stories are written, nor of how a model is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_model_card import Measured, write_card
from stories import Story, write_stories

from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.loading import LoadedModel, load
from portkit.tokenizer import Tokenizer
from portkit.training.reading import SEPARATOR

ROOT = Path(__file__).resolve().parent.parent
CONTEXT, BATCH_SIZE = 256, 8
NUM_HELD_OUT = 200
NUM_STORIES = 25_000
"""More than 1,600 steps read: none is told twice."""
PROMPT = "Once upon a time"

SLIDING, FULL = "sliding_attention", "full_attention"
CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 24,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 160,
    "initializer_range": 0.08,
    "intermediate_size": 224,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL, SLIDING, FULL],
    "max_position_embeddings": CONTEXT,
    "model_type": "gemma3_text",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    # Small, and the scores large: with so few channels a normalised query could otherwise not tell
    # one key of 200 from the rest, and a story's names would be learned late.
    "query_pre_attn_scalar": 3,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 48,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
    "use_cache": True,
    "vocab_size": 1021,
}
SAMPLING = {"do_sample": True, "pad_token_id": 0, "temperature": 0.8, "top_k": 64, "top_p": 0.95}


def write_texts(folder: Path, seed: int, held_out: Iterable[Story]) -> tuple[Path, Path]:
    """The text to train on, which tells none of the held-out stories, and those."""
    folder.mkdir(parents=True, exist_ok=True)
    held = [story.text for story in held_out]
    told = (story.text for story in write_stories(seed, NUM_STORIES))
    train_text, held_out_text = folder / "stories.txt", folder / "held-out.txt"
    separator = f"\n{SEPARATOR}\n"
    known = set(held)
    train_text.write_text(separator.join(text for text in told if text not in known), "utf-8")
    held_out_text.write_text(separator.join(held), "utf-8")
    return train_text, held_out_text


def training_command(
    config: Path, texts: tuple[Path, Path], run: Path, steps: int, seed: int
) -> list[str]:
    """What a user would type."""
    settings = {
        "--data": texts[0],
        "--held-out": texts[1],
        "--out": run,
        "--steps": steps,
        "--context": CONTEXT,
        "--batch-size": BATCH_SIZE,
        "--optimizer": "muon",
        "--learning-rate": 3e-3,
        "--final-rate": 3e-5,
        "--warmup-steps": steps // 20,
        "--seed": seed,
        "--dtype": "bfloat16",
        "--device": "cpu",
    }
    words = [str(word) for pair in settings.items() for word in pair]
    return [sys.executable, "-m", "portkit", "train", str(config), *words]


def place(model: Path, directory: Path) -> None:
    """Put the trained folder where it ships, with the way it is to be sampled."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(model, directory)
    file = directory / "generation_config.json"
    settings = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**settings, **SAMPLING}, indent=2) + "\n", "utf-8")


@torch.inference_mode()
def held_out_nats(loaded: LoadedModel, stories: list[Story]) -> tuple[float, int]:
    """Nats lost on the stories and their <eos>, each read from its own <bos>; and tokens predicted.

    The model computes in the dtype it was loaded in; the loss is taken in float32.
    """
    tokenizer = Tokenizer.open(loaded.files)
    nats, num_tokens = 0.0, 0
    for story in stories:
        ids = torch.tensor([[*tokenizer.encode(story.text), tokenizer.eos_id]])
        logits = loaded.model(ids[:, :-1])[0].float()
        nats += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        num_tokens += ids.shape[1] - 1
    return nats, num_tokens


def tell(loaded: LoadedModel, settings: GenerationSettings) -> str:
    """The prompt and how the model continues it."""
    tokenizer = Tokenizer.open(loaded.files)
    prompts, length = [tokenizer.encode(PROMPT)], loaded.config.max_position_embeddings
    steps = generate(loaded.model, prompts, settings, context_length=length, tokenizer=tokenizer)
    return PROMPT + "".join(step.text for step in steps)


def measure(directory: Path, steps: int, seed: int, held_out: list[Story]) -> Measured:
    """What the card says, measured on the folder as it was written."""
    loaded = load(directory, device="cpu")
    nats, num_tokens = held_out_nats(loaded, held_out)
    settings = GenerationSettings.read(loaded.files)
    return Measured(
        num_parameters=loaded.report.parameters,
        num_steps=steps,
        batch_size=BATCH_SIZE,
        context=CONTEXT,
        seed=seed,
        held_out_seed=seed + 1,
        num_held_out=len(held_out),
        nats_per_token=nats / num_tokens,
        bits_per_byte=nats / math.log(2) / sum(len(s.text.encode()) for s in held_out),
        grammar_nats_per_token=sum(story.nats for story in held_out) / num_tokens,
        greedy=tell(loaded, settings.override(do_sample=False, max_new_tokens=CONTEXT)),
        sampled=tell(loaded, settings.override(seed=1, max_new_tokens=CONTEXT)),
        versions=f"Python {platform.python_version()}, torch {torch.__version__}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make portkit's demo checkpoint: text, training, folder, card."
    )
    parser.add_argument("--out", type=Path, default=ROOT / "portkit" / "demo_checkpoint")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = ROOT / "build" / f"demo_checkpoint-{options.steps}-{options.seed}"
    held_out = list(write_stories(options.seed + 1, NUM_HELD_OUT))
    texts = write_texts(work, options.seed, held_out)
    config = work / "config.json"
    config.write_text(json.dumps(CONFIG, indent=2) + "\n", "utf-8")
    command = training_command(config, texts, work / "run", options.steps, options.seed)
    subprocess.run(command, check=True)
    place(work / "run" / "model", options.out)
    torch.set_num_threads(1)
    measured = measure(options.out, options.steps, options.seed, held_out)
    write_card(options.out / "README.md", measured)
    print(f"{options.out}: {measured.nats_per_token:.4f} nats per held-out token")


if __name__ == "__main__":
    main()
