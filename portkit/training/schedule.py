"""The learning rate of each optimizer step, counted from zero; checked before the first one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from portkit.errors import TrainingError

_ONE_CYCLE_START = 1 / 25


class Shape(StrEnum):
    """How the rate goes on after the warm-up; `final` is where it ends, `peak` where it begins."""

    cosine = "cosine"
    """Down to `final` along half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    trapezoid = "trapezoid"
    """At the peak, then straight down to `final` over the last `decay_steps` (arXiv:2405.18392)."""
    one_cycle = "one-cycle"
    """Up from peak / 25 and down to `final`, both along cosines (Smith 2018, arXiv:1708.07120)."""
    constant = "constant"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`steps` optimizer steps, however many micro-batches each of them accumulates."""

    shape: Shape
    steps: int
    peak: float
    final: float
    warmup_steps: int
    decay_steps: int = 0
    """Of the trapezoid alone."""

    def __post_init__(self) -> None:
        """Raises TrainingError for a schedule that cannot be what was meant."""
        if self.steps < 1:
            raise TrainingError(f"--steps {self.steps}: train for at least one step")
        if not 0 < self.peak < math.inf:
            raise TrainingError(f"--learning-rate {self.peak:g}: give a number above zero")
        if not 0 <= self.final <= self.peak:
            raise TrainingError(
                f"the final rate {self.final:g} must lie between 0 and the peak {self.peak:g}: see "
                "--final-rate and --learning-rate"
            )
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise TrainingError("--warmup-steps and --decay-steps count steps: none is below zero")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise TrainingError(
                f"{self.warmup_steps} steps of warm-up and {self.decay_steps} of decay do not fit "
                f"into {self.steps}: optimizer steps are counted, not micro-batches"
            )
        if self.decay_steps and self.shape != Shape.trapezoid:
            raise TrainingError(f"--decay-steps goes with the trapezoid, not with {self.shape}")
        if self.shape == Shape.trapezoid and not self.decay_steps:
            raise TrainingError("a trapezoid comes down at its end: give --decay-steps")

    def rate(self, step: int) -> float:
        """The rate of step 0, 1, …, steps - 1."""
        if step < self.warmup_steps:
            done = (step + 1) / self.warmup_steps
            if self.shape == Shape.one_cycle:
                return _cosine(self.peak * _ONE_CYCLE_START, self.peak, done)
            return self.peak * done
        match self.shape:
            case Shape.constant:
                return self.peak
            case Shape.trapezoid:
                left = (self.steps - step) / self.decay_steps
                return self.final + (self.peak - self.final) * min(1.0, left)
            case Shape.cosine | Shape.one_cycle:
                done = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
                return _cosine(self.peak, self.final, done)


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
