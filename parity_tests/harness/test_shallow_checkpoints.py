"""A checkpoint with any subset of a family's layers ends in a verdict, and the right one.

Of a right port all is exact; nothing is asked for that the model does not have, and so nothing is
left unverified; and a mistake is found and named in a single layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from parity_tests.checkpoints import save_tiny
from parity_tests.harness.conftest import Run
from parity_tests.shallow import SHALLOW
from portkit.architecture import CausalLM
from portkit.loading import load
from portkit.nn.rope import RotaryEmbedding
from portkit.parity.comparing import compare
from portkit.parity.faults.catalogue import CATALOGUE
from portkit.parity.faults.fault import Place
from portkit.parity.faults.observing import candidates
from portkit.parity.faults.recipe import Cookbook
from portkit.parity.faults.scene import Facts, Scenes, representatives
from portkit.parity.judging.local import Trace, recorder
from portkit.parity.judging.precision import casts_lifted
from portkit.parity.probes.probing import quick_probe
from portkit.parity.reference import load_reference
from portkit.parity.sides.port import PortSide
from portkit.parity.sides.sites import watching
from portkit.parity.subject.discovery import sites_of
from portkit.parity.teeth.sensitivity import NO_ANGLE, UNREAD

DTYPES = [torch.float32, torch.bfloat16]
ALWAYS = {
    "gemma3: only sliding",
    "cohere2: a window beyond the context",
    "llama: a context of 1",
    "mistral: a context of 2",
    "qwen3 moe: one expert",
}
"""What the default tests take, a few seconds each."""
UNDECIDED = {"qwen3 moe: one expert": {"config: norm_topk_prob"}}
"""Fields that decide nothing in such a model, for a reason that no rule knows: the weight of an
only expert is one, whether or not it is divided by its sum."""
RunJson = Callable[..., tuple[int, dict[str, Any]]]
Maker = Callable[[str, torch.dtype], Path]


def marked(names: set[str]) -> list[Any]:
    """All shallow checkpoints; those that are not `names` are slow."""
    slow = pytest.mark.slow
    return [one if one in names else pytest.param(one, marks=slow) for one in SHALLOW]


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(name: str, dtype: torch.dtype) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp("shallow")
            save_tiny(SHALLOW[name], made[name, dtype], dtype)
        return made[name, dtype]

    return make


@pytest.fixture
def run_json(run: Run) -> RunJson:
    """The exit code, and the object that a command prints."""

    def call(*arguments: object) -> tuple[int, dict[str, Any]]:
        code, out, error = run(*arguments, "--json")
        assert out, error
        return code, json.loads(out)

    return call


@pytest.mark.parametrize("name", marked(ALWAYS))
def test_a_right_port_is_exact_and_nothing_is_left_unseen(
    name: str, shallow: Maker, run_json: RunJson
) -> None:
    code, told = run_json("parity", shallow(name, torch.float32))
    assert told["verdict"] == "exact"
    assert told["exact"] == told["sites"] > 30
    assert told["culprits"] == []
    assert {one["name"] for one in told["not_verified"]} == UNDECIDED.get(name, set())
    assert told["generation"]["equal"]
    assert told["faults"]["survived"] == []
    assert told["faults"]["killed"] == told["faults"]["applicable"] > 30
    config = told["faults"]["config"]
    unseen = {f"config: {one['field']}" for one in config if one["seen"] is False}
    assert unseen == UNDECIDED.get(name, set())
    assert code == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHALLOW)
def test_gradients_and_decoding_end_in_a_verdict(
    name: str, dtype: torch.dtype, shallow: Maker, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no compiler
    refused = 2 if SHALLOW[name].config["max_position_embeddings"] == 1 else 0
    for options in (("--backward", "--quick", "--faults", "off"), ("--decode",)):
        code, out, error = run("parity", shallow(name, dtype), *options)
        assert code == refused, out
        assert not refused or error.startswith("portkit: error: a context of 1 token has no ")
    code, out, _ = run("faults", shallow(name, dtype))
    assert code == 0, out
    assert "survived" not in out


@pytest.mark.parametrize("name", marked({"gemma3: only full", "llama4: only dense"}))
def test_every_hypothesis_can_be_tried_wherever_it_applies(name: str, shallow: Maker) -> None:
    """The kill matrix tries the first form of a fault; the diagnosis of a culprit tries all."""
    folder, tried = shallow(name, torch.bfloat16), 0
    loaded, reference = load(folder), load_reference(folder, torch.bfloat16)
    table, probe = sites_of(loaded.model), quick_probe(loaded.model)
    facts = Facts(reference, table)
    book, scenes, caches = Cookbook(facts, candidates), Scenes(facts, probe), dict[str, Any]()
    for one in probe:
        trace: Trace = {}
        with torch.no_grad(), watching(reference, table, recorder(trace)):
            reference.run(one, caches)
        scene = scenes.of(one, trace)
        for site in representatives(facts, trace):
            recipe = book.recipe(scene, site)
            for fault in CATALOGUE if recipe is not None else ():
                for edited in islice(fault.edit(recipe, Place(site, book, scene)), 20):
                    tried += 1
                    edited.run(scene, site)
                    with casts_lifted():
                        edited.run(scene.in_float64(), site)
    assert tried > 200


def other_base(model: CausalLM) -> None:
    """Rotate by another base than the config's, which many files have."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, RotaryEmbedding):
            other = type(module)(model.config.head_dim, replace(module.rope, rope_theta=150000.0))
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, other)


def other_epsilon(model: CausalLM) -> None:
    model.get_submodule("model.layers.0.input_layernorm").eps = 1e-3  # type: ignore[assignment]


ONE_LAYER = ["llama: one layer", "gemma3: only full", "cohere2: only sliding", "llama4: one expert"]


@pytest.mark.parametrize("name", ONE_LAYER)
@pytest.mark.parametrize(
    ("plant", "fault"), [(other_base, "rope.theta"), (other_epsilon, "norm.epsilon")]
)
def test_a_mistake_in_the_only_layer_is_named(
    name: str, plant: Callable[[CausalLM], None], fault: str, shallow: Maker
) -> None:
    folder = shallow(name, torch.float32)
    loaded, reference = load(folder), load_reference(folder, torch.float32)
    plant(loaded.model)
    probe = quick_probe(loaded.model)
    side, table = PortSide(loaded.model, probe.longest), sites_of(loaded.model)
    found = compare(side, reference, table, probe)
    assert found.verdict == "diverged"
    assert {one.name for one in found.causes.values()} == {fault}


def test_a_field_that_decides_nothing_here_says_why(shallow: Maker, run_json: RunJson) -> None:
    said = {
        ("mistral: a window beyond the context", "sliding_window"): (
            "no layer sees fewer than the 16 tokens of the context by either"
        ),
        ("llama: heads of two channels", "rope_parameters.rope_theta"): NO_ANGLE,
        ("cohere2: only full", "sliding_window"): UNREAD,
        ("llama4: rotating, and full", "attention_chunk_size"): UNREAD,
    }
    for (name, field), why in said.items():
        _, told = run_json("faults", shallow(name, torch.float32))
        (found,) = [one for one in told["config"] if one["field"] == field]
        assert (found["seen"], found["by"]) == (None, why), name
        assert told["survived"] == []
