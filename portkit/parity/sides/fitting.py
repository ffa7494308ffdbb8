"""A tensor of a foreign side as the other side has its twin, and the way back.

Dimensions may stand in another order, heads and channels be one, cached keys repeated, in ring
order or a part of a buffer. Which it is sizes tell; where they leave a choice, what was seen
before, and then the values: a right tensor in the wrong order is nowhere near. What is put in place
has the shape and the memory layout that the side itself had there. What fits in no way is not
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from math import prod

import torch
from torch import Tensor

from portkit.parity.sides.roles import Visit
from portkit.parity.sides.sites import kind_of

_HEAD, _TOKEN = 1, 2
"""Dimensions of keys and values as attention sees them."""
Misfit = Callable[[str, Tensor, Tensor], None]
Shape = torch.Size


@dataclass(frozen=True)
class Way:
    """How a tensor is turned into what the other side has, and how that is put in its place."""

    order: tuple[int, ...]
    shape: Shape
    """Behind the order, heads and channels as the other side has them."""
    repeats: int = 1
    """So many heads in a row are one of the other's."""
    start: int | None = None
    """The other's keys begin here, as a part of these."""
    rolled: int = 0
    """The other's first key stands here, in a ring."""

    def there(self, tensor: Tensor) -> Tensor:
        shown = tensor.permute(self.order)
        if self.repeats > 1:
            shown = shown[:, :: self.repeats]
        if self.start is not None:
            shown = shown.narrow(_TOKEN, self.start, self.shape[_TOKEN])
        if self.rolled:
            shown = shown.roll(-self.rolled, _TOKEN)
        return shown if shown.shape == self.shape else shown.reshape(self.shape)

    def back(self, seen: Tensor, own: Tensor) -> Tensor:
        """`seen` as `own` is laid out; of what is not shown `own` keeps its values."""
        placed = torch.empty_like(own, dtype=seen.dtype)
        within = placed.permute(self.order)
        if self.rolled:
            seen = seen.roll(self.rolled, _TOKEN)
        if self.repeats > 1:
            seen = seen.repeat_interleave(self.repeats, _HEAD)
        if self.start is not None:
            placed.copy_(own)
            within = within.narrow(_TOKEN, self.start, self.shape[_TOKEN])
        within.copy_(seen.reshape(within.shape))
        return placed


class Fitting:
    """Fits the tensors of one side to the other's, over all passes of a comparison."""

    def __init__(self) -> None:
        self._ways: dict[tuple[str, Shape, Shape], tuple[Way, ...]] = {}
        self._orders: dict[str, tuple[int, ...]] = {}
        """Of each kind of site, where sizes left no choice."""
        self._rings: dict[tuple[str, str], int] = {}
        """Where the first key stands, by pass and attention."""

    def visitor(self, run: str, trace: dict[str, Tensor], visit: Visit, misfit: Misfit) -> Visit:
        """Have `visit` see what the pass `run` has as `trace` has it; of the rest tell `misfit`."""

        def shown(name: str, tensor: Tensor) -> Tensor:
            recorded = trace.get(name)
            if recorded is None:
                return visit(name, tensor)
            way = self._way(run, name, tensor, recorded)
            if way is None:
                misfit(name, tensor, recorded)
                return tensor
            before = way.there(tensor)
            seen = visit(name, before)
            if seen is before or (rows := _as_many_rows(seen, before)) is None:
                return tensor
            return way.back(rows, tensor)

        return shown

    def _way(self, run: str, name: str, tensor: Tensor, recorded: Tensor) -> Way | None:
        both_float = tensor.is_floating_point() and recorded.is_floating_point()
        if not both_float and tensor.dtype != recorded.dtype:
            return None  # an additive mask for a boolean one, say
        key = kind_of(name), tensor.shape, recorded.shape
        if key not in self._ways:
            self._ways[key] = tuple(_ways(*key))
        ways = self._ways[key]
        if len(ways) == 1 and len(set(tensor.shape)) == tensor.dim():
            self._orders[key[0]] = ways[0].order
        known = [one for one in ways if one.order == self._orders.get(key[0])] or [*ways]
        attention, _, point = name.partition("#")
        if point in {"key", "value"} and tensor.dim() == 4:
            known = [_in_ring(one, tensor, recorded) for one in known]
        if len(known) > 1 and both_float:
            known.sort(key=lambda way: _apart(way.there(tensor), recorded))
        way = next(iter(known), None)
        if way is not None and way.rolled:
            self._rings[run, attention] = way.rolled
        first = self._rings.get((run, attention)) if point == "mask" else None
        return way if way is None or not first else _Rolled(way.order, way.shape, rolled=first)


