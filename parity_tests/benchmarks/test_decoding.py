"""How long decoding takes on the fast path, against the readable model, which is as fast as the
reference: the same operations in the same order.

`make bench` runs these; compiled regions are made first, which takes minutes once. `portkit bench
decode` measures the same with every engine in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from parity_tests.benchmarks.conftest import MAKE_CHECKPOINT, Compare, Comparison
from parity_tests.benchmarks.test_opening import record
from portkit.architecture import CausalLM
from portkit.bench.decode import Measurement, Plan
from portkit.bench.engines import READABLE, TRANSFORMERS
from portkit.decoding.fast import FastModel
from portkit.decoding.packages import Packages, default_folder
from portkit.loading import load
from portkit.readable import ReadableBatch

CONTEXT, NUM_TOKENS, ROUNDS = 128, 16, 7


@pytest.fixture(autouse=True)
def all_cores() -> None:
    """After the fixture that sets one: no bits are compared here."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))


@pytest.fixture(scope="module")
def model(released_size: Path) -> CausalLM:
    return load(released_size, device="cpu").model


@pytest.fixture(scope="module")
def packages() -> Packages:
    return Packages(default_folder(), pytest.fail)


def prompts() -> list[list[int]]:
    return [list(range(100, 100 + CONTEXT))]


def decoding(greedy: Callable[[Tensor], Tensor], token: Tensor) -> Callable[[], None]:
    """What decodes so many tokens more, each time that it is called."""

    def run() -> None:
        found = token
        for _ in range(NUM_TOKENS):
            found = greedy(found)[:, -1]

    return run


@pytest.mark.parametrize(
    "mode",
    [
        ("not compiled", False, None, 0.6),
        ("compiled", True, None, 0.48),
        ("compiled, exact head", True, 1, 0.35),
    ],
)
def test_decoding(
    benchmark: BenchmarkFixture,
    compare: Compare,
    model: CausalLM,
    packages: Packages,
    mode: tuple[str, bool, int | None, float],
) -> None:
    what, compiled, largest, target = mode
    room = NUM_TOKENS * (ROUNDS + 3)
    session = FastModel(model, packages if compiled else None).start(prompts(), room, largest)
    readable = ReadableBatch(model, prompts(), room)
    with torch.inference_mode():
        token = readable.prefill().argmax(-1)
    session.prefill()
    session.prepare(wait=compiled)
    theirs = torch.inference_mode()(decoding(readable.greedy, token))
    found = compare(decoding(session.greedy, token), theirs, ROUNDS)
    record(benchmark, f"decode {NUM_TOKENS} tokens, {what}", "the readable model", target, found)


def test_prefill_on_placed_weights(
    benchmark: BenchmarkFixture, compare: Compare, released_size: Path, model: CausalLM
) -> None:
    placed = FastModel(load(released_size, device="cpu").model)
    first = placed.start(prompts(), 2)
    first.prefill()
    first.prepare()

    @torch.inference_mode()
    def theirs() -> None:
        ReadableBatch(model, prompts(), 2).prefill()

    found = compare(lambda: placed.start(prompts(), 2).prefill(), theirs, ROUNDS)
    record(benchmark, f"prefill {CONTEXT} tokens", "weights in the mapped file", 1.1, found)


LONG_PROMPT, VOCABULARY = 2000, 262_144


def test_prefill_against_the_reference(benchmark: BenchmarkFixture, released_size: Path) -> None:
    """The same operations; each in a process of its own, as `portkit bench prefill` has them."""
    threads = torch.get_num_threads()
    engines = (READABLE, TRANSFORMERS)
    plan = Plan(
        str(released_size),
        "bfloat16",
        engines,
        (LONG_PROMPT,),
        (1,),
        2,
        ROUNDS,
        threads,
        VOCABULARY,
    )
    ours, theirs = benchmark.pedantic(Measurement(plan).run, rounds=1)
    found = Comparison(ours.prefill_s, theirs.prefill_s)
    record(benchmark, f"prefill {LONG_PROMPT:,} tokens", "Transformers", 1.0, found)


@pytest.fixture
def all_sliding(data_folder: Path, tmp_path: Path) -> Path:
    """The layers of Gemma 3 270M, each with a window, and next to no head: what they cost alone."""
    released = data_folder / "configs" / "google__gemma-3-270m-it" / "config.json"
    config = json.loads(released.read_text(encoding="utf-8"))
    config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    config["vocab_size"] = 509
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    folder = tmp_path / "checkpoint"
    subprocess.run([sys.executable, MAKE_CHECKPOINT, tmp_path, folder], check=True)
    return folder


def test_a_token_in_sliding_layers_costs_the_same_at_any_length(
    benchmark: BenchmarkFixture, compare: Compare, all_sliding: Path
) -> None:
    fast = FastModel(load(all_sliding, device="cpu").model)
    far, near = (
        fast.start([[number % 500 for number in range(length)]], NUM_TOKENS * (ROUNDS + 3))
        for length in (8000, 600)
    )
    with torch.inference_mode():
        runs = [decoding(one.greedy, one.prefill(1000).argmax(-1)) for one in (far, near)]
    ours, theirs = (torch.inference_mode()(one) for one in runs)
    found = compare(ours, theirs, ROUNDS)
    what = f"{NUM_TOKENS} tokens behind 8,000, sliding layers"
    record(benchmark, what, "behind 600", 1.05, found)
