"""Distances from the truth, of one recorded site at a time, into its account.

Knows recordings and the ledger; how a truth is had is not its affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from portkit.parity.judging.judge import SAME_FUNCTION
from portkit.parity.judging.ledger import Ledger, picked, squares_of
from portkit.parity.judging.local import Recording
from portkit.parity.judging.precision import is_same_memory
from portkit.parity.judging.routing import compared_tokens, logits_before
from portkit.parity.judging.spread import token_sums
from portkit.parity.sides.routing import EXPERTS
from portkit.parity.subject.dims import rows


class Distances:
    """Writes into `ledger`. `kernel`: with which attention the reference was recorded."""

    def __init__(self, ledger: Ledger, kernel: str) -> None:
        self.ledger, self.kernel = ledger, kernel

    def hold(
        self,
        one: Recording,
        name: str,
        truth: Tensor,
        channels: slice | None = None,
        *,
        is_recorded: bool = False,
    ) -> None:
        """Add a site's truth, and how far both sides are from it in the dtype under test.

        `is_recorded`: what was recorded is its own truth, as a module's input is that is another's
        output and was judged there.
        """
        if name not in one.seen or not truth.is_floating_point():
            return
        if name.endswith(EXPERTS):
            self._hold_choice(one, name, truth)
            return
        account, whole = self.ledger.site(name), one.trace[name]
        held = rows(truth, account.dims, one.run)

        def part(recorded: Tensor) -> Tensor:
            found = recorded if channels is None else recorded[..., channels]
            return rows(found, account.dims, one.run)

        block = (channels or slice(None), whole.shape[-1] if channels else None)
        length = squares_of(held)
        floor = torch.zeros_like(length) if is_recorded else squares_of(part(whole), held)
        account.truth.add(length, len(held), *block)
        account.floors[self.kernel].add(floor, len(held), *block)
        unequal = one.unequal.get(name)
        if unequal is None:
            account.port.add(floor, len(held), *block)
        else:
            own, ours = (part(each).double() - held for each in (whole, unequal))
            account.port.add(squares_of(ours), len(held), *block)
            account.spread.add(ours)
            account.floor_spread.add(own)
            sums = token_sums(ours, own, held)
            before = one.by_token.get(name)
            one.by_token[name] = sums if before is None else before + sums

    def _hold_choice(self, one: Recording, name: str, truth: Tensor) -> None:
        """The same for a router's choice, of the tokens whose weights can be compared."""
        account = self.ledger.site(name)

        def of(tensor: Tensor) -> Tensor:
            return rows(tensor, account.dims, one.run).double()

        recorded, by = one.trace[name], logits_before(name, one.trace)
        exact, theirs, ours = map(of, (truth, recorded, one.unequal.get(name, recorded)))
        logits = (of(one.unequal[by]), of(one.trace[by])) if by in one.unequal else None
        floor, port = compared_tokens(exact, theirs, ours, logits)
        own = (theirs - exact).where(floor[:, None], 0)
        ours = (ours - exact).where(port[:, None], 0)
        account.truth.add(squares_of(exact[floor]), int(floor.sum()))
        account.floors[self.kernel].add(squares_of(own), int(floor.sum()))
        account.port.add(squares_of(ours), int(port.sum()))
        if name in one.unequal:
            account.spread.add(ours)
            account.floor_spread.add(own)
            one.by_token[name] = token_sums(ours, own, exact)

    def ask(
        self,
        one: Recording,
        name: str,
        truth: Tensor | None,
        port: Tensor | None,
        channels: slice | None = None,
    ) -> None:
        """Add how far the port is from the truth where both are computed in float64."""
        if truth is None or port is None or name not in one.seen or port.shape != truth.shape:
            return
        if not truth.is_floating_point():  # a mask
            return
        account = self.ledger.site(name)
        account.function_asked = True
        held = rows(truth, account.dims, one.run)
        gap = held.new_zeros(held.shape[1])
        if not is_same_memory(port, truth) and not torch.equal(port, truth):
            ours = rows(port, account.dims, one.run)
            gap = squares_of(ours, held)
            account.function_spread.add(ours - held)
            if channels is None and self._is_slight(one, name, gap, held):
                one.apart[name] = picked(ours)
        width = one.trace[name].shape[-1] if channels else None
        account.function.add(gap, len(held), channels or slice(None), width)

    def _is_slight(self, one: Recording, name: str, gap: Tensor, held: Tensor) -> bool:
        """Another function, and rounding in the dtype under test hides how it differs."""
        error, size = float(gap.sum()), float(squares_of(held).sum())
        step = torch.finfo(one.trace[name].dtype).eps
        hidden = name not in one.unequal or error < step**2 * size
        return hidden and error > SAME_FUNCTION**2 * size

    def close(self, recordings: Sequence[Recording]) -> None:
        """Of these passes all is held: keep their worst tokens."""
        for one in recordings:
            for site, sums in one.by_token.items():
                self.ledger.add_tokens(site, one.run, sums, one.trace[site])
