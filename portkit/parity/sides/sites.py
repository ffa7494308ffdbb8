"""Sites: the named tensors of a forward pass, and a way to stand at each of them.

`watching(side, visit)` runs a model with a visitor at every site, in order of execution. A visitor
is given a site's name and tensor and returns the tensor to go on with: the same one to look on,
another one to put it in its place. Recording, comparing, and "compare, then replace by the
reference's" are three visitors of one mechanism, on either side.

A site is a module's output (`model.layers.3.mlp`), a module's input (`…:in`, `…:in.cos`), or a
functional point (`model.layers.3.self_attn#query`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from portkit.parity.probes.probe import Pass
from portkit.parity.sides.attention import QKV
from portkit.parity.sides.roles import (
    Roles,
    Visit,
    method_watched,
    public_methods,
    visit_tables,
    visit_value,
)

AGAIN = "@"
"""`…router_norm@2` is the second call of a module in one pass, in order of execution."""
LOGITS = "#logits"
"""The site that every model has: what it returns."""
_HEADS = "batch head position channel"
POINTS = {
    **dict.fromkeys(QKV, _HEADS),
    "mask": "batch one query key",
    "context": "batch position head channel",
    "experts": "batch position expert",
}
"""Functional points and their dimensions, which are the interface's and no model's."""
_TABLES = ("cos", "sin")
ROTARY = "rotary_emb"
"""What the module that makes rotary tables is called."""
KERNEL = ".attend"
"""Our models' attention kernel, a module of its own."""


class CannotRun(Exception):
    """A side does not run a pass; says why. That pass is not verified."""


class Watched(Protocol):
    """What can be watched while it runs."""

    def module_sites(self) -> Mapping[str, nn.Module]:
        """Modules by the text-only reference's names."""
        ...

    def visit_output(self, name: str, output: Any, visit: Visit) -> Any:
        """Visit what a module returns: its first tensor, or a router's logits and choice."""
        ...

    def watch_attention(self, visit: Visit) -> Any:
        """A context in which `#query`, `#key`, `#value`, `#mask` and `#context` are visited."""
        ...

    def watch_tables(self, visit: Visit) -> Any:
        """A context in which the rotary tables are visited."""
        ...

    def table_modules(self) -> Mapping[str, nn.Module]:
        """The modules that make the rotary tables, which depend on positions alone."""
        ...

    def points_of(self, name: str) -> bool:
        """Whether a module is no site of its own: its functional points are."""
        ...


