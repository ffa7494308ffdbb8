"""The readable model, decoding: prompts padded on the left, a prefill, and token after token.

What is right by definition, and what anything faster takes a prompt over from. Knows how a model
and its cache are called, and how rows of several lengths are padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.nn.likeliest import likeliest


class ReadableBatch:
    """A batch of prompts (token ids), padded on the left, each with up to `room` tokens to come."""

    def __init__(self, model: CausalLM, prompts: Sequence[Sequence[int]], room: int) -> None:
        device = next(model.parameters()).device
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        # Which id pads does not matter, it is masked; 0 is in every vocabulary.
        padded = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        self._model = model
        self._input_ids = torch.tensor(padded, device=device)
        self.pads = torch.tensor(pads, device=device)[:, None]
        self.masked = any(pads)
        """Whether any row is padded."""
        # The last token that a row gets is not fed to the model any more.
        self.length = longest + room - 1
        """Tokens that a row has room for."""
        self.cache = model.new_cache(len(prompts), self.length)
        self.past = 0
        """Tokens fed so far."""

    @property
    def last(self) -> Tensor:
        """The prompts' last tokens, (batch,)."""
        return self._input_ids[:, -1]

    def prefill(self, chunk: int | None = None) -> Tensor:
        """Logits (batch, vocab) after the prompts, fed `chunk` tokens at a time or all at once."""
        num_tokens = self._input_ids.shape[1]
        for start in range(0, num_tokens, chunk or num_tokens):
            hidden_states = self._feed(self._input_ids[:, start : start + (chunk or num_tokens)])
        return self._last_logits(hidden_states)

    def decode(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocab) after one more token (batch,) in each row."""
        return self._last_logits(self._feed(tokens[:, None]))

    def greedy(self, tokens: Tensor) -> Tensor:
        """The likeliest token (batch, 1) after one more (batch,); -1 where logits are NaN."""
        return likeliest(self.decode(tokens))[:, None]

    def _feed(self, input_ids: Tensor) -> Tensor:
        """Hidden states after more tokens (batch, tokens)."""
        end = self.past + input_ids.shape[1]
        slots = torch.arange(end, device=input_ids.device)
        hidden_states = self._model.hidden_states(
            input_ids,
            positions=(slots[self.past :] - self.pads).clamp(min=0),
            cache=self.cache,
            attention_mask=slots >= self.pads if self.masked else None,
        )
        self.cache.advance(input_ids.shape[1])
        self.past = end
        return hidden_states

    def _last_logits(self, hidden_states: Tensor) -> Tensor:
        # The head reads one position only: all of them would be gigabytes for a long prompt.
        return self._model.logits(hidden_states[:, -1:])[:, -1]
