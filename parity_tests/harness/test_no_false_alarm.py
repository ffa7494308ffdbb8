"""No false alarm: right ports, run after run, are never called anything else."""

from __future__ import annotations

import random

import pytest
import torch

from parity_tests.checkpoints import TINY
from parity_tests.conftest import CheckpointMaker
from portkit.loading import load
from portkit.parity.comparing import compare
from portkit.parity.judging.judge import Verdict
from portkit.parity.probes.probing import default_probe, quick_probe, thorough_probe
from portkit.parity.reference import load_reference
from portkit.parity.result import Comparison
from portkit.parity.sides.port import PortSide
from portkit.parity.subject.discovery import sites_between

NUM_RUNS = 200
PROBES = [quick_probe, default_probe, thorough_probe]


def clean(
    maker: CheckpointMaker, name: str, dtype: torch.dtype, kernel: str, seed: int
) -> Comparison:
    folder = maker(name, dtype)
    loaded = load(folder, attention=kernel)
    reference = load_reference(folder, dtype, kernel)
    probe = PROBES[seed % len(PROBES)](loaded.model, seed)
    table = sites_between(PortSide(loaded.model), reference)
    return compare(PortSide(loaded.model, probe.longest), reference, table, probe)


def check(found: Comparison, threads: int) -> None:
    allowed = {Verdict.exact} if threads == 1 else {Verdict.exact, Verdict.rounding}
    assert {one.verdict for one in found.judgements} <= allowed, found.culprits[:3]
    assert found.not_verified == ()
    asked = [one.function_error for one in found.judgements if one.function_error is not None]
    assert asked
    assert max(asked) <= 1e-13


@pytest.mark.parametrize("name", ["llama wide heads", "qwen3", "gemma3"])
def test_a_few_clean_runs(name: str, tiny_checkpoint: CheckpointMaker) -> None:
    for seed, (dtype, kernel) in enumerate([(torch.bfloat16, "eager"), (torch.float32, "sdpa")]):
        check(clean(tiny_checkpoint, name, dtype, kernel, seed), threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("run", range(NUM_RUNS))
def test_two_hundred_clean_runs(run: int, tiny_checkpoint: CheckpointMaker) -> None:
    draw = random.Random(run)
    name, dtype = draw.choice([*TINY]), draw.choice([torch.float32, torch.bfloat16])
    kernel, threads = draw.choice(["sdpa", "eager"]), draw.choice([1, 1, 2])
    torch.set_num_threads(threads)
    check(clean(tiny_checkpoint, name, dtype, kernel, run), threads)
