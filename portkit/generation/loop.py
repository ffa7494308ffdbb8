"""The decode loop: a batch of prompts, a prefill, and then token after token.

Knows engines, how a token is chosen, and when a row ends. Rows that have ended are computed along
until the last one ends. Prints nothing and reads no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.errors import GenerationError
from portkit.generation.choosing import Choice
from portkit.generation.settings import GenerationSettings
from portkit.generation.streaming import TextStream
from portkit.readable import ReadableBatch
from portkit.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length", "context"]
"""An EOS token; a stop string; as many tokens as asked for; the end of the model's context."""


@dataclass(frozen=True)
class Step:
    """One new token of one row.

    `text` is what has become certain with it: the texts of a row's steps in a row are its text,
    without EOS and cut before a stop string. `finish_reason` is set on a row's last step.
    """

    row: int
    token_id: int
    text: str
    finish_reason: FinishReason | None


class Engine(Protocol):
    """A batch of prompts that is being continued, however its tokens are computed."""

    def prefill(self, chunk: int | None = None) -> Tensor:
        """Logits (batch, vocab) after the prompts, fed `chunk` tokens at a time or all at once."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocab) after one more token (batch,) in each row."""

    def greedy(self, tokens: Tensor) -> Tensor:
        """What greedy decoding goes on with after one more token (batch,) in each row.

        One token or more, (batch, new); -1 in a row whose logits are NaN.
        """


@runtime_checkable
class DrawingEngine(Engine, Protocol):
    """An engine on a device that goes on with what it has drawn, without the host."""

    def draw(self, tokens: Tensor, choose: Choice) -> Tensor:
        """What `choose` makes of the logits after one more token (batch,) in each row: (batch, 1).

        `tokens` are what was drawn last, and `choose` is the same every time.
        """


class Startable(Protocol):
    """What makes an engine for a batch, as the fast path of a model does."""

    def start(
        self, prompts: Sequence[Sequence[int]], room: int, largest: int | None = None
    ) -> Engine:
        """`room`: how many tokens follow at most. `largest`: how many of the largest logits decide
        the next token; None where all may.
        """


def generate(
    model: CausalLM | Startable,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    context_length: int,
    tokenizer: Tokenizer | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Step]:
    """Continue each prompt (token ids); yields the steps of all unfinished rows in turn.

    `context_length` is the number of positions that the model was made for: a row ends there, with
    the reason "context". Without a `tokenizer` steps have no text. `prefill_chunk` feeds the
    prompts so many tokens at a time, which takes less memory and changes last bits.

    A row does not depend on its neighbours but for rounding: the padding is masked, its positions
    count from its own first token, and it draws from a generator of its own.

    Raises GenerationError at once for prompts that cannot be continued and for stop strings without
    a tokenizer, and in the course of it where a model's logits are NaN.
    """
    if not prompts or not all(prompts):
        raise GenerationError("an empty prompt cannot be continued: give at least one token")
    longest = max(map(len, prompts))
    if longest >= context_length:
        raise GenerationError(
            f"a prompt of {longest} tokens leaves no room in a context of {context_length}: "
            "shorten it"
        )
    if settings.stop and tokenizer is None:
        raise GenerationError("stop strings are found in text: give a tokenizer with them")
    if settings.max_length is not None and longest >= settings.max_length:
        raise GenerationError(
            f"a prompt of {longest} tokens exceeds max_length {settings.max_length}: shorten it or "
            "give --max-new-tokens"
        )
    assert prefill_chunk is None or prefill_chunk > 0
    rows = [
        _Row(index, prompt, settings, context_length, tokenizer)
        for index, prompt in enumerate(prompts)
    ]
    room = max(row.room for row in rows)
    engine: Engine
    if isinstance(model, CausalLM):
        engine = ReadableBatch(model, prompts, room)
    else:
        engine = model.start(prompts, room, _largest(settings))
    return _steps(engine, prompts, rows, settings, prefill_chunk)


def _largest(settings: GenerationSettings) -> int | None:
    """How many of the largest logits decide the next token; None where all may."""
    if settings.repetition_penalty != 1:
        return None
    return (settings.top_k or None) if settings.do_sample else 1


# As a decorator it holds between two yields only, not in the code that consumes the steps.
@torch.inference_mode()
def _steps(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    rows: list[_Row],
    settings: GenerationSettings,
    prefill_chunk: int | None,
) -> Iterator[Step]:
    logits = engine.prefill(prefill_chunk)
    choose = Choice(settings, prompts, logits)
    new = choose(logits)
    while True:
        for tokens in new.unbind(1):
            token_ids = tokens.tolist()
            if min(token_ids) < 0:
                raise GenerationError(
                    "the model's logits are NaN: compute in a wider dtype (--dtype float32), or "
                    "look for damaged weights with `portkit load --check`"
                )
            for row, token_id in zip(rows, token_ids, strict=True):
                if row.finish_reason is None:
                    yield row.take(token_id)
            if all(row.finish_reason for row in rows):
                return
        if settings.repetition_penalty == 1 and not settings.do_sample:
            new = engine.greedy(tokens)
        elif isinstance(engine, DrawingEngine):
            new = engine.draw(tokens, choose)
        else:
            new = choose(engine.decode(tokens))


class _Row:
    """One prompt's continuation: how far it is, and whether it has ended."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        settings: GenerationSettings,
        context_length: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.index = index
        self.room, self._why_no_more = _room(len(prompt), settings, context_length)
        self.finish_reason: FinishReason | None = None
        self._eos_token_ids = settings.eos_token_ids
        self._text = (
            None if tokenizer is None else TextStream(tokenizer.stream(after=prompt), settings.stop)
        )

    def take(self, token_id: int) -> Step:
        """The next token as a step; sets `finish_reason` if it is the row's last."""
        self.room -= 1
        text = ""
        if token_id in self._eos_token_ids:
            self.finish_reason = "eos"
        else:
            text = self._text.push(token_id) if self._text else ""
            self.finish_reason = self._why_no_more if self.room == 0 else None
        if self._text:
            if self.finish_reason:
                text += self._text.finish()
            if self._text.stopped:
                self.finish_reason = "stop"
        return Step(self.index, token_id, text, self.finish_reason)


def _room(
    prompt_length: int, settings: GenerationSettings, context_length: int
) -> tuple[int, FinishReason]:
    """How many tokens may follow a prompt, and why no more."""
    room = settings.max_new_tokens
    if settings.max_length is not None:
        room = min(room, settings.max_length - prompt_length)
    if context_length - prompt_length < room:
        return context_length - prompt_length, "context"
    return room, "length"
