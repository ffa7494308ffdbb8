"""Rows being continued on the fast path: their caches, and one step after another.

Knows how regions are fed: weights for good, slots and rotary tables for a while, what is visible of
the caches as it grows. Regions run as torch runs them until compiled ones are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from portkit.decoding.bound import Bound
from portkit.decoding.caches import StaticCache
from portkit.decoding.compiler import Recipe, recipe
from portkit.decoding.head import ExactHead, bounds_recipe
from portkit.decoding.lowering import INPUT_IDS, Kept, Value
from portkit.decoding.memory import check_memory
from portkit.decoding.packages import Function
from portkit.decoding.tracing import Untraceable
from portkit.nn.likeliest import likeliest
from portkit.readable import ReadableBatch

if TYPE_CHECKING:
    from portkit.decoding.fast import FastModel

_ROTARY_CHUNK = 256
"""Tokens whose rotary tables are made at a time."""
_STEPS_PER_LOOK = 8
"""How often a session looks whether its compiled regions are there."""


class Session:
    """A batch of prompts and the tokens that follow; made by `FastModel.start`."""

    def __init__(
        self,
        fast: FastModel,
        prompts: Sequence[Sequence[int]],
        room: int,
        largest: int | None,
    ) -> None:
        self._fast = fast
        self._largest = largest
        self._readable = ReadableBatch(fast.model, prompts, room)
        length = self._readable.length
        self._cache = StaticCache(self._readable.cache, length)
        check_memory(
            2 * self._cache.num_bytes(fast.dtype.itemsize),
            f"the caches of {len(prompts)} rows of {length} tokens",
        )
        self._past = 0
        self._num_decoded = 0
        self._step: _Step | None = None
        self._stays_readable = False

    @property
    def is_fast(self) -> bool:
        """Whether it decodes by the fast path: ready to, and not left to the readable model."""
        return self._step is not None

    @property
    def is_compiled(self) -> bool:
        """Whether compiled regions run."""
        return self._step is not None and self._step.is_compiled

    @torch.no_grad()
    def prefill(self, chunk: int | None = None) -> Tensor:
        """Logits (batch, vocab) after the prompts, fed `chunk` tokens at a time or all at once."""
        logits = self._readable.prefill(chunk)
        self._past = self._readable.past
        return logits

    @torch.no_grad()
    def prepare(self, *, wait: bool = False) -> None:
        """Get ready to decode, as the first `decode` does: take over the prompt, place weights.

        With `wait` also wait for compiled regions and the exact head, where they are to be had.
        """
        if self._step is None and not self._stays_readable:
            assert self._past, "prefill comes first"
            try:
                self._step = _Step(self._fast, self._cache, self._readable, self._largest)
            except Untraceable as error:
                self._stays_readable = True
                self._fast.say(f"the fast path cannot follow this family's code ({error})")
                return
            self._cache.take(self._readable.cache, self._fast.dtype, self._fast.device)
            del self._readable.cache
        if wait and self._step is not None:
            # Any token: what it leaves in the caches, the next one overwrites.
            self._step.read_out(self._step.hidden_states(self._readable.last, self._past))
            self._step.look(wait=True)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocab) after one more token (batch,) in each row.

        Where only the largest matter, others may be -inf.
        """
        ids, logits = self._largest_of(tokens)
        if ids is None:
            return logits
        everything = logits.new_full((1, self._fast.model.config.vocab_size), -torch.inf)
        everything[0, ids] = logits
        return everything

    @torch.no_grad()
    def greedy(self, tokens: Tensor) -> Tensor:
        """The likeliest tokens (batch, 1) after one more (batch,); -1 where logits are NaN."""
        ids, logits = self._largest_of(tokens)
        if ids is None:
            return likeliest(logits)[:, None]
        found = ids[logits.float().argmax()]
        return found.masked_fill(logits.isnan().any(), -1).view(1, 1)

    def _largest_of(self, tokens: Tensor) -> tuple[Tensor | None, Tensor]:
        """Ids and logits (kept,) of the one row, or None and all logits (batch, vocab)."""
        self.prepare()
        if self._step is None:
            return None, self._readable.decode(tokens)
        found = self._step.read_out(self._step.hidden_states(tokens, self._past))
        if self._num_decoded % _STEPS_PER_LOOK == 0:
            self._step.look(wait=False)
        self._num_decoded += 1
        self._past += 1
        return found


