"""The gradient of every parameter equal to the reference's, in every bit, under its own name.

Equal logits do not say so: a detached branch, or a backward written by hand, has the right output.
That it is bitwise takes the reference's order of operations in a place where the forward pass does
not care: which half of a head the rotation takes first decides how the gradient behind it lies
in memory, and that decides the order of the sum that is a query norm's gradient.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity_tests.checkpoints import TINY
from parity_tests.conftest import CheckpointMaker
from portkit.architecture import CausalLM
from portkit.loading import load
from portkit.parity.reference import by_name, load_reference
from portkit.training.objective import Objective

MAKE_CHECKPOINT = Path(__file__).resolve().parents[2] / "tools" / "make_checkpoint.py"
DTYPES = [torch.float32, torch.bfloat16]
COMPUTED = [(torch.float32, "sdpa"), (torch.bfloat16, "sdpa"), (torch.bfloat16, "eager")]
TOKENS = 41
"""Longer than the windows of the tiny checkpoints."""
RELEASED = {
    "google__gemma-3-270m-it": 6,
    "Qwen__Qwen3-0.6B": 2,
    "meta-llama__Llama-3.2-1B-Instruct": 1,
}


def token_ids(vocab_size: int, rows: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))


def trainable(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def sides(folder: Path, dtype: torch.dtype, kernel: str) -> tuple[CausalLM, nn.Module]:
    ours = load(folder, dtype=str(dtype).removeprefix("torch."), attention=kernel).model
    theirs = load_reference(folder, dtype, kernel).model
    trainable(ours)
    return ours, trainable(theirs)


def gradients(
    model: nn.Module, logits: Callable[[Tensor], Tensor], ids: Tensor
) -> dict[str, Tensor]:
    """Of the mean next-token loss, which is taken in float32 on both sides."""
    loss = F.cross_entropy(logits(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def unequal(ours: CausalLM, theirs: nn.Module, ids: Tensor) -> list[str]:
    """Names of the parameters whose gradients differ, the last in the network first."""
    expected = gradients(theirs, lambda x: theirs(input_ids=x, use_cache=False).logits, ids)
    found = gradients(ours, ours, ids)
    assert sum(map(Tensor.numel, found.values())) == sum(map(Tensor.numel, expected.values()))
    assert all(bool(gradient.any()) for gradient in expected.values())
    expected = by_name(expected, found)
    assert found.keys() == expected.keys()
    return [name for name in reversed(found) if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize(("dtype", "kernel"), COMPUTED, ids=str)
@pytest.mark.parametrize("name", TINY)
def test_every_gradient_is_exact(
    name: str, dtype: torch.dtype, kernel: str, tiny_checkpoint: CheckpointMaker
) -> None:
    ours, theirs = sides(tiny_checkpoint(name, torch.float32), dtype, kernel)
    assert unequal(ours, theirs, token_ids(ours.config.vocab_size)) == []


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3"])
def test_so_is_a_step_of_adamw(name: str, tiny_checkpoint: CheckpointMaker) -> None:
    ours, theirs = sides(tiny_checkpoint(name, torch.float32), torch.float32, "sdpa")
    assert unequal(ours, theirs, token_ids(ours.config.vocab_size)) == []
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for model in (ours, theirs):
        torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True).step()
    expected = dict(theirs.named_parameters())
    for name_, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name_]), name_
        assert not torch.equal(parameter, before[name_]), name_


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", RELEASED)
def test_at_real_layer_sizes(
    config: str, dtype: torch.dtype, data_folder: Path, tmp_path: Path
) -> None:
    published = json.loads((data_folder / "configs" / config / "config.json").read_text())
    # The vocabulary is not a size of a layer, and its gradient would take gigabytes.
    smaller = {**published, "vocab_size": 4093}
    (tmp_path / "config.json").write_text(json.dumps(smaller))
    command = [MAKE_CHECKPOINT, tmp_path, tmp_path / "model", "--dtype", "float32"]
    layers = ["--layers", str(RELEASED[config])]
    subprocess.run([sys.executable, *command, *layers], check=True)
    ours, theirs = sides(tmp_path / "model", dtype, "sdpa")
    window = published.get("sliding_window") or 128
    assert unequal(ours, theirs, token_ids(4093, 2, min(window, 512) + 9)) == []


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_a_detached_branch_is_found(name: str, tiny_checkpoint: CheckpointMaker) -> None:
    """The gate's gradient is lost and every value is as before: it is the gate that has none."""
    ours, theirs = sides(tiny_checkpoint(name, torch.float32), torch.float32, "sdpa")
    mlp: Any = ours.get_submodule("model.layers.1.mlp")
    activation = mlp.act
    mlp.act = lambda x: activation(x).detach()
    with pytest.raises(AssertionError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight"):
        unequal(ours, theirs, token_ids(ours.config.vocab_size))


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_a_wrong_scale_in_the_backward_pass_is_placed(
    name: str, tiny_checkpoint: CheckpointMaker
) -> None:
    """Half of a projection's gradient is lost; what follows it in the network is still equal."""
    ours, theirs = sides(tiny_checkpoint(name, torch.float32), torch.float32, "sdpa")
    ids = token_ids(ours.config.vocab_size)
    with torch.no_grad():
        before = ours(ids)
        projection = ours.get_submodule("model.layers.1.self_attn.o_proj")
        projection.register_forward_hook(lambda _, __, out: out * 0.5 + (out * 0.5).detach())
        assert torch.equal(ours(ids), before)
    wrong = unequal(ours, theirs, ids)
    assert "model.layers.1.self_attn.o_proj.weight" in wrong
    layers = [int(one.split(".")[2]) for one in wrong if ".layers." in one]
    assert max(layers) == 1
    assert not [one for one in wrong if ".layers.1.mlp." in one]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3 scaled"])
def test_the_training_objective_has_the_references_gradient(
    name: str, dtype: torch.dtype, tiny_checkpoint: CheckpointMaker
) -> None:
    """In one chunk, a sum where the reference has a mean: rounding apart, a factor."""
    ours, theirs = sides(tiny_checkpoint(name, torch.float32), dtype, "sdpa")
    ids = token_ids(ours.config.vocab_size)
    expected = gradients(theirs, lambda x: theirs(input_ids=x, use_cache=False).logits, ids)
    count = ids[:, 1:].numel()
    (Objective(ours, bfloat16=False)(ids[:, :-1], ids[:, 1:]) / count).backward()
    for name_, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected[name_]), name_
