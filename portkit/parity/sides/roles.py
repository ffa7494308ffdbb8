"""How modules and their methods are called: which of what they are given are sites, by role.

Knows Python's signatures and no model. A method that a family declares as a point, as in
`model.layers.3.altup#predict`, is watched as modules are, on whichever side has it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from portkit.nn.moe import ByChoice

Visit = Callable[[str, Tensor], Tensor]
"""What somebody makes of a site's tensor, by its name; the model goes on with what is returned."""


@cache
def _positional(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)


class Roles:
    """Which arguments of a call are observed, by role and not by place.

    The first tensor is the input; rotary tables come as `cos` and `sin`, or as a pair called
    `position_embeddings`; other tensors by their own names, where the family declares them. Masks
    and token ids are observed elsewhere. What comes beside a choice, as weights beside the experts
    that they are of, is seen in ascending order of what is chosen: the order in which a top-k gives
    its choice is no part of it, and differs by dtype.
    """

    def __init__(self, module: nn.Module, method: str = "forward") -> None:
        own = vars(module).get(method)
        of_class = getattr(type(module), method)
        try:
            self._names = _positional(of_class)[1:] if own is None else _positional(own)
        except (TypeError, ValueError):  # something built in
            self._names = ()

    def visit(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], visit: Visit
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # What a bare *args takes goes by its place.
        places = map(str, range(len(args)))
        named = dict(
            zip(self._names if len(self._names) >= len(args) else places, args, strict=False)
        )
        first = True
        choices = _choices([*named.values(), *kwargs.values()])
        for key, value in [*named.items(), *kwargs.items()]:
            new = value
            if key == "position_embeddings":
                new = visit_tables(value, lambda role, table: visit(f".{role}", table))
            elif isinstance(value, ByChoice):
                new, first = visit_choices("", visit, value), False
            elif isinstance(value, Tensor) and value.is_floating_point() and "mask" not in key:
                role = "" if first and key not in {"cos", "sin"} else f".{key}"
                order = choices.get(value.shape)
                new = visit(role, value) if order is None else _visit_by(order, role, visit, value)
                first = first and role != ""
            if key in kwargs:
                kwargs[key] = new
            else:
                named[key] = new
        return tuple(named.values()), kwargs


def _choices(values: Sequence[Any]) -> dict[torch.Size, Tensor]:
    """The order that sorts each choice among some arguments, by its shape (tokens, chosen).

    A choice is whole numbers of which none comes twice in a row.
    """
    found = {}
    for value in values:
        is_whole = isinstance(value, Tensor) and value.dtype in {torch.int32, torch.int64}
        if is_whole and value.dim() > 1:
            chosen, order = value.sort(-1)
            if bool((chosen.diff(dim=-1) > 0).all()):
                found[value.shape] = order
    return found


def _visit_by(order: Tensor, role: str, visit: Visit, value: Tensor) -> Tensor:
    """Visit in another order along the last dimension; the module goes on in its own."""
    sorted_ = value.gather(-1, order)
    seen = visit(role, sorted_)
    return value if seen is sorted_ else seen.scatter(-1, order, seen)


def visit_value(name: str, value: Any, visit: Visit) -> Any:
    """Visit the tensors of what a module or a method returns; whatever else is there stays.

    The first has the module's own name; another one of a tuple is `…:out.1`, by its number, and of
    an output object `…:out.attentions`, by its field.
    """
    first = True

    def seen(path: str, each: Any) -> Any:
        nonlocal first
        if isinstance(each, Tensor):
            site, first = name if first else f"{name}:out{path}", False
            return visit(site, each)
        if type(each) in (tuple, list):
            return type(each)(seen(f"{path}.{n}", one) for n, one in enumerate(each))
        return each

    if isinstance(value, Mapping):  # an output object: a field may be set, and no other is known
        for field, each in list(value.items()):
            new = seen(f".{field}", each)
            if new is not each:
                value[field] = new  # type: ignore[index]  # a mapping that can be written to
        return value
    return seen("", value)


def visit_choices(name: str, visit: Visit, chosen: ByChoice) -> ByChoice:
    """Visit what each token has for each expert, as expert after expert, zero where not chosen."""
    everywhere = chosen.everywhere()
    seen = visit(name, everywhere)
    return chosen if seen is everywhere else chosen.taken_from(seen)


def visit_tables(tables: Any, visit: Visit) -> Any:
    """Visit rotary tables as `cos` and `sin`, whether they are a pair or one complex tensor."""
    if isinstance(tables, Tensor):
        cos, sin = tables.real.contiguous(), tables.imag.contiguous()
        return torch.complex(visit("cos", cos), visit("sin", sin))
    cos, sin = tables
    return visit("cos", cos), visit("sin", sin)


def public_methods(module: nn.Module) -> Iterator[str]:
    """What a module's class defines beside `forward`; torch's own are no model's."""
    if type(module).__module__.startswith("torch."):
        return
    for name, value in vars(type(module)).items():
        if inspect.isfunction(value) and name != "forward" and not name.startswith("_"):
            yield name


@contextmanager
def method_watched(name: str, module: nn.Module, method: str, visit: Visit) -> Iterator[None]:
    """Visit what a method of the module `name` is given, and what it returns."""
    call, roles, site = getattr(module, method), Roles(module, method), f"{name}#{method}"

    @wraps(call)  # some code looks at how many arguments a method takes
    def watched(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = roles.visit(
            args, kwargs, lambda role, tensor: visit(f"{site}:in{role}", tensor)
        )
        return visit_value(site, call(*args, **kwargs), visit)

    before = vars(module).get(method)  # somebody may have given this module one of its own
    setattr(module, method, watched)
    try:
        yield
    finally:
        delattr(module, method)
        if before is not None:
            setattr(module, method, before)
