"""Comparing: one probe, both sides, every site; who differs, where first, how much, and how far.

For each pass the reference runs and is recorded; the port runs freely (carried errors) and taught
(local errors). Recordings are held for a group of passes no larger than the largest pass, and then
held against the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from portkit.parity.diagnose import Cause, Diagnosis
from portkit.parity.judge import Verdict, judge
from portkit.parity.kill import KillMatrix
from portkit.parity.ledger import (
    LOGITS,
    Ledger,
    difference,
    difference_as_loaded,
    rows,
    squares_of,
    token_dim,
)
from portkit.parity.local import Calls, Trace, calls_kept, looked_at, recorder, taught
from portkit.parity.probe import Pass, Probe
from portkit.parity.reference import Reference
from portkit.parity.result import Comparison, NotVerified
from portkit.parity.sites import QKV, PortSide, SiteTable, watching
from portkit.parity.truth import Recording, Truth

Tell = Callable[[str], None]


def compare(
    port: PortSide,
    reference: Reference,
    table: SiteTable,
    probe: Probe,
    tell: Tell = lambda _: None,
    matrix: KillMatrix | None = None,
) -> Comparison:
    """Run `probe` on both sides and judge every site. `tell` is given a line for each step.

    `matrix` is shown what the reference had, and tells what became of its faults.
    """
    comparing = _Comparing(port, reference, table, probe)
    comparing.matrix = matrix
    comparing.parameters()
    for group in _groups(probe):
        for one in group:
            tell(one.name)
            comparing.run(one)
        tell(f"{group[-1].name} in float64")
        comparing.judge()
    dtype = str(next(port.model.parameters()).dtype).removeprefix("torch.")
    return Comparison(
        dtype,
        probe,
        tuple(map(judge, comparing.ledger.sites.values())),
        comparing.ledger.sites,
        tuple(
            NotVerified(f"{name}: the same function", f"the port cannot run in float64: {reason}")
            for name, reason in comparing.truth.unasked.items()
        ),
        () if matrix is None else matrix.fates(),
        comparing.causes(),
    )


def _groups(probe: Probe) -> list[list[Pass]]:
    """Passes in a row whose recordings together are no larger than the largest pass's.

    A layer is upcast once for a group. What a pass records is about so much a token; of the past
    it holds keys and values, about a sixteenth of that.
    """

    def size(one: Pass) -> float:
        return len(one.input_ids) * (one.num_tokens + probe.past(one) / 16)

    groups: list[list[Pass]] = []
    room, most = 0.0, max(map(size, probe))
    for one in probe:
        if not groups or size(one) > room:
            groups.append([])
            room = most
        groups[-1].append(one)
        room -= size(one)
    return groups


class _Comparing:
    def __init__(
        self, port: PortSide, reference: Reference, table: SiteTable, probe: Probe
    ) -> None:
        self.port, self.reference, self.table = port, reference, table
        composite = (n for n, m in port.module_sites().items() if any(True for _ in m.children()))
        self.ledger = Ledger(table, composite)
        self.truth = Truth(port, reference, table, self.ledger)
        self.matrix: KillMatrix | None = None
        self.diagnosis = Diagnosis(reference, table, probe)
        self._recordings: list[Recording] = []
        self._compares_logits = table.dims("lm_head") is not None
        self._reference_caches: dict[str, Any] = {}
        self._free_caches: dict[str, Any] = {}
        self._taught_caches: dict[str, Any] = {}
        self._wrong_past: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        """What pass and site held, ours and theirs, where it was wrong: later passes inherit it."""
        self._continued = {one.continues for one in probe}

    @torch.no_grad()
    def parameters(self) -> None:
        """Both sides read the same file, each by its own map: what they hold is compared first."""
        theirs = {
            f"{name}.{own}": parameter
            for name, module in self.reference.module_sites().items()
            for own, parameter in module.named_parameters(recurse=False)
        }
        for name, ours in self.port.model.named_parameters(remove_duplicate=False):
            if self.table.dims(name.rpartition(".")[0]) is None:
                continue
            account = self.ledger.parameter(name)
            held = theirs.get(name)
            if held is None:
                account.missing = True
            elif held.shape != ours.shape or held.dtype != ours.dtype:
                account.misshapen = f"{tuple(ours.shape)} {ours.dtype} against {held.dtype}"
            elif not torch.equal(ours, held):
                account.unequal.append(difference_as_loaded(account, ours, held))
                self.diagnosis.parameter(name, ours, held)

    def judge(self) -> None:
        """Hold what was recorded since the last time against the truth, and let go of it."""
        self.truth.judge(self._recordings)
        for one in self._recordings:
            for site, ours in (*one.misshapen.items(), *one.unequal.items(), *one.apart.items()):
                if judge(self.ledger.site(site)).verdict is Verdict.diverged:
                    self.diagnosis.culprit(site, one.run, ours, exact=site in one.apart)
        self.diagnosis.let_go()
        self._recordings.clear()

    def causes(self) -> dict[str, Cause]:
        """Why each culprit differs."""
        judged = map(judge, self.ledger.sites.values())
        return self.diagnosis.causes(one for one in judged if one.verdict is Verdict.diverged)

    @torch.no_grad()
    def run(self, one: Pass) -> None:
        """One pass: record, run freely, run taught."""
        trace: Trace = {}
        with (
            watching(self.reference, self.table, recorder(trace)),
            calls_kept(self.reference, self.table) as calls,
        ):
            logits = self.reference.run(one, self._reference_caches)
        if self._compares_logits:
            trace[LOGITS] = logits
        for name in trace:  # in the reference's order, also what the port turns out not to have
            self.ledger.site(name)
        del logits
        if self.matrix is not None:
            self.matrix.see(one, trace)
        self.diagnosis.recorded(one, trace)
        recording = Recording(one, trace, calls, Calls())
        self._run_freely(recording)
        self._run_taught(recording)
        for name in trace:
            account = self.ledger.site(name)
            account.missing = account.missing or name not in recording.seen
        trace.pop(LOGITS, None)  # it has no truth of its own; the head has
        self._recordings.append(recording)

    def _run_freely(self, recording: Recording) -> None:
        one, trace = recording.run, recording.trace

        def look(name: str, ours: Tensor, theirs: Tensor) -> None:
            account = self.ledger.site(name)
            if ours.shape[1:] != theirs.shape[1:]:
                account.carried.append(one.name)
            elif (found := difference(one, account.dims, ours, theirs)) is not None:
                account.carried.append(one.name)
                if ours.is_floating_point() and found.max_difference < torch.inf:
                    a, b = (rows(each, account.dims, one).double() for each in (ours, theirs))
                    account.carried_error.add(squares_of(a - b), len(a))

        with watching(self.port, self.table, looked_at(trace, look)):
            logits = self.port.run(one, self._free_caches)
        if LOGITS in trace:
            look(LOGITS, logits, trace[LOGITS])

    def _run_taught(self, recording: Recording) -> None:
        one, trace = recording.run, recording.trace

        def compare_one(name: str, ours: Tensor, theirs: Tensor) -> None:
            recording.seen.add(name)
            account = self.ledger.site(name)
            if ours.shape[1:] != theirs.shape[1:] or ours.dtype != theirs.dtype:
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
                if name == LOGITS:  # which is not held against a truth
                    self.ledger.add_difference(name, one, ours, theirs)

        with (
            calls_kept(self.port, self.table) as calls,
            watching(self.port, self.table, taught(trace, compare_one)),
        ):
            logits = self.port.run(one, self._taught_caches)
        if LOGITS in trace:
            compare_one(LOGITS, logits, trace[LOGITS])
        recording.port_calls = calls

    def _without_inherited(self, one: Pass, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
        """Keys or values, those taken as right that were wrong already in the pass before.

        They are told of there. A cached key that was right and is wrong now is this pass's.
        """
        before = self._wrong_past.pop((one.continues or "", name), None)
        if one.name in self._continued and not torch.equal(ours, theirs):
            self._wrong_past[one.name, name] = ours.clone(), theirs
        if before is None:
            return ours
        dim = token_dim(self.ledger.site(name).dims)
        past = ours.shape[dim] - one.num_tokens
        held_ours, held_theirs = ours.narrow(dim, 0, past), theirs.narrow(dim, 0, past)
        inherited = torch.ones_like(held_ours, dtype=torch.bool)
        for held, earlier in zip((held_ours, held_theirs), before, strict=True):
            inherited &= held == earlier.narrow(dim, earlier.shape[dim] - past, past)
        mended = ours.clone()
        mended.narrow(dim, 0, past).copy_(held_theirs.where(inherited, held_ours))
        return mended
