"""The catalogue as mutants: every fault that applies is caught, or its survival is explained."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from parity_tests.conftest import CheckpointMaker
from portkit.cli import app
from portkit.loading import load
from portkit.parity.faults.catalogue import CATALOGUE, NAMED
from portkit.parity.faults.needs import NEEDS
from portkit.parity.faults.observing import candidates
from portkit.parity.faults.recipe import Cookbook
from portkit.parity.faults.scene import Facts, Scenes
from portkit.parity.judging.local import Trace, recorder
from portkit.parity.probes.probing import default_probe, quick_probe, thorough_probe
from portkit.parity.reference import Reference, load_reference
from portkit.parity.sides.sites import watching
from portkit.parity.subject.discovery import sites_of
from portkit.parity.teeth.kill import Fate, kill_matrix

FAMILIES = ["llama3", "llama tied with biases", "qwen3 yarn sliding", "gemma3 shallow"]
DTYPES = [torch.float32, torch.bfloat16]
LOW_ONLY = {
    "rope.angles_in_low_precision",
    "rope.frequencies_rounded",
    "rope.tables_in_float32",
    "precision.norm_not_upcast",
    "precision.final_norm_not_upcast",
    "precision.rotation_upcast",
    "precision.mlp_product_upcast",
}
"""In float32 these are the right arithmetic."""


def matrix(
    make: CheckpointMaker,
    name: str,
    dtype: torch.dtype,
    kernel: str = "sdpa",
    gate: str = "exact",
    choose: object = default_probe,
) -> dict[str, Fate]:
    folder = make(name, dtype)
    loaded, reference = load(folder, attention=kernel), load_reference(folder, dtype, kernel)
    assert callable(choose)
    fates = kill_matrix(reference, sites_of(loaded.model), choose(loaded.model), gate).fates()
    assert [one.fault for one in fates] == list(CATALOGUE)
    return {one.fault.id: one for one in fates}


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_probe_catches_every_fault_that_applies(
    name: str, dtype: torch.dtype, kernel: str, tiny_checkpoint: CheckpointMaker
) -> None:
    fates = matrix(tiny_checkpoint, name, dtype, kernel)
    survived = {one.fault.id: one.survived for one in fates.values() if one.survived}
    assert survived == {}
    killed = {one.fault.id for one in fates.values() if one.killed}
    assert len(killed) >= 45
    low = {one for one in LOW_ONLY if fates[one].killed}
    assert low == (LOW_ONLY if dtype == torch.bfloat16 else set())
    eager_only = {
        "attention.softmax_in_dtype",
        "precision.scores_upcast",
        "precision.softmax_weights_upcast",
    }
    assert (eager_only <= killed) == (kernel == "eager" and dtype == torch.bfloat16)


def test_where_and_in_which_pass_a_fault_is_caught_first(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    fates = matrix(tiny_checkpoint, "gemma3 shallow", torch.bfloat16)
    layer = "model.layers.0"
    for name, site, one in (
        ("norm.offset_missing", f"{layer}.input_layernorm", "short"),
        ("attention.window_plus_one", f"{layer}.self_attn#mask", "long"),
        ("attention.window_everywhere", "model.layers.2.self_attn#mask", "long"),
        ("attention.padding_ignored", f"{layer}.self_attn#mask", "padded"),
        ("cache.keys_before_rotation", f"{layer}.self_attn#key", "decode.1"),
        ("cache.overwritten_early", f"{layer}.self_attn#mask", "decode.3"),
        ("loader.k_v_swapped", f"{layer}.self_attn.k_proj.weight (parameter)", "as loaded"),
        ("mlp.gelu_exact", f"{layer}.mlp.down_proj:in", "short"),
        ("head.last_layer_missing", "model.norm:in", "short"),
    ):
        found = fates[name]
        assert (found.first_site, found.first_pass) == (site, one), name
    missing = fates["norm.offset_missing"]
    assert missing.killed_by == "values"
    assert missing.margin is not None
    assert 0.3 < missing.margin < 1.5  # weights around 0.4: the 1 is most of the factor
    assert fates["cache.overwritten_early"].killed_by == "shape"
    assert fates["norm.epsilon_outside_root"].killed_by == "function"  # bfloat16 hides it
    assert not fates["rope.scaling_ignored"].applies


def test_a_small_probe_says_what_it_cannot_see(tiny_checkpoint: CheckpointMaker) -> None:
    fates = matrix(tiny_checkpoint, "gemma3 shallow", torch.bfloat16, choose=quick_probe)
    survived = {one.fault.id: one.survived or "" for one in fates.values() if one.survived}
    assert set(survived) == {
        "attention.window_plus_one",
        "attention.window_minus_one",
        "attention.window_ignored",
        "attention.window_everywhere",
        "attention.window_pattern_shifted",
        "attention.padding_ignored",
        "cache.overwritten_early",
        "cache.overwritten_late",
        "cache.padded_positions",
    }
    assert all(
        one.startswith("beyond this probe: it has no pass with") for one in survived.values()
    )
    assert "more tokens than the window" in survived["attention.window_ignored"]


def test_the_rounding_gate_lets_care_below_the_floor_through(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    fates = matrix(tiny_checkpoint, "qwen3 yarn sliding", torch.bfloat16, gate="rounding")
    survived = {one.fault.id: one.survived or "" for one in fates.values() if one.survived}
    assert set(survived) <= {
        "norm.weight_before_cast",
        "precision.norm_not_upcast",
        "precision.final_norm_not_upcast",
        "precision.rotation_upcast",
        "precision.residual_upcast",
        "precision.mlp_product_upcast",
    }
    assert "norm.weight_before_cast" in survived
    assert all(one.startswith("below the floor: 0.") for one in survived.values())
    assert fates["norm.epsilon"].killed_by == "function"
    assert fates["rope.angles_in_low_precision"].killed_by == "care"
    assert (fates["rope.angles_in_low_precision"].margin or 0) > 10


@pytest.mark.parametrize(
    ("name", "kernel"), [("llama linear", "sdpa"), ("gemma3 shallow", "eager")]
)
def test_what_does_not_apply_changes_nothing_in_the_thorough_probe(
    name: str, kernel: str, tiny_checkpoint: CheckpointMaker
) -> None:
    by_default, thorough = (
        matrix(tiny_checkpoint, name, torch.bfloat16, kernel, choose=one)
        for one in (default_probe, thorough_probe)
    )
    assert {k for k, v in by_default.items() if v.applies} == {
        k for k, v in thorough.items() if v.applies
    }


def test_a_softmax_in_low_precision_is_more_than_a_bit_by_chance(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    """Torch's own, of bfloat16, is float32 within: which bits differ is the rows' length's luck."""
    fates = matrix(tiny_checkpoint, "gemma3 shallow", torch.bfloat16, "eager", choose=quick_probe)
    margin = fates["attention.softmax_in_dtype"].margin
    assert margin is not None
    assert 1e-3 < margin < 1e-2  # steps of bfloat16 are 1/256


