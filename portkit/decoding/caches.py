"""Static caches: a line that holds every token, or a ring that holds a window's.

Keys of a layer are (slots, batch, kv_heads, head_dim): what is filled is a prefix, contiguous. A
ring overwrites its oldest token, so that its order is not the tokens': sums over it have other last
bits than the readable path's. Knows tensors and counts; knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from portkit.nn.cache import Cache, LayerCache, SlidingCache


@dataclass(frozen=True)
class Kind:
    """Layers that keep the same tokens: all of up to `num_slots`, or the last `num_slots`."""

    num_slots: int
    ring: bool

    def slot(self, past: int) -> int:
        """Where the token after `past` others goes."""
        return past % self.num_slots if self.ring else past

    def num_filled(self, num_tokens: int) -> int:
        """Slots that hold something after `num_tokens`."""
        return min(num_tokens, self.num_slots)

    def mask(self, past: int | Tensor, pads: Tensor, num_shown: int) -> Tensor:
        """Which of the first slots the token after `past` others sees: bool (batch, 1, 1, shown).

        `pads`, int64 (batch, 1), says how many tokens of each row are padding; `past` may be a
        tensor (1,). At least what is filled with that token must be shown.
        """
        slots = torch.arange(num_shown, device=pads.device)
        # The last token that went to each slot; below zero where none has.
        tokens = past - (past - slots) % self.num_slots
        return (tokens >= pads)[:, None, None]


class StaticCache:
    """Keys and values of all layers, each with slots of its own, for the rows of `empty`.

    `empty` is the cache that the family chose, which holds a prompt until this takes it over;
    `length` is how many tokens are to be held.
    """

    def __init__(self, empty: Cache, length: int) -> None:
        self.batch = empty.batch
        kinds = [_kind(layer, length) for layer in empty.layers]
        self.kinds = tuple(dict.fromkeys(kinds))
        """The different kinds that the layers have."""
        self.kind_of_layer = tuple(self.kinds.index(kind) for kind in kinds)
        self._layers = empty.layers
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def num_bytes(self, itemsize: int) -> int:
        """Bytes of all slots of `itemsize`-byte numbers."""
        slots = [self.kinds[index].num_slots for index in self.kind_of_layer]
        return self.batch * sum(
            2 * num_slots * layer.num_key_value_heads * layer.head_dim * itemsize
            for layer, num_slots in zip(self._layers, slots, strict=True)
        )

    def take(self, cache: Cache, dtype: torch.dtype, device: torch.device) -> None:
        """Hold what the readable path's cache holds after a prefill."""
        for layer, kind in zip(cache.layers, self.kind_of_layer, strict=True):
            heads, head_dim = layer.num_key_value_heads, layer.head_dim
            nothing = torch.empty(cache.batch, heads, 0, head_dim, dtype=dtype, device=device)
            shown = layer.update(nothing, nothing)  # (batch, kv_heads, held, head_dim)
            num_held = shown[0].shape[2]
            held = torch.arange(cache.length - num_held, cache.length, device=device)
            num_slots = self.kinds[kind].num_slots
            for kept, past in zip((self.keys, self.values), shown, strict=True):
                # Zeros are not touched until they are needed: a long context costs no memory yet.
                slots = past.new_zeros(num_slots, cache.batch, heads, head_dim)
                slots.index_copy_(0, held % num_slots, past.permute(2, 0, 1, 3))
                kept.append(slots)


def _kind(layer: LayerCache, length: int) -> Kind:
    # A ring even where nothing will leave it: of a model's regions there is then one form.
    if isinstance(layer, SlidingCache):
        return Kind(layer.window, ring=True)
    return Kind(length, ring=False)
