"""Comparing: one probe, both sides, every site; who differs, where first, how much, and how far.

For each pass the reference runs and is recorded; the port runs freely (carried errors) and taught
(local errors). Recordings are held for a group of passes little larger than the largest, and then
held against the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from portkit.errors import PortError, SiteError
from portkit.parity.judging.heap import release_freed_memory
from portkit.parity.judging.judge import Verdict, judge
from portkit.parity.judging.ledger import (
    PARAMETER,
    Ledger,
    SiteAccount,
    difference,
    difference_as_loaded,
    is_laid_out_alike,
    squares_of,
)
from portkit.parity.judging.local import (
    Calls,
    Recording,
    Trace,
    calls_kept,
    fitted,
    looked_at,
    recorder,
    taught,
)
from portkit.parity.judging.precision import is_same_memory
from portkit.parity.judging.truth import Truth
from portkit.parity.judging.whole import WholeTruth
from portkit.parity.probes.probe import Pass, Probe
from portkit.parity.result import Comparison, NotVerified
from portkit.parity.sides.attention import QKV
from portkit.parity.sides.foreign import ForeignSide
from portkit.parity.sides.roles import Visit
from portkit.parity.sides.sites import LOGITS, CannotRun, Side, SiteTable, watching, weights_of
from portkit.parity.subject.dims import rows, same_shape, token_dim
from portkit.parity.teeth.diagnose import Cause, Diagnosis, is_observed
from portkit.parity.unseen import Unseen

Tell = Callable[[str], None]
_ROOM = 1.25
"""How many times the largest pass's recording is held before it is judged."""


class Onlooker(Protocol):
    """Is shown what the reference had in each pass."""

    def see(self, one: Pass, trace: Trace) -> None: ...


def compare(
    port: Side,
    reference: Side,
    table: SiteTable,
    probe: Probe,
    tell: Tell = lambda _: None,
    onlookers: Sequence[Onlooker] = (),
) -> Comparison:
    """Run `probe` on both sides and judge every site. `tell` is given a line for each step."""
    comparing = Comparing(port, reference, table, probe)
    comparing.onlookers = onlookers
    comparing.parameters()
    for group in groups(probe):
        for one in group:
            tell(one.name)
            comparing.run(one)
        tell(f"{group[-1].name} in float64")
        comparing.judge()
    if (reason := comparing.unseen.nothing_ran()) is not None:
        raise PortError(f"nothing was compared: {reason}")
    for side in (port, reference):
        if isinstance(side, ForeignSide) and side.paired and comparing.unseen.shows_logits_alone:
            raise SiteError(
                f"site pairs: none of the {len(side.paired)} modules paired ran, {side.paired[0]} "
                f"for one, and nothing but logits was compared{side.unlike()}"
            )
    sites = comparing.sites()
    return Comparison(
        str(port.dtype).removeprefix("torch."),
        probe,
        tuple(map(judge, sites.values())),
        sites,
        tuple(comparing.not_verified()),
        notes=(*comparing.truth.notes, *comparing.unseen.widened),
        causes=comparing.causes(),
    )


def _in_order(trace: Trace) -> Iterator[str]:
    """Sites as the reference runs; of its tables' layer types it makes a set, and so no order."""
    tables = iter(sorted(name for name in trace if "#cos" in name or "#sin" in name))
    for name in trace:
        yield next(tables) if "#cos" in name or "#sin" in name else name


def _is_due(name: str) -> bool:
    """Whether a side that shows everything has to show it: outputs, and what goes into modules.

    What else a module is given or gives, it may be given under another name, or not at all.
    """
    _, _, role = name.partition(":")
    return role in {"", "in"}


def groups(probe: Probe) -> list[list[Pass]]:
    """Passes in a row whose recordings together are little larger than the largest pass's.

    A layer is upcast once for a group. What a pass records is about so much a token; of the past
    it holds keys and values, about a sixteenth of that.
    """

    def size(one: Pass) -> float:
        return len(one.input_ids) * (one.num_tokens + probe.past(one) / 16)

    groups: list[list[Pass]] = []
    room, most = 0.0, _ROOM * max(map(size, probe))
    for one in probe:
        if not groups or size(one) > room:
            groups.append([])
            room = most
        groups[-1].append(one)
        room -= size(one)
    return groups


