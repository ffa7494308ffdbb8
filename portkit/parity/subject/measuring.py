"""Measuring dimensions: which axis of a tensor follows the rows, the tokens, the past, or nothing.

A site's tensor was seen in several passes, with other numbers of rows, of tokens, and of tokens
before. An axis whose size is their product, times a number that stays, is made of them. Knows
shapes and the two recordings that tell which of two merged axes comes first; runs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from portkit.parity.subject.dims import BATCH, KEY, LENGTH, POSITION

CHANNEL, HEAD, STREAM, ONE, VOCABULARY = "channel", "head", "stream", "one", "vocabulary"


class Order(StrEnum):
    """How rows and something else lie in one axis."""

    outer = "rows outermost"
    inner = "something around rows, and each row's tokens side by side"


_CHANGED = 0.1
"""Of a tensor's RMS: what another token changes is more than rounding."""


@dataclass(frozen=True)
class Seen:
    """A site's tensor in one pass."""

    num_rows: int
    num_tokens: int
    num_keys: int
    """Past and new tokens together."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Axis:
    """What an axis is made of: rows, new or all tokens, and a number that stays."""

    batch: bool
    tokens: str | None
    times: int

    @property
    def follows(self) -> bool:
        return self.batch or self.tokens is not None


def measured(
    seen: Sequence[Seen], vocab_size: int, possible: Collection[Order] = (Order.outer,)
) -> str:
    """The dims of a site. `possible`: how rows and something else may lie in one axis."""
    if len({len(one.shape) for one in seen}) > 1:
        return _unknown(seen)
    axes = [_axis([one.shape[place] for one in seen], seen) for place in range(len(seen[0].shape))]
    known = [one for one in axes if one is not None]
    merged = [number for number, one in enumerate(axes) if one is not None and _is_merged(one)]
    if _repeats(known) or any(merged[1:]) or (merged and merged[0] != 0):
        return _unknown(seen)
    if merged and axes[0] is not None and axes[0].batch and not possible:
        return _unknown(seen)
    return " ".join(_words(axes, vocab_size, Order.outer in possible)) or LENGTH


def _axis(sizes: Sequence[int], seen: Sequence[Seen]) -> _Axis | None:
    """The simplest that gives these sizes; None where none does."""
    for tokens, batch in ((None, False), (None, True), (POSITION, False), (KEY, False),
                          (POSITION, True), (KEY, True)):  # fmt: skip
        times = set()
        for size, one in zip(sizes, seen, strict=True):
            of = {None: 1, POSITION: one.num_tokens, KEY: one.num_keys}[tokens]
            whole, rest = divmod(size, of * (one.num_rows if batch else 1))
            times.add(-1 if rest else whole)
        if len(times) == 1 and min(times) > 0:
            return _Axis(batch, tokens, times.pop())
    return None


def _is_merged(axis: _Axis) -> bool:
    return axis.batch + (axis.tokens is not None) + (axis.times > 1) > 1 if axis.follows else False


def _repeats(axes: Sequence[_Axis]) -> bool:
    """Whether rows, or tokens of one kind, are two axes, as the queries' and the keys' tokens."""
    batches = sum(one.batch for one in axes)
    return batches > 1


def _unknown(seen: Sequence[Seen]) -> str:
    """Of rows, if that is to be seen, and sizes that follow the data."""
    follows = all(one.shape and one.shape[0] == one.num_rows for one in seen)
    return f"{BATCH} {LENGTH}" if follows and len({one.num_rows for one in seen}) > 1 else LENGTH


def _words(axes: Sequence[_Axis | None], vocab_size: int, is_batch_first: bool) -> list[str]:
    words: list[str] = []
    steady = [n for n, one in enumerate(axes) if one is not None and not one.follows]
    has_batch = any(one is not None and one.batch for one in axes)
    first = next((n for n, one in enumerate(axes) if one is None or one.follows), -1)
    for number, axis in enumerate(axes):
        if axis is None:
            words.append(LENGTH)
        elif not axis.follows:
            is_last = number == steady[-1] and number > first
            if axis.times == 1 and not has_batch and number == 0:
                words.append(BATCH)  # one for all rows, as rotary tables are
            elif is_last:
                words.append(VOCABULARY if axis.times == vocab_size else CHANNEL)
            else:
                words.append(ONE if axis.times == 1 else STREAM if number < first else HEAD)
        else:
            parts = [BATCH] * axis.batch + ([axis.tokens] if axis.tokens else [])
            if axis.times > 1:
                parts = [*parts, HEAD] if is_batch_first else [STREAM, *parts]
            words += parts
    return _distinct(words)


def _distinct(words: Sequence[str]) -> list[str]:
    """Each word once: the second of a kind is numbered."""
    found: list[str] = []
    for word in words:
        number = 1
        while (word if number == 1 else f"{word}{number}") in found:
            number += 1
        found.append(word if number == 1 else f"{word}{number}")
    return found


def orders(plain: Tensor, other: Tensor, num_tokens: int) -> frozenset[Order]:
    """The ways in which two rows of so many tokens may lie in the first axis: none where the order
    follows the data.

    `other` is of a pass in which nothing but the first of the two rows was changed.
    """
    if plain.shape != other.shape or not plain.dim() or len(plain) % 2:
        return frozenset()
    gap = (plain.double() - other.double()).abs().flatten(1).amax(1)
    # Kernels that sort tokens by expert give the same row other bits beside others.
    changed = gap > _CHANGED * float(plain.double().square().mean().sqrt())
    found = set()
    if not bool(changed[len(changed) // 2 :].any()):
        found.add(Order.outer)
    if len(changed) % (2 * num_tokens) == 0:
        blocks = changed.view(-1, 2, num_tokens)
        if not bool(blocks[:, 1].any()):
            found.add(Order.inner)
    return frozenset(found)
