"""The account of each site: equal or not, and distances, summed over all passes of a probe.

Distances are sums of squares over the real tokens, per channel, so that passes and blocks of a
large vocabulary add up. Knows no verdict: `judge` reads it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from portkit.parity.judging.spread import Spread, TokenError, token_sums, worst_tokens
from portkit.parity.probes.probe import Pass
from portkit.parity.sides.attention import QKV
from portkit.parity.sides.sites import AGAIN, LOGITS, SiteTable
from portkit.parity.subject.dims import batch_dim, by_token, real_tokens, rows, token_dim

NUM_WORST = 3
PARAMETER = " (parameter)"
BLOCK = 1 << 24
"""Values that are compared in float64 at a time."""
_FEW_UNEQUAL = 0.1
"""Up to this share of a parameter's values, those that differ are wrong ones."""
_CACHED = 1 << 15
"""Values of which a float64 copy stays in a core's cache."""


def picked(found: Tensor) -> Tensor:
    """At most 64 rows, spread evenly."""
    return found[:: max(1, len(found) // 64)][:64]


@dataclass
class Distance:
    """Sums of squares of a difference, per channel."""

    per_channel: Tensor | None = None
    num_rows: int = 0

    def add(
        self,
        squares: Tensor,
        num_rows: int,
        channels: slice = slice(None),
        width: int | None = None,
    ) -> None:
        """Add `squares_of` so many rows; of `channels` of `width` where they are a block.

        Where passes have other numbers of channels, as of past keys, all are added up to one.
        """
        if self.per_channel is None:
            self.per_channel = squares.new_zeros(width or len(squares))
        if width is None and len(squares) != len(self.per_channel):
            self.per_channel, squares = (one.sum()[None] for one in (self.per_channel, squares))
        self.per_channel[channels] += squares
        if not channels.start:
            self.num_rows += num_rows

    @property
    def total(self) -> float:
        return 0.0 if self.per_channel is None else float(self.per_channel.sum())


def squares_of(values: Tensor, against: Tensor | None = None) -> Tensor:
    """(rows, channels) to the sum over the rows of the squares, (channels,), float64.

    With `against`, of the difference from it. Taken in blocks that stay in the processor's cache:
    what a proof holds against the truth is many times what the model has computed, and a float64
    copy of each would cost more than the model.
    """
    num_rows, width = values.shape
    step = max(1, _CACHED // max(1, width)) if values.device.type == "cpu" else max(1, num_rows)
    total = values.new_zeros(width, dtype=torch.float64)
    with _disable_current_modes():  # nothing here is the model's to be watched
        scratch = values.new_empty(min(step, num_rows), width, dtype=torch.float64)
        for start in range(0, num_rows, step):
            block = values[start : start + step]
            wide = scratch[: len(block)].copy_(block)
            if against is not None:
                wide.sub_(against[start : start + step])
            total += wide.mul_(wide).sum(0)
    return total


@dataclass(frozen=True)
class Worst:
    """One value that differs: where, and what either side has there."""

    row: int | None
    """None of a parameter, which knows no rows of a batch."""
    position: int | None
    """Counted from the first token that the site holds in this pass."""
    place: str
    """Where in the token: `channel 17`, `head 1, channel 3`; of a parameter `[3, 17]`."""
    port: float
    reference: float


@dataclass(frozen=True)
class PassRecord:
    """How one site differed in one pass, in the dtype under test, each given the same input."""

    name: str
    num_unequal: int
    num_values: int
    max_difference: float
    worst: tuple[Worst, ...] = ()
    """The largest differences first."""


@dataclass
class SiteAccount:
    """Everything known of one site."""

    name: str
    dims: str
    is_glue: bool
    """What is compared here is the work of code between modules."""
    unequal: list[PassRecord] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    """Passes in which the free-running port differed here."""
    carried_error: Distance = field(default_factory=Distance)
    misshapen: str | None = None
    missing: bool = False
    truth: Distance = field(default_factory=Distance)
    function: Distance = field(default_factory=Distance)
    """Port to reference, both in float64."""
    port: Distance = field(default_factory=Distance)
    """Port in the dtype under test to the truth."""
    floors: defaultdict[str, Distance] = field(default_factory=lambda: defaultdict(Distance))
    """Reference to the truth, by attention kernel."""
    function_asked: bool = False
    function_refused: bool = False
    """The port could not be run in float64: whether it is the same function nobody knows."""
    truth_lacking: bool = False
    """No side could be run in float64: what is unequal here cannot be judged."""
    spread: Spread = field(default_factory=Spread)
    """Of the port's distances from the truth, or from the reference where there is no truth."""
    floor_spread: Spread = field(default_factory=Spread)
    """Of the reference's own distances from the truth, in the passes in which the port differs."""
    function_spread: Spread = field(default_factory=Spread)
    """Of the distances of `function` that are not zero everywhere."""
    worst_tokens: tuple[TokenError, ...] = ()
    inner: tuple[int, ...] = ()
    """The sizes of what a token holds, such as heads and channels; known where not equal."""

    @property
    def exact(self) -> bool:
        return not self.unequal and self.misshapen is None and not self.missing


class Ledger:
    """Accounts in order of execution.

    `composite` names the modules that are made of others: their outputs are the work of glue.
    """

    def __init__(self, table: SiteTable, composite: Iterable[str]) -> None:
        self.sites: dict[str, SiteAccount] = {}
        self._table, self._composite = table, frozenset(composite)

    def parameter(self, name: str) -> SiteAccount:
        """The account of a parameter as it was loaded."""
        name = f"{name}{PARAMETER}"
        return self.sites.setdefault(name, SiteAccount(name, "", is_glue=False))

    def site(self, name: str) -> SiteAccount:
        """The account of a declared site."""
        if name not in self.sites:
            dims = self._table.dims(name)
            assert dims is not None, f"{name} is not declared"
            first = name.partition(AGAIN)[0]
            given_to_attention = any(first.endswith(f"#{role}") for role in (*QKV, "mask"))
            composite = first in self._composite
            is_glue = ":in" in name or given_to_attention or name == LOGITS or composite
            self.sites[name] = SiteAccount(name, dims, is_glue)
        return self.sites[name]

    def add_difference(self, name: str, one: Pass, port: Tensor, reference: Tensor) -> None:
        """How a site without a truth differs: the reference is what it is held against."""
        account = self.sites[name]
        ours, theirs = (rows(each, account.dims, one).double() for each in (port, reference))
        account.spread.add(ours - theirs)
        self.add_tokens(name, one, token_sums(ours - theirs, None, theirs), reference)

    def add_tokens(self, name: str, one: Pass, sums: Tensor, like: Tensor) -> None:
        """`token_sums` of one pass, where the site holds a tensor `like` this one."""
        account = self.sites[name]
        moved = by_token(like, account.dims, one)
        account.inner = tuple(moved.shape[2:])
        real = real_tokens(one, account.dims, moved)
        account.worst_tokens = worst_tokens(account.worst_tokens, one, sums, real)


def is_laid_out_alike(port: Tensor, reference: Tensor) -> bool:
    """Whether a foreign parameter is the reference's place by place, but for a few wrong values.

    One that is transposed, permuted or rounded is equal nearly nowhere, and of many equal values,
    as a bias may have, the few that differ are then the same values in another order.
    """
    if port.shape != reference.shape:
        return False
    unequal = port != reference
    count = int(unequal.sum())
    if count == 0:
        return True
    few = port.dtype == reference.dtype and count <= _FEW_UNEQUAL * unequal.numel()
    if not few:
        return False
    ours, theirs = (one[unequal].sort().values for one in (port, reference))
    return not torch.equal(ours, theirs)


def difference_as_loaded(account: SiteAccount, port: Tensor, reference: Tensor) -> PassRecord:
    """How a parameter differs from the reference's of the same shape, as both were loaded."""
    gap = (port.double() - reference.double()).nan_to_num(nan=torch.inf)
    account.spread.add(gap)
    gaps, places = gap.abs().flatten().topk(min(NUM_WORST, gap.numel()))
    worst = []
    for place in places[gaps > 0].tolist():
        at = tuple(map(int, torch.unravel_index(torch.tensor(place), gap.shape)))
        worst.append(Worst(None, None, str(list(at)), float(port[at]), float(reference[at])))
    num_unequal = int((port != reference).sum())
    return PassRecord("as loaded", num_unequal, gap.numel(), float(gaps[0]), tuple(worst))


def difference(one: Pass, dims: str, port: Tensor, reference: Tensor) -> PassRecord | None:
    """None where equal at every real token; NaN equals NaN in the same place."""
    if torch.equal(port, reference):
        return None
    ours, theirs = rows(port, dims, one), rows(reference, dims, one)
    if torch.equal(ours, theirs):
        return None
    num_unequal, found = 0, []
    step = max(1, BLOCK // ours.shape[1])
    for start, end in pairwise([*range(0, len(ours), step), len(ours)]):
        a, b = ours[start:end], theirs[start:end]
        unequal = a != b
        if a.is_floating_point():
            unequal &= ~(a.isnan() & b.isnan())
        num_unequal += int(unequal.sum())
        gaps = (a.double() - b.double()).abs().nan_to_num(nan=torch.inf).where(unequal, 0.0)
        values, places = gaps.flatten().topk(min(NUM_WORST, gaps.numel()))
        found += [
            (gap, start * ours.shape[1] + place)
            for gap, place in zip(values.tolist(), places.tolist(), strict=True)
            if gap > 0
        ]
    if not num_unequal:
        return None
    found.sort(key=lambda one: -one[0])
    worst = tuple(_worst(one, dims, port, reference, place) for _, place in found[:NUM_WORST])
    return PassRecord(one.name, num_unequal, ours.numel(), found[0][0], worst)


def _worst(one: Pass, dims: str, port: Tensor, reference: Tensor, place: int) -> Worst:
    """The value at a place among the values of the real tokens."""
    moved, theirs = (by_token(each, dims, one) for each in (port, reference))
    inner = tuple(moved.shape[2:])
    token, rest = divmod(place, max(1, math.prod(inner)))
    row, position = real_tokens(one, dims, moved).nonzero()[token].tolist()
    at = (row if len(moved) > 1 else 0, position, *_within(inner, rest))
    return Worst(row, position, said_place(dims, inner, rest), float(moved[at]), float(theirs[at]))


def said_place(dims: str, inner: tuple[int, ...], place: int) -> str:
    """A place among the values of one token in words: `channel 17`, `head 1, channel 3`."""
    first = batch_dim(dims), token_dim(dims)
    names = [name for i, name in enumerate(dims.split()) if i not in first]
    index = _within(inner, place)
    return ", ".join(
        f"{n} {i}" for n, i in zip(names, index, strict=True) if n != "one" or len(names) == 1
    )


def _within(inner: tuple[int, ...], place: int) -> list[int]:
    index: list[int] = []
    for size in reversed(inner):
        place, last = divmod(place, size)
        index.insert(0, last)
    return index
