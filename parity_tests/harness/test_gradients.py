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

from parity_tests.checkpoints import COMPUTED, TINY, save_tiny_multimodal
from parity_tests.conftest import CheckpointMaker
from parity_tests.harness.test_parity_command import parity
from portkit.loading import LoadedModel, load
from portkit.nn.mlp import GatedMLP
from portkit.parity.gradients import GradientParity, compare_gradients
from portkit.parity.judging.judge import Verdict
from portkit.parity.reference import load_reference
from portkit.parity.sides.port import PortSide
from portkit.parity.subject.discovery import sites_between
from portkit.training.objective import Objective

MAKE_CHECKPOINT = Path(__file__).resolve().parents[2] / "tools" / "make_checkpoint.py"
DTYPES = [torch.float32, torch.bfloat16]
TOKENS = 41
"""Longer than the windows of the tiny checkpoints."""
RELEASED = {
    "google__gemma-3-270m-it": 6,
    "Qwen__Qwen3-0.6B": 2,
    "meta-llama__Llama-3.2-1B-Instruct": 1,
}


def token_ids(vocab_size: int, rows: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))


def opened(folder: Path, dtype: torch.dtype, kernel: str = "sdpa") -> LoadedModel:
    return load(folder, dtype=str(dtype).removeprefix("torch."), device="cpu", attention=kernel)


def run(
    loaded: LoadedModel, ids: Tensor, kernel: str = "sdpa", reference: str | None = None
) -> GradientParity:
    dtype = next(loaded.model.parameters()).dtype
    theirs = load_reference(loaded.files.origin, dtype, reference or kernel)
    port = PortSide(loaded.model, ids.shape[1])
    return compare_gradients(port, theirs, sites_between(PortSide(loaded.model), theirs), ids)


def is_exact(found: GradientParity) -> bool:
    assert len(found.judgements) > 10
    return found.num_exact == found.num_equal_after_step == len(found.judgements)


