"""Two sides timed in turn: what a benchmark states is how they compare, on whatever machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from portkit.envelope import versions

MAKE_CHECKPOINT = Path(__file__).resolve().parents[2] / "tools" / "make_checkpoint.py"


@dataclass(frozen=True)
class Comparison:
    """Medians of both sides in one run, in seconds."""

    ours_s: float
    theirs_s: float

    @property
    def ratio(self) -> float:
        return self.ours_s / self.theirs_s


Compare = Callable[[Callable[[], Any], Callable[[], Any], int], Comparison]


@pytest.fixture
def compare(benchmark: BenchmarkFixture) -> Compare:
    """`compare(ours, theirs, rounds)`: run both in turn, each once more before it counts."""

    def run(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> Comparison:
        times: list[float] = []

        def time_theirs() -> None:
            started = time.perf_counter()
            made = theirs()
            times.append(time.perf_counter() - started)
            del made  # here, since what ours makes is not freed within its time either

        benchmark.pedantic(ours, setup=time_theirs, rounds=rounds, warmup_rounds=1)
        return Comparison(benchmark.stats.stats.median, median(times[1:]))

    return run


@pytest.fixture(scope="package")
def released_size(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of random bfloat16 weights in the size of Gemma 3 270M."""
    folder = tmp_path_factory.mktemp("benchmark") / "gemma-3-270m"
    config = data_folder / "configs" / "google__gemma-3-270m-it"
    subprocess.run([sys.executable, MAKE_CHECKPOINT, config, folder], check=True)
    yield folder
    (folder / "model.safetensors").unlink()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """What a reader of the figures has to know."""
    machine_info["versions"] = versions()
    machine_info["usable_cores"] = len(os.sched_getaffinity(0))
