"""From a traced step to regions: what reads the same is read once, what is constant is computed.

A region is a few layers as a graph whose weights, caches and tables are all arguments, so that
layers of one structure share one graph, and one compiled function. Knows graphs; runs nothing
but constants.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from portkit.decoding.operations import attend, project
from portkit.decoding.tracing import BLOCK, StepGraphs

State = Literal["keys", "values", "slot", "mask"]


@dataclass(frozen=True)
class Value:
    """What an earlier region, the step's input or a rotary table gives, by its name."""

    name: str


@dataclass(frozen=True)
class Weight:
    """A parameter or a constant by its name, or several matrices stacked: the names of all."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Kept:
    """A layer's `keys` or `values`, or the `slot` or `mask` of all caches of its kind."""

    what: State
    index: int


Argument = Value | Weight | Kept


@dataclass(frozen=True)
class Region:
    """A graph with the arguments that its placeholders stand for, in order, and its results."""

    graph: fx.Graph
    arguments: tuple[Argument, ...]
    results: tuple[Value, ...]

    @property
    def code(self) -> str:
        """Equal for regions that can share a function."""
        return self.graph.python_code("self").src


@dataclass(frozen=True)
class Table:
    """A rotary table that the step reads: the module that makes it, and where it goes."""

    module: nn.Module
    dtype: torch.dtype
    cos: Value
    sin: Value


@dataclass(frozen=True)
class Program:
    """A step as regions to run in order; `hidden` is what the last of them gives."""

    regions: tuple[Region, ...]
    head: Region
    tables: tuple[Table, ...]
    hidden: Value


INPUT_IDS = Value("input_ids")
_MAX_LAYERS_PER_REGION = 8
_VECTOR = 64
"""Numbers that torch's loops take at a time at most, bfloat16 in AVX-512. What is left over of a
tensor has other last bits (of an exponential), and of rows that do not lie together something is
left over in each."""


@dataclass
class _Draft:
    """The step's graph while it is rewritten, and the constants found on the way."""

    graph: fx.Graph
    parameters: Mapping[str, Tensor]
    constants: dict[str, Tensor] = field(default_factory=dict)
    stacks: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def weight(self, name: str) -> Weight:
        return Weight(self.stacks.get(name, (name,)))


class Step:
    """A traced step, made ready to be cut into regions; weights are named, nothing is placed."""

    def __init__(self, graphs: StepGraphs, parameters: Mapping[str, Tensor]) -> None:
        self._hidden, self._logits = (
            _Draft(graph, parameters) for graph in (graphs.hidden, graphs.logits)
        )
        for one in (self._hidden, self._logits):
            _fold_constants(one)
            _stack_projections(one)
        self._tables = _take_tables(self._hidden.graph, graphs.modules)
        self.constants = self._hidden.constants | self._logits.constants
        """What was computed from the parameters, by name; 0-dimensional parameters as they are."""
        used = dict.fromkeys(
            draft.weight(str(node.target))
            for draft in (self._hidden, self._logits)
            for node in draft.graph.nodes
            if node.op == "get_attr" and node.target not in draft.constants
        )
        scalars = [one for one in used if parameters[one.names[0]].dim() == 0]
        self.constants |= {one.names[0]: parameters[one.names[0]] for one in scalars}
        self.weights = tuple(one for one in used if one not in scalars)
        """The parameters that are left, in the order of their use."""

    def cut(self, kinds: Sequence[int], *, masked: bool) -> Program:
        """Regions. `kinds` says of each layer which kind of cache it has; `masked` whether
        attention gets a mask.
        """
        draft = self._hidden
        segments = _segments(draft.graph, _layers_per_region(kinds))
        regions = tuple(_region(draft, nodes, kinds, masked) for nodes in segments)
        logits = _region(self._logits, list(_body(self._logits.graph)), kinds, masked)
        (hidden,) = draft.graph.output_node().all_input_nodes
        return Program(regions, logits, self._tables, Value(hidden.name))


def _layers_per_region(kinds: Sequence[int]) -> int:
    """Whole periods of the kinds' pattern, few enough to compile in a minute, alike if possible."""
    num_layers = len(kinds)
    period = next(
        n
        for n in range(1, num_layers + 1)
        if all(kinds[i] == kinds[i - n] for i in range(n, num_layers))
    )
    sizes = range(period, max(period, _MAX_LAYERS_PER_REGION) + 1, period)
    even = [size for size in sizes if num_layers % size == 0]
    return max(even or sizes)


