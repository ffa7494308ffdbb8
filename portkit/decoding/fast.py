"""The fast path of a model: its decode step as regions over static caches and streaming weights.

    fast = FastModel(model)
    session = fast.start([[2, 9, 7]], room=100)
    token = session.prefill().argmax(-1)
    logits = session.decode(token)                    # (batch, vocab_size)

Prefill is the readable model's own. Knows how regions are run; how they came to be is in `tracing`
and `lowering`. A row's tokens agree with the readable path's but where two logits are equal within
rounding: sums run in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from portkit.architecture import CausalLM
from portkit.decoding.caches import StaticCache
from portkit.decoding.lowering import INPUT_IDS, Kept, Program, Region, Value, Weight, lower
from portkit.decoding.memory import Arena, available_bytes, padded_bytes
from portkit.decoding.tracing import trace_step
from portkit.errors import GenerationError

_ROTARY_CHUNK = 256
"""Tokens whose rotary tables are made at a time."""

Function = Callable[[list[Any]], Sequence[Tensor]]
"""A region's: its arguments in order to its results."""


class FastModel:
    """A model made ready to decode fast; its parameters become views of the memory made here."""

    def __init__(self, model: CausalLM, *, layers_per_region: int = 1) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self._layers_per_region = layers_per_region
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._weights: dict[Weight, Tensor] = {}
        self._place(self.program(1, StaticCache(model.new_cache(1, 1).layers, 1), masked=False))

    def program(self, batch: int, cache: StaticCache, *, masked: bool) -> Program:
        """The step of `batch` rows with caches of these kinds, traced when it is first asked for."""
        key = (batch, cache.kind_of_layer, masked)
        if key not in self._programs:
            held = dict(self.model.named_parameters(remove_duplicate=False))
            held |= dict(self.model.named_buffers(remove_duplicate=False))
            self._programs[key] = lower(
                trace_step(self.model, batch),
                held,
                cache.kind_of_layer,
                masked=masked,
                layers_per_region=self._layers_per_region,
            )
        return self._programs[key]

    def weight(self, one: Weight, program: Program) -> Tensor:
        """The tensor of a program's argument."""
        if one not in self._weights:
            self._weights[one] = program.constants[one.names[0]]
        return self._weights[one]

    def function(self, region: Region) -> Function:
        """What runs a region."""
        forward = fx.GraphModule({}, region.graph).forward
        return lambda arguments: forward(*arguments)

    def start(self, prompts: Sequence[Sequence[int]], room: int) -> Session:
        """Rows of prompts (token ids), padded on the left, each with up to `room` tokens to come.

        Raises GenerationError where the caches do not fit into memory.
        """
        return Session(self, prompts, room)

    def _place(self, program: Program) -> None:
        held = dict(self.model.named_parameters(remove_duplicate=False))
        held |= dict(self.model.named_buffers(remove_duplicate=False))
        arguments = dict.fromkeys(
            one for region in (*program.regions, program.head) for one in region.arguments
        )
        found = {
            one: [held[name] for name in one.names]
            for one in arguments
            if isinstance(one, Weight) and one.names[0] in held
        }
        with torch.no_grad():
            self._weights |= (
                _stack_in_arena(found)
                if self.device.type == "cpu"
                else {one: torch.cat(list(parts)) for one, parts in found.items()}
            )
        owners = {id(parameter): parameter for parameter in self.model.parameters()}
        for one, parts in found.items():
            stacked = self._weights[one].split([len(part) for part in parts])
            for part, view in zip(parts, stacked, strict=True):
                if id(part) in owners:
                    part.data = view


def _stack_in_arena(found: dict[Weight, list[Tensor]]) -> dict[Weight, Tensor]:
    sizes = [padded_bytes(sum(part.nbytes for part in parts)) for parts in found.values()]
    _check_memory(sum(sizes), "the weights")
    arena = Arena(sum(sizes))
    return {one: arena.stack(parts) for one, parts in found.items()}


def _check_memory(num_bytes: int, what: str) -> None:
    available = available_bytes()
    if available is not None and num_bytes > available:
        raise GenerationError(
            f"{what} take {num_bytes / 1e9:.1f} GB where {available / 1e9:.1f} GB of memory are "
            "free: take fewer prompts, fewer new tokens or a smaller model"
        )


