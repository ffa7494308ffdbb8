"""Whole models in float64, taught at the sites that both sides have.

The truth of sides that need not be made of the reference's blocks. From one site that both have to
the next a stretch may hold several of the reference's modules; its truth is what the reference
makes of the recorded inputs in float64, its floor how far the reference's own kernels are from
that. Holds one model at a time in float64, and its caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from portkit.parity.judging.distances import Distances
from portkit.parity.judging.heap import release_freed_memory
from portkit.parity.judging.judge import SAME_FUNCTION
from portkit.parity.judging.ledger import Ledger, squares_of
from portkit.parity.judging.local import Recording, Trace, in_place_of
from portkit.parity.judging.precision import (
    casts_lifted,
    held_in_float64,
    ran_out_of_memory,
)
from portkit.parity.judging.tables import is_table, within_frequencies
from portkit.parity.sides.fitting import Fitting
from portkit.parity.sides.sites import LOGITS, CannotRun, Side, SiteTable, watching
from portkit.parity.subject.dims import rows

_SAME_KERNEL = 1e-9
"""Relative RMS in float64 up to which two kernels are one function: masks of the dtype's lowest
number, and sums in another order, stay far below."""


class WholeTruth:
    """Holds recordings against the truth and writes the distances into the ledger."""

    def __init__(self, port: Side, reference: Side, table: SiteTable, ledger: Ledger) -> None:
        self.port, self.reference, self.table, self.ledger = port, reference, table, ledger
        self.distances = Distances(ledger, reference.attention)
        self.fitting = Fitting()
        self.unasked: dict[str, str] = {}
        """What could not be asked of the sides in float64, and why."""
        self.notes: list[str] = []
        self._caches: dict[str, dict[str, Any]] = {}
        self._other_is_same: bool | None = None
        """None: not asked yet."""

    @torch.no_grad()
    def judge(self, recordings: Sequence[Recording]) -> None:
        """Add all sites of these passes, which follow those of the last call."""
        if not recordings:  # a side refused them
            return
        theirs = self._in_float64("the reference", self.reference, recordings)
        ours = self._in_float64("the port", self.port, recordings)
        truths = ours if theirs is None else theirs
        if theirs is None and ours is not None:
            self._note("the truth is the port in float64: the reference cannot run in it")
        for one in recordings:
            for site in one.seen:
                account = self.ledger.site(site)
                account.function_refused |= ours is None
                if truths is None:
                    account.truth_lacking = one.trace[site].is_floating_point()
        for one, truth in zip(recordings, truths or [], strict=False):
            self._hold(one, truth)
        self.distances.close(recordings)
        self._add_other_kernel(recordings, truths)
        if theirs is not None and ours is not None:
            self._ask_all(recordings, theirs, ours)
        release_freed_memory()

    def _ask_all(
        self, recordings: Sequence[Recording], theirs: Sequence[Trace], ours: Sequence[Trace]
    ) -> None:
        with_tables = None
        if any(map(_tables_are_hidden, recordings)):
            with_tables = self._in_float64("the reference", self.reference, recordings, True)
        for number, one in enumerate(recordings):
            variants = [each[number] for each in (theirs, with_tables) if each is not None]
            self._ask(one, variants, ours[number])

    def _hold(self, one: Recording, truth: Trace) -> None:
        for site in one.seen.difference(truth):
            # Experts that take other turns in float64 leave such a site without a truth.
            self.ledger.site(site).truth_lacking |= one.trace[site].is_floating_point()
        for site, exact in truth.items():
            self.distances.hold(one, site, exact)
            if self.reference.is_partial:
                self._allow_one_rounding(one, site, exact)

    def _in_float64(
        self, name: str, side: Side, recordings: Sequence[Recording], tables: bool = False
    ) -> list[Trace] | None:
        """What a side has at the sites of both, pass by pass; None where it cannot be had.

        `tables`: its rotary tables are the recorded ones, though the port does not show its own.
        """
        if name in self.unasked:
            return None
        if side.model is None:
            self.unasked[name] = "it is no module whose parameters could be held"
            return None
        caches = self._caches.setdefault(f"{name} {tables}", {})
        try:
            with held_in_float64(side.model), side.plain_experts():
                return [self._run(side, one, caches, tables) for one in recordings]
        except (CannotRun, RuntimeError, TypeError) as error:
            if ran_out_of_memory(error):
                raise
            self.unasked[name] = str(error).partition("\n")[0]
            return None

    def _run(self, side: Side, one: Recording, caches: dict[str, Any], tables: bool) -> Trace:
        found: Trace = {}

        def visit(site: str, tensor: Tensor) -> Tensor:
            recorded = one.trace.get(site)
            if recorded is None:
                return tensor
            if site in one.seen:
                found[site] = tensor.clone()  # of a buffer that is written later, it may be a part
            elif not (tables and is_table(site)):
                return tensor
            return in_place_of(tensor, recorded)

        shown = self.fitting.visitor(one.run.name, one.trace, visit, lambda *_: None)
        with watching(side, self.table, shown), casts_lifted():
            logits = side.run(one.run, caches)
        if LOGITS in one.seen:
            found[LOGITS] = logits
        return found

    def _allow_one_rounding(self, one: Recording, site: str, truth: Tensor) -> None:
        """A variant in the reference's place may have fused away a rounding that is no mistake.

        Torch's own norm rounds once where a plain one rounds twice; held against it the plain one
        is 1.41 times as far from the truth.
        """
        recorded = one.trace[site]
        if not truth.is_floating_point() or not recorded.is_floating_point():
            return
        account = self.ledger.site(site)
        exact, own = (rows(each, account.dims, one.run).double() for each in (truth, recorded))
        once_more = exact.to(recorded.dtype).double() - exact
        squares = squares_of(own - exact) + squares_of(once_more)
        account.floors["one rounding more"].add(squares, len(exact))

    def _add_other_kernel(
        self, recordings: Sequence[Recording], truths: Sequence[Trace] | None
    ) -> None:
        """The floor is the largest distance among the reference's own kernels, at every site."""
        caches = self._caches.setdefault("the other kernel", {})
        with self.reference.other_kernel():
            if not truths or self.reference.attention == self.distances.kernel:
                return  # there is no truth, no pass that both sides ran, or no other kernel
            if not self._is_same_function(recordings[0], truths[0]):
                return
            for one, truth in zip(recordings, truths, strict=True):
                for site, tensor in self._run_taught(one, caches).items():
                    held = truth.get(site)
                    if held is None or not held.is_floating_point() or tensor.shape != held.shape:
                        continue
                    account = self.ledger.site(site)
                    exact = rows(held, account.dims, one.run)
                    gap = squares_of(rows(tensor, account.dims, one.run), exact)
                    account.floors[self.reference.attention].add(gap, len(exact))

    def _is_same_function(self, one: Recording, truth: Trace) -> bool:
        """Whether the other kernel has in float64 what the one that was asked for has.

        Some families' two kernels are two functions: how far they are apart is no rounding.
        """
        if self._other_is_same is None:
            self._other_is_same = False
            others = self._in_float64("the reference's other kernel", self.reference, [one])
            if others is not None:
                dims = {site: self.ledger.site(site).dims for site in truth}
                self._other_is_same = not any(
                    _apart(one, dims[site], truth[site], other, _SAME_KERNEL)
                    for site, other in others[0].items()
                )
            if not self._other_is_same:
                self._note(
                    f"the reference's {self.reference.attention} attention is another function "
                    f"than its {self.distances.kernel}: the floor is of one kernel alone"
                )
        return self._other_is_same

    def _run_taught(self, one: Recording, caches: dict[str, Any]) -> Trace:
        found: Trace = {}

        def visit(site: str, tensor: Tensor) -> Tensor:
            if site not in one.seen:
                return tensor
            found[site] = tensor.clone()
            recorded = one.trace[site]
            # Masks keep the form that this kernel is given.
            same = recorded.dtype == tensor.dtype and recorded.shape == tensor.shape
            return recorded if same and recorded.is_floating_point() else tensor

        with watching(self.reference, self.table, visit):
            logits = self.reference.run(one.run, caches)
        if LOGITS in one.seen:
            found[LOGITS] = logits
        return found

    def _ask(self, one: Recording, variants: Sequence[Trace], ours: Trace) -> None:
        """Whether both compute the same function, where that can be told.

        Where the port does not show its rotary tables it may hold them rounded, as the reference
        rounds them, or make them anew: `variants` of the reference have them as they are in
        float64, and as recorded.
        """
        for site, port in ours.items():
            if is_table(site) and within_frequencies(one.run, port, variants[0].get(site)):
                continue
            truths = [found for each in variants if (found := each.get(site)) is not None]
            dims = self.ledger.site(site).dims
            fitting = [truth for truth in truths if not _apart(one, dims, truth, port)]
            if fitting or not truths or all(torch.equal(truths[0], each) for each in truths):
                self.distances.ask(one, site, next(iter(fitting or truths), None), port)
            else:
                self.unasked["what the rotary tables go into"] = (
                    "how the port rounds them is out of sight: record them, as in "
                    'record("model#cos", cos)'
                )

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _tables_are_hidden(one: Recording) -> bool:
    tables = [site for site in one.trace if is_table(site)]
    return bool(tables) and not one.seen.intersection(tables)


def _apart(
    one: Recording, dims: str, truth: Tensor, port: Tensor, most: float = SAME_FUNCTION
) -> bool:
    """Whether two in float64 are further apart than one function's, at the real tokens."""
    if truth.shape != port.shape or not truth.is_floating_point():
        return False
    ours, theirs = (rows(each, dims, one.run) for each in (port, truth))
    return float((ours - theirs).norm()) > most * (float(theirs.norm()) or 1.0)