def _run(reference: Reference, probe: object) -> list[torch.Tensor]:
    caches: dict[str, object] = {}
    return [reference.run(one, caches) for one in probe]  # type: ignore[attr-defined]


def test_mutants_leave_the_reference_as_it_was_and_run_none_of_it_again(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    folder = tiny_checkpoint("gemma3 shallow", torch.bfloat16)
    loaded, reference = load(folder), load_reference(folder, torch.bfloat16)
    table, probe = sites_of(loaded.model), default_probe(loaded.model)
    before = _run(reference, probe)
    parameters = {k: v.clone() for k, v in reference.model.named_parameters()}
    calls: dict[str, int] = {}
    handles = [
        module.register_forward_hook(
            lambda *_, name=name: calls.__setitem__(name, calls.get(name, 0) + 1)
        )
        for name, module in reference.module_sites().items()
        if name and not name.startswith("model.rotary")
    ]
    kill_matrix(reference, table, probe)
    for handle in handles:
        handle.remove()
    assert set(calls.values()) == {len(probe)}  # the matrix costs no forward of its own
    after = _run(reference, probe)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(v, parameters[k]) for k, v in reference.model.named_parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_has_a_recipe_that_gives_its_bits(
    name: str, dtype: torch.dtype, tiny_checkpoint: CheckpointMaker
) -> None:
    """In every layer and in every pass; of matrices without a bias their parameters tell all."""
    folder = tiny_checkpoint(name, dtype)
    loaded, reference = load(folder), load_reference(folder, dtype)
    table, probe = sites_of(loaded.model), default_probe(loaded.model)
    facts = Facts(reference, table)
    book, scenes, caches = Cookbook(facts, candidates), Scenes(facts, probe), dict[str, object]()
    num_checked = 0
    for one in probe:
        trace: Trace = {}
        with torch.no_grad(), watching(reference, table, recorder(trace)):
            reference.run(one, caches)
        scene = scenes.of(one, trace)
        for site in trace:
            recipe = book.recipe(scene, site)
            if recipe is None:
                assert site.endswith("_proj") or site == "lm_head", site
                continue
            made = recipe.run(scene, site)
            assert made is not None
            real = one.real if made.shape[:2] == one.real.shape else ...
            assert torch.equal(made[real], trace[site].expand_as(made)[real]), (one.name, site)
            num_checked += 1
    assert num_checked > 300


def test_the_catalogue_is_told_in_words() -> None:
    assert len(NAMED) == len(CATALOGUE) >= 100
    for one in CATALOGUE:
        assert one.group in {
            "loader", "rope", "attention", "norm", "mlp", "experts", "embedding", "head",
            "residual", "cache", "precision", "altup", "laurel", "per_layer",
        }  # fmt: skip
        assert one.says[0].islower()
        assert not one.says.endswith(".")
        assert one.mend
        assert set(one.needs) <= set(NEEDS)


def test_the_command_prints_one_object(tiny_checkpoint: CheckpointMaker) -> None:
    folder = str(tiny_checkpoint("llama linear", torch.float32))
    done = CliRunner().invoke(app, ["faults", folder, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["command"], found["gate"], found["probe"]) == ("faults", "exact", "default")
    assert found["applicable"] == found["killed"] >= 50
    assert found["survived"] == []
    config = {one["field"]: (one["seen"], one["by"]) for one in found["config"]}
    assert config["hidden_size"][1].startswith("held by loading: model.embed_tokens.weight")
    assert config["rms_norm_eps"] == (True, "model.layers.0.input_layernorm, float32, in short")
    assert config["rope_parameters.factor"] == (True, "model#cos, float32, in short")
    assert config["max_position_embeddings"][0] is None
    by_name = {one["name"]: one for one in found["faults"]}
    assert set(by_name) == set(NAMED)
    norm = by_name["norm.epsilon"]
    assert norm["first_site"] == "model.layers.0.input_layernorm"
    assert (norm["killed_by"], norm["pass"], norm["dtype"]) == ("values", "short", "float32")
    # What float32 cannot show is asked in bfloat16 beside it.
    assert by_name["precision.norm_not_upcast"]["dtype"] == "bfloat16"

    done = CliRunner().invoke(app, ["faults", folder, "--quick"])
    assert done.exit_code == 3
    assert "survived: attention.padding_ignored (beyond this probe" in done.stdout
