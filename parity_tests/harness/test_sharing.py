"""Equal weights are held once; what differs by one bit stays apart, and is still found."""

from __future__ import annotations

import pytest
import torch

from parity_tests.conftest import CheckpointMaker
from portkit.loading import load
from portkit.parity.comparing import compare
from portkit.parity.judging.judge import Verdict
from portkit.parity.probes.probing import quick_probe
from portkit.parity.reference import load_reference
from portkit.parity.sides.port import PortSide
from portkit.parity.sides.sharing import share_parameters
from portkit.parity.sides.sites import parameters_of
from portkit.parity.subject.discovery import sites_between

MATRIX = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gemma3 shallow", "qwen3 moe"])
def test_equal_weights_lie_in_one_place(
    tiny_checkpoint: CheckpointMaker, name: str, dtype: torch.dtype
) -> None:
    folder = tiny_checkpoint(name, dtype)
    port = PortSide(load(folder).model, 8)
    reference = load_reference(folder, dtype)
    held = {key: one.clone() for key, one in parameters_of(reference).items()}
    share_parameters(port, reference)
    ours = parameters_of(port)
    theirs = parameters_of(reference)
    for key, own in theirs.items():
        assert torch.equal(own, held[key])
        if key in ours:
            assert own.data_ptr() == ours[key].data_ptr()
    shared = {key for key in theirs if key in ours}
    assert len(shared) > 10
    assert all("experts" in key for key in set(theirs) - shared)


def test_a_weight_that_differs_in_one_bit_stays_apart_and_is_found(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    folder = tiny_checkpoint("gemma3 shallow", torch.bfloat16)
    loaded = load(folder)
    wrong = loaded.model.get_parameter(MATRIX).detach().clone()
    wrong.view(torch.int16)[2, 3] ^= 1
    loaded.model.get_parameter(MATRIX).data = wrong
    probe = quick_probe(loaded.model)
    port = PortSide(loaded.model, probe.longest)
    reference = load_reference(folder, torch.bfloat16)
    before = reference.parameters([MATRIX])[MATRIX].clone()
    share_parameters(port, reference)
    after = reference.parameters([MATRIX])[MATRIX]
    assert after.data_ptr() != wrong.data_ptr()
    assert torch.equal(after, before)
    found = compare(port, reference, sites_between(PortSide(loaded.model), reference), probe)
    first = next(one for one in found.judgements if one.verdict is not Verdict.exact)
    assert first.site == f"{MATRIX} (parameter)"
    assert found.accounts[first.site].unequal[0].num_unequal == 1


def test_a_weight_of_the_same_values_laid_out_otherwise_stays_apart(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    folder = tiny_checkpoint("gemma3 shallow", torch.float32)
    model = load(folder).model
    turned = model.get_parameter(MATRIX).detach().T.contiguous().T
    model.get_parameter(MATRIX).data = turned
    reference = load_reference(folder, torch.float32)
    share_parameters(PortSide(model, 8), reference)
    after = reference.parameters([MATRIX])[MATRIX]
    assert after.data_ptr() != turned.data_ptr()
    assert after.is_contiguous()
