"""The truth by itself: in float64 nothing is left of a dtype, and a cast that stayed is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from parity_tests.conftest import CheckpointMaker
from parity_tests.faults.planted.planting import replace_forward
from portkit.loading import load
from portkit.parity.comparing import compare
from portkit.parity.judging.judge import Verdict
from portkit.parity.judging.precision import (
    LiftedCasts,
    UnliftedCast,
    casts_lifted,
    held_in_float64,
    rows_in_float64,
)
from portkit.parity.probes.probing import default_probe, quick_probe
from portkit.parity.reference import Reference, load_reference
from portkit.parity.sides.port import PortSide
from portkit.parity.subject.discovery import sites_of

FAMILIES = ["llama3", "qwen3 yarn sliding", "gemma3"]


def logits_in_float64(reference: Reference, probe: Any) -> list[Tensor]:
    caches: dict[str, Any] = {}
    with held_in_float64(reference.model), casts_lifted():
        return [reference.run(one, caches) for one in probe]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_references_kernels_agree_in_float64(
    name: str, tiny_checkpoint: CheckpointMaker
) -> None:
    """sdpa and eager, a whole model of bfloat16 weights: what differs in bfloat16 by 1e-2."""
    folder = tiny_checkpoint(name, torch.bfloat16)
    probe = default_probe(load(folder).model)
    sides = [load_reference(folder, torch.bfloat16, kernel) for kernel in ("sdpa", "eager")]
    for one, sdpa, eager in zip(probe, *(logits_in_float64(s, probe) for s in sides), strict=True):
        assert sdpa.dtype == eager.dtype == torch.float64
        real = one.real_logits
        gap = (sdpa[real] - eager[real]).norm() / eager[real].norm()
        assert gap <= 1e-13, f"{one.name}: {gap}"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_as_it_was_afterwards(name: str, tiny_checkpoint: CheckpointMaker) -> None:
    model = load(tiny_checkpoint(name, torch.bfloat16)).model
    before = {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}
    with held_in_float64(model):
        assert all(one.dtype == torch.float64 for one in model.parameters())
        assert all(torch.equal(one, before[k].double()) for k, one in model.named_parameters())
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(after[k], held) for k, held in before.items())
    assert after.keys() == before.keys()


def test_equal_tensors_of_one_name_are_upcast_once() -> None:
    one, same, other = (torch.nn.Linear(3, 3, dtype=torch.bfloat16) for _ in range(3))
    same.load_state_dict(one.state_dict())
    with held_in_float64(one, same, other):
        assert one.weight.data_ptr() == same.weight.data_ptr()
        assert one.weight.data_ptr() != other.weight.data_ptr()
        assert other.weight.dtype == torch.float64
    with rows_in_float64(slice(1, 3), one.weight, other.weight):
        assert one.weight.shape == (2, 3)
    assert one.weight.shape == (3, 3)
    assert one.weight.data_ptr() != same.weight.data_ptr()


def test_casts_are_lifted_and_what_cannot_be_is_refused() -> None:
    x = torch.randn(5, dtype=torch.float64)
    with casts_lifted():
        assert torch.equal(x.float().to(torch.bfloat16).double(), x)
        assert torch.equal(x.to(torch.bfloat16), x)
        assert (x * torch.tensor(1.1, dtype=torch.float32)).dtype == torch.float64
        with pytest.raises(UnliftedCast, match="float32"):
            torch.empty(5, dtype=torch.float32).copy_(x)
        with pytest.raises(UnliftedCast, match="bfloat16"):
            torch.sum(x, 0, dtype=torch.bfloat16)
    assert x.float().dtype == torch.float32


def test_inference_mode_would_hide_casts() -> None:
    with torch.inference_mode(), pytest.raises(AssertionError, match="inference_mode"):  # noqa: SIM117
        with casts_lifted():
            pass
    assert issubclass(LiftedCasts, torch.utils._python_dispatch.TorchDispatchMode)


def test_a_cast_that_is_not_lifted_leaves_the_question_unasked(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    """Planted: a norm that writes into a float32 buffer. The floor then decides, and it is said."""
    folder = tiny_checkpoint("llama linear", torch.bfloat16)
    loaded = load(folder)
    norm: Any = loaded.model.get_submodule("model.layers.1.input_layernorm")

    def through_a_buffer(own: Any, x: Tensor) -> Tensor:
        held = torch.empty(x.shape, dtype=torch.float32).copy_(x)
        given: Tensor = own(held.to(x.dtype))
        return given

    replace_forward(norm, through_a_buffer)
    probe = quick_probe(loaded.model)
    found = compare(
        PortSide(loaded.model, probe.longest),
        load_reference(folder, torch.bfloat16),
        sites_of(loaded.model),
        probe,
    )
    assert found.verdict is Verdict.exact
    assert [one.name for one in found.not_verified] == ["model.layers.1: the same function"]
    assert "aten.copy_" in found.not_verified[0].reason
    unasked = {one.site for one in found.judgements if one.function_error is None}
    assert "model.layers.1.mlp" in unasked
    assert "model.layers.0.mlp" not in unasked
