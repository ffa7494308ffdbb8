"""The truth of a whole run: a side that runs freely from the tokens in float64.

`truth` tells how far a site is from the truth given its recorded input; this one, how far a model
has come from it by then. It is the measure of errors that are carried. Parameters are as held and
casts lifted as there, one block at a time is held in float64, and the rotary tables are the
recorded ones: a last bit of a frequency would grow at far positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from portkit.parity.judging.local import Trace, block_modules
from portkit.parity.judging.precision import casts_lifted, held_in_float64, rows_in_float64
from portkit.parity.judging.truth import HEAD, HEAD_ROWS, embed_in_float64
from portkit.parity.probes.probe import Pass
from portkit.parity.sides.sites import LOGITS, Side, SiteTable, watching

Run = Callable[..., Any]


class FreeTruth:
    """Runs the passes of a probe in order, in float64, each going on from its own past.

    `whole`: all of the model is held in it at once, whatever its blocks are called.
    """

    def __init__(self, side: Side, table: SiteTable, *, whole: bool = False) -> None:
        self._side, self._table, self._whole = side, table, whole
        self._caches: dict[str, Any] = {}

    @torch.no_grad()
    def run(self, one: Pass, trace: Trace, look: Callable[[str, Tensor], None]) -> None:
        """Have `look` see what each site of `trace` would have been."""

        def visit(name: str, tensor: Tensor) -> Tensor:
            if name in trace and ("#cos" in name or "#sin" in name):
                return trace[name].double()
            if name in trace and tensor.is_floating_point():
                look(name, tensor)
            return tensor

        with (
            self._held(),
            self._side.plain_experts(),
            watching(self._side, self._table, visit),
            casts_lifted(),
        ):
            logits = self._side.run(one, self._caches)
        if LOGITS in trace:
            look(LOGITS, logits)

    def _held(self) -> Any:
        if self._whole and self._side.model is not None:
            return held_in_float64(self._side.model)
        return _blocks_in_float64(self._side, self._table)


@contextmanager
def _blocks_in_float64(side: Side, table: SiteTable) -> Iterator[None]:
    """Have each block run in float64, and be held in it while it runs."""
    before = {module: vars(module).get("forward") for module in block_modules(side, table).values()}
    try:
        for name, module in block_modules(side, table).items():
            kind = _embedding if isinstance(module, nn.Embedding) else _block
            own = module.forward
            module.forward = wraps(own)((_head if name == HEAD else kind)(module, own))
        yield
    finally:
        for module, replaced in before.items():
            del module.forward
            if replaced is not None:
                module.forward = replaced


def _block(module: nn.Module, own: Run) -> Run:
    def run(*args: Any, **kwargs: Any) -> Any:
        with held_in_float64(module):
            return own(*args, **kwargs)

    return run


def _embedding(module: nn.Module, own: Run) -> Run:
    return lambda input_ids: embed_in_float64(module, input_ids, own)


def _head(module: nn.Module, own: Run) -> Run:
    """Some rows at a time: the whole would be gigabytes."""
    weight = module.get_parameter("weight")

    def run(hidden: Tensor) -> Tensor:
        parts = []
        for start in range(0, len(weight), HEAD_ROWS):
            with rows_in_float64(slice(start, start + HEAD_ROWS), weight):
                parts.append(own(hidden))
        return torch.cat(parts, -1)

    return run
