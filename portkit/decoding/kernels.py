"""Triton kernels of a decode step: norms, rotations, products with a vector, attention, the choice.

All sum in float32 and round where the operations that they stand for round; `kernel_operations`
calls them, and says what each one is. Knows pointers and sizes.
"""
# Triton's language has types of its own.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_kernel(
    x_ptr, y_ptr, weight_ptr, total_ptr, out_ptr, size, eps,
    WITH_SUM: tl.constexpr, CAST_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: `out = norm(x)`, or with the sum `total = x + y; out = norm(total)`."""
    columns = tl.arange(0, BLOCK)
    there = columns < size
    row = tl.program_id(0) * size
    x = tl.load(x_ptr + row + columns, mask=there, other=0.0)
    if WITH_SUM:
        y = tl.load(y_ptr + row + columns, mask=there, other=0.0)
        x = (x.to(tl.float32) + y.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row + columns, x, mask=there)
    wide = x.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    weight = tl.load(weight_ptr + columns, mask=there, other=0.0).to(tl.float32)
    if CAST_FIRST:
        wide = wide.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row + columns, (wide * weight).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, num_heads, half, BLOCK: tl.constexpr
):  # fmt: skip
    """A head of a token: channel i is paired with i + half; two rounded products, a rounded sum."""
    dtype = out_ptr.dtype.element_ty
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    there = columns < 2 * half
    partners = tl.where(columns < half, columns + half, columns - half)
    x = tl.load(x_ptr + row * 2 * half + columns, mask=there, other=0.0).to(tl.float32)
    turned = tl.load(x_ptr + row * 2 * half + partners, mask=there, other=0.0).to(tl.float32)
    turned = tl.where(columns < half, -turned, turned)
    table = (row // num_heads) * 2 * half + columns
    cos = tl.load(cos_ptr + table, mask=there, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=there, other=0.0).to(tl.float32)
    first, second = (x * cos).to(dtype).to(tl.float32), (turned * sin).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * 2 * half + columns, (first + second).to(dtype), mask=there)


@triton.jit
def _products(
    x_ptr, weight_ptr, rows, num_rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Products of some rows of a matrix with a vector, float32 (ROWS,)."""
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, size, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + columns, mask=columns < size, other=0.0).to(tl.float32)
        there = (rows < num_rows)[:, None] & (columns < size)[None, :]
        # The matrix of a head can have more entries than an int32 counts.
        places = rows.to(tl.int64)[:, None] * size + columns[None, :]
        weight = tl.load(weight_ptr + places, mask=there, other=0.0).to(tl.float32)
        total += tl.sum(weight * x[None, :], 1)
    return total


