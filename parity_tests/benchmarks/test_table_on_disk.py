"""Embeddings by layer stay in the mapped file: of a large table the pages that are used are held.

The system may map up to two megabytes around a row; they are the file's own and can be given back.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from parity_tests.benchmarks.conftest import MAKE_CHECKPOINT
from parity_tests.benchmarks.test_opening import process, say

ROWS, LAYERS, WIDTH = 65_536, 4, 512
NUM_TOKENS = 8
CONFIG = {
    "model_type": "gemma3n_text",
    "vocab_size": ROWS,
    "vocab_size_per_layer_input": ROWS,
    "hidden_size": 128,
    "hidden_size_per_layer_input": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_kv_shared_layers": 0,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "laurel_rank": 16,
}
TABLE_BYTES = ROWS * LAYERS * WIDTH * 2
MEASURE = """
import re, sys, torch
from portkit.loading import load

def held():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

model = load(sys.argv[1], device="cpu").model
rows, num_tokens = int(sys.argv[2]), int(sys.argv[3])
with torch.inference_mode():
    model(torch.full((1, num_tokens), 7))  # head, kernels and activations, and a single row
before = held()
ids = torch.randint(rows, (1, num_tokens), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    model(ids)
after = held()
table = model.model.embed_tokens_per_layer.weight
table.float().sum()
print(before, after, table.nbytes, held())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what is resident")
def test_a_table_by_layer_costs_the_rows_that_are_read(
    benchmark: BenchmarkFixture, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    made = tmp_path / "model"
    subprocess.run([sys.executable, MAKE_CHECKPOINT, tmp_path, made], check=True)
    said = benchmark.pedantic(process("-c", MEASURE, made, str(ROWS), str(NUM_TOKENS)), rounds=1)
    before, after, table_bytes, whole = map(int, said.split())
    read_bytes = after - before
    benchmark.extra_info.update(
        table_bytes=table_bytes, read_bytes=read_bytes, num_tokens=NUM_TOKENS
    )
    say(f"{NUM_TOKENS} tokens of a table of {table_bytes:,} bytes: {read_bytes:,} resident")
    assert table_bytes == TABLE_BYTES
    assert read_bytes < TABLE_BYTES / 8
    assert whole - after > TABLE_BYTES / 2, "a table that is read whole is seen"