class Comparing:
    """A comparison as it goes on: passes are held one by one, and then judged together."""

    def __init__(self, port: Side, reference: Side, table: SiteTable, probe: Probe) -> None:
        self.port, self.reference, self.table = port, reference, table
        self.probe = probe
        composite = {
            name.rpartition(".")[0] for name in port.module_sites() if table.dims(name) is not None
        }
        self._compared: set[str] = set()
        """Sites that the port showed in some pass."""
        self.ledger = Ledger(table, composite)
        self.is_partial = port.is_partial or reference.is_partial
        truth = WholeTruth if self.is_partial else Truth
        self.truth = truth(port, reference, table, self.ledger)
        self.fitting = self.truth.fitting if isinstance(self.truth, WholeTruth) else None
        self.unseen = Unseen()
        self.onlookers: Sequence[Onlooker] = ()
        has_tokens = all(one.inputs is None for one in probe)
        observed = has_tokens and is_observed(reference)
        self.diagnosis = Diagnosis(reference, table, probe) if observed else None
        self._recordings: list[Recording] = []
        self._compares_logits = table.dims(LOGITS) is not None
        self._reference_caches: dict[str, Any] = {}
        self._free_caches: dict[str, Any] = {}
        self._taught_caches: dict[str, Any] = {}
        self._wrong_past: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        """What pass and site held, ours and theirs, where it was wrong: later passes inherit it."""
        self._wrong_now: list[tuple[Tensor, Tensor]] = []
        """The same of the pass that runs: layers that share another's keys inherit them."""
        self._continued = {one.continues for one in probe}

    @torch.no_grad()
    def parameters(self) -> None:
        """Both sides read the same file, each by its own map: what they hold is compared first."""
        declared = {
            name: one for name, one in weights_of(self.port).items() if self._observes(name)
        }
        theirs = self.reference.parameters(declared)
        for name, ours in declared.items():
            held = theirs.get(name)
            if self.is_partial and (held is None or not is_laid_out_alike(ours, held)):
                continue  # in its own way: what modules make of it is compared
            account = self.ledger.parameter(name)
            if held is None:
                account.missing = True
            elif held.shape != ours.shape or (held.dtype != ours.dtype and not self.is_partial):
                account.misshapen = f"{tuple(ours.shape)} {ours.dtype} against {held.dtype}"
            elif not is_same_memory(ours, held) and not bool((ours == held).all()):
                account.unequal.append(difference_as_loaded(account, ours, held))
                if self.diagnosis is not None:
                    self.diagnosis.parameter(name, ours, held)
        self.unseen.parameters = len(self.ledger.sites), len(weights_of(self.reference))

    def _observes(self, parameter: str) -> bool:
        """Whether a parameter's module is declared, or one that it is a part of."""
        parts = parameter.split(".")
        modules = (".".join(parts[:end]) for end in range(1, len(parts)))
        return any(self.table.dims(module) is not None for module in modules)

    def judge(self) -> None:
        """Hold what was recorded since the last time against the truth, and let go of it."""
        self.truth.judge(self._recordings)
        if self.diagnosis is not None:
            for one in self._recordings:
                self._diagnose(self.diagnosis, one)
                del one  # or the last one would still be held below
        self._recordings.clear()
        release_freed_memory()

    def _diagnose(self, diagnosis: Diagnosis, one: Recording) -> None:
        for site, ours in {**one.unequal, **one.misshapen, **one.apart}.items():
            verdict = judge(self.ledger.site(site)).verdict
            if verdict is Verdict.rounding:
                diagnosis.rounding(site, one.run, ours)
            elif verdict is Verdict.diverged:
                diagnosis.culprit(site, one.run, ours, exact=site in one.apart)
        diagnosis.let_go(one.run)

    def causes(self) -> dict[str, Cause]:
        """Why each culprit differs; nothing where the reference is not one to be observed."""
        if self.diagnosis is None:
            return {}
        judged = map(judge, self.ledger.sites.values())
        return self.diagnosis.causes(one for one in judged if one.verdict is not Verdict.exact)

    @torch.no_grad()
    def run(self, one: Pass) -> None:
        """One pass: record, run freely, run taught."""
        trace: Trace = {}
        try:
            with (
                watching(self.reference, self.table, recorder(trace)),
                calls_kept(self.reference, self.table) as calls,
            ):
                logits = self._logits(self.reference, one, self._reference_caches)
        except CannotRun as error:
            self.unseen.refuse("reference", one, error)
            return
        if self._compares_logits:
            trace[LOGITS] = logits
        del logits
        for onlooker in self.onlookers:
            onlooker.see(one, trace)
        self.hold(Recording(one, trace, calls, Calls(), self.probe.past(one)))

    @torch.no_grad()
    def hold(self, recording: Recording) -> None:
        """Run the port freely and taught over a pass that was recorded."""
        one, trace = recording.run, recording.trace
        for name in () if self.is_partial else _in_order(trace):
            self.ledger.site(name)  # in the reference's order, also what the port has not
        if self.diagnosis is not None:
            self.diagnosis.recorded(one, trace)
        try:
            self._run_freely(recording)
            self._run_taught(recording)
        except CannotRun as error:
            put = next(reversed(recording.unequal), None)
            self.unseen.refuse("port", one, error, put)
            if put is None:
                return
        self.unseen.passed(trace)
        self._compared |= recording.seen
        for name in filter(_is_due, trace) if not self.is_partial else ():
            account = self.ledger.site(name)
            account.missing = account.missing or name not in recording.seen
        if not self.is_partial:
            trace.pop(LOGITS, None)  # it has no truth of its own; the head has
        self._recordings.append(recording)
        release_freed_memory()

    def _logits(self, side: Side, one: Pass, caches: dict[str, Any]) -> Tensor:
        logits = side.run(one, caches)
        if one.name not in self._continued:
            caches.pop(one.name, None)  # all passes' together would outweigh the largest of them
        return logits

    def _run_freely(self, recording: Recording) -> None:
        one, trace = recording.run, recording.trace

        def look(name: str, ours: Tensor, theirs: Tensor) -> None:
            account, ours = self.ledger.site(name), self._as_theirs(name, ours, theirs)
            if not same_shape(account.dims, ours, theirs):
                account.carried.append(one.name)
            elif (found := difference(one, account.dims, ours, theirs)) is not None:
                account.carried.append(one.name)
                if ours.is_floating_point() and found.max_difference < torch.inf:
                    a, b = (rows(each, account.dims, one) for each in (ours, theirs))
                    account.carried_error.add(squares_of(a, b), len(a))

        visit = self.unseen.of_port(self._shown(recording, looked_at(trace, look)))
        with watching(self.port, self.table, visit):
            logits = self._logits(self.port, one, self._free_caches)
        if LOGITS in trace:
            visit(LOGITS, logits)

    def _run_taught(self, recording: Recording) -> None:
        one, trace = recording.run, recording.trace
        self._wrong_now.clear()

        def compare_one(name: str, ours: Tensor, theirs: Tensor) -> None:
            recording.seen.add(name)
            account, ours = self.ledger.site(name), self._as_theirs(name, ours, theirs)
            if not same_shape(account.dims, ours, theirs) or ours.dtype != theirs.dtype:
                account.misshapen = account.misshapen or (
                    f"{list(ours.shape)} {ours.dtype} against {list(theirs.shape)} {theirs.dtype}"
                )
                recording.misshapen[name] = ours.clone()
                return
            if any(name.endswith(f"#{role}") for role in QKV[1:]):
                ours = self._without_inherited(one, name, ours, theirs)
            record = difference(one, account.dims, ours, theirs)
            if record is not None:
                account.unequal.append(record)
                recording.unequal[name] = ours.clone()
                if name == LOGITS and not self.is_partial:  # which has no truth
                    self.ledger.add_difference(name, one, ours, theirs)

        with (
            calls_kept(self.port, self.table) as calls,
            watching(self.port, self.table, self._shown(recording, taught(trace, compare_one))),
        ):
            logits = self._logits(self.port, one, self._taught_caches)
        if LOGITS in trace:
            compare_one(LOGITS, logits, trace[LOGITS])
        recording.port_calls = calls

    def _shown(self, recording: Recording, visit: Visit) -> Visit:
        """The visitor, shown what the port has as the reference has it."""
        if self.fitting is None:
            return fitted(recording.trace, visit)
        one = recording.run.name
        return self.fitting.visitor(one, recording.trace, visit, self.unseen.misfit)

    def _as_theirs(self, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
        """What a partial side holds in a wider dtype, rounded once."""
        if ours.dtype == theirs.dtype or not (self.is_partial and ours.is_floating_point()):
            return ours
        if not theirs.is_floating_point():
            return ours
        self.unseen.widen(name, ours.dtype)
        return ours.to(theirs.dtype)

    def sites(self) -> dict[str, SiteAccount]:
        """The accounts of what was compared, or was missing, in order of execution.

        A pass may have broken off before a site.
        """
        return {
            name: account
            for name, account in self.ledger.sites.items()
            if name in self._compared or account.missing or name.endswith(PARAMETER)
        }

    def not_verified(self) -> Iterator[NotVerified]:
        """What could not be asked, and what was not seen."""
        for name, reason in self.truth.unasked.items():
            yield NotVerified(
                f"{name}: the same function", f"it cannot be asked in float64: {reason}"
            )
        if self.is_partial:
            yield from self.unseen.not_verified(self.probe)

    def _without_inherited(self, one: Pass, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
        """Keys or values, those taken as right that were wrong already in the pass before.

        They are told of there. A cached key that was right and is wrong now is this pass's. What
        an earlier layer of this pass showed in the same way is told of at that layer.
        """
        if any(torch.equal(ours, o) and torch.equal(theirs, t) for o, t in self._wrong_now):
            return theirs
        if not torch.equal(ours, theirs):
            self._wrong_now.append((ours.clone(), theirs))
        before = self._wrong_past.pop((one.continues or "", name), None)
        if one.name in self._continued and not torch.equal(ours, theirs):
            self._wrong_past[one.name, name] = ours.clone(), theirs
        if before is None:
            return ours
        dim = token_dim(self.ledger.site(name).dims)
        assert dim is not None, "keys and values have tokens"
        past = ours.shape[dim] - one.num_tokens
        held_ours, held_theirs = ours.narrow(dim, 0, past), theirs.narrow(dim, 0, past)
        inherited = torch.ones_like(held_ours, dtype=torch.bool)
        for held, earlier in zip((held_ours, held_theirs), before, strict=True):
            inherited &= held == earlier.narrow(dim, earlier.shape[dim] - past, past)
        mended = ours.clone()
        mended.narrow(dim, 0, past).copy_(held_theirs.where(inherited, held_ours))
        return mended