@pytest.mark.parametrize(("dtype", "kernel"), COMPUTED)
@pytest.mark.parametrize("name", TINY)
def test_every_gradient_is_exact(
    name: str, dtype: torch.dtype, kernel: str, tiny_checkpoint: CheckpointMaker
) -> None:
    loaded = opened(tiny_checkpoint(name, torch.float32), dtype, kernel)
    found = run(loaded, token_ids(loaded.config.vocab_size), kernel)
    assert is_exact(found), found.places
    assert found.verdict is Verdict.exact
    assert {one.site.removesuffix(" (gradient)") for one in found.judgements} == {
        name for name, _ in loaded.model.named_parameters()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gemma3 shallow", "smollm3", "cohere2"])
def test_what_is_padded_with_takes_no_gradient(
    name: str, dtype: torch.dtype, tiny_checkpoint: CheckpointMaker
) -> None:
    loaded = opened(tiny_checkpoint(name, torch.float32), dtype)
    ids = token_ids(loaded.config.vocab_size)
    ids[0, 4] = loaded.config.pad_token_id
    assert is_exact(run(loaded, ids))
    loaded.model.model.embed_tokens.padding_idx = None
    found = run(loaded, ids)
    assert found.places == ("model.embed_tokens.weight",)


def test_of_a_multimodal_checkpoint_the_language_models(tmp_path: Path) -> None:
    save_tiny_multimodal(tmp_path, torch.float32)
    loaded = opened(tmp_path, torch.float32)
    assert is_exact(run(loaded, token_ids(500)))


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
    window = published.get("sliding_window") or 128
    loaded = opened(tmp_path / "model", dtype)
    found = run(loaded, token_ids(4093, 2, min(window, 512) + 9))
    assert is_exact(found), found.places


def half_lost(projection: nn.Module) -> Any:
    """The value as before, and half of its gradient."""
    return projection.register_forward_hook(lambda _, __, out: out * 0.5 + (out * 0.5).detach())


def _detached(model: Any) -> None:
    mlp = model.get_submodule("model.layers.1.mlp")
    activation = mlp.act
    mlp.act = lambda x: activation(x).detach()


def _half_projected(model: Any) -> None:
    half_lost(model.get_submodule("model.layers.1.self_attn.o_proj"))


def _half_of_a_branch(model: Any) -> None:
    half_lost(model.get_submodule("model.layers.1.mlp"))


PLANTED: dict[str, tuple[Callable[[Any], None], str]] = {
    "a detached branch": (_detached, "model.layers.1.mlp.gate_proj"),
    "half of a weight's": (_half_projected, "model.layers.1.self_attn.o_proj.weight"),
    "half of a block's": (_half_of_a_branch, "model.layers.1.mlp.down_proj"),
}


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama linear", "gemma3 shallow"])
def test_a_fault_of_the_backward_pass_is_placed(
    name: str, dtype: torch.dtype, planted: str, tiny_checkpoint: CheckpointMaker
) -> None:
    """Each leaves every value as it was; all that lies behind it has a wrong gradient too."""
    loaded = opened(tiny_checkpoint(name, torch.float32), dtype)
    ids = token_ids(loaded.config.vocab_size)
    plant, place = PLANTED[planted]
    with torch.no_grad():
        before = loaded.model(ids)
        plant(loaded.model)
        assert torch.equal(loaded.model(ids), before)
    found = run(loaded, ids)
    assert found.verdict is Verdict.diverged
    assert found.places[0] == place
    assert found.culprits[0].kind == "function"
    assert all(one.startswith("model.layers.1.") for one in found.places), found.places
    wrong = {one.site for one in found.culprits}
    assert "model.layers.0.input_layernorm.weight (gradient)" in wrong
    assert "model.layers.2.input_layernorm.weight (gradient)" not in wrong
    assert found.num_equal_after_step < len(found.judgements)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_kernel_is_rounding(dtype: torch.dtype, tiny_checkpoint: CheckpointMaker) -> None:
    loaded = opened(tiny_checkpoint("gemma3 shallow", torch.float32), dtype, "eager")
    found = run(loaded, token_ids(loaded.config.vocab_size), reference="sdpa")
    assert found.verdict is Verdict.rounding
    assert found.places[0] == "model.layers.3.self_attn#key"


def test_a_gradient_taken_with_less_care_is_told(tiny_checkpoint: CheckpointMaker) -> None:
    """Of a projection's input in bfloat16 where the reference has float32."""

    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
            (gradient,) = gradients
            return gradient.bfloat16().to(gradient) if gradient.dtype == torch.float32 else gradient

    loaded = opened(tiny_checkpoint("llama linear", torch.float32), torch.float32)
    projection = loaded.model.get_submodule("model.layers.2.mlp.down_proj")
    projection.register_forward_hook(lambda _, __, out: Careless.apply(out))  # type: ignore[no-untyped-call]
    found = run(loaded, token_ids(loaded.config.vocab_size))
    first = found.culprits[0]
    assert (first.site, first.kind) == ("model.layers.2.mlp.down_proj.weight (gradient)", "care")
    assert first.local_error is not None
    assert first.floor is not None
    assert first.local_error > 100 * first.floor


def test_parameters_are_left_as_they_were(tiny_checkpoint: CheckpointMaker) -> None:
    loaded = opened(tiny_checkpoint("gemma3 shallow", torch.float32), torch.bfloat16)
    loaded.model.requires_grad_(False)
    before = {name: one.clone() for name, one in loaded.model.named_parameters()}
    _detached(loaded.model)  # so that all of it runs
    run(loaded, token_ids(loaded.config.vocab_size))
    for name, one in loaded.model.named_parameters():
        assert torch.equal(one, before[name])
        assert one.dtype == torch.bfloat16
        assert one.grad is None
        assert not one.requires_grad


def test_the_command_says_it(
    tiny_checkpoint: CheckpointMaker,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = str(tiny_checkpoint("qwen3 yarn tempered"))
    code, out = parity(capsys, folder, "--quick", "--backward", "--json")
    printed = json.loads(out)
    assert code == 0
    assert printed["gradients"] == {
        "verdict": "exact",
        "tokens": 146,
        "parameters": 14,
        "exact": 14,
        "rounding": [],
        "places": [],
        "equal_after_step": 14,
    }
    own = GatedMLP.forward
    monkeypatch.setattr(GatedMLP, "forward", lambda self, x: own(self, x).detach())
    code, out = parity(capsys, folder, "--quick", "--backward", "--gate", "rounding", "--json")
    printed = json.loads(out)
    assert code == 1
    assert printed["verdict"] == "diverged"
    assert printed["exact"] == printed["sites"]
    assert (printed["first"]["pass"], printed["first"]["kind"]) == ("backward", "function")
    assert printed["gradients"]["places"][0] == "model.layers.0.mlp.down_proj"
    code, out = parity(capsys, folder, "--quick", "--backward")
    assert code == 1
    assert "first wrong gradient: model.layers.0.mlp.down_proj.weight" in out
    assert "made at model.layers.0.mlp.down_proj" in out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3 scaled"])
def test_the_training_objective_has_the_references_gradient(
    name: str, dtype: torch.dtype, tiny_checkpoint: CheckpointMaker
) -> None:
    """In one chunk, a sum where the reference has a mean: rounding apart, a factor."""
    folder = tiny_checkpoint(name, torch.float32)
    ours = opened(folder, dtype).model.requires_grad_(True)
    theirs: Any = load_reference(folder, dtype).model.requires_grad_(True)
    ids = token_ids(ours.config.vocab_size)
    logits = theirs(input_ids=ids[:, :-1], use_cache=False).logits.float()
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    expected = dict(theirs.named_parameters())
    count = ids[:, 1:].numel()
    (Objective(ours, bfloat16=False)(ids[:, :-1], ids[:, 1:]) / count).backward()
    for name_, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()), name_
        assert torch.equal(parameter.grad, expected[name_].grad), name_
