"""The rotary base that a legacy llama2.c file was trained with, read off its tables.

    angle of position p and pair i of n:  p * base ** (-i / n)

Knows cosines and sines; knows nothing of files. Source of the formula: Su et al. 2021.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LLAMA2C_BASE = 10000.0
"""What llama2.c computes with, whatever a file's tables say."""
_TABLE_ERROR = 1e-2
"""Float32 angles of a few thousand radians are good to 1e-3; another base is off by 1."""
_BASE_ERROR = 5e-6
"""As a ratio: so well is a base known from one angle in float32."""


def choose_base(cos: Tensor, sin: Tensor, given: float | None) -> tuple[float, list[str]]:
    """The base of a file with these tables, and what there is to say; what is `given` decides."""
    found = base_of(cos, sin)
    base = given or found or LLAMA2C_BASE
    if base == found == LLAMA2C_BASE:
        return base, []
    if found is None:
        where = "" if given else ", which llama2.c itself takes; --rope-theta gives another"
        return base, [f"the file's rotary tables are of no base: {base:.10g} is taken{where}"]
    if base != found:
        said = f"the file's rotary tables are of base {found:.10g}, and {base:.10g} is taken"
        return base, [said]
    return base, [
        f"the rotary base {base:.10g} is read off the file's tables (llama2.c itself takes "
        f"{LLAMA2C_BASE:.10g}; --rope-theta gives another)"
    ]


def base_of(cos: Tensor, sin: Tensor) -> float | None:
    """The base whose tables these are, (positions, pairs) both; None where they are of none.

    Of the bases that the tables cannot tell apart the one that is written with fewest digits.
    Where all bases have the same tables, a single position or a single pair, it is llama2.c's own.
    """
    if _are_of(LLAMA2C_BASE, cos, sin):
        return LLAMA2C_BASE
    num_positions, num_pairs = cos.shape
    if num_positions < 2 or num_pairs < 2:
        return None
    angle = math.atan2(float(sin[1, -1]), float(cos[1, -1]))
    if not 0 < angle < 1:
        return None
    estimate = angle ** (-num_pairs / (num_pairs - 1))
    rounded = (float(f"{estimate:.{digits}g}") for digits in range(1, 8))
    base = next((one for one in rounded if abs(one / estimate - 1) < _BASE_ERROR), estimate)
    return base if _are_of(base, cos, sin) else None


def _are_of(base: float, cos: Tensor, sin: Tensor) -> bool:
    positions, pairs = (torch.arange(size, dtype=torch.float64) for size in cos.shape)
    angles = torch.outer(positions, base ** (-pairs / cos.shape[1]))
    return all(
        torch.allclose(table.double(), expected, rtol=0, atol=_TABLE_ERROR)
        for table, expected in ((cos, angles.cos()), (sin, angles.sin()))
    )
