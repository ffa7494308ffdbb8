"""Float64 as the truth: a module run with its parameters as held, and its down-casts lifted.

An implementation casts to float32 and back in its own code. Run on float64 activations those casts
would throw away what the truth is wanted for, so they are intercepted while it runs. Interception
works under `no_grad`; under `inference_mode` nothing would be intercepted, silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

LOW = frozenset({torch.float32, torch.bfloat16, torch.float16})


class UnliftedCast(RuntimeError):
    """Something computed in low precision although the truth was asked for."""


class LiftedCasts(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Turns casts to a lower floating dtype into casts to float64.

    Any other operation that makes a lower precision out of float64 is refused. Constants may come
    in as they are held: what is computed with them is float64 again.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in LOW:
            kwargs["dtype"] = torch.float64
        result = func(*args, **kwargs)
        if not any(one.dtype == torch.float64 for one in _tensors((*args, *kwargs.values()))):
            return result
        for one in _tensors((result,)):
            if one.dtype in LOW:
                raise UnliftedCast(f"{func} computed in {one.dtype} where the truth was asked for")
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


@contextmanager
def in_float64(module: nn.Module) -> Iterator[None]:
    """Hold a module's parameters and buffers in float64, then as before. Casts are lifted.

    Parameters keep the values that they were rounded to: it is the arithmetic that is exact.
    """
    assert not torch.is_inference_mode_enabled(), "inference_mode hides casts from interception"
    held = [*module.parameters(), *module.buffers()]
    before = [one.data for one in held]
    try:
        for one in held:
            if one.dtype in LOW:
                one.data = one.data.double()
        with torch.no_grad(), LiftedCasts():  # type: ignore[no-untyped-call]
            yield
    finally:
        for one, data in zip(held, before, strict=True):
            one.data = data
