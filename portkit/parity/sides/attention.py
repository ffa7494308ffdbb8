"""An attention kernel's inputs as sites: query, key, value, and the mask in one form.

Knows the interface that kernels share, and no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from portkit.parity.sides.roles import Visit

QKV = ("query", "key", "value")
_HIDDEN = -1e8
"""What is added to the score of a key that is not to be seen is less than this; a bias is more."""


def visible(
    mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool | None = None
) -> Tensor:
    """The effective boolean mask (batch or 1, 1, queries, keys), whatever form a kernel was given.

    None is causal, unless `is_causal` is False. A floating mask is added to the scores.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask is None:
        ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        return (ones if is_causal is False else ones.tril(num_keys - num_queries))[None, None]
    if mask.dtype != torch.bool:
        mask = mask > _HIDDEN
    return mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the eager kernel wants it: zero where visible, else the dtype's lowest."""
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest)


def visit_inputs(
    name: str,
    visit: Visit,
    heads: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    is_causal: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Visit a kernel's query, key and value, and its mask as `visible` has it.

    A mask that the visitor leaves as it is keeps its form.
    """
    effective = visible(mask, *heads[:2], is_causal)
    seen = visit(f"{name}#mask", effective)
    query, key, value = (visit(f"{name}#{role}", one) for role, one in zip(QKV, heads, strict=True))
    if seen is not effective and not (
        seen.shape[2:] == effective.shape[2:] and bool((seen == effective).all())
    ):
        mask = seen
    return query, key, value, mask
