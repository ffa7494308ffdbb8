"""How long it takes to open a checkpoint, against the reference and against torch alone.

`make bench` runs these. The targets are ratios of medians that are measured in one run; figures in
the documentation are written there by tools/write_benchmarks.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from parity_tests.benchmarks.conftest import Compare, Comparison

IN_THE_REFERENCE = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""
MEMORY_OF_OPENING = """
import sys
from pathlib import Path
from portkit.loading import load

def anonymous_bytes():
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * next(int(l.split()[1]) for l in rollup.splitlines() if l.startswith("Anonymous:"))

before = anonymous_bytes()
loaded = load(sys.argv[1], device="cpu")
print(anonymous_bytes() - before)
"""


def process(*arguments: str | Path) -> Callable[[], str]:
    """What runs Python anew with these arguments and returns what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def run() -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    return run


def record(
    benchmark: BenchmarkFixture, what: str, against: str, target: float, found: Comparison
) -> None:
    benchmark.extra_info.update(
        what=what, against=against, target=target, ratio=found.ratio, **vars(found)
    )
    say(f"{what}: {found.ours_s:.3f} s, {against} {found.theirs_s:.3f} s: {found.ratio:.2f}")
    assert found.ratio <= target


def say(line: str) -> None:
    print("\n" + line)  # noqa: T201, seen with -s


def test_opening_at_the_stored_dtype(
    benchmark: BenchmarkFixture, compare: Compare, released_size: Path
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from portkit.loading import load

    disable_progress_bar()

    def theirs() -> Any:
        return AutoModelForCausalLM.from_pretrained(released_size, local_files_only=True)

    found = compare(lambda: load(released_size, device="cpu"), theirs, 15)
    record(benchmark, "open in a running process", "`from_pretrained`", 0.5, found)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="asks Linux for its pages")
def test_opening_copies_nothing(benchmark: BenchmarkFixture, released_size: Path) -> None:
    open_it = process("-c", MEMORY_OF_OPENING, released_size)
    added_bytes = int(benchmark.pedantic(open_it, rounds=1))
    file_bytes = (released_size / "model.safetensors").stat().st_size
    benchmark.extra_info.update(added_bytes=added_bytes, file_bytes=file_bytes, target=0.05)
    say(f"added to anonymous memory: {added_bytes:,} of {file_bytes:,} bytes")
    assert added_bytes < 0.05 * file_bytes


def test_portkit_load_as_a_process(
    benchmark: BenchmarkFixture, compare: Compare, released_size: Path
) -> None:
    ours = process("-m", "portkit", "load", released_size)
    found = compare(ours, process("-c", IN_THE_REFERENCE, released_size), 5)
    record(benchmark, "`portkit load DIR`", "the same in Transformers", 0.6, found)


def test_portkit_help_as_a_process(benchmark: BenchmarkFixture, compare: Compare) -> None:
    ours = process("-m", "portkit", "--help")
    found = compare(ours, process("-c", "import torch"), 7)
    record(benchmark, "`portkit --help`", '`python -c "import torch"`', 0.4, found)
