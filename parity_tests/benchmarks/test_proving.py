"""What a proof costs: against the bare forward passes that it cannot do without, and in memory.

The bare passes are those of the default probe: the port and the reference in the dtype, the
reference with its other kernel for the floor, both sides in float64, and the port once more for
local errors; without a hook on any of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from parity_tests.benchmarks.conftest import Comparison
from parity_tests.benchmarks.test_opening import record, say
from portkit.loading import load, materialize
from portkit.parity import comparing
from portkit.parity.judging.precision import held_in_float64
from portkit.parity.logits import run_all
from portkit.parity.probes.probe import Probe
from portkit.parity.probes.probing import default_probe
from portkit.parity.prove import prove
from portkit.parity.question import Question
from portkit.parity.reference import load_reference
from portkit.parity.sides import making
from portkit.parity.sides.port import PortSide
from portkit.parity.sides.sites import Side

MEMORY_OF_PROVING = """
import re, sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from portkit.parity.question import Question
from portkit.parity.prove import prove
from portkit.parity import comparing
from portkit.parity.judging import truth
import torch

def peak_bytes():  # getrusage's would begin with the peak of whoever started us
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
largest = 0
judge = truth.Truth.judge

def judged(self, recordings):
    global largest
    for one in recordings:
        held = {t.data_ptr(): t.nbytes for t in one.trace.values()}
        largest = max(largest, sum(held.values()))
    return judge(self, recordings)

truth.Truth.judge = judged
before = peak_bytes()
assert prove(Question(sys.argv[1])).verdict == "exact"
print(peak_bytes() - before, largest)
"""


def seconds(side: Side, probe: Probe) -> float:
    started = time.perf_counter()
    for _ in run_all(side, probe):
        pass
    return time.perf_counter() - started


def test_a_proof_against_its_bare_forwards(
    benchmark: BenchmarkFixture, released_size: Path
) -> None:
    torch.set_num_threads(1)
    model = load(released_size, device="cpu").model
    probe = default_probe(model)
    port, reference = PortSide(model, probe.longest), load_reference(released_size, torch.bfloat16)

    def bare() -> float:
        spent = 2 * seconds(port, probe) + seconds(reference, probe)
        with reference.other_kernel():
            spent += seconds(reference, probe)
        with held_in_float64(model, reference.model):
            return spent + seconds(port, probe) + seconds(reference, probe)

    verdict = benchmark.pedantic(lambda: prove(Question(released_size)).verdict, rounds=1)
    assert verdict == "exact"
    found = Comparison(benchmark.stats.stats.median, bare())
    record(benchmark, "`portkit parity` in a running process", "its bare passes", 1.6, found)


def test_the_kill_matrix_in_reference_forwards(
    benchmark: BenchmarkFixture, released_size: Path
) -> None:
    """What every applicable fault adds to a proof; a forward is the reference's, of the probe."""
    torch.set_num_threads(1)
    probe = default_probe(load(released_size, device="cpu").model)
    reference = load_reference(released_size, torch.bfloat16)
    added: list[float] = []

    def in_turn() -> None:
        spent = {}
        for faults in ("off", "full"):
            started = time.perf_counter()
            result = prove(Question(released_size, faults=faults))
            spent[faults] = time.perf_counter() - started
        assert result.teeth is not None
        assert result.teeth.survived == ()
        added.append(spent["full"] - spent["off"])

    benchmark.pedantic(in_turn, rounds=1)
    forward = seconds(reference, probe)
    found = Comparison(max(0.0, added[0]), forward)
    record(benchmark, "the full kill matrix", "a forward of the reference", 40, found)


def test_a_cause_within_a_proof(
    benchmark: BenchmarkFixture, released_size: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof that finds and names one fault, against one that finds it and asks no further."""
    torch.set_num_threads(1)

    def planted(*arguments: Any, **options: Any) -> Any:
        loaded = materialize(*arguments, **options)
        loaded.model.get_submodule("model.layers.3.input_layernorm").eps = 1e-5
        return loaded

    monkeypatch.setattr(making, "materialize", planted)
    spent = {}

    def in_turn() -> None:
        for names_it in (False, True):
            monkeypatch.setattr(comparing, "is_observed", lambda _, names_it=names_it: names_it)
            started = time.perf_counter()
            result = prove(Question(released_size, faults="off"))
            spent[names_it] = time.perf_counter() - started
            (cause,) = [one.causes for one in result.comparisons]
            assert [one.name for one in cause.values()] == ["norm.epsilon"] * names_it

    benchmark.pedantic(in_turn, rounds=1)
    found = Comparison(spent[True], spent[False])
    record(benchmark, "a proof that names a fault", "one that does not", 1.5, found)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for its peak")
def test_memory_of_a_proof(benchmark: BenchmarkFixture, released_size: Path) -> None:
    def measured() -> list[int]:
        command = [sys.executable, "-c", MEMORY_OF_PROVING, str(released_size)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return [int(word) for word in done.stdout.split()]

    grown, largest = benchmark.pedantic(measured, rounds=1)
    model = load(released_size, device="cpu").model
    layer = model.get_submodule("model.layers.0")
    float64_layer = 8 * sum(one.numel() for one in layer.parameters())
    head = 8 * 32_768 * model.config.hidden_size
    file_bytes = (released_size / "model.safetensors").stat().st_size
    target_bytes = int(2.5 * file_bytes) + largest + float64_layer + head
    benchmark.extra_info.update(proof_bytes=grown, proof_target_bytes=target_bytes)
    say(f"a proof adds {grown:,} bytes at its peak; the target is {target_bytes:,}")
    assert grown <= target_bytes
