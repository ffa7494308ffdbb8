"""One text, fed in every way that a decoder is: whole, in chunks, token by token, beside others.

The text crosses the window, or the attention chunk, of the model's layers. Every way gives the
logits of the same last tokens of the same row, so that all can be held against one truth. Knows
tokens, passes and engines; judges nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.decoding.session import Session
from portkit.errors import ProbeError
from portkit.generation.loop import Engine
from portkit.nn.cache import SlidingCache
from portkit.parity.probes.probe import Pass, chain
from portkit.parity.sides.sites import Side

_NUM_STEPS = 40
_SHORT_OF_WINDOW = 8
"""So many tokens before the window is full the prompt ends, and decoding crosses it."""
_SHORTEST_PROMPT = 16
_SHORTEST_CHUNK = 7
_NUM_PADS = 5
_FED_ONE_BY_ONE = 128
"""A longer text is not fed token by token from its first: that takes minutes and shows no more."""


@dataclass(frozen=True)
class Text:
    """Token ids of one row; those from `prompt` on are decoded. `neighbour` is a longer row."""

    ids: tuple[int, ...]
    prompt: int
    neighbour: tuple[int, ...]
    windows: tuple[int, ...]
    """Of the model's layers, those that a text can leave."""

    @property
    def num_compared(self) -> int:
        """Tokens whose logits every way gives, the prompt's last and all that are decoded."""
        return len(self.ids) - self.prompt + 1

    @property
    def chunk(self) -> int:
        """Tokens of a chunk: several chunks make a prompt."""
        return max(_SHORTEST_CHUNK, self.prompt // 3)

    def num_before(self, window: int) -> int:
        """How many of the compared tokens see all that was before them, in such a window."""
        return min(self.num_compared, max(0, window - self.prompt + 1))

    @property
    def leaves_a_window(self) -> bool:
        """The same in any layer's."""
        return any(map(self.leaves, self.windows))

    def leaves(self, window: int) -> bool:
        """Whether a compared token no longer sees the first one in such a window."""
        return self.num_before(window) < self.num_compared

    def rows(self, way: str) -> list[tuple[int, ...]]:
        """All rows of a way that decodes; the last is the text."""
        if way == PADDED:
            return [self.neighbour, self.ids]
        return [self.neighbour[: len(self.ids)], self.ids] if way == BESIDE else [self.ids]

    def passes(self, way: str) -> list[Pass]:
        """How a model is fed in a way; the text is the last row."""
        ids, count = torch.tensor([self.ids]), len(self.ids)
        if way == WHOLE:
            return chain(way, ids, [count], self.num_compared)
        if way == CHUNKS:
            cuts = [*range(self.chunk, count, self.chunk), count]
            return chain(way, ids, cuts, self.num_compared)
        if way == ONE_BY_ONE:
            return chain(way, ids, range(1, count + 1))
        rows = self.rows(way)
        longest = max(map(len, rows))
        pads = torch.tensor([[longest - len(row)] for row in rows])
        padded = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
        real = torch.arange(longest) >= pads
        passes: list[Pass] = []
        for end in range(longest - count + self.prompt, longest + 1):
            start = 0 if not passes else end - 1
            positions = (torch.arange(start, end) - pads).clamp(min=0)
            mask = real[:, :end].long() if way == PADDED else None
            before = passes[-1].name if passes else None
            passes.append(Pass(f"{way} {end}", padded[:, start:end], positions, mask, before, 1))
        return passes

    @property
    def ways(self) -> tuple[str, ...]:
        """In which the readable path is fed."""
        short = len(self.ids) <= _FED_ONE_BY_ONE
        return (WHOLE, CHUNKS, *((ONE_BY_ONE,) if short else ()), *STEPWISE)


WHOLE, CHUNKS, ONE_BY_ONE = "prefill", "in chunks", "token by token"
DECODED, PADDED, BESIDE = "decoded behind a prompt", "left-padded row", "row of a batch"
STEPWISE = (DECODED, PADDED, BESIDE)
"""A prompt in one pass, and then token after token."""


def text_for(model: CausalLM, seed: int = 0, prompt: Sequence[int] | None = None) -> Text:
    """A text of random tokens, or behind a prompt of one's own, for a model on whatever device.

    Raises ProbeError for a prompt that is empty or leaves no room in the model's context.
    """
    context, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    if context == 1:
        raise ProbeError("a context of 1 token has no room to decode: leave --decode out")
    layers = model.new_cache(1, 1).layers
    windows = sorted({one.window for one in layers if isinstance(one, SlidingCache)})
    windows = [one for one in windows if one < context - _NUM_PADS]
    num_steps = min(_NUM_STEPS, context // 2)
    longest = max(1, context - num_steps - _NUM_PADS)
    length = min(longest, max(_SHORTEST_PROMPT, max(windows, default=0) - _SHORT_OF_WINDOW))
    if prompt is not None:
        length = len(prompt)
        if not 0 < length <= longest:
            raise ProbeError(
                f"a prompt of {length} tokens cannot be decoded behind: give 1 to {longest} in a "
                f"context of {context}"
            )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocab_size, (2, length + num_steps + _NUM_PADS), generator=generator)
    ids, neighbour = drawn[0, : length + num_steps].tolist(), drawn[1].tolist()
    ids[: len(prompt or ())] = prompt or ()
    return Text(tuple(ids), length, tuple(neighbour), tuple(windows))


def logits_by_side(side: Side, text: Text, way: str, device: torch.device) -> Tensor:
    """(num_compared, vocab_size), of a side that is fed in a way."""
    caches: dict[str, Any] = {}
    found = [side.run(one.to(device), caches)[-1] for one in text.passes(way)]
    return torch.cat(found)[-text.num_compared :]


def logits_by_engine(
    engine: Engine, text: Text, way: str, device: torch.device, *, wait: bool = False
) -> Tensor:
    """(num_compared, vocab_size), of an engine that was started with `prompts_of(text, way)`.

    `wait`: once the prompt is there, until a session's compiled regions are too.
    """
    found = [engine.prefill()[-1]]
    if wait and isinstance(engine, Session):
        engine.prepare(wait=True)
    found += [engine.decode(tokens)[-1] for tokens in decoded_tokens(text, way, device)]
    return torch.stack(found)


def decoded_tokens(text: Text, way: str, device: torch.device) -> tuple[Tensor, ...]:
    """What a way's rows are fed behind their prompts, (rows,) each; the text's is the last row."""
    rows = [row[len(row) - text.num_compared + 1 :] for row in text.rows(way)]
    return torch.tensor(rows).to(device).unbind(1)


def prompts_of(text: Text, way: str) -> list[tuple[int, ...]]:
    """The prompts of a way's rows; behind each `num_compared - 1` tokens are decoded."""
    return [row[: len(row) - text.num_compared + 1] for row in text.rows(way)]
