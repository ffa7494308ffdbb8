"""Moves every field of a config and sees whether a probe's outputs move.

Each field is moved in a twin of our port, which holds the same tensors and runs over what the
reference had; where a twin first has something else, its field is seen, and it runs no further.
What bits do not show is asked in float64 of the modules that were built otherwise. A field whose
other values do not fit the checkpoint's tensors is held by loading. Knows no family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from portkit.architecture import CausalLM
from portkit.errors import Mismatch, PortkitError
from portkit.loading import Blueprint, skeleton_of
from portkit.nn.cache import Cache
from portkit.nn.rope import RotaryEmbedding
from portkit.parity.judging.judge import SAME_FUNCTION
from portkit.parity.judging.local import Trace, fitted
from portkit.parity.judging.precision import casts_lifted, held_in_float64, ran_out_of_memory
from portkit.parity.probes.probe import Pass, Probe
from portkit.parity.probes.probing import lacking
from portkit.parity.sides.port import PortSide
from portkit.parity.sides.sites import LOGITS, SiteTable, watching
from portkit.parity.subject.dims import by_token, rows, same_shape
from portkit.parity.teeth.neighbours import Move, Neighbour, moves
from portkit.parity.teeth.sensitivity import LOADING, NO_ANGLE, UNREAD, Sensitivity
from portkit.parity.teeth.twins import Noting, Shelf, built_otherwise, stand_in, twin_of

_BROKEN = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
"""What a config that contradicts itself may end in."""
_MOST_ASKED = 4
"""Modules of a twin that are asked in float64."""


class _Seen(Exception):
    """A twin has something else at a site."""


@dataclass
class _Twin:
    """A move, as a model that runs."""

    move: Move
    neighbour: Neighbour
    model: CausalLM
    otherwise: Mapping[str, bool]
    """Modules that are built otherwise; False: in nothing but the config that they hold."""
    plain: Mapping[str, nn.Module]
    """Those of them that one input decides, by their sites."""
    caches: dict[str, Cache] = field(default_factory=dict)


class ConfigMoves:
    """Takes in a reference's recorded passes one by one, and tells of each field at the end.

    `model` is our port. `known` are fields that need not be asked again.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        model: CausalLM,
        table: SiteTable,
        probe: Probe,
        known: frozenset[str] = frozenset(),
    ) -> None:
        self._blueprint, self._table, self._probe = blueprint, table, probe
        self._shelf, self._dtype = Shelf(), next(model.parameters()).dtype
        self._caches: dict[str, Cache] = {}
        self._continued = {one.continues for one in probe}
        self._fields: dict[str, list[Sensitivity]] = {}
        self._open: list[_Twin] = []
        to_move = [
            one for one in moves(blueprint.config, blueprint.choices) if one.field not in known
        ]
        with self._asking(to_move):
            self._prepare(to_move, model)

    def _prepare(self, to_move: list[Move], model: CausalLM) -> None:
        """Make the twins."""
        if not to_move:
            return
        blueprint = self._blueprint
        self._noting = Noting(blueprint.config)
        self._base = twin_of(blueprint, self._noting, model)
        self._plain = twin_of(blueprint, blueprint.config, model)
        while_built = self._noting.taken()
        for move in to_move:
            self._fields.setdefault(move.field, [])
            self._begin(move, model, move.top in while_built)
        self._settle()

    def _settle(self) -> None:
        """Have the recording stand in for whatever no open twin moves."""
        run = {name for twin in self._open for name in twin.otherwise}
        stand_in(self._base, run, self._table, self._shelf)

    @contextmanager
    def _asking(self, to_move: Iterable[Move]) -> Iterator[None]:
        """Where a port as it is cannot be moved, none of its open fields is seen."""
        try:
            yield
        except _BROKEN as error:
            if ran_out_of_memory(error):
                raise
            for move in to_move:
                self._fields.setdefault(move.field, [])
                self._tell(move, False, f"it could not be moved: {error}")
            self._open.clear()

    def _begin(self, move: Move, model: CausalLM, is_built_of: bool) -> None:
        """Make the nearest neighbour that is another model, or say what holds the field."""
        twin, failed = None, "no rule knows another value"
        for neighbour in move.neighbours:
            try:
                made = twin_of(self._blueprint, neighbour.config, model)
            except Mismatch as error:
                self._tell(move, True, f"{LOADING}: {error}", neighbour)
                return
            except (*_BROKEN, PortkitError) as error:
                failed = f"no model is built of {neighbour.said}: {error}"
                continue
            otherwise = built_otherwise(made, self._plain)
            if twin is None or any(otherwise.values()):
                twin = _Twin(move, neighbour, made, otherwise, _leaves(made, otherwise))
            if any(otherwise.values()) or not is_built_of:
                break
        if twin is None:
            self._tell(move, bool(move.neighbours), failed)
            return
        stand_in(twin.model, twin.otherwise, self._table, self._shelf)
        self._open.append(twin)

    def _tell(
        self, move: Move, seen: bool | None, by: str, neighbour: Neighbour | None = None
    ) -> None:
        said = None if neighbour is None else neighbour.said
        self._fields[move.field].append(Sensitivity(move.field, seen, by, said))

    @torch.no_grad()
    def see(self, one: Pass, trace: Trace) -> None:
        """Run every twin that is not told apart yet over the next pass."""
        if not self._open:
            return
        self._shelf.put(trace, one.input_ids)
        expected = dict(trace)

        def note(site: str, ours: Tensor, is_recorded: bool) -> None:
            if not is_recorded:
                expected[site] = ours

        with self._asking([twin.move for twin in self._open]):
            self._run(self._base, one, self._caches, trace, note)
        self._shelf.put(expected, one.input_ids)
        before = len(self._open)
        for twin in list(self._open):
            if not twin.otherwise and twin.move.top not in self._noting.read:
                continue
            by = self._told_apart(twin, one, trace, expected)
            if by is not None:
                self._tell(twin.move, True, f"{by} in {one.name}", twin.neighbour)
                self._open.remove(twin)
        if len(self._open) < before:
            self._settle()
        self._shelf.put({}, one.input_ids)

    def _told_apart(self, twin: _Twin, one: Pass, trace: Trace, expected: Trace) -> str | None:
        if one.continues is not None and one.continues not in twin.caches:
            return None  # its field was read for the first time behind this chain's beginning

        def tell_apart(site: str, ours: Tensor, is_recorded: bool) -> None:
            theirs = expected[site]
            alike = is_recorded and theirs is trace[site]
            if not alike and not self._equal(site, one, ours, theirs):
                raise _Seen(site)

        self._shelf.restart()
        try:
            self._run(twin.model, one, twin.caches, trace, tell_apart)
        except _Seen as site:
            return f"{site}, {str(self._dtype).removeprefix('torch.')},"
        except _BROKEN as error:
            if ran_out_of_memory(error):
                raise
            return f"it does not run ({error})"
        return self._asked_in_float64(twin, one, trace)

    def _equal(self, site: str, one: Pass, ours: Tensor, theirs: Tensor) -> bool:
        """At the real tokens, in every bit."""
        dims = self._dims(site)
        if ours.dtype != theirs.dtype or not same_shape(dims, ours, theirs):
            return False
        return torch.equal(*(rows(each, dims, one) for each in (ours, theirs)))

    def _dims(self, site: str) -> str:
        dims = self._table.dims(site)
        assert dims is not None, f"{site} is declared"
        return dims

    def _run(
        self,
        model: CausalLM,
        one: Pass,
        caches: dict[str, Cache],
        trace: Trace,
        look: Callable[[str, Tensor, bool], None],
    ) -> None:
        """A pass of a model that is taught by `trace`.

        `look` is shown what it has at each site, and whether that is what was recorded.
        """

        def visit(site: str, tensor: Tensor) -> Tensor:
            recorded = trace.get(site)
            if recorded is None:
                return tensor
            is_recorded = tensor.dtype == recorded.dtype and torch.equal(tensor, recorded)
            look(site, tensor, is_recorded)
            return tensor if is_recorded else recorded.clone().to(tensor.dtype)

        batch = len(one.input_ids)
        cache = caches.pop(one.continues or "", None) or model.new_cache(batch, self._probe.longest)
        side, shaped = PortSide(model, self._probe.longest), fitted(trace, visit)
        with watching(side, self._table, shaped):
            hidden = model.hidden_states(one.input_ids, one.positions, cache, one.attention_mask)
            if one.name in self._continued:
                cache.advance(one.num_tokens)
                caches[one.name] = cache
            if LOGITS in trace or model is self._base:
                logits = model.logits(hidden[:, -(one.num_logits or one.num_tokens) :])
                shaped(LOGITS, logits)

    def _asked_in_float64(self, twin: _Twin, one: Pass, trace: Trace) -> str | None:
        """The site of a module that computes another function of what was recorded."""
        asked = 0
        for site, ours in twin.plain.items():
            given = trace.get(f"{site}:in")
            if given is None or asked == _MOST_ASKED:
                continue
            asked += 1
            dims = self._dims(f"{site}:in")
            last = by_token(given, dims, one)[:, -1].double()
            theirs = self._plain.get_submodule(site)
            with suppress(*_BROKEN), held_in_float64(ours, theirs), casts_lifted():
                a, b = ours(last), theirs(last)
                if float((a - b).norm()) > SAME_FUNCTION * float(b.norm()):
                    return f"{site}, float64,"
        return None

    def found(self) -> tuple[Sensitivity, ...]:
        """Of each field whether it was seen: a field that can move in several ways in all."""
        for twin in self._open:
            nothing = self._decides_nothing(twin)
            if nothing is not None:
                self._tell(twin.move, None, nothing, twin.neighbour)
            else:
                reason = f"nothing shows {twin.neighbour.said}{self._lacks(twin)}"
                self._tell(twin.move, False, reason, twin.neighbour)
        self._open.clear()
        return tuple(map(_weakest, self._fields.values()))

    def _decides_nothing(self, twin: _Twin) -> str | None:
        """Why no probe could show the other value, where that is so."""
        if not twin.otherwise and twin.move.top not in self._noting.read:
            return UNREAD
        context = self._plain.config.max_position_embeddings
        modules = map(twin.model.get_submodule, twin.otherwise)
        if twin.otherwise and all(isinstance(one, RotaryEmbedding) for one in modules):
            turns = any(twin.otherwise.values()) and context > 1  # position 0 is not rotated
            return None if turns else NO_ANGLE
        ours, theirs = _reaches(twin.model), _reaches(self._plain)
        within = [[min(one, context) for one in each] for each in (ours, theirs)]
        if ours != theirs and within[0] == within[1]:
            return f"no layer sees fewer than the {context} tokens of the context by either"
        return None

    def _lacks(self, twin: _Twin) -> str:
        """What the probe lacks of what the field decides."""
        mine = dict(lacking(self._plain, self._probe))
        others = [dict(lacking(one, self._probe)) for one in (twin.model, *self._uniform(twin))]
        named = [needs for name, needs in mine.items() if any(name not in one for one in others)]
        if not named:
            return ""
        said = f": the {self._probe.name} probe has no {', no '.join(named)}"
        return said if self._probe.is_complete else f"{said}, as the default one has"

    def _uniform(self, twin: _Twin) -> Iterator[CausalLM]:
        """Models in which all layers have one of the values that a list has."""
        was, blueprint = twin.neighbour.was, self._blueprint
        for value in dict.fromkeys(was if isinstance(was, tuple) else ()):
            with suppress(*_BROKEN):
                config = replace(blueprint.config, **{twin.move.top: (value,) * len(was)})
                yield skeleton_of(blueprint.architecture, config, blueprint.attention)


def _leaves(model: CausalLM, names: Iterable[str]) -> dict[str, nn.Module]:
    """Those of the modules that have no parts."""
    modules = {name: model.get_submodule(name) for name in names}
    return {name: one for name, one in modules.items() if not any(one.children())}


def _reaches(model: CausalLM) -> list[float]:
    """How many tokens each layer's cache shows: as many as there are, but for a window."""
    return [getattr(one, "window", math.inf) for one in model.new_cache(1, 1).layers]


def _weakest(told: list[Sensitivity]) -> Sensitivity:
    """What is not seen before what is; what is seen before what decides nothing."""
    order: tuple[bool | None, ...] = (False, True, None)
    return min(told, key=lambda one: order.index(one.seen))