class Session:
    """Rows being continued: their caches, and how far they are."""

    def __init__(self, fast: FastModel, prompts: Sequence[Sequence[int]], room: int) -> None:
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        padded = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        self._fast = fast
        self._batch = len(prompts)
        self._input_ids = torch.tensor(padded, device=fast.device)
        self._pads = torch.tensor(pads, device=fast.device)[:, None]
        self._masked = any(pads)
        # The last token that a row gets is not fed to the model any more.
        self._length = longest + room - 1
        self._readable = fast.model.new_cache(self._batch, self._length)
        self._cache = StaticCache(self._readable.layers, self._length)
        _check_memory(
            2 * self._cache.num_bytes(self._batch, fast.dtype.itemsize),
            f"the caches of {len(prompts)} rows of {self._length} tokens",
        )
        self._past = 0

    @torch.inference_mode()
    def prefill(self, chunk: int | None = None) -> Tensor:
        """Logits (batch, vocab) after the prompts, fed `chunk` tokens at a time or all at once."""
        model, num_tokens = self._fast.model, self._input_ids.shape[1]
        slots = torch.arange(num_tokens, device=self._fast.device)
        real = slots >= self._pads if self._masked else None
        for start in range(0, num_tokens, chunk or num_tokens):
            end = min(start + (chunk or num_tokens), num_tokens)
            hidden_states = model.hidden_states(
                self._input_ids[:, start:end],
                positions=(slots[start:end] - self._pads).clamp(min=0),
                cache=self._readable,
                attention_mask=None if real is None else real[:, :end],
            )
            self._readable.advance(end - start)
        logits = model.logits(hidden_states[:, -1:])[:, -1]
        self._past = num_tokens
        self._cache.take(self._readable, self._fast.dtype, self._fast.device)
        del self._readable
        self._prepare()
        return logits

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocab) after one more token (batch,) in each row."""
        self._values[INPUT_IDS.name] = tokens[:, None]
        self._show(self._past)
        for region in self._regions:
            region.run(self._values)
        self._past += 1
        self._head.run(self._values)
        return self._values[self._head.results[0]][:, -1]

    def _prepare(self) -> None:
        program = self._fast.program(self._batch, self._cache, masked=self._masked)
        self._program = program
        self._values: dict[str, Tensor] = {}
        self._slots = [
            torch.zeros(1, dtype=torch.int64, device=self._fast.device) for _ in self._cache.kinds
        ]
        self._num_filled = [-1] * len(self._cache.kinds)
        shared: dict[str, Function] = {}
        self._regions = [
            _Bound(region, self._fast, program, shared) for region in program.regions
        ]
        self._head = _Bound(program.head, self._fast, program, shared)
        (placeholder,) = [one for one in program.head.arguments if isinstance(one, Value)]
        self._regions[-1].rename(program.hidden.name, placeholder.name)
        self._tables: dict[str, Tensor] = {}
        self._tables_start = -_ROTARY_CHUNK

    def _show(self, past: int) -> None:
        """Set slots, masks, tables and what is visible of the caches for the token after `past`."""
        changed = set()
        for index, kind in enumerate(self._cache.kinds):
            self._slots[index].fill_(kind.slot(past))
            num_filled = kind.num_filled(past + 1)
            if num_filled != self._num_filled[index]:
                self._num_filled[index] = num_filled
                changed.add(index)
        for region in self._regions:
            for place, one in region.kept:
                kind_index = self._kind_index(one)
                if one.what == "mask":
                    mask = self._cache.kinds[kind_index].mask(past, self._pads)
                    region.arguments[place] = mask
                elif kind_index in changed:
                    region.arguments[place] = self._kept(one, kind_index)
        self._show_tables(past)

    def _kind_index(self, one: Kept) -> int:
        of_layer = one.what in ("keys", "values")
        return self._cache.kind_of_layer[one.index] if of_layer else one.index

    def _kept(self, one: Kept, kind_index: int) -> Tensor:
        if one.what == "slot":
            return self._slots[kind_index]
        layers = self._cache.keys if one.what == "keys" else self._cache.values
        return layers[one.index][: self._num_filled[kind_index]]

    def _show_tables(self, past: int) -> None:
        if not 0 <= past - self._tables_start < _ROTARY_CHUNK:
            self._tables_start = past
            slots = torch.arange(past, past + _ROTARY_CHUNK, device=self._fast.device)
            positions = (slots - self._pads).clamp(min=0)
            for table in self._program.tables:
                cos, sin = table.module(positions, table.dtype)
                self._tables |= {table.cos.name: cos, table.sin.name: sin}
        offset = past - self._tables_start
        for name, table in self._tables.items():
            self._values[name] = table[:, offset : offset + 1]


class _Bound:
    """A region with its arguments: weights for good, values and caches as they come."""

    def __init__(
        self, region: Region, fast: FastModel, program: Program, shared: dict[str, Function]
    ) -> None:
        code = region.code
        if code not in shared:
            shared[code] = fast.function(region)
        self.function = shared[code]
        self.arguments: list[Any] = [
            fast.weight(one, program) if isinstance(one, Weight) else None
            for one in region.arguments
        ]
        self.kept = [(i, one) for i, one in enumerate(region.arguments) if isinstance(one, Kept)]
        self._read = [
            (i, one.name) for i, one in enumerate(region.arguments) if isinstance(one, Value)
        ]
        self.results = [one.name for one in region.results]

    def rename(self, name: str, to: str) -> None:
        self.results = [to if result == name else result for result in self.results]

    def run(self, values: dict[str, Tensor]) -> None:
        for place, name in self._read:
            self.arguments[place] = values[name]
        values.update(zip(self.results, self.function(self.arguments), strict=True))
