"""Chains of small operations in a region, found and named: norms, sums before norms, rotations.

A norm that `portkit.nn` computes in seven calls is one call again, for kernels that do it at once.
Each function here is a pattern to look for, the name that is put in its place, and how torch runs
it: the same operations in the same order. Knows graphs; knows no device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.subgraph_rewriter import replace_pattern

Function = Callable[..., Any]


def norm_cast_last(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMS norm of (..., size) by a float32 `weight` (size,), cast at the end."""
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight).to(dtype)


def norm_cast_first(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMS norm of (..., size), cast before it is multiplied by `weight` (size,)."""
    x = x.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(dtype)


def add_norm_cast_last(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum of two, and its norm."""
    total = x + y
    return total, norm_cast_last(total, weight, eps, dtype)


def add_norm_cast_first(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum of two, and its norm."""
    total = x + y
    return total, norm_cast_first(total, weight, eps, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """`portkit.nn.rope.rotate`, of (batch, heads, 1, head_dim); `half` is head_dim / 2."""
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


_WITH_SUM: dict[Any, Function] = {
    norm_cast_last: add_norm_cast_last,
    norm_cast_first: add_norm_cast_first,
}


def fused(graph: fx.Graph, in_place_of: Mapping[Function, Function]) -> fx.Graph:
    """A copy with chains as single calls, and each function replaced by what stands for it."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    module = fx.GraphModule({}, copy)
    for norm in (norm_cast_last, norm_cast_first):
        replace_pattern(module, norm, _call(norm))
    for half in _halves(module.graph):
        replace_pattern(module, _rotation(half), _call(rotate, half))
    _take_sums(module.graph)
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.target = in_place_of.get(node.target, node.target)
    module.graph.lint()
    return module.graph


def _call(function: Function, *last: Any) -> fx.GraphModule:
    """A graph that is one call, by position; `last` are its last arguments."""
    graph = fx.Graph()
    names = list(signature(function).parameters)
    inputs = [graph.placeholder(name) for name in names[: len(names) - len(last)]]
    graph.output(graph.call_function(function, (*inputs, *last)))
    return fx.GraphModule({}, graph)


def _rotation(half: int) -> Function:
    # Where a tensor is cut a pattern cannot leave open: one for each size.
    def pattern(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * cos[:, None] + turned * sin[:, None]

    return pattern


def _halves(graph: fx.Graph) -> set[int]:
    """Where the graph cuts last dimensions in two."""
    cuts = [
        node.args[1][1]
        for node in graph.nodes
        if node.target is operator.getitem
        and isinstance(node.args[1], tuple)
        and node.args[1][0] is Ellipsis
        and isinstance(node.args[1][-1], slice)
    ]
    return {cut.start for cut in cuts if cut.start and cut.stop is None and cut.step is None}


def _take_sums(graph: fx.Graph) -> None:
    """Let a norm compute the sum of two tensors that it is the norm of."""
    for norm in [node for node in graph.nodes if node.target in _WITH_SUM]:
        total, *others = norm.args
        if total.target is not operator.add or not all(isinstance(a, fx.Node) for a in total.args):
            continue
        with graph.inserting_before(total):
            both = graph.call_function(_WITH_SUM[norm.target], (*total.args, *others))
            parts = [graph.call_function(operator.getitem, (both, part)) for part in (0, 1)]
        total.replace_all_uses_with(parts[0])
        norm.replace_all_uses_with(parts[1])
        graph.erase_node(norm)
        graph.erase_node(total)
