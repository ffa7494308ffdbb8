"""Slices of a stacked product, taken where they lie, have the bits of rows that lie together.

The one operation of a padded row whose bits depend on that is an exponential: torch's loops compute
what does not fill their registers by another function, and of rows apart something is left in each.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from portkit.decoding.lowering import _VECTOR


def differing(dtype: torch.dtype, size: int) -> int:
    """In how many values of 2 rows the slice of a wider tensor differs from the rows together."""
    whole = 4 * torch.randn(64, 2, 1, 2 * size, generator=torch.Generator().manual_seed(size))
    found = 0
    for one in whole.to(dtype):
        part = one.narrow(-1, 0, size)
        for function in (F.silu, torch.sigmoid, torch.tanh, torch.exp):
            found += int((function(part) != function(part.contiguous())).sum())
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sizes_that_fill_a_vector_need_no_copy(dtype: torch.dtype) -> None:
    assert [differing(dtype, size) for size in range(_VECTOR, 6 * _VECTOR, _VECTOR)] == [0] * 5


def test_sizes_that_do_not_are_why_there_is_one() -> None:
    """Float32, where a last bit is seen at once; of bfloat16 it is one in many thousands."""
    assert sum(differing(torch.float32, size) for size in range(9, _VECTOR, 8)) > 0
