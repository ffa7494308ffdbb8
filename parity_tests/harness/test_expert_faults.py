"""The catalogue on models that choose experts, attend within chunks, or have no positions.

What such models can get wrong applies to them, each where it should, and nothing that applies gets
past the default probe.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parity_tests.conftest import CheckpointMaker
from portkit.loading import load
from portkit.parity.probes.probing import default_probe
from portkit.parity.reference import load_reference
from portkit.parity.subject.discovery import sites_of
from portkit.parity.teeth.kill import Fate, kill_matrix

ANY = {
    "experts.normalised",
    "experts.one_too_many",
    "experts.not_weighed",
    "experts.order",
    "experts.gate_up_exchanged",
}
SOFTMAX = {"experts.softmax_over_chosen", "experts.sigmoid", "experts.weights_on_input"}
SIGMOID = {"experts.softmax", "experts.weights_on_output", "experts.shared_lost"}
CHUNKED = {
    "attention.chunk_as_window",
    "attention.chunk_plus_one",
    "attention.chunk_minus_one",
    "rope.applied_everywhere",
    "rope.tables_rounded",
    "rope.not_interleaved",
}
TEMPERED = {
    "attention.temperature_missing",
    "attention.temperature_floor",
    "attention.temperature_scale",
    "attention.temperature_everywhere",
}
SEVERAL = {"experts.one_too_few", "experts.summed_one_by_one"}
AFTER = {"attention.norm_after_rotation_missing", "attention.norm_before_rotation"}
APPLY = {
    # `norm_topk_prob` is set: what is normalised already cannot be once more, and a softmax over
    # the chosen is the same function.
    "qwen3 moe": (ANY | SOFTMAX | SEVERAL) - {"experts.normalised", "experts.softmax_over_chosen"},
    "qwen3 moe sliding": ANY | SOFTMAX,
    "llama4 scout": ANY | SIGMOID | CHUNKED | TEMPERED | AFTER,
    "llama4 maverick": ANY | SIGMOID | CHUNKED | TEMPERED,
    "llama4 crowded": (ANY | SIGMOID | CHUNKED | SEVERAL | AFTER),
}
OF_THESE = ANY.union(SOFTMAX, SIGMOID, CHUNKED, TEMPERED, SEVERAL, AFTER)
PLACES = {
    "experts.one_too_many": "#experts",
    "experts.weights_on_input": ".mlp.experts",
    "experts.shared_lost": ".feed_forward",
    "attention.chunk_as_window": "#mask",
    "attention.temperature_missing": "#query",
    "rope.tables_rounded": "#cos",
}


def fates(maker: CheckpointMaker, name: str, dtype: torch.dtype) -> tuple[Fate, ...]:
    folder = maker(name, dtype)
    loaded: Any = load(folder)
    table = sites_of(loaded.model)
    return kill_matrix(load_reference(folder, dtype), table, default_probe(loaded.model)).fates()


@pytest.mark.parametrize("name", APPLY)
def test_what_such_a_model_can_get_wrong_is_caught(
    name: str, tiny_checkpoint: CheckpointMaker
) -> None:
    found = fates(tiny_checkpoint, name, torch.bfloat16)
    assert [one.fault.id for one in found if one.survived] == []
    killed = {one.fault.id: one for one in found if one.killed}
    assert killed.keys() & OF_THESE >= APPLY[name] & OF_THESE
    assert killed.keys() & OF_THESE <= APPLY[name]
    assert ("experts.not_normalised" in killed) == (name == "qwen3 moe")
    for fault, place in PLACES.items():
        if fault in killed:
            assert place in str(killed[fault].first_site), killed[fault]


def test_a_layer_of_each_kind_is_tried(tiny_checkpoint: CheckpointMaker) -> None:
    """Of dense and sparse layers in turn the first sparse one, of those without positions too."""
    found = fates(tiny_checkpoint, "llama4 maverick", torch.bfloat16)
    first = {one.fault.id: one.first_site for one in found if one.killed}
    assert first["experts.order"] == "model.layers.1.feed_forward.experts"
    assert first["experts.weights_on_output"] == "model.layers.1.feed_forward.experts:in"
    assert first["experts.shared_lost"] == "model.layers.1.feed_forward"
    assert first["attention.temperature_missing"] == "model.layers.3.self_attn#query"
    assert first["attention.chunk_as_window"] == "model.layers.0.self_attn#mask"
