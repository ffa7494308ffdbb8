"""A proof that found a fault, for the tests of what is reported of it."""

from __future__ import annotations

import pytest
import torch

from parity_tests.conftest import CheckpointMaker
from portkit.loading import load
from portkit.parity import report
from portkit.parity.comparing import compare
from portkit.parity.probing import quick_probe
from portkit.parity.reference import load_reference
from portkit.parity.result import NotVerified, ParityResult
from portkit.parity.schema import as_fields
from portkit.parity.sites import PortSide, SiteTable

CULPRIT = "model.layers.3.self_attn#context"


def asked(result: ParityResult, repo: str = "a/model") -> report.Asked:
    around = {"versions": {"torch": "2.x"}, "gate": "exact", "device": "cpu", "threads": 1}
    return report.Asked(repo, f"portkit parity {repo}", {**around, **as_fields(result)})


@pytest.fixture(scope="session")
def diverged(tiny_checkpoint: CheckpointMaker) -> ParityResult:
    """Layer 3's kernel scaled, in bfloat16; something else was meant to be seen and was not."""
    torch.set_num_threads(1)
    folder = tiny_checkpoint("gemma3 shallow", torch.bfloat16)
    loaded = load(folder)
    loaded.model.model.layers[3].self_attn.attend.scale *= 1.01
    probe = quick_probe(loaded.model)
    table = SiteTable(loaded.architecture.sites)
    reference = load_reference(folder, torch.bfloat16, "sdpa")
    found = compare(PortSide(loaded.model, probe.longest), reference, table, probe)
    left_out = NotVerified("left padding", "no row of it"), NotVerified("far", "none", True)
    return ParityResult((found,), None, left_out, ("a note",))
