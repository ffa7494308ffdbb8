"""The fast path in every way that it decodes, in the dtype under test and in float64.

A way that differs from the readable path in a bit is asked why. Knows the fast path from outside;
judges nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.decoding.fast import FastModel
from portkit.decoding.packages import Packages
from portkit.decoding.session import Session
from portkit.errors import GenerationError
from portkit.nn.attention import EagerAttention
from portkit.nn.rope import RotaryEmbedding
from portkit.parity.decoding.reasons import COMPILER, AskedModel
from portkit.parity.judging.precision import casts_lifted, held_in_float64, ran_out_of_memory
from portkit.parity.probes.feeding import (
    DECODED,
    STEPWISE,
    Text,
    logits_by_engine,
    prompts_of,
)

MakePackages = Callable[[Callable[[str], None]], Packages]
"""Makes the folder of compiled regions, given what takes lines for people."""
_ROTARY_MARGIN = 512
"""The fast path makes its tables a few hundred positions ahead."""


@dataclass
class FastWays:
    """Logits (num_compared, vocab_size) of each way of the fast path."""

    logits: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Why a way differs from the readable path; none where nothing that was found explains it."""
    in_float64: dict[str, Tensor] = field(default_factory=dict)
    compiled: Tensor | None = None
    compiled_reasons: tuple[str, ...] = ()
    refused: str | None = None
    """Why there is no fast path for this model."""
    not_compiled: str = "compiled regions were not asked for"
    unasked: str | None = None
    """Why it could not be run in float64."""


def run_fast(
    model: CausalLM,
    text: Text,
    readable: Mapping[str, Tensor],
    packages: MakePackages | None,
    tell: Callable[[str], None],
) -> FastWays:
    """Run them all; `readable` has the readable path's logits of the same ways.

    The model's parameters become views of the fast path's memory.
    """
    found = FastWays()
    if any(isinstance(one, EagerAttention) for one in model.modules()):
        found.refused = "it computes attention as --attention sdpa does"
        return found
    tables = _tables_in_its_dtype(model, len(text.neighbour) + _ROTARY_MARGIN)
    said: list[str] = []
    fast = AskedModel(model, say=said.append)
    for way in STEPWISE:
        tell(f"fast path, {way}")
        logits = _run(fast, text, way)
        if logits is None:
            found.refused = said[0]
            return found
        found.logits[way] = logits
    for way, logits in found.logits.items():
        if not torch.equal(logits, readable[way]):
            tell(f"why the fast path differs, {way}")
            found.reasons[way] = fast.why(text, way, logits, readable[way])
    if packages is not None:
        tell("compile")
        _run_compiled(found, model, text, packages)
    tell("fast path in float64")
    try:
        with held_in_float64(model), tables(), casts_lifted():
            exact = FastModel(model)
            found.in_float64 = {way: _logits(exact, text, way) for way in STEPWISE}
    except (GenerationError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not ran_out_of_memory(error):
            raise
        found.unasked = f"the fast path in float64 takes more memory than there is ({error:.80})"
    return found


def wrapped_tokens(text: Text) -> slice:
    """The compared tokens for which some layer's ring has overwritten a token."""
    return slice(min(map(text.num_before, text.windows)), None)


def _run(fast: FastModel, text: Text, way: str) -> Tensor | None:
    """None where the fast path leaves the rows to the readable one."""
    session = fast.start(prompts_of(text, way), text.num_compared)
    logits = logits_by_engine(session, text, way, fast.device)
    return logits if session.is_fast else None


def _logits(fast: FastModel, text: Text, way: str) -> Tensor:
    logits = _run(fast, text, way)
    assert logits is not None, "it took these rows before"
    return logits


def _run_compiled(
    found: FastWays, model: CausalLM, text: Text, make_packages: MakePackages
) -> None:
    said: list[str] = []
    fast = FastModel(model, make_packages(said.append))
    session = fast.start(prompts_of(text, DECODED), text.num_compared)
    logits = logits_by_engine(session, text, DECODED, fast.device, wait=True)
    if isinstance(session, Session) and session.is_compiled:
        found.compiled, found.compiled_reasons = logits, found.reasons.get(DECODED, ())
        if not torch.equal(logits, found.logits[DECODED]):
            found.compiled_reasons += (COMPILER,)
    else:
        found.not_compiled = said[0] if said else f"no region is compiled for {fast.device.type}"


@torch.no_grad()
def _tables_in_its_dtype(
    model: CausalLM, length: int
) -> Callable[[], AbstractContextManager[None]]:
    """A context in which rotary tables have the values that they have now, whatever is asked for.

    In float64 they would be others: what the truth is given are the tables as they are rounded.
    """
    first = next(model.parameters())
    positions = torch.arange(length, device=first.device)[None]
    kept: dict[torch.nn.Module, Any] = {
        module: module(positions, first.dtype)
        for module in model.modules()
        if isinstance(module, RotaryEmbedding)
    }

    def look_up(module: torch.nn.Module, given: tuple[Any, ...], _: Any) -> tuple[Tensor, ...]:
        return tuple(one[0][given[0]].double() for one in kept[module])

    @contextmanager
    def context() -> Iterator[None]:
        hooks = [module.register_forward_hook(look_up) for module in kept]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    return context
