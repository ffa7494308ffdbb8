"""What a model does with one new token, as a graph: a family's own code, run once on no data.

The model's modules run on the meta device with proxies that know their shapes, so that Python
decides everything that can be decided beforehand. What remains are torch functions, parameters,
rotary tables and, in place of cache and kernel together, `attend`. Knows `portkit.nn`; knows no
family, and nothing of speed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from portkit.architecture import CausalLM
from portkit.decoding.operations import attend
from portkit.nn.attention import KERNELS
from portkit.nn.cache import Cache, ChunkedCache, LayerCache
from portkit.nn.moe import ExpertsByChoice, GatedExperts
from portkit.nn.rope import RotaryEmbedding

BLOCK = "block"
"""Key in a node's `meta`: which of the model's layers it belongs to; absent outside of them."""


@dataclass(frozen=True)
class StepGraphs:
    """`hidden` takes token ids (batch, 1) and positions (batch, 1) to what the head reads;
    `logits` takes that, (batch, 1, hidden_size), to logits.

    In `hidden`, calls of `attend` lack the cache's arguments: the third is the layer's number.
    """

    hidden: fx.Graph
    logits: fx.Graph
    modules: dict[str, nn.Module]


class Untraceable(Exception):
    """A family's code does with a token what cannot be told beforehand."""


def trace_step(model: CausalLM, batch: int) -> StepGraphs:
    """Trace one decode step of `batch` rows. Raises Untraceable, with the reason."""
    if any(isinstance(layer, ChunkedCache) for layer in model.new_cache(batch, 1).layers):
        raise Untraceable("what a token sees of its past depends on where its chunk begins")
    if any(isinstance(one, (ExpertsByChoice, GatedExperts)) for one in model.modules()):
        raise Untraceable("which experts run is told by a value")
    try:
        return _trace_step(model, batch)
    except Exception as error:  # whatever a family's code raises on proxies
        raise Untraceable(f"{type(error).__name__}: {error}") from error


def _trace_step(model: CausalLM, batch: int) -> StepGraphs:
    ids = torch.zeros(batch, 1, dtype=torch.int64, device="meta")
    dtype = next(model.parameters()).dtype
    hidden = torch.empty(batch, 1, model.config.hidden_size, dtype=dtype, device="meta")
    with torch.no_grad():
        return StepGraphs(
            _trace(_Hidden(model, batch), {"input_ids": ids, "positions": ids}, model),
            _trace(_Logits(model), {"hidden_states": hidden}, model),
            dict(model.named_modules()),
        )


class _Hidden(nn.Module):
    def __init__(self, model: CausalLM, batch: int) -> None:
        super().__init__()
        self.lm = model
        layers = range(len(model.new_cache(batch, 1).layers))
        self.cache = Cache(batch, cast("list[LayerCache]", [_Shown(layer) for layer in layers]))

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.lm.hidden_states(input_ids, positions, self.cache)


class _Logits(nn.Module):
    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.lm = model

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.lm.logits(hidden_states)


class _Shown:
    """A layer's cache while tracing: notes which layer's keys they are that attention reads."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def update(self, keys: fx.Proxy, values: fx.Proxy) -> tuple[fx.Proxy, fx.Proxy]:
        keys.node.meta["shown"] = values.node.meta["shown"] = self.layer
        return keys, values


class _ShapedProxy(fx.Proxy):
    """A proxy with its value on the meta device: shapes and dtypes are concrete."""

    value: Any

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "device", "ndim"):
            return getattr(self.value, name)
        return super().__getattr__(name)

    def __iter__(self) -> Iterator[Any]:
        return (operator.getitem(self, index) for index in range(len(self)))

    def __len__(self) -> int:
        return len(self.value)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, model: CausalLM, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self._inputs = inputs
        self._held: dict[str, Tensor] = {}
        self._blocks = _block_numbers(model)
        self._block: int | None = None

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        # Beforehand: while tracing, an attribute of a module is a proxy.
        self._held = dict(root.named_parameters(remove_duplicate=False))
        self._held |= dict(root.named_buffers(remove_duplicate=False))
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (RotaryEmbedding, *_KERNEL_CLASSES))

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if isinstance(m, _KERNEL_CLASSES):
            query, key, value, mask = args
            assert mask is None, "a single token sees all that is shown to it"
            layer = key.node.meta["shown"]
            assert layer == value.node.meta["shown"], "keys and values of two layers"
            return self.create_proxy(
                "call_function", attend, (query, (key, value), layer, m.scale), {}
            )
        outer, self._block = self._block, self._blocks.get(m, self._block)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._block = outer

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if self._block is not None:
            node.meta[BLOCK] = self._block
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ShapedProxy(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any
    ) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **options)
        value = self._evaluate(kind, target, args, kwargs)
        if kind != "output" and not isinstance(value, (Tensor, tuple, list)):
            return value  # a number that Python goes on with; the node is dead
        assert isinstance(proxy, _ShapedProxy)
        proxy.value = value
        return proxy

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return self._inputs[target]
        if kind == "output":
            return None
        if kind == "get_attr":
            return self._held[target].to("meta")
        args = fx.node.map_aggregate(args, _value_of)
        kwargs = fx.node.map_aggregate(kwargs, _value_of)
        if kind == "call_function":
            return _shape_of_attention(*args) if target is attend else target(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        module = self.root.get_submodule(target)
        return type(module).forward(module, *args, **kwargs)


_KERNEL_CLASSES = tuple(cast("dict[str, type[nn.Module]]", KERNELS).values())


def _trace(root: nn.Module, inputs: dict[str, Tensor], model: CausalLM) -> fx.Graph:
    graph = _Tracer(model, inputs).trace(root)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    prefix = "lm."
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            assert node.target.startswith(prefix), f"{node.target} is not the model's"
            node.target = node.target.removeprefix(prefix)
    return graph


def _block_numbers(model: CausalLM) -> dict[nn.Module, int]:
    """The model's layers and their numbers: the one list of as many modules as there are layers."""
    num_layers = model.config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    assert len(lists) == 1, "a model keeps its layers in one list"
    return {block: number for number, block in enumerate(lists[0])}


def _value_of(argument: Any) -> Any:
    return argument.value if isinstance(argument, _ShapedProxy) else argument


def _shape_of_attention(query: Tensor, *_: Any) -> Tensor:
    return query.transpose(1, 2).contiguous()
