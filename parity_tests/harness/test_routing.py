"""Experts under the harness: another choice by rounding is not a wrong one, and a wrong one is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parity_tests.conftest import CheckpointMaker
from parity_tests.faults.planted.planting import replace_forward
from portkit.loading import LoadedModel, load
from portkit.nn.moe import Routing
from portkit.parity.comparing import compare
from portkit.parity.judging.judge import Verdict
from portkit.parity.probes.probing import default_probe
from portkit.parity.reference import Reference, load_reference
from portkit.parity.result import Comparison
from portkit.parity.sides.port import PortSide
from portkit.parity.subject.discovery import sites_between

DTYPES = [torch.float32, torch.bfloat16]
BLOCK = "model.layers.1.mlp"
NUM_CHOICES = 3


def sides(maker: CheckpointMaker, dtype: torch.dtype) -> tuple[LoadedModel, Reference]:
    folder = maker("qwen3 moe", dtype)
    return load(folder), load_reference(folder, dtype)


def held_against(loaded: LoadedModel, reference: Reference) -> Comparison:
    probe = default_probe(loaded.model)
    table = sites_between(PortSide(loaded.model), reference)
    return compare(PortSide(loaded.model, probe.longest), reference, table, probe)


def block(loaded: LoadedModel) -> Any:
    return loaded.model.get_submodule(BLOCK)


def softmax_routing(logits: Tensor, scores: Tensor | None = None) -> Routing:
    scores = F.softmax(logits, dim=-1, dtype=torch.float32) if scores is None else scores
    weights, experts = scores.topk(NUM_CHOICES, dim=-1)
    return Routing(logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), experts)


def test_a_choice_that_rounding_turned_is_rounding(tiny_checkpoint: CheckpointMaker) -> None:
    """Two experts that every token is in two minds about, and logits summed in another order."""
    dtype = torch.float32
    loaded, reference = sides(tiny_checkpoint, dtype)
    ours = block(loaded).gate
    theirs = reference.module_sites()[f"{BLOCK}.gate"].weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        near = torch.randn(ours.weight.shape[1], generator=generator) * torch.finfo(dtype).eps
        near = ours.weight[4] * (1 + near)
        for weight in (ours.weight, theirs):
            weight[7] = near
    order = torch.randperm(ours.weight.shape[1], generator=generator)

    def reordered(_: Any, x: Tensor) -> Routing:
        return softmax_routing(F.linear(x[:, order], ours.weight[:, order]))

    replace_forward(ours, reordered)
    result = held_against(loaded, reference)
    assert result.verdict is Verdict.rounding, result.culprits[:3]
    not_exact = {one.site for one in result.judgements if one.verdict is not Verdict.exact}
    # Of equal weights a choice that is put in place does not tell the order.
    assert not_exact - {f"{BLOCK}.experts"} == {f"{BLOCK}.gate", f"{BLOCK}#experts"}
    largest = max(one.max_difference for one in result.accounts[f"{BLOCK}#experts"].unequal)
    assert largest > 0.05, "no expert was exchanged"


def test_experts_that_rounding_further_up_exchanged_are_not_held_against_the_port(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    """Another attention kernel in bfloat16: a free run takes other experts, a taught one cannot."""
    folder = tiny_checkpoint("qwen3 moe", torch.bfloat16)
    loaded, reference = load(folder, attention="eager"), load_reference(folder, torch.bfloat16)
    result = held_against(loaded, reference)
    assert result.verdict is Verdict.rounding
    not_exact = {one.site for one in result.judgements if one.verdict is not Verdict.exact}
    assert {one.partition("#")[2] for one in not_exact} == {"context"}
    assert result.accounts["model.layers.2.mlp#experts"].carried
    assert not result.accounts["model.layers.2.mlp#experts"].unequal


SIGMOIDS = "model.layers.1.feed_forward"


def sigmoid_routing(logits: Tensor) -> Routing:
    chosen, experts = logits.topk(NUM_CHOICES, dim=-1)
    kept = torch.full_like(logits, -torch.inf).scatter(-1, experts, chosen)
    return Routing(logits, torch.sigmoid(kept.float()).to(logits).gather(-1, experts), experts)


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_router_of_sigmoids_is_judged_by_itself(
    is_wrong: bool, tiny_checkpoint: CheckpointMaker
) -> None:
    """Another choice by rounding is rounding, and its experts are not mistaken for wrong ones; by
    its own logits it is wrong, and that is told of the choice."""
    folder = tiny_checkpoint("llama4 crowded", torch.float32)
    loaded, reference = load(folder), load_reference(folder, torch.float32)
    ours: Any = loaded.model.get_submodule(f"{SIGMOIDS}.router")
    theirs = reference.module_sites()[f"{SIGMOIDS}.router"].weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noise = torch.randn(ours.weight.shape[1], generator=generator)
        near = ours.weight[2] * (1 + noise * torch.finfo(torch.float32).eps)
        for weight in (ours.weight, theirs):
            weight[5] = near
    order = torch.randperm(ours.weight.shape[1], generator=generator)

    def reordered(_: Any, x: Tensor) -> Routing:
        return sigmoid_routing(F.linear(x[:, order], ours.weight[:, order]))

    def shifted(_: Any, x: Tensor) -> Routing:
        logits = F.linear(x, ours.weight)
        return Routing(logits, *sigmoid_routing(logits.roll(1, -1))[1:])

    replace_forward(ours, shifted if is_wrong else reordered)
    result = held_against(loaded, reference)
    not_exact = {one.site for one in result.judgements if one.verdict is not Verdict.exact}
    choice = f"{SIGMOIDS}#experts"
    assert not_exact == {choice} | (set() if is_wrong else {f"{SIGMOIDS}.router"})
    largest = max(one.max_difference for one in result.accounts[choice].unequal)
    assert largest > 0.05, "no expert was exchanged"
    if is_wrong:
        assert [(one.site, one.kind) for one in result.culprits] == [(choice, "function")]
    else:
        assert result.verdict is Verdict.rounding, result.culprits[:3]


def _not_normalised(mlp: Any) -> None:
    def forward(_: Any, x: Tensor) -> Routing:
        logits = F.linear(x, mlp.gate.weight)
        weights, experts = F.softmax(logits, dim=-1, dtype=torch.float32).topk(NUM_CHOICES)
        return Routing(logits, weights.to(x.dtype), experts)

    replace_forward(mlp.gate, forward)


def _sigmoid(mlp: Any) -> None:
    def forward(_: Any, x: Tensor) -> Routing:
        logits = F.linear(x, mlp.gate.weight)
        return softmax_routing(logits, logits.float().sigmoid())

    replace_forward(mlp.gate, forward)


def _one_expert_too_few(mlp: Any) -> None:
    mlp.gate.num_choices -= 1


def _softmax_in_low_precision(mlp: Any) -> None:
    def forward(_: Any, x: Tensor) -> Routing:
        logits = F.linear(x, mlp.gate.weight)
        return softmax_routing(logits, F.softmax(logits, dim=-1))

    replace_forward(mlp.gate, forward)


def _weights_on_the_input(mlp: Any) -> None:
    def forward(_: Any, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        outputs = x.new_empty(*experts.shape, x.shape[1])
        for expert in range(len(mlp.experts.gate_proj)):
            tokens, choices = torch.where(experts == expert)
            scaled = x[tokens] * weights[tokens, choices, None]
            outputs[tokens, choices] = mlp.experts._run(expert, scaled)
        return outputs.sum(1)

    replace_forward(mlp.experts, forward)


def _two_experts_exchanged(mlp: Any) -> None:
    for matrices in (mlp.experts.gate_proj, mlp.experts.up_proj, mlp.experts.down_proj):
        matrices[2], matrices[5] = matrices[5], matrices[2]


def _activation_of_the_other_half(mlp: Any) -> None:
    experts = mlp.experts
    experts.gate_proj, experts.up_proj = experts.up_proj, experts.gate_proj


def _a_block_that_adds(mlp: Any) -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        routing = mlp.gate(tokens)
        return mlp.experts(tokens, routing.weights, routing.experts).view(x.shape) + x

    replace_forward(mlp, forward)


WRONG: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "weights that do not sum to one": (_not_normalised, f"{BLOCK}#experts", "function"),
    "a sigmoid": (_sigmoid, f"{BLOCK}#experts", "function"),
    "an expert too few": (_one_expert_too_few, f"{BLOCK}#experts", "function"),
    "a softmax in low precision": (_softmax_in_low_precision, f"{BLOCK}#experts", "care"),
    "weights on the input": (_weights_on_the_input, f"{BLOCK}.experts", "function"),
    "a residual within": (_a_block_that_adds, BLOCK, "glue"),
}
EXCHANGED = {
    "two experts": _two_experts_exchanged,
    "gate and up": _activation_of_the_other_half,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_choice_or_use_of_experts_is_placed(
    name: str, dtype: torch.dtype, tiny_checkpoint: CheckpointMaker
) -> None:
    plant, site, kind = WRONG[name]
    if kind == "care" and dtype == torch.float32:
        pytest.skip("in float32 this is the right arithmetic")
    loaded, reference = sides(tiny_checkpoint, dtype)
    plant(block(loaded))
    result = held_against(loaded, reference)
    assert [(one.site, one.kind) for one in result.culprits] == [(site, kind)]


@pytest.mark.parametrize("name", EXCHANGED)
def test_exchanged_experts_are_found_before_anything_runs(
    name: str, tiny_checkpoint: CheckpointMaker
) -> None:
    loaded, reference = sides(tiny_checkpoint, torch.float32)
    EXCHANGED[name](block(loaded))
    culprits = [one.site for one in held_against(loaded, reference).culprits]
    assert culprits[0].startswith(f"{BLOCK}.experts.gate_proj.")
    assert culprits[0].endswith("(parameter)")
    assert f"{BLOCK}.experts" in culprits
