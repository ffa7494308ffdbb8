"""What is told of a culprit beside its verdict: where its error lies, and how large it is where.

Distribution, worst channels and worst tokens, as plain values for the object and for the page.
Judges nothing; pools channels as the judgement does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from portkit.parity.judging.judge import CHANNEL_FACTOR, MIN_POOLED, relative
from portkit.parity.judging.ledger import Distance, SiteAccount, said_place
from portkit.parity.judging.spread import Spread

MOST_DETAILED = 12
"""Culprits of a comparison that are told of in full: their number bounds what is written."""
NUM_CHANNELS = 4


@dataclass(frozen=True)
class Distribution:
    """The magnitudes of an error over all values of a site, in the passes in which it differs."""

    measured_from: str
    """truth, float64 (between both sides there), or reference where a site has no truth."""
    port: Spread
    reference: Spread | None
    """The reference's own distances from the truth."""
    floor: float | None
    """The floor as an RMS of values, and not relative to anything; None without one."""


@dataclass(frozen=True)
class ChannelError:
    """Some neighbouring channels, often one: their error, relative RMS over all passes."""

    first: int
    last: int
    place: str
    error: float
    floor: float | None
    """The reference's own; None where the error is the one between both sides in float64."""
    times_allowed: float | None


def distribution(account: SiteAccount) -> Distribution | None:
    """How the error of a site is distributed; None where no value differs."""
    truth, floors = account.truth, account.floors.values()
    floor = max((relative(one, truth) or 0.0 for one in floors), default=None)
    if floor is not None and truth.per_channel is not None and truth.total:
        floor *= math.sqrt(truth.total / max(1, truth.num_rows * len(truth.per_channel)))
    if len(account.floor_spread):
        return Distribution("truth", account.spread, account.floor_spread, floor)
    if len(account.spread):
        return Distribution("reference", account.spread, None, None)
    if len(account.function_spread):
        return Distribution("float64", account.function_spread, None, floor)
    return None


def worst_channels(account: SiteAccount) -> list[ChannelError]:
    """The channels farthest beyond what they are allowed, or farthest apart in float64."""
    truth = account.truth.per_channel
    if truth is None:
        return []
    width = math.ceil(MIN_POOLED / max(1, account.truth.num_rows))
    floor: Tensor | None = None
    allowed: Tensor | None = None
    if account.unequal and account.port.per_channel is not None and account.floors:
        error = by_channel(account.port, truth, width)
        floor = floor_by_channel(account, width)
        whole = max(relative(one, account.truth) or 0.0 for one in account.floors.values())
        allowed = CHANNEL_FACTOR * floor.clamp(min=whole)
        order = (error / allowed).nan_to_num(nan=0.0, posinf=math.inf)
    elif account.function.per_channel is not None:
        error = order = by_channel(account.function, truth, width)
    else:
        return []
    return [
        ChannelError(
            index * width,
            (last := min(len(truth), (index + 1) * width) - 1),
            _named(account, index * width, last),
            float(error[index]),
            None if floor is None else float(floor[index]),
            None if allowed is None else float(order[index]),
        )
        for index in order.topk(min(NUM_CHANNELS, len(order))).indices.tolist()
        if error[index] > 0 or not math.isfinite(error[index])
    ]


def floor_by_channel(account: SiteAccount, width: int) -> Tensor:
    """The largest of the reference's kernels' distances, (pools,)."""
    truth = account.truth.per_channel
    assert truth is not None, "a floor is a distance from the truth"
    each = [by_channel(one, truth, width) for one in account.floors.values()]
    return torch.stack(each).amax(0)


def by_channel(distance: Distance, truth: Tensor, width: int) -> Tensor:
    """Relative RMS of `width` neighbouring channels together, (pools,)."""
    channels = truth.new_zeros(len(truth)) if distance.per_channel is None else distance.per_channel
    sums, whole = (
        torch.nn.functional.pad(one, (0, -len(one) % width)).view(-1, width).sum(1)
        for one in (channels, truth)
    )
    return (sums / whole.where(whole > 0, 1.0)).sqrt()


def as_json(account: SiteAccount) -> dict[str, Any]:
    """`distribution`, `worst_tokens` and `worst_channels` in plain values."""
    found = distribution(account)
    return {
        "distribution": None
        if found is None
        else {
            "measured_from": found.measured_from,
            "floor_rms": found.floor,
            "port": _counts(found.port),
            "reference": None if found.reference is None else _counts(found.reference),
        },
        "worst_tokens": [
            {
                "pass": one.run,
                "row": one.row,
                "position": one.position,
                "token_id": one.token_id,
                "error": one.error,
                "floor": one.floor,
            }
            for one in account.worst_tokens
        ],
        "worst_channels": [vars(one) for one in worst_channels(account)],
    }


def _counts(spread: Spread) -> dict[str, Any]:
    return {
        "values": len(spread),
        "zero": spread.num_zeros,
        "not_finite": spread.num_not_finite,
        "below_power_of_two": {str(e): count for e, count in spread.counts.items()},
    }


def _named(account: SiteAccount, first: int, last: int) -> str:
    if not account.inner or math.prod(account.inner) <= last:
        return f"channel {first}" if first == last else f"channels {first} to {last}"
    start = said_place(account.dims, account.inner, first)
    if first == last:
        return start
    return f"{start} to {said_place(account.dims, account.inner, last)}"
