"""Sites are found by running: tuples, routers of any form, tensors without tokens, merged axes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import portkit.parity
from portkit.parity.judging.judge import Verdict
from portkit.parity.probes.probe import Pass
from portkit.parity.sides.foreign import ForeignSide, Surroundings
from portkit.parity.sides.pairs import SitePairs
from portkit.parity.sides.sites import EVERYTHING, SiteTable
from portkit.parity.subject.dims import by_token, rows, token_dim
from portkit.parity.subject.discovery import discover
from portkit.parity.subject.measuring import Order, Seen, measured, orders
from portkit.parity.subject.traits import Traits

VOCABULARY, SIZE = 53, 12
PLAIN = "batch position channel"


class Three(nn.Module):
    """A tuple of three; the last one is a state, without tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.5

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.tanh(), x.unflatten(-1, (3, 4)), x.mean(1) * self.scale


class Router(nn.Module):
    """Weights, whole numbers, logits: in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, SIZE))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x @ self.weight.T
        weights, chosen = logits.softmax(-1).topk(2)
        return weights, chosen, logits


class Merged(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[None].expand(3, -1, -1).reshape(-1, SIZE) * 2


class Sorted(nn.Module):
    """Rows in an order that follows the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x[:, 0].argsort()].repeat(2, 1)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, SIZE)
        self.three, self.router = Three(), Router()
        self.merged, self.sorted = Merged(), Sorted()
        self.head = nn.Linear(SIZE, VOCABULARY, bias=False)
        self.never = nn.Linear(2, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        first, _, state = self.three(x)
        flat = first.flatten(0, 1)
        weights, _, _ = self.router(flat)
        self.sorted(flat)
        self.merged(flat)
        y = first * weights.sum(-1).view(*input_ids.shape, 1) + state[:, None]
        logits: Tensor = self.head(y)
        return logits


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def found(model: nn.Module) -> SiteTable:
    everywhere = Surroundings(EVERYTHING, dict(model.named_modules()), VOCABULARY)
    side = ForeignSide(model, torch.float32, SitePairs(""), everywhere, "toy")
    return discover(side, Traits(VOCABULARY, None, 0))


def test_each_tensor_has_a_name_and_its_dimensions(toy: Toy) -> None:
    table = found(toy)
    assert {name: table.dims(name) for name in table.names} == {
        "embed": PLAIN,
        "three:in": PLAIN,
        "three": PLAIN,
        "three:out.1": "batch position head channel",
        "three:out.2": "batch channel",
        "router:in": PLAIN,
        "router": "batch position expert",
        "#experts": "batch position expert",
        "sorted:in": PLAIN,
        "sorted": "length",
        "merged:in": PLAIN,
        "merged": "stream batch position channel",
        "head:in": PLAIN,
        "head": "batch position vocabulary",
        "#logits": "batch position vocabulary",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_differs_is_placed_at_its_tensor(toy: Toy, dtype: torch.dtype) -> None:
    toy = toy.to(dtype)
    same = portkit.parity.compare(copy.deepcopy(toy), toy, probe=[3, 1, 4, 1, 5])
    assert same.verdict is Verdict.exact
    other = copy.deepcopy(toy)
    other.three.scale = 0.625
    result = portkit.parity.compare(other, toy, probe=[3, 1, 4, 1, 5])
    assert [one.site for one in result.culprits] == ["three:out.2"]
    swapped = copy.deepcopy(toy)
    with torch.no_grad():
        swapped.router.weight[[0, 1]] = swapped.router.weight[[1, 0]]
    result = portkit.parity.compare(swapped, toy, probe=[3, 1, 4, 1, 5])
    assert result.first is not None
    assert result.first.site == "router"


def seen(*shapes: tuple[int, ...]) -> list[Seen]:
    """In passes of 2 rows, 3 rows, more tokens, and one token behind five."""
    sizes = [(2, 5, 5), (3, 5, 5), (2, 7, 7), (2, 1, 6)]
    return [Seen(*size, shape) for size, shape in zip(sizes, shapes, strict=False)]


@pytest.mark.parametrize(
    ("shapes", "dims"),
    [
        (((2, 5, 8), (3, 5, 8), (2, 7, 8), (2, 1, 8)), PLAIN),
        (((1, 5, 8), (1, 5, 8), (1, 7, 8), (1, 1, 8)), PLAIN),
        (((2, 4, 5, 5), (3, 4, 5, 5), (2, 4, 7, 7), (2, 4, 1, 6)), "batch channel position key"),
        (((10, 8), (15, 8), (14, 8), (2, 8)), PLAIN),
        (((2, 8), (3, 8), (2, 8), (2, 8)), "batch channel"),
        (((2, 6, 4), (3, 6, 4), (2, 6, 4), (2, 6, 4)), "batch head channel"),
        (((2, 8, 8), (3, 8, 8), (2, 8, 10), (2, 8, 4)), "batch channel length"),
        (((2, 8, 5), (3, 8, 5), (2, 8, 7), (2, 8)), "batch length"),
        (((3, 8), (4, 8), (2, 8), (1, 8)), "length channel"),
        (((8,), (8,), (8,), (8,)), "channel"),
        (((), (), (), ()), "length"),
    ],
)
def test_axes_follow_rows_tokens_and_keys(shapes: tuple[tuple[int, ...], ...], dims: str) -> None:
    assert measured(seen(*shapes), VOCABULARY) == dims


def test_which_of_two_merged_axes_comes_first() -> None:
    plain, other = torch.arange(12.0).view(12, 1), torch.arange(12.0).view(12, 1).clone()
    other[:6] += 50
    assert orders(plain, other, 3) == {Order.outer}
    other = plain.clone()
    other[[0, 1, 2, 6, 7, 8]] += 50
    assert orders(plain, other, 3) == {Order.inner}
    other[11] += 50
    assert orders(plain, other, 3) == frozenset()


def a_pass(mask: list[list[int]] | None) -> Pass:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    return Pass("one", ids, ids, None if mask is None else torch.tensor(mask))


def test_padding_is_left_out_wherever_tokens_are() -> None:
    one = a_pass([[0, 1, 1], [1, 1, 1]])
    streams = torch.arange(2 * 2 * 3 * 4.0).view(12, 4)  # (stream x batch x position, channel)
    moved = by_token(streams, "stream batch position channel", one)
    assert moved.shape == (2, 3, 2, 4)
    assert torch.equal(moved[1, 2, 0], streams[5])
    assert rows(streams, "stream batch position channel", one).shape == (5, 8)
    assert rows(torch.ones(2, 9), "batch channel", one).shape == (2, 9)
    assert rows(torch.ones(2, 9, 7), "batch length", one).shape == (1, 63)
    assert rows(torch.ones(9, 7), "length channel", one).shape == (0, 63)
    assert rows(torch.ones(9, 7), "length channel", a_pass(None)).shape == (2, 63)
    assert token_dim("batch head key channel") == 2
    assert token_dim("batch channel") is None


def test_a_generic_alias_is_no_function(toy: Any) -> None:
    """What a class defines beside functions is not called a method of it."""
    toy.three.extra = print
    assert found(toy).dims("three") == PLAIN
