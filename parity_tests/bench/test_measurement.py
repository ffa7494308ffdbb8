"""How many rounds there are, and how many tokens are compared: as many as fit into the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any

import pytest

from portkit.bench import decode
from portkit.bench.decode import Measurement, Plan
from portkit.bench.engines import EAGER, READABLE
from portkit.errors import BenchError

PLAN = Plan(
    repo="",
    dtype="bfloat16",
    engines=(READABLE, EAGER),
    contexts=(100,),
    batches=(1,),
    num_tokens=11,
    rounds=5,
    threads=1,
    vocab_size=50,
    num_compared=256,
    windows=(512,),
    limit=2048,
)
STEP_S = {READABLE: 0.25, EAGER: 0.5}


class Clock:
    """Time passes while a worker runs, and only then."""

    now = 0.0
    asked: list[tuple[str, int, int]]

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.asked = []

    class Worker:
        def __init__(self, plan: Plan, engine: str) -> None:
            self.engine = engine

        def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> dict[str, Any]:
            clock.asked.append((self.engine, len(prompts[0]), num_tokens))
            if len(clock.asked) > 40:
                raise BenchError("enough")
            steps = [STEP_S[self.engine]] * (num_tokens - 1)
            clock.now += 1.0 + sum(steps)
            return {
                "prefill_s": 1.0,
                "step_s": steps,
                "token_ids": [[0] * num_tokens],
                "compile_s": 0.0,
                "peak_device_bytes": None,
                "peak_rss_bytes": 1,
            }

        def close(self) -> None:
            pass

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "Worker", Worker)
    monkeypatch.setattr(decode, "time", clock)
    monkeypatch.setattr(decode, "load", stop)
    return clock


def measured(plan: Plan) -> list[decode.Row]:
    measurement = Measurement(plan)
    with pytest.raises(KeyboardInterrupt):
        measurement.run()
    return measurement.rows()


@pytest.mark.parametrize(
    ("rounds_s", "rounds"), [(inf, 5), (0.0, 1), (9.4, 1), (19.1, 2), (29.0, 3), (1000.0, 5)]
)
def test_rounds_end_with_their_time(clock: Clock, rounds_s: float, rounds: int) -> None:
    """A round takes 9.5 seconds here: 1 and 10 steps, for each engine."""
    rows = measured(replace(PLAN, rounds_s=rounds_s))
    assert [(row.engine, row.rounds, row.step_s) for row in rows] == [
        (READABLE, rounds, 0.25),
        (EAGER, rounds, 0.5),
    ]
    assert all(row.agreement is None and row.same_tokens is None for row in rows)
    assert len(clock.asked) == 2 * (1 + rounds) + 2


@pytest.mark.parametrize(
    ("compared_s", "num_tokens"), [(inf, 256), (0.0, 32), (106.7, 99), (107.7, 100), (900.0, 256)]
)
def test_so_many_tokens_are_compared(clock: Clock, compared_s: float, num_tokens: int) -> None:
    """Prompts of 384 tokens take 3.84 times as long as those of 100, and a token one step of each
    engine and one of the readable model, which is asked again.
    """
    measured(replace(PLAN, compared_s=compared_s))
    prompt = 512 - num_tokens // 2
    assert clock.asked[-2:] == [(READABLE, prompt, num_tokens), (EAGER, prompt, num_tokens)]


@pytest.mark.usefixtures("clock")
def test_what_was_measured_before_a_failure_is_kept() -> None:
    measurement = Measurement(replace(PLAN, rounds=100))
    with pytest.raises(BenchError, match="enough"):
        measurement.run()
    assert [row.rounds for row in measurement.rows()] == [19, 19]


def test_how_long_it_takes_is_said_beforehand() -> None:
    bounded = replace(PLAN, rounds_s=45.0, compared_s=45.0)
    assert bounded.beforehand() == (
        "measuring 2 engines: up to 90 s, and warm-up and verdicts about as long again"
    )
    assert replace(bounded, contexts=(1, 2), engines=("fast",)).beforehand() == (
        "measuring 1 engines: up to 135 s, and warm-up and verdicts about as long again; a minute "
        "or two more where regions are to be compiled first"
    )
    assert "5 rounds and 256 tokens to compare, as asked for" in PLAN.beforehand()
