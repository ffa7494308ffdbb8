"""Probes: what is run on both sides, and how it is fed.

A probe is a list of passes. A pass is one call of a model: token ids, their positions, which of
them are padding, and the earlier pass whose cache it goes on from. The default probe is chosen from
the model, so that what its config turns on is exercised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.nn.cache import SlidingCache


@dataclass(frozen=True)
class Pass:
    """One call. All tensors int64; 1 in the mask is a real token, and it covers past and new."""

    name: str
    input_ids: Tensor
    """(batch, tokens)"""
    positions: Tensor
    """(batch, tokens)"""
    attention_mask: Tensor | None = None
    """(batch, past + tokens), or None where every token is real."""
    continues: str | None = None

    @property
    def real(self) -> Tensor:
        """(batch, tokens), True where the new token is real: only there are results defined."""
        return self.real_of_last(self.input_ids.shape[1])

    def real_of_last(self, num_tokens: int) -> Tensor:
        """(batch, num_tokens), the same for the last tokens of past and new together."""
        if self.attention_mask is None:
            return torch.ones(len(self.input_ids), num_tokens, dtype=torch.bool)
        return self.attention_mask[:, -num_tokens:].bool()


Probe = tuple[Pass, ...]


def default_probe(model: CausalLM, seed: int = 0) -> Probe:
    """Prompts around the window, decoding across it, chunks, padding, far positions.

    Token ids are drawn from `seed`. A model without windows is probed as if it had one of 16.
    """
    config = model.config
    windows = [c.window for c in model.new_cache(1, 1).layers if isinstance(c, SlidingCache)]
    window = min(windows, default=16)
    generator = torch.Generator().manual_seed(seed)

    def tokens(batch: int, count: int) -> Tensor:
        return torch.randint(config.vocab_size, (batch, count), generator=generator)

    def plain(name: str, batch: int, past: int, count: int, continues: str | None = None) -> Pass:
        positions = torch.arange(past, past + count).expand(batch, -1)
        return Pass(name, tokens(batch, count), positions, None, continues)

    short, long = max(2, window // 2), window + window // 2 + 3
    # Three tokens short of the window, so that decoding crosses it in the middle.
    passes = [
        plain("short", 2, 0, short),
        plain("window", 1, 0, window),
        plain("long", 2, 0, long),
        plain("prompt", 2, 0, max(1, window - 3)),
    ]
    for _ in range(8):
        last = passes[-1]
        past = int(last.positions[0, -1]) + 1
        passes.append(plain(f"decode.{past}", 2, past, 1, last.name))
    passes += [
        plain("chunk.1", 1, 0, short),
        plain("chunk.2", 1, short, window, "chunk.1"),
        plain("chunk.3", 1, short + window, 5, "chunk.2"),
    ]
    passes += _padded(tokens(3, long + 2), long)
    passes.append(_far(tokens(1, long), config.max_position_embeddings))
    return tuple(passes)


def _padded(input_ids: Tensor, prompt: int) -> list[Pass]:
    """A left-padded batch: rows a third short, one token short, and full; then two decode steps."""
    mask = torch.ones_like(input_ids)
    mask[0, : prompt // 3], mask[1, :1] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cuts = [(0, prompt), (prompt, prompt + 1), (prompt + 1, prompt + 2)]
    names = ["padded", "padded.decode.1", "padded.decode.2"]
    return [
        Pass(name, input_ids[:, a:b], positions[:, a:b], mask[:, :b], before)
        for name, before, (a, b) in zip(names, [None, *names], cuts, strict=False)
    ]


def _far(input_ids: Tensor, max_position_embeddings: int) -> Pass:
    """Positions that jump: strides, then the very end of what the model was made for."""
    count = input_ids.shape[1]
    stride = max(1, max_position_embeddings // (4 * count))
    positions = torch.arange(count) * stride
    tail = min(3, count)
    positions[-tail:] = max_position_embeddings - torch.arange(tail, 0, -1)
    # With the mask given, the reference cannot take the jumps for several packed sequences.
    return Pass("far", input_ids, positions[None], torch.ones_like(input_ids))
