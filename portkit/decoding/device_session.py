"""Rows being continued on a device that runs ahead of the host: steps recorded and replayed.

Position, tokens and masks are tensors on the device, and a step feeds its own token to the next:
the host only asks for steps, and reads tokens when they have come. A step is recorded for what is
visible of the caches in sizes that double; which slots hold something a mask says. Knows what
`Session` knows, and of the choice of a token only that it is made on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from portkit.decoding.caches import StaticCache
from portkit.decoding.lowering import INPUT_IDS, Value, Weight
from portkit.decoding.memory import check_memory
from portkit.decoding.replay import Outbox, Replay
from portkit.decoding.tracing import Untraceable
from portkit.readable import ReadableBatch

if TYPE_CHECKING:
    from portkit.decoding.fast import FastModel

STEPS_AHEAD = 16
"""So many steps at most are asked for before their tokens are read: some for nothing at an end."""
_SMALLEST_BUCKET = 256


class Choice(Protocol):
    """Makes tokens (batch, 1) of logits (batch, vocab), on the device; -1 where they are NaN.

    `state` is what it keeps from token to token, `generators` what it draws from.
    """

    state: Sequence[Tensor]
    generators: Sequence[torch.Generator]

    def __call__(self, logits: Tensor) -> Tensor: ...


class Greedy:
    """The likeliest, of equal ones the first."""

    state: Sequence[Tensor] = ()
    generators: Sequence[torch.Generator] = ()

    def __call__(self, logits: Tensor) -> Tensor:
        found = logits.float().argmax(-1)
        return found.masked_fill(logits.isnan().any(-1), -1)[:, None]


class DeviceSession:
    """A batch of prompts and the tokens that follow; made by `FastModel.start`.

    What `greedy` or `draw` returned is what they are called with next: the device has gone on with
    it. Runs as well on the CPU, where nothing is gained.
    """

    def __init__(self, fast: FastModel, prompts: Sequence[Sequence[int]], room: int) -> None:
        self._fast = fast
        self._readable = ReadableBatch(fast.model, prompts, room)
        self._length = self._readable.length
        self._cache = StaticCache(self._readable.cache, self._length)
        check_memory(
            2 * self._cache.num_bytes(fast.dtype.itemsize),
            f"the caches of {len(prompts)} rows of {self._length} tokens",
            fast.device,
        )
        self._outbox = Outbox(STEPS_AHEAD, len(prompts), fast.device)
        self._last: Tensor | None = None
        self._greedy = Greedy()
        self._step: _Step | None = None
        self._stays_readable = False

    @property
    def is_fast(self) -> bool:
        """Whether it decodes by the fast path: ready to, and not left to the readable model."""
        return self._step is not None

    @torch.no_grad()
    def prefill(self, chunk: int | None = None) -> Tensor:
        """Logits (batch, vocab) after the prompts, fed `chunk` tokens at a time or all at once."""
        return self._readable.prefill(chunk)

    @torch.no_grad()
    def prepare(self, *, wait: bool = False) -> None:
        """Get ready to decode, as the first step does; with `wait` also record the greedy step."""
        if self._step is None and not self._stays_readable:
            assert self._readable.past, "prefill comes first"
            try:
                self._step = _Step(self._fast, self._cache, self._readable)
            except Untraceable as error:
                self._stays_readable = True
                self._fast.say(f"the fast path cannot follow this family's code ({error})")
                return
            self._cache.take(self._readable.cache, self._fast.dtype, self._fast.device)
            del self._readable.cache
        if wait and self._step is not None:
            self._step.record(self._greedy)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocab) after one more token (batch,) in each row, whichever it is."""
        self.prepare()
        if self._step is None:
            return self._readable.decode(tokens)
        assert not self._outbox, "the device has gone on with tokens of its own choice"
        self._step.tokens.copy_(tokens)
        return self._step.replay(None).clone()

    @torch.no_grad()
    def greedy(self, tokens: Tensor) -> Tensor:
        """The likeliest tokens (batch, 1) after one more (batch,); -1 where logits are NaN."""
        return self.draw(tokens, self._greedy)

    @torch.no_grad()
    def draw(self, tokens: Tensor, choose: Choice) -> Tensor:
        """What `choose`, always the same, makes of the logits after one more token (batch,)."""
        self.prepare()
        if self._step is None:
            return choose(self._readable.decode(tokens))
        if self._last is None:
            self._step.tokens.copy_(tokens)
        else:
            assert torch.equal(tokens, self._last), "the device has gone on with other tokens"
        while len(self._outbox) < STEPS_AHEAD and self._step.past < self._length:
            self._outbox.send(self._step.replay(choose)[:, 0])
        self._last = self._outbox.receive()
        return self._last[:, None]


