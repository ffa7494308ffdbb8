"""The gates that ports are usually accepted by: each asks whether two tensors of logits agree.

Knows logits alone, and nothing of sites. Each is asked of every pass of a probe, of its real
tokens, and holds where it holds of all; the last token is each row's last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from portkit.parity.probes.probe import Pass, Probe
from portkit.parity.sides.sites import Side

SIX_TOKENS = 6


@dataclass(frozen=True)
class Logits:
    """What either side said in one pass, in float64."""

    ours: Tensor
    """(real tokens, vocab_size), and so are theirs."""
    theirs: Tensor
    our_last: Tensor
    """(rows, vocab_size), and so are theirs."""
    their_last: Tensor


def _relative_error(one: Logits) -> float:
    return float((one.ours - one.theirs).norm() / one.theirs.norm())


GATES: dict[str, Callable[[Logits], bool]] = {
    "cosine ≥ 0.99, last token": lambda one: bool(
        (torch.cosine_similarity(one.our_last, one.their_last, -1) >= 0.99).all()
    ),
    "same top-1, last token": lambda one: torch.equal(
        one.our_last.argmax(-1), one.their_last.argmax(-1)
    ),
    "NMSE ≤ 1e-2": lambda one: _relative_error(one) ** 2 <= 1e-2,
    "relative error ≤ 1e-3": lambda one: _relative_error(one) <= 1e-3,
    "allclose, atol = rtol = 1e-4": lambda one: torch.allclose(
        one.ours, one.theirs, rtol=1e-4, atol=1e-4
    ),
}


def logits_of(side: Side, probe: Probe) -> list[Tensor]:
    """What a side says in each pass, running freely."""
    caches: dict[str, Any] = {}
    return [side.run(one, caches) for one in probe]


def passed(probe: Probe, ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> Iterator[str]:
    """The gates that two sides' logits pass."""
    said = [_said(*each) for each in zip(probe, ours, theirs, strict=True)]
    return (name for name, holds in GATES.items() if all(map(holds, said)))


def _said(one: Pass, ours: Tensor, theirs: Tensor) -> Logits:
    ours, theirs = ours.double(), theirs.double()
    real = one.real_logits  # padding is on the left: the last token is real
    return Logits(ours[real], theirs[real], ours[:, -1], theirs[:, -1])
