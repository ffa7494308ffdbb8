"""The sites of a model that is called by named inputs, found by running it.

As given, with the rows doubled, and one token shorter for each length that inputs have: an axis
that follows is called so. What does not run tells nothing. Where nothing follows, of three axes or
more the last is channels and the one before counts patches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from portkit.parity.probes.named import named_pass
from portkit.parity.probes.probe import Pass
from portkit.parity.sides.sites import (
    AGAIN,
    EVERYTHING,
    LOGITS,
    POINTS,
    CannotRun,
    Side,
    SiteTable,
    watching,
)
from portkit.parity.subject.dims import BATCH, PATCH, POSITION, QUERY, batch_dim, token_dim
from portkit.parity.subject.discovery import EXPERT, before_choices
from portkit.parity.subject.measuring import CHANNEL, Seen, measured

Shape = tuple[int, ...]
_WITH_TOKENS = (2, 3)
"""Dimensions of an input whose second counts tokens: ids, or what is embedded already."""
_LEAST = 3
"""Axes of a tensor whose last but one counts something."""


@dataclass(frozen=True)
class _Shapes:
    """Of every site, in each of the runs."""

    given: Mapping[str, Shape]
    doubled: Mapping[str, Shape]
    shorter: Mapping[int, Mapping[str, Shape]]
    """By the length that was one less."""


def discover_by(side: Side, inputs: Mapping[str, Tensor], vocab_size: int) -> SiteTable:
    """The sites that `side` shows, in order of execution, and their dimensions.

    Raises `CannotRun` where it does not run what was given.
    """
    given = _run(side, inputs)
    lengths = dict.fromkeys(o.shape[1] for o in inputs.values() if o.dim() in _WITH_TOKENS)
    shorter = {length: _tried(side, _shortened(inputs, length)) for length in lengths if length > 1}
    found = _Shapes(given, _tried(side, _doubled(inputs)), shorter)
    rows = [len(one) for one in (named_pass(inputs).input_ids, *inputs.values()) if one.dim()]
    dims = {name: _dims(name, found, rows, vocab_size) for name in given}
    routers = [name for name in before_choices(given) if name in dims]
    return SiteTable({**dims, **{name: dims[name].replace(CHANNEL, EXPERT) for name in routers}})


@torch.no_grad()
def _run(side: Side, inputs: Mapping[str, Tensor]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}

    def seen(name: str, tensor: Tensor) -> Tensor:
        if AGAIN not in name:
            shapes[name] = tuple(tensor.shape)
        return tensor

    one: Pass = named_pass(inputs).to(side.device)
    with watching(side, EVERYTHING, seen):
        seen(LOGITS, side.run(one, {}))
    return shapes


def _tried(side: Side, inputs: Mapping[str, Tensor]) -> dict[str, Shape]:
    with suppress(CannotRun):
        return _run(side, inputs)
    return {}


def _doubled(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([one, one]) if one.dim() else one for name, one in inputs.items()}


def _shortened(inputs: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    return {
        name: one[:, :-1] if one.dim() in _WITH_TOKENS and one.shape[1] == length else one
        for name, one in inputs.items()
    }


def _dims(name: str, found: _Shapes, num_rows: list[int], vocab_size: int) -> str:
    shape = found.given[name]
    rows = shape[0] if shape and shape[0] in num_rows else num_rows[0]
    first, second = _followed(name, found)
    seen = [Seen(rows, first, second, shape)]
    doubled = found.doubled.get(name)
    if doubled is None and shape[:1] == (rows,):  # it does not run so many: taken for granted
        doubled = (2 * rows, *shape[1:])
    if doubled is not None:
        seen.append(Seen(2 * rows, first, second, doubled))
    for length, shapes in found.shorter.items():
        less = first - (length == first), second - (length == second)
        if name in shapes:
            seen.append(Seen(rows, *less, shapes[name]))
    dims = POINTS.get(name.rpartition("#")[2], "")
    dims = dims or _counted(measured(seen, vocab_size), shape, found)
    if {POSITION, QUERY} & {*dims.split()} and first == 1 and not _unknown(shape, found):
        return dims.replace(POSITION, PATCH).replace(QUERY, PATCH)  # a point of the interface
    return dims


def _followed(name: str, found: _Shapes) -> tuple[int, int]:
    """The lengths that a site follows, that of its first axis first; 1 where there is none."""
    shape, places = found.given[name], dict[int, int]()
    for length, shapes in found.shorter.items():
        other = shapes.get(name, shape)
        if len(other) == len(shape) and other != shape:
            changed = [
                n for n, pair in enumerate(zip(shape, other, strict=True)) if len({*pair}) > 1
            ]
            places[length] = changed[0]
    order = sorted(places, key=lambda length: places[length])
    first = order[0] if order else 1
    return first, order[1] if order[1:] else first


def _counted(dims: str, shape: Shape, found: _Shapes) -> str:
    """The same, the last axis but one as what it counts, where nothing else is known to."""
    words = dims.split()
    is_free = len(words) == len(shape) >= _LEAST and batch_dim(dims) != len(words) - 2
    if not is_free or token_dim(dims) is not None or BATCH not in words:
        return dims
    words[-2] = POSITION if _unknown(shape[-2:-1], found) else PATCH
    return " ".join(words)


def _unknown(sizes: Collection[int], found: _Shapes) -> bool:
    """Whether one is a length of inputs that the model does not run any shorter."""
    return any(not shapes and length in sizes for length, shapes in found.shorter.items())
