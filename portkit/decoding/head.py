"""The exact head: the same likeliest tokens as all logits give, from half the bytes.

An 8-bit copy of the head says which rows cannot be the answer; the few others are computed from the
stored weights. That nothing is lost is proved, not hoped:

Let row i of the head be w_i, of K numbers, and its copy s_i q_i with whole q_i. With the input x,
t_i = w_i·x is the true product, L_i the logit that the head would give in bfloat16, and a_i the
product with the copy, computed in float32: a_i = fl(s_i fl(q_i·x)). Write u = 2**-24 for float32's
rounding, v = 2**-9 for bfloat16's, |·| for the Euclidean norm
and g = 2 (K + 4) u, which is above (K + 4) u / (1 - (K + 4) u), the bound on the error of a sum of
K products in any order, with fused operations or without (Higham 2002, section 3.1). Then

    |t_i - s_i q_i·x|  <=  r_i |x|                  with r_i = |w_i - s_i q_i| (Cauchy-Schwarz)
    |a_i - s_i q_i·x|  <=  g |s_i q_i| |x| + u |a_i|     and |s_i q_i| <= |w_i| + r_i
    |L_i - t_i|        <=  g |w_i| |x| + v (|t_i| + g |w_i| |x|) + tiny

where tiny is what vanishes below the smallest normal number: at most K 2**-126 times the largest
weight, which must be below 2**40, and so below 2**-70 for any K up to 2**16. |t_i| is at most |a_i|
and the first two together, so with c_i = r_i + 2 g (|w_i| + r_i), and a factor of 1.01 that is
above all products of 1 + v and of the roundings in computing the bound itself,

    |L_i - a_i|  <=  b_i = 1.01 (c_i |x| + (v + 2 u) |a_i|) + tiny.

If L_m is among the k largest logits, k rows have L_j <= L_m, or m is one of the k itself: in both
cases L_m is at least the k-th largest of all L_j, which is at least the k-th largest a_j - b_j. So
a_m + b_m reaches that value. The rows that reach it are kept, in order of their ids: all of the k
largest and all that tie with them are there, and the first of the largest is the same.

The head is bfloat16's: its products sum in float32, and a row's is the same whatever rows are
computed beside it. Of float32 matrices that is not so, and a tie could fall otherwise.

Knows the head's matrix and one row of input. Where the bound is not finite (NaN or infinity in the
input or the weights) or too many rows are kept, all logits are computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from portkit.decoding.compiler import Recipe, recipe
from portkit.decoding.lowering import Region, Value, Weight
from portkit.decoding.memory import Arena
from portkit.decoding.operations import shortlist_bounds
from portkit.decoding.packages import Function

_ROWS_AT_A_TIME = 8192
_LARGEST_SHARE = 32
"""Beyond one row in so many, computing all logits is no slower."""
_FLOAT32_ROUNDING = 2.0**-24
_BFLOAT16_ROUNDING = 2.0**-9
_TINY = 2.0**-70
_LARGEST_WEIGHT = 2.0**40


class ExactHead:
    """The head `x @ weight.T` of one row, without a bias and with nothing behind it.

    `weight` (vocab_size, hidden_size), on the CPU. Making it reads all of the weights.
    `is_usable` is False where they are not bfloat16, or too large or not finite for the proof.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        vocab_size, hidden_size = weight.shape
        self._copy = Arena(weight.numel()).empty((vocab_size, hidden_size), torch.int8)
        self._scale = torch.empty(vocab_size)
        self._radius = torch.empty(vocab_size)
        for start in range(0, vocab_size, _ROWS_AT_A_TIME):
            self._copy_rows(slice(start, start + _ROWS_AT_A_TIME))
        within = (self._scale * 127 < _LARGEST_WEIGHT).all()  # not if NaN
        self.is_usable = weight.dtype is torch.bfloat16 and bool(within)

    def _copy_rows(self, rows: slice) -> None:
        weight = self.weight[rows].float()
        scale = weight.abs().amax(1) / 127
        scale = scale.masked_fill(scale == 0, 1.0)
        copy = (weight / scale[:, None]).round_().clamp_(-127, 127)
        self._copy[rows] = copy.to(torch.int8)
        self._scale[rows] = scale
        # The residual is rounded too: well within g, which is twice what the sums need.
        radius, norm = (
            torch.linalg.vector_norm(one, dim=1, dtype=torch.float64)
            for one in (weight - copy * scale[:, None], weight)
        )
        g = 2 * (weight.shape[1] + 4) * _FLOAT32_ROUNDING
        self._radius[rows] = (radius + 2 * g * (norm + radius)).float()

    def arguments(self, x: Tensor) -> list[Tensor]:
        """Of `shortlist_bounds`, for x (1, 1, hidden_size)."""
        rounding = _BFLOAT16_ROUNDING + 2 * _FLOAT32_ROUNDING
        return [x, self._copy, self._scale, self._radius, torch.tensor([1.01 * rounding, _TINY])]

    def largest(self, x: Tensor, k: int, bounds: Function) -> tuple[Tensor, Tensor]:
        """Ids, ascending, and logits of rows that hold the `k` largest and all that tie with them.

        `bounds` is `shortlist_bounds`, compiled: only that makes it fast.
        x (1, 1, hidden_size); ids int64 (kept,), logits (kept,) as `torch.mv` gives them.
        """
        upper, lower = bounds(self.arguments(x))
        least = lower.max() if k == 1 else lower.topk(min(k, len(lower))).values[-1]
        kept = (upper >= least).nonzero().view(-1)
        if not bool(least.isfinite()) or len(kept) * _LARGEST_SHARE > len(upper):
            return torch.arange(len(upper)), torch.mv(self.weight, x.view(-1))
        return kept, torch.mv(self.weight[kept], x.view(-1))


def bounds_recipe(head: Region, arguments: Sequence[Tensor]) -> Recipe:
    """What compiles `shortlist_bounds` for a head that is called with these arguments."""
    x, weight = (
        next(
            held
            for one, held in zip(head.arguments, arguments, strict=True)
            if isinstance(one, kind)
        )
        for kind in (Value, Weight)
    )
    rows = torch.empty(len(weight))
    examples = [x, torch.empty(weight.shape, dtype=torch.int8), rows, rows, torch.empty(2)]
    graph = fx.Graph()
    inputs = tuple(graph.placeholder(f"p{index}") for index in range(len(examples)))
    graph.output(graph.call_function(shortlist_bounds, inputs))
    return recipe(graph, examples, [None] * len(examples), torch.get_num_threads())
