"""What a run depends on: the settings that decide its bits, and those that do not. Checked here."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from portkit.errors import TrainingError
from portkit.training.schedule import Schedule, Shape


class OptimizerName(StrEnum):
    adamw = "adamw"
    muon = "muon"


class Precision(StrEnum):
    """What matrices are multiplied in; weights and optimizer are float32 either way."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Under the same recipe, data and number of ranks a run is the same run, bit for bit.

    `batch_size` counts the rows of an optimizer step, over all ranks and micro-batches together, so
    that `accumulation` changes memory and not the mathematics. Rates are per optimizer step.
    """

    steps: int
    batch_size: int
    context: int
    """Tokens a row predicts."""
    learning_rate: float = 1e-3
    final_rate: float = 0.0
    schedule: Shape = Shape.cosine
    warmup_steps: int = 0
    decay_steps: int = 0
    optimizer: OptimizerName = OptimizerName.adamw
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_gradient_norm: float = 1.0
    """Longer gradients are shortened to it; 0 leaves them as they are."""
    accumulation: int = 1
    precision: Precision = Precision.float32
    seed: int = 0
    activation_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        """Raises TrainingError for what cannot work."""
        for name in ("batch_size", "context", "accumulation"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{option(name)} {getattr(self, name)}: give at least 1")
        if self.batch_size % self.accumulation:
            raise TrainingError(
                f"a batch of {self.batch_size} rows cannot be accumulated in {self.accumulation} "
                "equal parts: make --batch-size a multiple of --accumulation"
            )
        for name in ("weight_decay", "max_gradient_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TrainingError(f"{option(name)} {getattr(self, name)}: give 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(f"{option(name)} {getattr(self, name)}: give 0 to below 1")
        if not 0 <= self.seed < 2**63:
            raise TrainingError(f"--seed {self.seed}: give a number from 0 to 2**63 - 1")
        assert self.schedule_of_rates.steps == self.steps

    @property
    def schedule_of_rates(self) -> Schedule:
        return Schedule(
            shape=self.schedule,
            steps=self.steps,
            peak=self.learning_rate,
            final=self.final_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
        )

    def differences(self, other: dict[str, Any]) -> list[str]:
        """The settings that another run's recipe, as JSON has it, gives another value."""
        return [
            f"{option(one.name)} {other.get(one.name)!s}, now {getattr(self, one.name)!s}"
            for one in fields(self)
            if other.get(one.name) != getattr(self, one.name)
        ]


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How often a run looks and saves; changes no bit of it, so a resumed run may change them."""

    eval_every: int = 200
    eval_tokens: int = 1 << 18
    """At most so many held-out tokens, whole documents from the first on."""
    save_every: int = 200
    keep: int = 3
    sample_every: int = 0
    """0: no samples on the way."""
    sample_prompt: str = ""

    def __post_init__(self) -> None:
        for name in ("eval_every", "sample_every"):
            if getattr(self, name) < 0:
                raise TrainingError(f"{option(name)} {getattr(self, name)}: give 0 (never) or more")
        for name in ("eval_tokens", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{option(name)} {getattr(self, name)}: give at least 1")


def option(name: str) -> str:
    """A setting as the command line spells it."""
    return "--" + name.replace("_", "-")