class Side(Watched, Protocol):
    """A model that can be run and watched, as the port or as the reference."""

    @property
    def attention(self) -> str:
        """The name of the attention kernel that runs."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What its activations are in."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is run, and where its passes have to be."""
        ...

    @property
    def is_partial(self) -> bool:
        """It may do without modules and points of the reference; what it lacks is not verified."""
        ...

    @property
    def takes_positions(self) -> bool:
        """It can be told positions; else it counts."""
        ...

    @property
    def model(self) -> nn.Module | None:
        """What holds all its parameters, if one module does."""
        ...

    def run(self, one: Pass, caches: dict[str, Any]) -> Tensor:
        """One pass's logits (batch, tokens, vocab_size), of the last tokens where it says so.

        `caches` holds what earlier passes left, by their names, and takes what this one leaves.
        Raises `CannotRun` where the side is partial and does not run such a pass.
        """
        ...

    def parameters(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Parameters by the other side's names, those that there are."""
        ...

    def plain_experts(self) -> Any:
        """A context in which experts run in the form that takes float64."""
        ...

    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        """Its own attention kernels: (module, query, key, value, mask, …) each."""
        ...

    def other_kernel(self) -> Any:
        """A context in which it runs with the attention kernel that was not asked for, if any."""
        ...


def parameters_of(side: Watched) -> dict[str, nn.Parameter]:
    """A side's parameters by its sites' names, a tied one under each of its names."""
    return {
        f"{name}.{own}": parameter
        for name, module in side.module_sites().items()
        for own, parameter in module.named_parameters(recurse=False)
    }


def weights_of(side: Watched) -> dict[str, Tensor]:
    """Its parameters, and buffers that are stored like them, as a router's correction bias."""
    stored = {
        f"{name}.{own}": buffer
        for name, module in side.module_sites().items()
        for own, buffer in module.named_buffers(recurse=False)
        if own not in module._non_persistent_buffers_set
    }
    return {**parameters_of(side), **stored}


def kind_of(name: str) -> str:
    """A site's or a module's name with its numbers left open: the same for each layer's."""
    return _NUMBER.sub("*", name)


class SiteTable:
    """The sites of a subject: which names are observed, and what their dimensions are.

    `dims` by name, in order of execution.
    """

    def __init__(self, dims: Mapping[str, str]) -> None:
        self._dims = {**dims, LOGITS: dims.get(LOGITS, "batch position vocabulary")}
        self._points = {name.partition(":")[0].partition("#")[2] for name in dims if "#" in name}

    def __len__(self) -> int:
        return len(self._dims)

    @property
    def names(self) -> tuple[str, ...]:
        """All sites, in order of execution."""
        return tuple(self._dims)

    def dims(self, name: str) -> str | None:
        """The dimensions of a site; None where there is none.

        A module called again in a pass has those of its first call.
        """
        if AGAIN in name:
            base, _, role = name.partition(":")
            name = base.partition(AGAIN)[0] + (f":{role}" if role else "")
        return self._dims.get(name)

    def has_tables(self, module: str) -> bool:
        """Whether a module makes rotary tables, which are sites of what it stands in."""
        place = tables_of(module, "cos")
        return module.endswith(ROTARY) and any(name.startswith(place) for name in self._dims)

    def is_point(self, word: str) -> bool:
        """Whether some functional point is called so."""
        return word in self._points

    def of_layers(self, layers: range | None) -> SiteTable:
        """The sites within some layers; None: all."""
        if layers is None:
            return self
        return self._only(lambda name: layer_of(name) in layers)

    def shown_by(self, side: Watched) -> SiteTable:
        """The sites at which `side` can be watched too: of the kinds of modules that it has.

        One of a kind that it lacks, as a layer, is missing there. Points that it makes itself, as
        attention's, are left to it; of methods it has those that some module of the kind has.
        """
        methods: defaultdict[str, set[str]] = defaultdict(set)
        for name, module in side.module_sites().items():
            methods[kind_of(name)].update(public_methods(module))

        def is_shown(name: str) -> bool:
            base, _, point = name.partition(":")[0].partition("#")
            if point.partition(".")[0] in {*POINTS, *_TABLES}:
                return True
            kind = kind_of(base)
            return kind in methods and (not point or point in methods[kind])

        return self._only(lambda name: name == LOGITS or is_shown(name))

    def _only(self, holds: Callable[[str], bool]) -> SiteTable:
        found = SiteTable({})
        found._dims = {name: dims for name, dims in self._dims.items() if holds(name)}
        found._points = self._points
        return found


def layer_of(name: str) -> int | None:
    """The number of the layer that a site or a module is in: the first number in its name."""
    number = next((part for part in re.split(r"[.#:]", name) if part.isdigit()), None)
    return None if number is None else int(number)


def tables_of(module: str, role: str) -> str:
    """`model.rotary_emb` and `cos` to `model#cos`."""
    return f"{module.removesuffix(ROTARY).removesuffix('.')}#{role}"


class _Everything(SiteTable):
    """Has every name, and knows no dimensions: to find out which there are."""

    def __init__(self) -> None:
        super().__init__({})

    def dims(self, name: str) -> str | None:
        return ""

    def is_point(self, word: str) -> bool:
        return True


EVERYTHING = _Everything()


@contextmanager
def watching(side: Watched, table: SiteTable, visit: Visit) -> Iterator[None]:
    """Have `visit` called at every declared site while a model of `side` runs."""

    def declared(name: str, tensor: Tensor) -> Tensor:
        return visit(name, tensor) if table.dims(name) is not None else tensor

    with ExitStack() as stack:
        tables = side.table_modules()
        for name, module in side.module_sites().items():
            if not name or name in tables or side.points_of(name):
                continue
            if table.dims(name) is not None:
                for handle in _hooks(side, name, module, declared):
                    stack.callback(handle.remove)
            for word in filter(table.is_point, public_methods(module)):
                if table.dims(f"{name}#{word}") is not None:
                    stack.enter_context(method_watched(name, module, word, declared))
        stack.enter_context(side.watch_attention(declared))
        stack.enter_context(side.watch_tables(declared))
        yield


def _hooks(side: Watched, name: str, module: nn.Module, visit: Visit) -> list[Any]:
    roles, called = Roles(module), count(1)
    this = name

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal this
        number = next(called)
        this = name if number == 1 else f"{name}{AGAIN}{number}"
        return roles.visit(args, kwargs, lambda role, tensor: visit(f"{this}:in{role}", tensor))

    def after(_: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], output: Any) -> Any:
        return side.visit_output(this, output, visit)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


_NUMBER = re.compile(r"(?<=\.)\d+(?=[.#:@]|$)|(?<=@)\d+")


@contextmanager
def watch_tables_of(modules: Mapping[str, nn.Module], visit: Visit) -> Iterator[None]:
    """Have rotary tables visited, by layer type where a module is told of one at its call."""
    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(_tables_told(name, visit), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _tables_told(name: str, visit: Visit) -> Callable[..., Any]:
    def after(_: nn.Module, args: Any, kwargs: dict[str, Any], tables: Any) -> Any:
        kinds = [one for one in (*args, *kwargs.values()) if isinstance(one, str)]
        suffix = f".{kinds[0]}" if kinds else ""
        is_pair = isinstance(tables, tuple) and len(tables) == 2
        if not is_pair and not (isinstance(tables, Tensor) and tables.is_complex()):
            return visit_value(name, tables, visit)
        return visit_tables(tables, lambda role, one: visit(tables_of(name, role) + suffix, one))

    return after
