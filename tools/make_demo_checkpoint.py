"""Make portkit's demo checkpoint from nothing: python tools/make_demo_checkpoint.py [--out DIR]

Story text from `stories.py`, a tokenizer trained on it, a small Gemma 3 trained from scratch, and a
model card with what was measured: some twenty minutes on two CPU cores. A run that was interrupted
goes on from its last progress file when it is started again.

Knows the demo model's shape and how it is trained. The shape is awkward on purpose, since the
demo's point is a port that is right: both layer types in an order that no pattern gives, a window
shorter than the context, grouped heads, hidden_size != heads * head_dim, sqrt(hidden_size) and the
attention's scale inexact in bfloat16, a prime vocabulary. Knows nothing of how stories are written
and nothing of the port's inside.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_model_card import Measured, write_card
from safetensors.torch import save_file
from stories import Story, write_stories, write_story
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from portkit.architecture import CausalLM
from portkit.config import ConfigReader
from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.loading import LoadedModel, load
from portkit.registry import architecture_of
from portkit.tokenizer import Tokenizer as CheckpointTokenizer

ROOT = Path(__file__).resolve().parent.parent
PAD, EOS, BOS = 0, 1, 2
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>"]
CONTEXT = 256
NUM_TOKENIZER_STORIES = 4000
NUM_HELD_OUT_STORIES = 200
PROMPT = "Once upon a time"

SLIDING, FULL = "sliding_attention", "full_attention"
CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
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
    "pad_token_id": PAD,
    "query_pre_attn_scalar": 32,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 48,
    "torch_dtype": "bfloat16",
    "use_bidirectional_attention": False,
    "use_cache": True,
    "vocab_size": 1021,
}
GENERATION_CONFIG = {
    "bos_token_id": BOS,
    "do_sample": True,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "temperature": 0.8,
    "top_k": 64,
    "top_p": 0.95,
}
TOKENIZER_CONFIG = {
    "bos_token": "<bos>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<eos>",
    "model_max_length": CONTEXT,
    "pad_token": "<pad>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on; a progress file is used only under the same recipe."""

    steps: int
    seed: int
    batch_size: int = 8
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0

    @property
    def held_out_seed(self) -> int:
        return self.seed + 1


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens that puts <bos> in front of what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (story.text for story in write_stories(seed, NUM_TOKENIZER_STORIES))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    assert tokenizer.get_vocab_size() == CONFIG["vocab_size"]
    assert tokenizer.encode("").ids == [BOS]
    return tokenizer


def build_model(seed: int) -> CausalLM:
    """The port as the family builds it, in float32, initialised.

    Matrices are normal; norms, which multiply by 1 + weight, start at 1. Those of queries and keys
    start at 2: with so few channels a normalised pair could not tell one key of 200 from the rest,
    and a story's names would be learned late.
    """
    architecture = architecture_of(CONFIG)
    model = architecture.build(architecture.read_config(ConfigReader(CONFIG)), "sdpa")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=CONFIG["initializer_range"], generator=generator)
        else:
            nn.init.constant_(parameter, 1.0 if "q_norm" in name or "k_norm" in name else 0.0)
    return model


