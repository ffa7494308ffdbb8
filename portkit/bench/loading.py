"""Whole processes, from their start to the first token, in turn.

Knows workers and a clock. What a process does before it answers is all in the figure: interpreter,
imports, weights, a short prompt.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from portkit.bench.decode import Plan, Worker, prompts_of


def first_tokens(plan: Plan) -> list[dict[str, Any]]:
    """Medians in seconds for each engine; one round more comes first and does not count."""
    prompts = prompts_of(plan.vocab_size, plan.contexts[0], 1)
    times: dict[str, list[tuple[float, float]]] = {engine: [] for engine in plan.engines}
    for number in range(plan.rounds + 1):
        for engine in plan.engines:
            started = time.perf_counter()
            worker = Worker(plan, engine)
            try:
                worker.run(prompts, 1)
                taken = time.perf_counter() - started
            finally:
                worker.close()
            if number > 0:
                times[engine].append((taken, worker.load_s))
    return [
        {
            "engine": engine,
            "seconds": median(taken for taken, _ in found),
            "load_s": median(loaded for _, loaded in found),
        }
        for engine, found in times.items()
    ]
