"""Local errors: what each piece of a model makes of inputs that are the reference's own.

Everything is taught by the recording of one pass. `taught` compares each tensor of the running port
with it and then puts the recorded one in its place, so that an error shows where it is made and
nowhere else. `Blocks` runs embedding, layers, norm and head once more, one at a time and in
float64, on both sides: the reference's result is the truth, the port's tells whether it computes
the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from portkit.parity.precision import in_float64
from portkit.parity.sites import QKV, Side, SiteTable, Visit, watching

Trace = dict[str, Tensor]
HEAD_ROWS = 32_768
"""Rows of a large head that are held in float64 at a time."""


def recorder(trace: Trace) -> Visit:
    """A visitor that keeps a clone of everything: in-place operations may follow."""
    shared: dict[int, tuple[Tensor, int, Tensor]] = {}

    def visit(name: str, tensor: Tensor) -> Tensor:
        known = shared.get(id(tensor))
        # One tensor is often several sites in a row, as a norm's output is three inputs.
        if known is None or known[0] is not tensor or known[1] != tensor._version:
            if len(shared) > 4:
                shared.clear()
            known = shared[id(tensor)] = tensor, tensor._version, tensor.clone()
        trace[name] = known[2]
        return tensor

    return visit


def taught(trace: Trace, compare: Callable[[str, Tensor, Tensor], None]) -> Visit:
    """A visitor that compares (name, ours, recorded), and goes on with the recorded tensor."""

    def visit(name: str, tensor: Tensor) -> Tensor:
        recorded = trace.get(name)
        if recorded is None:
            return tensor
        compare(name, tensor, recorded)
        if tensor.dtype == recorded.dtype and tensor.shape == recorded.shape:
            # Unequal or not, the recorded one goes on; where equal that is the tensor itself.
            return tensor if torch.equal(tensor, recorded) else recorded.clone()
        return recorded.to(tensor.dtype) if recorded.is_floating_point() else recorded

    return visit


def looked_at(trace: Trace, look: Callable[[str, Tensor, Tensor], None]) -> Visit:
    """A visitor that compares and changes nothing."""

    def visit(name: str, tensor: Tensor) -> Tensor:
        if name in trace:
            look(name, tensor, trace[name])
        return tensor

    return visit


@dataclass
class Call:
    """How a module was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Calls:
    """The calls of a side's blocks in one pass, and of its rotary tables."""

    blocks: dict[str, Call] = field(default_factory=dict)
    tables: list[tuple[nn.Module, Call]] = field(default_factory=list)


def block_modules(side: Side, table: SiteTable) -> dict[str, nn.Module]:
    """The outermost declared modules, which a pass runs one after the other."""
    declared = {n: m for n, m in side.module_sites().items() if table.dims(n) is not None}
    return {
        name: module
        for name, module in declared.items()
        if not any(name.startswith(f"{other}.") for other in declared)
    }


@contextmanager
def calls_kept(side: Side, table: SiteTable) -> Iterator[Calls]:
    """Keep how the blocks are called while a model runs."""
    calls = Calls()
    with ExitStack() as stack:
        for name, module in block_modules(side, table).items():

            def keep(
                _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
            ) -> None:
                calls.blocks[name] = Call(args, dict(kwargs))

            handle = module.register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(handle.remove)
        for module in (m for m in side.module_sites().values() if hasattr(m, "inv_freq")):

            def keep_table(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
            ) -> None:
                calls.tables.append((module, Call(args, dict(kwargs))))

            handle = module.register_forward_pre_hook(keep_table, with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


class Taught64:
    """One side's blocks in float64, each fed with what was recorded in the dtype under test."""

    def __init__(self, side: Side, table: SiteTable, trace: Trace, calls: Calls) -> None:
        self.side, self.table, self.trace, self.calls = side, table, trace, calls
        self.modules = block_modules(side, table)

    def tables(self) -> Trace:
        """The rotary tables in float64, from the frequencies as held."""
        found: Trace = {}
        with self.side.watch_tables(recorder(found)):
            for module, call in self.calls.tables:
                with in_float64(module):
                    module(
                        *map(_upcast, call.args), **{k: _upcast(v) for k, v in call.kwargs.items()}
                    )
        return found

    def block(self, name: str) -> Trace:
        """What every site within a block makes of the recorded inputs, in float64."""
        module, call = self.modules[name], self.calls.blocks[name]
        if isinstance(module, nn.Embedding):
            return {name: _embed(module, call.args[0])}
        found: Trace = {}

        def visit(site: str, tensor: Tensor) -> Tensor:
            found[site] = tensor
            recorded = self.trace.get(site)
            return tensor if recorded is None else _upcast(recorded)

        past = _TaughtCache(name, self.trace)
        with watching(_Within(self.side, name), self.table, visit), in_float64(module):
            module(
                *(_upcast(past if hasattr(one, "update") else one) for one in call.args),
                **{
                    key: _upcast(past if key == "past_key_values" and one is not None else one)
                    for key, one in call.kwargs.items()
                },
            )
        return found

    def head_blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """The head in float64, `HEAD_ROWS` of the vocabulary at a time."""
        module = self.modules[name]
        assert isinstance(module, nn.Linear)
        hidden = self.trace[f"{name}:in"].double()
        held = module.weight.data
        for start in range(0, len(held), HEAD_ROWS):
            rows = slice(start, min(start + HEAD_ROWS, len(held)))
            try:
                module.weight.data = held[rows].double()
                with torch.no_grad():
                    yield rows, module(hidden)
            finally:
                module.weight.data = held


class _Within:
    """A side of which only the modules of one block are watched."""

    def __init__(self, side: Side, block: str) -> None:
        self._side, self._block = side, block
        self.watch_attention = side.watch_attention

    def module_sites(self) -> Mapping[str, nn.Module]:
        return {
            name: module
            for name, module in self._side.module_sites().items()
            if name == self._block or name.startswith(f"{self._block}.")
        }

    @contextmanager
    def watch_tables(self, _: Visit) -> Iterator[None]:
        yield


class _TaughtCache:
    """Stands in for either side's cache: gives back the recorded past, followed by what is new."""

    def __init__(self, block: str, trace: Trace) -> None:
        # Upcast before casts are watched: it is not the model that does it.
        self._key, self._value = (
            None if (held := trace.get(f"{block}.self_attn#{role}")) is None else held.double()
            for role in QKV[1:]
        )

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self._key is not None, "a layer with a cache has keys"
        assert self._value is not None, "a layer with a cache has values"
        past = self._key.shape[2] - key.shape[2]
        return (
            torch.cat((self._key[:, :, :past], key), 2),
            torch.cat((self._value[:, :, :past], value), 2),
        )


def _embed(module: nn.Embedding, input_ids: Tensor) -> Tensor:
    """An embedding in float64 of the rows that are used: the whole would be gigabytes."""
    used, places = torch.unique(input_ids, return_inverse=True)
    held, padding_idx = module.weight.data, module.padding_idx
    try:
        module.weight.data, module.padding_idx = held[used], None
        with in_float64(module):
            embedded: Tensor = module(places)
            return embedded
    finally:
        module.weight.data, module.padding_idx = held, padding_idx


def _upcast(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, tuple):
        return tuple(map(_upcast, value))
    return value
