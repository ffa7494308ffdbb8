"""Rates of each schedule, and schedules and recipes that cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest

from parity_tests.training.conftest import recipe
from portkit.errors import TrainingError
from portkit.training.recipe import Habits
from portkit.training.schedule import Schedule, Shape


def rates(shape: str, **given: Any) -> list[float]:
    settings = {"steps": 11, "peak": 1.0, "final": 0.1, "warmup_steps": 1, **given}
    schedule = Schedule(shape=Shape(shape), **settings)
    return [round(schedule.rate(step), 6) for step in range(schedule.steps)]


def test_cosine() -> None:
    found = rates("cosine", warmup_steps=4, steps=9)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert (found[6], found[8]) == (0.55, 0.1)


def test_trapezoid() -> None:
    found = rates("trapezoid", warmup_steps=2, decay_steps=4, final=0.2, steps=10)
    assert found == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4]


def test_one_cycle() -> None:
    found = rates("one-cycle", warmup_steps=4, final=0.0, steps=9)
    assert found[0] == pytest.approx(0.04 + 0.96 * (1 - 2**-0.5) / 2, abs=1e-6)
    assert (found[1], found[3], found[4]) == (0.52, 1.0, 1.0)
    assert (found[6], found[8]) == (0.5, 0.0)


def test_constant() -> None:
    assert rates("constant", warmup_steps=2, steps=4) == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"final_rate": 0.02}, "must lie between 0 and the peak"),
        ({"learning_rate": 0.0}, "above zero"),
        ({"learning_rate": float("nan")}, "above zero"),
        ({"steps": 0, "warmup_steps": 0}, "at least one step"),
        ({"warmup_steps": 13}, "optimizer steps are counted"),
        ({"warmup_steps": -1}, "none is below zero"),
        ({"decay_steps": 3}, "goes with the trapezoid"),
        ({"schedule": Shape.trapezoid}, "give --decay-steps"),
        ({"accumulation": 3}, "make --batch-size a multiple of --accumulation"),
        ({"batch_size": 0}, "--batch-size 0: give at least 1"),
        ({"context": 0}, "--context 0: give at least 1"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1: give 0 or more"),
        ({"max_gradient_norm": float("inf")}, "--max-gradient-norm inf"),
        ({"beta2": 1.0}, "--beta2 1.0: give 0 to below 1"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_what_cannot_be_meant_is_refused(changed: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TrainingError, match=complaint) as caught:
        recipe(**changed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changed", [{"keep": 0}, {"save_every": 0}, {"eval_every": -1}])
def test_habits_are_checked(changed: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="give"):
        Habits(**changed)
