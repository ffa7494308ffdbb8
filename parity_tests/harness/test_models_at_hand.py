"""A model at hand in the checkpoint's place: nothing is read from a file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import portkit.parity
from portkit.errors import PortError
from portkit.parity.judging.judge import Verdict

VOCABULARY = 101


@pytest.fixture(scope="module")
def model() -> Any:
    """A family that portkit has not ported, with norms that are not one."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=48, n_embd=36, n_layer=2, n_head=3
    )
    made = transformers.GPT2LMHeadModel(config)
    for name, parameter in made.named_parameters():
        if "ln_" in name or parameter.dim() == 1:
            parameter.data.normal_(0.4, 0.4)
    return made.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_against_itself(model: Any, dtype: torch.dtype) -> None:
    mine = copy.deepcopy(model).to(dtype)
    result = portkit.parity.compare(mine, copy.deepcopy(mine))
    assert (result.verdict, result.culprits) == (Verdict.exact, ())
    sites = {one.site for one in result.comparisons[0].judgements}
    run = {name for name, _ in model.named_modules() if name and not name.endswith(".h")}
    within = {name for name in run if not name.endswith("attn_dropout")}  # the kernel's own
    assert within <= sites
    assert {"transformer.h.1.attn#query", "#logits"} <= sites


def test_an_adapter_is_seen_where_it_was_merged(model: Any) -> None:
    merged = copy.deepcopy(model)
    with torch.no_grad():
        weight = merged.transformer.h[1].mlp.c_fc.weight
        weight += 1e-4 * torch.outer(torch.ones(36), torch.linspace(-1, 1, 144))
    result = portkit.parity.compare(merged, model, probe="quick")
    assert result.verdict is Verdict.diverged
    assert result.first is not None
    assert result.first.site == "transformer.h.1.mlp.c_fc"
    assert len(result.culprits) == 1


def test_callables_go_by_their_logits(model: Any) -> None:
    def logits_of(each: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(input_ids: Tensor) -> Tensor:
            logits: Tensor = each(input_ids).logits
            return logits

        return call

    same = portkit.parity.compare(logits_of(model), logits_of(model), probe="quick")
    assert same.verdict is Verdict.exact
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.wte.weight[3] += 0.5
    found = portkit.parity.compare(logits_of(other), logits_of(model), probe=[5, 3, 7])
    assert found.verdict is not Verdict.exact
    assert not found.holds


def test_what_cannot_stand_beside_a_model(model: Any) -> None:
    with pytest.raises(PortError, match="give the port that is held against the model"):
        portkit.parity.compare(None, model)
    with pytest.raises(PortError, match="give a model or a callable, and no name"):
        portkit.parity.compare("parity_tests.harness.test_models_at_hand:model", model)
