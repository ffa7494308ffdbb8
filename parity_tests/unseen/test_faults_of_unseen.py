"""The kill matrix on the reference alone: of families that have no port of ours."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from parity_tests.unseen.conftest import UnseenMaker
from portkit.cli import app

# What must be found of each, and kinds of sites of which it is known that nothing is known.
EXPECTED = {
    "gpt2": (
        {"norm.epsilon", "norm.mean_kept", "attention.scale_missing", "attention.causal_plus_one"},
        {"transformer.h.*.mlp.act", "transformer.wpe"},
    ),
    "mamba": (
        {"norm.epsilon", "loader.tie_ignored", "residual.missing"},
        {"backbone.layers.*.mixer.x_proj:in", "backbone.layers.*.mixer.out_proj:in"},
    ),
    "phi3": (
        {"rope.theta", "attention.window_plus_one", "norm.epsilon", "cache.position_by_one"},
        {"model.layers.*.mlp.activation_fn"},
    ),
    "mixtral": (
        {"experts.order", "experts.softmax_over_chosen", "rope.theta", "cache.position_by_one"},
        {"model.layers.*.mlp.experts.act_fn"},
    ),
}
OTHERS = ("bloom", "gemma2", "deepseek_v3", "olmo2", "qwen3_next", "falcon_h1", "gpt_oss", "lfm2")
FAST = ("gpt2", "mamba")


@pytest.mark.parametrize(
    "name", [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in EXPECTED]
)
def test_recipes_apply_where_they_fit(name: str, unseen_checkpoint: UnseenMaker) -> None:
    caught, unknown = EXPECTED[name]
    answer = CliRunner().invoke(app, ["faults", str(unseen_checkpoint(name)), "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["killed"] == found["applicable"]
    assert caught <= {one["name"] for one in found["faults"] if one["killed_by"]}
    assert unknown <= set(found["without_recipe"])
    assert len(found["without_recipe"]) < found["kinds_of_sites"] / 3
    assert found["config"] == []
    assert [one["name"] for one in found["not_asked"]] == ["config"]


def test_the_count_of_kinds_without_a_recipe_is_told(unseen_checkpoint: UnseenMaker) -> None:
    answer = CliRunner().invoke(app, ["faults", str(unseen_checkpoint("mamba")), "--quick"])
    assert "; 2 of 19 kinds of sites have no recipe" in answer.stdout
    assert "not asked: fields of the config" in answer.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_whatever_a_family_is_made_of(name: str, unseen_checkpoint: UnseenMaker) -> None:
    answer = CliRunner().invoke(app, ["faults", str(unseen_checkpoint(name)), "--json"])
    found = json.loads(answer.stdout)
    assert found["applicable"] > 5, answer.output
    assert found["kinds_of_sites"] > len(found["without_recipe"])
