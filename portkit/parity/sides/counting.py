"""How a side that is told no positions counts them in a left-padded row: tokens, or places.

Where that makes another model, as with learned positions, the two readings of one padded batch are
far apart, and the side is near one of them. Where it does not, as with rotary positions, nobody can
tell, and such rows are not asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from portkit.parity.probes.probe import Pass
from portkit.parity.sides.foreign import ForeignSide
from portkit.parity.sides.sites import CannotRun, Side

_TOKENS, _PADDING = 7, 3
_FAR = 8.0
"""So many times nearer the one reading than the readings are to each other."""


@torch.no_grad()
def counts_real(side: ForeignSide, other: Side, vocab_size: int) -> bool:
    """Whether `side` counts real tokens alone, by what `other` has with either positions."""
    if side.takes_positions or not side.takes_mask:
        return False
    input_ids = torch.arange(2 * _TOKENS, device=other.device).view(2, -1) % vocab_size
    mask = torch.ones_like(input_ids)
    mask[0, :_PADDING] = 0
    places = torch.arange(_TOKENS, device=other.device).expand_as(mask)
    tokens = (mask.cumsum(1) - 1).clamp(min=0)
    try:
        by_token, by_place, own = (
            one.run(Pass("padded", input_ids, positions, mask), {})[mask.bool()].double()
            for one, positions in ((other, tokens), (other, places), (side, places))
        )
    except CannotRun:
        return False
    apart = _distance(by_token, by_place)
    return apart == 0 or _FAR * _distance(own, by_token) < apart


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt().nan_to_num(torch.inf))
