"""Pictures of an error as coordinates: by magnitude, and by channel.

Knows boxes of 600 by 120 and logarithmic scales; the page's template draws what is said here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from portkit.parity.judging.ledger import SiteAccount
from portkit.parity.judging.spread import Spread
from portkit.parity.reports.detail import Distribution, by_channel, floor_by_channel

WIDTH, HEIGHT = 600, 120
_POINTS = 120
"""Of a picture by channel: neighbours are pooled until there are no more."""
_BARS = 40
"""Of a picture by magnitude, at the most: powers of two are pooled until there are no more."""
_MOST_TICKS = 6


@dataclass(frozen=True)
class Bars:
    """Shares of a site's values by the magnitude of their error."""

    port: tuple[tuple[float, float, float, float], ...]
    """x, y, width, height"""
    reference: str
    """Points of a line along the tops; empty without a reference."""
    ticks: tuple[tuple[float, str], ...]
    floor: float | None
    """x of the floor, where it lies in the picture."""
    highest: str
    """The share of the highest bar."""
    said: tuple[str, ...]


def bars(found: Distribution) -> Bars | None:
    """Draw a distribution; None where there is no magnitude to draw."""
    spreads = [found.port, *filter(None, [found.reference])]
    exponents = [e for spread in spreads for e in spread.counts]
    if not exponents:
        return None
    low, high = min(exponents) - 1, max(exponents)
    pooled = max(1, math.ceil((high - low) / _BARS))
    num_bars = max(4, math.ceil((high - low) / pooled))
    step = WIDTH / num_bars
    shares = [_shares(spread, low, pooled, num_bars) for spread in spreads]
    top = max(map(max, shares))
    heights = [[HEIGHT * one / top for one in each] for each in shares]
    line = [
        f"{x:.1f},{HEIGHT - height:.1f}"
        for i, height in enumerate(heights[1] if len(heights) > 1 else [])
        for x in (i * step, (i + 1) * step)
    ]
    unit = found.floor or 1.0

    def place(value: float) -> float:
        return (math.log2(value) - low) * step / pooled

    at_floor = place(found.floor) if found.floor else None
    return Bars(
        port=tuple(
            (i * step + 0.5, HEIGHT - height, step - 1, height)
            for i, height in enumerate(heights[0])
            if height
        ),
        reference=" ".join(line),
        ticks=tuple(
            (place(value * unit), _multiple(value, bool(found.floor)))
            for value in _decades(2.0**low / unit, 2.0 ** (low + num_bars * pooled) / unit)
        ),
        floor=at_floor if at_floor is not None and 0 <= at_floor <= WIDTH else None,
        highest=f"{top:.0%}" if top >= 0.01 else f"{top:.1e}",
        said=tuple(_said(one, who, found.floor) for one, who in zip(spreads, _WHOSE, strict=False)),
    )


_WHOSE = ("port", "reference")


def _shares(spread: Spread, low: int, pooled: int, num_bars: int) -> list[float]:
    shares = [0.0] * num_bars
    for exponent, count in spread.counts.items():
        shares[(exponent - 1 - low) // pooled] += count / len(spread)
    return shares


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten within, every so many where they are many."""
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    every = max(1, math.ceil(len(powers) / _MOST_TICKS))
    return [10.0**power for power in powers if power % every == 0]


def _multiple(value: float, of_floor: bool) -> str:
    said = f"{value:g}" if of_floor and 1e-3 <= value <= 1e4 else f"1e{round(math.log10(value))}"
    return f"{said}\N{MULTIPLICATION SIGN}" if of_floor else said


def _said(spread: Spread, who: str, floor: float | None) -> str:
    """`port: half of 3,200 values are below 0.5 floors, 99 in 100 below 4, all below 16`."""

    def size(share: float) -> str:
        bound = spread.bound(share)
        return f"{bound / floor:.3g} floors" if floor else f"{bound:.1e}"

    bounds = ", ".join(
        f"{share} below {size(part)}"
        for share, part in (("half", 0.5), ("99 in 100", 0.99), ("all", 1.0))
        if math.isfinite(spread.bound(part))
    )
    beside = [f"{spread.num_zeros:,} are zero"] if spread.num_zeros else []
    if spread.num_not_finite:
        beside.append(f"{spread.num_not_finite:,} are not finite")
    return f"{who}, of {len(spread):,} values: " + "; ".join([bounds, *beside])


@dataclass(frozen=True)
class Lines:
    """Distances by channel on a logarithmic scale."""

    port: str
    floor: str
    ticks: tuple[tuple[float, str], ...]
    num_channels: int
    pooled: int


def lines(account: SiteAccount) -> Lines | None:
    """The port's distance from the truth and the reference's own, by channel; None without them."""
    truth = account.truth.per_channel
    if truth is None or account.port.per_channel is None or not account.floors:
        return None
    pooled = math.ceil(len(truth) / _POINTS)
    port, floor = by_channel(account.port, truth, pooled), floor_by_channel(account, pooled)
    both = torch.cat([port, floor])
    measured = both[both.isfinite() & (both > 0)].log10()
    low = math.floor(float(measured.min())) if len(measured) else -1
    high = max(math.ceil(float(measured.max())) if len(measured) else 0, low + 1)
    ticks = tuple(
        (HEIGHT * (high - power) / (high - low), f"1e{power}") for power in sorted({low, high})
    )
    return Lines(_line(port, low, high), _line(floor, low, high), ticks, len(truth), pooled)


def _line(values: Tensor, low: int, high: int) -> str:
    step = WIDTH / max(1, len(values) - 1)
    places = values.nan_to_num(nan=math.inf).log10().clamp(low, high)
    heights = (HEIGHT * (high - places) / (high - low)).tolist()
    return " ".join(f"{step * i:.0f},{height:.1f}" for i, height in enumerate(heights))
