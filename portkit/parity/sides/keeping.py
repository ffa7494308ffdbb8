"""What a port keeps in its modules from one pass to the next, carried as a cache is.

A preallocated buffer, a counter, a list of keys: whatever a run changes in the port's modules
belongs to the chain of passes that it ran for. A comparison runs several chains in turn, freely,
taught and in float64, and each goes on from its own. Knows modules and plain objects; what is kept
in closures and globals is out of sight.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TORCHS_OWN = frozenset(vars(nn.Module()))
_OPAQUE = (nn.Module, nn.Parameter, type, types.ModuleType, types.FunctionType, types.MethodType)
_PLAIN = (int, float, bool, str, bytes, type(None), tuple, list, dict, Tensor)
Place = tuple[int, str]


@dataclass(frozen=True)
class _Value:
    """What stood at a place: the very object, and a copy of what was in it."""

    itself: Any
    copy: Any


@dataclass(frozen=True)
class Kept:
    """What a run left at the places that runs change."""

    values: dict[Place, _Value]
    owners: dict[Place, dict[str, Any]]


class KeptState:
    """The places of a model's modules that runs change, and what stood there at first."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._first: Kept | None = None
        self._seen: dict[Place, Any] = {}
        self._changing: set[Place] = set()

    @torch.no_grad()
    def restore(self, kept: Kept | None) -> None:
        """Have the modules hold what a run left, or None: what they held at first."""
        places = dict(self._places())
        if self._first is None:
            values = {one: _Value(own[one[1]], _copy(own[one[1]])) for one, own in places.items()}
            self._first = Kept(values, places)
        back = kept or self._first
        for place in self._changing:
            if place in back.values:
                owner, value = back.owners[place], back.values[place]
                owner[place[1]] = _put_back(value)
            elif place in places:
                places[place].pop(place[1], None)
        self._seen = {one: _mark(own[one[1]]) for one, own in self._places()}

    @torch.no_grad()
    def save(self) -> Kept | None:
        """What the run that ended left; None where no run has changed anything so far."""
        places = dict(self._places())
        now = {one: _mark(own[one[1]]) for one, own in places.items()}
        self._changing |= {one for one in now if now[one] != self._seen.get(one)}
        self._changing |= self._seen.keys() - now.keys()
        if not self._changing:
            return None
        owners = {one: own for one, own in places.items() if one in self._changing}
        return Kept(
            {one: _Value(own[one[1]], _copy(own[one[1]])) for one, own in owners.items()}, owners
        )

    def _places(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Each attribute that could hold something, and the dictionary that it stands in."""
        known: set[int] = set()
        for module in self._model.modules():
            own = {key: one for key, one in vars(module).items() if key not in _TORCHS_OWN}
            for held, names in ((vars(module), own), (module._buffers, module._buffers)):
                for name in [*names]:
                    yield (id(held), name), held
                    yield from _within(held[name], known)


def _within(value: Any, known: set[int]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The attributes of objects that an attribute holds, in lists too."""
    if isinstance(value, _OPAQUE) or id(value) in known:
        return
    if isinstance(value, (list, tuple, dict)):
        known.add(id(value))
        for one in value.values() if isinstance(value, dict) else value:
            yield from _within(one, known)
    elif not isinstance(value, _PLAIN) and isinstance(getattr(value, "__dict__", None), dict):
        known.add(id(value))
        held = vars(value)
        for name in [*held]:
            yield (id(held), name), held
            yield from _within(held[name], known)


def _mark(value: Any) -> Any:
    """What tells whether a value is still the same: cheap, and of tensors without reading them."""
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version, value.shape
    if isinstance(value, dict):
        return "dict", tuple((key, _mark(one)) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_mark, value))
    return value if isinstance(value, _PLAIN) else id(value)


def _copy(value: Any) -> Any:
    """Tensors copied, containers made anew, other objects as they are."""
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) else value.clone()
    if type(value) is dict:
        return {key: _copy(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copy, value))
    return value


def _put_back(value: _Value) -> Any:
    """The very object with what was in it; a copy where it cannot be written to."""
    itself, copy = value.itself, value.copy
    if isinstance(itself, Tensor) and not isinstance(itself, nn.Parameter):
        if itself.shape != copy.shape or itself.is_inference():
            return copy.clone()
        return itself.copy_(copy)
    if type(itself) is list:
        itself[:] = _copy(copy)
        return itself
    if type(itself) is dict:
        itself.clear()
        itself.update(_copy(copy))
        return itself
    return _copy(copy)
