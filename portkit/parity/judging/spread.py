"""How an error is spread over a site: over its magnitudes, and over the tokens of a probe.

What is kept is bounded whatever a probe's size: a count for each power of two, and the few tokens
with the largest error. Counts of passes, and of blocks of a large vocabulary, add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from portkit.parity.probes.probe import Pass

NUM_TOKENS = 4
_LOWEST, _HIGHEST = -200, 130
"""Exponents that are told apart; beyond them lies nothing that float32 holds."""


class Spread:
    """How many values lie at which power of two, without regard to their sign."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_HIGHEST - _LOWEST + 1, dtype=torch.int64)
        self.num_zeros = 0
        self.num_not_finite = 0

    def add(self, values: Tensor) -> None:
        """Count floating-point values of any shape."""
        magnitudes = values.abs().flatten()
        finite = magnitudes.isfinite()
        some = finite & (magnitudes > 0)
        self.num_not_finite += int((~finite).sum())
        self.num_zeros += int((finite & ~some).sum())
        exponents = torch.frexp(magnitudes[some]).exponent.long().clamp(_LOWEST, _HIGHEST)
        self._counts += torch.bincount(exponents - _LOWEST, minlength=len(self._counts)).cpu()

    def __len__(self) -> int:
        """How many values were counted."""
        return self.num_zeros + self.num_not_finite + int(self._counts.sum())

    @property
    def counts(self) -> dict[int, int]:
        """{e: how many}, ascending: those of at least 2^(e-1) and less than 2^e."""
        return {
            place + _LOWEST: count for place, count in enumerate(self._counts.tolist()) if count
        }

    def bound(self, share: float) -> float:
        """The power of two below which so large a share of the values lies; 0 where they are 0."""
        wanted = math.ceil(share * len(self))
        seen = self.num_zeros
        if seen >= wanted:
            return 0.0
        for exponent, count in self.counts.items():
            seen += count
            if seen >= wanted:
                return 2.0**exponent
        return math.inf


@dataclass(frozen=True)
class TokenError:
    """A token of one pass, and its error over all channels, relative to its own truth's RMS."""

    run: str
    row: int
    position: int
    """Counted from the first token that the site holds in this pass."""
    token_id: int | None
    """None for a token of an earlier pass, which a cache holds."""
    error: float
    floor: float | None
    """The reference's own; None where the error is the distance from the reference itself."""


def token_sums(error: Tensor, floor: Tensor | None, truth: Tensor) -> Tensor:
    """Sums of squares over the channels, (3, tokens); blocks of channels add up.

    Each is (tokens, channels) in float64. Without a floor its sums are NaN.
    """
    error, truth = (each.square().sum(1) for each in (error, truth))
    own = torch.full_like(error, math.nan) if floor is None else floor.square().sum(1)
    return torch.stack((error, own, truth))


def worst_tokens(
    known: Iterable[TokenError], one: Pass, sums: Tensor, real: Tensor
) -> tuple[TokenError, ...]:
    """The tokens with the largest error among the known ones and those of a pass.

    `sums` are `token_sums` of its real tokens, of the last ones that a site holds: `real` (batch,
    tokens) tells where.
    """
    found = [*known, *_tokens(one, sums, real)]
    found.sort(key=lambda each: -each.error)
    return tuple(found[:NUM_TOKENS])


def _tokens(one: Pass, sums: Tensor, real: Tensor) -> Iterator[TokenError]:
    whole = sums[2].where(sums[2] > 0, 1.0)
    errors, floors = (sums[:2] / whole).sqrt().cpu()
    errors = errors.nan_to_num(nan=math.inf)
    places, num_held = real.nonzero(), real.shape[1]
    for token in errors.topk(min(NUM_TOKENS, len(errors))).indices.tolist():
        if not errors[token]:
            continue
        row, position = places[token].tolist()
        yield TokenError(
            one.name,
            row,
            position,
            one.token_at(row, position, num_held),
            float(errors[token]),
            None if floors[token].isnan() else float(floors[token]),
        )
