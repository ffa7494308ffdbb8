"""Float64 as the truth: a module run with its parameters as held, and its down-casts lifted.

An implementation casts to float32 and back in its own code. Run on float64 activations those casts
would throw away what the truth is wanted for, so they are intercepted while it runs. Interception
works under `no_grad`; under `inference_mode` nothing would be intercepted, silently.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from portkit.parity.judging.once import HEAVY, ComputedOnce

LOW = frozenset({torch.float32, torch.bfloat16, torch.float16})


class UnliftedCast(RuntimeError):
    """Something computed in low precision although the truth was asked for."""


class LiftedCasts(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Turns casts to a lower floating dtype into casts to float64.

    Any other operation that makes a lower precision out of float64 is refused. Constants may come
    in as they are held: what is computed with them is float64 again. `once` is where heavy
    operations are looked up.
    """

    def __init__(self, once: ComputedOnce | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._once = once

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in LOW:
            kwargs = {**kwargs, "dtype": torch.float64}
        if self._once is not None and func in HEAVY:
            result = self._once.call(func, args, kwargs)
        else:
            if self._once is not None and _changes_in_place(func):
                self._once.before_change([*_tensors((*args, *kwargs.values()))])
            result = func(*args, **kwargs)
        low = next((one.dtype for one in _tensors((result,)) if one.dtype in LOW), None)
        if low is not None and any(
            one.dtype == torch.float64 for one in _tensors((*args, *kwargs.values()))
        ):
            raise UnliftedCast(f"{func} computed in {low} where the truth was asked for")
        return result


@cache
def _changes_in_place(operation: Any) -> bool:
    return bool(operation._schema.is_mutable)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


@contextmanager
def casts_lifted(once: ComputedOnce | None = None) -> Iterator[None]:
    """Have what runs within compute in float64 whatever it is given in float64."""
    assert not torch.is_inference_mode_enabled(), "inference_mode hides casts from interception"
    with torch.no_grad(), LiftedCasts(once):
        yield


@contextmanager
def held_in_float64(*modules: nn.Module) -> Iterator[None]:
    """Hold the modules' parameters and buffers in float64, then as before.

    They keep the values that they were rounded to: it is the arithmetic that is to be exact. Of
    two modules' tensors that have one name and equal values one float64 copy is made.
    """
    held = [
        (name, one)
        for module in modules
        for name, one in (*module.named_parameters(), *module.named_buffers())
        if one.dtype in LOW
    ]
    before = [one.data for _, one in held]
    wide: defaultdict[str, _Upcasts] = defaultdict(_Upcasts)
    try:
        for (name, one), narrow in zip(held, before, strict=True):
            one.data = wide[name].of(narrow)
        yield
    finally:
        for (_, one), narrow in zip(held, before, strict=True):
            one.data = narrow


@contextmanager
def rows_in_float64(rows: slice | Tensor, *weights: Tensor) -> Iterator[None]:
    """Hold some rows of large matrices in float64 in place of the whole, then as before."""
    before, wide = [one.data for one in weights], _Upcasts()
    try:
        for one, whole in zip(weights, before, strict=True):
            one.data = wide.of(whole[rows])
        yield
    finally:
        for one, whole in zip(weights, before, strict=True):
            one.data = whole


class _Upcasts:
    """Float64 copies, one for all tensors of equal values."""

    def __init__(self) -> None:
        self._made: list[tuple[Tensor, Tensor]] = []

    def of(self, narrow: Tensor) -> Tensor:
        for known, wide in self._made:
            if known.dtype == narrow.dtype and (
                is_same_memory(known, narrow) or torch.equal(known, narrow)
            ):
                return wide
        self._made.append((narrow, narrow.double()))
        return self._made[-1][1]


def is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same values in the same places."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or Python, says that memory is lacking."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
