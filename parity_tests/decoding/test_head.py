"""The exact head gives the token that all logits give, whatever weights and input are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import portkit
from portkit.decoding.head import ExactHead
from portkit.decoding.operations import shortlist_bounds
from portkit.loading import load

ROWS, SIZE = 3001, 96
Case = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def bounds(arguments: list[Tensor]) -> tuple[Tensor, Tensor]:
    return shortlist_bounds(*arguments)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def heavy_tails(g: torch.Generator) -> tuple[Tensor, Tensor]:
    weight = normal(g, ROWS, SIZE) / normal(g, ROWS, SIZE).abs().clamp(min=1e-3)
    return weight, normal(g, SIZE) / normal(g, SIZE).abs().clamp(min=1e-3)


def outlier_columns(g: torch.Generator) -> tuple[Tensor, Tensor]:
    weight = normal(g, ROWS, SIZE)
    weight[:, :4] *= 64
    return weight, normal(g, SIZE)


def near_ties(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A thousand rows that differ by about one unit in the last place of the dtype."""
    weight = normal(g, ROWS, SIZE)
    weight[1000:2000] = weight[999] * (1 + 2.0**-9 * normal(g, 1000, 1))
    return weight, weight[999] + 0.1 * normal(g, SIZE)


def tied_rows(g: torch.Generator) -> tuple[Tensor, Tensor]:
    weight = normal(g, ROWS, SIZE)
    weight[[2900, 17, 1500]] = weight[42] * 4
    return weight, weight[42].clone()


def all_rows_equal(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(g, 1, SIZE).expand(ROWS, SIZE).clone(), normal(g, SIZE)


def one_giant_row(g: torch.Generator) -> tuple[Tensor, Tensor]:
    weight = normal(g, ROWS, SIZE)
    weight[77] *= 1e6
    return weight, normal(g, SIZE)


def one_giant_number(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Its row's copy keeps nothing else."""
    weight = normal(g, ROWS, SIZE)
    weight[77, 5] = 1e5
    x = normal(g, SIZE)
    x[5] = 0
    return weight, x


def zeros(g: torch.Generator) -> tuple[Tensor, Tensor]:
    weight = normal(g, ROWS, SIZE)
    weight[5] = 0
    return weight, torch.zeros(SIZE)


def all_negative(g: torch.Generator) -> tuple[Tensor, Tensor]:
    weight = -normal(g, ROWS, SIZE).abs()
    weight[1234] = 0
    return weight, normal(g, SIZE).abs()


def tiny_input(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(g, ROWS, SIZE), normal(g, SIZE) * 1e-30


def huge_input(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(g, ROWS, SIZE), normal(g, SIZE) * 1e30


def not_a_number(g: torch.Generator) -> tuple[Tensor, Tensor]:
    x = normal(g, SIZE)
    x[3] = torch.nan
    return normal(g, ROWS, SIZE), x


def infinite(g: torch.Generator) -> tuple[Tensor, Tensor]:
    x = normal(g, SIZE)
    x[3] = torch.inf
    return normal(g, ROWS, SIZE).abs(), x


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        heavy_tails, outlier_columns, near_ties, tied_rows, all_rows_equal, one_giant_row,
        one_giant_number, zeros, all_negative, tiny_input, huge_input, not_a_number, infinite,
    )
}  # fmt: skip


def expected(weight: Tensor, x: Tensor) -> Tensor:
    return torch.mv(weight, x)


@pytest.mark.parametrize("case", CASES)
def test_the_likeliest_token_is_the_full_heads(case: str) -> None:
    for seed in range(4):
        weight, x = (one.bfloat16() for one in CASES[case](torch.Generator().manual_seed(seed)))
        head = ExactHead(weight)
        full = expected(weight, x)
        ids, logits = head.largest(x.view(1, 1, -1), 1, bounds)
        assert torch.equal(ids, ids.sort().values)
        assert torch.equal(logits.isnan().any(), full.isnan().any())
        assert ids[logits.float().argmax()] == full.float().argmax()
        assert torch.equal(logits, full[ids]) or bool(full.isnan().any())


@pytest.mark.parametrize("k", [2, 40, ROWS + 7])
@pytest.mark.parametrize("case", [c for c in CASES if c not in ("not_a_number", "infinite")])
def test_the_k_likeliest_and_their_ties_are_all_there(case: str, k: int) -> None:
    weight, x = (one.bfloat16() for one in CASES[case](torch.Generator().manual_seed(9)))
    full = expected(weight, x)
    ids, logits = ExactHead(weight).largest(x.view(1, 1, -1), k, bounds)
    least = full.topk(min(k, ROWS)).values[-1]
    wanted = (full >= least).nonzero().view(-1)
    assert set(wanted.tolist()) <= set(ids.tolist())
    assert torch.equal(logits, full[ids])


def test_the_bound_holds_against_float64_and_is_not_idle() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, x = (one.bfloat16() for one in outlier_columns(generator))
    head = ExactHead(weight)
    upper, lower = bounds(head.arguments(x.view(1, 1, -1)))
    truth = weight.double() @ x.double()
    logits = expected(weight, x).double()
    for one in (truth, logits):
        assert bool((one <= upper).all())
        assert bool((one >= lower).all())
    # The copy's own error alone reaches a good part of the bound: half of it would not hold.
    used = ((upper + lower).double() / 2 - truth).abs() / ((upper - lower).double() / 2)
    assert 0.1 < float(used.max()) < 1


def test_few_rows_are_computed_of_ordinary_weights() -> None:
    weight, x = normal(torch.Generator().manual_seed(0), ROWS, SIZE).bfloat16(), torch.ones(SIZE)
    ids, _ = ExactHead(weight).largest(x.bfloat16().view(1, 1, -1), 1, bounds)
    assert len(ids) < ROWS // 32


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, 1e30])
def test_weights_beyond_the_proof_are_not_used(damage: float) -> None:
    weight = normal(torch.Generator().manual_seed(0), ROWS, SIZE).bfloat16()
    assert ExactHead(weight).is_usable
    assert not ExactHead(weight.float()).is_usable
    weight[20, 3] = damage
    assert not ExactHead(weight).is_usable


def test_trained_weights() -> None:
    """Every token of a story, from the hidden states of the demo checkpoint."""
    model = load(Path(portkit.__file__).parent / "demo_checkpoint").model
    head = ExactHead(model.lm_head.weight.data)
    with torch.inference_mode():
        hidden = model.hidden_states(torch.arange(3, 120)[None])
        for x in hidden[0]:
            ids, logits = head.largest(x.view(1, 1, -1), 1, bounds)
            assert ids[logits.argmax()] == expected(model.lm_head.weight, x).argmax()
