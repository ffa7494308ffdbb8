"""Embeddings by layer stay in the mapped file: of a large table the pages that are used are held.

The system may map up to two megabytes around a row; they are the file's own and can be given back.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MAKE_CHECKPOINT = Path(__file__).resolve().parents[2] / "tools" / "make_checkpoint.py"
ROWS, LAYERS, WIDTH = 65_536, 4, 512
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

loaded = load(sys.argv[1], device="cpu")
model = loaded.model
with torch.inference_mode():
    model(torch.full((1, 8), 7))  # head, kernels and activations, and a single row
before = held()
ids = torch.randint(65536, (1, 8), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    model(ids)
after = held()
table = model.model.embed_tokens_per_layer.weight
table.float().sum()
print(before, after, table.nbytes, held())
"""


@pytest.mark.slow
def test_a_table_by_layer_costs_the_rows_that_are_read(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("what is resident is read from Linux's /proc")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    made = tmp_path / "model"
    subprocess.run([sys.executable, MAKE_CHECKPOINT, tmp_path, made], check=True)
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, made], check=True, capture_output=True, text=True
    )
    before, after, table_bytes, whole = map(int, ran.stdout.split())
    assert table_bytes == TABLE_BYTES
    assert after - before < TABLE_BYTES / 8, f"{after - before:,} bytes for the rows of 8 tokens"
    assert whole - after > TABLE_BYTES / 2, "a table that is read whole is seen"
