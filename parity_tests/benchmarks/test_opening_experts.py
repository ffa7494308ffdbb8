"""Opening thousands of expert tensors, against the reference that stacks them: time, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from parity_tests.benchmarks.conftest import MAKE_CHECKPOINT, Compare
from parity_tests.benchmarks.test_opening import process, record, say

NUM_EXPERT_TENSORS = 8 * 128 * 3
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 4093,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
}
# Of anonymous memory the most that was held at a time, looked at while it is opened.
PEAK_OF_OPENING = """
import sys, threading, time
from pathlib import Path

def anonymous_bytes():
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * next(int(l.split()[1]) for l in rollup.splitlines() if l.startswith("Anonymous:"))

if sys.argv[2] == "portkit":
    from portkit.loading import load
    open_it = lambda: load(sys.argv[1], device="cpu")
else:
    import torch
    from transformers import AutoModelForCausalLM
    open_it = lambda: AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)

before, peak, done = anonymous_bytes(), 0, threading.Event()

def look():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous_bytes())
        time.sleep(0.002)

looking = threading.Thread(target=look)
looking.start()
opened = open_it()
peak = max(peak, anonymous_bytes())
done.set()
looking.join()
print(peak - before)
"""


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """0.8 GB of bfloat16, most of it experts, each in tensors of its own."""
    folder = tmp_path_factory.mktemp("experts")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    subprocess.run([sys.executable, MAKE_CHECKPOINT, folder, folder / "model"], check=True)
    yield folder / "model"
    (folder / "model" / "model.safetensors").unlink()


def test_opening_experts(benchmark: BenchmarkFixture, compare: Compare, experts: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from portkit.loading import load

    disable_progress_bar()
    loaded = load(experts, device="cpu")
    of_experts = [c for c in loaded.plan.claims if ".experts." in c.parameter]
    assert sum(len(claim.sources) for claim in of_experts) == NUM_EXPERT_TENSORS
    assert 0.8e9 < loaded.report.bytes < 0.9e9

    def theirs() -> Any:
        return AutoModelForCausalLM.from_pretrained(experts, local_files_only=True)

    found = compare(lambda: load(experts, device="cpu"), theirs, 7)
    record(benchmark, "open 3,072 expert tensors", "`from_pretrained`", 0.5, found)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="asks Linux for its pages")
def test_opening_experts_copies_nothing(benchmark: BenchmarkFixture, experts: Path) -> None:
    open_it = process("-c", PEAK_OF_OPENING, experts, "portkit")
    peak_bytes = int(benchmark.pedantic(open_it, rounds=1))
    theirs_peak_bytes = int(process("-c", PEAK_OF_OPENING, experts, "transformers")())
    file_bytes = (experts / "model.safetensors").stat().st_size
    benchmark.extra_info.update(
        peak_bytes=peak_bytes, theirs_peak_bytes=theirs_peak_bytes, file_bytes=file_bytes
    )
    say(f"peak of anonymous memory: {peak_bytes:,} against {theirs_peak_bytes:,} bytes")
    assert peak_bytes < 0.1 * file_bytes
    assert peak_bytes < 0.5 * theirs_peak_bytes
