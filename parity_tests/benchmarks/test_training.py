"""A training step against the reference's own trainer: same model, weights, batches and optimizer.

The two take steps in turn, so that whatever else the machine does falls on both; their losses must
be the same curve, or they did not do the same work. Ours has its layers compiled.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from parity_tests.benchmarks.conftest import Comparison
from parity_tests.benchmarks.test_opening import record
from portkit.training.beginnings import build, read_variant
from portkit.training.loop import Trainer
from portkit.training.ranks import Ranks
from portkit.training.recipe import Recipe
from portkit.training.schedule import Shape

CPU = torch.device("cpu")
STEPS, WARM_UP = 30, 5
VOCABULARY, ROWS, CONTEXT, RATE = 69, 12, 64, 1e-3


class Blocks:
    """Random rows; the same for both sides."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (STEPS * ROWS, CONTEXT + 1)
        self.rows = torch.randint(VOCABULARY, shape, generator=generator)

    def blocks(self, first: int, count: int) -> Tensor:
        return self.rows[first : first + count]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = self.rows[row]
        return {"input_ids": ids[:-1], "labels": ids[:-1], "shift_labels": ids[1:]}


class InTurn:
    """Takes one of our steps behind each of theirs, and times both."""

    def __init__(self, ours: Trainer) -> None:
        self.ours = ours
        self.ours_s: list[float] = []
        self.theirs_s: list[float] = []
        self.losses: list[float] = []
        self._left = 0.0

    def on_step_end(self) -> None:
        entered = time.perf_counter()
        self.theirs_s.append(entered - self._left)
        self.losses.append(self.ours.step(len(self.losses)).loss)
        self._left = time.perf_counter()
        self.ours_s.append(self._left - entered)


def train_in_turn(folder: Path) -> tuple[Comparison, list[float], list[float]]:
    import transformers

    raw = {**read_variant("llama-1m"), "vocab_size": VOCABULARY}
    recipe = Recipe(
        steps=STEPS,
        batch_size=ROWS,
        context=CONTEXT,
        learning_rate=RATE,
        schedule=Shape.constant,
        compile=True,
    )
    data: Any = Blocks()
    turns = InTurn(Trainer(build(raw, 0, CPU), recipe, data, Ranks(0, 1, CPU)))

    class After(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.on_step_end()

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    config = transformers.LlamaConfig(**{k: v for k, v in raw.items() if k != "architectures"})
    reference = transformers.LlamaForCausalLM(config)
    reference.load_state_dict(build(raw, 0, CPU).state_dict())
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        adam_beta2=recipe.beta2,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_gradient_norm,
        optim="adamw_torch_fused",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    theirs = InOrder(model=reference, args=arguments, train_dataset=data, callbacks=[After()])
    theirs.remove_callback(transformers.PrinterCallback)
    theirs.train()
    losses = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    found = Comparison(median(turns.ours_s[WARM_UP:]), median(turns.theirs_s[WARM_UP:]))
    return found, turns.losses, losses


def test_a_training_step(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    found, ours, theirs = benchmark.pedantic(train_in_turn, (tmp_path,), rounds=1)
    assert len(theirs) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-4)
    record(benchmark, "a training step", "the same in `Trainer`", 1 / 1.3, found)
