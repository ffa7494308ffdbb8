"""From logits to the next token: pure functions on float32 (batch, vocab), one filter each.

A filter sets what it removes to -inf and never removes everything. Knows no model, text or cache.
Each equals the reference's logits processor of the same name bit for bit, ties included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from portkit.generation.settings import GenerationSettings


def next_tokens(
    logits: Tensor,
    settings: GenerationSettings,
    seen: Tensor | None,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """The next id of each row, int64 (batch,), from its last logits (batch, vocab) in any dtype.

    `seen`, bool (batch, vocab), marks the tokens of prompt and output; only a repetition penalty
    reads it. Without sampling the first of the likeliest; else row i draws from `generators[i]`.
    """
    logits = logits.float()
    if seen is not None:
        logits = penalize_repetition(logits, seen, settings.repetition_penalty)
    if not settings.do_sample:
        return logits.argmax(-1)
    logits = logits / settings.temperature
    if settings.top_k > 0:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = keep_top_p(logits, settings.top_p)
    if settings.min_p > 0:
        logits = keep_min_p(logits, settings.min_p)
    probabilities = logits.softmax(-1)
    draws = [
        _draw(row, generator) for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.stack(draws)


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """An index, int64 (), drawn with `probabilities` (vocab,).

    As torch's `multinomial` draws one, which would wait for the device to look for damage first:
    the first of several exponential clocks to ring, each with its probability for a rate.
    """
    waits = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / waits).argmax()


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide what was seen by `penalty` where positive, multiply where negative.

    Source: Keskar et al. 2019 (CTRL), section 4.1, with the sign that the paper leaves out.
    """
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the `k` likeliest, and all that tie with the last of them. Source: Fan et al. 2018."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the likeliest tokens that together reach probability `p`, the crossing one included.

    Source: Holtzman et al. 2020. Counted from the unlikeliest up, as the reference does: which of
    two equal logits is cut, and the last bit of the sum, depend on it.
    """
    ascending, order = logits.sort(-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[:, -1] = False
    return logits.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep what is at least `p` times as probable as the likeliest. Source: Nguyen et al. 2024."""
    probabilities = logits.softmax(-1)
    least = p * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -torch.inf)
