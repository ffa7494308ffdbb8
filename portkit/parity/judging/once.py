"""Heavy operations that two sides ask for in the same words of the same tensors, computed once.

In the truth a port and its reference are given the same inputs and hold the same weights, so most
of their matrix products are one: same operation, same memory, same layout. What the first has
computed is given to the second. Anything else, a copy of equal values too, is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
HEAVY = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.gelu.default,
        _aten.silu.default,
        _aten.tanh.default,
        _aten._softmax.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
"""Functions of their arguments alone that cost more than to look them up."""


class ComputedOnce:
    """Results not yet asked for a second time; each keeps its operands: their memory is their own.

    A result is given once: there are two sides. `kept` are tensors that somebody goes on to read:
    they may be results, or operands, that the second side is given too.
    """

    def __init__(self, kept: dict[str, Tensor] | None = None) -> None:
        self._results: dict[tuple[Any, ...], tuple[tuple[Tensor, ...], Any]] = {}
        self._kept = {} if kept is None else kept

    def __len__(self) -> int:
        """How many results are waiting."""
        return len(self._results)

    def call(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """What `function`, one of `HEAVY`, makes of these."""
        key = (function, *map(_identity, args), *((k, _identity(v)) for k, v in kwargs.items()))
        waiting = self._results.pop(key, None)
        if waiting is not None:
            return waiting[1]
        result = function(*args, **kwargs)
        self._results[key] = (tuple(map(_whole, _tensors((*args, *kwargs.values())))), result)
        return result

    def before_change(self, tensors: Sequence[Tensor]) -> None:
        """These are about to be changed in place, and whatever shares their memory with them.

        Results that it touches are forgotten; of what is kept a copy is kept.
        """
        changed = {_storage(one) for one in tensors}
        for key, (operands, result) in [*self._results.items()]:
            if not changed.isdisjoint(map(_storage, _tensors((operands, result)))):
                del self._results[key]
        for name, one in self._kept.items():
            if _storage(one) in changed:
                self._kept[name] = one.clone()


def _identity(value: Any) -> Any:
    """Equal for the same memory, read in the same way."""
    if isinstance(value, Tensor):
        return value.data_ptr(), value.dtype, value.shape, value.stride(), value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(_identity, value))
    return value


def _whole(tensor: Tensor) -> Tensor:
    """What it is a view of, as that very object: somebody may know it by a weak reference."""
    return tensor if tensor._base is None else tensor._base


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [each for one in value for each in _tensors(one)]
    return [value] if isinstance(value, Tensor) else []
