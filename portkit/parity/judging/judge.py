"""Verdicts. Two questions of a site that is not equal: the same function? and the same care?

The constants separate every harmless variant that was measured from every real fault: reordered
sums stay within 1.02 times the floor and 1.62 times a channel's; a misplaced cast does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from portkit.parity.judging.ledger import Distance, SiteAccount

SAME_FUNCTION = 1e-13
"""Relative RMS in float64 up to which two sides compute the same function."""
FLOOR_FACTOR = 1.25
CARE_FACTOR = 32.0
"""So many times its floor no lack of care is, where nobody could ask for the function."""
CHANNEL_FACTOR = 2.0
MIN_POOLED = 64
"""Values that a channel's distance is pooled over, at the least."""


class Verdict(StrEnum):
    """What is said of a site, and of a whole comparison; the later counts before the earlier."""

    exact = "exact"
    rounding = "rounding"
    inconclusive = "inconclusive"
    """Nothing wrong was found, but not all was seen that was to be seen."""
    diverged = "diverged"


@dataclass(frozen=True)
class Judgement:
    """What is said of one site. Errors are relative RMS; None where they could not be had."""

    site: str
    verdict: Verdict
    kind: str | None
    """function, care, glue, shape or missing; None unless diverged."""
    local_error: float | None
    floor: float | None
    function_error: float | None
    worst_channel: float | None
    """The largest ratio of a channel's distance to what it is allowed."""
    passes: tuple[str, ...]


def judge(site: SiteAccount) -> Judgement:
    """Judge one site by the rules of the design."""
    floor = floor_of(site)
    function_error = relative(site.function, site.truth) if site.function_asked else None
    local_error = relative(site.port, site.truth) if site.unequal else floor
    channel = _worst_channel(site) if site.unequal else None
    verdict, kind = _verdict(site, function_error, local_error, floor, channel)
    passes = tuple(one.name for one in site.unequal)
    return Judgement(site.name, verdict, kind, local_error, floor, function_error, channel, passes)


def floor_of(site: SiteAccount) -> float | None:
    """How far the reference is from the truth, the farthest of its kernels; None without one."""
    return max((relative(one, site.truth) or 0.0 for one in site.floors.values()), default=None)


def channel_floors(site: SiteAccount) -> Tensor:
    """The same of each channel, (pools,): of `pool_width` neighbours together."""
    truth = _pool(site.truth, site.truth)
    each = [(_pool(one, site.truth) / truth).sqrt() for one in site.floors.values()]
    return torch.stack(each).amax(0)


def pool_width(truth: Distance) -> int:
    """How many channels are taken together, so that a pool holds enough values."""
    return math.ceil(MIN_POOLED / max(1, truth.num_rows))


def relative(distance: Distance, truth: Distance) -> float | None:
    """Relative RMS; NaN and infinity count as infinite."""
    if distance.per_channel is None or truth.per_channel is None:
        return None
    if not math.isfinite(distance.total):
        return math.inf
    return math.sqrt(distance.total / truth.total) if truth.total else math.sqrt(distance.total)


def _verdict(
    site: SiteAccount,
    function_error: float | None,
    local_error: float | None,
    floor: float | None,
    channel: float | None,
) -> tuple[Verdict, str | None]:
    if site.missing or site.misshapen is not None:
        return Verdict.diverged, "missing" if site.missing else "shape"
    another_function = function_error is not None and function_error > SAME_FUNCTION
    if site.exact and not another_function:
        return Verdict.exact, None
    if site.truth_lacking:
        return Verdict.inconclusive, None
    if another_function or local_error is None or floor is None:
        # Without a truth to hold it against (masks, final logits) only equal is right.
        return Verdict.diverged, "glue" if site.is_glue else "function"
    if local_error <= FLOOR_FACTOR * floor and (channel or 0.0) <= 1:
        return Verdict.rounding, None
    care = not site.function_refused or local_error <= CARE_FACTOR * floor
    return Verdict.diverged, "glue" if site.is_glue else "care" if care else "function"


def _worst_channel(site: SiteAccount) -> float | None:
    """Largest of: a channel's distance over what it is allowed, twice its floor or the tensor's."""
    if site.truth.per_channel is None or site.port.per_channel is None or not site.floors:
        return None
    port = (_pool(site.port, site.truth) / _pool(site.truth, site.truth)).sqrt()
    allowed = CHANNEL_FACTOR * channel_floors(site).clamp(min=floor_of(site))
    ratio = (port / allowed).nan_to_num(nan=0.0)
    return float(ratio.max())


def _pool(distance: Distance, truth: Distance) -> Tensor:
    """Per-channel sums, adjacent channels taken together until a pool holds enough values."""
    assert distance.per_channel is not None
    width = pool_width(truth)
    channels = distance.per_channel
    assert truth.per_channel is not None
    if len(channels) != len(truth.per_channel):  # whose number changes from pass to pass
        return channels.sum()[None]
    padded = torch.nn.functional.pad(channels, (0, -len(channels) % width))
    return padded.view(-1, width).sum(1)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The one that counts: diverged, inconclusive, rounding, exact. Nothing compared is no pass."""
    found = set(verdicts)
    assert found, "nothing was compared"
    return next(one for one in reversed(Verdict) if one in found)
