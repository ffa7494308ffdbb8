"""The account of each site: equal or not, and distances, summed over all passes of a probe.

Distances are sums of squares over the real tokens, per channel, so that passes and blocks of a
large vocabulary add up. Knows no verdict: `judge` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from portkit.parity.probe import Pass

NUM_WORST = 3


def rows(tensor: Tensor, dims: str, one: Pass) -> Tensor:
    """(…) to (real tokens, channels): padding left out, heads and channels side by side.

    Keys and values reach back over the cache: their tokens are the last of past and new.
    """
    names = dims.split()
    where = next(i for i, name in enumerate(names) if name in {"position", "query"})
    moved = tensor.movedim(where, 1)
    real = one.real_of_last(moved.shape[1])
    moved = moved.expand(len(real), *moved.shape[1:])  # masks and tables may be for all rows one
    return moved.flatten(2)[real] if moved.dim() > 2 else moved[real][:, None]


@dataclass
class Distance:
    """Sums of squares of a difference, per channel."""

    per_channel: Tensor | None = None
    num_rows: int = 0

    def add(
        self, difference: Tensor, channels: slice | None = None, width: int | None = None
    ) -> None:
        """Add (tokens, channels) float64; `channels` of `width` where a block of them is given."""
        squares = difference.double().pow(2).sum(0)
        if self.per_channel is None:
            self.per_channel = squares.new_zeros(width or len(squares))
        self.per_channel[channels or slice(None)] += squares
        if channels is None or channels.start == 0:
            self.num_rows += len(difference)

    @property
    def total(self) -> float:
        return 0.0 if self.per_channel is None else float(self.per_channel.sum())


@dataclass
class PassRecord:
    """How one site differed in one pass, in the dtype under test, each given the same input."""

    name: str
    num_unequal: int
    max_difference: float
    worst: list[tuple[int, int, int, float, float]]
    """(row, position, channel, port, reference), the largest differences first."""


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
    floors: dict[str, Distance] = field(default_factory=dict)
    """Reference to the truth, by attention kernel."""
    function_asked: bool = False

    @property
    def exact(self) -> bool:
        return not self.unequal and self.misshapen is None and not self.missing


class Ledger:
    """Accounts in order of execution."""

    def __init__(self) -> None:
        self.sites: dict[str, SiteAccount] = {}

    def site(self, name: str, dims: str, is_glue: bool) -> SiteAccount:
        if name not in self.sites:
            self.sites[name] = SiteAccount(name, dims, is_glue)
        return self.sites[name]


def difference(one: Pass, dims: str, port: Tensor, reference: Tensor) -> PassRecord | None:
    """None where equal at every real token; NaN equals NaN in the same place."""
    ours, theirs = rows(port, dims, one), rows(reference, dims, one)
    if torch.equal(ours, theirs):
        return None
    unequal = (
        (ours != theirs) & ~(ours.isnan() & theirs.isnan())
        if ours.is_floating_point()
        else (ours != theirs)
    )
    if not bool(unequal.any()):
        return None
    gaps = (ours.double() - theirs.double()).abs().nan_to_num(nan=float("inf")) * unequal
    values, places = gaps.flatten().topk(min(NUM_WORST, gaps.numel()))
    num_tokens = port.shape[
        next(i for i, n in enumerate(dims.split()) if n in {"position", "query"})
    ]
    tokens = one.real_of_last(num_tokens).nonzero()
    worst = []
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        if value > 0:
            token, channel = divmod(place, gaps.shape[1])
            row, slot = tokens[token % len(tokens)].tolist()
            worst.append(
                (row, slot, channel, float(ours[token, channel]), float(theirs[token, channel]))
            )
    return PassRecord(one.name, int(unequal.sum()), float(values[0]), worst)
