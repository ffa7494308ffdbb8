"""Local errors: what each piece of a model makes of inputs that are the reference's own.

Everything is taught by the recording of one pass. `taught` compares each tensor of the running port
with it and then puts the recorded one in its place, so that an error shows where it is made and
nowhere else. How the blocks of a model were called is kept, so that `truth` can call them again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from portkit.parity.probes.probe import Pass
from portkit.parity.sides.roles import Visit
from portkit.parity.sides.sites import Side, SiteTable

Trace = dict[str, Tensor]


def recorder(trace: Trace) -> Visit:
    """A visitor that keeps a clone of everything: in-place operations may follow."""
    known: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    # No function here calls itself: it would hold all that it has cloned until a collection.
    def cloned(tensor: Tensor) -> Tensor:
        found = known.get(id(tensor))
        if found is None or found[0]() is not tensor or found[1] != tensor._version:
            found = known[id(tensor)] = weakref.ref(tensor), tensor._version, tensor.clone()
        return found[2]

    def visit(name: str, tensor: Tensor) -> Tensor:
        # One tensor is often several sites, as a norm's output is three inputs.
        base = tensor._base
        if base is not None and base.dtype != tensor.dtype:
            base = None  # real and imaginary parts of it, side by side
        if base is not None and (whole := cloned(base)).stride() == base.stride():
            offset = tensor.storage_offset() - base.storage_offset()
            trace[name] = whole.as_strided(tensor.shape, tensor.stride(), offset)
        else:
            trace[name] = cloned(tensor)
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
        return in_place_of(tensor, recorded)

    return visit


def in_place_of(tensor: Tensor, recorded: Tensor) -> Tensor:
    """The recorded tensor as it can stand in the place of `tensor`, in its dtype; else `tensor`.

    A mask that is one for all rows stands for each row's. Nothing of another shape is ever put in.
    """
    if tensor.is_floating_point() != recorded.is_floating_point():
        return tensor
    if tensor.shape != recorded.shape:
        if tensor.dim() != recorded.dim() or not _stretches(recorded, tensor):
            return tensor
        recorded = recorded.expand_as(tensor)
    return recorded.to(tensor.dtype) if recorded.is_floating_point() else recorded


def _stretches(recorded: Tensor, tensor: Tensor) -> bool:
    """Whether one is the other but for rows that it has once for all."""
    return all(
        a == b or (a == 1 and place == 0)
        for place, (a, b) in enumerate(zip(recorded.shape, tensor.shape, strict=True))
    )


def looked_at(trace: Trace, look: Callable[[str, Tensor, Tensor], None]) -> Visit:
    """A visitor that compares and changes nothing."""

    def visit(name: str, tensor: Tensor) -> Tensor:
        if name in trace:
            look(name, tensor, trace[name])
        return tensor

    return visit


def fitted(trace: Trace, visit: Visit) -> Visit:
    """A visitor that is shown tensors as they are recorded, where dimensions at the end are one.

    Rotary tables that a module is given in another form are its own affair.
    """

    def shaped(name: str, tensor: Tensor) -> Tensor:
        recorded = trace.get(name)
        if recorded is not None and ":in." in name and tensor.shape != recorded.shape:
            return tensor
        if (
            recorded is None
            or tensor.dim() == recorded.dim()
            or tensor.shape[:2] != recorded.shape[:2]
            or tensor.numel() != recorded.numel()
        ):
            return visit(name, tensor)
        shown = tensor.reshape(recorded.shape)
        seen = visit(name, shown)
        return tensor if seen is shown else seen.reshape(tensor.shape)

    return shaped


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


@dataclass
class Recording:
    """One pass: what the reference had, and where the taught port had something else."""

    run: Pass
    trace: Trace
    reference_calls: Calls
    port_calls: Calls
    num_past: int
    """Tokens before this pass."""
    unequal: Trace = field(default_factory=dict)
    misshapen: Trace = field(default_factory=dict)
    """What the taught port had in another shape or dtype."""
    apart: Trace = field(default_factory=dict)
    """Some rows of the port in float64, where nothing but float64 shows how it differs."""
    seen: set[str] = field(default_factory=set)
    """Sites that the port has too."""
    by_token: Trace = field(default_factory=dict)
    """`token_sums` of the sites in `unequal`, as far as they were held against the truth."""


def block_modules(side: Side, table: SiteTable) -> dict[str, nn.Module]:
    """The outermost modules that are sites, which a pass runs one after the other.

    What holds a list of layers is run through and is no block; its layers are.
    """
    modules = side.module_sites()
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    outer = [one for one in lists if not any(one.startswith(f"{each}.") for each in lists)]
    through = {one[:end] for one in outer for end, c in enumerate(one) if c == "."} | {""}
    declared = {
        name: module
        for name, module in modules.items()
        if name not in through and table.dims(name) is not None
    }

    def is_outermost(name: str) -> bool:
        return not any(c == "." and name[:end] in declared for end, c in enumerate(name))

    return {name: module for name, module in declared.items() if is_outermost(name)}


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
        for module in side.table_modules().values():

            def keep_table(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
            ) -> None:
                calls.tables.append((module, Call(args, dict(kwargs))))

            handle = module.register_forward_pre_hook(keep_table, with_kwargs=True)
            stack.callback(handle.remove)
        yield calls
