"""What a model by intent another one loses: the figures are its own, at the place where it does."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from parity_tests.conftest import CheckpointMaker
from portkit.loading import load
from portkit.parity.decoding.approximate import loss
from portkit.parity.subject.discovery import sites_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma3", "qwen3 moe"])
def test_an_error_is_told_of_where_it_is_made(
    name: str, dtype: torch.dtype, tiny_checkpoint: CheckpointMaker
) -> None:
    loaded = load(tiny_checkpoint(name, dtype))
    other = copy.deepcopy(loaded.model)
    with torch.no_grad():
        weight = other.get_parameter("model.layers.1.self_attn.o_proj.weight")
        weight.mul_(1.5)
    ids = torch.arange(3, 33)[None]
    with torch.no_grad():
        logits = tuple(one(ids)[0] for one in (loaded.model, other))
    logits[1][3, 7] = logits[1][3].max() + 1  # whatever the fault does to a choice
    found = loss(loaded.model, other, logits, ids, sites_of(loaded.model))
    assert found.sites == {"model.layers.1.self_attn.o_proj": pytest.approx(0.5, rel=1e-2)}
    assert set(found.blocks) == {"model.layers.1"}, "later layers are given the right input"
    assert 0 < found.blocks["model.layers.1"] < 0.5
    assert found.worst_block == "model.layers.1"
    assert found.num_tokens == 30
    theirs, ours = (one.double().softmax(-1) for one in logits)
    expected = max(
        sum(p * math.log(p / q) for p, q in zip(*rows, strict=True))
        for rows in zip(theirs.tolist(), ours.tolist(), strict=True)
    )
    assert found.divergence == pytest.approx(expected)
    assert found.num_lost == int((theirs.argmax(-1) != ours.argmax(-1)).sum()) > 0