@triton.jit
def project_kernel(
    x_ptr, weight_ptr, out_ptr, num_rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    found = _products(x_ptr, weight_ptr, rows, num_rows, size, ROWS, COLUMNS)
    tl.store(out_ptr + rows, found.to(out_ptr.dtype.element_ty), mask=rows < num_rows)


@triton.jit
def head_kernel(
    x_ptr, weight_ptr, best_ptr, where_ptr, num_rows, size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a block of logits the largest and its first row; of a block with NaN infinity and -1."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    found = _products(x_ptr, weight_ptr, rows, num_rows, size, ROWS, COLUMNS)
    logits = found.to(weight_ptr.dtype.element_ty).to(tl.float32)
    damaged = tl.max(((logits != logits) & (rows < num_rows)).to(tl.int32), 0)
    logits = tl.where(rows < num_rows, logits, float("-inf"))
    best = tl.max(logits, 0)
    # Of rows of -inf alone the first is the first of the block, which is there.
    first = tl.min(tl.where((logits == best) & (rows < num_rows), rows, num_rows), 0)
    tl.store(best_ptr + tl.program_id(0), tl.where(damaged == 1, float("inf"), best))
    tl.store(where_ptr + tl.program_id(0), tl.where(damaged == 1, -1, first))


@triton.jit
def attend_kernel(
    query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, slot_ptr, mask_ptr,
    part_ptr, most_ptr, sum_ptr, scale,
    num_slots, num_groups, group_size, head_dim, num_splits,
    key_batch, key_head, value_batch, value_head,
    SLOTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some slots of one key head: the heads of its group attend to them, unnormalised.

    The new key and value are taken from where they come from, and kept by whoever has their slot:
    nobody reads what another writes.
    """
    pair, split = tl.program_id(0), tl.program_id(1)  # a row's key head
    batch, head = pair // num_groups, pair % num_groups
    channels = tl.arange(0, CHANNELS)
    is_channel = channels < head_dim
    slots = split * SLOTS + tl.arange(0, SLOTS)
    slot = tl.load(slot_ptr)
    key = tl.load(
        key_ptr + batch * key_batch + head * key_head + channels, mask=is_channel, other=0.0
    )
    value = tl.load(
        value_ptr + batch * value_batch + head * value_head + channels, mask=is_channel, other=0.0
    )
    # A cache can have more entries than an int32 counts.
    places = slots.to(tl.int64) * (tl.num_programs(0) * head_dim) + pair * head_dim
    tile = places[:, None] + channels[None, :]
    is_new = (slots == slot)[:, None] & is_channel[None, :]
    tl.store(keys_ptr + tile, key[None, :], mask=is_new)
    tl.store(values_ptr + tile, value[None, :], mask=is_new)

    visible = tl.load(mask_ptr + batch * num_slots + slots, mask=slots < num_slots, other=0) != 0
    loaded = (visible & (slots != slot))[:, None] & is_channel[None, :]
    keys = tl.load(keys_ptr + tile, mask=loaded, other=0.0).to(tl.float32)
    keys = tl.where(is_new, key.to(tl.float32)[None, :], keys)
    values = tl.load(values_ptr + tile, mask=loaded, other=0.0).to(tl.float32)
    values = tl.where(is_new, value.to(tl.float32)[None, :], values)
    for member in range(group_size):
        row = pair * group_size + member
        query = tl.load(query_ptr + row * head_dim + channels, mask=is_channel, other=0.0)
        scores = tl.sum(keys * query.to(tl.float32)[None, :], 1) * scale
        scores = tl.where(visible, scores, float("-inf"))
        most = tl.max(scores, 0)
        # Where nothing is visible the weights are zero, and not NaN.
        weights = tl.exp(scores - tl.where(most == float("-inf"), 0.0, most))
        place = row * num_splits + split
        tl.store(most_ptr + place, most)
        tl.store(sum_ptr + place, tl.sum(weights, 0))
        context = tl.sum(values * weights[:, None], 0)
        tl.store(part_ptr + place * head_dim + channels, context, mask=is_channel)


@triton.jit
def gather_kernel(
    part_ptr, most_ptr, sum_ptr, out_ptr, head_dim, num_splits,
    SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A head's context from all splits of its slots; something is visible in one of them."""
    row = tl.program_id(0)
    channels = tl.arange(0, CHANNELS)
    is_channel = channels < head_dim
    most = float("-inf")
    total = 0.0
    context = tl.zeros((CHANNELS,), dtype=tl.float32)
    for start in range(0, num_splits, SPLITS):
        splits = start + tl.arange(0, SPLITS)
        there = splits < num_splits
        places = row * num_splits + splits
        mosts = tl.load(most_ptr + places, mask=there, other=float("-inf"))
        larger = tl.maximum(most, tl.max(mosts, 0))
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        before, factors = tl.exp(most - finite), tl.exp(mosts - finite)
        sums = tl.load(sum_ptr + places, mask=there, other=0.0)
        parts = tl.load(
            part_ptr + places[:, None] * head_dim + channels[None, :],
            mask=there[:, None] & is_channel[None, :],
            other=0.0,
        )
        total = total * before + tl.sum(sums * factors, 0)
        context = context * before + tl.sum(parts * factors[:, None], 0)
        most = larger
    found = (context / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * head_dim + channels, found, mask=is_channel)
