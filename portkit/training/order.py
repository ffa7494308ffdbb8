"""Which tokens a step trains on: a pure function of (seed, step), every document once an epoch.

An epoch lays the documents end to end in an order of its own, as a ring, cuts the ring into blocks
from a point of its own, and takes the blocks in an order of its own. Each token is so predicted
once an epoch; the last block is filled from the ring's beginning. Nothing is remembered between
steps, so any step can be replayed, on any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from portkit.errors import DataError
from portkit.training.tokens import TokenFile

_DOCUMENTS, _BLOCKS, _PHASE = range(3)


@dataclass(frozen=True)
class _Epoch:
    documents: npt.NDArray[np.int64]
    """Which document stands where in the ring."""
    starts: npt.NDArray[np.int64]
    """Where each of them begins in the ring, and the ring's end."""
    blocks: npt.NDArray[np.int64]
    phase: int


class Order:
    """The blocks of `num_tokens` inputs and their targets, in the order of training.

    Raises DataError where the text is shorter than a block.
    """

    def __init__(self, tokens: TokenFile, num_tokens: int, seed: int) -> None:
        if tokens.num_tokens < num_tokens + 1:
            raise DataError(
                f"the training text has {tokens.num_tokens:,} tokens, and a block needs "
                f"{num_tokens + 1:,}: give more text or a shorter --context"
            )
        self._tokens, self._num_tokens, self._seed = tokens, num_tokens, seed
        self.blocks_per_epoch = -(-tokens.num_tokens // num_tokens)
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def blocks(self, first: int, count: int) -> Tensor:
        """Blocks `first` to `first + count` of the whole training, int64 (count, num_tokens + 1).

        Columns but the last are inputs, columns but the first targets.
        """
        return torch.from_numpy(np.stack([self._block(first + row) for row in range(count)]))

    def _block(self, index: int) -> npt.NDArray[np.int64]:
        epoch, place = divmod(index, self.blocks_per_epoch)
        layout = self._epoch(epoch)
        start = layout.phase + int(layout.blocks[place]) * self._num_tokens
        total, wanted = self._tokens.num_tokens, self._num_tokens + 1
        parts, held = [], 0
        while held < wanted:
            at = (start + held) % total
            slot = int(np.searchsorted(layout.starts, at, "right")) - 1
            offset = int(self._tokens.starts[layout.documents[slot]]) + at - layout.starts[slot]
            length = min(wanted - held, int(layout.starts[slot + 1]) - at)
            parts.append(self._tokens.ids[offset : offset + length])
            held += length
        return np.concatenate(parts).astype(np.int64)

    def _lay_out(self, epoch: int) -> _Epoch:
        tokens = self._tokens
        documents = _permutation(tokens.num_documents, (self._seed, epoch, _DOCUMENTS))
        lengths = np.diff(tokens.starts)[documents]
        phase = int(_random_words(1, (self._seed, epoch, _PHASE))[0] % np.uint64(self._num_tokens))
        return _Epoch(
            documents,
            np.concatenate(([0], np.cumsum(lengths))),
            _permutation(self.blocks_per_epoch, (self._seed, epoch, _BLOCKS)),
            phase,
        )


def _permutation(count: int, key: tuple[int, ...]) -> npt.NDArray[np.int64]:
    return np.argsort(_random_words(count, key), kind="stable")


def _random_words(count: int, key: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    """SplitMix64 (Steele et al. 2014) from a state that `key` decides.

    Written out because the libraries do not promise the same numbers in their next version.
    """
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in key:
            state = _mix(np.array([state ^ np.uint64(part % 2**64)]))[0]
        golden = np.uint64(0x9E3779B97F4A7C15)
        return _mix(state + golden * np.arange(1, count + 1, dtype=np.uint64))


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
