"""A model's logits in float64 without a copy of it in float64: a layer at a time.

What parity does for both sides of a comparison, for one whole model. Knows modules, parameters and
what `parity` knows of precision; knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from portkit.architecture import CausalLM
from portkit.parity.judging.precision import casts_lifted, held_in_float64, rows_in_float64
from portkit.parity.judging.truth import HEAD_ROWS, embed_in_float64


def true_logits(model: CausalLM, input_ids: Tensor, start: int) -> Tensor:
    """Float64 logits (batch, tokens - start, vocab_size) of int64 `input_ids` (batch, tokens)."""
    with _wide_while_running(model), casts_lifted():
        cache = model.new_cache(len(input_ids), input_ids.shape[1])
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden_states = model.hidden_states(input_ids, positions=positions, cache=cache)
        return model.logits(hidden_states[:, start:])


@contextmanager
def _wide_while_running(model: nn.Module) -> Iterator[None]:
    units = list(_units(model))
    try:
        for module in units:
            module.forward = partial(_run, module, module.forward)
        yield
    finally:
        for module in units:
            del module.forward


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """Layers, and what holds parameters outside of them."""
    if [*module.parameters(False), *module.buffers(False)]:
        yield module
    for child in module.children():
        # A layer as a whole: its parts may read each other's weights.
        yield from child if isinstance(child, nn.ModuleList) else _units(child)


def _run(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if isinstance(module, nn.Embedding):
        (input_ids,) = args
        return embed_in_float64(module, input_ids, forward)
    if type(module) is nn.Linear:
        return torch.cat([part(*args) for part in _parts(module, forward)], dim=-1)
    with held_in_float64(module):
        return forward(*args, **kwargs)


def _parts(linear: nn.Linear, forward: Callable[..., Any]) -> Iterator[Callable[[Tensor], Tensor]]:
    """The map by so many of its rows at a time, each only valid until the next is taken."""
    held = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    for start in range(0, len(linear.weight), HEAD_ROWS):
        with rows_in_float64(slice(start, start + HEAD_ROWS), *held):
            yield forward
