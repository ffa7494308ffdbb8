"""What a model that is called by named inputs returns: its primary output, and sites beside it.

The primary output is `logits` where it has such a field, else its first floating-point tensor. Each
further one is a site under its field's name, `#pooler_output`. Knows containers and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from portkit.errors import PortkitError
from portkit.parity.judging.precision import ran_out_of_memory
from portkit.parity.sides.calling import as_no_grad, is_harness, said
from portkit.parity.sides.roles import Visit
from portkit.parity.sides.sites import CannotRun

_PRIMARY = ".logits"


class Returned:
    """Calls a model, and shows whoever watches what it returns."""

    def __init__(self) -> None:
        self._visit: Visit | None = None

    @contextmanager
    def shown_to(self, visit: Visit) -> Iterator[None]:
        before, self._visit = self._visit, visit
        try:
            yield
        finally:
            self._visit = before

    def of(
        self, call: Callable[..., Any], inputs: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """The primary output. What has a fraction is given in `dtype`; the inputs stay as they are.

        Raises `CannotRun` where it does not run them, or returns nothing of the kind.
        """
        given = {
            name: one.to(dtype, copy=True) if one.is_floating_point() else one.clone()
            for name, one in inputs.items()
        }
        try:
            with as_no_grad():
                output = call(**given)
        except (PortkitError, MemoryError):
            raise
        except (Exception, SystemExit) as error:  # it leaves, and not we
            if ran_out_of_memory(error) or is_harness(error):
                raise
            raise CannotRun(f"it raised {said(error)}") from error
        if not isinstance(output, (Tensor, Mapping, tuple, list)):
            output = dict(getattr(output, "__dict__", {}))
        found = dict(_tensors("", output))
        if not found:
            raise CannotRun("it returns no floating-point tensor")
        primary = _PRIMARY if _PRIMARY in found else next(iter(found))
        for name, one in found.items():
            if name != primary and self._visit is not None:
                self._visit(f"#{name.removeprefix('.')}", one)
        return found[primary]


def _tensors(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value
    elif isinstance(value, Mapping):
        for field, each in value.items():
            yield from _tensors(f"{path}.{field}", each)
    elif isinstance(value, (tuple, list)):
        for number, each in enumerate(value):
            yield from _tensors(f"{path}.{number}", each)
