"""What the harness must say of ports whose mistakes are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from parity_tests.checkpoints import COMPUTED
from parity_tests.conftest import CheckpointMaker
from parity_tests.faults.planted.planting import replace_forward
from portkit.loading import LoadedModel, load
from portkit.parity.comparing import compare
from portkit.parity.judging.judge import Verdict
from portkit.parity.probes.probing import default_probe
from portkit.parity.reference import load_reference
from portkit.parity.result import Comparison
from portkit.parity.sides.port import PortSide
from portkit.parity.subject.discovery import sites_between


def run(loaded: LoadedModel, attention: str = "sdpa") -> Comparison:
    dtype = next(loaded.model.parameters()).dtype
    reference = load_reference(loaded.files.origin, dtype, attention)
    probe = default_probe(loaded.model)
    table = sites_between(PortSide(loaded.model), reference)
    return compare(PortSide(loaded.model, probe.longest), reference, table, probe)


@pytest.mark.parametrize(("dtype", "kernel"), COMPUTED)
@pytest.mark.parametrize(
    "name",
    [
        "llama tied with biases",
        "qwen3 yarn sliding",
        "qwen3 moe sliding",
        "llama4 scout",
        "gemma3 shallow",
    ],
)
def test_our_families_are_exact_at_every_site(
    name: str, dtype: torch.dtype, kernel: str, tiny_checkpoint: CheckpointMaker
) -> None:
    result = run(load(tiny_checkpoint(name, dtype), attention=kernel), kernel)
    assert result.verdict is Verdict.exact, result.culprits[:3]
    assert result.num_exact == len(result.judgements)
    assert result.not_verified == ()
    asked = [one for one in result.judgements if one.function_error is not None]
    assert len(asked) > 50
    assert max(one.function_error or 0.0 for one in asked) <= 1e-13


def test_two_faults_in_different_layers_are_both_listed(tiny_checkpoint: CheckpointMaker) -> None:
    loaded = load(tiny_checkpoint("gemma3 shallow", torch.bfloat16))
    loaded.model.model.layers[1].post_feedforward_layernorm.eps = 1e-3
    loaded.model.model.layers[3].self_attn.attend.scale *= 1.01
    result = run(loaded)
    assert [one.site for one in result.culprits] == [
        "model.layers.1.post_feedforward_layernorm",
        "model.layers.3.self_attn#context",
    ]


def test_rounding_is_told_from_divergence(tiny_checkpoint: CheckpointMaker) -> None:
    """The port in eager against the reference in sdpa; and a fused norm in bfloat16."""
    folder = tiny_checkpoint("llama linear", torch.bfloat16)
    result = run(load(folder, attention="eager"), "sdpa")
    assert result.verdict is Verdict.rounding
    assert {one.site.split("#")[-1] for one in result.judgements if one.verdict != "exact"} == {
        "context"
    }

    loaded = load(folder)
    norm = loaded.model.model.layers[1].input_layernorm

    def fused(_: object, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)

    replace_forward(norm, fused)
    result = run(loaded)
    assert result.verdict is Verdict.rounding
    assert [one.site for one in result.judgements if one.verdict is Verdict.rounding] == [
        "model.layers.1.input_layernorm"
    ]


def test_a_changed_parameter_is_found_before_anything_runs(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    loaded = load(tiny_checkpoint("llama linear", torch.float32))
    with torch.no_grad():
        loaded.model.get_parameter("model.layers.2.mlp.up_proj.weight")[0, 0] += 1e-6
    first = run(loaded).culprits[0]
    assert first.site == "model.layers.2.mlp.up_proj.weight (parameter)"
    assert (first.kind, first.passes) == ("function", ("as loaded",))


def test_a_key_that_was_wrong_in_an_earlier_pass_is_told_of_there(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    """Wrong in the prompt alone; the decode steps only inherit what the cache holds."""
    loaded = load(tiny_checkpoint("gemma3 shallow", torch.bfloat16))
    attention: Any = loaded.model.get_submodule("model.layers.2.self_attn")

    def wrong_in_prompts(own: Any, h: Tensor, cos: Tensor, *rest: Any) -> Tensor:
        given: Tensor = own(h, cos * 1.01 if h.shape[1] > 5 else cos, *rest)
        return given

    replace_forward(attention, wrong_in_prompts)
    result = run(loaded)
    keys = next(one for one in result.culprits if one.site.endswith("#key"))
    assert set(keys.passes) == {"short", "long", "prompt", "chunk", "chunk.1", "padded", "far"}
    # (What was planted takes cosine and sine by place alone: to the harness they are missing.)
    assert {one.site for one in result.culprits if one.kind != "missing"} == {
        "model.layers.2.self_attn#query",
        "model.layers.2.self_attn#key",
    }
    carried = result.accounts["model.layers.2.self_attn#key"].carried
    assert "decode.1" in carried


def test_the_worst_values_are_told_with_their_places(tiny_checkpoint: CheckpointMaker) -> None:
    loaded = load(tiny_checkpoint("gemma3 shallow"))
    norm: Any = loaded.model.get_submodule("model.layers.1.self_attn.q_norm")

    def nudged(own: Any, x: Tensor) -> Tensor:
        given: Tensor = own(x).clone()
        if given.shape[0] == 2 and given.shape[2] > 20:  # the padded prompt: row, head, token
            given[1, 3, 7, 5] += 2.0
            given[0, 0, 0, 0] += 9.0  # padding
        return given

    replace_forward(norm, nudged)
    first = run(loaded).culprits[0]
    assert (first.site, first.passes) == ("model.layers.1.self_attn.q_norm", ("padded",))
    (record,) = run(loaded).accounts[first.site].unequal
    assert record.num_unequal == 1
    (worst,) = record.worst
    assert (worst.row, worst.position, worst.place) == (1, 7, "head 3, channel 5")
    assert worst.port - worst.reference == pytest.approx(2.0, abs=1e-6)
    assert record.max_difference == pytest.approx(2.0, abs=1e-6)
