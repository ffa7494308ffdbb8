"""The sites of a model, found by running it: every module that is called, and what it is given.

A few short passes with a visitor at everything that a side can be watched at: other numbers of rows
and of tokens, and one decode step, tell the dimensions. Nothing is declared and no family is known.
What was not observed is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.parity.judging.local import recorder
from portkit.parity.probes.probe import Pass, chain
from portkit.parity.sides.port import PortSide
from portkit.parity.sides.routing import EXPERTS
from portkit.parity.sides.sites import (
    AGAIN,
    EVERYTHING,
    POINTS,
    CannotRun,
    Side,
    SiteTable,
    kind_of,
    watching,
)
from portkit.parity.subject.measuring import CHANNEL, Order, Seen, measured, orders
from portkit.parity.subject.traits import Traits, traits_of

EXPERT = "expert"
FIRST, OTHER = "first", "other"
_ROWS, _MORE_ROWS = 2, 3
_TOKENS, _MORE_TOKENS = 5, 7
_FEW = 3
"""Of a context of few tokens."""


@dataclass
class _Found:
    seen: list[Seen] = field(default_factory=list)
    first: Tensor | None = None
    """What it had in the first pass, where rows may be merged with something else."""


@torch.no_grad()
def discover(side: Side, traits: Traits) -> SiteTable:
    """The sites that `side` shows, in order of execution, and their dimensions.

    Raises `CannotRun` where it does not run the shortest prompt.
    """
    found: dict[str, _Found] = {}
    possible: dict[str, frozenset[Order]] = {}
    routers: set[str] = set()
    caches: dict[str, Any] = {}
    for number, (one, num_past) in enumerate(_passes(traits, side)):
        trace: dict[str, Tensor] = {}
        try:
            with watching(side, EVERYTHING, recorder(trace)):
                side.run(one, caches)
        except CannotRun:
            if number == 0:
                raise
            continue
        routers |= set(before_choices(trace))
        for name, tensor in trace.items():
            if AGAIN in name:
                continue
            site = found.setdefault(name, _Found())
            size = len(one.input_ids), one.num_tokens, num_past + one.num_tokens
            site.seen.append(Seen(*size, tuple(tensor.shape)))
            if one.name == FIRST:
                site.first = tensor
            elif one.name == OTHER and site.first is not None:
                kind, may_be = kind_of(name), orders(site.first, tensor, one.num_tokens)
                possible[kind] = possible.get(kind, may_be) & may_be
                site.first = None
    dims = {name: _dims(name, one.seen, traits, possible) for name, one in found.items()}
    logits = {name: dims[name].replace(CHANNEL, EXPERT) for name in routers if name in dims}
    return SiteTable({**dims, **logits})


def before_choices(trace: Iterable[str]) -> Iterator[str]:
    """Routers: their logits are visited just before their choice."""
    before = ""
    for name in trace:
        if name.endswith(EXPERTS):
            yield before
        before = name


def _dims(
    name: str,
    seen: list[Seen],
    traits: Traits,
    possible: Mapping[str, frozenset[Order]],
) -> str:
    """`possible`: how rows may be merged with something else, by the kind of site."""
    point = POINTS.get(name.rpartition("#")[2])
    if point is not None:
        return point
    return measured(seen, traits.vocab_size, possible.get(kind_of(name), (Order.outer,)))


def sites_between(port: Side, reference: Side) -> SiteTable:
    """The reference's sites, as far as a port that goes by its names has the modules for them."""
    return discover(reference, traits_of(reference.model)).shown_by(port)


def sites_of(model: CausalLM) -> SiteTable:
    """The sites of one of our own models."""
    return discover(PortSide(model, _MORE_TOKENS + 1), traits_of(model))


def _passes(traits: Traits, side: Side) -> Iterator[tuple[Pass, int]]:
    """Each with the number of tokens before it; all are short."""
    room = traits.max_positions or _MORE_TOKENS + 1
    few = max(1, min(_FEW, room) - 1), min(_FEW, room)  # never the same, or no axis follows them
    tokens, more = (_TOKENS, _MORE_TOKENS) if room > _MORE_TOKENS else few
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(traits.vocab_size, (_MORE_ROWS, more + 1), generator=generator)
    other = ids[:_ROWS, :tokens].clone()
    other[0] = (other[0] + 1) % traits.vocab_size
    steps = [tokens, tokens + 1] if tokens < room else [tokens]
    for number, one in enumerate(chain(FIRST, ids[:_ROWS, : steps[-1]], steps)):
        yield one.to(side.device), tokens if number else 0
    for name, rows in (
        (OTHER, other),
        ("rows", ids[:, :tokens]),
        ("tokens", ids[:_ROWS, :more]),
    ):
        yield chain(name, rows, [rows.shape[1]])[0].to(side.device), 0
