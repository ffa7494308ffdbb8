"""What the harness must say of ports whose mistakes are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parity_tests.conftest import CheckpointMaker
from parity_tests.harness.faulty import FAULTS, replace_forward
from portkit.loading import LoadedModel, load
from portkit.parity.compare import ParityResult, compare
from portkit.parity.judge import Verdict
from portkit.parity.probe import Probe, default_probe
from portkit.parity.reference import load_reference

DTYPES = [torch.float32, torch.bfloat16]


def quick(loaded: LoadedModel) -> Probe:
    """Enough of the default probe to cross the window, token by token and in one chunk."""
    passes = {one.name: one for one in default_probe(loaded.model)}
    decoding = [name for name in passes if name.startswith("decode")][:5]
    return tuple(passes[name] for name in ("prompt", *decoding, "chunk.1", "chunk.2"))


def run(loaded: LoadedModel, attention: str = "sdpa") -> ParityResult:
    dtype = next(loaded.model.parameters()).dtype
    reference = load_reference(loaded.files.origin, dtype, attention)
    return compare(loaded, reference, quick(loaded))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama tied with biases", "qwen3 yarn sliding", "gemma3 shallow"])
def test_our_families_are_exact_at_every_site(
    name: str, dtype: torch.dtype, kernel: str, tiny_checkpoint: CheckpointMaker
) -> None:
    result = run(load(tiny_checkpoint(name, dtype), attention=kernel), kernel)
    assert result.verdict is Verdict.exact, result.culprits[:3]
    assert result.num_exact == len(result.judgements)
    asked = [one for one in result.judgements if one.function_error is not None]
    assert len(asked) > 50
    assert max(one.function_error or 0.0 for one in asked) <= 1e-13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_placed_and_its_kind_named(
    name: str, dtype: torch.dtype, tiny_checkpoint: CheckpointMaker
) -> None:
    fault = FAULTS[name]
    if dtype == torch.float32 and not fault.wrong_in_float32:
        pytest.skip("in float32 this is the right arithmetic")
    loaded = load(tiny_checkpoint("gemma3 shallow", dtype))
    fault.plant(loaded.model)
    result = run(loaded)
    assert result.verdict is Verdict.diverged
    first = result.culprits[0]
    assert (first.site, first.kind) == (fault.site, fault.kind)
    if "window" not in name:  # which is wrong in every sliding layer
        block = ".".join(fault.site.split(".")[:3])
        assert all(one.site.startswith(block) for one in result.culprits), result.culprits


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
