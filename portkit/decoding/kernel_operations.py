"""The operations of a decode step by Triton kernels, called as `operations` and `fusing` are.

Each does what the function of the same name there does, its sums in another order. What a kernel
does not take (several rows in a product, a bias, other layouts) goes to that function. Imported
only where Triton is. Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

from portkit.decoding import fusing, kernels, operations

_SLOTS_PER_SPLIT = 32
_SPLITS_AT_A_TIME = 16
_ROWS_PER_BLOCK = 16
_MANY_ROWS = 4096
_COLUMNS_AT_A_TIME = 512


def _norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float, cast_first: bool) -> Any:
    x = x.contiguous()
    size = x.shape[-1]
    out, total = torch.empty_like(x), x if y is None else torch.empty_like(x)
    kernels.norm_kernel[(x.numel() // size,)](
        x, x if y is None else y.contiguous(), weight, total, out, size, eps,
        WITH_SUM=y is not None, CAST_FIRST=cast_first, BLOCK=triton.next_power_of_2(size),
    )  # fmt: skip
    return out if y is None else (total, out)


def norm_cast_last(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """As `fusing.norm_cast_last`."""
    if x.dtype != dtype:
        return fusing.norm_cast_last(x, weight, eps, dtype)
    found: Tensor = _norm(x, None, weight, eps, cast_first=False)
    return found


def norm_cast_first(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """As `fusing.norm_cast_first`."""
    if not x.dtype == weight.dtype == dtype:
        return fusing.norm_cast_first(x, weight, eps, dtype)
    found: Tensor = _norm(x, None, weight, eps, cast_first=True)
    return found


def add_norm_cast_last(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `fusing.add_norm_cast_last`."""
    if not x.dtype == y.dtype == dtype or x.shape != y.shape:
        return fusing.add_norm_cast_last(x, y, weight, eps, dtype)
    found: tuple[Tensor, Tensor] = _norm(x, y, weight, eps, cast_first=False)
    return found


def add_norm_cast_first(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `fusing.add_norm_cast_first`."""
    if not x.dtype == y.dtype == weight.dtype == dtype or x.shape != y.shape:
        return fusing.add_norm_cast_first(x, y, weight, eps, dtype)
    found: tuple[Tensor, Tensor] = _norm(x, y, weight, eps, cast_first=True)
    return found


def rotate(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """As `fusing.rotate`."""
    batch, num_heads, _, head_dim = x.shape
    if not x.dtype == cos.dtype == sin.dtype or head_dim != 2 * half or cos.shape[0] != batch:
        return fusing.rotate(x, cos, sin, half)
    x = x.contiguous()
    out = torch.empty_like(x)
    kernels.rotate_kernel[(batch * num_heads,)](
        x, cos.contiguous(), sin.contiguous(), out, num_heads, half,
        BLOCK=triton.next_power_of_2(head_dim),
    )  # fmt: skip
    return out


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `operations.project`."""
    num_rows, size = weight.shape
    if x.numel() != size or bias is not None or not weight.is_contiguous():
        return operations.project(x, weight, bias)
    out = torch.empty(*x.shape[:-1], num_rows, dtype=weight.dtype, device=x.device)
    rows = _ROWS_PER_BLOCK if num_rows >= _MANY_ROWS else _ROWS_PER_BLOCK // 4
    kernels.project_kernel[(triton.cdiv(num_rows, rows),)](
        x.contiguous(), weight, out, num_rows, size, ROWS=rows, COLUMNS=_columns(size)
    )
    return out


def likeliest(x: Tensor, weight: Tensor) -> Tensor:
    """The first of the largest of `project(x, weight)` for one row (1, 1, size): int64 (1, 1).

    -1 where any of them is NaN. No logit is written.
    """
    num_rows, size = weight.shape
    num_blocks = triton.cdiv(num_rows, _ROWS_PER_BLOCK)
    best = torch.empty(num_blocks, dtype=torch.float32, device=x.device)
    where = torch.empty(num_blocks, dtype=torch.int64, device=x.device)
    kernels.head_kernel[(num_blocks,)](
        x.contiguous(), weight, best, where, num_rows, size,
        ROWS=_ROWS_PER_BLOCK, COLUMNS=_columns(size),
    )  # fmt: skip
    found = where.index_select(0, best.argmax(keepdim=True))
    return found.masked_fill((where < 0).any(), -1)[None]


def attend(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    kept: tuple[Tensor, Tensor],
    slot: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """As `operations.attend`, with a mask; the slots are shared out, and their parts gathered."""
    (key, value), (keys, values) = new, kept
    batch, num_heads, _, head_dim = query.shape
    num_groups, num_slots = key.shape[1], len(keys)
    if mask is None or key.stride(-1) != 1 or value.stride(-1) != 1:
        return operations.attend(query, new, kept, slot, mask, scale)
    num_splits = triton.cdiv(num_slots, _SLOTS_PER_SPLIT)
    channels = triton.next_power_of_2(head_dim)
    rows = batch * num_heads
    parts = query.new_empty((rows, num_splits, head_dim), dtype=torch.float32)
    most, sums = query.new_empty((2, rows, num_splits), dtype=torch.float32)
    kernels.attend_kernel[(batch * num_groups, num_splits)](
        query.contiguous(), key, value, keys, values, slot, mask.view(torch.uint8),
        parts, most, sums, scale,
        num_slots, num_groups, num_heads // num_groups, head_dim, num_splits,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        SLOTS=_SLOTS_PER_SPLIT, CHANNELS=channels,
    )  # fmt: skip
    out = torch.empty(batch, 1, num_heads, head_dim, dtype=query.dtype, device=query.device)
    kernels.gather_kernel[(rows,)](
        parts, most, sums, out, head_dim, num_splits,
        SPLITS=_SPLITS_AT_A_TIME, CHANNELS=channels,
    )  # fmt: skip
    return out


def _columns(size: int) -> int:
    return int(min(_COLUMNS_AT_A_TIME, triton.next_power_of_2(size)))


IN_PLACE_OF: dict[Callable[..., Any], Callable[..., Any]] = {
    operations.project: project,
    operations.attend: attend,
    fusing.norm_cast_last: norm_cast_last,
    fusing.norm_cast_first: norm_cast_first,
    fusing.add_norm_cast_last: add_norm_cast_last,
    fusing.add_norm_cast_first: add_norm_cast_first,
    fusing.rotate: rotate,
}
"""What a region's calls become on a CUDA device where Triton is."""
