"""What a family is to the engine: config, model, weight map. Knows no family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from portkit.config import ConfigReader
from portkit.nn.cache import Cache
from portkit.weights import WeightMap


class ModelConfig(Protocol):
    """What every family's frozen config dataclass offers the engine."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


class CausalLM(nn.Module):
    """A decoder with a language-model head: `model` gives hidden states, `logits` reads them out.

    Families subclass it and fill in the parts; how a model is called is the same for all.
    """

    model: nn.Module
    config: ModelConfig

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (batch, tokens, vocab_size) in the parameters' dtype.

        `input_ids` int64 (batch, tokens); `positions` likewise, by default counting on from the
        cache; `attention_mask` (batch, past + tokens), nonzero at real tokens, None where all are.
        The caller advances the cache.
        """
        return self.logits(self.hidden_states(input_ids, positions, cache, attention_mask))

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, (batch, tokens, hidden_size); arguments as in `forward`."""
        past = 0 if cache is None else cache.length
        num_tokens = input_ids.shape[1]
        if positions is None:
            positions = torch.arange(past, past + num_tokens, device=input_ids.device)[None]
        padding = None if attention_mask is None else attention_mask.bool()
        if padding is not None:
            assert padding.shape[1] == past + num_tokens, (
                "attention_mask covers past and new tokens"
            )
            if bool(padding.all()):
                padding = None
        hidden: Tensor = self.model(input_ids, positions, cache, padding)
        return hidden

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(batch, tokens, hidden_size) to (batch, tokens, vocab_size)."""
        raise NotImplementedError

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of up to `length` tokens."""
        raise NotImplementedError


@dataclass(frozen=True)
class Nesting:
    """How smaller models lie within a larger one of a family (MatFormer, arXiv:2310.07707)."""

    config: Callable[[ConfigReader, Sequence[int], Sequence[int]], dict[str, Any]]
    """The text model's config, the widths of the layers that are kept, and their numbers, to the
    smaller model's config. Raises `InvalidConfig` where a layer needs one that is not kept."""
    by_layer: Mapping[str, int]
    """Parameters that hold a block for each layer, and along which dimension."""


@dataclass(frozen=True)
class Architecture:
    """One family's port, under the `model_type` that `config.json` calls it by."""

    model_type: str
    summary: str
    read_config: Callable[[ConfigReader], Any]
    build: Callable[[Any, str], CausalLM]
    """(config, attention kernel) to the model, on whatever device torch creates tensors."""
    weight_map: WeightMap
    text_config: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    """`config.json` as the text model alone has it: what an export writes."""
    nesting: Nesting | None = None
