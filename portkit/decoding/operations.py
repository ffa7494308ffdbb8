"""What a decode step is made of beside plain torch: projection and attention, as torch runs them.

`compiled_operations` has the same two, written for the compiler. Knows tensors only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`: x (batch, 1, in), weight (out, in), bias (out,); (batch, 1, out).

    A single row goes through `mv`, which reads the weights at twice the speed of `linear`.
    """
    if x.shape[0] > 1 or x.is_cuda:
        return F.linear(x, weight, bias)
    product = torch.mv(weight, x.view(-1))
    return (product if bias is None else product + bias).view(1, 1, -1)


def attend(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    kept: tuple[Tensor, Tensor],
    slot: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Keep a new token's key and value, and attend to all that is kept.

    query (batch, heads, 1, head_dim); `new` key and value, (batch, kv_heads, 1, head_dim), are
    written into the `kept`, (slots, batch, kv_heads, head_dim), at `slot`, int64 (1,). `mask`, bool
    (batch, 1, 1, slots), is True where visible; None where all is. Returns
    (batch, 1, heads, head_dim).
    """
    (key, value), (keys, values) = new, kept
    batch, num_heads, _, head_dim = query.shape
    keys.index_copy_(0, slot, key.permute(2, 0, 1, 3))
    values.index_copy_(0, slot, value.permute(2, 0, 1, 3))
    # The heads of a group become the queries of one key head: keys are read once, and torch's
    # kernel for grouped heads is many times slower with a single query.
    query = query.reshape(batch, key.shape[1], -1, head_dim)
    context = F.scaled_dot_product_attention(
        query, keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3), attn_mask=mask, scale=scale
    )
    return context.reshape(batch, 1, num_heads, head_dim)


def shortlist_bounds(
    x: Tensor, copy: Tensor, scale: Tensor, radius: Tensor, slack: Tensor
) -> tuple[Tensor, Tensor]:
    """Bounds from above and below on each row's logit, float32 (rows,) both; proof in `head`.

    x (1, 1, in); `copy` int8 (rows, in) times `scale` (rows,) stands for the weights; `radius`
    (rows,) bounds what it leaves out, per unit of |x|; `slack` is a relative and an absolute error.
    """
    x = x.reshape(-1).float()
    product = torch.mv(copy.float(), x) * scale
    return around(product, x, radius, slack)


def around(product: Tensor, x: Tensor, radius: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds, from the product with the copy and the float32 input (in,)."""
    # In float64, where squares of tiny numbers do not vanish.
    norm = x.double().norm().float()
    bound = 1.01 * (radius * norm) + slack[0] * product.abs() + slack[1]
    return product + bound, product - bound
