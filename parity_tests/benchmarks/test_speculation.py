"""What prompt lookup gains on the shipped checkpoint: where text is copied, and where it is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import portkit
from parity_tests.benchmarks.conftest import Compare
from parity_tests.benchmarks.test_opening import record
from portkit.generation.loop import Startable, generate
from portkit.generation.settings import GenerationSettings
from portkit.generation.speculation import Speculative
from portkit.loading import load

DEMO = Path(portkit.__file__).parent / "demo_checkpoint"
OPENING, NUM_TOKENS, ROUNDS = [1, 5, 9], 80, 5


def said(model: Startable, prompt: list[int], count: int = NUM_TOKENS) -> list[int]:
    settings = GenerationSettings(max_new_tokens=count)
    return [one.token_id for one in generate(model, [prompt], settings, context_length=512)]


@pytest.mark.parametrize(("text", "target"), [("a copied text", 0.6), ("a story", 1.1)])
def test_prompt_lookup(
    benchmark: BenchmarkFixture, compare: Compare, text: str, target: float
) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    plain = load(DEMO).model
    lookup, prompt = Speculative(plain), OPENING
    if text == "a copied text":
        story = [*OPENING, *said(plain, OPENING, 200)]
        prompt = [*story, *story[:40]]
        assert said(plain, prompt)[:20] == story[40:60], "the model copies"
    found = compare(lambda: said(lookup, prompt), lambda: said(plain, prompt), ROUNDS)
    record(benchmark, f"`--speculate`, {NUM_TOKENS} tokens of {text}", "without", target, found)
