"""`portkit parity DIR` of families whose blocks are wired unlike the first ones': all is exact.

Streams, shared keys and tables that are smaller than the vocabulary pass through every part of the
proof, the known mistakes included.
"""

from __future__ import annotations

import json

import pytest
import torch

from parity_tests.conftest import CheckpointMaker
from portkit.cli import main


@pytest.mark.parametrize("name", ["cohere2 with biases", "gemma3n plain", "smollm3 sliding"])
def test_a_quick_proof_is_exact(
    name: str, tiny_checkpoint: CheckpointMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint(name, torch.bfloat16)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["parity", str(folder), "--quick", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0
    assert told["verdict"] == "exact"
    assert told["exact"] == told["sites"] > 100
    assert told["culprits"] == []
