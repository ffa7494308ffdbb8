"""The catalogue on models whose layers are wired in ways of their own.

Several streams and shared keys, a parallel block, layers without positions, one window for all:
each place is computed in every bit, what such a model can get wrong applies to it, and nothing that
applies gets past.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from parity_tests.conftest import CheckpointMaker
from portkit.loading import load
from portkit.parity.faults.catalogue import CATALOGUE
from portkit.parity.faults.observing import candidates
from portkit.parity.faults.recipe import Cookbook, reproduces
from portkit.parity.faults.scene import Facts, Scenes
from portkit.parity.judging.local import Trace, recorder
from portkit.parity.probes.probing import default_probe
from portkit.parity.reference import load_reference
from portkit.parity.sides.sites import watching
from portkit.parity.subject.discovery import sites_of
from portkit.parity.teeth.kill import kill_matrix

STREAMS = {
    one.id
    for one in CATALOGUE
    if one.group in {"altup", "laurel", "per_layer"} and one.id != "altup.coefs_clipped"
} | {
    "attention.shared_from_wrong_layer",
    "attention.keys_not_shared",
    "attention.v_norm_missing",
    "mlp.sparsity_missing",
    "mlp.sparsity_everywhere",
    "mlp.sparsity_cut",
}
PARALLEL = {
    "residual.sequential",
    "norm.mean_kept",
    "head.logit_scale_missing",
    "head.logit_scale_inverted",
    "rope.not_interleaved",
    "precision.rotation_not_upcast",
}
UNPLACED = {"rope.applied_everywhere", "rope.shifted_by_a_layer"}
WINDOWED = {
    "attention.window_plus_one",
    "attention.window_minus_one",
    "attention.window_ignored",
    "cache.overwritten_early",
    "cache.overwritten_late",
}
APPLY = {
    "gemma3n": STREAMS | WINDOWED,  # its coefficients are too small to be clipped
    "cohere2": PARALLEL | UNPLACED | WINDOWED,
    "smollm3": UNPLACED,
    "mistral": WINDOWED,
}
OF_THESE = STREAMS | PARALLEL | UNPLACED | WINDOWED


@pytest.mark.parametrize("name", APPLY)
def test_what_such_a_model_can_get_wrong_is_caught(
    name: str, tiny_checkpoint: CheckpointMaker
) -> None:
    folder = tiny_checkpoint(name, torch.bfloat16)
    loaded: Any = load(folder)
    table, probe = sites_of(loaded.model), default_probe(loaded.model)
    found = kill_matrix(load_reference(folder, torch.bfloat16), table, probe).fates()
    assert [one.fault.id for one in found if one.survived] == []
    assert {one.fault.id for one in found if one.killed} & OF_THESE == APPLY[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["gemma3n plain", "cohere2 with biases", "smollm3 sliding", "llama4 crowded"]
)
def test_every_place_but_plain_matrices_is_computed_in_every_bit(
    name: str, dtype: torch.dtype, tiny_checkpoint: CheckpointMaker
) -> None:
    folder = tiny_checkpoint(name, dtype)
    loaded, reference = load(folder), load_reference(folder, dtype)
    table, probe = sites_of(loaded.model), default_probe(loaded.model)
    facts = Facts(reference, table)
    book, scenes, caches = Cookbook(facts, candidates), Scenes(facts, probe), dict[str, object]()
    for one in probe:
        trace: Trace = {}
        with torch.no_grad(), watching(reference, table, recorder(trace)):
            reference.run(one, caches)
        with torch.no_grad():  # and watched no more: a recipe runs the reference's kernels
            scene = scenes.of(one, trace)
            for site in trace:
                recipe = book.recipe(scene, site)
                if recipe is None:
                    assert isinstance(facts.modules.get(site.partition("@")[0]), nn.Linear), site
                else:
                    assert reproduces(recipe, scene, site), (one.name, site)
