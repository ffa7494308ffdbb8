"""Where the rows, the tokens and the channels of a site's tensor are: the language of `dims`.

`dims` names a tensor's dimensions, one word each: `batch`, `position` (new tokens), `key` (past and
new), `query`; every other word is a size that no pass changes. A tensor with fewer dimensions than
words has the first of them side by side in one, as `batch position channel` of (batch x tokens,
channels). `patch` counts what no token ids are behind, of which none is padding. `length` is a
size that follows the data in a way that is neither. A tensor need not have tokens, as a state has
none, nor rows, as a mask for all of them. Knows passes; runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from portkit.parity.probes.probe import Pass

BATCH, POSITION, KEY, QUERY, LENGTH = "batch", "position", "key", "query", "length"
PATCH = "patch"
_TOKENS = (POSITION, QUERY, PATCH)


def token_dim(dims: str) -> int | None:
    """Which dimension counts tokens; keys alone do where nothing else does. None: no dimension."""
    words = dims.split()
    found = next((word for word in (*_TOKENS, KEY) if word in words), None)
    return None if found is None else words.index(found)


def batch_dim(dims: str) -> int | None:
    """Which dimension counts rows of a batch."""
    words = dims.split()
    return words.index(BATCH) if BATCH in words else None


def is_steady(dims: str) -> bool:
    """Whether a token has as many values in every pass, so that channels add up over passes."""
    words = dims.split()
    place = token_dim(dims)
    others = {word for number, word in enumerate(words) if number != place}
    return not others & {KEY, LENGTH, *_TOKENS}


def by_token(tensor: Tensor, dims: str, one: Pass) -> Tensor:
    """(batch or 1, tokens or 1, …), whatever comes first in `dims`."""
    whole = _apart(tensor, dims, one)
    places = batch_dim(dims), token_dim(dims)
    whole = whole.movedim([p for p in places if p is not None], list(range(2 - places.count(None))))
    if places[0] is None:
        whole = whole.unsqueeze(0)
    return whole.unsqueeze(1) if places[1] is None else whole


def rows(tensor: Tensor, dims: str, one: Pass) -> Tensor:
    """(…) to (real tokens, channels): padding left out, heads and channels side by side.

    Keys and values reach back over the cache: their tokens are the last of past and new.
    """
    moved = by_token(tensor, dims, one)
    # Masks and tables may be for all rows one.
    moved = moved.expand(_num_rows(one, moved), *moved.shape[1:])
    if one.attention_mask is None and one.inputs is None:
        return moved.reshape(moved.shape[0] * moved.shape[1], -1)
    return moved.flatten(2)[real_tokens(one, dims, moved)]


def _num_rows(one: Pass, moved: Tensor) -> int:
    """How many rows a tensor of `by_token` stands for: of named inputs each has its own number."""
    return len(one.input_ids) if one.inputs is None or len(moved) == 1 else len(moved)


def real_tokens(one: Pass, dims: str, moved: Tensor) -> Tensor:
    """(batch, tokens) of what `by_token` gives, True where what `dims` has there is defined.

    A tensor without tokens is, in every row; but where its size follows the data in a way that
    nobody knows, only in rows without padding. Named inputs may have no tokens at all.
    """
    num_tokens, words = moved.shape[1], dims.split()
    if token_dim(dims) is not None and PATCH not in words:
        return one.real_of_last(num_tokens, _num_rows(one, moved))
    if one.inputs is not None:
        return one.real.new_ones(_num_rows(one, moved), num_tokens)
    if LENGTH in words:
        whole = one.real.all(1, keepdim=True)
        return whole if batch_dim(dims) is not None else whole.all(0).expand_as(whole)
    return one.real.new_ones(len(one.input_ids), 1)


def same_shape(dims: str, port: Tensor, reference: Tensor) -> bool:
    """Equal but for the batch: masks and tables may be for all rows one."""
    place = batch_dim(dims)
    if place is None:
        return port.shape == reference.shape
    batch = max(0, place + 1 - num_merged(port, dims))
    shapes = [(*one.shape[:batch], *one.shape[batch + 1 :]) for one in (port, reference)]
    return shapes[0] == shapes[1]


def num_merged(tensor: Tensor, dims: str) -> int:
    """How many of the first dimensions are one in this tensor."""
    return len(dims.split()) - tensor.dim() + 1


def sizes(shape: Sequence[int], dims: str, one: Pass) -> tuple[int, ...] | None:
    """Of every word; None where a tensor of this shape is not made of them."""
    words = dims.split()
    count = len(words) - len(shape) + 1
    if count <= 0 or not shape:
        return (*shape[: len(words) - 1], math.prod(shape[len(words) - 1 :]))
    if count == 1:
        return tuple(shape)
    first = _sizes(words[:count], shape[0], one)
    known = math.prod(one for one in first if one != -1)
    if first.count(-1) > 1 or known == 0 or shape[0] % known:
        return None
    first = [shape[0] // known if one == -1 else one for one in first]
    return (*first, *shape[1:]) if math.prod(first) == shape[0] else None


def apart(tensor: Tensor, dims: str, one: Pass) -> Tensor:
    """A tensor with a dimension for each word."""
    found = sizes(tensor.shape, dims, one)
    return tensor if found is None else tensor.reshape(found)


def _apart(tensor: Tensor, dims: str, one: Pass) -> Tensor:
    """The first dimension as the several that it is made of; what goes beyond the words, as one."""
    count = num_merged(tensor, dims)
    if count <= 0:
        return tensor.flatten(count - 2)
    if count == 1:
        return tensor
    return tensor.reshape(*_sizes(dims.split()[:count], tensor.shape[0], one), *tensor.shape[1:])


def _sizes(words: Sequence[str], whole: int, one: Pass) -> list[int]:
    """Of words that are one dimension; the one that is not known follows from the others."""
    batch = len(one.input_ids)
    if list(words) == [BATCH, POSITION]:
        return [batch, whole // batch]
    known = {BATCH: batch, POSITION: one.num_tokens, QUERY: one.num_tokens}
    return [known.get(word, -1) for word in words]