def _in_ring(way: Way, tensor: Tensor, recorded: Tensor) -> Way:
    """The same way; or that of a ring, where this explains more than half of the difference."""
    seen = way.there(tensor)
    if way.start is not None or (seen.dtype == recorded.dtype and torch.equal(seen, recorded)):
        return way
    gaps = (seen.double() - recorded.double()[:, :, :1]).abs().sum((0, 1, 3))
    first = int(gaps.nan_to_num(torch.inf).argmin())
    ring = replace(way, rolled=first)
    is_nearer = 2 * _apart(ring.there(tensor), recorded) < _apart(seen, recorded)
    return ring if first and is_nearer else way


class _Rolled(Way):
    """A mask over keys in a ring: those are its last dimension."""

    def there(self, tensor: Tensor) -> Tensor:
        return tensor.roll(-self.rolled, -1)

    def back(self, seen: Tensor, own: Tensor) -> Tensor:
        return torch.empty_like(own).copy_(seen.roll(self.rolled, -1))


def _ways(kind: str, own: Shape, theirs: Shape) -> Iterator[Way]:
    """All ways that the sizes allow, the plainest first."""
    found: set[tuple[int, ...]] = set()
    for order in permutations(range(len(own))):
        shape = [own[i] for i in order]
        lasting = tuple(i for i in order if own[i] != 1)
        if lasting in found:
            continue
        if _are_alike(shape, [*theirs]) or (order[-1] == len(own) - 1 and _merge(shape, [*theirs])):
            found.add(lasting)
            rows = torch.Size(shape) if len(shape) == len(theirs) else theirs
            yield Way(order, rows)
        if len(own) > 5 or "#mask" in kind:
            break  # in that order, or in none
    if not found and kind.endswith(("#key", "#value")) and len(own) == len(theirs) == 4:
        yield from _cached_otherwise(own, theirs)


def _cached_otherwise(own: Shape, theirs: Shape) -> Iterator[Way]:
    """Heads repeated for their queries; a buffer, or a history, of which the other's are a part."""
    repeats, rest = divmod(own[_HEAD], theirs[_HEAD])
    extra = own[_TOKEN] - theirs[_TOKEN]
    if rest or not repeats or extra < 0 or (own[0], own[3]) != (theirs[0], theirs[3]):
        return
    for start in dict.fromkeys((0, extra)) if extra else (None,):
        yield Way((0, 1, 2, 3), theirs, repeats, start)


def _are_alike(own: list[int], theirs: list[int]) -> bool:
    """Equal; masks and tables may be for all rows one."""
    return own == theirs or (
        len(own) == len(theirs) > 2 and own[1:] == theirs[1:] and 1 in (own[0], theirs[0])
    )


def _merge(own: list[int], theirs: list[int]) -> bool:
    """Heads and channels are one on one side, or all rows' tokens are; or a size of one is lost."""
    if len(own) == len(theirs) or prod(own) != prod(theirs):
        return False
    shorter, longer = sorted((own, theirs), key=len)
    if own[:2] == theirs[:2] or shorter[1:] == longer[2:]:
        return True
    return [size for size in own if size > 1] == [size for size in theirs if size > 1]


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().nan_to_num(torch.inf).mean())


def _as_many_rows(seen: Tensor, own: Tensor) -> Tensor | None:
    """What is to be put in place, for as many rows as there were; None where rows differ."""
    if seen.shape == own.shape:
        return seen
    if len(seen) == 1:
        return seen.expand(own.shape)
    return seen[:1] if bool((seen == seen[:1]).all()) else None