class _Step:
    """One step on static buffers, recorded for each size of what is visible."""

    def __init__(self, fast: FastModel, cache: StaticCache, readable: ReadableBatch) -> None:
        self._cache, self._pads, self._length = cache, readable.pads, readable.length
        self._program = fast.program(cache, masked=True)
        self._regions = [fast.bind(region, cache.batch) for region in self._program.regions]
        self._head = fast.bind(self._program.head, cache.batch)
        self._likeliest = self._greedily(fast)
        self._values: dict[str, Tensor] = {}
        self._tables: dict[str, Tensor] = {}
        positions = torch.arange(self._length, device=fast.device)[None]
        for table in self._program.tables:
            cos, sin = table.module(positions, table.dtype)
            self._tables |= {table.cos.name: cos[0], table.sin.name: sin[0]}
        self._recorded: dict[tuple[int, Choice | None], Replay] = {}
        is_cuda = fast.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if is_cuda else None
        self.past = readable.past
        """Tokens in the caches once all that was asked for is done; the device counts by itself."""
        self._past = torch.tensor([self.past], device=fast.device)
        self.tokens = torch.zeros(cache.batch, dtype=torch.int64, device=fast.device)
        """What the next step is fed."""

    def replay(self, choose: Choice | None) -> Tensor:
        """One more step: the tokens (batch, 1) that are chosen, or without `choose` the logits.

        What is returned is overwritten by the next step.
        """
        assert self.past < self._length, "no room for another token"
        recorded = self.record(choose)
        self.past += 1
        return recorded()

    def record(self, choose: Choice | None) -> Replay:
        """The recording of the next step, made where there is none."""
        bucket = self._bucket()
        if (bucket, choose) not in self._recorded:
            state = [self._past, self.tokens, *(choose.state if choose else ())]
            generators = choose.generators if choose else ()
            self._recorded[bucket, choose] = Replay(
                lambda: self._run(bucket, choose), state, generators, self._pool
            )
        return self._recorded[bucket, choose]

    def _greedily(self, fast: FastModel) -> Callable[[Tensor], Tensor] | None:
        """What the head reads to the likeliest token, where no logit need be written for it."""
        likeliest = fast.runner.likeliest
        if likeliest is None or self._cache.batch > 1 or not fast.has_plain_head(self._program):
            return None
        (weight,) = [
            held
            for one, held in zip(self._program.head.arguments, self._head.arguments, strict=True)
            if isinstance(one, Weight)
        ]
        return lambda hidden_states: likeliest(hidden_states, weight)

    def _bucket(self) -> int:
        """How many tokens' slots the next step sees at most."""
        bucket = _SMALLEST_BUCKET
        while bucket <= self.past:
            bucket *= 2
        return min(bucket, self._length)

    def _run(self, bucket: int, choose: Choice | None) -> Tensor:
        self._show(bucket)
        self._values[INPUT_IDS.name] = self.tokens[:, None]
        for region in self._regions:
            region.run(self._values)
        self._past.add_(1)
        hidden_states = self._values[self._program.hidden.name]
        if choose is None:
            return self._logits(hidden_states)
        if isinstance(choose, Greedy) and self._likeliest is not None:
            found = self._likeliest(hidden_states)
        else:
            found = choose(self._logits(hidden_states))
        # Of a row that is damaged the host hears by the next token; the device must not stumble.
        self.tokens.copy_(found[:, 0].clamp(min=0))
        return found

    def _logits(self, hidden_states: Tensor) -> Tensor:
        (read,) = [one.name for one in self._program.head.arguments if isinstance(one, Value)]
        self._values[read] = hidden_states
        self._head.run(self._values)
        return self._values[self._program.head.results[0].name][:, -1]

    def _show(self, bucket: int) -> None:
        """Set slots, masks, tables and what is visible of the caches."""
        kinds = self._cache.kinds
        shown = [kind.num_filled(bucket) for kind in kinds]
        slots = [self._past % kind.num_slots for kind in kinds]
        masks = [
            kind.mask(self._past, self._pads, size) for kind, size in zip(kinds, shown, strict=True)
        ]
        for region in self._regions:
            for place, one in region.kept:
                if one.what == "mask":
                    region.arguments[place] = masks[one.index]
                elif one.what == "slot":
                    region.arguments[place] = slots[one.index]
                else:
                    held = self._cache.keys if one.what == "keys" else self._cache.values
                    size = shown[self._cache.kind_of_layer[one.index]]
                    region.arguments[place] = held[one.index][:size]
        positions = (self._past - self._pads).clamp(min=0)[:, 0]
        for name, rows in self._tables.items():
            self._values[name] = rows.index_select(0, positions)[:, None]
