"""Prompt lookup: what followed the same words before is proposed, and checked in one pass.

The readable model reads its last token and the proposal together; of the proposal it keeps what it
would have said itself (Saxena 2023, "Prompt Lookup Decoding"). A pass over several tokens rounds
differently than one over a single token. Where the two likeliest logits are so close that this
could matter, the token is left to a pass of its own, as without speculation. One row, greedy.
Knows tokens and caches; knows no text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.errors import GenerationError
from portkit.nn.likeliest import likeliest

_LONGEST_MATCH, _SHORTEST_MATCH = 4, 2
_PROPOSED = 8
_CLOSE_STEPS = 16
"""Two logits within so many steps of their dtype are too close for a pass over several tokens."""


class Speculative:
    """A model whose greedy decoding proposes what the text said before; starts engines of it."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model

    def start(
        self, prompts: Sequence[Sequence[int]], room: int, largest: int | None = None
    ) -> LookupSession:
        """Raises GenerationError for several prompts, and where more than greedy is asked for."""
        if len(prompts) != 1 or largest != 1:
            raise GenerationError(
                "--speculate proposes for one prompt, decoded greedily and without a repetition "
                "penalty: leave it out, or give --greedy and one -p"
            )
        return LookupSession(self._model, prompts[0], room)


class LookupSession:
    """One row being continued, several tokens at a time where the text repeats itself."""

    def __init__(self, model: CausalLM, prompt: Sequence[int], room: int) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._text = list(prompt)
        self._length = len(prompt) + room
        self._cache = model.new_cache(1, self._length + _PROPOSED)
        self.num_passes = 0
        """Passes of the model so far, the prefill among them."""

    @torch.inference_mode()
    def prefill(self, chunk: int | None = None) -> Tensor:
        """Logits (1, vocab) after the prompt, fed `chunk` tokens at a time or all at once."""
        size = chunk or len(self._text)
        for start in range(0, len(self._text), size):
            hidden_states = self._feed(self._text[start : start + size])
            self._cache.advance(hidden_states.shape[1])
        return self._model.logits(hidden_states[:, -1:])[:, -1]

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Logits (1, vocab) after one more token (1,)."""
        self._text.append(int(tokens))
        hidden_states = self._feed(self._text[-1:])
        self._cache.advance(1)
        return self._model.logits(hidden_states)[:, -1]

    @torch.inference_mode()
    def greedy(self, tokens: Tensor) -> Tensor:
        """What greedy decoding says after one more token (1,): (1, new); -1 where it is NaN."""
        proposed = self._propose([*self._text, int(tokens)])
        if not proposed:
            return likeliest(self.decode(tokens))[:, None]
        self._text.append(int(tokens))
        hidden_states = self._feed([self._text[-1], *proposed])
        logits = self._model.logits(hidden_states)[0]
        said, sure = logits.float().argmax(-1).tolist(), _are_sure(logits)
        found: list[int] = []
        # Place i says what follows the text and the first i of the proposal.
        for place, token in enumerate(said):
            if not sure[place] or (place > 0 and found[-1] != proposed[place - 1]):
                break
            found.append(token)
        if not found:
            self._text.pop()
            return likeliest(self.decode(tokens))[:, None]
        # Of what was found the last has not been fed, as without speculation.
        self._cache.advance(len(found))
        self._text += found[:-1]
        return torch.tensor([found], device=self._device)

    def _propose(self, text: list[int]) -> list[int]:
        """What followed an earlier occurrence of the text's end; nothing without one.

        Of the longest end that occurs, the latest occurrence with enough behind it.
        """
        count = max(0, min(_PROPOSED, self._length - len(text) - 1))
        for size in range(_LONGEST_MATCH, _SHORTEST_MATCH - 1, -1):
            longest: list[int] = []
            for start in range(len(text) - size - 1, -1, -1):
                if text[start : start + size] == text[-size:]:
                    longest = max(longest, text[start + size :][:count], key=len)
                    if len(longest) == count:
                        break
            if longest:
                return longest
        return []

    def _feed(self, token_ids: Sequence[int]) -> Tensor:
        self.num_passes += 1
        ids = torch.tensor([list(token_ids)], device=self._device)
        return self._model.hidden_states(ids, cache=self._cache)


def _are_sure(logits: Tensor) -> list[bool]:
    """Of (places, vocab): whether the likeliest leads by more than rounding; False for NaN."""
    first, second = logits.float().topk(2).values.unbind(-1)
    size = torch.finfo(logits.dtype).eps * torch.maximum(first.abs(), second.abs())
    return (first - second > _CLOSE_STEPS * size).tolist()