class _Step:
    """The regions of one step, bound to a session's caches and to what runs them."""

    def __init__(
        self,
        fast: FastModel,
        cache: StaticCache,
        readable: ReadableBatch,
        largest: int | None,
    ) -> None:
        self._fast, self._cache = fast, cache
        self._pads, self._masked = readable.pads, readable.masked
        self._program = fast.program(cache, masked=readable.masked)
        self._values: dict[str, Tensor] = {}
        self._regions = [fast.bind(region, cache.batch) for region in self._program.regions]
        self._head = fast.bind(self._program.head, cache.batch)
        self._slots = [torch.zeros(1, dtype=torch.int64, device=fast.device) for _ in cache.kinds]
        self._num_filled = [0] * len(cache.kinds)
        self._tables: dict[str, Tensor] = {}
        self._tables_start = -_ROTARY_CHUNK
        single = cache.batch == 1 and fast.device.type == "cpu"
        self._may_compile = single and fast.packages is not None
        self._largest = largest if single and fast.has_plain_head(self._program) else None
        self._exact_head: ExactHead | None = None
        self._bounds: Function | None = None
        self.is_compiled = False

    def look(self, *, wait: bool) -> None:
        """Take compiled regions and the exact head, if they are there; ask for them otherwise.

        After a step, which has put an example in the place of each argument.
        """
        if not self._may_compile or self.is_compiled:
            return
        regions = [one for one in self._regions if one.is_heavy]
        recipes = [self._recipe(one) for one in regions]
        if self._largest is None:
            recipes.append(self._recipe(self._head))
        else:
            recipes.append(bounds_recipe(self._program.head, self._head.arguments))
            exact_head = self._fast.exact_head(self._program, wait=wait)
        functions = self._fast.compiled(recipes, wait=wait)
        if functions is None:
            return
        if self._largest is None:
            self._head.function = functions[-1]
        elif exact_head is None:
            return
        elif not exact_head.is_usable:
            self._largest = None
            self.look(wait=wait)
            return
        else:
            self._exact_head, self._bounds = exact_head, functions[-1]
        for one, function in zip(regions, functions, strict=False):
            one.function = function
        self.is_compiled = True

    def hidden_states(self, tokens: Tensor, past: int) -> Tensor:
        """What the head reads, (batch, 1, hidden_size), after `tokens` (batch,) behind `past`."""
        self.show(past)
        self._values[INPUT_IDS.name] = tokens[:, None]
        for region in self._regions:
            region.run(self._values)
        return self._values[self._program.hidden.name]

    def read_out(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor]:
        """Ids and logits (kept,) of the largest of one row, or None and all (batch, vocab)."""
        if self._exact_head is not None:
            assert self._bounds is not None
            assert self._largest is not None
            return self._exact_head.largest(hidden_states, self._largest, self._bounds)
        (read,) = [one.name for one in self._program.head.arguments if isinstance(one, Value)]
        self._values[read] = hidden_states
        self._head.run(self._values)
        return None, self._values[self._head.region.results[0].name][:, -1]

    def show(self, past: int) -> None:
        """Set slots, masks, tables and what is visible of the caches for the token after `past`."""
        changed = set()
        for index, kind in enumerate(self._cache.kinds):
            self._slots[index].fill_(kind.slot(past))
            num_filled = kind.num_filled(past + 1)
            if num_filled != self._num_filled[index]:
                self._num_filled[index] = num_filled
                changed.add(index)
        masks = []
        if self._masked:
            kinds = zip(self._cache.kinds, self._num_filled, strict=True)
            masks = [kind.mask(past, self._pads, num_filled) for kind, num_filled in kinds]
        for region in self._regions:
            for place, one in region.kept:
                if one.what == "mask":
                    region.arguments[place] = masks[one.index]
                elif one.what == "slot":
                    region.arguments[place] = self._slots[one.index]
                elif (kind_index := self._cache.kind_of_layer[one.index]) in changed:
                    held = self._cache.keys if one.what == "keys" else self._cache.values
                    region.arguments[place] = held[one.index][: self._num_filled[kind_index]]
        self._show_tables(past)

    def _show_tables(self, past: int) -> None:
        if not 0 <= past - self._tables_start < _ROTARY_CHUNK:
            self._tables_start = past
            slots = torch.arange(past, past + _ROTARY_CHUNK, device=self._fast.device)
            positions = (slots - self._pads).clamp(min=0)
            for table in self._program.tables:
                cos, sin = table.module(positions, table.dtype)
                self._tables |= {table.cos.name: cos, table.sin.name: sin}
        offset = past - self._tables_start
        for name, rows in self._tables.items():
            self._values[name] = rows[:, offset : offset + 1]

    def _recipe(self, one: Bound) -> Recipe:
        growing = [
            f"filled_{self._cache.kind_of_layer[argument.index]}"
            if isinstance(argument, Kept) and argument.what in ("keys", "values")
            else None
            for argument in one.region.arguments
        ]
        return recipe(one.region.graph, one.arguments, growing, torch.get_num_threads())
