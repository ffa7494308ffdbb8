"""Weights are views of a file, which may begin at any byte: single rows round as the reference's.

The reference stacks an expert's matrices in memory of its own, and takes a stack as it lies in the
file; torch's product of a single float32 row depends on where the matrix begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parity_tests.checkpoints import qwen3_moe, save_tiny
from portkit.loading import load
from portkit.parity.reference import load_reference

NUM_EXPERTS = 5


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As newer tools save a layer's experts."""
    block, found = "model.layers.0.mlp.experts", dict(tensors)
    gate, up, down = (
        [found.pop(f"{block}.{i}.{part}_proj.weight") for i in range(NUM_EXPERTS)]
        for part in ("gate", "up", "down")
    )
    both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    return found | {
        f"{block}.gate_up_proj": torch.stack(both),
        f"{block}.down_proj": torch.stack(down),
    }


@pytest.mark.parametrize("form", ["one by one", "stacked"])
def test_where_a_file_has_its_weights_decides_no_bit(form: str, tmp_path: Path) -> None:
    tiny = qwen3_moe(num_hidden_layers=1, num_experts=NUM_EXPERTS)
    save_tiny(tiny, tmp_path, torch.float32)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    tensors = {name: one.clone() for name, one in tensors.items()}
    written = stacked(tensors) if form == "stacked" else tensors
    begin, ids = set(), torch.tensor([[7], [300], [41]])
    for pad in ("", "x" * 8):
        save_file(written, file, metadata={"format": "pt", "pad": pad})
        begin.add((8 + int.from_bytes(file.read_bytes()[:8], "little")) % 16)
        ours, theirs = load(tmp_path).model, load_reference(tmp_path, torch.float32)
        for one in ids:
            model: Any = theirs.model
            with torch.no_grad():
                expected = model(one[None]).logits
                found = ours(one[None])
            assert torch.equal(found, expected)
    assert begin == {0, 8}
