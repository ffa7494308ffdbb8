"""The choice of a row's next token, with what it keeps from token to token.

Nothing here waits for a device: a choice can be part of what one does by itself. Knows settings and
logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from portkit.generation.sampling import next_tokens
from portkit.generation.settings import GenerationSettings


class Choice:
    """Called with logits (batch, vocab) it gives tokens (batch, 1); -1 in a row with NaN.

    `state` is which tokens each row has seen, where that matters; `generators` are the rows' own.
    """

    def __init__(
        self, settings: GenerationSettings, prompts: Sequence[Sequence[int]], logits: Tensor
    ) -> None:
        self._settings = settings
        self._seen = _seen(prompts, logits) if settings.repetition_penalty != 1 else None
        self.state = [] if self._seen is None else [self._seen]
        self.generators = [
            torch.Generator(logits.device).manual_seed(settings.seed + row)
            for row in range(len(prompts))
        ]

    def __call__(self, logits: Tensor) -> Tensor:
        tokens = next_tokens(logits, self._settings, self._seen, self.generators)[:, None]
        if self._seen is not None:
            self._seen.scatter_(1, tokens, True)
        return tokens.masked_fill(logits.isnan().any(-1, keepdim=True), -1)


def _seen(prompts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """Which tokens are in each prompt, bool (batch, vocab)."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, device=logits.device)] = True
    return seen