class Stories:
    """Training rows: each begins with a story and is filled with the beginning of a second one.

    No text is told twice on purpose, and none of the held-out stories is told at all.
    """

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe, held_out: list[Story]) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.held_out = {story.text for story in held_out}

    def batch(self, step: int) -> Tensor:
        """Token ids (batch, CONTEXT + 1) of a step: the same whenever they are asked for."""
        first = step * self.recipe.batch_size
        rows = [self.row(first + row) for row in range(self.recipe.batch_size)]
        return torch.tensor(rows)

    def row(self, index: int) -> list[int]:
        ids = self.story(2 * index) + self.story(2 * index + 1)
        assert len(ids) > CONTEXT, "two stories fill a row"
        return ids[: CONTEXT + 1]

    def story(self, index: int) -> list[int]:
        text = write_story(self.recipe.seed, index).text
        if text in self.held_out:
            return self.story(index + 1)
        ids = [*self.tokenizer.encode(text).ids, EOS]
        assert len(ids) <= CONTEXT, f"a story of {len(ids)} tokens does not fit the context"
        return ids


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: CausalLM, stories: Stories, recipe: Recipe, progress_file: Path) -> None:
    """AdamW on float32 weights; matrices decay, norms do not. Progress goes to stderr."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    first = resume(model, optimizer, recipe, progress_file)
    started, mean_loss = time.perf_counter(), math.nan
    model.train()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        ids = stories.batch(step)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
        optimizer.step()
        mean_loss = loss.item() if step == first else 0.95 * mean_loss + 0.05 * loss.item()
        if (step + 1) % 20 == 0 or step + 1 == recipe.steps:
            per_step_s = (time.perf_counter() - started) / (step + 1 - first)
            left_s = per_step_s * (recipe.steps - step - 1)
            note(f"step {step + 1}/{recipe.steps}  loss {mean_loss:.4f}  {left_s:.0f} s left")
        if (step + 1) % 100 == 0:
            save_progress(model, optimizer, step + 1, recipe, progress_file)


def save_progress(
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    steps_done: int,
    recipe: Recipe,
    file: Path,
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    partial = file.with_suffix(".partial")
    torch.save({**state, "steps_done": steps_done, "run": run_key(recipe)}, partial)
    partial.replace(file)


def resume(model: CausalLM, optimizer: torch.optim.Optimizer, recipe: Recipe, file: Path) -> int:
    """Steps done already; 0 where there is no progress file of this very run."""
    if not file.is_file():
        return 0
    state = torch.load(file, weights_only=True)
    if state["run"] != run_key(recipe):
        note(f"{file} is of another run: starting anew")
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    note(f"going on from step {state['steps_done']} of {file}")
    return int(state["steps_done"])


def run_key(recipe: Recipe) -> str:
    return json.dumps([CONFIG, vars(recipe), write_story(recipe.seed, 0).text])


def export(model: CausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the folder but for its card: bfloat16 weights under the names of released files."""
    directory.mkdir(parents=True, exist_ok=True)
    # named_parameters lists the tied head once, as the embedding: so do released files.
    tensors = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    weights = directory / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors leaves it to its owner alone, and a wheel keeps the mode
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def held_out_nats(loaded: LoadedModel, stories: list[Story]) -> tuple[float, int]:
    """Nats lost on the stories and their <eos>, each read from its own <bos>; and tokens predicted.

    The model computes in the dtype it was loaded in; the loss is taken in float32.
    """
    tokenizer = CheckpointTokenizer.open(loaded.files)
    nats, num_tokens = 0.0, 0
    for story in stories:
        ids = torch.tensor([[*tokenizer.encode(story.text), EOS]])
        logits = loaded.model(ids[:, :-1])[0].float()
        nats += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        num_tokens += ids.shape[1] - 1
    return nats, num_tokens


def tell(loaded: LoadedModel, settings: GenerationSettings) -> str:
    """The prompt and how the model continues it."""
    tokenizer = CheckpointTokenizer.open(loaded.files)
    prompts, length = [tokenizer.encode(PROMPT)], loaded.config.max_position_embeddings
    steps = generate(loaded.model, prompts, settings, context_length=length, tokenizer=tokenizer)
    return PROMPT + "".join(step.text for step in steps)


def measure(directory: Path, recipe: Recipe, held_out: list[Story], training_s: float) -> Measured:
    """What the card says, measured on the folder as it was written."""
    loaded = load(directory, device="cpu")
    nats, num_tokens = held_out_nats(loaded, held_out)
    settings = GenerationSettings.read(loaded.files)
    return Measured(
        num_parameters=loaded.report.parameters,
        num_steps=recipe.steps,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        held_out_seed=recipe.held_out_seed,
        num_held_out=len(held_out),
        training_s=training_s,
        nats_per_token=nats / num_tokens,
        bits_per_byte=nats / math.log(2) / sum(len(s.text.encode()) for s in held_out),
        grammar_nats_per_token=sum(story.nats for story in held_out) / num_tokens,
        greedy=tell(loaded, settings.override(do_sample=False, max_new_tokens=CONTEXT)),
        sampled=tell(loaded, settings.override(seed=1, max_new_tokens=CONTEXT)),
        versions=f"Python {platform.python_version()}, torch {torch.__version__}",
    )


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make portkit's demo checkpoint: text, tokenizer, training, folder, card."
    )
    parser.add_argument("--out", type=Path, default=ROOT / "portkit" / "demo_checkpoint")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = Recipe(options.steps, options.seed)
    started = time.perf_counter()
    held_out = list(write_stories(recipe.held_out_seed, NUM_HELD_OUT_STORIES))
    tokenizer = train_tokenizer(recipe.seed)
    model = build_model(recipe.seed)
    progress_file = ROOT / "build" / f"demo_checkpoint-{recipe.steps}-{recipe.seed}.pt"
    train(model, Stories(tokenizer, recipe, held_out), recipe, progress_file)
    export(model, tokenizer, options.out)
    measured = measure(options.out, recipe, held_out, time.perf_counter() - started)
    write_card(options.out / "README.md", measured)
    progress_file.unlink(missing_ok=True)
    note(f"{options.out}: {measured.nats_per_token:.4f} nats per held-out token")


if __name__ == "__main__":
    main()
