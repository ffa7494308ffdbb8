"""The loss in chunks is the loss at once: value and gradients, plain and capped heads, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.training.conftest import CONFIG
from portkit.architecture import CausalLM
from portkit.training import objective
from portkit.training.beginnings import build
from portkit.training.objective import IGNORED, Objective

CPU = torch.device("cpu")
VOCABULARY = 509


def model(**changed: Any) -> CausalLM:
    config = CONFIG | {"vocab_size": VOCABULARY, "initializer_range": 0.2} | changed
    return build(config, 0, CPU)


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (3, 21), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[1, 4:9] = IGNORED
    return ids[:, :-1], targets


def gradients(of: CausalLM, loss: Tensor) -> dict[str, Tensor]:
    of.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 59, 60])
@pytest.mark.parametrize(
    "changed", [{}, {"final_logit_softcapping": 3.0}, {"tie_word_embeddings": False}]
)
def test_chunks_change_nothing_but_rounding(
    changed: dict[str, Any], chunk: int, in_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = model(**changed)
    inputs, targets = batch()
    whole = Objective(trained, in_bfloat16)(inputs, targets)
    expected = gradients(trained, whole)
    assert expected.keys() == dict(trained.named_parameters()).keys()
    monkeypatch.setitem(objective._CHUNK_LOGITS, "cpu", chunk * VOCABULARY)
    chunked = Objective(trained, in_bfloat16)(inputs, targets)
    found = gradients(trained, chunked)
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
    for name, gradient in found.items():
        distance = (gradient - expected[name]).norm() / expected[name].norm()
        assert distance < (5e-3 if in_bfloat16 else 2e-6), name
    with torch.no_grad():
        torch.testing.assert_close(Objective(trained, in_bfloat16)(inputs, targets), chunked)


def test_it_is_cross_entropy() -> None:
    trained = model()
    inputs, targets = batch()
    expected = F.cross_entropy(
        trained(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert torch.equal(Objective(trained, bfloat16=False)(inputs, targets), expected)


class Largest(TorchDispatchMode):
    """Remembers the most rows of logits that one operation made."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] == VOCABULARY:
            self.rows = max(self.rows, out.numel() // VOCABULARY)
        return out


def test_no_tensor_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = model(hidden_size=24)
    inputs, targets = batch()
    monkeypatch.setitem(objective._CHUNK_LOGITS, "cpu", 7 * VOCABULARY)
    with Largest() as largest:
        Objective(trained, bfloat16=False)(inputs, targets).backward()
    # The head's own transposed view has as many rows as the hidden size.
    assert largest.rows <= 24
    monkeypatch.undo()
    with Largest() as largest:
        Objective(trained, bfloat16=False)(inputs, targets).backward()
    assert largest.rows == inputs.numel()


def test_float32_master_weights_under_autocast() -> None:
    trained = model()
    inputs, targets = batch()
    found = gradients(trained, Objective(trained, bfloat16=True)(inputs, targets))
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    exact = gradients(trained, Objective(trained, bfloat16=False)(inputs, targets))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert not torch.equal(found[name], exact[name])
