"""Recipes of attention: which keys a query sees, and what the kernel makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from portkit.parity.faults.scene import Scene
from portkit.parity.sides.attention import additive


@dataclass(frozen=True)
class Mask:
    """The keys that a query sees, (batch or 1, 1, queries, keys), of those that are held."""

    window: int | None
    """How many, itself included; None: all."""
    ahead: int = 0
    """How many of the tokens after itself; -1: not even itself."""
    padding: bool = True
    chunk: int | None = None
    """Only those of the query's own chunk of so many tokens."""
    chunk_offset: int = 0
    """Added to a token's place when its chunk is told."""
    held: int = 0
    """How many keys a sliding cache holds beyond the window less one."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        one, past = scene.one, scene.past
        held = past if self.window is None else min(past, self.window - 1 + self.held)
        num_keys = held + one.num_tokens
        queries = torch.arange(past, past + one.num_tokens, device=one.input_ids.device)[:, None]
        keys = torch.arange(past - held, past + one.num_tokens, device=queries.device)[None]
        seen = keys <= queries + self.ahead
        if self.window is not None:
            seen &= keys > queries - self.window - (max(self.held, 0) if past else 0)
        seen = seen[None, None]
        if self.chunk is not None:
            seen = seen & self._own_chunk(scene, num_keys)
        if self.padding and one.attention_mask is not None:
            seen = seen & one.attention_mask[:, None, None, -num_keys:].bool()
        return seen

    def _own_chunk(self, scene: Scene, num_keys: int) -> Tensor:
        """Chunks are counted from a row's first real token."""
        one = scene.one
        places = torch.arange(scene.past + one.num_tokens, device=one.input_ids.device)[None]
        if one.attention_mask is not None and self.padding:
            places = places - (one.attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
        chunks = (places + self.chunk_offset).div(self.chunk or 1, rounding_mode="floor")
        return chunks[:, None, -one.num_tokens :, None] == chunks[:, None, None, -num_keys:]


@dataclass(frozen=True)
class Kernel:
    """softmax(q k^T x scale) v by the reference's own kernel, or from its parts."""

    scale: float
    kernel: str
    cap: float | None = None
    """Scores are capped softly."""
    tiled: bool = False
    """Head i reads group i % groups, and not i // repeats."""
    mask: Mask | None = None
    """Another mask than the recorded one."""
    parts: bool = False
    """Computed from its parts although a fused kernel was asked for."""
    low_softmax: bool = False
    """Every step of the softmax is rounded to the model's dtype. (Torch's own computes in float32
    within, whatever it is given, so that leaving the upcast to it changes next to no bit.)"""
    wide_scores: bool = False
    wide_weights: bool = False

    def run(self, scene: Scene, site: str) -> Tensor | None:
        attention = scene.facts.attention(site)
        query, key, value = (scene.at(f"{attention}#{role}") for role in ("query", "key", "value"))
        seen = scene.at(f"{attention}#mask")
        if query is None or key is None or value is None or seen is None:
            return None
        form = "as it was"
        if self.mask is not None:
            other = self.mask.run(scene, f"{attention}#mask")
            if other is None or other.shape[2:] != seen.shape[2:]:
                return None
            if not torch.equal(other.expand_as(seen), seen):
                seen, form = other, "boolean"
        if self.tiled:
            repeats = query.shape[1] // key.shape[1]
            key, value = (one.repeat(1, repeats, 1, 1) for one in (key, value))
        special = self.cap is not None or self.low_softmax or self.wide_scores or self.wide_weights
        if special or self.parts:
            return self._parts(query, key, value, seen)
        return self._whole(scene, attention, (query, key, value, seen), form)

    def _whole(
        self, scene: Scene, attention: str, given: tuple[Tensor, ...], form: str
    ) -> Tensor | None:
        """By the reference's kernel. Whether it was given a mask decides bits, and is tried."""
        query, key, value, seen = given
        module: Any = scene.facts.modules[attention]
        run = scene.facts.reference.kernels()[self.kernel]

        def context(mask: Tensor | None) -> Tensor:
            if self.tiled:  # the module would say that heads are still to be repeated
                return self._parts(query, key, value, seen)
            made, _ = run(module, query, key, value, mask, scaling=self.scale, dropout=0.0)
            return made  # type: ignore[no-any-return]

        if self.kernel == "eager":
            return context(additive(seen, query.dtype))
        if form == "as it was" and not scene.exact:
            key_ = "form", attention
            if key_ not in scene.memory:
                scene.memory[key_] = self._was_masked(scene, attention, given, run)
            return context(seen if scene.memory[key_] else None)
        return context(seen)

    def _was_masked(
        self, scene: Scene, attention: str, given: tuple[Tensor, ...], run: Any
    ) -> bool:
        query, key, value, seen = given
        causal = torch.ones(seen.shape[2:], dtype=torch.bool, device=seen.device)
        causal = causal.tril(seen.shape[3] - seen.shape[2])
        if not bool((seen == causal).all()) or seen.shape[2] not in (1, seen.shape[3]):
            return True
        module: Any = scene.facts.modules[attention]
        plain, _ = run(module, query, key, value, None, scaling=module.scaling, dropout=0.0)
        return not torch.equal(plain, scene.given(f"{attention}#context"))

    def _parts(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        dtype = query.dtype
        if key.shape[1] != query.shape[1]:
            repeats = query.shape[1] // key.shape[1]
            # Expanded as the reference does: how heads lie in memory decides bits.
            key, value = (
                one[:, :, None]
                .expand(-1, -1, repeats, -1, -1)
                .reshape(len(one), -1, *one.shape[2:])
                for one in (key, value)
            )
        if self.wide_scores:
            query, key = query.float(), key.float()
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scale
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        scores = scores + additive(seen, scores.dtype)
        if self.low_softmax:
            weights = _softmax_in(scores, dtype)
        else:
            weights = F.softmax(scores, dim=-1, dtype=torch.float32)
            weights = weights if self.wide_weights else weights.to(dtype)
        context = torch.matmul(weights, value.to(weights.dtype)).to(dtype)
        return context.transpose(1, 2).contiguous()


def _softmax_in(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Every step in the model's dtype."""
    scores = scores.to(dtype)
    powers = (scores - scores.max(-1, keepdim=True).values).exp()
    return powers / powers.sum(-1, keepdim=True)


def masks(scene: Scene, site: str) -> Iterator[Mask]:
    attention = scene.facts.attention(site)
    window = scene.facts.window(attention)
    yield Mask(window, chunk=scene.facts.chunk(attention))
    if window is not None:
        yield Mask(None)


def kernels(scene: Scene, site: str) -> Iterator[Kernel]:
    module: Any = scene.facts.modules[scene.facts.attention(site)]
    if isinstance(getattr(module, "scaling", None), float):
        yield Kernel(module.scaling, scene.facts.reference.attention)