def _body(graph: fx.Graph) -> Iterator[fx.Node]:
    return (n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output"))


def _fold_constants(draft: _Draft) -> None:
    """Compute now whatever depends on parameters alone, views of large matrices left out."""
    values: dict[fx.Node, Tensor] = {}
    for node in draft.graph.nodes:
        if node.op == "get_attr":
            values[node] = draft.parameters[node.target]
        elif node.op in ("call_function", "call_method") and all(
            one in values and values[one].dim() < 2 for one in node.all_input_nodes
        ):
            if not node.all_input_nodes:
                continue
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            call = node.target if callable(node.target) else getattr(type(args[0]), node.target)
            with torch.no_grad():
                values[node] = call(*args, **kwargs)
            if not isinstance(values[node], Tensor):
                del values[node]
                continue
            draft.constants[node.name] = values[node].detach().clone()
            with draft.graph.inserting_before(node):
                constant = draft.graph.get_attr(node.name)
            constant.meta.update(node.meta)
            values[constant] = values[node]
            node.replace_all_uses_with(constant)
    _prune(draft.graph)


def _stack_projections(draft: _Draft) -> None:
    """One `project` for all linear maps of one tensor; each then takes its slice."""
    by_input: dict[tuple[fx.Node, bool], list[fx.Node]] = {}
    for node in draft.graph.nodes:
        if node.op == "call_function" and node.target is F.linear:
            assert not node.kwargs, "linear is called by position"
            x, _, bias = _operands(node)
            by_input.setdefault((x, bias is None), []).append(node)
    for (x, plain), group in by_input.items():
        weights, biases = [_operands(node)[1] for node in group], [_operands(n)[2] for n in group]
        with draft.graph.inserting_before(group[0]):
            bias = None if plain else _stacked(draft, biases)
            whole = draft.graph.call_function(project, (x, _stacked(draft, weights), bias))
            whole.meta.update(group[0].meta)
            start = 0
            for node, weight in zip(group, weights, strict=True):
                size = len(draft.parameters[weight.target])
                part = whole
                if len(group) > 1:
                    part = draft.graph.call_method("narrow", (whole, -1, start, size))
                    part.meta.update(group[0].meta)
                    if size % _VECTOR:
                        part = draft.graph.call_method("contiguous", (part,))
                        part.meta.update(group[0].meta)
                node.replace_all_uses_with(part)
                start += size
    _prune(draft.graph)


def _operands(linear: fx.Node) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a call; nodes, or None for no bias."""
    x, weight, *bias = linear.args
    return x, weight, bias[0] if bias else None


def _stacked(draft: _Draft, nodes: Sequence[fx.Node]) -> fx.Node:
    if len(nodes) == 1:
        return nodes[0]
    names = tuple(str(node.target) for node in nodes)
    draft.stacks["|".join(names)] = names
    return draft.graph.get_attr("|".join(names))


def _prune(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def _take_tables(graph: fx.Graph, modules: dict[str, nn.Module]) -> tuple[Table, ...]:
    """Rotary tables become inputs of the step: they are made for many tokens at a time."""
    tables = []
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        halves: list[Value] = []
        for half in (0, 1):
            name = f"{node.name}_{half}"
            with graph.inserting_before(next(iter(graph.nodes))):
                table = graph.placeholder(name)
            for user in list(node.users):
                assert user.target is operator.getitem, "a table is cos and sin"
                if user.args[1] == half:
                    user.replace_all_uses_with(table)
            halves.append(Value(table.name))
        tables.append(Table(modules[str(node.target)], node.args[1], *halves))
    _prune(graph)
    return tuple(tables)


def _segments(graph: fx.Graph, layers_per_region: int) -> list[list[fx.Node]]:
    """The nodes in order: before the layers, so many layers at a time, after them."""
    segments: dict[int, list[fx.Node]] = {-1: []}
    body = list(_body(graph))
    last = max(i for i, node in enumerate(body) if BLOCK in node.meta)
    segment = -1
    for i, node in enumerate(body):
        if BLOCK in node.meta:
            segment = max(segment, node.meta[BLOCK] // layers_per_region)
        elif i > last:
            segment = len(body)
        segments.setdefault(segment, []).append(node)
    return [nodes for _, nodes in sorted(segments.items()) if nodes]


def _region(draft: _Draft, nodes: Sequence[fx.Node], kinds: Sequence[int], masked: bool) -> Region:
    graph, inside = fx.Graph(), set(nodes)
    arguments: dict[Argument, fx.Node] = {}
    # Placeholders come first in a graph: all of them are made before any node is copied.
    for node in nodes:
        outside = [_argument(draft, one) for one in node.all_input_nodes if one not in inside]
        for one in (*outside, *(_kept(node, kinds, masked) if node.target is attend else ())):
            if one not in arguments:
                arguments[one] = graph.placeholder(f"p{len(arguments)}")
    copies: dict[fx.Node, fx.Node] = {}

    def copy_of(node: fx.Node) -> fx.Node:
        return copies[node] if node in inside else arguments[_argument(draft, node)]

    for number, node in enumerate(nodes):
        copies[node] = copy = graph.node_copy(node, copy_of)
        copy._rename(f"n{number}")  # of equal layers the code is equal
        if node.target is attend:
            query, new, _, scale = copy.args
            keys, values, slot, *mask = (arguments[one] for one in _kept(node, kinds, masked))
            copy.args = (query, new, (keys, values), slot, mask[0] if mask else None, scale)
    given = [node for node in nodes if not inside.issuperset(node.users)]
    graph.output(tuple(copies[node] for node in given))
    return Region(graph, tuple(arguments), tuple(Value(node.name) for node in given))


def _argument(draft: _Draft, node: fx.Node) -> Argument:
    """What a node is to a region that it lies outside of."""
    return draft.weight(str(node.target)) if node.op == "get_attr" else Value(node.name)


def _kept(node: fx.Node, kinds: Sequence[int], masked: bool) -> list[Kept]:
    """What a call of `attend` reads and writes of its layer's cache."""
    layer = node.args[2]
    assert isinstance(layer, int)
    kept = [Kept("keys", layer), Kept("values", layer), Kept("slot", kinds[layer])]
    return [*kept, Kept("mask", kinds[layer])] if masked else kept
