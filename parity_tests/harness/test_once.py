"""What two sides compute alike is computed once, and a side that does otherwise is still seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from parity_tests.conftest import CheckpointMaker
from parity_tests.faults.planted.planting import replace_forward
from parity_tests.harness.test_known_answers import run
from portkit.loading import load
from portkit.parity.judging.judge import Verdict
from portkit.parity.judging.once import ComputedOnce
from portkit.parity.judging.precision import casts_lifted

WEIGHT = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)


def linear(x: Tensor, once: ComputedOnce) -> Tensor:
    with casts_lifted(once):
        return torch.nn.functional.linear(x, WEIGHT)


def test_a_result_is_given_to_the_second_who_asks() -> None:
    x, once = torch.randn(2, 5, 3, dtype=torch.float64), ComputedOnce()
    first = linear(x, once)
    assert len(once) == 1
    second = linear(x, once)
    assert len(once) == 0
    assert second.data_ptr() == first.data_ptr()
    assert linear(x, once).data_ptr() != first.data_ptr()  # and to no third
    assert torch.equal(second, x @ WEIGHT.T)


def test_equal_values_elsewhere_or_laid_out_otherwise_are_computed_again() -> None:
    x, once = torch.randn(3, 3, dtype=torch.float64), ComputedOnce()
    first = linear(x, once)
    assert linear(x.clone(), once).data_ptr() != first.data_ptr()
    assert torch.equal(linear(x.T, once), x.T @ WEIGHT.T)  # the same memory, read by columns
    assert torch.equal(linear(x[:2], once), x[:2] @ WEIGHT.T)
    assert len(once) == 4


@pytest.mark.parametrize("changes", ["operand", "view of the operand", "result"])
def test_what_was_changed_in_place_is_computed_again(changes: str) -> None:
    x, once = torch.randn(2, 5, 3, dtype=torch.float64), ComputedOnce()
    first = linear(x, once)
    with casts_lifted(once):
        {"operand": x, "view of the operand": x[1], "result": first.view(10, 4)}[changes].add_(1.0)
    assert torch.equal(linear(x, once), x @ WEIGHT.T)


def test_what_is_kept_does_not_change_with_what_is_given() -> None:
    kept: dict[str, Tensor] = {}
    x, once = torch.randn(2, 5, 3, dtype=torch.float64), ComputedOnce(kept)
    kept["site"] = linear(x, once)
    with casts_lifted(once):
        given = torch.nn.functional.linear(x, WEIGHT).mul_(2.0)
    assert torch.equal(kept["site"], x @ WEIGHT.T)
    assert torch.equal(given, 2 * (x @ WEIGHT.T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("piece", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_port_that_changes_the_common_result_in_place_diverges(
    piece: str, dtype: torch.dtype, tiny_checkpoint: CheckpointMaker
) -> None:
    """By so little that neither dtype can see it: only float64 can."""
    loaded = load(tiny_checkpoint("gemma3 shallow", dtype))
    site = f"model.layers.1.{piece}"

    def scaled(own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        found: Tensor = own(x)
        return found.mul_(1 + 1e-10)

    replace_forward(loaded.model.get_submodule(site), scaled)
    result = run(loaded)
    (culprit,) = result.culprits
    assert (culprit.site, culprit.verdict, culprit.kind) == (site, Verdict.diverged, "function")
    assert culprit.function_error == pytest.approx(1e-10, rel=0.01)
